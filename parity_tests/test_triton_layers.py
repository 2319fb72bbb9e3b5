"""Triton kernels of layers: what they compute, that they compile for a GPU that is not here, and when they run."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import reimpl.functional as F
from reimpl.functional import kernels
from reimpl.functional._conv.arguments import geometry_of
from reimpl.functional._pooling.windows import plan_windows

pytest.importorskip("triton", reason="the kernels are compiled by Triton")

from reimpl.functional import _triton_common
from reimpl.functional._conv import triton as _triton_conv
from reimpl.functional._losses import triton as _triton_losses
from reimpl.functional._norm import triton as _triton_norm
from reimpl.functional._pointwise import triton as _triton_pointwise
from reimpl.functional._pooling import triton as _triton_pooling

MODULES = (_triton_conv, _triton_losses, _triton_norm, _triton_pointwise, _triton_pooling)
LAUNCH_OPTIONS = {"num_warps", "num_stages", "debug", "sanitize_overflow", "enable_fp_fusion"}
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}


def _version(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version(package).split(".")[:2])


@pytest.mark.slow
def test_kernels_compute_the_layers(device: torch.device) -> None:
    """The tests of triton_layers.py, in a process of their own: the interpreter is chosen when Triton is imported."""
    if device.type == "cpu" and _version("triton") < (3, 7) and _version("numpy") >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 turns arrays to numbers as NumPy 2.4 allows no more")
    interpreted = {"TRITON_INTERPRET": "1"} if device.type == "cpu" else {}
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", str(Path(__file__).with_name("triton_layers.py"))),
            *("--device", device.type, "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist"),
        ],
        capture_output=True, text=True, timeout=600, check=False, env=os.environ | interpreted,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout[-8_000:] + finished.stderr[-2_000:]
    assert " passed" in finished.stdout


class Launch:
    """A kernel with the types, constants and options of one start, as Triton's runtime would specialise it."""

    def __init__(self, kernel: Any, arguments: dict[str, Any], options: dict[str, Any]) -> None:
        self.kernel, self.options = kernel, {"enable_fp_fusion": True} | options
        self.signature: dict[str, str] = {}
        self.constants: dict[str, Any] = {}
        self.attributes: dict[tuple[int, ...], list[Any]] = {}
        for i, parameter in enumerate(kernel.params):
            value = arguments[parameter.name]
            if parameter.is_constexpr or (isinstance(value, int) and value == 1):
                self.signature[parameter.name], self.constants[parameter.name] = "constexpr", value
                continue
            if isinstance(value, Tensor):
                self.signature[parameter.name] = TYPES[value.dtype]
            else:
                self.signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
            if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
                self.attributes[(i,)] = [["tt.divisibility", 16]]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    def ptx(self) -> str:
        """Compile for sm_90, down to machine code."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=self.options)
        assert compiled.asm["cubin"]
        return str(compiled.asm["ptx"])


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Launch]]:
    """What would be started on a device of 132 processors, a start for each kernel and set of constants."""
    seen: dict[str, Launch] = {}

    def note(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        assert 0 < max(grid[1:], default=1) < 1 << 16 and min(grid) > 0
        chosen = {key: value for key, value in options.items() if key in LAUNCH_OPTIONS}
        named = dict(zip(kernel.arg_names, args, strict=False))
        arguments = named | {key: value for key, value in options.items() if key not in LAUNCH_OPTIONS}
        launch = Launch(kernel, arguments, chosen)
        seen[f"{launch.name} {launch.signature} {launch.constants}"] = launch

    for module in MODULES:
        monkeypatch.setattr(module, "launch", note)
        if hasattr(module, "processors"):
            monkeypatch.setattr(module, "processors", lambda device: 132)
    monkeypatch.setattr(_triton_common, "processors", lambda device: 132)
    yield seen


def _convolutions(dtype: torch.dtype) -> None:
    for channels, outputs, size, stride, layout in (
        (64, 128, 32, 2, torch.channels_last),
        (64, 64, 32, 1, torch.contiguous_format),
        (3, 64, 32, 1, torch.channels_last),
    ):
        x = torch.empty((64, channels, size, size), dtype=dtype, memory_format=layout)
        grad = torch.empty((64, outputs, size // stride, size // stride), dtype=dtype, memory_format=layout)
        weight = torch.empty((outputs, channels, 3, 3), dtype=dtype)
        geometry = geometry_of(weight, stride, 1, 1, 1, None)
        _triton_conv.convolve(x, weight, weight[:, 0, 0, 0], geometry)
        _triton_conv.convolve_input(grad, weight, (size, size), geometry)
        _triton_conv.convolve_weight(grad, x, (3, 3), geometry)


def _norms(dtype: torch.dtype) -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        x, w = torch.empty((64, 64, 32, 32), dtype=dtype, memory_format=layout), torch.empty(64)
        y, mean, var = _triton_norm.forward(x, w, w, 1e-5, True)
        _triton_norm.backward(x, x, y, w, mean, var, mean, var, 1e-5, True)
        _triton_norm.infer(x, mean, var, w, w, 1e-5, False)
        _triton_norm.infer_backward(x, x, None, w, mean, var, 1e-5, True, True)


def _losses(dtype: torch.dtype) -> None:
    for shape in ((64, 1000), (64, 50_000), (8, 21, 64, 64)):
        x, target = torch.empty(shape, dtype=dtype), torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
        for log in (False, True):
            _triton_losses.softmax_gradient(x, _triton_losses.softmax(x, 1, log), 1, log)
        loss, log_probs, divisor = _triton_losses.index_loss(x, target, -100, x.flatten()[: shape[1]], 0.1, "mean")
        _triton_losses.index_loss_gradient(loss, log_probs, target, -100, None, 0.0, divisor)


def _pools(dtype: torch.dtype) -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.empty((64, 64, 32, 32), dtype=dtype, memory_format=layout)
        windows = plan_windows("max_pool2d", x, 3, 2, 1, 1, False)
        plane, output = (32, 32), windows.output
        lines = _triton_pooling.bounds(windows, plane)
        y, places = _triton_pooling.largest(x, lines, output, (1, 1))
        _triton_pooling.scatter(y, places, plane, lines, layout)
        _triton_pooling.spread(_triton_pooling.means(x, lines, output), lines, plane, layout)
        for sizes in ((1, 1), (6, 6)):
            lines = _triton_pooling.adaptive(sizes, plane)
            _triton_pooling.spread(_triton_pooling.means(x, lines, sizes), lines, plane, layout)


def _activations(dtype: torch.dtype) -> None:
    x, wide = torch.empty(64, 65_536, dtype=dtype), torch.empty(64, 4096, dtype=dtype)
    for name in ("relu", "leaky_relu", "sigmoid", "tanh"):
        _triton_pointwise.backward(name, x, _triton_pointwise.forward(name, x, 0.1), 0.1)
    y = _triton_pointwise.bias_activation(wide, wide[0], "tanh")
    _triton_pointwise.bias_activation_backward(y, y, "tanh")


def _ones(dtype: torch.dtype) -> None:
    """Sizes of 1, which the runtime makes constants of: their kernels are others."""
    x, target = torch.empty((1, 1, 1, 1), dtype=dtype), torch.zeros((1, 1, 1), dtype=torch.int64)
    weight, vector = torch.empty((1, 1, 1, 1), dtype=dtype), torch.empty(1)
    geometry = geometry_of(weight, 1, 0, 1, 1, None)
    _triton_conv.convolve(x, weight, vector, geometry)
    _triton_conv.convolve_input(x, weight, (1, 1), geometry)
    _triton_conv.convolve_weight(x, x, (1, 1), geometry)
    for batch in (x, x.expand(2, 1, 1, 1).contiguous()):
        _triton_norm.forward(batch, vector, vector, 1, True)
        _triton_norm.backward(batch, batch, batch, vector, *(vector,) * 4, 1, True)
    loss, log_probs, divisor = _triton_losses.index_loss(x, target, 1, vector, 1, "mean")
    _triton_losses.index_loss_gradient(loss, log_probs, target, 1, vector, 1, divisor)
    _triton_losses.softmax_gradient(x, _triton_losses.softmax(x, 1, True), 1, True)
    windows = plan_windows("max_pool2d", x, 1, 1, 0, 1, False)
    for lines in (_triton_pooling.bounds(windows, (1, 1), True, 1), _triton_pooling.adaptive((1, 1), (1, 1))):
        planes = (1, 1), lines, torch.contiguous_format
        _triton_pooling.scatter(*_triton_pooling.largest(x, lines, (1, 1), (1, 1)), *planes)
        y = _triton_pooling.means(x, lines, (1, 1))
        _triton_pooling.spread(y, lines, (1, 1), torch.contiguous_format)
    _triton_pointwise.backward("leaky_relu", x, _triton_pointwise.forward("leaky_relu", x, 1), 1)
    _triton_pointwise.bias_activation_backward(x, _triton_pointwise.bias_activation(x, x, "relu"), "relu")


# the kernels, their dtype, and what must be in their code: 16 bytes at a time, copies that run ahead
FAMILIES: dict[str, tuple[Callable[[torch.dtype], None], torch.dtype, int, str]] = {
    "convolution, float32": (_convolutions, torch.float32, 3, "cp.async"),
    "convolution, bfloat16": (_convolutions, torch.bfloat16, 3, "cp.async"),
    "batch_norm": (_norms, torch.float32, 4, ".v4.b32"),
    "losses": (_losses, torch.bfloat16, 5, ""),
    "pooling": (_pools, torch.float16, 6, ""),
    "activations": (_activations, torch.bfloat16, 4, ".v4.b32"),
    "sizes of 1": (_ones, torch.float32, 20, ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_compile_for_a_gpu_that_is_not_here(family: str, launches: dict[str, Launch]) -> None:
    run, dtype, count, expected = FAMILIES[family]
    run(dtype)
    assert len({launch.name for launch in launches.values()}) == count
    code = {key: launch.ptx() for key, launch in launches.items()}
    for key, ptx in code.items():
        flat = "'FLAT': True" in key  # its windows lie scattered
        assert expected in ptx or flat, key
        if family == "convolution, bfloat16":
            assert "wgmma" in ptx, key  # the matrix units of sm_90
        # a target that is no class stops the kernel
        assert ("assertfail" in ptx) == (launches[key].name in ("_loss_forward", "_loss_backward")), key


def test_there_is_a_twin_behind_each_name() -> None:
    """Every function that a Numba module and its twin both have takes the same arguments in the same order."""
    import inspect

    pytest.importorskip("numba", reason="half of the twins are compiled by Numba")
    compared = set()
    for name, twin in kernels._TRITON.items():
        if importlib.util.find_spec(f"reimpl.functional.{name}") is None:
            continue
        ours, theirs = kernels.module(name), kernels.module(twin, "triton")
        for function in vars(ours):
            if inspect.isfunction(getattr(ours, function)) and getattr(ours, function).__module__ == ours.__name__:
                if function.startswith("_") or not hasattr(theirs, function):
                    continue
                signatures = [list(inspect.signature(getattr(m, function)).parameters) for m in (ours, theirs)]
                assert signatures[0] == signatures[1], (name, function)
                compared.add(function)
    assert {"convolve", "convolve_input", "convolve_weight", "forward", "backward", "worth_it"} <= compared


@pytest.fixture
def triton_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(kernels.COMPILERS, "cpu", "triton")
    kernels.module.cache_clear()
    with F.use_kernels():
        yield
    kernels.module.cache_clear()


def test_the_device_chooses_the_compiler(triton_on_the_cpu: None) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.ones(2, 2, dtype=dtype)
        assert kernels.kernels_for("_conv.numba", x) is _triton_conv
        assert kernels.kernels_for("_norm.numba", x, None, torch.ones(2)) is _triton_norm
    assert kernels.kernels_for("_conv.numba", x.double()) is None
    assert kernels.kernels_for("_conv.numba", x.to("meta")) is None
    assert kernels.kernels_for("_conv.numba", torch._neg_view(x)) is None
    assert kernels.kernels_for("_of_another_kind", x) is None
    with F.use_kernels(False):
        assert kernels.kernels_for("_conv.numba", x) is None


def test_without_triton_it_warns_once_and_runs(triton_on_the_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "triton" else find(name, *a))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            y = F.conv2d(torch.ones(2, 16, 9, 9), torch.ones(16, 16, 3, 3))
    assert y.shape == (2, 16, 7, 7)
    assert [str(w.message) for w in caught].count(
        "use_kernels needs triton, which is not installed (PyTorch's CUDA wheels bring it); "
        "everything runs without compiled kernels"
    ) == 1  # fmt: skip
