"""A model turned over with all that may hang on its modules: hooks, parametrizations, observers, compilers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.ao import quantization
from torch.nn.utils import parametrizations, parametrize, prune

import reimpl.nn as nn
from reimpl.testing import bits_equal

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Please use quant_min:UserWarning"),
]

Model = torch.nn.Module


def layers() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4)).double()


def features(device: torch.device) -> Tensor:
    return torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)


def answers(model: Model, x: Tensor) -> list[Tensor]:
    """Output, gradients, buffers: what hooks and parametrizations can change."""
    output = model(x)
    return [output, *torch.autograd.grad(output.square().sum(), list(model.parameters())), *model.buffers()]


def with_every_hook(model: Model, seen: list[str]) -> None:
    """Hooks of every kind on the first module and its weight, which write down their names."""

    def note(name: str) -> Callable[..., None]:
        return lambda *_: seen.append(name)

    first = model[0]
    first.register_forward_pre_hook(note("forward before"), with_kwargs=True)
    first.register_forward_hook(note("forward"), always_call=True)
    first.register_forward_hook(note("forward, before the other"), prepend=True)
    first.register_full_backward_pre_hook(note("backward before"))
    first.register_full_backward_hook(note("backward"))
    first.register_state_dict_pre_hook(note("state before"))
    first.register_state_dict_post_hook(note("state"))
    first.register_load_state_dict_pre_hook(note("load before"))
    first.register_load_state_dict_post_hook(note("load"))
    first.weight.register_hook(note("gradient"))
    first.weight.register_post_accumulate_grad_hook(note("accumulated"))


def test_every_hook_is_called_as_before(device: torch.device) -> None:
    heard = []
    for turn in (lambda model: None, nn.convert, lambda model: nn.revert(nn.convert(model).model)):
        model, seen = layers().to(device), []
        with_every_hook(model, seen)
        turn(model)
        model(features(device).requires_grad_()).sum().backward()
        model.load_state_dict(model.state_dict())
        heard.append(seen)
    assert heard[0] == heard[1] == heard[2] and len(heard[0]) == 11


PARAMETRIZED: dict[str, Callable[[Model], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.parametrize("name", PARAMETRIZED)
def test_parametrizations_stay(name: str, device: torch.device) -> None:
    model = layers().to(device)
    PARAMETRIZED[name](model[0])
    theirs, keys = copy.deepcopy(model), list(model.state_dict())
    conversion = nn.convert(model)
    assert conversion.replaced == ("0", "1", "2") and isinstance(model[0], nn.Linear)
    assert list(conversion.left) == ["0.parametrizations.weight.0"] and "has no twin" in str(conversion)
    assert repr(model) == repr(theirs) and list(model.state_dict()) == keys
    torch.testing.assert_close(answers(model, features(device)), answers(theirs, features(device)))
    twin = copy.deepcopy(model)
    assert bits_equal(twin.eval()(features(device)), model.eval()(features(device)))
    assert nn.revert(model).replaced == ("0", "1", "2") and not isinstance(model[0], nn.Linear)
    assert type(parametrize.remove_parametrizations(model[0], "weight")) is torch.nn.Linear
    assert type(parametrize.remove_parametrizations(twin[0], "weight")) is nn.Linear


def test_a_parametrized_subclass_is_left() -> None:
    class Own(torch.nn.Linear):
        pass

    layer = parametrizations.weight_norm(Own(2, 2))
    assert nn.convert(layer).left[""].endswith("Own is a subclass of torch.nn.Linear")
    assert not isinstance(layer, nn.Linear)


HOOKED: dict[str, Callable[[Model], Any]] = {
    "weight_norm": torch.nn.utils.weight_norm,
    "spectral_norm": torch.nn.utils.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("name", HOOKED)
def test_weights_that_hooks_make_stay(name: str, device: torch.device) -> None:
    models = [layers().to(device) for _ in range(2)]
    for model in models:
        torch.manual_seed(2)  # spectral_norm draws
        HOOKED[name](model[0])
    ours, theirs = models
    nn.convert(ours)
    assert isinstance(ours[0], nn.Linear) and list(ours.state_dict()) == list(theirs.state_dict())
    for _ in range(2):  # spectral_norm goes on with its vectors
        torch.testing.assert_close(answers(ours, features(device)), answers(theirs, features(device)))
    theirs.load_state_dict(ours.state_dict())


def test_layers_that_are_not_made_yet() -> None:
    model = torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.LazyBatchNorm1d(), torch.nn.ReLU())
    conversion = nn.convert(model)
    assert conversion.replaced == ("2",)
    assert conversion.left == {
        str(
            place
        ): f"{name} becomes torch.nn.{name.removeprefix('Lazy')} when it is first called: convert the model after that"
        for place, name in enumerate(("LazyLinear", "LazyBatchNorm1d"))
    }
    model(torch.randn(4, 5))
    assert nn.convert(model).replaced == ("0", "1") and not nn.convert(model).left
    assert type(model[0]) is nn.Linear and type(model[1]) is nn.BatchNorm1d
    without_twin = torch.nn.Sequential(torch.nn.LazyConv3d(2, 3), torch.nn.LazyConvTranspose1d(2, 3))
    assert nn.convert(without_twin).left == {
        "0": "LazyConv3d becomes torch.nn.Conv3d, which has no twin",
        "1": "LazyConvTranspose1d becomes torch.nn.ConvTranspose1d, which has no twin",
    }
    assert not nn.revert(without_twin).left


def observed() -> torch.nn.Sequential:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 2))
    model.qconfig = quantization.default_qconfig
    return quantization.prepare(model.eval())


def test_observers_go_on_observing() -> None:
    x, ranges = torch.randn(2, 3, 6, 6), []
    for turn in (lambda model: None, nn.convert):
        model = observed()
        turn(model)
        model(x)
        nn.revert(model)  # PyTorch quantizes layers of its own classes
        assert type(model[0]) is torch.nn.Conv2d
        ranges.append([(m.min_val, m.max_val) for m in model.modules() if isinstance(m, quantization.MinMaxObserver)])
    assert len(ranges[0]) >= 2 and ranges[0][0][1].numel() == 1
    torch.testing.assert_close(*ranges)


def test_layers_that_train_for_quantization_are_left_with_their_whole_name() -> None:
    layer = torch.ao.nn.qat.Conv2d(3, 4, 3, qconfig=quantization.default_qat_qconfig)
    assert nn.convert(layer).left[""] == "torch.ao.nn.qat.modules.conv.Conv2d is a subclass of torch.nn.Conv2d"


def test_wrappers_are_nothing_to_tell_of(device: torch.device) -> None:
    for wrapped in (torch.nn.DataParallel(layers(), device_ids=[]), torch.nn.ModuleDict({"a": layers()})):
        conversion = nn.convert(wrapped)
        assert len(conversion.replaced) == 3 and not conversion.left


def test_a_traced_graph_runs_the_twins(device: torch.device) -> None:
    model = torch.fx.symbolic_trace(layers().to(device))
    expected = answers(model, features(device))
    assert nn.convert(model).replaced == ("0", "1", "2")
    torch.testing.assert_close(answers(model, features(device)), expected)


def test_a_compiled_model_is_compiled_again(device: torch.device) -> None:
    graphs: list[set[Any]] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append({node.target for node in graph.graph.nodes})
        return graph.forward

    torch._dynamo.reset()
    model = torch.compile(layers().to(device), backend=backend, fullgraph=True)
    expected = model(features(device))
    assert nn.convert(model).replaced == ("_orig_mod.0", "_orig_mod.1", "_orig_mod.2")
    torch.testing.assert_close(model(features(device)), expected)
    nn.revert(model)
    assert bits_equal(model(features(device)), expected)
    assert [torch.nn.functional.linear in graph for graph in graphs[:2]] == [True, False]


def test_exported_programs_are_pytorchs_numbers(device: torch.device) -> None:
    x, model = features(device), layers().to(device).eval()
    expected = model(x)
    program = torch.export.export(nn.convert(model).model, (x,))
    torch.testing.assert_close(program.module()(x), expected)


def test_what_torch_jit_has_compiled_is_left_and_named() -> None:
    for compiled in (torch.jit.script(layers()), torch.jit.trace(layers(), features(torch.device("cpu")))):
        conversion = nn.convert(compiled)
        assert not conversion.replaced
        assert conversion.left == {
            "0": "torch.jit has compiled this Linear",
            "1": "torch.jit has compiled this ReLU",
            "2": "torch.jit has compiled this Linear",
        }


def test_ensembles_of_converted_models(device: torch.device) -> None:
    models = [nn.convert(layers().to(device)).model for _ in range(3)]
    with torch.no_grad():
        for number, model in enumerate(models):
            model[0].weight.add_(number)
    parameters, buffers = torch.func.stack_module_state(models)
    x = features(device)

    def run(parameters: Any, buffers: Any) -> Any:
        return torch.func.functional_call(models[0], (parameters, buffers), (x,))

    torch.testing.assert_close(torch.vmap(run)(parameters, buffers), torch.stack([model(x) for model in models]))
