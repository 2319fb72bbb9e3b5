"""Modules against PyTorch's: same parameters for the same seed, state dicts both ways, texts, and training steps."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import reimpl.nn as nn
from parity_tests.versions import IS_REFERENCE, reference_only
from reimpl.testing import bits_equal

CASES: tuple[tuple[str, tuple[Any, ...], dict[str, Any]], ...] = (
    ("Linear", (5, 3), {}),
    ("Linear", (5, 3), {"bias": False, "dtype": torch.float64}),
    ("Identity", (3, "ignored"), {}),
    ("LeakyReLU", (), {}),
    ("LeakyReLU", (0.2, True), {}),
    ("Tanh", (), {}),
    ("MSELoss", (), {}),
    ("MSELoss", (), {"reduction": "none"}),
    ("NLLLoss", (torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),), {"ignore_index": 1, "reduction": "sum"}),
    ("BCELoss", (torch.tensor([1.0, 2.0, 3.0]),), {"reduction": "none"}),
    ("BCEWithLogitsLoss", (), {"pos_weight": torch.tensor([1.0, 2.0, 3.0])}),
    ("Dropout", (), {}),
    ("Dropout", (0.3, True), {}),
    ("MaxPool1d", (2,), {}),
    ("MaxPool1d", (3, 1, 1, 2, True, True), {}),
    ("AvgPool1d", (2,), {}),
    ("AvgPool1d", (3, 2, 1, True, False), {}),
    ("AvgPool2d", (2,), {}),
    ("AvgPool2d", ((3, 2), 1, (1, 0), True, False, 5), {}),
    ("AdaptiveAvgPool1d", (2,), {}),
    ("AdaptiveMaxPool2d", ((None, 3), True), {}),
    ("RNNCell", (5, 3), {}),
    ("RNNCell", (5, 3, False, "relu"), {"dtype": torch.float64}),
    ("LSTMCell", (5, 3), {}),
    ("LSTMCell", (5, 3), {"bias": False}),
    ("Embedding", (4, 3), {}),
    ("Embedding", (4, 3, -1, 1.5, 1.0, True, True), {}),
    ("ReLU", (), {}),
    ("ReLU", (True,), {}),
    ("Sigmoid", (), {}),
    ("Softmax", (1,), {}),
    ("Softmax", (), {}),
    ("LogSoftmax", (-1,), {}),
    ("CrossEntropyLoss", (), {}),
    ("CrossEntropyLoss", (torch.tensor([1.0, 2.0, 3.0]),), {"reduction": "sum", "label_smoothing": 0.1}),
    ("Conv2d", (4, 6, 3), {}),
    ("Conv2d", (4, 6, (3, 2), 2, (1, 0)), {"bias": False, "groups": 2}),
    ("Conv2d", (4, 6, (3, 2)), {"padding": "same", "dilation": 2, "padding_mode": "circular"}),
    ("Conv2d", (4, 2, 3), {"padding": (2, 1), "padding_mode": "reflect", "stride": (1, 2)}),
    ("Conv2d", (4, 2, 3), {"padding": 1, "padding_mode": "replicate", "dtype": torch.bfloat16}),
    ("Conv2d", (4, 2, 1), {"padding": "valid"}),
    ("Conv1d", (4, 6, 3), {}),
    ("Conv1d", (4, 6, (3,), 2, (1,)), {"bias": False, "groups": 2}),
    ("Conv1d", (4, 6, 2), {"padding": "same", "dilation": 3, "padding_mode": "reflect"}),
    ("Conv1d", (4, 2, 3), {"padding": 2, "padding_mode": "circular", "dtype": torch.float64}),
    ("MaxPool2d", (2,), {}),
    ("MaxPool2d", (3, 2, 1), {"dilation": (1, 1), "ceil_mode": True, "return_indices": True}),
    ("AdaptiveAvgPool2d", (1,), {}),
    ("AdaptiveAvgPool2d", ((None, 3),), {}),
    ("BatchNorm1d", (4,), {}),
    ("BatchNorm1d", (4,), {"momentum": None, "eps": 1e-3}),
    ("BatchNorm2d", (4,), {"affine": False}),
    ("BatchNorm2d", (4,), {"track_running_stats": False}),
    ("BatchNorm2d", (4,), {"bias": False, "momentum": 0.5}),
    ("BatchNorm3d", (4,), {"momentum": None}),
    ("BatchNorm3d", (4,), {"affine": False, "track_running_stats": False}),
    ("SyncBatchNorm", (4,), {"eps": 1e-4}),
)

each_case = pytest.mark.parametrize(
    ("name", "args", "kwargs"), CASES, ids=[f"{name}-{number}" for number, (name, _, _) in enumerate(CASES)]
)


def pair(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Our module and PyTorch's, from the same seed."""
    built = []
    for namespace in (nn, torch.nn):
        torch.manual_seed(5)
        cls = getattr(namespace, name)
        if missing := kwargs.keys() - inspect.signature(cls).parameters.keys():
            pytest.skip(f"{namespace.__name__}.{name} of this PyTorch takes no {', '.join(missing)}")
        built.append(cls(*args, **kwargs))
    return built[0], built[1]


@pytest.mark.quick
@each_case
def test_same_parameters_buffers_and_text(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    ours, theirs = pair(name, args, kwargs)
    assert type(ours) is not type(theirs) and isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs) or not IS_REFERENCE
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    assert all(bits_equal(mine[key], other[key]) for key in mine)
    assert [key for key, _ in ours.named_parameters()] == [key for key, _ in theirs.named_parameters()]
    assert mine._metadata == other._metadata


@each_case
def test_state_dicts_go_both_ways(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    ours, theirs = pair(name, args, kwargs)
    with torch.no_grad():
        for tensor in (*ours.parameters(), *ours.buffers()):
            tensor.add_(1)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    theirs.load_state_dict(torch.load(file, weights_only=True))
    assert all(bits_equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())
    fresh, _ = pair(name, args, kwargs)
    fresh.load_state_dict(theirs.state_dict())
    assert all(bits_equal(value, theirs.state_dict()[key]) for key, value in fresh.state_dict().items())


@each_case
def test_copies_pickles_and_moves(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    ours, _ = pair(name, args, kwargs)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert repr(other) == repr(ours)
        assert all(bits_equal(value, other.state_dict()[key]) for key, value in ours.state_dict().items())
    assert all(t.dtype == torch.float64 for t in ours.double().parameters())
    assert all(t.is_meta for t in ours.to("meta").parameters())


def inputs(name: str) -> tuple[Tensor, ...]:
    if name in ("CrossEntropyLoss", "NLLLoss"):
        return torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0])
    if name in ("MSELoss", "BCELoss", "BCEWithLogitsLoss"):
        return torch.rand(5, 3, dtype=torch.float64), torch.rand(5, 3, dtype=torch.float64)
    if name == "Embedding":
        return (torch.tensor([[0, 3], [1, 1]]),)
    lines = {"Conv1d": (2, 4, 7), **dict.fromkeys(("MaxPool1d", "AvgPool1d", "AdaptiveAvgPool1d"), (4, 6, 7))}
    features = dict.fromkeys(("Linear", "RNNCell", "LSTMCell"), (6, 5))
    shape = {**lines, **features, "BatchNorm1d": (6, 4), "BatchNorm3d": (2, 4, 3, 2, 3)}.get(name, (2, 4, 6, 7))
    return (torch.randn(shape, dtype=torch.float64),)


@pytest.mark.filterwarnings("ignore:Implicit dimension choice:UserWarning")
@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@each_case
def test_forward_in_training_and_evaluation(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    ours, theirs = (module.double() for module in pair(name, args, kwargs))
    data = inputs(name)
    for training in (True, True, False):
        results = []
        for module in (ours, theirs):
            torch.manual_seed(3)
            results.append(module.train(training)(*(tensor.clone() for tensor in data)))
        mine, other = results
        torch.testing.assert_close(mine, other)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def network(namespace: Any) -> torch.nn.Module:
    return namespace.Sequential(  # type: ignore[no-any-return]
        namespace.Conv2d(3, 8, 3, padding=1, bias=False),
        namespace.BatchNorm2d(8),
        namespace.ReLU(inplace=True),
        namespace.MaxPool2d(2),
        namespace.Conv2d(8, 8, 3, stride=2, padding=1, groups=2),
        namespace.Sigmoid(),
        namespace.AdaptiveAvgPool2d(1),
        namespace.Flatten(),
        namespace.Linear(8, 4),
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_network_trains_as_pytorchs_does(layout: torch.memory_format, device: torch.device) -> None:
    curves = []
    for namespace in (nn, torch.nn):
        torch.manual_seed(0)
        model = network(namespace).to(device, torch.float64, memory_format=layout)
        generator = torch.Generator().manual_seed(1)
        losses = []
        for _ in range(5):
            images = torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64).to(device, memory_format=layout)
            target = torch.randint(4, (8,), generator=generator).to(device)
            loss = namespace.CrossEntropyLoss(label_smoothing=0.1)(model(images), target)
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
            losses.append(loss.item())
        curves.append(losses)
    # Five steps in float64: roundings of 1e-16 grow by the steps' condition, far below the 1e-7 of assert_close.
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]))


@reference_only
def test_weight_in_channels_last_starts_from_the_same_bits() -> None:
    for namespace in (nn, torch.nn):
        layer = namespace.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
        torch.manual_seed(2)
        layer.reset_parameters()
        if namespace is nn:
            ours = layer
    assert not ours.weight.is_contiguous()
    assert bits_equal(ours.weight, layer.weight) and bits_equal(ours.bias, layer.bias)


def test_batch_norm_checkpoint_without_the_count() -> None:
    layer = nn.BatchNorm1d(3)
    layer.num_batches_tracked.fill_(7)
    old = {key: value for key, value in torch.nn.BatchNorm1d(3).state_dict().items() if key != "num_batches_tracked"}
    layer.load_state_dict(old)
    assert layer.num_batches_tracked == 7


@reference_only
@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("Conv2d", (4, 6, 3), {"groups": 0}),
        ("Conv2d", (3, 6, 3), {"groups": 2}),
        ("Conv2d", (4, 5, 3), {"groups": 2}),
        ("Conv2d", (4, 6, 3), {"padding": "same", "stride": 2}),
        ("Softmax", ("rows",), {}),
        ("LogSoftmax", (True,), {}),
    ],
)
def test_constructors_refuse_in_pytorchs_words(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with pytest.raises(Exception) as theirs:
        getattr(torch.nn, name)(*args, **kwargs)
    with pytest.raises(theirs.type) as ours:
        getattr(nn, name)(*args, **kwargs)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(("option", "words"), [("padding", "Invalid padding string 'x'"), ("padding_mode", "='x'")])
def test_conv2d_refuses_unknown_padding(option: str, words: str) -> None:
    # The order in which PyTorch's text lists the choices is that of a set.
    for namespace in (nn, torch.nn):
        with pytest.raises(ValueError, match=words):
            namespace.Conv2d(4, 6, 3, **{option: "x"})


@pytest.mark.parametrize(
    ("name", "shape"),
    [("BatchNorm1d", (2, 3, 4, 5)), ("BatchNorm2d", (2, 3)), ("BatchNorm3d", (2, 3)), ("SyncBatchNorm", (3,))],
)
def test_batch_norm_refuses_other_dimensions(name: str, shape: tuple[int, ...]) -> None:
    messages = []
    for namespace in (nn, torch.nn):
        with pytest.raises(ValueError) as error:
            getattr(namespace, name)(3)(torch.zeros(shape))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_one_changed_import_is_enough() -> None:
    for name in torch.nn.modules.__all__:
        ours = getattr(nn, name)
        assert (ours is not getattr(torch.nn, name)) == (name in nn.REIMPLEMENTED), name
    assert nn.init.__name__ == "reimpl.init" and nn.functional.__name__ == "reimpl.functional"
    for name in torch.nn.utils.__all__:
        ours = getattr(nn.utils, name)
        assert (ours is not getattr(torch.nn.utils, name)) == (name in nn.utils.REIMPLEMENTED), name
    assert {"Conv2d", "Dropout"} <= set(dir(nn))
    with pytest.raises(AttributeError, match="no_such_layer"):
        nn.no_such_layer  # noqa: B018
