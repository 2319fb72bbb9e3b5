"""The project's own rules: which package may import which, what the wheel holds, what must not be needed."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import reimpl

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("reimpl", "models", "scripts", "parity_tests")
# What each folder may import besides the standard library; None stands for anything. The fused kernels' compilers and
# expecttest (which PyTorch's private test databases import) are optional and imported where they are used.
ALLOWED: dict[str, set[str] | None] = {
    "parity_tests/oracle": {"numpy", "parity_tests.oracle"},
    "reimpl": {"reimpl", "torch", "numpy", "numba", "llvmlite", "triton", "expecttest", "torchvision", "matplotlib"},
    "models": {"models", "reimpl", "torch", "numpy"},
}
FORBIDDEN = {"scripts": {"parity_tests"}}

pytestmark = pytest.mark.quick


def sources(folder: str) -> Iterator[Path]:
    return (path for path in sorted((ROOT / folder).rglob("*.py")) if "__pycache__" not in path.parts)


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports, relative names resolved."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_point_one_way(folder: str) -> None:
    allowed = (ALLOWED[folder] or set()) | set(sys.stdlib_module_names)
    strangers = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources(folder)
        for line, name in imported(path)
        if not within(name, allowed)
    ]
    assert not strangers


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_nothing_depends_on_the_tests(folder: str) -> None:
    offenders = [f"{path}:{line}" for path in sources(folder) for line, name in imported(path)
                 if within(name, FORBIDDEN[folder])]  # fmt: skip
    assert not offenders


def test_relative_imports_are_resolved() -> None:
    """The look at the imports sees what it claims to see."""
    names = {name for _, name in imported(ROOT / "reimpl" / "optim" / "sgd.py")}
    assert "reimpl.optim._engine.RuleOptimizer" in names and "torch" in names


def test_wheel_holds_the_library_alone(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path)], check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"reimpl", f"reimpl-{reimpl.__version__}.dist-info"}
    expected = {str(path.relative_to(ROOT).as_posix()) for path in sources("reimpl")} | {"reimpl/py.typed"}
    assert {name for name in names if name.startswith("reimpl/")} >= expected
    assert f"reimpl-{reimpl.__version__}.dist-info/licenses/LICENSE" in names


_BARE = """
import importlib.machinery, inspect, sys, warnings

missing = sys.argv[1].split(",")
find = importlib.machinery.PathFinder.find_spec

class Finder:  # asking whether a missing package is there must say no, importing it must fail
    find_spec = staticmethod(lambda name, *where: None if name.split(".")[0] in missing else find(name, *where))

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Finder
import torch
import reimpl, reimpl.data, reimpl.functional, reimpl.init, reimpl.nn, reimpl.optim, reimpl.testing
import reimpl.diagnose, reimpl.strategies

parameter = torch.nn.Parameter(torch.ones(3))
parameter.grad = torch.ones(3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    classes = [getattr(reimpl.optim, name) for name in reimpl.optim.REIMPLEMENTED]
    fusible = [cls for cls in classes if "fused" in inspect.signature(cls).parameters]
    optimizers = [cls([parameter], fused=True) for cls in fusible]
    for optimizer in optimizers:
        optimizer.step()
print([str(warning.message) for warning in caught])
"""


@pytest.mark.slow
def test_library_needs_torch_and_numpy_alone() -> None:
    """Every package is imported, and fused steps run, where all that is optional is missing."""
    extras = "numba,llvmlite,torchvision,expecttest,scipy,sklearn,matplotlib,tyro,rich,tqdm,tensorboard,pytest"
    finished = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", _BARE, extras],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    said = ast.literal_eval(finished.stdout)
    assert len(said) == 1 and "numba" in said[0] and "reimpl[fused]" in said[0]


def test_version_is_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == reimpl.__version__


def texts() -> Iterator[tuple[Path, str]]:
    """Every text file of the project, as far as it is not made by a command."""
    top = [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]
    below = [path for folder in (*PACKAGES, "docs", ".ci") for path in (ROOT / folder).rglob("*") if path.is_file()]
    for path in sorted(top + below):
        if "__pycache__" not in path.parts and path.suffix not in {".png", ".pyc", ".npz", ".pt"}:
            yield path.relative_to(ROOT), path.read_text(encoding="utf-8")


def test_no_absolute_paths() -> None:
    pattern = re.compile(r"""(?<![\w.:/~}])/(?:home|root|Users|work|opt|tmp|mnt)/\w|\b[A-Z]:\\\\?\w""")
    found = [f"{path}: {match.group()}" for path, text in texts() for match in pattern.finditer(text)]
    assert not found


def readme_examples() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def test_readme_has_examples() -> None:
    assert len(readme_examples()) >= 2


@pytest.mark.parametrize(
    "number", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, len(readme_examples())))]
)
def test_readme_example_runs(number: int, tmp_path: Path) -> None:
    """From another folder, as after an installation."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(
        [sys.executable, "-c", readme_examples()[number]],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr


def test_readme_names_what_exists() -> None:
    """Pictures and folders that the page points at are there."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    named = [name for name in re.findall(r"`([\w./]+/[\w.]+\.py)`", text) if "lion" not in name]
    missing = [name for name in (*links, *named) if not (ROOT / name).exists()]
    assert not missing


def test_commands_are_there() -> None:
    run = ROOT / ".ci" / "run"
    assert os.access(run, os.X_OK) and run.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash")
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {"report", "test", "quick", "bench", "lint", "clean"} <= set(targets)
