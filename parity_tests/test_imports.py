"""Import statements of a project that used PyTorch's modules: each works, and hands on PyTorch's own objects."""

import importlib
import subprocess
import sys

import pytest
import torch

import reimpl
from reimpl import functional, init, nn, optim
from reimpl.nn import utils

TWINS = ((functional, torch.nn.functional), (nn, torch.nn), (utils, torch.nn.utils), (optim, torch.optim))
TWINS += ((optim.lr_scheduler, torch.optim.lr_scheduler),)

PYTORCHS = (
    *("nn.attention", "nn.parallel", "nn.parameter", "optim.optimizer"),
    *("nn.utils.parametrizations", "nn.utils.parametrize", "nn.utils.prune", "nn.utils.rnn", "nn.utils.stateless"),
)


@pytest.mark.parametrize(("ours", "theirs"), TWINS, ids=lambda module: module.__name__)
def test_a_module_hands_on_what_it_lacks(ours: object, theirs: object) -> None:
    for name in dir(theirs):
        if not name.startswith("__"):
            getattr(ours, name)
    assert set(dir(theirs)) <= set(dir(ours))
    with pytest.raises(AttributeError, match=rf"neither module '{ours.__name__}' nor '{theirs.__name__}' has an"):
        ours.no_such_name  # noqa: B018


@pytest.mark.parametrize("name", PYTORCHS)
def test_a_submodule_is_pytorchs_and_no_second_copy(name: str) -> None:
    # a second copy's PackedSequence, say, would be no PackedSequence to an LSTM
    assert importlib.import_module(f"reimpl.{name}") is importlib.import_module(f"torch.{name}")


def test_submodules_of_its_own_have_pytorchs_places() -> None:
    import reimpl.nn.functional as module_of_functions
    import reimpl.nn.init as module_of_initialisations
    import reimpl.nn.utils.clip_grad as module_of_clipping

    assert module_of_functions is functional and module_of_initialisations is init
    assert module_of_clipping.clip_grad_norm_ is utils.clip_grad_norm_
    with pytest.raises(ModuleNotFoundError, match=r"reimpl\.nn\.modules"):
        __import__("reimpl.nn.modules")  # PyTorch's own layers under this library's name would deceive


def test_one_import_reaches_every_part() -> None:
    source = "import reimpl, sys; assert 'torch' not in sys.modules; reimpl.nn.Linear(1, 1); reimpl.optim.Adam; "
    source += "assert 'reimpl.testing' not in sys.modules and 'testing' in dir(reimpl); reimpl.testing"
    subprocess.run([sys.executable, "-c", source], check=True, timeout=100)
    with pytest.raises(AttributeError, match="'reimpl' has no attribute 'no_such_part'"):
        reimpl.no_such_part  # noqa: B018
