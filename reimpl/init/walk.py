"""Random-walk initialisation: weights scaled so that the logarithm of a signal's length has no drift."""

from __future__ import annotations

from math import exp, sqrt

from torch import Generator, Tensor

from reimpl.init.gain import Fans, calculate_gain, fans_or
from reimpl.init.simple import normal_

NONLINEARITIES = ("linear", "relu", "leaky_relu")


def random_walk_(
    tensor: Tensor,
    a: float = 0,
    nonlinearity: str = "relu",
    generator: Generator | None = None,
    *,
    fans: Fans | None = None,
) -> Tensor:
    r"""Draw from :math:`N(0, g^2/n_\text{in})` with the :math:`g` for which the walk has no drift.

    From layer to layer the squared length of the signal, :math:`|h|^2` forward and :math:`|\delta|^2` backward, is
    multiplied by a random number :math:`z`. He's initialisation makes :math:`E[z] = 1`; through many layers it is
    :math:`E[\ln z] < 0` that counts, and the logarithm drifts down by about :math:`5/(2n)` a layer under ReLU. With
    :math:`E[\ln z] = 0` it wanders without drift:

    - linear: :math:`g = e^{1/(2n)}`
    - ReLU: :math:`g = \sqrt 2 \exp\bigl(1.2/(\max(n, 6) - 2.4)\bigr)`, the paper's fit
    - leaky ReLU of slope :math:`a`: :math:`g = \sqrt{2/(1 + a^2)} \exp(c/(4n))`,
      :math:`c = 6(1 + a^4)/(1 + a^2)^2 - 1`, the expansion of :math:`E[\ln z]` to first order in :math:`1/n`

    with :math:`n = n_\text{in}`, the units that share the backward signal.

    Assumes layers fully connected one after the other, of one width, with zero biases (so not with
    :func:`relu_bias_`). In a convolution the numbers at different places are summed, and the correction, small there
    since :math:`n` counts the kernel too, is larger than it need be.

    Args:
        tensor: the weight.
        a: slope of the leaky ReLU.
        nonlinearity: ``"linear"``, ``"relu"`` or ``"leaky_relu"``; the paper finds :math:`g` for others by trial.
        generator: where the numbers come from.
        fans: fan in and fan out where the shape does not tell them (:func:`layer_fans`).

    Raises:
        ValueError: fewer than two dimensions, a dimension of size 0, or another ``nonlinearity``.

    Source: I10; N2 §8.4; Sussillo and Abbott 2014, eq. 13-14. PyTorch: none.
    """
    fan_in, _ = fans_or(tensor, fans)
    if fan_in == 0:
        raise ValueError(f"tensor must have a fan in of at least 1, got shape {tuple(tensor.shape)}")
    return normal_(tensor, 0, _gain(nonlinearity, a, fan_in) / sqrt(fan_in), generator)


def _gain(nonlinearity: str, a: float, n: float) -> float:
    if nonlinearity == "linear":
        return exp(1 / (2 * n))
    if nonlinearity == "relu":
        return sqrt(2.0) * exp(1.2 / (max(n, 6) - 2.4))
    if nonlinearity == "leaky_relu":
        # E[ln z] = ln E[z] - Var[z] / (2 E[z]^2) to first order, with Var[z] / E[z]^2 = c/n.
        c = 6 * (1 + a**4) / (1 + a**2) ** 2 - 1
        return calculate_gain("leaky_relu", a) * exp(c / (4 * n))
    raise ValueError(f"Unsupported nonlinearity {nonlinearity}: random_walk_ knows {', '.join(NONLINEARITIES)}")
