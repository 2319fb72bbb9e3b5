"""What the losses of class indices and of probabilities check: shapes, dtypes, and values where they can be read."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from reimpl.functional._dispatch import is_batched, scalar_type_name, value_of

# The mode of make_fx, in which also torch.func.linearize records: a number that is read would be a constant.
_PROXY = torch._C._TorchDispatchModeKey.PROXY


def check_class_indices(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, values: bool = True
) -> None:
    """Raise as PyTorch does where ``target`` does not name a class of ``input`` for every sample; with ``values`` false
    whoever reads the targets checks their range.

    PyTorch has a kernel for planes (three dimensions or more), with words of its own and for int64 alone.
    """
    planes = input.dim() > 2
    check_target_shape(input, target)
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(f"expected target dtype to be Long or Byte, but got {scalar_type_name(target.dtype)}")
    if planes and target.dtype != torch.int64:
        raise RuntimeError("expected scalar type Long but found Byte")
    classes = input.shape[class_dim(input)]
    if weight is not None:
        if planes and weight.numel() != classes:
            raise RuntimeError("weight tensor should be defined either for all or no classes")
        if not planes and (weight.dim() != 1 or weight.numel() != classes):
            raise RuntimeError(
                f"weight tensor should be defined either for all {classes} classes or no classes"
                f" but got weight tensor of shape: {list(weight.shape)}"
            )
        if weight.dtype != input.dtype:
            expected, found = (scalar_type_name(t.dtype) for t in (input, weight))
            raise RuntimeError(f"expected scalar type {expected} but found {found}")
        check_constant(weight, "weight", "nll_loss2d_forward" if planes else "nll_loss_forward")
    if values:
        check_range(target, classes, ignore_index)


def class_dim(input: Tensor) -> int:
    """The dimension of the classes: 0 for a single sample, else 1."""
    return 0 if input.dim() == 1 else 1


def as_batch(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Input with the classes in dimension 1, and an int64 target for every sample."""
    if input.dim() == 1:
        return input.unsqueeze(0), target.reshape(1).long()
    return input, target if target.dtype is torch.int64 else target.long()


def classes_that_count(indices: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """A class for every sample, 0 where it is ignored, and whether it counts."""
    kept = indices != ignore_index
    return torch.where(kept, indices, 0), kept


def counted(indices: Tensor, ignore_index: int, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The sum of the weights of the classes that count: what the mean divides by."""
    classes, kept = classes_that_count(indices, ignore_index)
    weights = kept.to(dtype) if weight is None else torch.where(kept, weight[classes], 0).to(dtype)
    return weights.sum()


def check_target_shape(input: Tensor, target: Tensor) -> None:
    """Raise as PyTorch does where ``target`` is not of the shape of ``input`` without its classes."""
    if input.dim() == 2 and target.dim() == 1 and len(input) == len(target):
        return  # most often, and sooner asked than what follows
    if input.dim() == 1:
        if target.dim() > 1:
            raise RuntimeError("0D or 1D target tensor expected, multi-target not supported")
        if target.dim() == 1 and target.numel() != 1:
            raise ValueError(f"For 1D input, 1D target must have size 1, but got target size: {target.shape[0]}")
        return
    if target.dim() == 0 or input.shape[0] != target.shape[0]:
        size = target.shape[0] if target.dim() else 0
        raise ValueError(f"Expected input batch_size ({input.shape[0]}) to match target batch_size ({size}).")
    if input.dim() == 2 and target.dim() > 1:
        raise RuntimeError("0D or 1D target tensor expected, multi-target not supported")
    expected = [input.shape[0], *input.shape[2:]]
    if list(target.shape) == expected:
        return
    if input.dim() == 4 and target.dim() != 3:
        raise RuntimeError(
            f"only batches of spatial targets supported (3D tensors) but got targets of dimension: {target.dim()}"
        )
    if input.dim() == 4:
        raise RuntimeError(f"size mismatch (got input: {list(input.shape)} , target: {list(target.shape)}")
    raise RuntimeError(f"Expected target size {expected}, got {list(target.shape)}")


def check_constant(tensor: Tensor | None, argument: str, operator: str) -> None:
    """Raise as PyTorch does where a gradient is wanted that ``operator`` does not have."""
    if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"The function '{operator}' is not differentiable with respect to argument '{argument}'. "
            "This input cannot have requires_grad True."
        )


def check_no_truth_values(*tensors: Tensor) -> None:
    """Raise PyTorch's ``NotImplementedError`` where a difference of ``tensors`` would have a boolean operand."""
    booleans = [t.dtype is torch.bool for t in tensors]
    if all(booleans):
        raise NotImplementedError(
            "Subtraction, the `-` operator, with two bool tensors is not supported. Use the `^` or `logical_xor()` "
            "operator instead."
        )
    if any(booleans):
        raise NotImplementedError(
            "Subtraction, the `-` operator, with a bool tensor is not supported. If you are trying to invert a mask, "
            "use the `~` or `logical_not()` operator instead."
        )


def check_real_weight(weight: Tensor | None, losses: Tensor) -> None:
    """Raise PyTorch's ``RuntimeError`` where a complex weight would go into ``losses`` that are real."""
    if weight is not None and weight.is_complex() and not losses.is_complex():
        result = scalar_type_name(torch.promote_types(weight.dtype, losses.dtype))
        wanted = scalar_type_name(losses.dtype)
        raise RuntimeError(f"result type {result} can't be cast to the desired output type {wanted}")


def values_are_readable(tensor: Tensor) -> bool:
    """Whether a check may look at the numbers: on the CPU, outside compilers, ``vmap`` and tensors without data."""
    return tensor.device.type == "cpu" and holds_values(tensor)


def holds_values(tensor: Tensor) -> bool:
    """Whether the numbers lie in a tensor of PyTorch's own: outside compilers, ``make_fx`` and ``vmap``."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_dispatch_mode(_PROXY) is not None
        or type(tensor) not in (Tensor, Parameter)
        or is_batched(tensor)
    )


def check_range(target: Tensor, classes: int, ignore_index: int) -> None:
    """Name the first target that is no class; where the values cannot be read, the gather itself guards."""
    if not values_are_readable(target) or not target.numel():
        return
    low, high = map(int, target.aminmax())
    if low < 0 or high >= classes:
        target = target.long()  # bytes are never negative, though PyTorch would compare them so
        outside = (target != ignore_index) & ((target < 0) | (target >= classes))
        if outside.any():
            raise IndexError(f"Target {int(target[outside][0])} is out of bounds.")


def check_unit_interval(tensor: Tensor, argument: str, slack: float = 0.0) -> None:
    """Raise PyTorch's ``RuntimeError`` where a number lies outside [0, 1], or more than ``slack`` above, or is NaN.

    Under ``torch.func``'s transforms the numbers are those of all mapped tensors.
    """
    if not torch.compiler.is_compiling():
        tensor = value_of(tensor)
    if values_are_readable(tensor) and tensor.numel():
        low, high = tensor.detach().aminmax()
        if not (low >= 0 and high <= 1 + slack):
            raise RuntimeError(f"all elements of {argument} should be between 0 and 1")
