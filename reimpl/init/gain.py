"""What the scaled initialisations are made from: the fans of a weight and the gain of a nonlinearity."""

from __future__ import annotations

from math import prod, sqrt

from torch import Tensor

_LINEAR = frozenset(
    ("linear", "sigmoid", *(f"conv{transpose}{n}d" for transpose in ("", "_transpose") for n in (1, 2, 3)))
)
_MODES = ["fan_in", "fan_out"]


def calculate_gain(nonlinearity: str, param: float | None = None) -> float:
    r"""Factor by which the standard deviation :math:`1/\sqrt{\text{fan}}` grows to make up for a nonlinearity.

    1 for linear maps, convolutions and the sigmoid; 5/3 for tanh; :math:`\sqrt 2` for ReLU;
    :math:`\sqrt{2/(1 + a^2)}` for leaky ReLU of slope :math:`a`; 3/4 for SELU. The notes take 1 for tanh (variance
    :math:`1/n`); PyTorch's 5/3 makes up for the shrinking of tanh away from 0.

    Args:
        nonlinearity: PyTorch's name of the function.
        param: the slope :math:`a` of leaky ReLU, 0.01 if left out.

    Raises:
        ValueError: ``nonlinearity`` is unknown or ``param`` is no number.

    Source: I7; N4. PyTorch: :func:`torch.nn.init.calculate_gain`.
    """
    if nonlinearity in _LINEAR:
        return 1
    if nonlinearity == "tanh":
        return 5.0 / 3
    if nonlinearity == "relu":
        return sqrt(2.0)
    if nonlinearity == "leaky_relu":
        slope = 0.01 if param is None else param
        if isinstance(slope, bool) or not isinstance(slope, (int, float)):
            raise ValueError(f"negative_slope {slope} not a valid number")
        return sqrt(2.0 / (1 + slope**2))
    if nonlinearity == "selu":
        return 3.0 / 4
    raise ValueError(f"Unsupported nonlinearity {nonlinearity}")


def fans(tensor: Tensor) -> tuple[int, int]:
    """Fan in and fan out of a weight ``(out, in, *kernel)``: the numbers of connections into and out of a unit.

    Raises:
        ValueError: the tensor has fewer than two dimensions.
    """
    if tensor.dim() < 2:
        raise ValueError("Fan in and fan out can not be computed for tensor with fewer than 2 dimensions")
    receptive_field = prod(tensor.shape[2:])
    return tensor.shape[1] * receptive_field, tensor.shape[0] * receptive_field


def fan_of(tensor: Tensor, mode: str) -> int:
    """The fan that ``mode``, ``"fan_in"`` or ``"fan_out"``, names.

    Raises:
        ValueError: ``mode`` is neither.
    """
    mode = mode.lower()
    if mode not in _MODES:
        raise ValueError(f"Mode {mode} not supported, please use one of {_MODES}")
    fan_in, fan_out = fans(tensor)
    return fan_in if mode == "fan_in" else fan_out
