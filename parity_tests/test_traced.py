"""What ``torch.compile`` traces in place of a plain composition: the rectifier that asks its output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import aot_module_simplified, min_cut_rematerialization_partition
from torch import Tensor

import reimpl.functional as F

# PyTorch's word about what its forward mode imports.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")


def compiled(function: Callable[..., Any], backend: Any = "aot_eager") -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_relu_at_zero_and_beyond_numbers(dtype: torch.dtype, device: torch.device) -> None:
    values = [-torch.inf, -1.0, -0.0, 0.0, 2.0, torch.inf, torch.nan]
    grads = [1.0, torch.nan, torch.inf, -1.0, torch.nan, -torch.inf, 3.0]
    x, grad = (torch.tensor(numbers, dtype=dtype, device=device) for numbers in (values, grads))
    x.requires_grad_()
    results = []
    for function in (compiled(F.relu), torch.relu):
        output = function(x)
        results.append((output.detach(), *torch.autograd.grad(output, x, grad)))
    torch.testing.assert_close(*results, equal_nan=True, rtol=0, atol=0)


def test_relu_keeps_its_output_and_no_mask(device: torch.device) -> None:
    """The partitioner keeps what the product needs in any case, and makes the mask of it anew."""
    kept: list[torch.dtype] = []

    def note(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        (result,) = (node for node in module.graph.nodes if node.op == "output")
        kept.extend(node.meta["val"].dtype for node in result.args[0] if node is not None)
        return module.forward

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        return aot_module_simplified(
            module, inputs, note, lambda m, _: m.forward, partition_fn=min_cut_rematerialization_partition
        )

    x = torch.randn(4, 8, device=device, requires_grad=True)
    w = torch.randn(8, 8, device=device, requires_grad=True)
    compiled(lambda x, w: F.relu(2 * x + 1) @ w, backend)(x, w)
    assert kept and torch.bool not in kept
    kept.clear()
    compiled(lambda x, w: torch.where((y := 2 * x + 1) <= 0, 0, y) @ w, backend)(x, w)
    assert torch.bool in kept, "the partitioner keeps no mask of a choice any more"


def test_relu_under_transforms_inside_the_compiled_function(device: torch.device) -> None:
    x = torch.linspace(-1, 1, 12, dtype=torch.float64, device=device).reshape(3, 4)

    def cube(x: Tensor) -> Tensor:
        return F.relu(x).pow(3).sum()

    for function in (
        torch.func.grad(cube),
        torch.func.grad(lambda x: torch.func.grad(cube)(x).sum()),
        torch.vmap(F.relu),
        lambda x: torch.func.jvp(F.relu, (x,), (x,))[1],
    ):
        torch.testing.assert_close(compiled(lambda x, function=function: function(x))(x), function(x))
