"""What the notes say about layers and losses, and where they err: natural pairs, worked backpropagation, errata."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import reimpl.functional as F
import reimpl.nn as nn
from parity_tests.oracle import layers as oracle
from reimpl.testing import judge, to_oracle

# PyTorch's word about what its forward mode imports.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def grad_of(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


# Natural pairs (F18): whatever the output, the first error is what came out minus what was wanted.

WANTED = torch.tensor([[1.0, 0, 0], [0, 0, 1.0], [0, 1.0, 0], [0, 0, 1.0]], dtype=torch.float64)
PAIRS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "softmax, cross-entropy": (
        lambda u: F.softmax(u, 1),
        lambda u: F.cross_entropy(u, WANTED, reduction="sum"),
        lambda u: -(WANTED * F.softmax(u, 1).log()).sum(),
    ),
    "sigmoid, binary cross-entropy": (
        F.sigmoid,
        lambda u: F.binary_cross_entropy_with_logits(u, WANTED, reduction="sum"),
        lambda u: F.binary_cross_entropy(F.sigmoid(u), WANTED, reduction="sum"),
    ),
    "identity, half squared error": (
        F.identity,
        lambda u: F.half_squared_error(u, WANTED),
        lambda u: F.half_squared_error(F.identity(u), WANTED),
    ),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_first_error_of_a_natural_pair_is_output_minus_target(pair: str) -> None:
    output, fused, in_two_steps = PAIRS[pair]
    u = leaf(4, 3)
    delta = output(u) - WANTED
    # Two and three roundings of numbers below 3, in float64.
    torch.testing.assert_close(grad_of(fused(u), u)[0], delta, rtol=1e-14, atol=1e-15)
    # Through the output the gradient is divided by y (1 - y), down to 0.05 here, and multiplied by it again.
    torch.testing.assert_close(grad_of(in_two_steps(u), u)[0], delta, rtol=1e-12, atol=1e-13)


def test_the_fused_pairs_survive_where_two_steps_do_not() -> None:
    u = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    wanted = torch.tensor([[0.0, 0.0, 1.0]])
    assert F.cross_entropy(u, wanted) == 400
    torch.testing.assert_close(grad_of(F.cross_entropy(u, wanted), u)[0], torch.tensor([[1.0, 0, -1.0]]))
    # log(0) = -inf, which 0 * inf turns into NaN.
    assert (wanted * F.softmax(u, 1).log()).sum().isnan()
    loss = F.binary_cross_entropy_with_logits(u, wanted, reduction="none")
    torch.testing.assert_close(loss, torch.tensor([[200.0, np.log(2), 200.0]], dtype=torch.float32))


def test_a_worked_network_in_numpy_functions_and_autograd() -> None:
    """F17: two layers, ReLU and softmax, forward and backward step by step; all three ways agree at each step."""
    rng = np.random.default_rng(0)
    x, w1, b1 = rng.normal(size=(5, 4)), rng.normal(size=(3, 4)), rng.normal(size=3)
    w2, b2, labels = rng.normal(size=(2, 3)), rng.normal(size=2), np.array([0, 1, 1, 0, 1])
    wanted = np.eye(2)[labels]
    # NumPy, as on paper. Forward keeps u1, z1 and y; backward needs nothing else.
    u1 = x @ w1.T + b1
    z1 = np.maximum(u1, 0)
    u2 = z1 @ w2.T + b2
    y = np.exp(u2 - u2.max(1, keepdims=True))
    y /= y.sum(1, keepdims=True)
    error = -np.log(y[np.arange(5), labels]).mean()
    delta2 = (y - wanted) / 5  # ∂E/∂u2, the natural pair
    delta1 = (delta2 @ w2) * (u1 > 0)  # ∂E/∂u1 = f'(u1) ⊙ W2ᵀ δ2
    by_hand = {
        "u2": delta2,
        "w2": delta2.T @ z1,  # ∂E/∂w_ji = δ_j z_i
        "b2": delta2.sum(0),
        "z1": delta2 @ w2,
        "u1": delta1,
        "w1": delta1.T @ x,
        "b1": delta1.sum(0),
        "x": delta1 @ w1,
    }

    for namespace in (F, torch.nn.functional):
        t = {name: torch.tensor(array, requires_grad=True) for name, array in
             {"x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2}.items()}  # fmt: skip
        t["u1"] = namespace.linear(t["x"], t["w1"], t["b1"])
        t["z1"] = namespace.relu(t["u1"])
        t["u2"] = namespace.linear(t["z1"], t["w2"], t["b2"])
        loss = namespace.cross_entropy(t["u2"], torch.tensor(labels))
        for name, array in (("u1", u1), ("z1", z1), ("u2", u2)):
            torch.testing.assert_close(t[name].detach(), torch.tensor(array))
        torch.testing.assert_close(loss.item(), error)
        for (name, expected), found in zip(by_hand.items(), grad_of(loss, *(t[n] for n in by_hand)), strict=True):
            torch.testing.assert_close(found, torch.tensor(expected), msg=lambda text: f"{name}: {text}")  # noqa: B023


def test_gradient_of_a_linear_output_is_error_times_input() -> None:
    """∂E/∂w_ji = (y_j - d_j) z_i for identity and half squared error."""
    z, w, d = leaf(1, 3, seed=1), leaf(2, 3, seed=2), leaf(1, 2, seed=3)
    (found,) = grad_of(F.half_squared_error(F.linear(z, w), d), w)
    torch.testing.assert_close(found, torch.outer((F.linear(z, w) - d)[0], z[0]))


# Errata: the right thing, and what the note's version does.


def test_half_squared_error_of_formula_and_code() -> None:
    """N3.24: ½Σ in the formula, half of the mean in the code; they differ by the number of elements."""
    y, d = leaf(2, 3), leaf(2, 3, seed=1)
    formula, code = F.half_squared_error(y, d), F.half_squared_error(y, d, reduction="mean")
    torch.testing.assert_close(formula, 0.5 * ((y - d) ** 2).sum())
    torch.testing.assert_close(code, ((y - d) ** 2).mean() / 2)
    torch.testing.assert_close(formula, 6 * code)
    torch.testing.assert_close(grad_of(formula, y)[0], (y - d).detach())


def test_step_at_zero_of_formula_and_code() -> None:
    """N3.25: 1 at 0 in the formula, 0 in the code, which compares with 0 and takes scalars only."""
    x = torch.tensor([-2.0, -0.0, 0.0, 3.0])
    by_formula, by_code = torch.tensor([0.0, 1, 1, 1]), torch.tensor([1.0 if v > 0 else 0.0 for v in x.tolist()])
    assert torch.equal(F.heaviside(x, torch.tensor(1.0)), by_formula)
    assert torch.equal(F.heaviside(x, torch.tensor(0.0)), by_code)
    assert not torch.equal(by_formula, by_code)
    with pytest.raises(RuntimeError, match="derivative for aten::heaviside is not implemented"):
        F.heaviside(leaf(3), torch.zeros((), dtype=torch.float64)).sum().backward()
    torch._dynamo.reset()
    compiled = torch.compile(F.heaviside, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x.clone().requires_grad_(), torch.tensor(1.0)), by_formula)


def test_multi_layer_step_networks_represent_xor() -> None:
    """N3.28: two steps and one more give XOR; what they lack is a gradient."""
    corners = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])
    at_zero = torch.tensor(1.0)
    hidden = F.heaviside(F.linear(corners, torch.ones(2, 2), torch.tensor([-0.5, -1.5])), at_zero)
    output = F.heaviside(F.linear(hidden, torch.tensor([[1.0, -1.0]]), torch.tensor([-0.5])), at_zero)
    assert output.flatten().tolist() == [0, 1, 1, 0]


def test_softmax_keeps_order_and_not_ratio() -> None:
    """N3.27: the order of the inputs stays, their ratio does not; and exp alone does not sum to 1."""
    u = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    y = F.softmax(u, 0)
    assert torch.equal(y.argsort(), u.argsort())
    torch.testing.assert_close((y[1] / y[0]).log(), u[1] - u[0])
    assert abs(float(y[1] / y[0]) - 2) > 0.5
    assert float(u.exp().sum()) > 2
    torch.testing.assert_close(y.sum(), torch.ones((), dtype=torch.float64))


def test_only_the_squared_norm_is_weight_decay() -> None:
    """N1.12: ½λ‖w‖² has gradient λw; ½λ‖w‖ has one of length λ/2 however small w is."""
    w, decay = leaf(3, 4), 0.1
    torch.testing.assert_close(grad_of(F.lp_penalty(w, 2, decay, power=True), w)[0], decay * w.detach())
    for scale in (1.0, 1e-3):
        small = (w.detach() * scale).requires_grad_()
        (of_norm,) = grad_of(F.lp_penalty(small, 2, decay), small)
        torch.testing.assert_close(of_norm.norm(), torch.tensor(decay / 2, dtype=torch.float64))
    zero = torch.zeros(3, requires_grad=True)
    assert torch.equal(grad_of(F.lp_penalty(zero), zero)[0], torch.zeros(3))


def test_penalty_of_several_tensors_is_that_of_all_their_elements() -> None:
    model = nn.Linear(4, 3)
    together = torch.cat([p.flatten() for p in model.parameters()])
    for p, power in ((1, False), (2, False), (2, True), (3, False)):
        torch.testing.assert_close(
            F.lp_penalty(model.parameters(), p, 0.3, power=power), F.lp_penalty(together, p, 0.3, power=power)
        )


# Losses.


def test_likelihood_goes_on_improving_where_the_zero_one_loss_is_zero() -> None:
    """F6: the surrogate still has a gradient when every sample is right."""
    labels = torch.tensor([0, 1, 2])
    losses = []
    for margin in (1.0, 2.0, 4.0):
        logits = (margin * torch.eye(3)).requires_grad_()
        assert F.zero_one_loss(logits, labels) == 0
        loss = F.nll_loss(F.log_softmax(logits, 1), labels)
        assert grad_of(loss, logits)[0].abs().max() > 0
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2] > 0
    assert F.zero_one_loss(torch.eye(3), torch.tensor([0, 2, -100])) == 0.5
    assert not F.zero_one_loss(logits, labels).requires_grad


def test_guarded_cross_entropy_takes_indices_and_one_hot_rows_alike() -> None:
    y, labels = F.softmax(leaf(4, 3), 1), torch.tensor([0, 2, 1, 2])
    one_hot = torch.eye(3, dtype=torch.float64)[labels]
    torch.testing.assert_close(
        F.cross_entropy_of_probabilities(y, labels), F.cross_entropy_of_probabilities(y, one_hot)
    )
    torch.testing.assert_close(F.cross_entropy_of_probabilities(y, labels, eps=0.0), F.nll_loss(y.log(), labels))
    sure_and_wrong = torch.tensor([[1.0, 0.0]])
    torch.testing.assert_close(
        F.cross_entropy_of_probabilities(sure_and_wrong, torch.tensor([1])), torch.tensor(-np.log(1e-7)).float()
    )
    assert F.cross_entropy_of_probabilities(sure_and_wrong, torch.tensor([1]), eps=0.0) == torch.inf


def test_unknown_labels_change_nothing() -> None:
    """F16: whatever stands where a label is unknown, the loss and the other gradients are those without it."""
    logits, labels = leaf(3, 4), (leaf(3, 4, seed=1) > 0).double()
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    loss = F.masked_multilabel_loss(logits, labels, mask)
    (grad,) = grad_of(loss, logits)
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits[mask], labels[mask]))
    assert grad[~mask].eq(0).all() and grad[mask].ne(0).all()
    broken = torch.where(mask, logits.detach(), torch.nan).requires_grad_()
    marked = torch.where(mask, labels, torch.nan)
    again = F.masked_multilabel_loss(broken, marked)
    assert again == loss and torch.equal(grad_of(again, broken)[0], grad)
    assert F.masked_multilabel_loss(logits, labels, torch.zeros_like(mask)).isnan()


def test_skip_gram_error_of_the_scores() -> None:
    center, context, negative = leaf(2, 3), leaf(2, 3, seed=1), leaf(2, 4, 3, seed=2)
    grads = grad_of(F.skip_gram_loss(center, context, negative, reduction="sum"), center, context, negative)
    true = (center * context).sum(1).sigmoid() - 1
    drawn = torch.einsum("nd,nkd->nk", center, negative).sigmoid()
    torch.testing.assert_close(grads[1], true[:, None] * center)
    torch.testing.assert_close(grads[2], drawn[:, :, None] * center[:, None])
    torch.testing.assert_close(grads[0], true[:, None] * context + (drawn[:, :, None] * negative).sum(1))


def test_probabilities_at_their_ends_cost_what_pytorchs_cost() -> None:
    """Eager and compiled, where PyTorch's guards of the logarithm and of x (1 - x) take hold."""
    x = torch.tensor([0.0, 0.0, 1.0, 1.0, 1e-20, 1e-13, 1.0 - 2**-24], dtype=torch.float32)
    t = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5, 1.0, 0.25])
    torch._dynamo.reset()
    compiled = torch.compile(F.binary_cross_entropy, fullgraph=True, backend="aot_eager")
    results = []
    for function in (torch.nn.functional.binary_cross_entropy, F.binary_cross_entropy, compiled):
        point = x.clone().requires_grad_()
        loss = function(point, t, reduction="none")
        results.append((loss.detach(), *grad_of(loss.sum(), point)))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


# Structure.


def test_a_skip_adds_the_identity_to_the_jacobian() -> None:
    x = leaf(4)
    body = nn.Sequential(nn.Linear(4, 4, dtype=torch.float64), nn.Tanh())
    of_body, of_residual = (torch.func.jacrev(module)(x) for module in (body, nn.Residual(body)))
    torch.testing.assert_close(of_residual, of_body + torch.eye(4, dtype=torch.float64))
    shortcut = nn.Linear(4, 2, bias=False, dtype=torch.float64)
    projected = nn.Residual(nn.Linear(4, 2, dtype=torch.float64), shortcut)
    torch.testing.assert_close(torch.func.jacrev(projected)(x), projected.body.weight + shortcut.weight)


def test_recurrent_gradient_is_a_power_of_the_weight() -> None:
    """F14: without input and with slope 1, ∂h_t/∂h_0 = Wᵗ: it vanishes below 1 and explodes above."""
    for radius, grows in ((0.9, False), (1.1, True)):
        cell = nn.RNNCell(1, 2, bias=False, nonlinearity="relu", dtype=torch.float64)
        with torch.no_grad():
            cell.weight_hh.copy_(radius * torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        h = h0 = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
        for _ in range(20):
            h = cell(torch.zeros(1, 1, dtype=torch.float64), h)
        (grad,) = grad_of(h.sum(), h0)
        power = torch.linalg.matrix_power(cell.weight_hh.detach(), 20)
        torch.testing.assert_close(grad, torch.ones(1, 2, dtype=torch.float64) @ power)
        assert bool((grad > 1).all()) == grows


def test_lstm_memory_with_an_open_forget_gate_keeps_its_gradient() -> None:
    cell = nn.LSTMCell(1, 2, dtype=torch.float64)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.zero_()
        cell.bias_ih[2:4] = 20.0  # the forget gate
    h, c0 = torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
    c = c0
    for _ in range(20):
        h, c = cell(torch.zeros(1, 1, dtype=torch.float64), (h, c))
    # σ(20) = 1 - 2e-9, twenty times.
    torch.testing.assert_close(grad_of(c.sum(), c0)[0], torch.ones(1, 2, dtype=torch.float64), rtol=1e-7, atol=0)


def test_maxout_holds_relu_and_the_absolute_value() -> None:
    x = leaf(5, 1)
    pieces = F.linear(x, torch.tensor([[1.0], [0.0], [1.0], [-1.0]], dtype=torch.float64))
    assert torch.equal(F.maxout(pieces, 2), torch.cat([F.relu(x), x.abs()], 1))
    assert F.maxout(torch.tensor([[1.0, torch.nan, 0.0, 2.0]]), 2).isnan().tolist() == [[True, False]]
    tie = torch.zeros(1, 3, requires_grad=True)
    assert grad_of(nn.Maxout(3)(tie).sum(), tie)[0].tolist() == [[1, 0, 0]]


def test_edge_filters_answer_to_edges_of_their_direction_alone() -> None:
    """F8: an image bright on the left half gives a band of 30 under the vertical filter, nothing under the other."""
    image = torch.zeros(1, 1, 6, 6)
    image[..., :3] = 10
    vertical, horizontal = F.conv2d(image, F.edge_filters())[0]
    assert vertical.tolist() == [[0, 30, 30, 0]] * 4
    assert horizontal.abs().max() == 0
    colour = F.conv2d(image.expand(1, 3, 6, 6), F.edge_filters("vertical", channels=3))
    assert torch.equal(colour[0, 0], 3 * vertical)
    every = F.edge_filters("sobel_vertical", "scharr_horizontal", "diagonal", "laplacian")
    assert every.sum((1, 2, 3)).abs().max() == 0


def test_derivatives_of_the_saturating_activations_are_bounded() -> None:
    x = (torch.arange(-120, 121, dtype=torch.float64) / 20).requires_grad_()
    for function, bound in ((F.sigmoid, 0.25), (F.tanh, 1.0)):
        (slope,) = grad_of(function(x).sum(), x)
        assert slope.max() == bound and slope.argmax() == 120


def test_tanh_keeps_signs_of_zero_and_tiny_numbers() -> None:
    x = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e-8, -1e-8])
    y = F.tanh(x)
    assert torch.equal(y, x) and torch.equal(y.signbit(), x.signbit())


def test_embedding_gradients_of_every_option(device: torch.device) -> None:
    numbers = torch.tensor([[0, 3, 3], [2, 3, 0]], device=device)
    grad = torch.randn(2, 3, 4, dtype=torch.float64)
    for options in ({}, {"padding_idx": 3}, {"padding_idx": -5}, {"scale_grad_by_freq": True}):
        results = []
        for function in (F.embedding, torch.nn.functional.embedding):
            table = leaf(5, 4).detach().to(device).requires_grad_()
            output = function(numbers, table, **options)
            results.append((output, *torch.autograd.grad(output, table, grad.to(device))))
        _, vjp = oracle.embedding(numbers.cpu().numpy(), to_oracle(leaf(5, 4)), **options)
        exact = vjp(to_oracle(grad))[1]
        assert torch.equal(results[0][0], results[1][0]) and exact is not None
        judge(results[0][1], results[1][1], exact, np.abs(to_oracle(grad)).sum() * np.ones_like(exact)).check(
            "embedding", str(options), "gradient"
        )


def test_sparse_gradients_of_embedding() -> None:
    numbers, tables = torch.tensor([0, 3, 3, 2]), []
    for function in (F.embedding, torch.nn.functional.embedding):
        table = leaf(5, 2).detach().requires_grad_()
        function(numbers, table, padding_idx=2, sparse=True).sum().backward()
        assert table.grad is not None and table.grad.is_sparse
        tables.append(table.grad)
    torch.testing.assert_close(tables[0].to_dense(), tables[1].to_dense())
    assert 2 not in tables[0].coalesce().indices()


def test_embedding_shrinks_the_rows_it_looks_up() -> None:
    numbers = torch.tensor([0, 3, 3])
    for options in ({"max_norm": 1.0}, {"max_norm": 0.5, "norm_type": 1.0}, {"max_norm": 0.5, "norm_type": torch.inf}):
        ours, theirs = leaf(5, 4).detach(), leaf(5, 4).detach()
        found = F.embedding(numbers, ours, **options)
        torch.testing.assert_close(found, torch.nn.functional.embedding(numbers, theirs, **options))
        torch.testing.assert_close(ours, theirs)
        assert not torch.equal(ours[0], leaf(5, 4)[0]) and torch.equal(ours[1], leaf(5, 4)[1])


@pytest.mark.parametrize("options", [{"sparse": True}, {"scale_grad_by_freq": True}], ids=["sparse", "by frequency"])
def test_embedding_with_gradients_of_its_own_in_other_modes(options: dict[str, Any]) -> None:
    numbers, results = torch.tensor([0, 2, 2, 1]), []
    for function in (F.embedding, torch.nn.functional.embedding):

        def rows(table: Tensor) -> Tensor:
            return function(numbers, table, padding_idx=1, **options)  # noqa: B023

        table = leaf(5, 3).detach().requires_grad_()
        # without the padding row, whose tangent is not 0 in PyTorch
        _, tangent = torch.func.jvp(lambda t: rows(t)[:3], (table.detach(),), (torch.ones_like(table),))
        (grad,) = torch.autograd.grad(rows(table).square().sum(), table, create_graph=True)
        (second,) = torch.autograd.grad(grad.to_dense().square().sum(), table)
        results.append((tangent, grad.to_dense(), second.to_dense()))
        if "sparse" not in options:
            compiled = torch.compile(rows, fullgraph=True, backend="aot_eager")
            results[-1] += torch.autograd.grad(compiled(table).square().sum(), table)
    torch.testing.assert_close(*results)


def test_padding_row_is_a_constant_in_every_mode() -> None:
    numbers, table = torch.tensor([0, 1, 1]), leaf(3, 2).detach()

    def rows(t: Tensor) -> Tensor:
        return F.embedding(numbers, t, padding_idx=1)

    _, tangent = torch.func.jvp(rows, (table,), (torch.ones_like(table),))
    assert tangent.tolist() == [[1, 1], [0, 0], [0, 0]]
    torch._dynamo.reset()
    for function in (rows, torch.compile(rows, fullgraph=True, backend="aot_eager")):
        point = table.clone().requires_grad_()
        assert grad_of(function(point).sum(), point)[0].tolist() == [[1, 1], [0, 0], [0, 0]]
