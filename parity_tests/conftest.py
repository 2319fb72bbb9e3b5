"""Options, fixtures and the record of the parity tests: devices, seeds, and one JSON file for the whole run."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from reimpl.testing.recorder import Recorder
from reimpl.testing.tolerance import Verdict

RECORDER = pytest.StashKey[Recorder]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("parity")
    group.addoption("--device", choices=("cpu", "cuda", "all"), default="cpu", help="device of the parametrised tests")
    group.addoption(
        "--record", metavar="PATH", default=None, help="write what each parity case measured to PATH (JSON)"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORDER] = Recorder()
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)  # the workers share the cores among themselves


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--device")
        metafunc.parametrize("device", ("cpu", "cuda") if chosen == "all" else (chosen,), indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device under test, chosen by ``--device``; a test on CUDA is skipped where there is none."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device is available")
    return torch.device(request.param)


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., Verdict]:
    """``record(verdict, kind=..., technique=..., ...)`` notes a verdict for ``--record`` and returns it."""
    return request.config.stash[RECORDER].add


@pytest.fixture(autouse=True)
def _isolated_globals() -> Any:
    """Seed the global generator, and restore what a test may change: default dtype, grad mode, thread count."""
    dtype, grad, threads = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    recorder = config.stash[RECORDER]
    if hasattr(config, "workeroutput"):
        config.workeroutput["parity_rows"] = recorder.rows
        return
    path = config.getoption("--record")
    if path is not None:
        recorder.write(os.path.join(config.invocation_params.dir, path))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Take over the rows of a pytest-xdist worker that has finished."""
    node.config.stash[RECORDER].merge(getattr(node, "workeroutput", {}).get("parity_rows", ()))
