"""What the tests of layers and losses share: the rows, and how one call of ours, PyTorch's and the oracle is judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from parity_tests.declarations import FUNCTIONS
from parity_tests.versions import IS_REFERENCE
from reimpl.testing import FunctionTechnique, Sample, Verdict, judge, random_tensor, seeded_generator, to_oracle

Function = Callable[..., Tensor]


def _parametrized(rows: list[FunctionTechnique]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("technique", rows, ids=lambda technique: technique.name)


each_function = _parametrized(list(FUNCTIONS))
each_differentiable_function = _parametrized([row for row in FUNCTIONS if row.differentiable])


def row_of(name: str) -> FunctionTechnique:
    """The declaration of that name."""
    (row,) = (row for row in FUNCTIONS if row.name == name)
    return row


def reference_of(technique: FunctionTechnique) -> Function:
    """PyTorch's function, or the same out of PyTorch's pieces."""
    reference = technique.torch or technique.composition
    assert reference is not None, f"{technique.name} has neither a counterpart nor a composition"
    return reference


def whole(output: Any) -> Tensor:
    """A function's result as one tensor: several states stacked, indices left out."""
    if isinstance(output, Tensor):
        return output
    if output[-1].is_floating_point():
        return torch.stack(tuple(output))
    return output[0]  # type: ignore[no-any-return]


def gradients(function: Callable[..., Any], sample: Sample, grad_seed: int) -> tuple[Tensor, dict[int, Tensor]]:
    """Output, and the gradient of each argument that wants one, for a random gradient of the output."""
    output = whole(function(*sample.args, **sample.kwargs))
    wanted = {i: arg for i, arg in enumerate(sample.args) if isinstance(arg, Tensor) and arg.requires_grad}
    if not wanted:
        return output, {}
    generator = seeded_generator(grad_seed, "grad", tuple(output.shape))
    grad = random_tensor(output.shape, output.dtype, generator, output.device)
    return output, dict(zip(wanted, torch.autograd.grad(output, list(wanted.values()), grad), strict=True))


def absolute(value: Any) -> Any:
    """Arrays of numbers without their signs; everything else as it is."""
    return np.abs(value) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value


def _array(value: Any) -> Any:
    return to_oracle(value) if isinstance(value, Tensor) else value


def verdicts(technique: FunctionTechnique, sample: Sample, seed: int) -> Iterator[tuple[str, Verdict]]:
    """Output and gradients of one call, each judged."""
    ours, our_grads = gradients(technique.ours, sample, seed)
    theirs, their_grads = None, {}
    if technique.torch is not None:
        theirs, their_grads = gradients(technique.torch, sample, seed)
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    args, kwargs = [_array(arg) for arg in sample.args], {name: _array(arg) for name, arg in sample.kwargs.items()}
    grad = to_oracle(random_tensor(ours.shape, ours.dtype, seeded_generator(seed, "grad", tuple(ours.shape))))
    exact, vjp = technique.oracle(*args, **kwargs)
    if technique.magnitude is None:
        scale, scale_vjp = technique.oracle(
            *map(absolute, args), **{name: absolute(value) for name, value in kwargs.items()}
        )
    else:
        scale, scale_vjp = technique.magnitude(*args, **kwargs)
    yield "output", judge(ours, theirs, exact, scale)
    if our_grads:
        exact_grads, scales = vjp(grad), scale_vjp(np.abs(grad))
    for i, our_grad in our_grads.items():
        yield f"gradient {i}", judge(our_grad, their_grads.get(i), exact_grads[i], scales[i])


def refuses_alike(
    ours: Callable[..., Any], theirs: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Both refuse the call; with the same type of exception and the same text, where these are this PyTorch's."""
    with pytest.raises(Exception) as expected:
        theirs(*args, **kwargs)
    with pytest.raises(expected.type if IS_REFERENCE else (expected.type, RuntimeError, TypeError)) as found:
        ours(*args, **kwargs)
    if IS_REFERENCE:
        call = [(tuple(a.shape), a.dtype) if isinstance(a, Tensor) else a for a in args]
        assert str(found.value) == str(expected.value), (call, kwargs)
