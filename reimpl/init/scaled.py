"""Initialisations scaled by the fans of a weight, so that signals keep their variance from layer to layer.

A layer of independent weights gives Var[output] = n_in Var[w] Var[input] (N0, eq. 4.43-4.48): variance 1/n_in keeps it.
A weight is ``(out, in, *kernel)``; a uniform distribution on ±a has variance a²/3. The keyword ``fans`` replaces the
fans that this shape says, for layers whose weight is laid out or used otherwise: ``fans=layer_fans(layer)``.
"""

from __future__ import annotations

import warnings
from math import sqrt

from torch import Generator, Tensor

from reimpl.init.gain import Fans, calculate_gain, fan_of, fans_or
from reimpl.init.simple import normal_, uniform_


def xavier_uniform_(
    tensor: Tensor, gain: float = 1.0, generator: Generator | None = None, *, fans: Fans | None = None
) -> Tensor:
    r"""Draw from :math:`U(-a, a)`, :math:`a = \text{gain} \sqrt{6/(n_\text{in} + n_\text{out})}`.

    The variance :math:`2/(n_\text{in} + n_\text{out})` is a compromise between the signal's forward and backward.

    Raises:
        ValueError: ``tensor`` has fewer than two dimensions.

    Source: I4; N0, N2 (§8.4); Glorot and Bengio 2010, eq. 16. PyTorch: :func:`torch.nn.init.xavier_uniform_`.
    """
    bound = sqrt(3.0) * _xavier_std(tensor, gain, fans)
    return uniform_(tensor, -bound, bound, generator)


def xavier_normal_(
    tensor: Tensor, gain: float = 1.0, generator: Generator | None = None, *, fans: Fans | None = None
) -> Tensor:
    r"""Draw from :math:`N(0, \text{std}^2)`, :math:`\text{std} = \text{gain} \sqrt{2/(n_\text{in} + n_\text{out})}`.

    Raises:
        ValueError: ``tensor`` has fewer than two dimensions.

    Source: I4; N0. PyTorch: :func:`torch.nn.init.xavier_normal_`.
    """
    return normal_(tensor, 0.0, _xavier_std(tensor, gain, fans), generator)


def kaiming_uniform_(
    tensor: Tensor,
    a: float = 0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: Generator | None = None,
    *,
    fans: Fans | None = None,
) -> Tensor:
    r"""Draw from :math:`U(-b, b)`, :math:`b = \text{gain} \sqrt{3/\text{fan}}`.

    Args:
        tensor: the weight; with no elements it is left alone, with a warning.
        a: slope of the leaky ReLU after this layer; :math:`a = \sqrt 5` gives :math:`\pm\sqrt{1/n_\text{in}}`.
        mode: ``"fan_in"`` keeps the variance forward, ``"fan_out"`` backward.
        nonlinearity: see :func:`calculate_gain`.
        generator: where the numbers come from.
        fans: see the top of this file.

    Raises:
        ValueError: fewer than two dimensions, unknown ``mode`` or ``nonlinearity``.

    Source: I6; N0, N1, N4; He et al. 2015, eq. 10. PyTorch: :func:`torch.nn.init.kaiming_uniform_`.
    """
    if _has_no_elements(tensor):
        return tensor
    bound = sqrt(3.0) * _kaiming_std(tensor, a, mode, nonlinearity, fans)
    return uniform_(tensor, -bound, bound, generator)


def kaiming_normal_(
    tensor: Tensor,
    a: float = 0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: Generator | None = None,
    *,
    fans: Fans | None = None,
) -> Tensor:
    r"""Draw from :math:`N(0, \text{std}^2)`, :math:`\text{std} = \text{gain}/\sqrt{\text{fan}}`.

    Arguments and errors are those of :func:`kaiming_uniform_`.

    Source: I6; N0, N1, N4; He et al. 2015, eq. 10. PyTorch: :func:`torch.nn.init.kaiming_normal_`.
    """
    if _has_no_elements(tensor):
        return tensor
    return normal_(tensor, 0, _kaiming_std(tensor, a, mode, nonlinearity, fans), generator)


def lecun_uniform_(tensor: Tensor, generator: Generator | None = None, *, fans: Fans | None = None) -> Tensor:
    r"""Draw from :math:`U(-a, a)`, :math:`a = \sqrt{3/n_\text{in}}`, for variance :math:`1/n_\text{in}`.

    The notes' :math:`\pm\sqrt{1/n_\text{in}}` has variance :math:`1/(3 n_\text{in})`, a third of that; it is
    :func:`kaiming_uniform_` with :math:`a = \sqrt 5`, the default of :class:`reimpl.nn.Linear`.

    Raises:
        ValueError: ``tensor`` has fewer than two dimensions.

    Source: I3; N0, with errata 4; LeCun et al. 1998, eq. 16. PyTorch: ``kaiming_uniform_(nonlinearity="linear")``.
    """
    if _has_no_elements(tensor):
        return tensor
    bound = sqrt(3.0) * _kaiming_std(tensor, 0, "fan_in", "linear", fans)
    return uniform_(tensor, -bound, bound, generator)


def lecun_normal_(tensor: Tensor, generator: Generator | None = None, *, fans: Fans | None = None) -> Tensor:
    r"""Draw from :math:`N(0, 1/n_\text{in})`.

    These are also the numbers of the "Xavier" initialisation of N1, which divides by :math:`\sqrt{n_\text{in}}` alone.

    Raises:
        ValueError: ``tensor`` has fewer than two dimensions.

    Source: I2, I5; N0 (eq. 4.43-4.48), N1. PyTorch: ``kaiming_normal_(nonlinearity="linear")``.
    """
    if _has_no_elements(tensor):
        return tensor
    return normal_(tensor, 0, _kaiming_std(tensor, 0, "fan_in", "linear", fans), generator)


def _xavier_std(tensor: Tensor, gain: float, fans: Fans | None) -> float:
    fan_in, fan_out = fans_or(tensor, fans)
    return gain * sqrt(2.0 / float(fan_in + fan_out))


def _kaiming_std(tensor: Tensor, a: float, mode: str, nonlinearity: str, fans: Fans | None) -> float:
    fan = fan_of(tensor, mode, fans)
    return calculate_gain(nonlinearity, a) / sqrt(fan)


def _has_no_elements(tensor: Tensor) -> bool:
    if 0 not in tensor.shape:
        return False
    warnings.warn("Initializing zero-element tensors is a no-op", stacklevel=3)
    return True
