"""Clipping of gradients: PyTorch's bits, errors and warnings, and the oracle's numbers."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from parity_tests.oracle import averaging as oracle
from reimpl.nn import utils
from reimpl.testing.guard import independence_guard
from reimpl.testing.samples import SEEDS, random_tensor, seeded_generator
from reimpl.testing.tolerance import bits_equal, judge, to_oracle

pytestmark = pytest.mark.quick
SHAPES = ((), (7,), (5, 13), (2, 3, 4, 5), (1001,))
NORMS = (2.0, 1.0, 3.0, 0.5, 0.0, math.inf, -math.inf, "inf")
FOREACH = pytest.mark.parametrize("foreach", [None, True, False])


def _params(dtypes: Sequence[torch.dtype], device: torch.device, seed: int = 0) -> list[torch.Tensor]:
    """Parameters of mixed dtypes, the last without a gradient."""
    params = []
    for index, shape in enumerate((*SHAPES, (3,))):
        dtype = dtypes[index % len(dtypes)]
        p = torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)
        if index < len(SHAPES):
            p.grad = random_tensor(shape, dtype, seeded_generator(seed, "clip", index), device) * 3
        params.append(p)
    return params


def _pair(dtypes: Sequence[torch.dtype], device: torch.device) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return _params(dtypes, device), _params(dtypes, device)


def _assert_same_grads(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for p, q in zip(ours, theirs, strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or bits_equal(p.grad, q.grad)


DTYPES = [
    (torch.float32,),
    (torch.float64,),
    (torch.bfloat16,),
    (torch.complex64,),
    (torch.float32, torch.float64, torch.bfloat16),
]


@FOREACH
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:Casting complex values to real")  # the 0-norm, in PyTorch's too
@pytest.mark.parametrize("norm_type", NORMS, ids=str)
def test_clip_grad_norm_is_pytorchs(
    norm_type: float, dtypes: tuple[torch.dtype, ...], foreach: bool | None, device: torch.device
) -> None:
    for max_norm in (0.7, 1e6, 0.0):
        ours, theirs = _pair(dtypes, device)
        got = utils.clip_grad_norm_(ours, max_norm, norm_type, foreach=foreach)
        expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type, foreach=foreach)
        assert bits_equal(got, expected) and got.device == expected.device
        _assert_same_grads(ours, theirs)


@FOREACH
@pytest.mark.parametrize("dtypes", [row for row in DTYPES if row != (torch.complex64,)], ids=str)
def test_clip_grad_value_is_pytorchs(
    dtypes: tuple[torch.dtype, ...], foreach: bool | None, device: torch.device
) -> None:
    for value in (0.5, 100, 0.0):
        ours, theirs = _pair(dtypes, device)
        for params in (ours, theirs):
            params[1].grad[:3] = torch.tensor([math.nan, math.inf, -math.inf])
        assert utils.clip_grad_value_(ours, value, foreach=foreach) is None
        torch.nn.utils.clip_grad_value_(theirs, value, foreach=foreach)
        _assert_same_grads(ours, theirs)


@FOREACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("norm_type", NORMS[:-1], ids=str)
def test_three_way_parity(norm_type: float, dtype: torch.dtype, foreach: bool | None, device: torch.device) -> None:
    for seed in SEEDS:
        ours, theirs = (_params((dtype,), device, seed) for _ in range(2))
        arrays = [to_oracle(p.grad) for p in ours if p.grad is not None]
        norm = utils.clip_grad_norm_(ours, 0.7, norm_type, foreach=foreach)
        expected = torch.nn.utils.clip_grad_norm_(theirs, 0.7, norm_type, foreach=foreach)
        exact = np.asarray(oracle.total_norm(arrays, norm_type))
        judge(norm, expected, exact, exact).check("clip_grad_norm_", f"p={norm_type}, {dtype}", "norm")
        for p, q, clipped in zip(ours, theirs, oracle.clipped_by_norm(arrays, 0.7, norm_type)):
            judge(p.grad, q.grad, clipped, clipped).check("clip_grad_norm_", f"p={norm_type}, {dtype}", "grad")
        utils.clip_grad_value_(ours, 0.01, foreach=foreach)
        for p, clipped in zip(ours, oracle.clipped_by_value([to_oracle(q.grad) for q in theirs[:-1]], 0.01)):
            assert np.array_equal(to_oracle(p.grad), clipped.astype(p.grad.cpu().numpy().dtype).astype(clipped.dtype))


def test_the_norm_after_clipping_is_the_largest_and_the_direction_stays(device: torch.device) -> None:
    params = _params((torch.float64,), device)
    before = [p.grad.clone() for p in params[:-1]]
    norm = utils.clip_grad_norm_(params, 0.25)
    # the 1e-6 in the divisor leaves the norm that much short, relatively
    assert 0 <= 0.25 - utils.get_total_norm([p.grad for p in params[:-1]]) < 0.25 * 2e-6 / norm
    for old, p in zip(before, params):
        torch.testing.assert_close(p.grad, old * (0.25 / (norm + 1e-6)))
    small = [p.grad.clone() for p in params[:-1]]
    utils.clip_grad_norm_(params, 10.0)
    assert all(bits_equal(p.grad, old) for p, old in zip(params, small)), "gradients below the norm were changed"


def test_a_cliff_throws_plain_descent_and_not_a_clipped_one() -> None:
    """N2 §8.2.4: f = 10⁴·max(0, θ - 1)² beside a gentle slope."""

    def run(clip: Callable[[list[torch.Tensor]], Any]) -> float:
        theta, farthest = torch.tensor(1.01, dtype=torch.float64, requires_grad=True), 0.0
        for _ in range(50):
            theta.grad = None
            (1e4 * (theta - 1).clamp(min=0) ** 2 - 0.1 * theta).backward()
            clip([theta])
            with torch.no_grad():
                theta -= 0.05 * theta.grad
            farthest = max(farthest, abs(theta.item() - 1))
        return farthest

    assert run(lambda params: None) > 5
    assert run(lambda params: utils.clip_grad_norm_(params, 1.0)) < 0.1
    assert run(lambda params: utils.clip_grad_value_(params, 1.0)) < 0.1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_norm_that_is_not_finite(bad: float, device: torch.device) -> None:
    ours, theirs = _pair((torch.float32,), device)
    for params in (ours, theirs):
        params[1].grad[0] = bad
    untouched = copy.deepcopy(ours)
    texts = []
    for module, params in ((utils, ours), (torch.nn.utils, theirs)):
        with pytest.raises(RuntimeError) as caught:
            module.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    _assert_same_grads(ours, [p.detach() if p.grad is None else p for p in untouched])
    for module, params in ((utils, ours), (torch.nn.utils, theirs)):
        module.clip_grad_norm_(params, 1.0)
    _assert_same_grads(ours, theirs)


def test_one_tensor_generators_and_nothing(device: torch.device) -> None:
    single = _params((torch.float32,), device)[2]
    other = copy.deepcopy(single)
    other.grad = single.grad.clone()
    assert bits_equal(utils.clip_grad_norm_(single, 1.0), torch.nn.utils.clip_grad_norm_(other, 1.0))
    assert bits_equal(single.grad, other.grad)
    ours, theirs = _pair((torch.float32,), device)
    assert bits_equal(
        utils.clip_grad_norm_((p for p in ours), 1.0), torch.nn.utils.clip_grad_norm_((p for p in theirs), 1.0)
    )
    _assert_same_grads(ours, theirs)
    assert bits_equal(utils.clip_grad_norm_([], 1.0), torch.tensor(0.0))
    assert bits_equal(utils.get_total_norm(single.grad), torch.nn.utils.get_total_norm(single.grad))
    utils.clip_grad_value_([torch.ones(2, requires_grad=True)], 1.0)  # where PyTorch's fails in its grouping
    messages = []
    for module in (utils, torch.nn.utils):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module.clip_grad_norm_((p for p in []), 1.0)
            messages.append([(w.category, str(w.message), w.filename) for w in caught])
    assert messages[0] == messages[1] and len(messages[0]) == 1


@pytest.mark.parametrize("name", ["clip_grad_norm_", "clip_grad_value_", "get_total_norm"])
def test_foreach_is_refused_where_there_is_none(name: str) -> None:
    p = torch.zeros(3, device="meta", requires_grad=True)
    p.grad = torch.zeros(3, device="meta")
    arguments = ([p.grad],) if name == "get_total_norm" else ([p], 1.0)
    texts = []
    for module in (utils, torch.nn.utils):
        with pytest.raises(RuntimeError) as caught:
            getattr(module, name)(*arguments, foreach=True)
        texts.append(str(caught.value))
    assert texts[0] == texts[1] == "foreach=True was passed, but can't use the foreach API on meta tensors"


def test_nothing_of_pytorchs_is_called(device: torch.device) -> None:
    params = _params((torch.float32,), device)
    with independence_guard(["torch.nn.utils.*"]) as seen:
        utils.clip_grad_norm_(params, 1.0)
        utils.clip_grad_value_(params, 0.1)
    assert any(name.startswith("aten::") for name in seen), "the guard slept"
