"""The table of odd calls: a library's functions ``f``, its modules ``nn``, and what a call is given, ``x``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Call = Callable[[Any, Any, Any], Any]

_BINARY: tuple[Call, ...] = (
    # weights that torch.func differentiates by
    lambda f, nn, x: torch.func.grad(lambda w: f.binary_cross_entropy_with_logits(x.randn(3), x.rand(3), w))(x.rand(3)),
    lambda f, nn, x: torch.func.grad(lambda w: f.binary_cross_entropy_with_logits(x.randn(3), x.rand(3), w))(x.rand(1)),
    lambda f, nn, x: torch.func.grad(
        lambda q: f.binary_cross_entropy_with_logits(x.randn(2, 3), x.rand(2, 3), pos_weight=q)
    )(x.rand(3)),
    lambda f, nn, x: torch.func.jacrev(
        lambda w: f.binary_cross_entropy_with_logits(x.randn(3), x.rand(3), w, reduction="none")
    )(x.rand(3)),
    lambda f, nn, x: torch.func.grad(lambda w: f.binary_cross_entropy(x.rand(3), x.rand(3), w))(x.rand(3)),
    lambda f, nn, x: f.binary_cross_entropy_with_logits(x.grad(3), x.rand(3), x.leaf(x.rand(3))),
    # numbers that are no probabilities, under vmap
    lambda f, nn, x: torch.vmap(f.binary_cross_entropy)(x.rand(3, 2) + 1, x.rand(3, 2)),
    lambda f, nn, x: torch.vmap(f.binary_cross_entropy)(x.rand(3, 2), x.rand(3, 2) - 1),
    lambda f, nn, x: torch.vmap(f.binary_cross_entropy, (0, None))(x.rand(3, 2), x.rand(2) * torch.nan),
    lambda f, nn, x: torch.vmap(torch.func.grad(f.binary_cross_entropy))(x.rand(3, 2), x.rand(3, 2) + 1),
    lambda f, nn, x: torch.vmap(f.binary_cross_entropy)(x.rand(3, 2), x.rand(3, 2)),
    # complex and boolean weights and targets
    lambda f, nn, x: f.binary_cross_entropy(x.rand(3), x.rand(3), x.complex(3)),
    lambda f, nn, x: f.binary_cross_entropy_with_logits(x.grad(3), x.rand(3), x.complex(3)),
    lambda f, nn, x: f.binary_cross_entropy_with_logits(x.grad(3), x.rand(3), pos_weight=x.complex(3)),
    lambda f, nn, x: f.binary_cross_entropy_with_logits(x.grad(3), x.rand(3), pos_weight=x.bool(3)),
    lambda f, nn, x: f.binary_cross_entropy_with_logits(x.randn(3), x.complex(3)),
    lambda f, nn, x: f.binary_cross_entropy_with_logits(x.randn(3), x.bool(3)),
    # strides of the target's gradient
    *(
        lambda f, nn, x, shape=shape, how=how: f.binary_cross_entropy_with_logits(
            x.leaf(x.randn(3, 2).t()), x.leaf(x.rand(3, 2).t()), pos_weight=x.rand(*shape), reduction=how
        )
        for shape in ((3,), (2, 1), (), (2, 3))
        for how in ("none", "mean")
    ),
    lambda f, nn, x: f.binary_cross_entropy_with_logits(
        x.grad(2, 3), x.leaf(x.rand(3, 2).t()), x.rand(2, 3), pos_weight=x.rand(3, 2).t(), reduction="none"
    ),
)

_SQUARED_ERROR: tuple[Call, ...] = (
    lambda f, nn, x: f.mse_loss(x.grad(3), x.bool(3), weight=x.rand(3)),
    lambda f, nn, x: f.mse_loss(x.bool(3), x.bool(3), weight=x.rand(3)),
    lambda f, nn, x: f.mse_loss(x.bool(3), x.bool(3)),
    lambda f, nn, x: f.mse_loss(x.complex(3), x.complex(3)),
    *(
        lambda f, nn, x, how=how: f.mse_loss(
            x.leaf(x.complex(3)), x.leaf(x.complex(3)), weight=x.leaf(x.rand(3)), reduction=how
        )
        for how in ("none", "mean", "sum")
    ),
    lambda f, nn, x: f.mse_loss(x.leaf(x.complex(3)), x.grad(3), weight=x.leaf(x.complex(3))),
    lambda f, nn, x: f.mse_loss(x.grad(3), x.randn(3), weight=x.leaf(x.complex(3))),
    *(
        lambda f, nn, x, weight=weight, how=how: f.mse_loss(
            x.long(3), x.long(3), weight=getattr(x, weight)(3), reduction=how
        )
        for weight in ("long", "rand", "bool")
        for how in ("none", "mean", "sum")
    ),
    lambda f, nn, x: f.mse_loss(x.long(3), x.long(3)),
    lambda f, nn, x: f.mse_loss(x.randn(3), x.randn(3), False, True, weight=x.rand(3)),
    lambda f, nn, x: f.mse_loss(x.randn(3), x.randn(3), x.rand(3)),
    lambda f, nn, x: f.mse_loss(x.randn(3), x.randn(3), reduction=None, weight=x.rand(3)),
    *(
        lambda f, nn, x, how=how: f.mse_loss(
            x.leaf(x.randn(3, 2).t()), x.leaf(x.randn(3, 2).t()), weight=x.leaf(x.rand(2, 3)), reduction=how
        )
        for how in ("none", "mean")
    ),
)

_NO_TENSORS: tuple[Call, ...] = (
    *(
        lambda f, nn, x, name=name, place=place, wrong=wrong: getattr(f, name)(
            *(wrong if i == place else x.rand(3, 3) for i in range(3))
        )
        for name, places in (
            ("binary_cross_entropy", 3),
            ("binary_cross_entropy_with_logits", 3),
            ("mse_loss", 2),
            ("cross_entropy", 2),
            ("nll_loss", 2),
            ("linear", 3),
            ("batch_norm", 3),
        )
        for place in range(places)
        for wrong in (1, [1.0], "a", {}, np.ones(3))
    ),
    *(
        lambda f, nn, x, name=name, rest=rest, wrong=wrong: getattr(f, name)(wrong, *rest)
        for name, rest in (("relu", ()), ("relu_", ()), ("leaky_relu", ()), ("dropout", ()), ("softmax", (0,)))
        for wrong in (1, None, [1.0], np.ones(3))
    ),
    lambda f, nn, x: f.softmax(1),
    lambda f, nn, x: f.softmax(x.randn(2, 3), None, "a"),
    lambda f, nn, x: f.log_softmax(None, 0),
    lambda f, nn, x: f.embedding(1, x.randn(5, 3)),
    lambda f, nn, x: f.embedding(x.long(2), [[1.0]]),
    lambda f, nn, x: f.embedding(x.long(2), x.randn(5, 3), None, "a"),
    lambda f, nn, x: f.embedding(x.long(2), x.randn(5, 3), None, 1.0, None),
    lambda f, nn, x: f.cross_entropy(x.randn(3, 5), x.long(3), 2.0),
    lambda f, nn, x: f.nll_loss(x.randn(3, 5), x.long(3), [1] * 5),
    lambda f, nn, x: f.mse_loss(x.randn(3), x.randn(3), weight=2.0),
    lambda f, nn, x: f.binary_cross_entropy_with_logits(x.randn(3), x.rand(3), pos_weight=2.0),
    lambda f, nn, x: f.batch_norm(1, x.randn(3), x.rand(3), training=True),
    lambda f, nn, x: f.batch_norm(np.ones((2, 3)), x.randn(3), x.rand(3), training=True),
    lambda f, nn, x: f.batch_norm(x.randn(2, 3), x.randn(3), x.rand(3), 1),
    lambda f, nn, x: f.batch_norm(x.randn(2, 3), x.randn(3), x.rand(3), bias=[1]),
    lambda f, nn, x: nn.MSELoss()(1, 2),
    lambda f, nn, x: nn.CrossEntropyLoss()(1, 2),
    lambda f, nn, x: nn.Embedding(5, 3)([1]),
    lambda f, nn, x: nn.Sigmoid()(1),
)

_NUMBERS: tuple[Call, ...] = (
    # numbers that tensors hold
    lambda f, nn, x: f.dropout(x.grad(8), torch.tensor(0.5)),
    lambda f, nn, x: f.dropout(x.randn(8), torch.tensor([0.5])),
    lambda f, nn, x: f.dropout(x.randn(8), torch.tensor(0.5, requires_grad=True)),
    lambda f, nn, x: f.leaky_relu(x.grad(3), torch.tensor(0.1)),
    lambda f, nn, x: f.leaky_relu(x.grad(3), torch.tensor([0.1])),
    lambda f, nn, x: f.leaky_relu(x.grad(3), torch.tensor(0.1, requires_grad=True)),
    lambda f, nn, x: f.cross_entropy(x.grad(3, 5), x.long(3), label_smoothing=torch.tensor(0.1)),
    lambda f, nn, x: f.cross_entropy(x.grad(3, 5), x.long(3), label_smoothing=torch.tensor([0.1])),
    lambda f, nn, x: f.batch_norm(x.randn(2, 3), x.randn(3), x.rand(3), momentum=torch.tensor([0.1]), training=True),
    # numbers that 64 bits do not hold, and none at all
    lambda f, nn, x: f.cross_entropy(x.randn(3, 5), x.long(3), ignore_index=2**70),
    lambda f, nn, x: f.nll_loss(x.randn(3, 5), x.long(3), ignore_index=2**70),
    lambda f, nn, x: f.softmax(x.randn(3), 2**70),
    *(lambda f, nn, x, p=p: f.dropout(x.randn(3), p) for p in (torch.nan, torch.inf, "a", None, [0.5], 0.5j, True)),
    lambda f, nn, x: f.dropout(x.randn(3), torch.nan, False),
    lambda f, nn, x: f.dropout(x.randn(0), torch.nan),
    lambda f, nn, x: nn.Dropout(torch.nan),
    lambda f, nn, x: nn.Dropout(torch.nan).eval()(x.randn(3)),
    *(lambda f, nn, x, slope=slope: f.leaky_relu(x.randn(3), slope) for slope in ("a", None, [0.1], 1j, True)),
    *(lambda f, nn, x, slope=slope: f.leaky_relu(x.grad(9), slope) for slope in (torch.nan, torch.inf, -torch.inf)),
    *(lambda f, nn, x, slope=slope: f.leaky_relu_(x.grad(9) * 1, slope) for slope in (torch.nan, -0.1, 0.0, 2)),
    lambda f, nn, x: nn.LeakyReLU("a")(x.randn(3)),
)

_EMPTY: tuple[Call, ...] = (
    *(
        lambda f, nn, x, name=name, dim=dim, dtype=dtype: getattr(f, name)(x.randn(0, 3), dim, dtype=dtype)
        for name in ("softmax", "log_softmax")
        for dim in (0, 1)
        for dtype in (torch.int64, torch.bool, torch.complex64, torch.float16, float, int)
    ),
    lambda f, nn, x: f.softmax(x.long(0, 3), 1),
    lambda f, nn, x: f.softmax(x.long(), 0),
    lambda f, nn, x: f.softmax(x.randn(2, 3), 0, dtype=torch.uint16),
    lambda f, nn, x: f.log_softmax(x.randn(2, 3), 0, dtype=torch.float8_e4m3fn),
    lambda f, nn, x: f.softmax(x.long(2, 3), 0, dtype=float),
)

_NORMALIZATION: tuple[Call, ...] = (
    # nothing to normalise
    lambda f, nn, x: f.batch_norm(x.randn(0, 3), None, None),
    lambda f, nn, x: f.batch_norm(x.randn(0, 3), None, None, training=True),
    lambda f, nn, x: f.batch_norm(x.grad(0, 3), x.randn(3), None, x.grad(3), x.grad(3), training=True),
    lambda f, nn, x: f.batch_norm(x.grad(2, 3, 0), x.randn(4), x.rand(5), x.grad(3), x.grad(3)),
    lambda f, nn, x: f.batch_norm(x.randn(2, 0), x.randn(3), x.rand(3)),
    lambda f, nn, x: f.batch_norm(x.long(0, 3), None, None, training=True),
    lambda f, nn, x: f.batch_norm(x.bool(0, 3), x.randn(3), x.rand(3)),
    lambda f, nn, x: f.batch_norm(x.randn(0, 3), None, None, training=True, eps=0.0),
    lambda f, nn, x: nn.BatchNorm1d(0)(x.randn(2, 0)),
    lambda f, nn, x: nn.BatchNorm1d(3, track_running_stats=False)(x.leaf(x.randn(0, 3))),
    # other dimensions
    *(lambda f, nn, x, n=n: f.batch_norm(x.randn(*n), None, None, training=True) for n in ((), (0,), (1,), (3,))),
    lambda f, nn, x: f.batch_norm(x.randn(3), x.randn(3), x.rand(3)),
    lambda f, nn, x: f.batch_norm(x.randn(3), x.randn(0), x.rand(0)),
    lambda f, nn, x: f.batch_norm(x.randn(2, 3), x.randn(3), x.rand(3), x.randn(3, 1), x.randn(1, 3), True),
    lambda f, nn, x: f.batch_norm(x.randn(2, 3), x.randn(3, 1), x.rand(1, 3), training=True),
    lambda f, nn, x: f.batch_norm(x.randn(2, 3), x.randn(3, 1), x.rand(1, 3)),
    # options: which of them is refused first, and how
    *(
        lambda f, nn, x, eps=eps, training=training: f.batch_norm(
            x.randn(2, 3), x.randn(3), x.rand(3), training=training, momentum=None, eps=eps
        )
        for eps in (1e-5, 0, -1, "a", None)
        for training in (False, True)
    ),
    *(lambda f, nn, x, m=m: f.batch_norm(x.randn(2, 3), x.randn(3), x.rand(3), momentum=m) for m in ("a", 1j, [1])),
    *(lambda f, nn, x, eps=eps: f.batch_norm(x.randn(2, 3), x.randn(3), x.rand(3), eps=eps) for eps in ([1], 1j)),
    lambda f, nn, x: nn.BatchNorm1d(3, momentum=None, eps=-1)(x.randn(2, 3)),
    lambda f, nn, x: nn.BatchNorm1d(3, eps="a")(x.randn(2, 3)),
    # dtypes that differ
    *(
        lambda f, nn, x, dtypes=dtypes: f.batch_norm(
            *(x.rand(*((2, 3) if i == 0 else (3,)), dtype=dtype) for i, dtype in enumerate(dtypes)), training=True
        )
        for dtypes in (
            (torch.half, torch.half, torch.float),
            (torch.half, torch.float, torch.float, torch.half, torch.half),
            (torch.half, torch.float, torch.float, torch.float, torch.half),
            (torch.half, torch.float, torch.float, torch.half),
            (torch.float, torch.float, torch.float, torch.float, torch.double),
            (torch.float, torch.float, torch.float, torch.double),
            (torch.double, torch.float, torch.float),
            (torch.bfloat16, torch.half, torch.half),
        )
    ),
)

_LINEAR: tuple[Call, ...] = (
    # strides of the gradients
    *(
        lambda f, nn, x, made=made, weight=weight, bias=bias: f.linear(
            x.leaf(made(x)), x.leaf(weight(x)), x.grad(4) if bias else None
        )
        for made in (
            lambda x: x.randn(2, 3),
            lambda x: x.randn(3),
            lambda x: x.randn(2, 5, 3),
            lambda x: x.randn(3, 2).t(),
            lambda x: x.randn(3, 1).t(),
            lambda x: x.randn(2, 5, 3).transpose(0, 1),
            lambda x: x.randn(2, 3, 5).transpose(1, 2),
            lambda x: x.randn(3, 2, 5).permute(1, 2, 0),
            lambda x: x.randn(2, 6)[:, ::2],
            lambda x: x.randn(2, 1).expand(2, 3),
            lambda x: x.randn(0, 3),
        )
        for weight in (
            lambda x: x.randn(4, 3),
            lambda x: x.randn(3, 4).t(),
            lambda x: x.randn(4, 6)[:, ::2],
            lambda x: x.randn(1, 3).expand(4, 3),
        )
        for bias in (False, True)
    ),
    lambda f, nn, x: f.linear(x.grad(2, 0), x.grad(4, 0), x.grad(4)),
    lambda f, nn, x: f.linear(x.grad(1, 3), x.leaf(x.randn(3, 1).t())),
    # biases of other dimensions, weights of one
    *(
        lambda f, nn, x, shape=shape, bias=bias: f.linear(x.grad(*shape), x.grad(4, 3), x.grad(*bias))
        for shape in ((3,), (2, 3), (2, 2, 3))
        for bias in ((), (1,), (2, 4), (2, 1), (2, 2, 4))
        if (shape, bias) != ((2, 3), (2, 2, 4))  # in other words
    ),
    *(
        lambda f, nn, x, shape=shape, bias=bias: f.linear(x.grad(*shape), x.grad(3), x.grad(*bias))
        for shape in ((3,), (2, 3), (2, 2, 3))
        for bias in ((), (1,), (2,))
    ),
    *(lambda f, nn, x, shape=shape: f.linear(x.randn(*shape), x.randn(5)) for shape in ((3,), (2, 3), (2, 2, 3))),
)

_EMBEDDING: tuple[Call, ...] = (
    *(
        lambda f, nn, x, row=row: f.embedding(x.long(2), x.grad(5, 3), row)
        for row in ("a", [0], 9.5, 0.5, torch.nan, 2**70, True, -1, torch.tensor(1))
    ),
    *(lambda f, nn, x, row=row: nn.Embedding(5, 3, row) for row in ("a", torch.nan, 9, -6, 0.5)),
    *(lambda f, nn, x, row=row: nn.Embedding(0, 3, row) for row in (0, 1, -1)),
    lambda f, nn, x: f.embedding(x.long(0), x.grad(0, 3), 0),
    lambda f, nn, x: f.embedding(x.long(2), x.grad(5, 0)),
    lambda f, nn, x: f.embedding(x.long(2), x.grad(0, 3)),
    lambda f, nn, x: nn.Embedding(0, 3)(x.long(2)),
    *(
        lambda f, nn, x, made=made, norm=norm: f.embedding(made(x), x.randn(5, 3), None, norm)
        for made in (
            lambda x: x.bool(2),
            lambda x: x.complex(2),
            lambda x: x.randn(2, dtype=torch.bfloat16),
            lambda x: x.long(2).byte(),
            lambda x: x.long(2) + 9,
            lambda x: x.long(2) - 9,
        )
        for norm in (None, 1.0)
    ),
    *(
        lambda f, nn, x, p=p: f.embedding(x.long(2), x.randn(5, 3), None, 1.0, p)
        for p in (0.0, 1, 0.5, -1.0, torch.inf, -torch.inf, torch.nan, "a", None)
    ),
    *(
        lambda f, nn, x, norm=norm: f.embedding(x.long(2), x.randn(5, 3), None, norm)
        for norm in (0.0, -1.0, torch.nan, torch.inf, 1j, [1.0], torch.tensor(1.0), torch.tensor([1.0]))
    ),
    *(
        lambda f, nn, x, made=made: f.embedding(x.long(2), made(x), None, 1.0)
        for made in (
            lambda x: x.long(5, 3),
            lambda x: x.bool(5, 3),
            lambda x: x.complex(5, 3),
            lambda x: x.randn(5),
            lambda x: x.randn(3, 5).t(),
            lambda x: x.randn(5, 3) * torch.nan,
        )
    ),
    lambda f, nn, x: f.embedding(x.long(4), x.grad(5, 3), scale_grad_by_freq=True, sparse=True),
)

_CONVOLUTION: tuple[Call, ...] = (
    # padding that is longer on one side, with PyTorch's warning
    *(
        lambda f, nn, x, shape=shape, dilation=dilation: f.conv2d(
            x.grad(1, 3, 6, 6), x.grad(*shape), padding="same", dilation=dilation
        )
        for shape in ((4, 3, 2, 2), (4, 3, 3, 2), (4, 3, 3, 3))
        for dilation in (1, 2)
    ),
    lambda f, nn, x: f.conv1d(x.randn(3, 6), x.randn(4, 3, 4), padding="same", dilation=3),
    lambda f, nn, x: nn.Conv2d(3, 4, 2, padding="same")(x.leaf(x.randn(1, 3, 5, 5))).shape,
    # dtypes
    lambda f, nn, x: f.conv2d(x.bool(1, 3, 5, 5), x.bool(4, 3, 2, 2)),
    lambda f, nn, x: f.conv2d(x.bool(1, 3, 5, 5), x.randn(4, 3, 2, 2)),
    lambda f, nn, x: f.conv1d(x.bool(1, 3, 5), x.bool(4, 3, 2)),
    lambda f, nn, x: f.conv2d(x.randn(1, 3, 5, 5, dtype=torch.uint16), x.randn(4, 3, 2, 2, dtype=torch.uint16)),
    lambda f, nn, x: f.conv2d(x.complex(1, 3, 5, 5), x.randn(4, 3, 2, 2)),
    *(
        lambda f, nn, x, dtype=dtype: f.conv2d(
            x.rand(1, 3, 5, 5, dtype=dtype), x.rand(4, 3, 2, 2, dtype=dtype), x.rand(4)
        )
        for dtype in (torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.complex64)
    ),
)

_CLASSES: tuple[Call, ...] = (
    # strides of the gradients
    *(
        lambda f, nn, x, made=made, other=other, how=how: f.cross_entropy(
            x.leaf(made(x)), x.leaf(other(x)) if other else x.long(3), reduction=how
        )
        for made in (lambda x: x.randn(3, 5), lambda x: x.randn(5, 3).t(), lambda x: x.randn(3, 10)[:, ::2])
        for other in (None, lambda x: x.rand(3, 5), lambda x: x.rand(5, 3).t())
        for how in ("none", "mean")
    ),
    lambda f, nn, x: f.cross_entropy(
        *(x.leaf(x.randn(2, 5, 3, 4).to(memory_format=torch.channels_last)) for _ in range(2)), reduction="none"
    ),
    lambda f, nn, x: f.cross_entropy(x.grad(3, 5), x.leaf(x.rand(5, 3).t()), x.grad(5), reduction="none"),
    lambda f, nn, x: f.nll_loss(x.leaf(x.randn(5, 3).t()), x.long(3)),
    # nothing to classify
    *(
        lambda f, nn, x, name=name, how=how: getattr(f, name)(x.grad(0, 5), x.long(0), reduction=how)
        for name in ("cross_entropy", "nll_loss")
        for how in ("none", "mean", "sum")
    ),
    lambda f, nn, x: f.cross_entropy(x.randn(3, 0), x.long(3)),
    lambda f, nn, x: f.nll_loss(x.grad(3, 5, 0), x.long(3, 0), reduction="none"),
    # weights of other dtypes
    *(
        lambda f, nn, x, kind=kind: f.cross_entropy(x.randn(3, 5), x.rand(3, 5), getattr(x, kind)(5))
        for kind in ("long", "bool", "complex")
    ),
    *(
        lambda f, nn, x, kind=kind, name=name: getattr(f, name)(x.randn(3, 5), x.long(3), getattr(x, kind)(5))
        for kind in ("long", "bool", "complex")
        for name in ("cross_entropy", "nll_loss")
    ),
)

_IN_PLACE: tuple[Call, ...] = tuple(
    lambda f, nn, x, function=function, made=made: function(f, made(x))
    for function in (
        lambda f, t: f.relu(t, True),
        lambda f, t: f.leaky_relu_(t, 0.1),
        lambda f, t: f.dropout(t, 0.5, True, True),
        lambda f, t: f.dropout(t, 1.0, inplace=True),
    )
    for made in (
        lambda x: x.grad(2, 3) * 1,
        lambda x: x.grad(2, 3),
        lambda x: x.leaf(x.randn(3, 2).t()) * 1,
        lambda x: (x.grad(2, 3) * 1).t(),
        lambda x: (x.grad(2, 6) * 1)[:, ::2],
        lambda x: x.leaf(x.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)) * 1,
        lambda x: x.randn(2, 1).expand(2, 3),
    )
)

ROWS: dict[str, tuple[Call, ...]] = {
    "binary cross-entropy": _BINARY,
    "squared error": _SQUARED_ERROR,
    "no tensors": _NO_TENSORS,
    "numbers": _NUMBERS,
    "empty": _EMPTY,
    "in place": _IN_PLACE,
    "classes": _CLASSES,
    "embedding": _EMBEDDING,
    "convolution": _CONVOLUTION,
    "linear": _LINEAR,
    "batch normalisation": _NORMALIZATION,
}
