"""What the scaled initialisations are made from: the fans of a weight and the gain of a nonlinearity."""

from __future__ import annotations

from math import inf, prod, sqrt

from torch import Tensor
from torch.nn import Module

from reimpl.init._kinds import AFFINE, is_a

Fans = tuple[float, float]

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

    That is the layout of linear maps and convolutions without groups. A bare weight does not tell that it belongs to a
    transposed, grouped or strided convolution: :func:`layer_fans` asks the layer.

    Raises:
        ValueError: the tensor has fewer than two dimensions.
    """
    if tensor.dim() < 2:
        raise ValueError("Fan in and fan out can not be computed for tensor with fewer than 2 dimensions")
    receptive_field = prod(tensor.shape[2:])
    return tensor.shape[1] * receptive_field, tensor.shape[0] * receptive_field


def fan_of(tensor: Tensor, mode: str, given: Fans | None = None) -> float:
    """The fan that ``mode``, ``"fan_in"`` or ``"fan_out"``, names: of the two ``given``, or of the weight's shape.

    Raises:
        ValueError: ``mode`` is neither, or a given fan is not positive.
    """
    mode = mode.lower()
    if mode not in _MODES:
        raise ValueError(f"Mode {mode} not supported, please use one of {_MODES}")
    fan_in, fan_out = fans_or(tensor, given)
    return fan_in if mode == "fan_in" else fan_out


def fans_or(tensor: Tensor, given: Fans | None) -> Fans:
    """The fans ``given``, checked, or those of the weight's shape.

    Raises:
        ValueError: a given fan is not a positive number, or the shape has fewer than two dimensions.
    """
    if given is None:
        return fans(tensor)
    fan_in, fan_out = given
    if not (0 < fan_in < inf and 0 < fan_out < inf):
        raise ValueError(f"fans must be two positive numbers, fan in and fan out, got {given}")
    return fan_in, fan_out


def layer_fans(layer: Module) -> Fans:
    r"""Fan in and fan out of a layer: how many connections a unit has, on average over positions away from the border.

    A linear map has :math:`(n_\text{in}, n_\text{out})`, a bilinear one :math:`(n_1 n_2, n_\text{out})`. A convolution
    of :math:`g` groups, kernel volume :math:`k` and stride volume :math:`s` has
    :math:`(n_\text{in} k / g, \; n_\text{out} k / (g s))`, since a stride lets only one in :math:`s` positions read an
    input; a transposed one :math:`(n_\text{in} k / (g s), \; n_\text{out} k / g)`.

    :func:`torch.nn.init.kaiming_normal_` and its like see the weight alone: they take a transposed convolution's fans
    for each other, and know neither groups (in fan out) nor strides. ``kaiming_normal_(layer.weight,
    fans=layer_fans(layer))`` does.

    Raises:
        TypeError: ``layer`` is no linear, bilinear or convolution layer.

    Source: I2, I4, I6; He et al. 2015, §2.2. PyTorch: none.
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 2 or not is_a(layer, AFFINE):
        raise TypeError(f"layer must be a linear, bilinear or convolution layer, got {type(layer).__name__}")
    if is_a(layer, ("Bilinear",)):
        return weight.shape[1] * weight.shape[2], weight.shape[0]
    if weight.dim() == 2:
        return weight.shape[1], weight.shape[0]
    groups, stride, kernel = layer.groups, layer.stride, prod(weight.shape[2:])
    assert isinstance(groups, int) and isinstance(stride, tuple)
    steps = prod(stride)
    if getattr(layer, "transposed", False):  # (in, out / groups, *kernel)
        return _ratio(weight.shape[0] * kernel, groups * steps), weight.shape[1] * kernel
    return weight.shape[1] * kernel, _ratio(weight.shape[0] * kernel, groups * steps)


def _ratio(numerator: int, denominator: int) -> float:
    """Their quotient, an integer where it is one."""
    return numerator // denominator if numerator % denominator == 0 else numerator / denominator
