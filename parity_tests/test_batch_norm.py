"""Batch normalisation: the notes' chain step by step, their errata, PyTorch's samples, fused forms, processes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
from torch import Tensor, distributed
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as torch_functional

import reimpl.functional as F
import reimpl.nn as nn
from parity_tests.oracle.functional_norm import batch_norm_chain
from reimpl.functional._dispatch import CHANNELS_LAST
from reimpl.functional._norm import plain as _norm_plain
from reimpl.functional._norm.chain import Chain, per_channel
from reimpl.testing import judge, random_tensor, seeded_generator, to_oracle
from reimpl.testing.torch_database import function_inputs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SHAPES = ((7, 3), (5, 3, 4), (4, 3, 5, 2), (2, 3, 2, 3, 4))


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_step_of_the_notes_chain(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """(4.84), (4.85), (4.90), (4.92), (4.94) and (4.88) against sums written out one by one."""
    generator = seeded_generator(0, "chain", shape)
    x, grad = (random_tensor(shape, dtype, generator, device) for _ in range(2))
    weight = random_tensor((3,), dtype, generator, device)
    dims, count, eps = [d for d in range(len(shape)) if d != 1], x.numel() // 3, 1e-3
    mean = x.mean(dims)
    centred = x - per_channel(mean, x)
    chain = Chain(grad.sum(dims), (grad * centred).sum(dims), centred.square().mean(dims), weight, eps)
    steps = {
        "weight": chain.to_weight,
        "bias": chain.sum_g,
        "normalized": chain.to_normalized(grad),
        "var": chain.to_var,
        "mean": chain.to_mean,
        "input": chain.to_input(grad, centred, chain.to_mean, chain.to_var, count),
    }
    arrays = [to_oracle(tensor) for tensor in (x, weight, grad)]
    exact = batch_norm_chain(*arrays, eps)
    for name, value in steps.items():
        # The deviations are differences of numbers up to |x|max + |mean|max, and every sum has `count` terms of them.
        scale = np.maximum(np.abs(exact[name]), np.abs(exact[name]).max() + (name != "normalized") * np.sqrt(count))
        judge(value, None, exact[name], scale).check("batch_norm", f"{shape}, {dtype}", name)
    ours = torch.autograd.grad(
        F.batch_norm(leaf := x.clone().requires_grad_(), None, None, weight, training=True, eps=eps), leaf, grad
    )
    # the same sums in another order: each of `count` terms rounds by at most an eps of the largest gradient
    limit = 2 * count * torch.finfo(dtype).eps * float(steps["input"].abs().max())
    torch.testing.assert_close(ours[0], steps["input"], rtol=0, atol=limit)


def test_the_mean_is_of_x_not_of_its_square(device: torch.device) -> None:
    """N0's (4.79) averages x²; then neither the mean nor the variance of the result would be right."""
    x = random_tensor((64, 2), torch.float64, seeded_generator(0, "4.79"), device) + 3
    normalized = F.batch_norm(x, None, None, training=True)
    as_printed = (x - x.square().mean(0)) / ((x - x.square().mean(0)).square().mean(0) + 1e-5).sqrt()
    assert normalized.mean(0).abs().max() < 1e-12  # sums of 64 numbers of size 1 in float64
    assert as_printed.mean(0).abs().min() > 0.5
    # eps takes less than 1e-5 of it, since the variance is over 1 here
    torch.testing.assert_close(as_printed.square().mean(0), torch.ones_like(x[0]), rtol=0, atol=1e-5)


def test_sets_the_variance_to_one_and_removes_no_variation(device: torch.device) -> None:
    """N1 says that the variation is removed: it is scaled, and the normalised values keep their order."""
    x = 10 * random_tensor((256, 3), torch.float64, seeded_generator(0, "variation"), device)
    normalized = F.batch_norm(x, None, None, training=True, eps=1e-12)
    torch.testing.assert_close(normalized.square().mean(0), torch.ones_like(x[0]))
    assert torch.equal(normalized.argsort(0), x.argsort(0))


def test_the_mean_afterwards_is_the_bias(device: torch.device) -> None:
    """N2 has the new mean set by γ; it is β, whatever γ."""
    x = random_tensor((128, 2), torch.float64, seeded_generator(0, "mean"), device)
    beta = torch.tensor([2.0, -1.0], dtype=torch.float64, device=device)
    for gamma in (0.5, 1.0, 7.0):
        y = F.batch_norm(x, None, None, torch.full_like(beta, gamma), beta, training=True)
        torch.testing.assert_close(y.mean(0), beta)


def test_a_bias_before_it_is_dead(device: torch.device) -> None:
    """F10: the mean takes the bias away, and its gradient is 0."""
    bias = torch.randn(4, device=device, dtype=torch.float64, requires_grad=True)
    x = torch.randn(16, 4, device=device, dtype=torch.float64)
    y = F.batch_norm(x + bias, None, None, training=True)
    torch.testing.assert_close(y, F.batch_norm(x, None, None, training=True))
    (grad,) = torch.autograd.grad(y.pow(3).sum(), bias)
    assert grad.abs().max() < 1e-12  # 16 terms of size 10 in float64


def copied(values: Any) -> Any:
    """The values with their tensors cloned, since running averages move in place."""
    return [
        value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
        for value in values
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_samples_of_pytorchs_database(dtype: torch.dtype, device: torch.device) -> None:
    count = 0
    for sample in function_inputs("batch_norm", device, dtype):
        results = []
        for function in (F.batch_norm, torch_functional.batch_norm):
            args = copied(sample.args)
            # running averages take no gradient
            args[1:3] = [value if value is None else value.detach() for value in args[1:3]]
            output = function(*args, **sample.kwargs)
            leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
            grads = torch.autograd.grad(output, leaves, torch.ones_like(output).cumsum(-1).sin(), allow_unused=True)
            results.append((output, args[1], args[2], *grads))
        for number, (ours, theirs) in enumerate(zip(*results, strict=True)):
            assert (ours is None) == (theirs is None)
            if ours is None:
                continue
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
            # Gradients cancel; in lower precision the test of three ways knows how much, and judges them.
            if number < 3 or dtype == torch.float64:
                # PyTorch rounds terms of the sum in half precision: two units of the largest number. The wide types
                # keep assert_close's own limits.
                half = dtype.itemsize == 2 and ours.numel() > 0
                limit = 2 * torch.finfo(dtype).eps * float(theirs.detach().abs().nan_to_num().max()) if half else None
                torch.testing.assert_close(ours, theirs, rtol=0 if half else None, atol=limit, equal_nan=True)
        count += 1
    assert count >= 10


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cumulative_averages(shape: tuple[int, ...], device: torch.device) -> None:
    """``momentum=None``: after k batches the averages are the plain means of the k statistics."""
    layer = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    module = layer(3, momentum=None).to(device, torch.float64)
    batches = [torch.randn(shape, dtype=torch.float64, device=device) for _ in range(4)]
    for batch in batches:
        module(batch)
    dims = [d for d in range(len(shape)) if d != 1]
    torch.testing.assert_close(module.running_mean, torch.stack([b.mean(dims) for b in batches]).mean(0))
    torch.testing.assert_close(module.running_var, torch.stack([b.var(dims) for b in batches]).mean(0))
    assert module.num_batches_tracked == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_cumulative_averages_compile_once(dtype: torch.dtype, device: torch.device) -> None:
    """In one graph for all steps; PyTorch's layer stays outside of graphs."""
    torch._dynamo.reset()
    eager = nn.BatchNorm2d(3, momentum=None).to(device, dtype)
    module = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter)
    for seed in range(5):
        batch = random_tensor((4, 3, 5, 2), dtype, seeded_generator(seed, "cumulative"), device)
        torch.testing.assert_close(compiled(batch), eager(batch))
    assert counter.frame_count == 1 and module.num_batches_tracked == 5
    for ours, expected in zip(module.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, expected)


def test_linear_activation_refuses_complex_numbers() -> None:
    with pytest.raises(NotImplementedError, match="ComplexFloat"):
        F.linear_activation(torch.ones(2, 3, dtype=torch.complex64), torch.ones(4, 3, dtype=torch.complex64))


def _network(namespace: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return namespace.Sequential(  # type: ignore[no-any-return]
        namespace.Conv2d(2, 3, 3), namespace.BatchNorm2d(3), namespace.ReLU(), namespace.BatchNorm2d(3, affine=False)
    ).double()


def _shard(rank: int, images: Tensor) -> Tensor:
    # of different sizes, so that the counts matter
    return images[:3] if rank == 0 else images[3:]


def _synchronised(rank: int, store: str, images: Tensor, grad: Tensor, results: Any) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(_network(nn))
        x = _shard(rank, images).requires_grad_()
        output = model(x)
        output.backward(_shard(rank, grad))
        # an empty batch still takes part
        empty = images[:0] if rank else images
        last = nn.SyncBatchNorm(2, momentum=None).double()
        alone = last(empty)
        alone.sum().backward()
        results[rank] = (
            output.detach(), x.grad, [p.grad for p in model.parameters()], dict(model.named_buffers()),
            alone.detach(), last.running_var, last.weight.grad,
        )  # fmt: skip
    finally:
        distributed.destroy_process_group()


def _derivatives(function: Any, x: Tensor, coefficients: Tensor) -> list[Tensor]:
    """Gradients of input and parameters of the first three orders, each order's of a sum made of the last one's."""
    leaves = (
        x.clone().requires_grad_(),
        torch.tensor([0.5, -2.0]).to(x).requires_grad_(),
        x.new_ones(2).requires_grad_(),
    )
    output = function(*leaves)
    loss, results = (coefficients * output.pow(3)).sum(), []
    for _ in range(3):
        grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
        results += [grad.detach() for grad in grads]
        # squares of what is each image's own; of sums over the images, which processes share out, no squares
        loss = (coefficients * grads[0].pow(2)).sum() + sum(
            (k * grad).sum() for k, grad in zip((2, 3), grads[1:], strict=True)
        )
    return results


def _differentiated(rank: int, store: str, images: Tensor, coefficients: Tensor, results: Any) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:

        def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.sync_batch_norm(x, None, None, weight, bias, 0.1, 1e-3)

        uneven = _derivatives(function, _shard(rank, images), _shard(rank, coefficients))
        part = slice(0, 0) if rank else slice(None)
        results[rank] = uneven, _derivatives(function, images[part], coefficients[part])
    finally:
        distributed.destroy_process_group()


def _spawned(function: Any, tmp_path: Path, *arguments: Tensor) -> list[Any]:
    """What two processes of ``function`` leave."""
    with torch.multiprocessing.get_context("spawn").Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(function, (str(tmp_path / "store"), *arguments, results), nprocs=2)
        return [results[0], results[1]]


@pytest.mark.slow
def test_two_processes_differentiate_as_one_to_any_order(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    images, coefficients = (torch.randn(8, 2, 3, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    rows = _spawned(_differentiated, tmp_path, images, coefficients)

    def joint(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # PyTorch's own goes to the second order only
        centred = x - x.mean((0, 2, 3), keepdim=True)
        var = centred.square().mean((0, 2, 3), keepdim=True)
        return centred / (var + 1e-3).sqrt() * per_channel(weight, x) + per_channel(bias, x)

    whole = _derivatives(joint, images, coefficients)
    for case in range(2):  # uneven batches, and an empty one
        for number, (mine, other, expected) in enumerate(zip(rows[0][case], rows[1][case], whole, strict=True)):
            ours = torch.cat([mine, other]) if expected.dim() == 4 else mine + other
            torch.testing.assert_close(ours, expected, msg=lambda text, at=(case, number): f"{at}: {text}")


@pytest.mark.slow
def test_two_processes_normalise_as_one(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 2, 5, 5, dtype=torch.float64, generator=generator)
    grad = torch.randn(8, 3, 3, 3, dtype=torch.float64, generator=generator)
    rows = _spawned(_synchronised, tmp_path, images, grad)
    whole = _network(torch.nn)
    x = images.clone().requires_grad_()
    output = whole(x)
    output.backward(grad)
    torch.testing.assert_close(torch.cat([row[0] for row in rows]), output.detach())
    torch.testing.assert_close(torch.cat([row[1] for row in rows]), x.grad)
    for mine, other in zip(zip(*(row[2] for row in rows), strict=True), whole.parameters(), strict=True):
        torch.testing.assert_close(mine[0] + mine[1], other.grad)
    for row in rows:
        torch.testing.assert_close(row[3], dict(whole.named_buffers()))
        torch.testing.assert_close(row[5], images.transpose(0, 1).flatten(1).var(1))
    torch.testing.assert_close(rows[0][4], torch_functional.batch_norm(images, None, None, training=True))
    assert rows[1][4].shape == (0, 2, 5, 5) and torch.equal(rows[1][6], torch.zeros(2, dtype=torch.float64))


def test_conversion_keeps_parameters_and_buffers() -> None:
    for namespace in (nn, torch.nn):
        model = _network(namespace).eval()
        before, parameters = copy.deepcopy(model), list(model.parameters())
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(model, "group")
        layers = [m for m in converted.modules() if isinstance(m, nn.SyncBatchNorm)]
        assert len(layers) == 2 and all(layer.process_group == "group" for layer in layers)
        assert all(a is b for a, b in zip(converted.parameters(), parameters, strict=True))
        assert not converted[1].training and converted[3].weight is None
        assert list(converted.state_dict()) == list(before.state_dict())
        x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
        torch.testing.assert_close(converted(x), before(x))
    single = nn.SyncBatchNorm.convert_sync_batchnorm(torch.nn.BatchNorm1d(3))
    assert type(single) is nn.SyncBatchNorm and single.num_features == 3


BLOCKWISE = {
    "large planes": ((9, 3, 9, 8), False),
    "few images": ((5, 3, 3, 2), False),
    "small planes": ((17, 3, 3, 2), False),
    "channels_last": ((5, 3, 4, 6), True),
    "volume, channels_last_3d": ((5, 3, 2, 3, 4), True),
    "features": ((37, 6), False),
}


@pytest.mark.parametrize("block", [1 << 18, 32], ids=["whole", "in blocks"])
@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", BLOCKWISE)
def test_block_by_block(
    case: str,
    dtype: torch.dtype,
    training: bool,
    relu: bool,
    block: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every layout in one block and in many, the last one shorter, wide and widened."""
    monkeypatch.setattr(_norm_plain, "_BLOCK", block)
    shape, by_pixel = BLOCKWISE[case]
    generator = seeded_generator(0, case)
    x = 2 * random_tensor(shape, dtype, generator, device) + 1
    x = x.to(memory_format=CHANNELS_LAST[x.dim()]) if by_pixel else x
    grad = random_tensor(shape, dtype, generator, device)
    mean, var, weight, bias = (random_tensor(shape[1:2], torch.float32, generator, device) for _ in range(4))
    vectors = (mean, var.abs() + 0.5, weight, bias)
    results = []
    for function, wide in (
        (F.batch_norm_relu if relu else F.batch_norm, dtype),
        (torch_functional.batch_norm, torch.float64),
    ):
        vector_type = torch.float64 if wide == torch.float64 else torch.float32
        averages, parameters = ([v.to(vector_type, copy=True) for v in pair] for pair in (vectors[:2], vectors[2:]))
        leaves = [x.detach().to(wide, copy=True).requires_grad_(), *(p.requires_grad_() for p in parameters)]
        y = function(leaves[0], *averages, *leaves[1:], training=training)
        if relu and wide == torch.float64:
            # rectified where ours is: near the corner the roundings of bfloat16 fall to either side
            y = torch.where(results[0][0] > 0, y, 0)
        results.append((y, *torch.autograd.grad(y, leaves, grad.to(wide)), *averages))
    assert results[0][0].stride() == results[0][1].stride() == x.stride()
    # the results are rounded once, at the end; 648 float32 terms of a size up to 10, added one after the other, would
    # lose up to 648 * 10 * 2^-24 = 4e-4, added in the kernels' rows and lanes less than a quarter of it (atol); 1e-5 of
    # a float32 result is 168 of its roundings, more than a lane adds up
    rtol = 2**-8 if dtype == torch.bfloat16 else 1e-5
    for value, exact in zip(*results, strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=rtol if value.dtype == dtype else 1e-5, atol=1e-4)


@pytest.mark.parametrize("kernels", [False, True], ids=["as it comes", "kernels"])
@pytest.mark.parametrize("shape", [(64, 3, 16, 16), (256, 8, 6), (4, 3, 40, 40), (2048, 3)], ids=str)
def test_sums_beyond_float32(shape: tuple[int, ...], kernels: bool) -> None:
    """On the CPU PyTorch sums planes in float64, so that a mean is finite where its sum would not be."""
    if kernels:
        pytest.importorskip("numba", reason="the kernels are compiled by Numba")
    # a power of 2, whose multiples are exact; PyTorch gets the same as planes, which it sums otherwise than rows
    base, grad, planes = torch.full(shape, 2.0**120), torch.randn(shape), (shape[1], shape[0], *shape[2:])
    for x in (base, base * (1 + torch.randn(shape) / 64)):
        averages = [(torch.zeros(shape[1]), torch.ones(shape[1])) for _ in range(2)]
        leaf, leaf_in_planes = (x.clone().requires_grad_() for _ in range(2))
        with F.use_kernels(kernels):
            y = F.batch_norm(leaf, *averages[0], training=True)
            (ours,) = torch.autograd.grad(y, leaf, grad)
        in_planes = leaf_in_planes.transpose(0, 1).reshape(1, shape[1], -1).contiguous()
        z = torch_functional.batch_norm(in_planes, *averages[1], training=True)
        (theirs,) = torch.autograd.grad(z.view(planes).transpose(0, 1), leaf_in_planes, grad)
        torch.testing.assert_close((averages[0][0], ours), (averages[1][0], theirs))
        # PyTorch takes `x scale - mean scale`, which leaves the roundings of numbers of 1e38
        assert not y.any()
    for bad in (torch.nan, torch.inf):
        x = torch.randn(shape)
        x[1, 2] = bad
        with F.use_kernels(kernels):
            y = F.batch_norm(x, None, None, training=True)
        assert y[:, 2].isnan().all() and y[:, :2].isfinite().all()
