"""Elementwise activations, and maxout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reimpl.functional._dispatch import call, opmath_dtype, scalar_type_name
from reimpl.functional._plain import in_blocks, masked, plain_on_cpu
from reimpl.functional._traced import rectify
from reimpl.functional.kernels import final_kernels_for, kernels_for


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
    output: Tensor = call(_ReLU, _rectify, input, operator=rectify)
    return input.copy_(output) if inplace else output


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
    output: Tensor = call(_LeakyReLU, _leak, input, negative_slope)
    return input.copy_(output) if inplace else output


def sigmoid(input: Tensor) -> Tensor:
    r"""Logistic sigmoid :math:`y = 1/(1 + e^{-x})`, with :math:`y' = y(1 - y) \le 1/4`.

    Computed as :math:`e^x/(1 + e^x)` for negative :math:`x`, so that neither side overflows.

    Args:
        input: any shape; integers are taken in the default floating-point dtype.

    Returns:
        the shape and strides of ``input``.

    Source: F2; N1, N2, N3. PyTorch: :func:`torch.sigmoid`.
    """
    return call(_Sigmoid, logistic, _floating(input))  # type: ignore[no-any-return]


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
    return call(_Tanh, hyperbolic_tangent, _floating(input))  # type: ignore[no-any-return]


def heaviside(input: Tensor, values: Tensor) -> Tensor:
    r"""Step function: 0 for :math:`x < 0`, 1 for :math:`x > 0`, and ``values`` at 0.

    The notes' formula is 1 at 0 (``values=torch.ones(())``), their code 0. NaN gives 0, as in PyTorch. There is no
    derivative: a backward pass raises, as PyTorch's does; compiled, the result is a constant.

    Args:
        input: any shape, a real dtype.
        values: the value at 0, of the dtype of ``input`` and a shape that broadcasts with it.

    Raises:
        TypeError: an argument is no tensor.
        RuntimeError: the dtypes differ.
        NotImplementedError: the dtype is complex.

    Source: F2; N3. PyTorch: :func:`torch.heaviside`.
    """
    arguments: dict[str, object] = {"input": input, "values": values}
    for position, (name, argument) in enumerate(arguments.items(), 1):
        if not isinstance(argument, Tensor):
            kind = type(argument).__name__
            raise TypeError(f"heaviside(): argument '{name}' (position {position}) must be Tensor, not {kind}")
    if input.is_complex() or values.is_complex():
        raise NotImplementedError("heaviside is not yet implemented for complex tensors.")
    if input.dtype != values.dtype:
        raise RuntimeError("heaviside is not yet implemented for tensors with different dtypes.")
    if torch.compiler.is_compiling():
        return _step(input.detach(), values.detach())
    if torch.is_grad_enabled() and (input.requires_grad or values.requires_grad):
        return _Heaviside.apply(input, values)  # type: ignore[no-any-return]
    return _step(input, values)


def identity(input: Tensor) -> Tensor:
    """The tensor itself, :math:`y = x`: the activation of an output layer under squared error.

    Source: F2; N3. PyTorch: :class:`torch.nn.Identity`.
    """
    return input


def maxout(input: Tensor, pieces: int, dim: int = 1) -> Tensor:
    r"""Maxout :math:`y_i = \max_{j < k} x_{ik + j}`: the largest of each ``pieces`` neighbours along ``dim``.

    After an affine map or a convolution with :math:`k` times the units, each unit is the maximum of :math:`k` linear
    pieces, so that its shape as a function is learnt. Of equal pieces the first gets the gradient; NaN passes.

    Args:
        input: any shape, :math:`mk` long along ``dim``, a real dtype.
        pieces: :math:`k`, at least 1.
        dim: the dimension of the units.

    Returns:
        the shape of ``input`` with :math:`m` in ``dim``.

    Raises:
        IndexError: ``dim`` is out of range.
        ValueError: ``pieces`` is not positive or does not divide the units.

    Source: F2; N2; Goodfellow et al. (2013). PyTorch has none.
    """
    bound = max(input.dim(), 1)
    if not -bound <= dim < bound:
        raise IndexError(f"Dimension out of range (expected to be in range of [{-bound}, {bound - 1}], but got {dim})")
    units = input.shape[dim] if input.dim() else 1
    if pieces < 1 or units % pieces:
        raise ValueError(f"pieces must be positive and divide the {units} units of dimension {dim}, got {pieces}")
    dim %= bound
    groups = (input if input.dim() else input.unsqueeze(0)).unflatten(dim, (units // pieces, pieces))
    largest: Tensor = call(_Maxout, _largest_piece, groups, dim + 1)[0]
    return largest if input.dim() else largest.squeeze(0)


def _into(input: Tensor, output: Tensor) -> Tensor:
    if not torch.can_cast(output.dtype, input.dtype):
        found, wanted = scalar_type_name(output.dtype), scalar_type_name(input.dtype)
        raise RuntimeError(f"result type {found} can't be cast to the desired output type {wanted}")
    return input.copy_(output)


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


class _ReLU(_FromOutput):
    @staticmethod
    def forward(input: Tensor) -> Tensor:
        kernels = kernels_for("_pointwise_numba", input)
        if kernels and kernels.worth_it(input):
            return kernels.forward("relu", input)  # type: ignore[no-any-return]
        # Several times faster than the composition's choice; its derivative, shared out at 0, is not called for.
        return torch.maximum(input.new_zeros(()), input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _ReLU.error(grad, *ctx.saved_tensors)

    @staticmethod
    def error(grad: Tensor, output: Tensor) -> Tensor:
        kernels = final_kernels_for("_pointwise_numba", grad, output)
        if kernels and kernels.worth_it(grad, output):
            return kernels.backward("relu", grad, output)  # type: ignore[no-any-return]
        if plain_on_cpu(grad, output):
            return masked(grad, output)
        return torch.where(output <= 0, 0, grad)


def _leak(input: Tensor, slope: float) -> Tensor:
    return torch.where(input > 0, input, input * slope)


class _LeakyReLU(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, slope: float) -> Tensor:
        kernels = kernels_for("_pointwise_numba", input)
        if kernels and kernels.worth_it(input):
            return kernels.forward("leaky_relu", input, slope)  # type: ignore[no-any-return]
        # The maximum is several times faster than a choice. At slope 0 it would meet 0 times infinity.
        if not 0 < slope <= 1:
            return _leak(input, slope)
        if not plain_on_cpu(input):
            return torch.maximum(input, input * slope)
        output = torch.empty_like(input)
        for x, y in in_blocks(input, output):
            torch.maximum(x, torch.mul(x, slope, out=y), out=y)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, ctx.slope = inputs
        # The output has the sign of the input unless the slope is negative, and survives an in-place call.
        ctx.save_for_backward(input if ctx.slope < 0 else output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (signed,) = ctx.saved_tensors
        kernels = final_kernels_for("_pointwise_numba", grad, signed)
        if kernels and kernels.worth_it(grad, signed):
            return kernels.backward("leaky_relu", grad, signed, ctx.slope), None
        if 0 <= ctx.slope <= 1 and plain_on_cpu(grad, signed):
            result, slope = torch.empty_like(grad), grad.new_tensor(ctx.slope)
            for g, x, d in in_blocks(grad, signed, result):
                # 1 or 0 as numbers of the gradient's dtype, then 1 or the slope
                torch.maximum(torch.gt(x, 0, out=d), slope, out=d).mul_(g)
            return result, None
        positive = signed > 0
        if opmath_dtype(grad.dtype) != grad.dtype:
            return torch.where(positive, grad, grad * ctx.slope), None
        # 1 and the slope, each exact, several times faster than a choice.
        one = positive.to(grad.dtype)
        return grad * (one + (1 - one) * ctx.slope), None


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
        kernels = kernels_for("_pointwise_numba", input)
        if kernels and kernels.worth_it(input):
            return kernels.forward("sigmoid", input)  # type: ignore[no-any-return]
        # The overflow of exp(-x) ends as 1/inf = 0, as it should; only a derivative would suffer from it.
        if plain_on_cpu(input):
            output = torch.empty_like(input)
            for x, y in in_blocks(input, output):
                torch.neg(x, out=y).exp_().add_(1).reciprocal_()
            return output
        return input.to(opmath_dtype(input.dtype)).neg().exp_().add_(1).reciprocal_().to(input.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Sigmoid.error(grad, *ctx.saved_tensors)

    @staticmethod
    def error(grad: Tensor, output: Tensor) -> Tensor:
        kernels = final_kernels_for("_pointwise_numba", grad, output)
        if kernels and kernels.worth_it(grad, output):
            return kernels.backward("sigmoid", grad, output)  # type: ignore[no-any-return]
        if plain_on_cpu(grad, output):
            result, zero = torch.empty_like(grad), grad.new_zeros(())
            for g, y, d in in_blocks(grad, output, result):
                # y + y (0 - y) below a half, 0 - (0 - y) (1 - y) from there on: as exact as the product, in one pass
                torch.lerp(y, zero, y, out=d).mul_(g)
            return result
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
        kernels = kernels_for("_pointwise_numba", input)
        if kernels and kernels.worth_it(input):
            return kernels.forward("tanh", input)  # type: ignore[no-any-return]
        if plain_on_cpu(input):
            return _tanh_in_place(input)
        x = input.to(opmath_dtype(input.dtype))
        t = x.abs().mul_(-2).expm1_()
        return t.neg().div_(t.add_(2)).copysign_(x).to(input.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Tanh.error(grad, *ctx.saved_tensors)

    @staticmethod
    def error(grad: Tensor, output: Tensor) -> Tensor:
        kernels = final_kernels_for("_pointwise_numba", grad, output)
        if kernels and kernels.worth_it(grad, output):
            return kernels.backward("tanh", grad, output)  # type: ignore[no-any-return]
        if plain_on_cpu(grad, output):
            result, one = torch.empty_like(grad), grad.new_ones(())
            for g, y, d in in_blocks(grad, output, result):
                torch.addcmul(one, y, y, value=-1, out=d).mul_(g)
            return result
        y = output.to(opmath_dtype(output.dtype))
        slope: Tensor = (1 - y * y).conj()
        return (grad * slope).to(output.dtype)


def _tanh_in_place(input: Tensor) -> Tensor:
    """:math:`t/(t + 2)` with :math:`t = e^{2x} - 1`, held where the result is 1, so that nothing overflows."""
    output, bound, denominator = torch.empty_like(input), input.new_tensor(40.0), None
    for x, y in in_blocks(input, output):
        torch.minimum(torch.mul(x, 2, out=y), bound, out=y).expm1_()
        if denominator is None or denominator.shape != y.shape:
            denominator = torch.empty_like(y)
        y.div_(torch.add(y, 2, out=denominator))
    return output


FROM_OUTPUT = {"relu": _ReLU, "sigmoid": _Sigmoid, "tanh": _Tanh}
"""Activations whose derivative is a function of their value: each with ``forward(u)`` and ``error(grad, value)``."""


def _step(input: Tensor, values: Tensor) -> Tensor:
    return torch.where(input == 0, values, (input > 0).to(input.dtype))


class _Heaviside(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, values: Tensor) -> Tensor:
        return _step(input, values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is kept: there is no backward pass."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError("derivative for aten::heaviside is not implemented")


def _largest_piece(groups: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    places = groups.detach().argmax(dim, keepdim=True)
    return groups.gather(dim, places).squeeze(dim), places


class _Maxout(torch.autograd.Function):
    r"""The gradient of each maximum goes to the piece that it is."""

    generate_vmap_rule = True

    @staticmethod
    def forward(groups: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        return _largest_piece(groups, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        groups, ctx.dim = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.pieces = groups.shape[ctx.dim]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        grad = grad.unsqueeze(ctx.dim)
        shape = (*grad.shape[: ctx.dim], ctx.pieces, *grad.shape[ctx.dim + 1 :])
        return grad.new_zeros(shape).scatter(ctx.dim, places, grad), None
