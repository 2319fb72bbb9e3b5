"""A model turned over to ``reimpl.nn`` and back: nothing is lost, numbers are PyTorch's, what stays is named."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import reimpl.nn as nn
from parity_tests.test_nn import CASES, inputs, pair
from reimpl.nn.convert import twins
from reimpl.testing import bits_equal

pytestmark = [
    pytest.mark.filterwarnings("ignore:Implicit dimension choice:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),
]


class Network(torch.nn.Module):
    """Convolutions with a module that is used twice, a subclass, and a layer that has no twin."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1, bias=False), torch.nn.BatchNorm2d(4))
        self.shared = torch.nn.Conv2d(4, 4, 1)
        self.again = self.shared
        self.act = torch.nn.ReLU()
        self.norm = torch.nn.LayerNorm(4)
        self.head = Head(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.again(self.act(self.shared(self.stem(x)))))
        return self.head(self.norm(x.mean((2, 3))))  # type: ignore[no-any-return]


class Head(torch.nn.Linear):
    pass


def network(device: torch.device) -> torch.nn.Module:
    torch.manual_seed(0)
    return Network().to(device, torch.float64)


def images(device: torch.device) -> Tensor:
    return torch.randn(4, 3, 6, 6, device=device, dtype=torch.float64, generator=None)


@pytest.mark.quick
def test_says_what_it_replaced_and_what_it_left(device: torch.device) -> None:
    conversion = nn.convert(network(device))
    assert conversion.replaced == ("stem.0", "stem.1", "shared", "act")
    assert conversion.left == {
        "norm": "torch.nn's LayerNorm has no twin",
        "head": "Head is a subclass of torch.nn.Linear",
    }
    assert str(conversion).startswith("4 modules replaced, 2 left\n  norm: torch.nn's LayerNorm")
    assert type(conversion.model.stem[0]) is nn.Conv2d and type(conversion.model.head) is Head
    assert conversion.model.shared is conversion.model.again


def test_the_model_itself_can_be_the_module() -> None:
    layer = torch.nn.Linear(2, 3)
    conversion = nn.convert(layer)
    assert conversion.model is layer and conversion.replaced == ("",) and isinstance(layer, nn.Linear)
    assert nn.convert(torch.nn.LayerNorm(3)).left == {"": "torch.nn's LayerNorm has no twin"}
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, but got dict"):
        nn.convert({})


def test_keeps_parameters_buffers_hooks_and_mode(device: torch.device) -> None:
    model = network(device).eval()
    model.stem[1].train()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    modules = dict(model.named_modules())
    seen: list[str] = []
    handles = [
        model.shared.register_forward_hook(lambda *_: seen.append("forward")),
        model.stem[0].register_forward_pre_hook(lambda *_: seen.append("before")),
        model.act.register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    nn.convert(model)
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert all(model.get_buffer(name) is buffer for name, buffer in buffers.items())
    assert all(model.get_submodule(name) is module for name, module in modules.items())
    assert not model.training and model.stem[1].training and not model.act.training
    model(images(device)).sum().backward()
    assert seen == ["before", "forward", "forward", "backward", "backward"]
    for handle in handles:
        handle.remove()
    model(images(device))
    assert len(seen) == 5


def trained(model: torch.nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, steps: int) -> list[float]:
    losses = []
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        x = torch.randn(6, 3, 6, 6, generator=generator, dtype=torch.float64).to(device)
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_an_optimizer_goes_on_with_the_same_parameters(device: torch.device) -> None:
    curves = []
    for turn in (lambda model: None, nn.convert):
        model = network(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        losses = trained(model, optimizer, device, 3)
        turn(model)
        losses += trained(model, optimizer, device, 4)
        nn.revert(model)
        curves.append(torch.tensor(losses + trained(model, optimizer, device, 2)))
    # Nine steps in float64: roundings of 1e-16 grow by Adam's division, far below the 1e-7 of assert_close.
    torch.testing.assert_close(curves[0], curves[1])


def test_revert_goes_back(device: torch.device) -> None:
    model, before = network(device), network(device)
    names = [type(module) for module in model.modules()]
    conversion = nn.revert(nn.convert(model).model)
    assert conversion.replaced == ("stem.0", "stem.1", "shared", "act") and not conversion.left
    assert [type(module) for module in model.modules()] == names
    assert repr(model) == repr(before)
    x = images(device)
    assert bits_equal(model(x), before(x))


def test_state_dicts_go_both_ways(device: torch.device) -> None:
    ours, theirs = nn.convert(network(device)).model, network(device)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata
    with torch.no_grad():
        for tensor in ours.parameters():
            tensor.add_(1)
    theirs.load_state_dict(ours.state_dict())
    fresh = nn.convert(network(device)).model
    fresh.load_state_dict(theirs.state_dict())
    assert all(bits_equal(value, fresh.state_dict()[key]) for key, value in ours.state_dict().items())


@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle", "save"])
def test_copies_of_a_converted_model(duplicate: str, device: torch.device) -> None:
    def saved(model: torch.nn.Module) -> torch.nn.Module:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)  # type: ignore[no-any-return]

    copies: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda model: pickle.loads(pickle.dumps(model)),
        "save": saved,
    }
    model = nn.convert(network(device)).model.eval()
    other = copies[duplicate](model)
    x = images(device)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    assert other.shared is other.again
    assert bits_equal(other(x), model(x))


def test_leaves_a_module_with_a_forward_of_its_own() -> None:
    layer = torch.nn.Linear(2, 2)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    assert nn.convert(layer).left == {"": "has a forward of its own"}
    assert type(layer) is torch.nn.Linear


@pytest.mark.quick
def test_every_reimplemented_module_has_a_twin() -> None:
    names = {ours.__name__ for _, ours in twins()}
    assert names == set(nn.REIMPLEMENTED)
    assert all(theirs.__name__ == ours.__name__ for theirs, ours in twins())


@pytest.mark.parametrize(("name", "args", "kwargs"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_each_twin_computes_from_the_others_state(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A converted module has the attributes of PyTorch's constructor, and ours reads them."""
    ours, theirs = (module.double() for module in pair(name, args, kwargs))
    data = inputs(name)
    expected, back = _seeded(theirs, data), copy.deepcopy(ours)
    turned = nn.convert(copy.deepcopy(theirs)).model
    assert type(turned) is type(ours) and repr(turned) == repr(ours)
    torch.testing.assert_close(_seeded(turned, data), _seeded(ours, data), rtol=0, atol=0)
    assert type(nn.revert(back).model) is type(theirs)
    torch.testing.assert_close(_seeded(back, data), expected, rtol=0, atol=0)


def _seeded(module: torch.nn.Module, data: tuple[Tensor, ...]) -> Any:
    torch.manual_seed(0)  # dropout draws
    return module(*data)


@pytest.mark.slow
def test_a_resnet18_of_torchvision(device: torch.device) -> None:
    models = pytest.importorskip("torchvision.models", reason="the model comes from torchvision")
    torch.manual_seed(0)
    theirs = models.resnet18(num_classes=10).to(device, torch.float64)
    ours = copy.deepcopy(theirs)
    conversion = nn.convert(ours)
    assert not conversion.left and len(conversion.replaced) == sum(not list(m.children()) for m in theirs.modules())
    x = torch.randn(4, 3, 64, 64, device=device, dtype=torch.float64)
    outputs = []
    for model in (ours, theirs):
        loss = torch.nn.functional.cross_entropy(model(x), torch.tensor([1, 7, 0, 3], device=device))
        loss.backward()
        outputs.append(loss)
    torch.testing.assert_close(outputs[0], outputs[1])
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # Gradients through 18 layers in float64, whose normalisations magnify roundings.
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-6, atol=1e-9, msg=name)
    torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))
