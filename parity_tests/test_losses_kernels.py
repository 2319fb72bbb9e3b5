"""Softmax and the losses by compiled kernels, and in parts: as near to the oracle, and what they give way to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_functional
from torch.utils._python_dispatch import TorchDispatchMode

import reimpl.functional as F
from parity_tests.functional_cases import refuses_alike, row_of, verdicts
from parity_tests.kernel_launches import without_node
from reimpl.functional._losses import plain as _losses_plain
from reimpl.testing import SEEDS, Sample, Verdict, combine, random_tensor, seeded_generator

pytest.importorskip("numba", reason="the kernels are compiled by Numba")

from numba import njit

from reimpl.functional._losses import numba as _losses_numba
from reimpl.functional._losses import numba_pointwise as _losses_numba_pointwise
from reimpl.functional._losses import numba_targets as _losses_numba_targets
from reimpl.functional._losses.numba_math import exp_of_negative, log_of_positive
from reimpl.functional._node import plan

# PyTorch's word about what its forward mode imports.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")

TECHNIQUES = (
    *("softmax", "log_softmax", "nll_loss", "cross_entropy", "mse_loss", "binary_cross_entropy"),
    "binary_cross_entropy_with_logits",
)
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    without_node(monkeypatch)
    with F.use_kernels():
        yield


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The addresses of the kernels that run from here on."""
    addresses: list[int] = []
    original = plan.run

    def noting(step: plan.Step, *args: Any) -> Any:
        addresses.append(step.launches[0][0])
        return original(step, *args)

    for module in (_losses_numba, _losses_numba_pointwise, _losses_numba_targets):
        monkeypatch.setattr(module, "run", noting)
    return addresses


@pytest.mark.parity
@pytest.mark.parametrize("name", TECHNIQUES)
def test_three_way_parity(name: str, record: Callable[..., Verdict], ran: list[int]) -> None:
    row, found = row_of(name), {}
    assert row.samples is not None
    for seed in SEEDS:
        for sample in row.samples(torch.device("cpu"), torch.float32, seeded_generator(seed, name)):
            # the gradient of a target is left to operators
            args = (sample.args[0], *(a.detach() if isinstance(a, Tensor) else a for a in sample.args[1:]))
            for quantity, verdict in verdicts(row, Sample(args, sample.kwargs, sample.desc), seed):
                found.setdefault((sample.desc, quantity), []).append(verdict)
    # of indices and of probabilities
    kinds = 2 if name == "cross_entropy" else 1
    assert len(set(ran)) == 2 * kinds, "a forward and a backward kernel"
    for (case, quantity), verdicts_of_seeds in found.items():
        verdict = combine(verdicts_of_seeds)
        record(
            verdict, kind="function", technique=name, ids=row.ids, case=case, quantity=quantity,
            implementation="kernels", device="cpu", dtype=torch.float32, seeds=len(SEEDS),
        )  # fmt: skip
        verdict.check(f"{name}, kernels", case, quantity)


def test_a_wrong_kernel_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _losses_numba.index_loss_gradient
    monkeypatch.setattr(_losses_numba, "index_loss_gradient", lambda *args: right(*args) * (1 + 1e-5))
    logits = torch.randn(8, 5, requires_grad=True)
    sample = Sample((logits, torch.arange(8) % 5), {})
    found = dict(verdicts(row_of("cross_entropy"), sample, 0))
    assert found["output"].ok and not found["gradient 0"].ok


def compare(ours: Any, theirs: Any, leaves: tuple[Tensor, ...], seed: int) -> None:
    """Values and gradients against PyTorch's of float64."""
    # PyTorch's likelihood of planes has a gradient for contiguous ones alone
    wide = tuple(leaf.detach().double().contiguous().requires_grad_() for leaf in leaves)
    mine, exact = ours(*leaves), theirs(*wide)
    grad = random_tensor(exact.shape, torch.float32, seeded_generator(seed, "grad"))
    mine_grads = torch.autograd.grad(mine, leaves, grad)
    exact_grads = torch.autograd.grad(exact, wide, grad.double())
    for one, other in zip((mine, *mine_grads), (exact, *exact_grads), strict=True):
        # Roundings of logits of size 10 and of sums of some hundred terms, each within an eps of the largest.
        limit = 32 * EPS * float(other.detach().abs().max().clamp_min(1e-3))
        torch.testing.assert_close(one.double(), other, rtol=0, atol=limit)


SHAPES = ((64, 10), (700, 7), (3, 5000), (5, 33, 3), (2, 21, 70, 70), (1, 40, 1), (4, 1, 3))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_softmax_of_every_shape(shape: tuple[int, ...], threads: int, ran: list[int]) -> None:
    torch.set_num_threads(threads)
    x = (3 * random_tensor(shape, torch.float32, seeded_generator(0, shape))).requires_grad_()
    for dim in range(len(shape)):
        for name in ("softmax", "log_softmax"):
            ours, theirs = getattr(F, name), getattr(torch_functional, name)
            compare(lambda x, f=ours, d=dim: f(x, d), lambda x, f=theirs, d=dim: f(x, d), (x,), dim)
    transposed = x.detach().mT.requires_grad_()
    compare(lambda x: F.softmax(x, 0), lambda x: torch.softmax(x, 0), (transposed,), 0)
    assert len(ran) == 4 * len(shape) + 2


def in_float64(call: Callable[..., Tensor], *constants: Tensor | None, **options: Any) -> Callable[[Tensor], Tensor]:
    """PyTorch's function of one tensor with the floating-point constants widened."""
    wide = [c if c is None or not c.is_floating_point() else c.double() for c in constants]
    return lambda x: call(x, *wide, **options)


MODES = pytest.mark.parametrize("mode", [True, False], ids=["kernels", "operators"])


# with one class the gradient is all cancellation
@MODES
@pytest.mark.parametrize("shape", (*SHAPES[:-1], (4, 2, 3)), ids=str)
def test_class_indices_with_every_option(shape: tuple[int, ...], mode: bool, ran: list[int]) -> None:
    generator = seeded_generator(1, shape)
    x = (3 * random_tensor(shape, torch.float32, generator)).requires_grad_()
    drawn = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=generator)
    weight = random_tensor(shape[1:2], torch.float32, generator).abs()
    for reduction, ignore_index, w in product(("none", "mean", "sum"), (-100, 0), (None, weight)):
        target = drawn.clone()
        # a mean over nothing is NaN, and so said by PyTorch
        target.view(-1)[: 1 if target.numel() > 1 else 0] = ignore_index
        if not (target != ignore_index).any():
            continue
        options = {"ignore_index": ignore_index, "reduction": reduction}
        calls = [("nll_loss", options)]
        calls += [("cross_entropy", {**options, "label_smoothing": smoothing}) for smoothing in (0.0, 0.2)]
        for name, given in calls:
            ours, theirs = getattr(F, name), getattr(torch_functional, name)
            with F.use_kernels(mode):
                compare(
                    partial(ours, target=target, weight=w, **given), in_float64(theirs, target, w, **given), (x,), 0
                )
    assert bool(ran) == mode


@MODES
@pytest.mark.parametrize("shape", (*SHAPES[:-1], (4, 2, 3), (7,)), ids=str)
def test_class_probabilities_with_every_option(shape: tuple[int, ...], mode: bool, ran: list[int]) -> None:
    generator = seeded_generator(2, shape)
    x = (3 * random_tensor(shape, torch.float32, generator)).requires_grad_()
    dim = 0 if len(shape) == 1 else 1
    target = random_tensor(shape, torch.float32, generator).softmax(dim)
    weight = random_tensor((shape[dim],), torch.float32, generator).abs()
    for reduction, smoothing, w in product(("none", "mean", "sum"), (0.0, 0.2), (None, weight)):
        given: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
        theirs = in_float64(torch_functional.cross_entropy, target, w, **given)
        with F.use_kernels(mode):
            compare(partial(F.cross_entropy, target=target, weight=w, **given), theirs, (x,), 0)
    assert bool(ran) == mode


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_probabilities_wider_than_scores(dtype: torch.dtype) -> None:
    x, t = torch.randn(4, 3).to(dtype).requires_grad_(), torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    loss = F.cross_entropy(x, t, label_smoothing=0.1)
    expected = torch_functional.cross_entropy(x.double(), t, label_smoothing=0.1)
    assert loss.dtype == torch.float64
    # both in float64, of sums of a few numbers
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)
    ours, theirs = (torch.autograd.grad(of, (x, t), create_graph=True) for of in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-15)
    ours, theirs = (torch.autograd.grad(of[1].pow(2).sum(), (x, t), allow_unused=True) for of in (ours, theirs))
    torch.testing.assert_close(ours[0], theirs[0], rtol=4 * torch.finfo(dtype).eps, atol=1e-15)


@MODES
def test_probabilities_that_are_trained_take_operators(mode: bool, ran: list[int]) -> None:
    x, t = torch.randn(4, 3, requires_grad=True), torch.rand(4, 3, requires_grad=True)
    w = torch.rand(3, requires_grad=True)
    with F.use_kernels(mode):
        compare(F.cross_entropy, torch_functional.cross_entropy, (x, t, w), 0)
    assert not ran


@MODES
@pytest.mark.parametrize("ignore_index", [-100, 1])
def test_nothing_counts(ignore_index: int, mode: bool) -> None:
    x, target = torch.randn(3, 4, requires_grad=True), torch.full((3,), ignore_index)
    with F.use_kernels(mode):
        for name in ("cross_entropy", "nll_loss"):
            loss = getattr(F, name)(x, target, ignore_index=ignore_index)
            assert loss.isnan()
            assert torch.equal(torch.autograd.grad(loss, x)[0], torch.zeros_like(x))
    weighted = torch_functional.cross_entropy(x, torch.zeros(3, dtype=torch.long), torch.zeros(4))
    with F.use_kernels(mode):
        assert F.cross_entropy(x, torch.zeros(3, dtype=torch.long), torch.zeros(4)).isnan() == weighted.isnan()


@MODES
def test_other_layouts(mode: bool) -> None:
    x = torch.randn(2, 5, 6, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    index = torch.randint(0, 5, (2, 4, 6)).mT
    t, w = torch.rand(2, 6, 4, 5).movedim(3, 1), torch.rand(5, 2)[:, 0]
    with F.use_kernels(mode):
        for name, target in (("nll_loss", index), ("cross_entropy", index), ("cross_entropy", t)):
            for reduction in ("none", "mean"):
                theirs = in_float64(getattr(torch_functional, name), target, w, reduction=reduction)
                compare(partial(getattr(F, name), target=target, weight=w, reduction=reduction), theirs, (x,), 0)


def test_within_a_transform_of_something_else() -> None:
    x, index = torch.randn(4, 3), torch.arange(4) % 3

    def scaled(factor: Tensor) -> Tensor:
        total = F.cross_entropy(x, index) + F.nll_loss(x, index) + F.softmax(x, 1).sum() + F.cross_entropy(x, x * x)
        return factor * (total + F.mse_loss(x, x * x))

    torch.testing.assert_close(torch.func.grad(scaled)(torch.tensor(2.0)), scaled(torch.tensor(1.0)))


@MODES
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_large_losses_in_blocks(mode: bool, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_PART", "_PART_ALONG"):
        monkeypatch.setattr(_losses_plain, name, 1 << 10)
    monkeypatch.setattr(_losses_numba, "_COLUMNS_BLOCK", 1 << 10)
    for plans in (_losses_numba.index_plan, _losses_numba_targets.picked_plan, _losses_numba_targets.probability_plan):
        plans.cache_clear()
    generator = seeded_generator(2, reduction)
    x = (4 * random_tensor((37, 11, 100), torch.float32, generator)).requires_grad_()
    t = torch.rand(x.shape, generator=generator)
    p = torch.rand(x.shape, generator=generator).requires_grad_()
    index = torch.randint(0, 11, (37, 100), generator=generator)
    with F.use_kernels(mode):
        for name, leaf, target in (
            ("mse_loss", x, t),
            ("binary_cross_entropy", p, t),
            ("binary_cross_entropy_with_logits", x, t),
            ("cross_entropy", x, index),
            ("cross_entropy", x, t),
            ("nll_loss", x, index),
        ):
            ours, theirs = getattr(F, name), getattr(torch_functional, name)
            wide = target.double() if target.is_floating_point() else target
            compare(
                lambda x, f=ours, t=target: f(x, t, reduction=reduction),
                lambda x, f=theirs, t=wide: f(x, t, reduction=reduction),
                (leaf,),
                0,
            )
        for name in ("softmax", "log_softmax"):
            ours, theirs = getattr(F, name), getattr(torch_functional, name)
            compare(lambda x, f=ours: f(x, 1), lambda x, f=theirs: f(x, 1), (x,), 0)


@MODES
def test_non_finite_numbers(mode: bool) -> None:
    inf, nan = torch.inf, torch.nan
    rows = [[1.0, -inf, 2.0], [inf, 0.0, 1.0], [nan, 0.0, 1.0], [-nan, 0.0, 1.0], [-inf, -inf, -inf], [3e38, -3e38, 0]]
    index = torch.tensor([0, 1, 2, 0, 0, 0])
    half = torch.full((6, 3), 0.5)
    with F.use_kernels(mode):
        for shape in ((6, 3), (6, 3, 1), (1, 6, 3)):
            data = torch.tensor(rows).reshape(shape)
            for call in (
                lambda m, x: m.softmax(x, -2),
                lambda m, x: m.log_softmax(x, 1),
                lambda m, x: m.cross_entropy(x.reshape(6, 3), index, reduction="none"),
                lambda m, x: m.cross_entropy(x.reshape(6, 3), index, label_smoothing=0.1, reduction="none"),
                lambda m, x: m.cross_entropy(x.reshape(6, 3), index, ignore_index=0, reduction="none"),
                lambda m, x: m.cross_entropy(x.reshape(6, 3), half, reduction="none"),
                lambda m, x: m.nll_loss(x.reshape(6, 3), index, half[0], ignore_index=1, reduction="none"),
                lambda m, x: m.mse_loss(x.reshape(6, 3), half, reduction="none"),
                lambda m, x: m.binary_cross_entropy_with_logits(x.reshape(6, 3), half, reduction="none"),
                lambda m, x: m.binary_cross_entropy_with_logits(x.reshape(6, 3), torch.ones(6, 3)),
            ):
                results = []
                for module in (F, torch_functional):
                    x = data.clone().requires_grad_()
                    y = call(module, x)
                    results.append((y, *torch.autograd.grad(y, x, torch.ones_like(y))))
                for ours, theirs in zip(*results, strict=True):
                    torch.testing.assert_close(ours, theirs, equal_nan=True)


@MODES
def test_refusals(mode: bool) -> None:
    x, p = torch.randn(4, 3), torch.rand(4, 3)
    with F.use_kernels(mode):
        for name in ("cross_entropy", "nll_loss"):
            for wrong in (3, -1):
                for args in (
                    (x, torch.tensor([0, 1, wrong, 2])),
                    (x[:, :, None], torch.tensor([[0], [1], [2], [wrong]])),
                ):
                    refuses_alike(getattr(F, name), getattr(torch_functional, name), args, {})
        for first, second in ((p + 1, p), (p, p - 1), (p * torch.nan, p)):
            with pytest.raises(RuntimeError, match="between 0 and 1"):
                F.binary_cross_entropy(first, second)
        empty = torch.zeros(0, 3, requires_grad=True)
        assert F.cross_entropy(empty, torch.zeros(0, dtype=torch.long)).isnan()
        assert F.mse_loss(empty, torch.zeros(0, 3)).isnan()
        assert F.softmax(empty, 1).shape == (0, 3)


def losses(x: Tensor, t: Tensor) -> Tensor:
    index = torch.arange(len(x)) % x.shape[1]
    total = F.cross_entropy(x, index, label_smoothing=0.1) + F.nll_loss(F.log_softmax(x, 1), index)
    total = total + F.cross_entropy(x, t, t[0], label_smoothing=0.1) + F.cross_entropy(x, index, t[0], ignore_index=1)
    total = total + F.mse_loss(x, t) + F.binary_cross_entropy_with_logits(x, t)
    return total + F.binary_cross_entropy(F.softmax(x, 1), t)


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_kernels_give_way(ran: list[int]) -> None:
    x = torch.randn(5, 3)
    t = torch.rand(5, 3)
    direction = torch.randn_like(x)
    expected = torch.func.jvp(lambda x: losses(x, t.double()), (x.double(),), (direction.double(),))
    found = torch.func.jvp(lambda x: losses(x, t), (x,), (direction,))
    torch.testing.assert_close(found, tuple(v.float() for v in expected))
    batch = torch.randn(4, 5, 3)
    mapped = torch.vmap(torch.func.grad(losses), (0, None))(batch, t)
    each = torch.stack([torch.func.grad(losses)(x.double(), t.double()) for x in batch])
    torch.testing.assert_close(mapped, each.float())
    with _Seen() as mode:
        losses(x, t)
    assert {"exp2_", "log_"} <= mode.names
    assert not ran
    assert torch.isfinite(losses(x.clone().requires_grad_(), t)) and ran


@MODES
def test_higher_derivatives(mode: bool) -> None:
    x, t = torch.randn(5, 3, dtype=torch.float64).requires_grad_(), torch.rand(5, 3, dtype=torch.float64)
    with F.use_kernels(mode):
        assert torch.autograd.gradgradcheck(lambda x: losses(x, t), (x,))
        narrow, narrow_t = x.detach().float().requires_grad_(), t.float()
        (first,) = torch.autograd.grad(losses(narrow, narrow_t), narrow, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), narrow)
        # several gradients at once: the backward pass is mapped over
        y = F.log_softmax(narrow, 1)
        grads = torch.randn(2, *y.shape)
        (many,) = torch.autograd.grad(y, narrow, grads, retain_graph=True, is_grads_batched=True)
        each = torch.stack([torch.autograd.grad(y, narrow, g, retain_graph=True)[0] for g in grads])
    (first_wide,) = torch.autograd.grad(losses(x, t), x, create_graph=True)
    (second_wide,) = torch.autograd.grad(first_wide.square().sum(), x)
    torch.testing.assert_close(first, first_wide.float())
    torch.testing.assert_close(second, second_wide.float())
    torch.testing.assert_close(many, each)


@MODES
def test_no_more_is_saved_than_by_pytorch(mode: bool) -> None:
    x, t = torch.randn(6, 5, requires_grad=True), torch.rand(6, 5)
    index = torch.arange(6) % 5

    def saved(call: Callable[[], Tensor]) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            call()
        return sum(sizes.values())

    with F.use_kernels(mode):
        for call in (
            lambda m: m.softmax(x, 1),
            lambda m: m.log_softmax(x, 1),
            lambda m: m.cross_entropy(x, index),
            lambda m: m.cross_entropy(x, index, t[0], ignore_index=2),
            lambda m: m.cross_entropy(x, t),
            lambda m: m.nll_loss(x, index),
            lambda m: m.mse_loss(x, t),
            lambda m: m.binary_cross_entropy(x.sigmoid(), t),
            lambda m: m.binary_cross_entropy_with_logits(x, t),
        ):
            assert saved(lambda c=call: c(F)) <= saved(lambda c=call: c(torch_functional))


@njit(error_model="numpy")
def _exps(x: Any, y: Any) -> None:
    for i in range(len(x)):
        y[i] = exp_of_negative(x[i])


@njit(error_model="numpy")
def _logs(x: Any, y: Any) -> None:
    for i in range(len(x)):
        y[i] = log_of_positive(x[i])


def test_exponential_and_logarithm_within_an_ulp() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([-rng.exponential(3, 1 << 16), -rng.random(1 << 16) * 104]).astype(np.float32)
    p = np.exp(rng.uniform(-103, 5, 1 << 17)).astype(np.float32)
    for kernel, exact, numbers in ((_exps, np.exp, x), (_logs, np.log, p[p > 0])):
        found = np.empty_like(numbers)
        kernel(numbers, found)
        expected = exact(numbers.astype(np.float64))
        # one ulp, the bound of PyTorch's own vectorised functions
        assert np.all(np.abs(found - expected) <= np.spacing(np.abs(expected).astype(np.float32)))
    special = np.array([0.0, -np.inf, np.nan], np.float32)
    found = np.empty_like(special)
    _exps(special, found)
    np.testing.assert_array_equal(found, np.exp(special))
