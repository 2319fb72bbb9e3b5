"""Elementwise activations."""

from __future__ import annotations

from math import isfinite
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from reimpl.functional._dispatch import call, opmath_dtype, scalar_type_name
from reimpl.functional._options import check_number
from reimpl.functional._plain import final_on_cpu, masked, overwrite
from reimpl.functional._pointwise import plain as _pointwise_plain
from reimpl.functional._traced import rectify
from reimpl.functional.kernels import attempt, final_kernels_for, kernels_for, teach

# The compiled node's keys: a name, and whether the input is kept in place of the output.
_RELU, _SIGMOID, _TANH = (("relu", False), ("sigmoid", False), ("tanh", False))


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    r"""Rectified linear unit :math:`y = \max(x, 0)`, with derivative 0 at 0.

    Args:
        input: any shape, a real dtype.
        inplace: write the result into ``input`` and return it.

    Returns:
        the shape, dtype and strides of ``input``.

    Raises:
        NotImplementedError: ``input`` is boolean or complex.

    Source: F2; N1, N3. PyTorch: :func:`torch.nn.functional.relu`.
    """
    if input.dtype == torch.bool:
        raise NotImplementedError("Boolean inputs not supported for relu")
    if input.is_complex():
        raise NotImplementedError("clamp is not supported for complex types")
    output: Tensor | None = attempt(_RELU, input)
    if output is None:
        output = call(_ReLU, _rectify, input, operator=rectify)
    return overwrite(input, output) if inplace else output


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    r"""Leaky rectified linear unit: :math:`y = x` where :math:`x > 0`, else :math:`a x`.

    Args:
        input: any shape, a floating-point dtype.
        negative_slope: :math:`a`.
        inplace: write the result into ``input`` and return it. A negative slope then leaves nothing to tell the two
            branches apart, and the backward pass raises ``RuntimeError``, as PyTorch's does.

    Returns:
        the shape, dtype and strides of ``input``.

    Raises:
        NotImplementedError: the dtype is not floating-point.

    Source: F2. PyTorch: :func:`torch.nn.functional.leaky_relu`.
    """
    if not input.is_floating_point():
        kernel = f"leaky_relu_{input.device.type}"
        raise NotImplementedError(f"\"{kernel}\" not implemented for '{scalar_type_name(input.dtype)}'")
    if type(negative_slope) is not float:
        if isinstance(negative_slope, complex):
            raise RuntimeError("value cannot be converted to type float without overflow")
        check_number(negative_slope)
        negative_slope = float(negative_slope)
    # the output has the sign of the input unless the slope is negative, and survives an in-place call
    of_input = not inplace
    lost = inplace and not negative_slope >= 0
    output: Tensor | None = None if lost else attempt(("leaky_relu", of_input), input, negative_slope)
    if output is None:
        output = call(_LeakyReLU, _leak, input, negative_slope, of_input)
    return overwrite(input, output) if inplace else output


def sigmoid(input: Tensor) -> Tensor:
    r"""Logistic sigmoid :math:`y = 1/(1 + e^{-x})`, with :math:`y' = y(1 - y) \le 1/4`.

    Computed as :math:`e^x/(1 + e^x)` for negative :math:`x`, so that neither side overflows.

    Args:
        input: any shape; integers are taken in the default floating-point dtype.

    Returns:
        the shape and strides of ``input``.

    Source: F2; N1, N2, N3. PyTorch: :func:`torch.sigmoid`.
    """
    done: Tensor | None = attempt(_SIGMOID, input)
    return call(_Sigmoid, logistic, _floating(input)) if done is None else done


def relu_(input: Tensor) -> Tensor:
    """:func:`relu` into ``input`` itself. PyTorch: :func:`torch.nn.functional.relu_`."""
    return relu(input, inplace=True)


def leaky_relu_(input: Tensor, negative_slope: float = 0.01) -> Tensor:
    """:func:`leaky_relu` into ``input`` itself. PyTorch: :func:`torch.nn.functional.leaky_relu_`."""
    return leaky_relu(input, negative_slope, inplace=True)


def sigmoid_(input: Tensor) -> Tensor:
    """:func:`sigmoid` into ``input`` itself. PyTorch: :func:`torch.sigmoid_`."""
    return _into(input, sigmoid(input))


def tanh_(input: Tensor) -> Tensor:
    """:func:`tanh` into ``input`` itself. PyTorch: :func:`torch.tanh_`."""
    return _into(input, tanh(input))


def tanh(input: Tensor) -> Tensor:
    r"""Hyperbolic tangent, with :math:`y' = 1 - y^2 \le 1`.

    Computed as :math:`-t/(t + 2)`, :math:`t = e^{-2|x|} - 1`, with the sign of :math:`x`: it neither overflows nor
    cancels near 0.

    Args:
        input: any shape; integers are taken in the default floating-point dtype.

    Returns:
        the shape and strides of ``input``.

    Source: F2; N1, N3. PyTorch: :func:`torch.tanh`.
    """
    done: Tensor | None = attempt(_TANH, input)
    return call(_Tanh, hyperbolic_tangent, _floating(input)) if done is None else done


def _into(input: Tensor, output: Tensor) -> Tensor:
    if output.dtype != input.dtype and not torch.can_cast(output.dtype, input.dtype):
        found, wanted = scalar_type_name(output.dtype), scalar_type_name(input.dtype)
        raise RuntimeError(f"result type {found} can't be cast to the desired output type {wanted}")
    return overwrite(input, output)


def _floating(input: Tensor) -> Tensor:
    if input.is_floating_point() or input.is_complex():
        return input
    return input.to(torch.get_default_dtype())


def _rectify(input: Tensor) -> Tensor:
    # "<= 0" and not "> 0": NaN fails the comparison and passes through, as PyTorch has it.
    return torch.where(input <= 0, 0, input)


class _FromOutput(torch.autograd.Function):
    """A Function of one tensor whose backward needs its output alone."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def error(grad: Tensor, output: Tensor) -> Tensor:
        """The gradient of the input, given that of the output."""
        raise NotImplementedError

    @classmethod
    def through(cls, options: Any, grads: tuple[Tensor], saved: tuple[Tensor], *_: object) -> Tensor:
        """:meth:`error` as the compiled node calls it."""
        return cls.error(*grads, *saved)


class _ReLU(_FromOutput):
    @staticmethod
    def forward(input: Tensor) -> Tensor:
        kernels = kernels_for("_pointwise.numba", input)
        if kernels and kernels.worth_it(input):
            teach(_RELU, kernels, _ReLU.through, input)
            return kernels.forward("relu", input)  # type: ignore[no-any-return]
        # Several times faster than the composition's choice; its derivative, shared out at 0, is not called for.
        return torch.maximum(input.new_zeros(()), input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _ReLU.error(grad, *ctx.saved_tensors)

    @staticmethod
    def error(grad: Tensor, output: Tensor) -> Tensor:
        kernels = final_kernels_for("_pointwise.numba", grad, output)
        if kernels and kernels.worth_it(grad, output):
            return kernels.backward("relu", grad, output)  # type: ignore[no-any-return]
        if final_on_cpu(grad, output):
            return masked(grad, output)
        return torch.where(output <= 0, 0, grad)


def _leak(input: Tensor, slope: float, of_input: bool = True) -> Tensor:
    return torch.where(input > 0, input, input * slope)


class _LeakyReLU(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, slope: float, of_input: bool) -> Tensor:
        kernels = kernels_for("_pointwise.numba", input)
        if kernels and kernels.worth_it(input):
            teach(("leaky_relu", of_input), kernels, _LeakyReLU.through, input)
            return kernels.forward("leaky_relu", input, slope)  # type: ignore[no-any-return]
        # The maximum is several times faster than a choice. At slope 0 it would meet 0 times infinity.
        if not 0 < slope <= 1:
            return _leak(input, slope)
        if final_on_cpu(input):
            return _pointwise_plain.leaky_relu(input, slope)
        return torch.maximum(input, input * slope)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, ctx.slope, of_input = inputs
        ctx.lost = not of_input and not ctx.slope >= 0
        ctx.save_for_backward(input if of_input else output)

    @staticmethod
    def through(options: Any, grads: tuple[Tensor], saved: tuple[Tensor], numbers: Any, *_: object) -> Tensor:
        """:meth:`backward` as the compiled node calls it."""
        return _LeakyReLU.backward(SimpleNamespace(saved_tensors=saved, slope=numbers[0], lost=False), *grads)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.lost:
            raise RuntimeError(
                "In-place leakyReLu backward calculation is triggered with a negative slope which is not supported. "
                "This is caused by calling in-place forward function with a negative slope, please call out-of-place "
                "version instead. File an issue at https://github.com/pytorch/pytorch if you do require supporting "
                "in-place leakRelu backward calculation with negative slope"
            )
        (signed,) = ctx.saved_tensors
        kernels = final_kernels_for("_pointwise.numba", grad, signed)
        if kernels and kernels.worth_it(grad, signed):
            return kernels.backward("leaky_relu", grad, signed, ctx.slope), None, None
        if 0 <= ctx.slope <= 1 and final_on_cpu(grad, signed):
            return _pointwise_plain.leaky_relu_gradient(grad, signed, ctx.slope), None, None
        positive = signed > 0
        if opmath_dtype(grad.dtype) != grad.dtype or not isfinite(ctx.slope):
            return torch.where(positive, grad, grad * ctx.slope), None, None
        # 1 and the slope, each exact, several times faster than a choice.
        one = positive.to(grad.dtype)
        return grad * (one + (1 - one) * ctx.slope), None, None


def logistic(input: Tensor) -> Tensor:
    """:func:`sigmoid` in differentiable tensor arithmetic alone."""
    if input.is_complex():
        return 1 / (1 + torch.exp(-input))
    x = input.to(opmath_dtype(input.dtype))
    decay = torch.exp(torch.where(x >= 0, -x, x))
    return (torch.where(x >= 0, 1, decay) / (1 + decay)).to(input.dtype)


def minus_log_sigmoid(x: Tensor) -> Tensor:
    """log(1 + exp(-x)) in differentiable tensor arithmetic: the loss of a positive label with logit ``x``."""
    # One branch of each choice is constant at 0, so that the slope there is right.
    return torch.log1p(torch.exp(torch.where(x >= 0, -x, x))) + torch.where(x >= 0, 0, -x)


class _Sigmoid(_FromOutput):
    @staticmethod
    def forward(input: Tensor) -> Tensor:
        if input.is_complex():
            return logistic(input)
        kernels = kernels_for("_pointwise.numba", input)
        if kernels and kernels.worth_it(input):
            teach(_SIGMOID, kernels, _Sigmoid.through, input)
            return kernels.forward("sigmoid", input)  # type: ignore[no-any-return]
        if final_on_cpu(input):
            return _pointwise_plain.sigmoid(input)
        # The overflow of exp(-x) ends as 1/inf = 0, as it should; only a derivative would suffer from it.
        return input.to(opmath_dtype(input.dtype)).neg().exp_().add_(1).reciprocal_().to(input.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Sigmoid.error(grad, *ctx.saved_tensors)

    @staticmethod
    def error(grad: Tensor, output: Tensor) -> Tensor:
        kernels = final_kernels_for("_pointwise.numba", grad, output)
        if kernels and kernels.worth_it(grad, output):
            return kernels.backward("sigmoid", grad, output)  # type: ignore[no-any-return]
        if final_on_cpu(grad, output):
            return _pointwise_plain.sigmoid_gradient(grad, output)
        y = output.to(opmath_dtype(output.dtype))
        slope: Tensor = (y * (1 - y)).conj()
        return (grad * slope).to(output.dtype)


def hyperbolic_tangent(input: Tensor) -> Tensor:
    """:func:`tanh` in differentiable tensor arithmetic alone."""
    x = input.to(opmath_dtype(input.dtype))
    negative = (x.real if x.is_complex() else x) < 0
    t = torch.expm1(2 * torch.where(negative, x, -x))
    # The sign goes in before the division, so that -0 stays -0.
    return (torch.where(negative, t, -t) / (t + 2)).to(input.dtype)


class _Tanh(_FromOutput):
    @staticmethod
    def forward(input: Tensor) -> Tensor:
        if input.is_complex():
            return hyperbolic_tangent(input)
        kernels = kernels_for("_pointwise.numba", input)
        if kernels and kernels.worth_it(input):
            teach(_TANH, kernels, _Tanh.through, input)
            return kernels.forward("tanh", input)  # type: ignore[no-any-return]
        if final_on_cpu(input):
            return _pointwise_plain.tanh(input)
        x = input.to(opmath_dtype(input.dtype))
        t = x.abs().mul_(-2).expm1_()
        return t.neg().div_(t.add_(2)).copysign_(x).to(input.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Tanh.error(grad, *ctx.saved_tensors)

    @staticmethod
    def error(grad: Tensor, output: Tensor) -> Tensor:
        kernels = final_kernels_for("_pointwise.numba", grad, output)
        if kernels and kernels.worth_it(grad, output):
            return kernels.backward("tanh", grad, output)  # type: ignore[no-any-return]
        if final_on_cpu(grad, output):
            return _pointwise_plain.tanh_gradient(grad, output)
        y = output.to(opmath_dtype(output.dtype))
        slope: Tensor = (1 - y * y).conj()
        return (grad * slope).to(output.dtype)


FROM_OUTPUT = {"relu": _ReLU, "sigmoid": _Sigmoid, "tanh": _Tanh}
"""Activations whose derivative is a function of their value: each with ``forward(u)`` and ``error(grad, value)``."""
