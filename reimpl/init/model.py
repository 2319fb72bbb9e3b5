"""Initialises a whole model: each parameter by the kind of its layer and by the activation that follows."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Generator
from torch.nn import Module

from reimpl.init._activations import LINEAR, Activation, Named, chosen
from reimpl.init._job import Job
from reimpl.init._modules import check_model
from reimpl.init._rules import Rule, as_function, needs_activation
from reimpl.init._table import Initialisation

_LOG = logging.getLogger("reimpl.init")


def apply(
    model: Module,
    rule: Rule = "kaiming_normal_",
    *,
    bias: Rule | None = 0.0,
    activation: Named | Mapping[str, Named] | None = None,
    batch: Any = None,
    recurrent: Rule = "orthogonal_",
    embedding: Rule = "normal_",
    forget_bias: float = 1.0,
    overrides: Mapping[str, Rule] | None = None,
    generator: Generator | None = None,
) -> Initialisation:
    r"""Initialise a model's parameters by the kind of their layer and the activation that follows it.

    ===============================  ======================================================================
    linear, bilinear, (transposed)   weight by ``rule``, with the layer's own fans (:func:`layer_fans`) and
    convolution                      the gain of the activation; bias by ``bias``
    batch, instance, layer, group,   weight 1, bias 0, running statistics as new
    RMS norm
    embedding                        by ``embedding``; the padding row 0
    RNN, LSTM, GRU and their cells   input weights by ``rule``, hidden ones by ``recurrent``, each gate a matrix
                                     of its own; biases by ``bias``, the LSTM's forget gate ``forget_bias``
    multi-head attention             query, key and value weights by ``rule``, each a matrix of its own
    PReLU                            0.25
    anything else                    left alone, and listed so
    ===============================  ======================================================================

    A layer is known by its class: PyTorch's, this package's, or one derived from either. A parameter that several
    modules share is initialised where it comes first. Weights under a parametrisation (weight norm, ...) are set
    through it. No gradient is recorded.

    Args:
        model: any module; on the meta device only the table is made.
        rule: a name of this package (``"kaiming_normal_"``), a number, or a function of a tensor, such as
            ``functools.partial(trunc_normal_, std=0.02)``. Whatever the function takes by the names ``fans``,
            ``groups``, ``generator``, ``gain``, and ``nonlinearity`` with ``a``, it is given, unless ``partial`` has
            bound it. :mod:`torch.nn.init`'s functions can be passed too, and then see the fans that PyTorch sees.
        bias: likewise, with the fans of the layer's weight; ``None`` leaves biases as they are. With ``rule`` and
            ``bias`` both ``functools.partial(kaiming_uniform_, a=5**0.5)`` linear layers and convolutions start as
            PyTorch makes them. See also :func:`relu_bias_` and :func:`output_bias_`.
        activation: what follows each affine layer: a name that :func:`calculate_gain` knows, or an elementwise function
            (``torch.nn.functional.gelu``), whose gain is :math:`E[f(z)^2]^{-1/2}` for normal :math:`z`: it keeps a mean
            square of 1, but many layers without norms may leave it, see :func:`layer_sequential_`. Or a mapping from
            patterns of layer names to these (``{"head": "linear", "*": "relu"}``, first match); layers that match
            none are found out as by default.

            By default it is the next activation module in the order of definition, across norms, pooling and dropout
            but not across another layer; a layer with none is linear. That is the order of computing in a
            :class:`~torch.nn.Sequential`; where a model defines its activations elsewhere, uses one for several layers,
            or calls functions, give ``activation`` or ``batch``.
        batch: an input (a tensor, a tuple of arguments, or a mapping of keyword arguments) to run through the model
            once, to see which activation, module or function, each layer's output meets.
        recurrent, embedding: as ``rule``.
        forget_bias: of LSTMs, unless ``bias`` is ``None``.
        overrides: rules for parameters by name (``{"pos_embed": functools.partial(trunc_normal_, std=0.02)}``);
            patterns, first match, before everything else, for layers that are not known too.
        generator: where the numbers come from.

    Returns:
        what was done; it is also logged (``reimpl.init``, level INFO).

    Raises:
        ValueError: an unknown rule or activation, a pattern that matches nothing, a lazy layer that has seen no input,
            or a rule that needs the activation where a model of several layers has no activation module and neither
            ``activation`` nor ``batch`` is given.
        TypeError: ``model`` is no module, or a rule or activation neither name nor function.

    Source: I2-I8. PyTorch: none.
    """
    check_model(model)
    weight = as_function("rule", rule)
    activations = chosen(model, activation, batch)
    if activation is None and batch is None and needs_activation(weight):
        _check_seen(activations)
    job = Job(
        weight=weight,
        recurrent=as_function("recurrent", recurrent),
        embedding=as_function("embedding", embedding),
        bias=None if bias is None else as_function("bias", bias),
        forget_bias=forget_bias,
        activations=activations,
        overrides={pattern: as_function("overrides", value) for pattern, value in (overrides or {}).items()},
        generator=generator,
    )
    done = job.run(model)
    _LOG.info("%s", done)
    return done


def _check_seen(activations: Mapping[str, Activation]) -> None:
    if len(activations) > 1 and all(activation is LINEAR for activation in activations.values()):
        raise ValueError(
            f"no activation module follows any of the layers {list(activations)}, and functions are not seen: pass "
            "activation='relu' (or another; 'linear' where there is none), or batch, an input to run through the model"
        )
