"""What transforms that are fitted to data share: statistics as buffers, one streaming fit, merging, loading."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from reimpl.data._moments import Data, Moments, chunks


class FittedTransform(nn.Module):
    """An affine map of features whose coefficients come from data.

    The statistics are buffers in float64, saved and loaded with the model that the transform is a part of. A change of
    the model's dtype leaves them alone; a change of device moves them.
    """

    count: Tensor
    mean: Tensor
    scatter: Tensor
    resolution: Tensor

    products: ClassVar[bool]  # whether products between features are gathered
    derived: ClassVar[tuple[str, ...]]  # names of the buffers that `_derive` computes

    def __init__(self, dim: int | Sequence[int] | None, correction: int) -> None:
        super().__init__()
        dims = () if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
        if 0 in dims:
            raise ValueError(f"dim must not hold 0, which runs over the examples, got {dim}")
        if correction < 0:
            raise ValueError(f"correction must be at least 0, got {correction}")
        self.dim = dims
        self.correction = correction
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("resolution", torch.zeros((), dtype=torch.float64))
        for name in ("mean", "scatter", *self.derived):
            self.register_buffer(name, torch.empty(0, dtype=torch.float64))

    @property
    def fitted(self) -> bool:
        """Whether there are statistics to transform with."""
        return self.mean.numel() > 0

    def fit(self, data: Data) -> Self:
        """Takes the statistics of ``data``, in one pass; those of an earlier fit are forgotten.

        Args:
            data: a tensor or array whose first dimension runs over the examples, or an iterable of batches, such as a
                ``DataLoader``; a batch that is a list or tuple counts with its first element. The numbers are taken
                in float64 a chunk at a time, on the device where they are.

        Raises:
            ValueError: there is no example, or too few; a number is NaN or infinite (the text names the column); the
                batches' features differ in shape. The statistics are then those of before.
            TypeError: ``data`` is no tensor, array or iterable of them.
            IndexError: the data have not the dimensions that ``dim`` names.
        """
        total, shape = None, None
        for chunk in chunks(data):
            rows, features = self._rows(chunk)
            if shape is not None and features != shape:
                raise ValueError(f"every batch must have features of shape {shape}, got {features}")
            shape = features
            self._refuse_non_finite(rows, shape)
            moments = Moments.of(rows, self.products)
            total = moments if total is None else total.merge(moments)
        if total is None or shape is None:
            raise ValueError("fit needs at least one example, got none: the data are empty or the loader yielded none")
        self._take(total, shape)
        return self

    def merge(self, *others: Self) -> Self:
        """Adds the statistics of others, as if all had been fitted on one set; what was fitted nowhere adds nothing.

        Several processes fit their shares and one of them merges: send the modules, or their state dicts, with
        ``torch.distributed.all_gather_object`` or through files. The result does not depend on the number of
        processes but for rounding.

        Raises:
            TypeError: another kind of transform.
            ValueError: features of another shape.
        """
        total, shape = (self._moments(), tuple(self.mean.shape)) if self.fitted else (None, ())
        for other in others:
            if type(other) is not type(self):
                raise TypeError(f"expected a {type(self).__name__} to merge, got a {type(other).__name__}")
            if not other.fitted:
                continue
            moments = other._moments().to(self.count.device)
            if total is None:
                total, shape = moments, tuple(other.mean.shape)
            elif tuple(other.mean.shape) != shape:
                raise ValueError(f"expected features of shape {shape} to merge, got {tuple(other.mean.shape)}")
            else:
                total = total.merge(moments)
        if total is not None:
            self._take(total, shape)
        return self

    def inverse(self, input: Tensor) -> Tensor:
        """The data that :meth:`forward` makes ``input`` from."""
        raise NotImplementedError

    def _derive(self, moments: Moments, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """The buffers that the transform works with, from the moments."""
        raise NotImplementedError

    def _moments(self) -> Moments:
        scatter = self.scatter if self.products else self.scatter.flatten()
        return Moments(int(self.count), self.mean.flatten(), scatter, float(self.resolution))

    def _take(self, total: Moments, shape: tuple[int, ...]) -> None:
        if total.count <= self.correction:
            raise ValueError(
                f"fit needs more than {self.correction} values of each feature, as correction={self.correction}, "
                f"got {total.count}"
            )
        if not total.scatter.isfinite().all():
            raise ValueError("the data's squares overflow float64: scale them first")
        device = self.count.device
        derived = self._derive(total, shape)
        scatter = total.scatter if self.products else total.scatter.reshape(shape)
        new = {"mean": total.mean.reshape(shape), "scatter": scatter, **derived}
        for name, value in new.items():
            setattr(self, name, value.to(device))
        self.count.fill_(total.count)
        self.resolution.fill_(total.resolution)

    def _dims(self, x: Tensor) -> list[int]:
        """The feature dimensions of ``x``, counted from its first."""
        dims = sorted(range(x.dim())[d] if -x.dim() <= d < x.dim() else _out_of_range(x, d) for d in self.dim)
        if len(set(dims)) < len(dims) or 0 in dims:
            raise ValueError(f"dim must name different dimensions, none the first, got {self.dim} for {tuple(x.shape)}")
        return dims

    def _rows(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """``x`` as (values, features), and the shape that the features had."""
        dims = self._dims(x)
        shape = tuple(x.shape[d] for d in dims)
        if not x.numel():
            raise ValueError(f"data must hold at least one number an example, got shape {tuple(x.shape)}")
        return x.movedim(dims, list(range(-len(dims), 0))).reshape(-1, prod(shape)), shape

    def _refuse_non_finite(self, rows: Tensor, shape: tuple[int, ...]) -> None:
        bad = ~rows.isfinite().all(0)
        if not bad.any():
            return
        first = int(bad.nonzero()[0])
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), shape)) if shape else ()
        column = f"column {index[0] if len(index) == 1 else index}" if index else "the data"
        what = "NaN" if rows[:, first].isnan().any() else "an infinite number"
        others = f", and so do {int(bad.sum()) - 1} more" if bad.sum() > 1 else ""
        raise ValueError(f"{column} holds {what}{others}; fit needs finite numbers")

    def _check(self, x: Tensor) -> list[int]:
        """The feature dimensions of an input, once it is known that it can be transformed."""
        if not self.fitted:
            raise RuntimeError(f"this {type(self).__name__} is not fitted yet: call fit(data) before using it")
        dims = self._dims(x)
        shape = tuple(x.shape[d] for d in dims)
        if shape != tuple(self.mean.shape):
            raise ValueError(f"expected features of shape {tuple(self.mean.shape)}, as in the fit, got {shape}")
        return dims

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # PyTorch's is not annotated
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, own in self._buffers.items():
            saved = state_dict.get(prefix + name)
            if own is not None and not own.numel() and isinstance(saved, Tensor):  # shapes are known from the fit on
                self._buffers[name] = torch.empty(saved.shape, dtype=own.dtype, device=own.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        dim = self.dim[0] if len(self.dim) == 1 else self.dim or None
        return f"dim={dim}, correction={self.correction}, fitted={self.fitted}"


def working_dtype(x: Tensor) -> torch.dtype:
    """The dtype to compute in: float32 for half precision, the default one for integers."""
    if not x.is_floating_point():
        return torch.get_default_dtype()
    return torch.promote_types(x.dtype, torch.float32)


def result_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a transformed tensor: its own, the default one for integers."""
    return x.dtype if x.is_floating_point() else torch.get_default_dtype()


def two_parts(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``value`` in float64 as the sum of two tensors of ``dtype``, so that the rounding of a mean shifts nothing."""
    high = value.to(dtype)
    return high, (value - high.double()).to(dtype)


def _out_of_range(x: Tensor, dim: int) -> int:
    low, high = -x.dim(), x.dim() - 1
    hint = "; data are (examples, features, ...)" if x.dim() == 1 else ""
    raise IndexError(
        f"Dimension out of range (expected to be in range of [{low}, {high}], but got {dim}): "
        f"dim names a dimension that data of shape {tuple(x.shape)} have not{hint}"
    )
