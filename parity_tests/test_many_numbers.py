"""Sums over a million numbers and more: as near to float64 as those over a few, wherever their mean lies."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import reimpl.functional as F


@pytest.fixture(params=[False, True], ids=["as it comes", "kernels"], autouse=True)
def _either_way(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param:
        pytest.importorskip("numba", reason="the kernels are compiled by Numba")
    with F.use_kernels(request.param):
        yield


LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["planes", "pixels"])


@LAYOUTS
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_batch_norm(layout: torch.memory_format, mean: float, device: torch.device) -> None:
    """A sum in float32 would stop counting at 2^24 in each of a few lanes: at a mean of 1,000 long before the end."""
    x = (torch.rand(1, 2, 1500, 1400, device=device) + mean).contiguous(memory_format=layout).requires_grad_()
    averages = torch.zeros(2, device=device), torch.zeros(2, device=device)
    y = F.batch_norm(x, *averages, training=True, momentum=1.0)
    grad = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, grad)
    wide = x.detach().double()
    var, centre = torch.var_mean(wide, (0, 2, 3))
    # At a mean of 1,000 a number holds 2e4 units of its last place to the deviation, so 5e-5 is half of one.
    tolerance = {"rtol": 5e-5, "atol": 5e-4 if mean else 2e-6}
    torch.testing.assert_close(averages[0].double(), centre, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(averages[1].double(), var, rtol=1e-5, atol=0)
    spread = [v.view(1, -1, 1, 1) for v in (centre, var)]
    normalized = (wide - spread[0]) / (spread[1] + 1e-5).sqrt()
    torch.testing.assert_close(y.detach().double(), normalized, **tolerance)
    errors = grad.double()
    share = errors - errors.mean((2, 3), True) - normalized * (errors * normalized).mean((2, 3), True)
    torch.testing.assert_close(found.double(), share / (spread[1] + 1e-5).sqrt(), **tolerance)


@LAYOUTS
def test_average_pooling_of_whole_planes(layout: torch.memory_format, device: torch.device) -> None:
    x = (torch.rand(1, 4, 1024, 1000, device=device) + 1).contiguous(memory_format=layout)
    mean = x.double().mean((2, 3), True)
    # Two runs of a thousand roundings each of 6e-8, which mostly cancel: 3e-7 to 8e-7; a million in one run 2e-5.
    torch.testing.assert_close(F.adaptive_avg_pool2d(x, 1).double(), mean, rtol=2e-6, atol=0)
