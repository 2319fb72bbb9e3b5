"""Runs a compiled function on several threads: PyTorch's own OpenMP threads where they can be reached."""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

_CALL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_LOCK = threading.Lock()
_POOL: ThreadPoolExecutor | None = None
_forked = False


def _after_fork() -> None:
    # OpenMP's threads do not survive a fork, and its runtime waits for them for ever; nor do the pool's
    global _LOCK, _POOL, _forked
    _LOCK, _POOL, _forked = threading.Lock(), None, True


os.register_at_fork(after_in_child=_after_fork)


@cache
def _fork_call() -> Callable[[int, int, int, int], None] | None:
    """``GOMP_parallel`` of the OpenMP runtime that PyTorch has loaded.

    A second set of threads would fight for the cores with PyTorch's, which go on spinning for milliseconds after each
    operator. LLVM's and Intel's runtimes export the function as well.
    """
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    libraries = sorted(set(re.findall(r"/\S*lib(?:gomp|iomp5|omp)\b\S*\.so\S*", maps)))
    home = str(Path(torch.__file__).parent)
    for library in sorted(libraries, key=lambda path: not path.startswith(home)):
        try:
            function = ctypes.CDLL(library).GOMP_parallel
        except (OSError, AttributeError):
            continue
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        function.restype = None
        return function
    return None


@cache
def callable_at(address: int) -> Callable[[int], None]:
    """The C function at the address, which takes a pointer; other Python threads may run meanwhile."""
    return _CALL(address)


def run(address: int, data: int, threads: int) -> None:
    """Call the C function at the address with the pointer ``data`` on ``threads`` threads, and wait for all.

    The calls must share the work among themselves; the interpreter is free to run other Python threads meanwhile.
    """
    if threads <= 1:
        callable_at(address)(data)
        return
    fork_call = None if _forked else _fork_call()
    if fork_call is not None:
        fork_call(address, data, threads, 0)
        return
    call = callable_at(address)
    helpers = [_pool().submit(call, data) for _ in range(threads - 1)]
    call(data)
    for helper in helpers:
        helper.result()


def _pool() -> ThreadPoolExecutor:
    global _POOL
    with _LOCK:
        if _POOL is None:
            _POOL = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="reimpl-fused")
        return _POOL
