"""A layer is an instance of PyTorch's class, for whoever asks, and does nothing that PyTorch's class does."""

from __future__ import annotations

import copy

import pytest
import torch

import reimpl.functional as F
import reimpl.nn as nn
from reimpl.init._activations import by_batch
from reimpl.testing import bits_equal

pytestmark = pytest.mark.quick
# What PyTorch's classes have for themselves alone: nothing here calls it.
_THEIRS = {"Embedding": {"_fill_padding_idx_with_zero"}, "SyncBatchNorm": {"_check_non_zero_input_channels"}}


@pytest.mark.parametrize("name", nn.REIMPLEMENTED)
def test_derives_from_pytorchs_class_and_runs_none_of_its_methods(name: str) -> None:
    ours, theirs = getattr(nn, name), getattr(torch.nn, name)
    assert issubclass(ours, theirs)
    pytorchs = set(theirs.__mro__) - set(torch.nn.Module.__mro__)
    found = {
        attribute: next(base for base in ours.__mro__ if attribute in vars(base))
        for cls in pytorchs
        for attribute, value in vars(cls).items()
        if callable(getattr(value, "__func__", value))
    }
    assert "forward" in found and found["forward"].__module__.startswith("reimpl.nn.")
    assert {attribute for attribute, base in found.items() if base in pytorchs} <= _THEIRS.get(name, set())


def small_network() -> torch.nn.Sequential:
    return torch.nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), torch.nn.Flatten(), nn.Linear(4 * 6 * 6, 2)
    )


def test_who_asks_by_isinstance_finds_the_layers() -> None:
    kinds = (torch.nn.Conv2d, torch.nn.BatchNorm2d, torch.nn.ReLU, torch.nn.Flatten, torch.nn.Linear)
    assert all(isinstance(module, kind) for module, kind in zip(small_network(), kinds, strict=True))
    synchronised = torch.nn.SyncBatchNorm.convert_sync_batchnorm(small_network())
    assert type(synchronised[1]) is torch.nn.SyncBatchNorm


def test_pytorchs_fusion_of_convolution_and_norm_takes_ours() -> None:
    torch.manual_seed(0)
    model, x = small_network().double(), torch.randn(5, 3, 8, 8, dtype=torch.float64)
    model(x)  # running averages other than 0 and 1
    model.eval()
    fused = torch.nn.utils.fuse_conv_bn_eval(model[0], model[1])
    assert type(fused) is nn.Conv2d
    torch.testing.assert_close(fused(x), model[1](model[0](x)))


class Mine(nn.Linear):
    """A subclass as users write them."""


def test_ours_are_no_subclasses_to_be_left() -> None:
    assert nn.convert(small_network()).left == {} and nn.convert(Mine(2, 2)).left == {}
    assert nn.revert(Mine(2, 2)).left == {"": "Mine is a subclass of reimpl.nn.Linear"}
    assert str(nn.convert(torch.nn.Linear(2, 2))) == "1 module replaced, 0 left"


@pytest.mark.parametrize(("name", "shape"), [("Conv1d", (2, 3, 12)), ("Conv2d", (2, 3, 8, 8))])
def test_a_convolution_keeps_its_algorithm(name: str, shape: tuple[int, ...], device: torch.device) -> None:
    algorithm = "views" if name == "Conv1d" else "winograd"
    torch.manual_seed(0)
    module = getattr(nn, name)(3, 4, 3, padding=1, algorithm=algorithm, device=device)
    x = torch.randn(shape, device=device)
    function = getattr(F, name.lower())
    expected = function(x, module.weight, module.bias, padding=1, algorithm=algorithm)
    assert bits_equal(module(x), expected) and bits_equal(copy.deepcopy(module)(x), expected)
    assert repr(module).endswith(f"padding={module.padding}, algorithm={algorithm})")
    plain = getattr(nn, name)(3, 4, 3, padding=1, device=device)
    assert list(plain.state_dict()) == list(module.state_dict()) and "algorithm" not in repr(plain)
    nn.revert(module)
    assert type(module) is getattr(torch.nn, name) and "algorithm" not in repr(module)
    assert bits_equal(nn.convert(module).model(x), expected)
    assert nn.convert(getattr(torch.nn, name)(3, 4, 3)).model.algorithm is None


def test_a_convolution_refuses_an_unknown_algorithm() -> None:
    with pytest.raises(ValueError, match=r"algorithm must be None or one of .*winograd.*, but got 'fft'"):
        nn.Conv2d(3, 4, 3, algorithm="fft")


@pytest.mark.parametrize("name", ["Conv1d", "Conv2d"])
def test_a_wrong_call_is_told_in_the_name_of_the_class(name: str) -> None:
    for library in (nn, torch.nn):
        with pytest.raises(TypeError, match=rf"^{name}\.__init__\(\) got an unexpected keyword argument 'other'"):
            getattr(library, name)(3, 4, 3, other=1)


def test_initialisation_by_a_batch_sees_our_activations() -> None:
    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return F.tanh(self.second(F.leaky_relu(self.first(input), 0.2)))

    found = by_batch(Network(), torch.ones(5, 3))
    assert {name: activation.name for name, activation in found.items()} == {
        "first": "leaky_relu(0.2)",
        "second": "tanh",
    }
