"""Layers, losses and modules over every sample input, and every bad one, of PyTorch's own test databases."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import reimpl.nn as nn
from parity_tests.functional_cases import each_function, gradients, verdicts
from reimpl.testing import FunctionTechnique, Sample, bits_equal
from reimpl.testing.torch_database import function_error_inputs, function_inputs, module_inputs

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),
    pytest.mark.filterwarnings("ignore:Implicit dimension choice:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using a target size:UserWarning"),
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


@each_function
def test_every_bad_input_of_pytorchs_database(technique: FunctionTechnique) -> None:
    for sample, kind in function_error_inputs(technique.name, "cpu"):
        if technique.name == "conv2d" and sample.args[1].dim() != 4:
            continue  # refused in words of its own, which test_functional_errors has
        with pytest.raises(kind):
            technique.ours(*sample.args, **sample.kwargs)


@pytest.mark.parametrize("name", nn.REIMPLEMENTED)
def test_modules_over_pytorchs_database(name: str, device: torch.device) -> None:
    for case in module_inputs(name, device, torch.float64):
        ours, theirs = (
            getattr(namespace, name)(*case.args, **case.kwargs, **placed(namespace, name, device))
            for namespace in (nn, torch.nn)
        )
        ours.load_state_dict(theirs.state_dict())
        results = []
        for module in (ours, theirs):
            torch.manual_seed(3)
            output = module(*case.inputs)
            leaves = [*module.parameters(), *(x for x in case.inputs if isinstance(x, Tensor) and x.requires_grad)]
            outputs = [t for t in (output if isinstance(output, tuple) else (output,)) if t.requires_grad]
            total = sum((t.square().sum() for t in outputs), start=torch.zeros((), device=device))
            grads = torch.autograd.grad(total, leaves, allow_unused=True) if outputs else ()
            results.append((output, grads))
        # Both in float64, where the functions underneath lie within some 1e-15 of the truth.
        torch.testing.assert_close(*results, equal_nan=True, msg=lambda text: f"{name}, {case.desc}: {text}")  # noqa: B023


def placed(namespace: Any, name: str, device: torch.device) -> dict[str, Any]:
    """``device`` and ``dtype`` for a constructor that takes them."""
    parameters = inspect.signature(getattr(namespace, name)).parameters
    return {key: value for key, value in (("device", device), ("dtype", torch.float64)) if key in parameters}
