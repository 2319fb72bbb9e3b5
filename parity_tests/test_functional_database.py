"""Layers, losses and modules over every sample input, and every bad one, of PyTorch's own test databases."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import reimpl.nn as nn
from parity_tests.declarations import FUNCTIONS
from parity_tests.functional_cases import each_function, gradients, verdicts
from reimpl.testing import FunctionTechnique, Sample, bits_equal
from reimpl.testing.torch_database import (
    ModuleCase,
    function_dtypes,
    function_error_inputs,
    function_inputs,
    module_error_inputs,
    module_inputs,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),
    pytest.mark.filterwarnings("ignore:Implicit dimension choice:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using a target size:UserWarning"),
    pytest.mark.filterwarnings("ignore:Casting complex values to real:UserWarning"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
]


def by_position(technique: FunctionTechnique, sample: Sample) -> Sample:
    """Tensors by position, other options by name, and without what leaves the values as they are."""
    bound = inspect.signature(technique.ours).bind(*sample.args, **sample.kwargs)
    given = dict(bound.arguments)
    bound.apply_defaults()
    names = list(bound.arguments)
    tensors = [i for i, name in enumerate(names) if name in given and isinstance(given[name], Tensor)]
    count = 1 + max((i for i in tensors if i < len(sample.args) or given[names[i]].requires_grad), default=0)
    args = [bound.arguments[name] for name in names[:count]]
    kwargs = {name: given[name] for name in names[count:] if name in given and name != "return_indices"}
    if (dtype := kwargs.pop("dtype", None)) is not None:
        args[0] = args[0].detach().to(dtype).requires_grad_()
    return Sample(tuple(args), kwargs)


def same_bits(technique: FunctionTechnique, sample: Sample) -> None:
    """Output and gradients of ours and PyTorch's to the last bit, drawn from the same seed."""
    assert technique.torch is not None
    results = []
    for function in (technique.ours, technique.torch):
        torch.manual_seed(3)
        output, grads = gradients(function, sample, 0)
        results.append((output, *grads.values()))
    assert all(bits_equal(ours, theirs) for ours, theirs in zip(*results, strict=True)), sample


def has_channels(technique: FunctionTechnique, sample: Sample) -> bool:
    """Whether there is a dimension of channels to normalise; PyTorch lets an empty vector pass without."""
    return technique.name != "batch_norm" or sample.args[0].dim() > 1


@each_function
def test_every_sample_of_pytorchs_database(technique: FunctionTechnique, device: torch.device) -> None:
    for number, found in enumerate(function_inputs(technique.name, device, torch.float32)):
        if not has_channels(technique, found):
            continue
        sample = by_position(technique, found)
        if technique.random:
            same_bits(technique, sample)
            continue
        case = (
            f"sample {number} of {[tuple(a.shape) if isinstance(a, Tensor) else a for a in found.args]}, {found.kwargs}"
        )
        for quantity, verdict in verdicts(technique, sample, number):
            verdict.check(technique.name, case, quantity)
        if found.kwargs.get("return_indices"):
            assert technique.torch is not None
            ours, theirs = (function(*found.args, **found.kwargs)[1] for function in (technique.ours, technique.torch))
            assert torch.equal(ours, theirs), case


def widened(value: Any) -> Any:
    """Tensors, and dtypes asked for, in double precision."""
    if isinstance(value, Tensor):
        return value.detach().to(widened(value.dtype)).requires_grad_(value.requires_grad)
    if isinstance(value, torch.dtype):
        return torch.complex128 if value.is_complex else torch.float64 if value.is_floating_point else value
    return value


def furthest(found: Tensor, exact: Tensor) -> float:
    """The largest distance; infinite where one is a number and the other is none, or another infinity."""
    found = found.detach().to(exact.dtype)
    same = (found == exact) | (found.isnan() & exact.isnan())
    if not found.numel() or same.all():
        return 0.0
    return float((found - exact.detach())[~same].abs().nan_to_num(nan=torch.inf).max())


OTHER_DTYPES = [
    (row, dtype)
    for row in FUNCTIONS
    for dtype in function_dtypes(row.name, "cpu")
    if dtype != torch.float32 and row.torch is not None
]


@pytest.mark.parametrize(("technique", "dtype"), OTHER_DTYPES, ids=lambda value: str(getattr(value, "name", value)))
def test_every_sample_in_every_other_dtype(technique: FunctionTechnique, dtype: torch.dtype) -> None:
    """Less than double precision is held against PyTorch's answer in double: no further from it than twice PyTorch's
    own distance and a few roundings. Everything else is held against PyTorch's directly."""
    assert technique.torch is not None
    for sample in function_inputs(technique.name, "cpu", dtype):
        if not has_channels(technique, sample):
            continue
        if technique.random and not dtype.is_complex:
            same_bits(technique, sample)
            continue
        if technique.random or dtype not in (torch.bfloat16, torch.float16, torch.complex64):
            torch.manual_seed(3)
            ours = gradients(technique.ours, sample, 0)
            torch.manual_seed(3)
            torch.testing.assert_close(ours, gradients(technique.torch, sample, 0), equal_nan=True)
            continue
        wide = Sample(tuple(map(widened, sample.args)), {name: widened(v) for name, v in sample.kwargs.items()})
        calls = (technique.ours, sample), (technique.torch, sample), (technique.torch, wide)
        (mine, my_grads), (their, their_grads), (exact, grads) = (gradients(f, s, 0) for f, s in calls)
        assert mine.dtype == their.dtype and mine.shape == their.shape
        for i, ours, theirs, right in (
            ("output", mine, their, exact),
            *((i, my_grads[i], their_grads[i], grads[i]) for i in my_grads),
        ):
            size = float(right.detach().abs().nan_to_num(0, 0, 0).max()) if right.numel() else 0.0
            limit = 2 * furthest(theirs, right) + 4 * torch.finfo(ours.dtype).eps * size
            assert furthest(ours, right) <= limit, (i, sample)


@each_function
def test_every_bad_input_of_pytorchs_database(technique: FunctionTechnique) -> None:
    for sample, kind in function_error_inputs(technique.name, "cpu"):
        with pytest.raises(kind):
            technique.ours(*sample.args, **sample.kwargs)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", nn.REIMPLEMENTED)
def test_modules_over_pytorchs_database(name: str, training: bool, device: torch.device) -> None:
    for case in module_inputs(name, device, torch.float64, training):
        ours, theirs = (built(namespace, name, case, device).train(training) for namespace in (nn, torch.nn))
        ours.load_state_dict(theirs.state_dict())
        results = []
        for module in (ours, theirs):
            torch.manual_seed(3)
            output = module(*case.inputs, **case.input_kwargs)
            leaves = [*module.parameters(), *(x for x in case.inputs if isinstance(x, Tensor) and x.requires_grad)]
            outputs = [t for t in (output if isinstance(output, tuple) else (output,)) if t.requires_grad]
            total = sum((t.square().sum() for t in outputs), start=torch.zeros((), device=device))
            grads = torch.autograd.grad(total, leaves, allow_unused=True) if outputs else ()
            results.append((output, grads, tuple(module.buffers())))
        # Both in float64, where the functions underneath lie within some 1e-15 of the truth.
        torch.testing.assert_close(*results, equal_nan=True, msg=lambda text: f"{name}, {case.desc}: {text}")  # noqa: B023


@pytest.mark.parametrize("name", nn.REIMPLEMENTED)
def test_bad_modules_of_pytorchs_database(name: str, device: torch.device) -> None:
    for case, kind, on_construction in module_error_inputs(name, device, torch.float64):
        if on_construction:
            with pytest.raises(kind):
                built(nn, name, case, device)
        else:
            module = built(nn, name, case, device)
            with pytest.raises(kind):
                module(*case.inputs, **case.input_kwargs)


def built(namespace: Any, name: str, case: ModuleCase, device: torch.device) -> torch.nn.Module:
    """The case's module of that library."""
    options = {**case.kwargs, **placed(namespace, name, device)}
    return getattr(namespace, name)(*case.args, **options)  # type: ignore[no-any-return]


def placed(namespace: Any, name: str, device: torch.device) -> dict[str, Any]:
    """``device`` and ``dtype`` for a constructor that takes them."""
    parameters = inspect.signature(getattr(namespace, name)).parameters
    return {key: value for key, value in (("device", device), ("dtype", torch.float64)) if key in parameters}
