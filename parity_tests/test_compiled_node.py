"""The compiled autograd node: the bits of Python's way, PyTorch's manners, and what it gives way to."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad
from torch.nn import functional as torch_functional
from torch.utils._python_dispatch import TorchDispatchMode

import reimpl.functional as F
from parity_tests.node_layers import LAYERS, Layer, by_node, each_layer, grad_like, taught
from reimpl.testing import random_tensor, seeded_generator

pytest.importorskip("numba", reason="the kernels are compiled by Numba")

from reimpl.functional._node import native

# PyTorch's word about what its forward mode imports.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def _built() -> None:
    if not native.wait():
        pytest.skip("needs a C++ compiler, Python's headers, and a folder to keep compiled code in")


@pytest.fixture(autouse=True)
def _node(_built: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with F.use_kernels():
        monkeypatch.setattr(native, "_SITES", {})
        yield


@each_layer
@pytest.mark.parametrize("threads", [1, 2])
def test_bits_of_pythons_way(layer: Layer, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = layer.input.clone().requires_grad_()
        slow = layer(F, x)
        assert not by_node(slow)
        quick = layer(F, x)
        assert by_node(quick) and torch.equal(quick, slow) and quick.stride() == slow.stride()
        grad = grad_like(slow)
        (wanted,) = torch.autograd.grad(slow, x, grad)
        for each in (grad, torch.stack((grad, grad), -1)[..., 1]):
            (found,) = torch.autograd.grad(quick, x, each, retain_graph=True)
            assert torch.equal(found, wanted) and found.stride() == wanted.stride()
        with torch.no_grad():
            final = layer(F, x)
        assert torch.equal(final, slow) and final.grad_fn is None
    finally:
        torch.set_num_threads(before)


@each_layer
def test_higher_derivatives(layer: Layer) -> None:
    x = taught(layer)
    wide = x.detach().double().requires_grad_()
    ours, exact = layer(F, x), layer(torch_functional, wide)
    assert by_node(ours)
    grad = grad_like(ours)
    of_ours, of_exact = _two_derivatives(ours, x, grad), _two_derivatives(exact, wide, grad.double())
    for mine, theirs in zip(of_ours, of_exact, strict=True):
        # sums of some forty terms, each within an eps of the largest
        limit = 64 * torch.finfo(torch.float32).eps * float(theirs.detach().abs().max())
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=limit)


def _two_derivatives(output: Tensor, leaf: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient, and that of its sum of squares (0 for a likelihood, which is linear)."""
    (first,) = torch.autograd.grad(output, leaf, grad, create_graph=True)
    if not first.requires_grad:
        return first, torch.zeros_like(first)
    (second,) = torch.autograd.grad(first.square().sum(), leaf, allow_unused=True)
    return first, torch.zeros_like(first) if second is None else second


@each_layer
def test_graph_is_freed_and_run_once(layer: Layer) -> None:
    x = taught(layer)
    output = layer(F, x)
    assert by_node(output)
    grad = grad_like(output)
    output.backward(grad)
    if not _keeps_nothing(layer):
        with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
            output.backward(grad)


def _keeps_nothing(layer: Layer) -> bool:
    """Only what has been freed can be missed."""
    return "avg_pool" in layer.name


def test_versions_of_what_is_kept() -> None:
    layer = LAYERS["mse_loss"]
    y = taught(layer) * 1
    loss = layer(F, y)
    assert by_node(loss)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    layer = LAYERS["softmax"]
    output = layer(F, taught(layer))
    output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@each_layer
def test_hooks_on_what_is_kept(layer: Layer) -> None:
    x, packed, unpacked = taught(layer), [], []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.detach())
        return tensor.detach().clone()

    def unpack(tensor: Tensor) -> Tensor:
        unpacked.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        output = layer(F, x)
    # a checkpoint takes what is saved by its order, which must not change when a layer is taught
    assert not by_node(output)
    grad = grad_like(output)
    (found,) = torch.autograd.grad(output, x, grad)
    assert len(packed) == len(unpacked) and bool(packed) != _keeps_nothing(layer)
    assert torch.equal(found, torch.autograd.grad(layer(F, x), x, grad)[0])


class _Graphs:
    """Compiled autograd with its graphs run as they are."""

    def __init__(self) -> None:
        self.found: list[torch.fx.GraphModule] = []

    def backward(self, output: Tensor, grad: Tensor) -> None:
        with compiled_autograd._enable(self._compiled):
            output.backward(grad)

    def _compiled(self, graph: torch.fx.GraphModule) -> Any:
        self.found.append(graph)
        return torch.compile(graph, backend="eager")


@pytest.fixture
def graphs() -> Iterator[_Graphs]:
    torch.compiler.reset()
    yield _Graphs()
    torch.compiler.reset()


@each_layer
def test_compiled_autograd(layer: Layer, graphs: _Graphs) -> None:
    # other numbers than the graph was made with: those kept, and how much the classes that count weigh
    for step in range(3):
        other = _shifted(layer, step)
        x = taught(other)
        output = other(F, x)
        assert by_node(output)
        grad = grad_like(output)
        graphs.backward(output, grad)
        (expected,) = torch.autograd.grad(other(torch_functional, x), x, grad)
        torch.testing.assert_close(x.grad, expected)
        if not _keeps_nothing(layer):
            with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
                graphs.backward(output, grad)
    assert len(graphs.found) == 1


def _shifted(layer: Layer, step: int) -> Layer:
    """The layer with other inputs and, where it has some, labels."""
    labels = (isinstance(t, Tensor) and not t.is_floating_point() for t in layer.others)
    others = ((t + step) % 5 if shift else t for shift, t in zip(labels, layer.others, strict=True))
    input = torch.empty_like(layer.input).copy_(layer.input.roll(step, 0))
    return replace(layer, input=input, others=tuple(others))


def test_compiled_autograd_of_other_layouts_and_options(graphs: _Graphs) -> None:
    x = random_tensor((6, 4), torch.float32, seeded_generator(0, "node"))
    for size, dim in ((4, 1), (4, 0), (6, 1), (5, 1)):
        layer = Layer("softmax", x[:size].contiguous(), (dim,))
        leaf = taught(layer)
        output = layer(F, leaf)
        assert by_node(output)
        grad = grad_like(output)
        graphs.backward(output, grad)
        torch.testing.assert_close(leaf.grad, torch.autograd.grad(layer(torch_functional, leaf), leaf, grad)[0])
    assert len(graphs.found) == 4


def test_compiled_autograd_with_hooks_on_what_is_kept(graphs: _Graphs) -> None:
    layer = LAYERS["softmax"]
    x = taught(layer)
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: 2 * kept, lambda packed: packed / 2):
        output = layer(F, x)
    assert not by_node(output)
    grad = grad_like(output)
    graphs.backward(output, grad)
    torch.testing.assert_close(x.grad, torch.autograd.grad(layer(torch_functional, x), x, grad)[0])


def test_another_gradient_than_numbers() -> None:
    layer = LAYERS["cross_entropy"]
    x = taught(layer)
    loss = layer(F, x)
    assert by_node(loss)
    (whole,) = torch.autograd.grad(loss, x, retain_graph=True)
    factors = torch.tensor([1.0, 2.0, -3.0])
    (batched,) = torch.autograd.grad(loss, x, factors, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(batched, factors.view(3, 1, 1) * whole)
    with F.use_kernels(False):
        torch.testing.assert_close(torch.autograd.grad(loss, x)[0], whole)


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0])
@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_batch_norm_with_all_its_tensors(training: bool, relu: bool, momentum: float) -> None:
    generator, dtype = seeded_generator(0, "batch norm"), torch.float32
    x = random_tensor((9, 5, 4, 3), dtype, generator).requires_grad_()
    w, b, mean, var = (torch.rand(5, generator=generator).add_(0.5) for _ in range(4))
    w.requires_grad_(), b.requires_grad_()
    found = []
    for wanted in ((x, w, b), (x, w, b), (w, b), (x,), (x, w, b)):
        for t in (x, w, b):
            t.requires_grad_(any(t is other for other in wanted))
        averages = mean.clone(), var.clone()
        y = (F.batch_norm_relu if relu else F.batch_norm)(x, *averages, w, b, training, momentum)
        assert averages[0]._version == averages[1]._version and bool(averages[0]._version) == training
        grads = dict(zip(map(id, wanted), torch.autograd.grad(y, wanted, grad_like(y)), strict=True))
        found.append((by_node(y), y.detach(), *averages, *(grads.get(id(t)) for t in (x, w, b))))
    assert [node for node, *_ in found] == [False, True, False, False, True]
    for _, *others in found:
        for one, other in zip(others, found[1][1:], strict=True):
            # each of the averages' two products rounded, or their sum alone
            assert one is None or torch.allclose(one, other, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_any_layout_of_an_activation() -> None:
    F.relu(torch.randn(3))
    base = torch.randn(4, 6, 5)
    dense = base, base.permute(2, 0, 1), base.mT[1:], base[0, 0, 0]
    for x in (*dense, base[:, :3], base[..., ::2], base[:0]):
        leaf = x.detach().requires_grad_()
        y = F.relu(leaf)
        assert by_node(y) == any(x is other for other in dense)
        assert torch.equal(y, x.clamp_min(0)) and y.stride() == torch_functional.relu(x).stride()


def test_options_that_compare_equal_are_told_apart() -> None:
    x = torch.randn(2, 3, 6, 6)
    F.max_pool2d(x, 2), F.avg_pool2d(x, (2, 2))
    with pytest.raises(TypeError):
        F.max_pool2d(x, 2.0)
    with pytest.raises(TypeError):
        F.avg_pool2d(x, (2.0, 2))


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(str(func))
        return func(*args, **(kwargs or {}))


class _Subclass(Tensor):
    pass


def test_gives_way() -> None:
    layer = LAYERS["cross_entropy"]
    x = taught(layer)
    expected = layer(F, x)
    assert by_node(expected)
    with _Seen() as seen:
        torch.testing.assert_close(layer(F, x), expected)
    assert len(seen.operators) > 2
    torch.testing.assert_close(torch.func.grad(lambda x: layer(F, x))(x), torch.autograd.grad(expected, x)[0])
    both = torch.func.vmap(lambda x: layer(F, x))(torch.stack((x, x)))
    torch.testing.assert_close(both, torch.stack((expected, expected)))
    with forward_ad.dual_level():
        dual = layer(F, forward_ad.make_dual(x.detach(), torch.ones_like(x)))
        tangent = forward_ad.unpack_dual(dual).tangent
    # a shift of all logits changes nothing
    torch.testing.assert_close(tangent, torch.zeros(()), rtol=0, atol=1e-5)
    for other in (x.detach().as_subclass(_Subclass), x.detach().double(), x.detach().mT.contiguous().mT):
        torch.testing.assert_close(layer(F, other).double().as_subclass(Tensor), expected.detach().double())
    compiled = torch.compile(lambda x: layer(F, x), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    with torch.inference_mode():
        assert layer(F, x.detach().clone()).is_inference()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(F, x), expected)


def test_refusals_are_pythons() -> None:
    layer = LAYERS["nll_loss"]
    x = taught(layer)
    labels, w = layer.others[0], torch.rand(40, requires_grad=True)
    with pytest.raises(IndexError, match="Target 40 is out of bounds"):
        F.nll_loss(x, labels + 1 + (labels.max() - labels))
    with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'weight'"):
        F.nll_loss(x, labels, w)
    layer = LAYERS["binary_cross_entropy"]
    x = taught(layer)
    with pytest.raises(RuntimeError, match="between 0 and 1"):
        F.binary_cross_entropy(x + 1, layer.others[0], reduction="sum")


def test_many_shapes_stay_right() -> None:
    for size in (*range(1, 2 * native._MOST_PLANS), *range(1, 8)):
        x, t = torch.randn(size, 3, requires_grad=True), torch.arange(size) % 3
        for _ in range(2):
            loss = F.cross_entropy(x, t)
        assert by_node(loss)
        (grad,) = torch.autograd.grad(loss, x)
        expected = torch_functional.cross_entropy(x, t)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(grad, torch.autograd.grad(expected, x)[0])


def test_nothing_is_left_of_a_graph() -> None:
    layer = LAYERS["cross_entropy"]
    x = taught(layer)
    kept = weakref.ref(x)
    output = layer(F, x)
    assert by_node(output)
    del x, output
    gc.collect()
    assert kept() is None


def test_a_failed_build_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "reimpl_node_x.so"
    monkeypatch.setattr(native, "_SOURCE", tmp_path / "missing.cpp")
    assert not native.build(path)
    assert path.with_suffix(".failed").read_text() and not path.exists()
    assert not list(tmp_path.glob("*.tmp"))
    monkeypatch.setattr(native, "_command", lambda *_: pytest.fail("tried again"))
    assert not native.build(path)


def test_a_damaged_file_is_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "reimpl_node_x.so"
    path.write_text("no library")
    monkeypatch.setattr(native, "_module", None)
    native.take_up(path)
    assert not native.ready() and not path.exists()


def test_superseded_builds_are_removed(tmp_path: Path) -> None:
    for age in range(3 * native._MOST_KEPT):
        for ending in ("so", "lock") if age % 3 else ("lock", "failed"):
            path = tmp_path / f"reimpl_node_{age}.cpython.{ending}"
            path.touch()
            os.utime(path, (1e9 - age, 1e9 - age))
    others = [tmp_path / "reimpl_kernel_0.py", tmp_path / "reimpl_node.txt"]
    for path in others:
        path.touch()
    native._prune(tmp_path)
    kept = {path.name.partition(".")[0] for path in tmp_path.iterdir() if path not in others}
    assert kept == {f"reimpl_node_{age}" for age in range(native._MOST_KEPT)}
    assert len(list(tmp_path.iterdir())) == 2 * native._MOST_KEPT + len(others)
