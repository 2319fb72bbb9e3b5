"""The compiled autograd node: built once by the C++ compiler at hand, in the background, and done without otherwise."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib.machinery
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from reimpl.functional import kernels
from reimpl.functional._node.plan import Layout, Plan, Step
from reimpl.optim import _kernel_cache, _threads

_SOURCE, _HEADER = (Path(__file__).with_name(name) for name in ("node.cpp", "plan.h"))
# As many as a site of the node keeps.
_MOST_PLANS = 32
_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", f"-DMOST_PLANS={_MOST_PLANS}")

# Builds that stay in the cache folder: of a few versions of PyTorch, Python and this library.
_MOST_KEPT = 8

_LOCK = threading.Lock()
# Seconds that the interpreter's end waits for the thread that builds.
_PATIENCE = 5.0
_module: ModuleType | None = None

Key = tuple[Any, ...]
"""A layer's name, and its options."""

# Of each layer met its site in the node, and the plans given to that.
_SITES: dict[Key, tuple[Any, deque[Plan]]] = {}

Differentiate = Callable[[Key, tuple[Tensor | None, ...], tuple[Tensor, ...], list[float], list[int]], Any]
"""The gradients of all arguments, or of the first alone, by differentiable operators, for the layer's options, from the
gradients of all outputs, what is saved, the numbers carried, and the first argument's shape."""


def attempt(key: Key, *arguments: Tensor | float | None) -> Tensor | None:
    """The first output of a layer for such tensors and numbers, recorded for the backward pass, where a plan that it
    was taught (:func:`teach`) does; ``None`` where none does."""
    site = _SITES.get(key)
    if site is None or forward_ad._current_level >= 0:
        return None
    return _module.call(site[0], *arguments)  # type: ignore[no-any-return, union-attr]


def teach(key: Key, plan: Plan, differentiate: Differentiate) -> None:
    """Let the node do a layer for tensors like the plan's."""
    assert _module is not None
    with _LOCK:
        known = _SITES.get(key)
        if known is None:
            name = "".join(part.title() for part in key[0].split("_")) + "KernelBackward"
            known = _module.site(name, partial(_gradients, differentiate, key[1:])), deque(maxlen=_MOST_PLANS)
        site, plans = known
        if plan not in plans:
            _module.add(site, _compiled(_module, plan))
            plans.append(plan)
        _SITES[key] = known


def _gradients(differentiate: Differentiate, options: Key, *given: Any) -> tuple[Tensor | None, ...]:
    """Those of the arguments whose numbers come last."""
    *others, wanted = given
    found = differentiate(options, *others)
    return tuple(found[i] for i in wanted) if isinstance(found, tuple) else (found,)


# PyTorch's numbers of them, c10::ScalarType
_DTYPES = {torch.float32: 6, torch.float64: 7, torch.bfloat16: 15, torch.int64: 4}


def _compiled(module: ModuleType, plan: Plan) -> Any:
    def layout(given: Layout | None) -> Any:
        if given is None:
            return module.Layout(-1, [], [])
        return module.Layout(_DTYPES[given.dtype], given.sizes, given.strides)

    def step(given: Step) -> Any:
        result = module.Step()
        for field in fields(Step):
            value = getattr(given, field.name)
            setattr(result, field.name, value.tolist() if isinstance(value, array) else value)
        return result

    result = module.Plan()
    result.threads, result.arguments = torch.get_num_threads(), len(plan.arguments)
    result.layouts = [layout(given) for given in (*plan.arguments, *plan.outputs)]
    result.forward, result.backward = step(plan.forward), step(plan.backward)
    for name in ("saved", "carried", "refusal", "differentiable", "changed"):
        setattr(result, name, getattr(plan, name))
    return result


def switch(on: bool) -> None:
    """Let the node's backward passes run through kernels, or by differentiable operators."""
    if _module is not None:
        _module.switch_on(on)


def ready() -> bool:
    """Whether the node is there."""
    return _module is not None and not _threads._forked


def prepare() -> None:
    """Read the node if it was built before; otherwise build it in the background and take it up when it is there."""
    path = _path()
    if path is None or _threads._fork_call() is None:
        return
    if path.exists():
        take_up(path)
    else:
        thread = threading.Thread(target=_in_background, args=(path,), name="reimpl-node", daemon=True)
        # after the compiler is told to stop: whom the interpreter's end finds at work it ends in the midst of that
        atexit.register(thread.join, _PATIENCE)
        thread.start()


def wait(seconds: float = 90.0) -> bool:
    """Build the node, or wait for the process that does, where there is a compiler; whether it is there."""
    path, deadline = _path(), time.monotonic() + seconds
    while path is not None and not ready() and time.monotonic() < deadline:
        if path.exists() or build(path):
            take_up(path)
        elif path.with_suffix(".failed").exists() or _compiler() is None:
            break
        else:
            time.sleep(0.2)
    return ready()


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


def _path() -> Path | None:
    """Where the node is kept, its name a hash of all that it depends on; ``None`` where it cannot be."""
    folder = _kernel_cache.folder()
    if folder is None or not sys.platform.startswith("linux"):
        return None
    sources = (_SOURCE.read_text(), _HEADER.read_text())
    stamp = "\n".join((sys.version, torch.__version__, str(torch.__file__), *_FLAGS, *sources))
    name = f"reimpl_node_{sha256(stamp.encode()).hexdigest()[:24]}"
    return folder / f"{name}{importlib.machinery.EXTENSION_SUFFIXES[0]}"


def build(path: Path) -> bool:
    """Build the node, beside its place and then into it, unless another process is about it.

    Returns:
        whether it is there. A build that failed leaves the compiler's words in a file, and is not tried again.
    """
    import fcntl

    failure = path.with_suffix(".failed")
    compiler = _compiler()
    if compiler is None or failure.exists():
        return False
    with open(path.with_suffix(".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        if path.exists():
            return True
        descriptor, beside = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        os.close(descriptor)
        try:
            process = subprocess.Popen(
                _command(compiler, path, beside),
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
            )  # fmt: skip
            stop = partial(_stop, process)
            atexit.register(stop)
            _, said = process.communicate()
            atexit.unregister(stop)
            if process.returncode == 0:
                os.replace(beside, path)
                _prune(path.parent)
            elif process.returncode > 0:
                failure.write_text(said)
            return process.returncode == 0
        finally:
            Path(beside).unlink(missing_ok=True)


def _stop(process: subprocess.Popen[str]) -> None:
    """End the compiler's driver with what it has started."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _prune(folder: Path) -> None:
    """Remove what was kept of nodes, but for those used last; a process that has one open goes on with it."""
    ages: dict[str, float] = {}
    for path in folder.glob("reimpl_node_*"):
        # another process may be about the same
        with contextlib.suppress(OSError):
            name = path.name.partition(".")[0]
            ages[name] = max(ages.get(name, 0.0), path.stat().st_mtime)
    for name in sorted(ages, key=lambda name: ages[name], reverse=True)[_MOST_KEPT:]:
        for path in folder.glob(f"{name}.*"):
            with contextlib.suppress(OSError):
                path.unlink()


def _command(compiler: str, path: Path, output: str) -> list[str]:
    home = Path(torch.__file__).parent
    folders = (home / "include", home / "include/torch/csrc/api/include", sysconfig.get_paths()["include"])
    libraries = ("torch_python", "torch_cpu", "c10")
    return [
        *(compiler, *_FLAGS, f"-DNODE_NAME={path.name.partition('.')[0]}", f"-D_GLIBCXX_USE_CXX11_ABI={_abi()}"),
        *(*(f"-I{folder}" for folder in folders), str(_SOURCE), "-o", output),
        *(f"-L{home / 'lib'}", *(f"-l{library}" for library in libraries)),
    ]


def _abi() -> int:
    return int(torch._C._GLIBCXX_USE_CXX11_ABI)


def _in_background(path: Path) -> None:
    # whatever goes wrong, Python's way remains
    with contextlib.suppress(Exception):
        if build(path):
            take_up(path)


def take_up(path: Path) -> None:
    """Import the node, where that can be done."""
    global _module
    try:
        spec = importlib.util.spec_from_file_location(path.name.partition(".")[0], path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        # the time of the last use
        with contextlib.suppress(OSError):
            os.utime(path)
        module.use_threads(ctypes.cast(cast(Any, _threads._fork_call()), ctypes.c_void_p).value)
    except (ImportError, OSError, AttributeError):
        path.unlink(missing_ok=True)
        return
    # a forked process has one thread
    os.register_at_fork(after_in_child=partial(module.use_threads, 0))
    module.switch_on(kernels.kernels_enabled())
    _module = module
