"""Public functions towards other things than plain tensors: refused, taken over, or recorded, as PyTorch's are."""

from __future__ import annotations

import copy
import inspect
import io
import logging
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import reimpl.functional as F
import reimpl.nn as nn
from parity_tests.test_nn import CASES, inputs, pair
from parity_tests.versions import IS_REFERENCE
from reimpl.functional import kernels
from reimpl.testing import bits_equal
from reimpl.testing.guard import IndependenceError, independence_guard

quick = pytest.mark.quick
NAMES = sorted(set(F.__all__) - {"use_kernels", "edge_filters"})
each_case = pytest.mark.parametrize(
    ("name", "args", "kwargs"), CASES, ids=[f"{name}-{number}" for number, (name, _, _) in enumerate(CASES)]
)


def calls(name: str, wrong: Any) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Arguments of the function, ``wrong`` in the place of one that should be a tensor."""
    parameters = inspect.signature(getattr(F, name)).parameters
    tensor = torch.ones(2, 3, 8, 8)
    required_ones = sum(described.default is described.empty for described in parameters.values())
    for position, (argument, parameter) in enumerate(parameters.items(), 1):
        if not parameter.annotation.startswith("Tensor"):
            continue
        given = {}
        for other, described in list(parameters.items())[: max(position, required_ones)]:
            required = described.default is described.empty
            if other == argument:
                given[other] = wrong
            elif required and described.annotation.startswith("Tensor"):
                given[other] = tensor
            elif required:
                given[other] = (tensor, tensor) if "Tensor" in described.annotation else 2
            else:
                given[other] = described.default
        yield position, argument, given


@quick
@pytest.mark.filterwarnings("ignore")  # of deprecated arguments
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("identity", "lp_penalty")])
@pytest.mark.parametrize("wrong", [[1, 2], 3.0, np.ones(2), {}], ids=["list", "float", "array", "dict"])
def test_refuses_what_is_no_tensor(name: str, wrong: Any) -> None:
    kind = "numpy.ndarray" if isinstance(wrong, np.ndarray) else type(wrong).__name__
    theirs = getattr(torch.nn.functional, name, None) or getattr(torch, name, None)
    checked = 0
    for position, argument, given in calls(name, wrong):
        text = f"{name}(): argument '{argument}' (position {position}) must be Tensor, not {kind}"
        # the required ones and those before it by position, as PyTorch's Python hands them on to C++
        with pytest.raises((TypeError, AttributeError)) as error:
            getattr(F, name)(*given.values())
        assert error.value.__suppress_context__
        checked += 1
        if theirs is None:
            assert isinstance(error.value, TypeError) and str(error.value) == text
            continue
        # PyTorch's Python asks some of them for their size before anything else
        with pytest.raises((TypeError, AttributeError)) as expected:
            theirs(*given.values())
        # C++ may list every way to call it; sigmoid and tanh are torch's here, a method there
        same = "invalid combination" not in str(expected.value) and name not in ("sigmoid", "tanh")
        if IS_REFERENCE:
            assert str(error.value) == (str(expected.value) if same else text)
            assert type(error.value) is (type(expected.value) if same else TypeError)
    assert checked


@quick
@pytest.mark.parametrize("name", ["relu", "linear", "dropout", "avg_pool2d", "max_pool2d", "rnn_tanh_cell"])
def test_the_text_is_pytorchs(name: str) -> None:
    theirs = getattr(torch.nn.functional, name, None) or getattr(torch, name)
    for wrong in ("text", np.ones(2), None):
        _, _, given = next(calls(name, wrong))
        texts = []
        for function in (getattr(F, name), theirs):
            with pytest.raises(TypeError) as error:
                function(*given.values())
            texts.append(str(error.value))
        assert texts[0] == texts[1] or not IS_REFERENCE


@quick
def test_states_of_a_cell_and_missing_arguments() -> None:
    x, w = torch.ones(2, 3), torch.ones(12, 3)
    with pytest.raises(
        TypeError, match=r"lstm_cell\(\): argument 'hx' \(position 2\) must be tuple of Tensors, not int"
    ):
        F.lstm_cell(x, 1, w, w)
    with pytest.raises(TypeError, match=r"must be tuple of Tensors, not tuple"):
        F.lstm_cell(x, (x, 1), w, w)
    with pytest.raises(TypeError, match=r"lp_penalty\(\): argument 'input' \(position 1\) must be Tensor, not float"):
        F.lp_penalty(1.0)
    for call in (lambda f: f(), lambda f: f(x, False, 3), lambda f: f(x, out=x)):
        texts = []
        for function in (F.relu, torch.nn.functional.relu):
            with pytest.raises(TypeError) as error:
                call(function)
            texts.append(str(error.value))
        assert texts[0] == texts[1]


@quick
@pytest.mark.parametrize("wrong", ["a", 2.5, (2, "a"), (2.5, 2)], ids=["str", "float", "strs", "floats"])
@pytest.mark.parametrize(
    ("name", "place"),
    [(name, place) for name in ("avg_pool2d", "max_pool2d") for place in range(1, 4)]
    + [("max_pool2d", 4), ("adaptive_avg_pool2d", 1), ("adaptive_max_pool2d", 1)],
)
def test_refuses_sizes_that_are_no_integers(name: str, place: int, wrong: Any) -> None:
    args: list[Any] = [torch.ones(2, 3, 8, 8), 2, 2, 0, 1][: place + 1]
    args[place] = wrong
    texts = []
    for library in (F, torch.nn.functional):
        with pytest.raises(TypeError) as error:
            getattr(library, name)(*args)
        texts.append(str(error.value))
    if IS_REFERENCE and isinstance(wrong, float) and not name.startswith("adaptive"):
        assert texts[0] == texts[1]


@quick
def test_integers_of_numpy_are_sizes() -> None:
    x = torch.rand(2, 3, 8, 8)
    for name in ("avg_pool2d", "max_pool2d"):
        function = getattr(F, name)
        assert bits_equal(function(x, np.int64(3), np.int32(2)), function(x, 3, 2))


class Like:
    """No tensor, but something that says what PyTorch's functions make of it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func, args, kwargs or {}


@quick
@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_like_takes_over(name: str) -> None:
    function, like, places = getattr(F, name), Like(), 0
    for _, argument, given in calls(name, like):
        by_name = {argument: given.pop(argument)}
        found, args, kwargs = function(*given.values(), **by_name) if not given else function(**given, **by_name)
        assert found is function and not args and kwargs[argument] is like
        places += 1
    assert places
    found, args, kwargs = function(like, *args)
    assert found is function and args[0] is like


class Named(Tensor):
    """A subclass as users write them."""


@quick
def test_subclasses_stay_subclasses_as_pytorchs_functions_have_it(device: torch.device) -> None:
    x = torch.randn(2, 3, 8, 8, device=device)
    weight = torch.randn(4, 3, 3, 3, device=device)
    for name, rest in (("relu", ()), ("conv2d", (weight,)), ("max_pool2d", (2,)), ("softmax", (1,))):
        leaf = x.as_subclass(Named).requires_grad_()
        ours, theirs = getattr(F, name)(leaf, *rest), getattr(torch.nn.functional, name)(leaf, *rest)
        assert type(ours) is type(theirs) is Named
        # a subclass gets none of the paths for plain tensors, whose order of sums may differ
        torch.testing.assert_close(ours.as_subclass(Tensor), getattr(F, name)(x, *rest))
        (ours_grad,) = torch.autograd.grad(ours.sum(), leaf)
        assert ours_grad.shape == x.shape


class Seen(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


@quick
def test_a_mode_sees_the_function_and_not_what_it_is_made_of() -> None:
    x = torch.ones(2, 3, 4, 4)
    with Seen() as seen:
        F.relu(x)
        F.conv2d(x, torch.nn.Parameter(torch.ones(1, 3, 2, 2)))
    assert seen.functions[0] is F.relu and seen.functions[-1] is F.conv2d
    assert F.max_pool2d not in seen.functions and torch.maximum not in seen.functions


@quick
def test_the_independence_guard_looks_behind_the_function() -> None:
    with pytest.raises(IndependenceError, match=r"torch\.maximum"), independence_guard(["torch.maximum"]):
        F.relu(torch.ones(3))
    with independence_guard(["torch.nn.functional.*"]) as seen:
        F.avg_pool1d(torch.ones(2, 3, 8), 2)
    assert {"reimpl.functional.avg_pool1d", "torch.Tensor.unsqueeze"} <= seen


@quick
@pytest.mark.parametrize("name", NAMES)
def test_a_public_function_is_found_by_its_name(name: str) -> None:
    function = getattr(F, name)
    assert pickle.loads(pickle.dumps(function)) is function
    assert function.__doc__ and function.__name__ == name and function.__module__ == "reimpl.functional"
    assert inspect.signature(function) == inspect.signature(inspect.unwrap(function))


class Holder(torch.nn.Module):
    """The module within another, with as many arguments as it has inputs."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.inner = module

    # without annotations: as texts, which they are in this file, torch 2.11 records but cannot pickle them
    def forward(self, input):  # type: ignore[no-untyped-def]
        return self.inner(input)


class HolderOfTwo(Holder):
    def forward(self, input, other):  # type: ignore[no-untyped-def,override]
        return self.inner(input, other)


def _seeded(module: Any, data: tuple[Tensor, ...]) -> Any:
    torch.manual_seed(0)  # dropout draws
    return module(*data)


@pytest.mark.filterwarnings("ignore::UserWarning")
@each_case
def test_fx_records_each_module(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    data, (module, _) = inputs(name), pair(name, args, kwargs)
    model = (Holder if len(data) == 1 else HolderOfTwo)(module.double())
    graph = torch.fx.symbolic_trace(model)
    work = {node.op for node in graph.graph.nodes} & {"call_function", "call_module", "call_method"}
    assert work or name == "Identity"
    again = pickle.loads(pickle.dumps(copy.deepcopy(graph)))
    expected = _seeded(copy.deepcopy(model), data)
    torch.testing.assert_close(_seeded(again, data), expected, rtol=0, atol=0)
    torch.testing.assert_close(_seeded(graph, data), expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")  # of tracing, and of its own deprecation
@each_case
def test_jit_traces_and_saves_each_module(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    data, (module, _) = inputs(name), pair(name, args, kwargs)
    module.double()
    traced = torch.jit.trace(copy.deepcopy(module), data, check_trace=False)
    file, loaded = io.BytesIO(), traced
    if getattr(module, "sparse", False):
        # no composition has a sparse gradient, nor one that is scaled by frequency
        with pytest.raises(RuntimeError, match="Could not export Python function call '_Embedding'"):
            torch.jit.save(traced, file)
    else:
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
    # a trace records the plain composition, whose order of operations may differ from the Function's
    torch.testing.assert_close(_seeded(loaded, data), _seeded(copy.deepcopy(module), data))


def test_jit_scripts_a_model_that_is_reverted() -> None:
    model = torch.nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    x = torch.ones(4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated
        with pytest.raises(ValueError, match="Unknown type annotation"):
            torch.jit.script(model)
        expected = nn.revert(model).model(x)
        torch.testing.assert_close(torch.jit.script(model)(x), expected, rtol=0, atol=0)


@quick
def test_kernels_are_said_to_be_loaded(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("numba", reason="the kernels of the CPU are Numba's")
    kernels.module.cache_clear()
    with caplog.at_level(logging.INFO, logger="reimpl"), F.use_kernels():
        pass
    assert "loading _conv.numba; numba compiles what the cache folder does not hold" in caplog.text
