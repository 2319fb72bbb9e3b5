"""Tolerances that are derived, not guessed: errors in ulp of the magnitude sum, judged against PyTorch's own error."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from reimpl.testing.declarations import Array

#: Ours may be this many times as far from the truth as PyTorch is.
FACTOR_OVER_TORCH = 2.0
#: ... and is never held to less than this: a handful of correctly rounded operations lies within 4 ulp.
FLOOR_ULP = 4.0

#: NumPy's widest real type. Where its mantissa is no wider than float64's (MSVC, some ARM systems) the oracle of
#: float64 runs in float64 itself, and an error measured there includes the oracle's own, of the same size.
LONGDOUBLE_IS_WIDER = bool(np.finfo(np.longdouble).nmant >= 63)


def oracle_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """The precision in which the oracle of a tensor of ``dtype`` computes: the next one up.

    float64 for float32 and below, ``longdouble`` for float64 (float64 where ``longdouble`` is no wider), and the
    complex type with such parts for complex tensors. Integers and booleans keep their type.
    """
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.empty((), dtype=dtype).numpy().dtype
    wide = LONGDOUBLE_IS_WIDER and torch.finfo(dtype).bits >= 64
    real, imaginary = (np.longdouble, np.clongdouble) if wide else (np.float64, np.complex128)
    return np.dtype(imaginary if dtype.is_complex else real)


def to_oracle(tensor: torch.Tensor) -> Array:
    """A copy of ``tensor`` as an array in the next precision up (see :func:`oracle_dtype`); the values are exact."""
    value = tensor.detach().to_dense() if tensor.layout is not torch.strided else tensor.detach()
    value = value.resolve_conj().resolve_neg().cpu()
    if value.is_floating_point() and value.dtype not in (torch.float32, torch.float64):
        value = value.to(torch.float32)  # NumPy has no bfloat16; float32 holds all smaller types exactly
    return np.array(value.numpy(), dtype=oracle_dtype(tensor.dtype), copy=True)


@dataclass(frozen=True)
class Error:
    """The largest error of a tensor: ``abs`` as a number, ``ulp`` in units of the magnitude, ``index`` where."""

    abs: float
    ulp: float
    index: tuple[int, ...] = ()


def real_parts(array: Array) -> Array:
    """Complex numbers as pairs of reals in a last dimension."""
    return np.stack([array.real, array.imag], axis=-1) if np.iscomplexobj(array) else array


def _saturate(exact: Array, largest: float) -> Array:
    """``exact`` with the numbers that ``dtype`` rounds to infinity replaced by it."""
    with np.errstate(invalid="ignore"):
        return np.where(np.abs(exact) > largest, np.copysign(np.asarray(np.inf, exact.dtype), exact), exact)


def locate_error(actual: torch.Tensor | Array, exact: Array, magnitude: Array | None, dtype: torch.dtype) -> Error:
    """The largest error of ``actual`` and where it is; see :func:`ulp_error` for the definition."""
    measured = to_oracle(actual) if isinstance(actual, torch.Tensor) else np.asarray(actual)
    exact = np.asarray(exact)
    if measured.shape != exact.shape:
        raise ValueError(f"actual has shape {measured.shape}, exact has shape {exact.shape}; they must be equal")
    if exact.size == 0:
        return Error(0.0, 0.0)
    scale = np.broadcast_to(
        np.abs(real_parts(exact if magnitude is None else np.asarray(magnitude))), real_parts(exact).shape
    )
    measured, exact = real_parts(measured), real_parts(exact)

    finfo = torch.finfo(dtype)
    # Half a spacing above the largest number is where rounding to nearest goes to infinity.
    exact = _saturate(exact, float(finfo.max) * (1 + finfo.eps / 4) if finfo.bits < 64 else float(finfo.max))
    finite = np.isfinite(measured) & np.isfinite(exact)
    same = (np.isnan(measured) & np.isnan(exact)) | (measured == exact)
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.where(same, 0.0, np.where(finite, np.abs(measured - exact), np.inf))
        scale = np.maximum(np.where(np.isfinite(scale), scale, 0), np.where(np.isfinite(exact), np.abs(exact), 0))
        ulp = difference / (finfo.eps * np.maximum(scale, finfo.tiny))
    worst = np.unravel_index(int(np.argmax(ulp)), ulp.shape)
    return Error(float(difference.max()), float(ulp[worst]), tuple(int(i) for i in worst))


def ulp_error(
    actual: torch.Tensor | Array, exact: Array, magnitude: Array | None, dtype: torch.dtype
) -> tuple[float, float]:
    r"""The largest error of ``actual`` over the tensor, as a number and in ulp.

    .. math:: \max_i \frac{|actual_i - exact_i|}{\varepsilon(dtype)\,\max(magnitude_i, |exact_i|, tiny)}

    The magnitude is the sum of the absolute values that were added up to reach element ``i``, so that cancellation
    is not blamed on anyone; ``None`` stands for ``|exact|``. Complex numbers are compared as pairs of reals. NaN and
    infinities must stand at the same places (where ``exact`` lies beyond the range of ``dtype``, infinity is right);
    otherwise both errors are infinite.

    Raises:
        ValueError: the shapes of ``actual`` and ``exact`` differ.
    """
    error = locate_error(actual, exact, magnitude, dtype)
    return error.abs, error.ulp


def bits_equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors agree to the last bit: dtype, shape, values, the signs of zeros, and NaN where NaN."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    left, right = left.detach().cpu(), right.detach().cpu()
    if left.layout is not torch.strided or right.layout is not torch.strided:
        left, right = left.to_dense(), right.to_dense()
    if left.is_complex():
        left, right = torch.view_as_real(left.resolve_conj()), torch.view_as_real(right.resolve_conj())
    if not left.is_floating_point():
        return bool(torch.equal(left, right))
    same = (left == right) & (torch.signbit(left) == torch.signbit(right))
    return bool((same | (left.isnan() & right.isnan())).all())


def operand_ulp(actual: torch.Tensor, reference: torch.Tensor, *operands: torch.Tensor | Array) -> float:
    """``max |actual - reference| / (eps * max |operands|)``, element by element: the measure of one fused step.

    ``operands`` are the numbers that meet in the step's last addition, such as the parameter before and the update;
    the reference itself is always one of them.
    """
    arrays = [to_oracle(x) if isinstance(x, torch.Tensor) else x for x in (reference, *operands)]
    scale = np.maximum.reduce([np.abs(real_parts(x)) for x in arrays])
    return locate_error(real_parts(to_oracle(actual)), real_parts(arrays[0]), scale, reference.dtype).ulp


@dataclass(frozen=True)
class Verdict:
    """How far ours and PyTorch's are from the oracle, and whether that is near enough.

    Args:
        ours_abs: largest absolute error of ours.
        ours_ulp: largest error of ours in ulp of the magnitude.
        torch_abs: PyTorch's, ``None`` where PyTorch has no counterpart.
        torch_ulp: PyTorch's, ``None`` where PyTorch has no counterpart.
        limit_ulp: what ours had to keep: the larger of twice PyTorch's error and 4, or the case's own limit.
        ok: whether ours kept it.
        bitwise: whether ours and PyTorch's are equal to the last bit; ``None`` where there is nothing to compare.
        where: the worst element in words: its index and the values there.
    """

    ours_abs: float
    ours_ulp: float
    torch_abs: float | None
    torch_ulp: float | None
    limit_ulp: float
    ok: bool
    bitwise: bool | None
    where: str = ""

    def check(self, technique: str, case: str, quantity: str = "") -> Verdict:
        """Return the verdict itself, or raise ``AssertionError`` with what, where and by how much."""
        if self.ok:
            return self
        theirs = "none" if self.torch_ulp is None else f"{self.torch_ulp:.3g} ulp"
        subject = f"{technique} [{case}]" + (f" {quantity}" if quantity else "")
        raise AssertionError(
            f"{subject}: {self.ours_ulp:.3g} ulp from the oracle, limit {self.limit_ulp:.3g} "
            f"(PyTorch's error: {theirs}); worst at {self.where}"
        )


def judge(
    ours: torch.Tensor,
    torch_result: torch.Tensor | None,
    exact: Array,
    magnitude: Array | None = None,
    dtype: torch.dtype | None = None,
    *,
    limit_ulp: float | None = None,
) -> Verdict:
    """Hold ``ours`` and PyTorch's result against the oracle's.

    Args:
        ours: our result.
        torch_result: PyTorch's, or ``None`` where it has no counterpart.
        exact: the oracle's, in the next precision up.
        magnitude: the scale of the numbers added up, element by element (default ``|exact|``).
        dtype: the type whose ulp counts (default: that of ``ours``).
        limit_ulp: replaces the floor of 4 ulp where a longer chain of roundings is derived for the case.

    Returns:
        the verdict: ours passes at the larger of twice PyTorch's error and 4 ulp (or ``limit_ulp``). Where PyTorch's
        own error is infinite it gives no licence, and the floor alone counts.
    """
    dtype = dtype or ours.dtype
    mine = locate_error(ours, exact, magnitude, dtype)
    theirs = None if torch_result is None else locate_error(torch_result, exact, magnitude, dtype)
    floor = FLOOR_ULP if limit_ulp is None else limit_ulp
    limit = floor
    if theirs is not None and np.isfinite(theirs.ulp):
        limit = max(floor, FACTOR_OVER_TORCH * theirs.ulp)
    return Verdict(
        ours_abs=mine.abs,
        ours_ulp=mine.ulp,
        torch_abs=None if theirs is None else theirs.abs,
        torch_ulp=None if theirs is None else theirs.ulp,
        limit_ulp=limit,
        ok=mine.ulp <= limit,
        bitwise=None if torch_result is None else bits_equal(ours, torch_result),
        where=_describe(mine.index, ours, torch_result, exact),
    )


def _describe(index: tuple[int, ...], ours: torch.Tensor, torch_result: torch.Tensor | None, exact: Array) -> str:
    if np.asarray(exact).size == 0:
        return "an empty tensor"

    def at(value: Array) -> str:
        return np.format_float_scientific(real_parts(value)[index], precision=20, unique=True)

    theirs = "none" if torch_result is None else at(to_oracle(torch_result))
    return f"index {index}: ours {at(to_oracle(ours))}, torch {theirs}, oracle {at(np.asarray(exact))}"


def combine(verdicts: Iterable[Verdict]) -> Verdict:
    """One verdict over several seeds: the largest errors of each side, judged as if they were one tensor.

    Raises:
        ValueError: there are no verdicts.
    """
    rows = list(verdicts)
    if not rows:
        raise ValueError("combine() needs at least one verdict, got none")
    worst = max(rows, key=lambda row: row.ours_ulp)
    limit = max(row.limit_ulp for row in rows)
    bitwise = None if any(row.bitwise is None for row in rows) else all(row.bitwise for row in rows)
    return replace(
        worst,
        ours_abs=max(row.ours_abs for row in rows),
        torch_abs=_largest(row.torch_abs for row in rows),
        torch_ulp=_largest(row.torch_ulp for row in rows),
        limit_ulp=limit,
        ok=worst.ours_ulp <= limit,
        bitwise=bitwise,
    )


def _largest(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None


def assert_parity(
    ours: torch.Tensor,
    torch_result: torch.Tensor | None,
    exact: Array,
    magnitude: Array | None = None,
    dtype: torch.dtype | None = None,
    *,
    technique: str,
    case: str,
    quantity: str = "",
    limit_ulp: float | None = None,
) -> Verdict:
    """:func:`judge`, raising ``AssertionError`` that names technique, case, index and the three values."""
    return judge(ours, torch_result, exact, magnitude, dtype, limit_ulp=limit_ulp).check(technique, case, quantity)


def assert_bitwise(ours: torch.Tensor, torch_result: torch.Tensor, *, technique: str, case: str, quantity: str) -> None:
    """Require equality to the last bit; the ``AssertionError`` says how many elements differ and shows the first."""
    if bits_equal(ours, torch_result):
        return
    subject = f"{technique} [{case}] {quantity}"
    if ours.dtype != torch_result.dtype or ours.shape != torch_result.shape:
        raise AssertionError(
            f"{subject}: ours is {ours.dtype} of shape {tuple(ours.shape)}, "
            f"torch's is {torch_result.dtype} of shape {tuple(torch_result.shape)}"
        )
    mine, theirs = real_parts(to_oracle(ours)), real_parts(to_oracle(torch_result))
    wrong = np.argwhere(
        ~((mine == theirs) & (np.signbit(mine) == np.signbit(theirs))) & ~(np.isnan(mine) & np.isnan(theirs))
    )
    first = tuple(int(i) for i in wrong[0])
    raise AssertionError(
        f"{subject}: {len(wrong)} of {mine.size} elements are not equal to the last bit; first at index {first}: "
        f"ours {_shortest(mine[first], ours.dtype)}, torch {_shortest(theirs[first], ours.dtype)}"
    )


def _shortest(value: Any, dtype: torch.dtype) -> str:
    """The fewest digits that tell ``value`` from its neighbours in float64 (which holds every smaller type)."""
    return repr(float(value)) if dtype not in (torch.float32, torch.complex64) else str(np.float32(value))
