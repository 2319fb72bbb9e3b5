"""What activations, losses, pooling, cells and embedding refuse: PyTorch's types and words, or words of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_functional

import reimpl.functional as F
import reimpl.nn as nn
from parity_tests.declarations import FUNCTIONS
from parity_tests.functional_cases import refuses_alike
from parity_tests.test_functional_errors import bad_calls

pytestmark = pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")

Call = tuple[str, tuple[Any, ...], dict[str, Any]]
randn, rand = torch.randn, torch.rand


def long(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long)


def _activations_and_dropout() -> Iterator[Call]:
    for dtype in (torch.int64, torch.bool, torch.complex64):
        yield "leaky_relu", (torch.ones(2, dtype=dtype),), {}
    yield "heaviside", (randn(3), torch.ones((), dtype=torch.float64)), {}
    yield "heaviside", (randn(3).to(torch.complex64), torch.ones((), dtype=torch.complex64)), {}
    yield "heaviside", (randn(3), 2), {}
    yield "heaviside", (2, randn(3)), {}
    for p in (-0.1, 1.1):
        yield "dropout", (randn(3), p), {}
        yield "dropout", (randn(3), p, False), {}


def _regression_and_binary() -> Iterator[Call]:
    x, p = randn(3), rand(3)
    yield "mse_loss", (x, randn(4)), {}
    yield "mse_loss", (long(3), long(3)), {}
    yield "mse_loss", (x.to(torch.complex64), x.to(torch.complex64)), {}
    yield "mse_loss", (x, x), {"reduction": "some"}
    yield "mse_loss", (x, x), {"reduction": "some", "weight": x}
    yield "mse_loss", (x, x), {"weight": rand(2)}
    yield "binary_cross_entropy", (p, rand(4)), {}
    yield "binary_cross_entropy", (p + 1, p), {}
    yield "binary_cross_entropy", (p - 1, p), {}
    yield "binary_cross_entropy", (p * torch.nan, p), {}
    yield "binary_cross_entropy", (p, p + 5), {}
    yield "binary_cross_entropy", (p, p.double()), {}
    yield "binary_cross_entropy", (p, long(3)), {}
    yield "binary_cross_entropy", (long(3), p), {}
    yield "binary_cross_entropy", (long(3), long(3)), {}
    yield "binary_cross_entropy", (p, p, rand(3).requires_grad_()), {}
    yield "binary_cross_entropy", (p, p), {"reduction": "some"}
    yield "binary_cross_entropy_with_logits", (x, rand(4)), {}
    yield "binary_cross_entropy_with_logits", (x, long(3)), {}
    yield "binary_cross_entropy_with_logits", (long(3), p), {}
    yield "binary_cross_entropy_with_logits", (x.to(torch.complex64), p.to(torch.complex64)), {}
    yield "binary_cross_entropy_with_logits", (x, p, rand(2)), {}
    yield "binary_cross_entropy_with_logits", (x, p), {"pos_weight": rand(2)}
    for weight in (rand(2, 3), rand(2, 1)):
        yield "binary_cross_entropy", (p, p, weight), {}
        yield "binary_cross_entropy_with_logits", (x, p, weight), {}
        yield "binary_cross_entropy_with_logits", (x, p), {"pos_weight": weight}
    yield "binary_cross_entropy_with_logits", (x, p, rand(3).requires_grad_()), {}
    yield "binary_cross_entropy_with_logits", (x, p), {"pos_weight": rand(3).requires_grad_()}
    yield "binary_cross_entropy_with_logits", (x, p), {"reduction": "some"}


def _likelihood() -> Iterator[Call]:
    x, t = randn(3, 5), long(3)
    yield "nll_loss", (randn(()), torch.tensor(0)), {}
    yield "nll_loss", (randn(5), long(2)), {}
    for shape, target in (
        ((3, 5), (4,)),
        ((3, 5), (3, 5)),
        ((3, 5), (2, 5)),
        ((3, 5), ()),
        ((3, 5, 4), (3, 5)),
        ((3, 5, 4, 4), (3, 4, 5)),
        ((3, 5, 4, 4), (3, 4)),
        ((3, 5, 4, 4, 2), (3, 4, 5, 2)),
    ):
        yield "nll_loss", (randn(shape), torch.zeros(target, dtype=torch.long)), {}
    yield "nll_loss", (x, t.int()), {}
    yield "nll_loss", (x, randn(3)), {}
    yield "nll_loss", (x, t + 5), {}
    yield "nll_loss", (x, t - 1), {}
    yield "nll_loss", (randn(3, 5, 2, 2), long(3, 2, 2) + 5), {}
    yield "nll_loss", (x, t, randn(4)), {}
    yield "nll_loss", (x, t, randn(1, 5)), {}
    yield "nll_loss", (randn(3, 5, 4, 4), long(3, 4, 4), randn(4)), {}
    yield "nll_loss", (x, t, randn(5).double()), {}
    yield "nll_loss", (x, t, randn(5).requires_grad_()), {}
    yield "nll_loss", (randn(3, 5, 2, 2), long(3, 2, 2), randn(5).requires_grad_()), {}
    yield "nll_loss", (randn(3, 5, 2, 2), long(3, 2, 2).byte()), {}
    yield "nll_loss", (long(3, 5), t), {}
    yield "nll_loss", (long(3, 5, 2), long(3, 2)), {}
    for weight in (randn(4), randn(5).double(), randn(5).requires_grad_()):
        yield "cross_entropy", (randn(3, 5, 2), long(3, 2), weight), {}
    yield "cross_entropy", (randn(3, 5, 2), long(3, 2).byte()), {}
    yield "cross_entropy", (randn(3, 5), torch.tensor(0)), {}
    yield "nll_loss", (x, t), {"reduction": "some"}


def _pooling() -> Iterator[Call]:
    image, line = randn(2, 3, 8, 8), randn(2, 3, 8)
    for name, x in (("avg_pool2d", image), ("avg_pool1d", line), ("max_pool1d", line)):
        for shape in ((3,), (1, 1, 1, 1, 4), ()):
            yield name, (randn(shape), 2), {}
        for kernel, stride, padding in (
            ((2, 2, 2), None, 0),
            ((), None, 0),
            (2, (2, 2, 2), 0),
            (2, 2, (1, 1, 1)),
            (0, None, 0),
            (-1, None, 0),
            (2, 0, 0),
            (2, -1, 0),
            (2, 2, 2),
            (2, 2, -1),
            (11, None, 0),
        ):
            yield name, (x, kernel, stride, padding), {}
            if name == "max_pool1d":
                yield name, (x, kernel, stride, padding), {"return_indices": True}
        yield name, (x > 0, 2), {}
        yield name, (x.to(torch.complex64), 2), {}
        yield name, (x.int(), 2), {}
        yield name, (x[..., :0], 2), {}
    yield "avg_pool2d", (image[:, :0], 2), {}
    yield "avg_pool2d", (image, 2), {"divisor_override": 0}
    yield "max_pool1d", (line.long(), 2), {}
    for dilation in (0, -1, (1, 1, 1)):
        yield "max_pool1d", (line, 2, 2, 0, dilation), {}
        yield "max_pool1d", (line, 2, 2, 0, dilation), {"return_indices": True}
    yield "max_pool2d", (image, -1), {}
    yield "max_pool2d", (image, 2, -1), {}
    yield "adaptive_avg_pool1d", (randn(3), 2), {}
    yield "adaptive_avg_pool1d", (image, 2), {}
    yield "adaptive_avg_pool2d", (randn(4, 4), (2, 2)), {}
    yield "adaptive_max_pool2d", (randn(4, 4), (2, 2)), {}
    for name, x in (("adaptive_avg_pool1d", line), ("adaptive_max_pool2d", image)):
        for size in ((), (1, 1, 1), -1):
            yield name, (x, size), {}
        yield name, (x > 0, 2), {}
        yield name, (x.long(), 2), {}
        yield name, (x.to(torch.complex64), 2), {}
        yield name, (x[..., :0], 2), {}
    yield "adaptive_max_pool2d", (image[:, :0], 2), {}
    yield "adaptive_max_pool2d", (randn(3), 2), {}


def _cells_and_embedding() -> Iterator[Call]:
    x, h = randn(2, 4), randn(2, 3)
    for name, rows in (("rnn_tanh_cell", 3), ("rnn_relu_cell", 3), ("lstm_cell", 12)):
        bad_states = (randn(1, 3), randn(2, 2), randn(3), randn(2, 1, 3))
        for input, hidden in ((randn(2, 5), h), (randn(4), h), (randn(1, 2, 4), h), *((x, bad) for bad in bad_states)):
            state = (hidden, hidden) if name == "lstm_cell" else hidden
            yield name, (input, state, randn(rows, 4), randn(rows, 3)), {}
        if name == "lstm_cell":
            for cell in bad_states:
                yield name, (x, (h, cell), randn(rows, 4), randn(rows, 3)), {}
    yield "lstm_cell", (x, (h,), randn(12, 4), randn(12, 3)), {}
    table = randn(5, 3)
    for padding in (5, -6):
        yield "embedding", (long(2), table), {"padding_idx": padding}
    yield "embedding", (long(2), randn(5)), {}
    yield "embedding", (randn(2), table), {}
    yield "embedding", (long(2) + 5, table), {}
    yield "embedding", (long(2) - 1, table), {}


def _calls() -> Iterator[Call]:
    yield from _activations_and_dropout()
    yield from _regression_and_binary()
    yield from _likelihood()
    yield from _pooling()
    yield from _cells_and_embedding()


def _theirs(name: str) -> Callable[..., Any]:
    return getattr(torch_functional, name, None) or getattr(torch, name)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", sorted({name for name, _, _ in _calls()}))
def test_refuses_what_pytorch_refuses_in_its_words(name: str) -> None:
    for function, args, kwargs in _calls():
        if function == name:
            refuses_alike(getattr(F, name), _theirs(name), args, kwargs)


OWN_WORDS: tuple[tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str], ...] = (
    ("batch_norm_relu", (randn(2, 3), None, None), {}, RuntimeError, "running_mean must be defined in evaluation mode"),
    ("batch_norm_relu", (randn(2, 3), rand(4), rand(4)), {}, RuntimeError, "should contain 3 elements not 4"),
    ("linear_activation", (rand(2, 3), rand(4, 3), None, "gelu"), {}, ValueError, "must be one of .* got 'gelu'"),
    ("linear_activation", (rand(2, 3), rand(3)), {}, RuntimeError, r"shape \(out, in\), but got weight of size \[3\]"),
    (
        "maxout",
        (randn(2, 5), 2),
        {},
        ValueError,
        "pieces must be positive and divide the 5 units of dimension 1, got 2",
    ),
    ("maxout", (randn(2, 5), 0), {}, ValueError, "pieces must be positive"),
    ("maxout", (randn(2, 4), 2, 2), {}, IndexError, "Dimension out of range"),
    ("half_squared_error", (randn(3), randn(3), "some"), {}, ValueError, "not a valid value for reduction"),
    ("half_squared_error", (long(3), long(3)), {}, NotImplementedError, "not implemented for 'Long'"),
    ("cross_entropy_of_probabilities", (rand(2, 3), long(3)), {}, ValueError, "to match target batch_size"),
    ("cross_entropy_of_probabilities", (rand(2, 3) + 2, long(2)), {}, RuntimeError, "between 0 and 1"),
    ("cross_entropy_of_probabilities", (rand(2, 3), long(2)), {"eps": -1.0}, ValueError, "eps must be at least 0"),
    ("cross_entropy_of_probabilities", (rand(2, 3), long(2) + 3), {}, IndexError, "Target 3 is out of bounds"),
    ("cross_entropy_of_probabilities", (long(2, 3), long(2)), {}, NotImplementedError, "'Long'"),
    ("zero_one_loss", (randn(2, 3), long(3)), {}, ValueError, "to match target batch_size"),
    ("zero_one_loss", (randn(()), long(1)), {}, ValueError, "Expected 1 or more dimensions"),
    ("zero_one_loss", (randn(2, 3), long(2) + 3), {}, IndexError, "Target 3 is out of bounds"),
    ("masked_multilabel_loss", (randn(2, 3), rand(3)), {}, ValueError, r"target must have the shape .* \[2, 3\]"),
    ("masked_multilabel_loss", (randn(3), rand(3), long(3)), {}, TypeError, "mask must be boolean, got torch.int64"),
    ("masked_multilabel_loss", (randn(3), rand(3), long(2).bool()), {}, ValueError, "mask must have the shape"),
    ("lp_penalty", (randn(3), 0.5), {}, ValueError, "p must be at least 1 and finite, got 0.5"),
    ("lp_penalty", (randn(3), torch.inf), {}, ValueError, "p must be at least 1 and finite, got inf"),
    ("lp_penalty", ((),), {}, ValueError, "at least one tensor"),
    ("lp_penalty", (long(3),), {}, NotImplementedError, "torch.int64"),
    ("edge_filters", ("round",), {}, ValueError, "names must be among vertical, .*, got 'round'"),
    ("edge_filters", (), {"channels": 0}, ValueError, "channels must be positive, got 0"),
    ("skip_gram_loss", (randn(3), randn(3), randn(3, 2, 4)), {}, ValueError, r"center must have shape \(N, D\)"),
    ("skip_gram_loss", (randn(3, 4), randn(2, 4), randn(3, 2, 4)), {}, ValueError, "context must have the shape"),
    ("skip_gram_loss", (randn(3, 4), randn(3, 4), randn(3, 2, 5)), {}, ValueError, r"shape \(3, K, 4\), got"),
    # Type and meaning are PyTorch's; its own text names a kernel or a library that is not called here.
    (
        "binary_cross_entropy",
        (rand(3), rand(3), rand(2)),
        {},
        RuntimeError,
        "must be broadcast|Attempting to broadcast",
    ),
)


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "kind", "words"), OWN_WORDS, ids=[f"{row[0]}-{i}" for i, row in enumerate(OWN_WORDS)]
)
def test_refuses_in_words_of_its_own(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        getattr(F, name)(*args, **kwargs)


def test_every_function_that_can_refuse_has_a_bad_call() -> None:
    covered = {name for name, *_ in (*bad_calls(), *_calls(), *OWN_WORDS)}
    # These take every tensor there is.
    assert {technique.name for technique in FUNCTIONS} - covered == {"sigmoid", "tanh", "identity"}


def test_a_target_that_broadcasts_warns_in_pytorchs_words() -> None:
    for namespace in (F, torch_functional):
        with pytest.warns(UserWarning, match="Using a target size .* that is different to the input size") as caught:
            namespace.mse_loss(randn(3, 1), randn(3))
        assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="Using a target size"):
        F.half_squared_error(randn(3, 1), randn(3))


@pytest.mark.parametrize(
    ("name", "args", "inputs"),
    [
        ("RNNCell", (4, 3), (randn(1, 2, 4),)),
        ("RNNCell", (4, 3), (randn(2, 4), randn(1, 2, 3))),
        ("RNNCell", (4, 3), (randn(4), randn(2, 3))),
        ("RNNCell", (4, 3, True, "sin"), (randn(2, 4),)),
        ("LSTMCell", (4, 3), (randn(1, 2, 4),)),
        ("LSTMCell", (4, 3), (randn(2, 4), (randn(2, 3), randn(1, 2, 3)))),
        ("LSTMCell", (4, 3), (randn(4), (randn(2, 3), randn(2, 3)))),
        ("LSTMCell", (4, 3), (randn(4), (randn(3), randn(2, 3)))),
    ],
)
def test_cells_refuse_in_pytorchs_words(name: str, args: tuple[Any, ...], inputs: tuple[Any, ...]) -> None:
    refuses_alike(getattr(nn, name)(*args), getattr(torch.nn, name)(*args), inputs, {})


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("Dropout", (1.5,), {}),
        ("Dropout", (-0.1,), {}),
        ("Embedding", (4, 3, 4), {}),
        ("Embedding", (4, 3, -5), {}),
        ("Embedding", (4, 3), {"_weight": torch.zeros(3, 4)}),
    ],
)
def test_constructors_refuse_in_pytorchs_words(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    refuses_alike(getattr(nn, name), getattr(torch.nn, name), args, kwargs)


def test_other_modules_refuse() -> None:
    with pytest.raises(ValueError, match="pieces must be positive, got 0"):
        nn.Maxout(0)
    with pytest.raises(ValueError, match=r"the same shape, got \[2, 3\] and \[2, 4\]"):
        nn.Residual(nn.Linear(4, 3))(randn(2, 4))
    refuses_alike(nn.Embedding.from_pretrained, torch.nn.Embedding.from_pretrained, (randn(3),), {})
