"""What each kind of layer gets when a whole model is initialised; and what is left alone."""

from __future__ import annotations

import copy
from functools import partial
from math import sqrt
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reimpl.init as init
import reimpl.nn
from reimpl.testing import seeded_generator

pytestmark = pytest.mark.quick


def test_norms_start_anew() -> None:
    model = nn.ModuleList([
        nn.BatchNorm2d(3), nn.InstanceNorm1d(3, affine=True, track_running_stats=True), nn.LayerNorm(3),
        nn.GroupNorm(1, 3), nn.RMSNorm(3), reimpl.nn.BatchNorm2d(3), nn.BatchNorm1d(3, affine=False),
        nn.SyncBatchNorm(3),
    ])  # fmt: skip
    fresh = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for value in model.state_dict().values():
            value.fill_(7)
    init.apply(model, "kaiming_normal_")
    assert all(torch.equal(value, fresh[name]) for name, value in model.state_dict().items())


def test_embeddings() -> None:
    model = nn.ModuleList((nn.Embedding(50, 8, padding_idx=3), nn.EmbeddingBag(50, 8)))
    init.apply(model, "zeros_", generator=seeded_generator(0))
    expected = torch.nn.init.normal_(torch.empty(50, 8), generator=seeded_generator(0))
    expected[3] = 0
    assert torch.equal(model[0].weight, expected) and model[1].weight.any()
    done = init.apply(model, "zeros_", embedding=partial(init.normal_, std=0.02))
    assert 0.01 < done["1.weight"].std < 0.03 and done["1.weight"].rule == "normal_(std=0.02)"


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("make", "gates"), [(nn.RNN, 1), (nn.LSTM, 4), (nn.GRU, 3)])
def test_recurrent_layers_gate_by_gate(make: Any, gates: int, bidirectional: bool) -> None:
    layer = make(6, 8, num_layers=2, bidirectional=bidirectional)
    done = init.apply(layer, "xavier_uniform_")
    for name, parameter in layer.named_parameters():
        if name.startswith("weight_hh"):
            for gate in parameter.detach().chunk(gates):
                torch.testing.assert_close(gate @ gate.t(), torch.eye(8), rtol=0, atol=1e-5)  # float32, 8 products
        elif name.startswith("weight_ih"):
            fan_in = parameter.shape[1]
            assert done[name].fans == (fan_in, 8) and done[name].activation == ("tanh" if gates == 1 else "linear")
            bound = sqrt(6 / (fan_in + 8)) * (5 / 3 if gates == 1 else 1)
            assert 0.9 * bound < float(parameter.detach().abs().max()) <= bound  # the largest of 48 and more
        else:
            forget = 1.0 if gates == 4 and name.startswith("bias_ih") else 0.0
            assert (parameter[8:16] == forget).all() and not parameter[:8].any() and not parameter[16:].any()


def test_cells_and_projections() -> None:
    model = nn.ModuleDict(
        {"rnn": nn.RNNCell(3, 4, nonlinearity="relu"), "lstm": nn.LSTM(3, 8, proj_size=2), "gru": nn.GRUCell(3, 4)}
    )
    done = init.apply(model, "kaiming_normal_")
    assert done["rnn.weight_ih"].activation == "relu" and done.left == ()
    assert done["lstm.weight_hr_l0"].fans == (8, 2)
    assert done["lstm.bias_ih_l0"].rule == "0, forget gate 1"


def test_attention_is_three_matrices() -> None:
    model = nn.TransformerEncoderLayer(16, 4, 32, activation="gelu", batch_first=True)
    done = init.apply(
        model, "xavier_normal_", activation={"linear1": F.gelu, "*": "linear"}, generator=seeded_generator(0)
    )
    weight = model.self_attn.in_proj_weight
    assert done["self_attn.in_proj_weight"].fans == (16, 16) and done.left == ()
    # 768 normal numbers of variance 1/16: five standard errors of the standard deviation are 13%.
    assert float(weight.detach().std()) == pytest.approx(1 / 4, rel=0.13)
    assert "self_attn.out_proj.weight" in {row.parameter for row in done}
    apart = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, add_bias_kv=True)
    done = init.apply(apart, "xavier_normal_")
    assert [done[f"{name}_proj_weight"].fans for name in "qkv"] == [(8, 8), (6, 8), (4, 8)] and done.left == ()


def test_shared_weights_are_drawn_once() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(9, 4), "head": nn.Linear(4, 9)})
    model["head"].weight = model["embedding"].weight
    done = init.apply(model, "zeros_")
    assert done["head.weight"].rule == "shared with embedding.weight" and model["head"].weight.any()


def test_parametrised_weights_are_set_through_it() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    done = init.apply(layer, "kaiming_normal_", activation="relu", generator=seeded_generator(0))
    expected = torch.nn.init.kaiming_normal_(torch.empty(3, 4), nonlinearity="relu", generator=seeded_generator(0))
    # weight = g·v/|v| with g = |v|: some roundings.
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-6, atol=0)
    assert [row.parameter for row in done] == ["weight", "bias"]


def test_prelu_and_its_slope() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.PReLU(3), nn.Linear(3, 3))
    model[1].weight.data.fill_(9)
    assert init.apply(model, "kaiming_normal_")["0.weight"].activation == "leaky_relu(0.25)"
    assert (model[1].weight == 0.25).all()


class Tokens(nn.Module):
    """Parameters of its own, and a stranger called Linear whose weight lies the other way round."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((4, 2), 3.0))

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.full((1, 4), 5.0))
        self.stranger = self.Linear()
        self.head = nn.Linear(4, 2)


def test_what_is_not_known_is_left_alone_and_listed() -> None:
    model = Tokens()
    done = init.apply(model, "kaiming_normal_")
    assert set(done.left) == {"cls_token", "stranger.weight"}
    assert (model.cls_token == 5).all() and (model.stranger.weight == 3).all()
    done = init.apply(
        model, "kaiming_normal_", overrides={"cls_token": partial(init.trunc_normal_, std=0.02), "head.*": 0.0}
    )
    assert done.left == ("stranger.weight",) and done["cls_token"].rule == "trunc_normal_(std=0.02)"
    assert 0 < float(model.cls_token.detach().abs().max()) < 0.2 and not model.head.weight.any()
