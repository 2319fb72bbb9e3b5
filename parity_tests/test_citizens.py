"""What a function of PyTorch can do, ours can: derivatives of every kind, vmap, compile, layouts, autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import reimpl.functional as F
from parity_tests.functional_cases import each_differentiable_function, reference_of, whole
from reimpl.testing import FunctionTechnique, Sample, seeded_generator

pytestmark = [
    # PyTorch's word about a copy of its own, and about what its gradcheck imports.
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning"),
]

Function = Callable[..., Tensor]
CPU = torch.device("cpu")


def samples(
    technique: FunctionTechnique, device: torch.device = CPU, dtype: torch.dtype = torch.float64
) -> Iterator[Sample]:
    assert technique.samples is not None
    yield from technique.samples(device, dtype, seeded_generator(0, technique.name))


def split(function: Function, sample: Sample) -> tuple[Function, tuple[Tensor, ...]]:
    """``function`` of the differentiable arguments alone, and those arguments."""
    wanted = [i for i, arg in enumerate(sample.args) if isinstance(arg, Tensor) and arg.requires_grad]

    def of_wanted(*tensors: Tensor) -> Tensor:
        args = list(sample.args)
        for i, tensor in zip(wanted, tensors, strict=True):
            args[i] = tensor
        return whole(function(*args, **sample.kwargs))

    return of_wanted, tuple(sample.args[i] for i in wanted)


def pairs(technique: FunctionTechnique) -> Iterator[tuple[Function, Function, tuple[Tensor, ...], str]]:
    """Ours, PyTorch's, detached arguments and description of each sample."""
    reference = reference_of(technique)
    for sample in samples(technique):
        ours, tensors = split(technique.ours, sample)
        theirs, _ = split(reference, sample)
        yield ours, theirs, tuple(tensor.detach() for tensor in tensors), sample.desc


def explain(case: str) -> Callable[[str], str]:
    """The message of a failed comparison, with the case before it."""
    return lambda text: f"{case}: {text}"


def significant_strides(tensor: Tensor) -> list[int]:
    """The strides of dimensions of more than one element; the others are of no consequence."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


@each_differentiable_function
def test_gradcheck_in_both_modes(technique: FunctionTechnique) -> None:
    for sample in samples(technique):
        function, tensors = split(technique.ours, sample)
        assert gradcheck(function, tensors, check_forward_ad=True, check_batched_grad=True), sample.desc


@each_differentiable_function
def test_gradgradcheck_and_forward_over_reverse(technique: FunctionTechnique) -> None:
    for sample in list(samples(technique))[:3]:
        function, tensors = split(technique.ours, sample)
        assert gradgradcheck(function, tensors, check_fwd_over_rev=True, check_batched_grad=True), sample.desc


def squares(function: Function, others: tuple[Tensor, ...]) -> Callable[[Tensor], Tensor]:
    """A scalar with a second derivative, of the first argument."""
    return lambda first: (function(first, *others) ** 2).sum()


@each_differentiable_function
def test_second_derivatives_in_every_combination(technique: FunctionTechnique) -> None:
    """Among them ``jvp`` of ``jvp``, which an autograd Function's own ``jvp`` answers with a silent 0."""
    from torch.func import hessian, jacfwd, jacrev

    for ours, theirs, (first, *others), desc in list(pairs(technique))[:2]:
        function, reference = squares(ours, tuple(others)), squares(theirs, tuple(others))
        expected = jacrev(jacrev(reference))(first)
        for name, second in {
            "reverse over reverse": jacrev(jacrev(function)),
            "forward over reverse": hessian(function),
            "reverse over forward": jacrev(jacfwd(function)),
            "forward over forward": jacfwd(jacfwd(function)),
        }.items():
            torch.testing.assert_close(second(first), expected, msg=explain(f"{desc}, {name}"))


def composed_batch_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Batch normalisation of features by differentiable arithmetic."""
    centred = x - x.mean(0)
    return centred / (centred.square().mean(0) + 1e-5).sqrt() * weight


def test_batch_norm_where_pytorchs_is_wrong() -> None:
    """In 2.15, ``jvp`` of ``jvp`` through PyTorch's, and its gradient for a weight with strides, have wrong numbers."""
    generator = torch.Generator().manual_seed(0)
    point = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    weight = torch.randn(3, 2, dtype=torch.float64, generator=generator)[:, 0]
    grad = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    assert not weight.is_contiguous()

    def ours(x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, weight, training=True)

    def right(x: Tensor) -> Tensor:
        return composed_batch_norm(x, weight)

    def second(function: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.func.jacfwd(torch.func.jacfwd(lambda x: (function(x) * grad).sum()))(point)  # type: ignore[no-any-return]

    torch.testing.assert_close(second(ours), second(right))
    leaf = point.clone().requires_grad_()
    torch.testing.assert_close(*(torch.autograd.grad(function(leaf), leaf, grad) for function in (ours, right)))
    # one image of one column, whose dimensions of 1 have strides of another layout
    image = torch.randn(1, 3, 4, 1, dtype=torch.float64).to(memory_format=torch.channels_last).transpose(0, 3)
    leaf, grad = image.requires_grad_(), torch.randn(1, 3, 4, 1, dtype=torch.float64)
    rows = leaf.squeeze(3).squeeze(0).t()
    (expected,) = torch.autograd.grad(composed_batch_norm(rows, torch.ones(3)), leaf, grad.squeeze(3).squeeze(0).t())
    (found,) = torch.autograd.grad(F.batch_norm(leaf, None, None, training=True), leaf, grad)
    torch.testing.assert_close(found, expected)


@each_differentiable_function
def test_dual_tensors(technique: FunctionTechnique) -> None:
    for ours, theirs, tensors, desc in pairs(technique):
        tangents = [torch.randn_like(tensor) for tensor in tensors]
        results = []
        for function in (ours, theirs):
            with forward_ad.dual_level():
                duals = [forward_ad.make_dual(t, v) for t, v in zip(tensors, tangents, strict=True)]
                results.append(forward_ad.unpack_dual(function(*duals)))
        torch.testing.assert_close(results[0], results[1], msg=explain(desc))


@each_differentiable_function
def test_vmap_over_each_argument_and_all(technique: FunctionTechnique) -> None:
    for ours, theirs, tensors, desc in pairs(technique):
        # The mapped dimension comes last, so that it is not a batch by luck; probabilities stay probabilities.
        stacks = [torch.stack([t, t / 2, t * t], -1) for t in tensors]
        for mapped in (*range(len(tensors)), None):
            dims = tuple(-1 if mapped in (None, i) else None for i in range(len(tensors)))
            inputs = [s if d == -1 else t for s, t, d in zip(stacks, tensors, dims, strict=True)]
            # Contiguous, because PyTorch's batch_norm takes strides of its weight for 1 (see the test of batch_norm).
            rows = [
                [t[..., k].contiguous() if d == -1 else t for t, d in zip(inputs, dims, strict=True)] for k in range(3)
            ]
            message = f"{desc}, mapped {mapped}"
            torch.testing.assert_close(
                torch.vmap(ours, dims)(*inputs), torch.stack([theirs(*row) for row in rows]), msg=message
            )
            everything = tuple(range(len(tensors)))
            grads = torch.vmap(torch.func.grad(lambda *t: (ours(*t) ** 2).sum(), everything), dims)(*inputs)  # noqa: B023
            expected = [torch.func.grad(lambda *t: (theirs(*t) ** 2).sum(), everything)(*row) for row in rows]  # noqa: B023
            for i, grad in enumerate(grads):
                torch.testing.assert_close(grad, torch.stack([row[i] for row in expected]), msg=explain(message))


def compiled_matches(function: Function, reference: Function, tensors: tuple[Tensor, ...], backend: str) -> None:
    torch._dynamo.reset()
    leaves = tuple(tensor.requires_grad_() for tensor in tensors)
    ours = torch.compile(function, fullgraph=True, backend=backend)(*leaves)
    theirs = reference(*leaves)
    torch.testing.assert_close(ours, theirs)
    assert significant_strides(ours) == significant_strides(theirs)
    grad = torch.randn_like(theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(theirs, leaves, grad))


@each_differentiable_function
def test_compiles_whole_forward_and_backward(technique: FunctionTechnique) -> None:
    for ours, theirs, tensors, _ in list(pairs(technique))[:3]:
        compiled_matches(ours, theirs, tensors, "aot_eager")


@pytest.mark.slow
def test_compiled_network_matches(device: torch.device) -> None:
    def network(namespace: Any) -> Function:
        def run(x: Tensor, kernel: Tensor, gamma: Tensor, weight: Tensor) -> Tensor:
            y = namespace.conv2d(x, kernel, padding=1)
            y = namespace.relu(namespace.batch_norm(y, None, None, gamma, training=True))
            y = namespace.adaptive_avg_pool2d(namespace.max_pool2d(y, 2), 1).flatten(1)
            return namespace.cross_entropy(namespace.linear(y, weight), target)  # type: ignore[no-any-return]

        return run

    target = torch.tensor([0, 2], device=device)
    shapes = (2, 3, 6, 6), (4, 3, 3, 3), (4,), (3, 4)
    tensors = tuple(torch.randn(shape, dtype=torch.float64, device=device) for shape in shapes)
    compiled_matches(network(F), network(torch.nn.functional), tensors, "inductor")


def test_compiled_batch_norm_moves_its_averages() -> None:
    torch._dynamo.reset()
    x, results = torch.randn(6, 3, dtype=torch.float64), []
    for function in (F.batch_norm, torch.compile(F.batch_norm, fullgraph=True, backend="aot_eager")):
        mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        function(x, mean, var, training=True)
        results.append((mean, var))
    torch.testing.assert_close(results[0], results[1])
    assert not torch.equal(results[1][0], torch.zeros(3, dtype=torch.float64))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3),
    "sliced": lambda x: x[:, ::2],
    "expanded": lambda x: x[:1].expand(4, -1, -1, -1),
    "single channel": lambda x: x[:, :1].to(memory_format=torch.channels_last),
}


def planar_calls(namespace: Any) -> dict[str, Function]:
    """Functions of a batch of planes with the options that matter to the layout."""

    def conv2d(layout: torch.memory_format, size: int) -> Function:
        def run(x: Tensor) -> Tensor:
            kernel = torch.ones(5, x.shape[1], size, size, device=x.device, dtype=x.dtype).to(memory_format=layout)
            return namespace.conv2d(x, kernel)  # type: ignore[no-any-return]

        return run

    return {
        "relu": namespace.relu,
        "sigmoid": torch.sigmoid if namespace is torch.nn.functional else namespace.sigmoid,
        "softmax": lambda x: namespace.softmax(x, 1),
        "log_softmax": lambda x: namespace.log_softmax(x, -1),
        "max_pool2d": lambda x: namespace.max_pool2d(x, 2),
        "max_pool2d indices": lambda x: namespace.max_pool2d(x, 2, return_indices=True)[1],
        "avg_pool2d": lambda x: namespace.avg_pool2d(x, 3, 2, 1),
        "adaptive_avg_pool2d": lambda x: namespace.adaptive_avg_pool2d(x, (3, 2)),
        "adaptive_max_pool2d": lambda x: namespace.adaptive_max_pool2d(x, (3, 2)),
        "leaky_relu": namespace.leaky_relu,
        "tanh": torch.tanh if namespace is torch.nn.functional else namespace.tanh,
        "dropout": namespace.dropout,
        "mse_loss": lambda x: namespace.mse_loss(x, x.flip(0), reduction="none"),
        "binary_cross_entropy_with_logits": lambda x: namespace.binary_cross_entropy_with_logits(
            x, torch.zeros_like(x), reduction="none"
        ),
        "nll_loss": lambda x: namespace.nll_loss(x, x[:, 0].to(torch.int64) * 0, reduction="none"),
        "batch_norm": lambda x: namespace.batch_norm(x, None, None, training=True),
        "conv2d": conv2d(torch.contiguous_format, 3),
        "conv2d 1x1": conv2d(torch.contiguous_format, 1),
        "conv2d, weight channels_last": conv2d(torch.channels_last, 3),
        "linear": lambda x: namespace.linear(x, torch.ones(3, x.shape[-1], device=x.device, dtype=x.dtype)),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_are_pytorchs_on_real_meta_and_fake_tensors(layout: str, device: torch.device) -> None:
    x = LAYOUTS[layout](torch.randn(4, 6, 8, 8, device=device))
    reference = planar_calls(torch.nn.functional)
    for name, function in planar_calls(F).items():
        expected = reference[name](x)
        on_meta = function(LAYOUTS[layout](torch.empty(4, 6, 8, 8, device="meta")))
        with FakeTensorMode() as mode:
            fake = function(mode.from_tensor(x))
        for kind, result in {"real": function(x), "meta": on_meta, "fake": fake}.items():
            assert result.shape == expected.shape and result.dtype == expected.dtype, (name, kind)
            assert significant_strides(result) == significant_strides(expected), (name, kind)
        assert on_meta.is_meta and fake.device == x.device


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])  # its gradient is a sum
def test_strides_of_gradients_are_pytorchs(layout: str, device: torch.device) -> None:
    x = LAYOUTS[layout](torch.randn(4, 6, 8, 8, device=device))
    reference = planar_calls(torch.nn.functional)
    for name, function in planar_calls(F).items():
        # PyTorch's mse_loss writes its gradient in rows whatever the layout, its nll_loss refuses other layouts
        if name in ("max_pool2d indices", "mse_loss", "nll_loss"):
            continue
        grads = []
        for call in (function, reference[name]):
            leaf = x.clone().requires_grad_()
            output = call(leaf)
            grads.append(torch.autograd.grad(output, leaf, torch.ones_like(output))[0])
        assert significant_strides(grads[0]) == significant_strides(grads[1]), name


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_volumes_of_batch_norm_keep_their_layout(training: bool, device: torch.device) -> None:
    x = torch.randn(2, 3, 4, 5, 6, device=device).to(memory_format=torch.channels_last_3d).requires_grad_()
    weight, averages = torch.ones(3, device=device, requires_grad=True), torch.ones(2, 3, device=device)
    for vector in (weight, None):
        for function in (F.batch_norm, F.batch_norm_relu):
            y = function(x, *averages, vector, training=training)
            (grad,) = torch.autograd.grad(y, x, torch.ones(x.shape, device=device))
            assert y.stride() == grad.stride() == x.stride()


def on_meta(value: Any) -> Any:
    """A tensor without data in place of one with."""
    return value.detach().to("meta").requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


@each_differentiable_function
def test_gradients_on_meta_tensors(technique: FunctionTechnique) -> None:
    for sample in samples(technique, dtype=torch.float32):
        moved = tuple(map(on_meta, sample.args))
        options = {name: on_meta(value) for name, value in sample.kwargs.items()}
        function, tensors = split(technique.ours, Sample(moved, options))
        output = function(*tensors)
        assert output.is_meta and output.shape == whole(technique.ours(*sample.args, **sample.kwargs)).shape
        for tensor, grad in zip(tensors, torch.autograd.grad(output.sum(), tensors), strict=True):
            assert grad.is_meta and grad.shape == tensor.shape


AUTOCAST_CALLS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "linear": lambda m, x: m.linear(x, torch.ones(3, 8, device=x.device, dtype=torch.float32)),
    "linear, all of one dtype": lambda m, x: m.linear(x, torch.ones(3, 8, device=x.device, dtype=x.dtype)),
    "conv2d": lambda m, x: m.conv2d(x, torch.ones(4, 6, 3, 3, device=x.device)),
    "relu": lambda m, x: m.relu(x),
    "softmax": lambda m, x: m.softmax(x, 1),
    "log_softmax": lambda m, x: m.log_softmax(x, 1),
    "max_pool2d": lambda m, x: m.max_pool2d(x, 2),
    "adaptive_avg_pool2d": lambda m, x: m.adaptive_avg_pool2d(x, 1),
    "leaky_relu": lambda m, x: m.leaky_relu(x),
    "tanh": lambda m, x: (torch if m is torch.nn.functional else m).tanh(x),
    "avg_pool2d": lambda m, x: m.avg_pool2d(x, 2),
    "adaptive_max_pool2d": lambda m, x: m.adaptive_max_pool2d(x, 2),
    "mse_loss": lambda m, x: m.mse_loss(x, x.detach().flip(0)),
    "mse_loss, none": lambda m, x: m.mse_loss(x, x.detach().flip(0), reduction="none"),
    "nll_loss": lambda m, x: m.nll_loss(x, torch.zeros(4, 8, 8, dtype=torch.long, device=x.device)),
    "binary_cross_entropy_with_logits": lambda m, x: m.binary_cross_entropy_with_logits(x, torch.zeros_like(x)),
    "rnn_tanh_cell": lambda m, x: (torch if m is torch.nn.functional else m).rnn_tanh_cell(
        x[:, 0, 0], x[:, 0, 1], *(torch.ones(8, 8, device=x.device) / 8 for _ in range(2))
    ),
    "lstm_cell": lambda m, x: (torch if m is torch.nn.functional else m).lstm_cell(
        x[:, 0, 0], (x[:, 0, 1], x[:, 0, 2]), *(torch.ones(32, 8, device=x.device) / 8 for _ in range(2))
    )[0],
    "embedding": lambda m, x: m.embedding(torch.zeros(3, dtype=torch.long, device=x.device), x[0, 0]),
    "dropout": lambda m, x: m.dropout(x, 1.0),
    "batch_norm": lambda m, x: m.batch_norm(x, None, None, torch.ones(6, device=x.device), training=True),
    "cross_entropy": lambda m, x: m.cross_entropy(x, torch.zeros(4, 8, 8, dtype=torch.long, device=x.device)),
    "cross_entropy, probabilities": lambda m, x: m.cross_entropy(x, x.detach().flip(1).softmax(1)),
}


@pytest.mark.parametrize("name", AUTOCAST_CALLS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast_gives_pytorchs_dtypes(name: str, compiled: bool, device: torch.device) -> None:
    torch._dynamo.reset()
    call = AUTOCAST_CALLS[name]

    def run(namespace: Any, x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return call(namespace, x)

    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(4, 6, 8, 8, device=device, dtype=dtype, requires_grad=True)
        ours = (torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run)(F, x)
        theirs = run(torch.nn.functional, x)
        assert ours.dtype == theirs.dtype
        # Two computations in bfloat16, each within four of its roundings of 2^-8 (operands, product, bias, result), so
        # apart by eight, 2^-5; gradients as much of their largest, since the smaller ones are sums that cancel.
        torch.testing.assert_close(ours, theirs, rtol=2**-5, atol=2**-5)
        (grad,) = torch.autograd.grad(ours.float().square().mean(), x)
        (expected,) = torch.autograd.grad(theirs.float().square().mean(), x)
        assert grad.dtype == x.dtype
        torch.testing.assert_close(grad, expected, rtol=2**-5, atol=2**-5 * float(expected.abs().max()))


def test_autocast_leaves_float64_alone(device: torch.device) -> None:
    x = torch.randn(2, 3, 4, 4, device=device, dtype=torch.float64)
    with torch.autocast(device.type, torch.bfloat16):
        assert F.linear(x, torch.ones(2, 4, device=device, dtype=torch.float64)).dtype == torch.float64
        assert F.conv2d(x, torch.ones(2, 3, 1, 1, device=device, dtype=torch.float64)).dtype == torch.float64


def test_complex_products_have_pytorchs_gradients(device: torch.device) -> None:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.complex128, device=device, requires_grad=True)

    for name, args in {
        "linear": (leaf(3, 4), leaf(2, 4), leaf(2)),
        "conv2d": (leaf(2, 3, 4, 4), leaf(2, 3, 2, 2), leaf(2)),
    }.items():
        assert gradcheck(getattr(F, name), args) and gradgradcheck(getattr(F, name), args)
    x = leaf(5)
    assert gradcheck(F.sigmoid, (x,)) and gradgradcheck(F.sigmoid, (x,))
    torch.testing.assert_close(F.sigmoid(x), torch.sigmoid(x))
