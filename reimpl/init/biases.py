"""Biases that start at more than zero: outputs at their marginal statistics, ReLU's, and the LSTM's forget gate."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import Module

from reimpl.init._kinds import AFFINE, LSTMS, NORMS, is_a
from reimpl.init._modules import leaves

Target = TypeVar("Target", bound=Tensor | Module)

_LINKS = ("softmax", "sigmoid", "linear")


def output_bias_(target: Target, marginal: Tensor | float, link: str = "softmax") -> Target:
    r"""Set the outputs' bias so that, with weights near 0, the model predicts the marginal statistics of the target.

    - ``"softmax"``: :math:`b_c = \ln p_c`, from shares that sum to 1; whole numbers are class counts, and divided by
      their sum
    - ``"sigmoid"``: :math:`b = \ln \frac{p}{1 - p}`, from the share of positives of each output
    - ``"linear"``: :math:`b` = the mean of each output

    The first loss is then the entropy (or variance) of the target, and no step is spent on learning it.

    Assumes that the outputs are the bias plus something with mean near 0, that the link is the last function of the
    model or inside its loss (:class:`~torch.nn.CrossEntropyLoss`, :class:`~torch.nn.BCEWithLogitsLoss`), and, where
    ``target`` is a module with several layers, that the last affine one in the order of definition is the output.

    Args:
        target: the bias, its layer, or a model.
        marginal: one number an output, or one for all: the target's statistics, not its labels.
        link: ``"softmax"``, ``"sigmoid"`` or ``"linear"``.

    Returns:
        ``target``.

    Raises:
        ValueError: an unknown ``link``, a ``marginal`` of another shape or out of range (a class that never occurs has
            :math:`\ln 0`: add one to each count), shares that do not sum to 1, or a target without a bias.
        TypeError: ``target`` is neither tensor nor module.

    Source: I8; N2 §8.4. PyTorch: none.
    """
    if link not in _LINKS:
        raise ValueError(f"link must be one of {_LINKS}, got {link!r}")
    _check_target(target)
    bias = target if isinstance(target, Tensor) else _bias_of_the_last_layer(target)
    given = torch.as_tensor(marginal).detach()
    statistic = given.to(device=bias.device, dtype=torch.float64)
    if statistic.dim() > 0 and statistic.shape != bias.shape:
        raise ValueError(f"marginal must have the bias's shape {tuple(bias.shape)}, got {tuple(statistic.shape)}")
    with torch.no_grad():
        spacing = torch.finfo(given.dtype).eps if given.is_floating_point() else 0.0
        bias.copy_(_LINK_INVERSE[link](statistic.expand(bias.shape), spacing))
    return target


def _check_target(target: object) -> None:
    if target is None:
        raise ValueError("target must be a bias, a layer or a model, got None: a layer with bias=False has no bias")
    if not isinstance(target, (Tensor, Module)):
        raise TypeError(f"target must be a bias, a layer or a model, got {type(target).__name__}")


def _log_shares(marginal: Tensor, spacing: float) -> Tensor:
    _require(marginal, "finite and above 0 (a class that never occurs: add one to each count)", marginal > 0)
    total = marginal.sum()
    counts = bool((marginal == marginal.round()).all())
    # Rounding each share moves the sum by less than the spacing; thirds written with six digits still pass.
    if not counts and abs(float(total) - 1) > max(1e-6, spacing):
        raise ValueError(f"marginal must be shares that sum to 1, or counts in whole numbers, got the sum {total:.6g}")
    return (marginal / total).log()


def _logit(shares: Tensor, _spacing: float) -> Tensor:
    _require(shares, "between 0 and 1, both excluded", (shares > 0) & (shares < 1))
    return (shares / (1 - shares)).log()


def _mean(means: Tensor, _spacing: float) -> Tensor:
    _require(means, "finite", means.isfinite())
    return means


_LINK_INVERSE = {"softmax": _log_shares, "sigmoid": _logit, "linear": _mean}


def _require(marginal: Tensor, expected: str, valid: Tensor) -> None:
    wrong = (~(valid & marginal.isfinite())).nonzero()
    if len(wrong) > 0:
        index = tuple(wrong[0].tolist())
        raise ValueError(f"marginal must be {expected}, got {marginal[index].item()} at {list(index)}")


def _bias_of_the_last_layer(module: Module) -> Tensor:
    layers = [(name, leaf) for name, leaf in leaves(module) if is_a(leaf, AFFINE)]
    if not layers:
        raise ValueError(f"target must hold a linear or convolution layer, {type(module).__name__} has none")
    name, last = layers[-1]
    return _bias_of(last, name or type(last).__name__)


def _bias_of(layer: Module, name: str) -> Tensor:
    if not isinstance(layer.bias, Tensor):
        raise ValueError(f"the layer {name} has no bias")
    return layer.bias


def relu_bias_(target: Target, value: float = 0.1) -> Target:
    """Set the bias in front of each ReLU, so that most units pass a signal at the start.

    Assumes inputs of variance about 1 or less, for which 0.1 matters. Not for :func:`random_walk_`, which assumes zero
    biases.

    Args:
        target: a bias or a layer with one, which is set; or a model, whose ReLU modules are found in the order of
            definition. Before each it is the nearest bias that is set, the norm's where there is a norm in between,
            since that makes the layer's own have no effect. Functional ReLUs are not seen.
        value: what the bias becomes.

    Returns:
        ``target``.

    Raises:
        ValueError: the layer has no bias, or the model no ReLU module with a bias in front of it.

    Source: I8; N2 §8.4. PyTorch: none.
    """
    _check_target(target)
    found: list[Tensor]
    if isinstance(target, Tensor):
        found = [target]
    elif is_a(target, AFFINE | NORMS):
        found = [_bias_of(target, type(target).__name__)]
    else:
        found = _biases_before_relu(target)
    if not found:
        raise ValueError(f"no ReLU module with a bias in front of it was found in {type(target).__name__}")
    with torch.no_grad():
        for bias in found:
            bias.fill_(value)
    return target


def _biases_before_relu(model: Module) -> list[Tensor]:
    found: list[Tensor] = []
    nearest: object = None
    for _, leaf in leaves(model):
        if is_a(leaf, ("ReLU", "ReLU6")):
            if isinstance(nearest, Tensor):
                found.append(nearest)
            nearest = None
        elif is_a(leaf, AFFINE | NORMS):
            nearest = leaf.bias
        elif any(True for _ in leaf.parameters(recurse=False)):
            nearest = None
    return found


def lstm_forget_bias_(target: Target, value: float = 1.0) -> Target:
    """Set the forget gates' bias of every LSTM, so that the cells remember at the start.

    Assumes PyTorch's layout: four gates on end, input, forget, cell, output, so that the forget gate's numbers are the
    second quarter. PyTorch adds two biases, ``bias_ih`` and ``bias_hh``; the first gets ``value``, the second 0, and
    their sum is ``value``. The other gates' numbers stay as they are.

    Args:
        target: a bias of four gates, an :class:`~torch.nn.LSTM` (any number of layers, both directions) or
            :class:`~torch.nn.LSTMCell`, or a model that holds some.
        value: the sum of the two biases of a forget gate.

    Returns:
        ``target``.

    Raises:
        ValueError: no LSTM with biases was found, or a tensor that is no vector of four gates.

    Source: I8; N2 §8.4; Jozefowicz et al. 2015. PyTorch: none.
    """
    _check_target(target)
    if isinstance(target, Tensor):
        if target.dim() != 1 or target.shape[0] % 4 != 0:
            raise ValueError(f"target must be a bias of four gates, got shape {tuple(target.shape)}")
        biases: list[tuple[Tensor, float]] = [(target, value)]
    else:
        biases = [
            (bias, value if name.startswith("bias_ih") else 0.0)
            for module in target.modules()
            if is_a(module, LSTMS)
            for name, bias in module.named_parameters(recurse=False)
            if name.startswith("bias_")
        ]
    if not biases:
        raise ValueError(f"no LSTM with biases was found in {type(target).__name__}")
    with torch.no_grad():
        for bias, number in biases:
            bias.chunk(4)[1].fill_(number)
    return target
