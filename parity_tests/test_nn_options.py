"""Modules and losses over random combinations of their options: values, gradients, strides and texts are PyTorch's."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import reimpl.functional as F
import reimpl.nn as nn
from parity_tests.test_citizens import significant_strides
from parity_tests.versions import IS_REFERENCE

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")

TORCH = torch.nn.functional
DOUBLE = torch.float64


def results(function: Callable[..., Any], *args: Tensor | None) -> list[Tensor]:
    """All that the call gives, and the gradients of its arguments."""
    leaves = [t if t is None or not t.is_floating_point() else t.detach().clone().requires_grad_() for t in args]
    output = function(*leaves)
    outputs = list(output) if isinstance(output, tuple) else [output]
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    if isinstance(function, torch.nn.Module):
        wanted += function.parameters()
    if not outputs[0].requires_grad:
        return outputs
    grad = torch.linspace(-1, 1.3, outputs[0].numel(), dtype=outputs[0].dtype, device=outputs[0].device)
    grads = torch.autograd.grad(outputs[0], wanted, grad.reshape(outputs[0].shape), allow_unused=True)
    return outputs + [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)]


def compared(ours: Callable[..., Any], theirs: Callable[..., Any], *args: Tensor | None) -> bool:
    """Hold ours against PyTorch's, whatever that does; whether it gave results."""
    try:
        expected = results(theirs, *args)
    except (RuntimeError, ValueError, IndexError) as refusal:
        with pytest.raises(type(refusal)) as raised:
            results(ours, *args)
        assert str(raised.value) == str(refusal) or not IS_REFERENCE
        return False
    found = results(ours, *args)
    # both in float64, where PyTorch's lie within some 1e-15 of the truth
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert [significant_strides(t) for t in found if t.numel()] == [
        significant_strides(t) for t in expected if t.numel()
    ]
    return True


def both(name: str, *args: Any, **options: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Our module and PyTorch's with the same parameters and texts."""
    ours, theirs = getattr(nn, name)(*args, **options), getattr(torch.nn, name)(*args, **options)
    assert repr(ours) == repr(theirs) or not IS_REFERENCE
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def planes(draw: random.Random, dims: int, channels: int, sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """A batch, or now and then a single one or none, in one of the layouts."""
    shape = (draw.choice((0, 1, 2, 3)), channels, *(draw.choice(sizes) for _ in range(dims)))
    x = torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(draw.randrange(1 << 20))).to(device)
    if len(x) and draw.random() < 0.25:
        return x[0]
    return x.to(memory_format=torch.channels_last) if dims == 2 and draw.random() < 0.5 else x


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("name", ["Conv1d", "Conv2d"])
def test_convolutions_with_every_padding(name: str, mode: str, device: torch.device) -> None:
    draw, dims, answered = random.Random(name + mode), int(name[-2]), 0
    for number in range(25):

        def each(*values: int) -> tuple[int, ...]:
            return tuple(draw.choice(values) for _ in range(dims))

        options: dict[str, Any] = {"dilation": each(1, 2, 3), "groups": draw.choice((1, 2, 4))}
        options |= {"bias": draw.random() < 0.5, "padding_mode": mode, "dtype": DOUBLE, "device": device}
        if number % 3 == 0:
            options["padding"] = draw.choice(("same", "valid"))
        else:
            options |= {"padding": each(0, 1, 2, 3), "stride": each(1, 1, 2, 3)}
        x = planes(draw, dims, 4, (1, 3, 5, 8, 9), device)
        answered += compared(*both(name, 4, 8, each(1, 2, 3, 4), **options), x)
    assert answered >= 8, "too few that PyTorch takes"


POOLS = {"max_pool1d": "MaxPool1d", "max_pool2d": "MaxPool2d", "avg_pool1d": "AvgPool1d", "avg_pool2d": "AvgPool2d"}


@pytest.mark.parametrize("name", POOLS)
def test_pooling_with_every_option(name: str, device: torch.device) -> None:
    draw, dims, answered = random.Random(name), int(name[-2]), 0
    for _ in range(60):

        def each(*values: int) -> tuple[int, ...]:
            return tuple(draw.choice(values) for _ in range(dims))

        options: dict[str, Any] = {"stride": draw.choice((None, each(1, 2, 3))), "padding": each(0, 0, 1, 2)}
        options["ceil_mode"] = draw.random() < 0.5
        if name.startswith("max"):
            options |= {"dilation": each(1, 1, 2, 3), "return_indices": draw.random() < 0.5}
        else:
            options["count_include_pad"] = draw.random() < 0.5
            options |= {"divisor_override": draw.choice((None, 3, -2))} if dims == 2 else {}
        # few numbers, so that there are ties; planes of 4 at least leave no window in the padding alone
        x = planes(draw, dims, draw.choice((1, 3)), (4, 5, 8, 9), device).mul(2).round()
        if x.numel() and draw.random() < 0.2:
            x[..., 1] = draw.choice((torch.nan, torch.inf, -torch.inf))
        answered += compared(*both(POOLS[name], each(1, 2, 3, 4), **options), x)
    assert answered >= 20, "too few that PyTorch takes"


@pytest.mark.parametrize("name", ["AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveMaxPool2d"])
def test_adaptive_pooling_to_every_size(name: str, device: torch.device) -> None:
    draw, dims = random.Random(name), int(name[-2])
    for _ in range(50):
        sizes = (1, 2, 5, 9) if dims == 1 else (1, 2, 5, 9, None)
        size = draw.choice((1, 2, 7, tuple(draw.choice(sizes) for _ in range(dims))))
        options = {"return_indices": draw.random() < 0.5} if "Max" in name else {}
        assert compared(*both(name, size, **options), planes(draw, dims, 3, (1, 2, 5, 8), device))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_indices_lead_max_unpool_back(layout: torch.memory_format, device: torch.device) -> None:
    x = torch.randn(2, 3, 9, 8, dtype=DOUBLE, device=device).to(memory_format=layout).requires_grad_()
    for options in ({"stride": 2}, {"stride": (3, 2), "padding": 1}, {"stride": 3, "ceil_mode": True}):
        maxima, indices = F.max_pool2d(x, 3, **options, return_indices=True)
        options.pop("ceil_mode", None)
        back = TORCH.max_unpool2d(maxima, indices, 3, **options, output_size=(9, 8))
        rows = indices.flatten(2)
        assert torch.equal(back.flatten(2).gather(2, rows), maxima.flatten(2))
        assert int((back != 0).sum()) == sum(int(row.unique().numel()) for row in rows.flatten(0, 1))
        (grad,) = torch.autograd.grad(back.sum(), x)
        # a maximum of several windows is written once, and its gradient comes once from each
        assert torch.equal(grad != 0, back != 0)
    line = x[..., 0]
    maxima, indices = F.max_pool1d(line, 2, return_indices=True)
    back = TORCH.max_unpool1d(maxima, indices, 2, output_size=(9,))
    assert torch.equal(back[back != 0].sort().values, maxima.flatten().sort().values)


NORMS = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}
PIXELS = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.mark.parametrize("momentum", [0.1, None, 1.0, 0.0], ids=str)
@pytest.mark.parametrize("dims", NORMS)
def test_batch_norm_through_changes_of_mode(dims: int, momentum: float | None, device: torch.device) -> None:
    """Training, evaluation, and ``track_running_stats`` turned off and on again, over batches of several layouts."""
    draw = random.Random(f"{dims} {momentum}")
    for number in range(8):
        options = {"affine": number % 2 == 0, "track_running_stats": number % 4 < 2, "eps": draw.choice((1e-5, 1e-2))}
        modules = both(NORMS[dims], 3, momentum=momentum, **options, dtype=DOUBLE, device=device)
        for _ in range(5):
            shape = (draw.choice((0, 1, 2, 4)), 3, *(draw.choice((2, 3)) for _ in range(dims - 2)))
            generator = torch.Generator().manual_seed(draw.randrange(1 << 20))
            x = (3 * torch.randn(shape, dtype=DOUBLE, generator=generator) + 1).to(device)
            if dims > 3 and draw.random() < 0.5:
                x = x.to(memory_format=PIXELS[dims])
            mode, turned = draw.random() < 0.6, draw.random() < 0.25
            for module in modules:
                module.train(mode)
                module.track_running_stats ^= turned
            compared(*modules, x)
            torch.testing.assert_close(*(dict(module.named_buffers()) for module in modules))


def _targets(draw: random.Random, shape: tuple[int, ...], ignore_index: int, generator: torch.Generator) -> Tensor:
    target = torch.randint(shape[1] if len(shape) > 1 else shape[0], shape[:1] + shape[2:], generator=generator)
    target = target if len(shape) > 1 else target[0]
    ignored = torch.rand(target.shape, generator=generator) < draw.choice((0.0, 0.4))
    return torch.where(ignored, ignore_index, target)


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_with_every_option(reduction: str, kind: str, device: torch.device) -> None:
    draw, answered = random.Random(reduction + kind), 0
    for number in range(60):
        classes, generator = draw.choice((1, 2, 5)), torch.Generator().manual_seed(number)
        rest: tuple[int, ...] = draw.choice(((), (3,), (2, 3), (1, 2, 2), (0,)))
        shape = draw.choice(((classes,), (0, classes, *rest), (3, classes, *rest)))
        x = torch.randn(shape, dtype=DOUBLE, generator=generator)
        options: dict[str, Any] = {"reduction": reduction, "label_smoothing": draw.choice((0.0, 0.1, 1.0, -0.2))}
        if kind == "indices":
            options["ignore_index"] = draw.choice((-100, 0, -1))
            target = _targets(draw, shape, options["ignore_index"], generator)
        else:
            target = torch.rand(shape, dtype=DOUBLE, generator=generator).softmax(min(1, len(shape) - 1))
        weight = draw.choice((None, torch.rand(classes, dtype=DOUBLE, generator=generator) + 0.1))
        modules = both("CrossEntropyLoss", weight, **options)
        answered += compared(*(module.to(device) for module in modules), x.to(device), target.to(device))
    assert answered >= 40


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("training", [True, False])
def test_dropout_in_place_is_the_tensor_itself(p: float, training: bool, device: torch.device) -> None:
    x = torch.randn(40, dtype=DOUBLE, device=device)
    for inplace in (False, True):
        leaf = x.clone().requires_grad_()
        data = leaf * 1
        torch.manual_seed(0)
        y = nn.Dropout(p, inplace).train(training)(data)
        assert (y is data) == (inplace or not training or p == 0)
        (grad,) = torch.autograd.grad(y.sum(), leaf)
        kept = torch.ones_like(x) if not training or p == 0 else (y != 0).to(DOUBLE) / max(1 - p, 0.5)
        torch.testing.assert_close(grad, kept)
        torch.testing.assert_close(y.detach(), x * kept)
