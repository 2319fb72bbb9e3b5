"""What ``torch.compile`` traces in place of a plain composition: rectifier and batch normalisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import aot_module_simplified, make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor

import reimpl.functional as F

# PyTorch's word about what its forward mode imports.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")


def compiled(function: Callable[..., Any], backend: Any = "aot_eager") -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend)


def partitioned(
    forward: Callable[[torch.fx.GraphModule], None] = lambda _: None,
    backward: Callable[[torch.fx.GraphModule], None] = lambda _: None,
) -> Callable[..., Any]:
    """A backend that shows the graphs of both passes, split as Inductor splits them."""

    def noting(note: Callable[[torch.fx.GraphModule], None]) -> Callable[..., Any]:
        return lambda module, _: note(module) or make_boxed_func(module.forward)

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        compilers = noting(forward), noting(backward)
        return aot_module_simplified(module, inputs, *compilers, partition_fn=min_cut_rematerialization_partition)

    return backend


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
    """The partitioner keeps what the product needs in any case (on the CPU, without one too), and masks by it anew."""
    kept: list[torch.dtype] = []

    def note(module: torch.fx.GraphModule) -> None:
        (result,) = (node for node in module.graph.nodes if node.op == "output")
        kept.extend(node.meta["val"].dtype for node in result.args[0] if node is not None)

    backend = partitioned(note)
    x = torch.randn(4, 8, device=device, requires_grad=True)
    w = torch.randn(8, 8, device=device, requires_grad=True)
    compiled(lambda x, w: F.relu(2 * x + 1) @ w, backend)(x, w)
    assert kept and torch.bool not in kept
    kept.clear()
    compiled(lambda x, w: torch.where((y := 2 * x + 1) <= 0, 0, y) @ w, backend)(x, w)
    assert torch.bool in kept, "the partitioner keeps no mask of a choice any more"
    if device.type == "cpu":
        kept.clear()
        compiled(lambda x: F.relu(2 * x + 1).sum(), backend)(x)
        assert kept and torch.bool not in kept


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


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("affine", [False, True], ids=["bare", "affine"])
@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5, 7)], ids=["features", "planes"])
def test_compiled_batch_norm_is_pytorchs(
    shape: tuple[int, ...], affine: bool, relu: bool, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, shape[1:2], shape[1:2]) if affine else (shape,)
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64).to(device).requires_grad_() for s in sizes]
    averages = [torch.zeros(3, dtype=torch.float64, device=device) for _ in range(4)]
    ours = compiled(lambda x, *a: (F.batch_norm_relu if relu else F.batch_norm)(x, *averages[:2], *a, training=True))(
        *leaves
    )
    theirs = torch.nn.functional.batch_norm(leaves[0], *averages[2:], *leaves[1:], training=True)
    theirs = theirs.relu() if relu else theirs
    grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
    got, expected = (torch.autograd.grad(y, leaves, grad) for y in (ours, theirs))
    torch.testing.assert_close((ours, *got, *averages[:2]), (theirs, *expected, *averages[2:]))


def test_derivative_of_batch_norm_adds_up_once(device: torch.device) -> None:
    """Two sums over each channel, side by side, and no sum over what depends on another."""
    sums: list[int] = []

    def note(module: torch.fx.GraphModule) -> None:
        depth: dict[torch.fx.Node, int] = {}
        for node in module.graph.nodes:
            depth[node] = max(map(depth.__getitem__, node.all_input_nodes), default=0)
            if "sum" in str(node.target) or "mean" in str(node.target):
                depth[node] += 1
                sums.append(depth[node])

    x = torch.randn(4, 3, 5, 5, device=device, requires_grad=True)
    weight = torch.randn(3, device=device, requires_grad=True)
    function = compiled(lambda x, w: F.batch_norm(x, None, None, w, training=True), partitioned(backward=note))
    torch.autograd.grad(function(x, weight).pow(3).sum(), (x, weight))
    assert sums == [1, 1]


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_compiled_variance_of_numbers_far_from_zero(batch: int, device: torch.device) -> None:
    """Mean 1,000 and deviation 1: of the mean square, float32 would keep nothing of the variance."""
    generator = torch.Generator().manual_seed(0)
    x = (1000 + torch.randn(batch, 3, 8, 8, generator=generator)).to(device)
    # the part that is looked at first lies apart from the rest
    x[0, 1] += 40
    mean, var = torch.zeros(2, 3, device=device)
    compiled(lambda x: F.batch_norm(x, mean, var, training=True, momentum=1.0))(x)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3))
    # The mean is rounded twice at most. Of the squares' sum an eighth may remain, with a blockwise sum's roundings.
    torch.testing.assert_close(mean.double(), exact_mean, rtol=2**-23, atol=0)
    torch.testing.assert_close(var.double(), exact_var, rtol=2**-18, atol=0)


def test_compiled_variance_of_equal_numbers(device: torch.device) -> None:
    x = torch.full((16, 3, 5, 5), 0.1, device=device)
    mean, var = torch.zeros(2, 3, device=device)
    output = compiled(lambda x: F.batch_norm(x, mean, var, training=True, momentum=1.0))(x)
    assert (var >= 0).all() and (var < 1e-12).all()
    # what remains of the mean's rounding, times 1/sqrt(eps)
    assert output.abs().max() <= 0.1 * 2**-22 / 1e-5**0.5
