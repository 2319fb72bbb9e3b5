"""How a public function chooses its execution: autocast casts, Function or plain composition, accumulation dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_SCALAR_TYPE_NAMES = {
    torch.bool: "Bool",
    torch.uint8: "Byte",
    torch.int8: "Char",
    torch.int16: "Short",
    torch.int32: "Int",
    torch.int64: "Long",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.float32: "Float",
    torch.float64: "Double",
    torch.complex32: "ComplexHalf",
    torch.complex64: "ComplexFloat",
    torch.complex128: "ComplexDouble",
}


_OLD_NAMES = ("Byte", "Char", "Short", "Int", "Long", "Half", "Float", "Double")  # of which there are classes
# The layouts in which the channels of a place lie side by side, by the number of dimensions.
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla", "maia")
# asked once, since Dynamo before torch 2.13 cannot trace the question
_AUTOCAST_DEVICES = frozenset(filter(torch.amp.is_autocast_available, _DEVICE_TYPES))


def call(
    function: type[torch.autograd.Function],
    composition: Callable[..., Any],
    *args: Any,
    operator: Callable[..., Any] | None = None,
) -> Any:
    """Run ``function.apply(*args)``, or the differentiable ``composition(*args)`` where a Function would not do.

    Compilers trace the composition: they differentiate and fuse it themselves. Forward mode takes it too: a
    ``jvp`` of an autograd Function stops ``torch.compile(fullgraph=True)``, and one inside another ``jvp`` loses
    the inner tangent without a word, whereas the composition has tangents of every order.

    What no compiler makes good code of comes with an ``operator``, for ``torch.compile`` to put into its graph whole or
    to trace with its own derivative, outside of ``torch.func``'s transforms. An exported program keeps the composition,
    and so needs PyTorch alone.

    A Function with ``results_differ`` has results that depend on the first argument alone beside some that depend on
    all. Where ``vmap`` maps another argument and not the first, its generated rule would add the gradients of the
    former up once for each of the latter.
    """
    if forward_ad._current_level >= 0:
        return composition(*args)
    if torch.compiler.is_compiling():
        whole = operator is not None and not _exporting() and not transforming()
        return operator(*args) if operator is not None and whole else composition(*args)
    if torch._C._get_tracing_state() is not None:  # torch.jit.trace can save no Function of Python's
        return composition(*args)
    if torch._C._are_functorch_transforms_active():
        shared = getattr(function, "results_differ", False) and not _mapped_by(*args) <= _mapped_by(args[0])
        return composition(*args) if shared else _without_views(function).apply(*args)
    return _in_one(function).apply(*args)


@cache
def _in_one(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """``function`` with its ``setup_context`` as a part of ``forward``, which ``torch.func`` alone wants apart.

    Where they are apart, ``apply`` inspects the signature of ``forward`` at each call, 7 µs for one argument.
    """

    run = _without_views(function).forward

    def forward(ctx: Any, *args: Any) -> Any:
        output = run(*args)
        function.setup_context(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    return type(function.__name__, (torch.autograd.Function,), {"__module__": function.__module__, **methods})


@cache
def _without_views(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """``function`` with results that are views of nothing but inputs."""

    def forward(*args: Any) -> Any:
        output = function.forward(*args)
        if isinstance(output, tuple):
            return tuple(in_its_own_right(each, *args) for each in output)
        return in_its_own_right(output, *args)

    return type(function.__name__, (function,), {"__module__": function.__module__, "forward": staticmethod(forward)})


def in_its_own_right(output: Any, *args: Any) -> Any:
    """A result that is a view of what ``forward`` has made, as no view: autograd forbids to change such a one in place.

    Inputs and views of these stay what they are.
    """
    if type(output) is not Tensor:
        return output
    value = value_of(output)
    if not value._is_view() or any(value._base is _base(arg) for arg in args if isinstance(arg, Tensor)):
        return output
    return output.data if value is output else torch.ops.aten._unsafe_view(output, output.shape)


def _mapped_by(*args: Any) -> set[int]:
    """The levels of those ``vmap`` transforms that map over one of the tensors."""
    functorch, levels = torch._C._functorch, set()
    for tensor in args:
        while isinstance(tensor, Tensor) and functorch.is_functorch_wrapped_tensor(tensor):
            if functorch.is_batchedtensor(tensor):
                levels.add(functorch.maybe_get_level(tensor))
            tensor = functorch.get_unwrapped(tensor)
    return levels


def _base(tensor: Tensor) -> Tensor:
    """The tensor whose memory this is a view of, itself if it is no view."""
    value = value_of(tensor)
    return value if value._base is None else value._base


def value_of(tensor: Tensor) -> Tensor:
    """What is inside of the wrappers of ``torch.func``."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def transforming() -> bool:
    """Whether a transform of ``torch.func`` is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _exporting() -> bool:
    """Whether ``torch.export`` is at work; Dynamo of torch 2.11 takes PyTorch's own question for answered with yes."""
    return torch.compiler.is_exporting()


# What torch.compiler.assume_constant_result does, without its import of all of Dynamo: Dynamo calls the functions.
for _asked in (transforming, _exporting):
    _asked._dynamo_marked_constant = True  # type: ignore[attr-defined]


def opmath_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are taken: float32 for the half-width types, else ``dtype`` itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def scalar_type_name(dtype: torch.dtype) -> str:
    """PyTorch's C++ name of a dtype, as its error messages print it."""
    name = str(dtype).removeprefix("torch.")
    return _SCALAR_TYPE_NAMES.get(dtype) or (f"UI{name[2:]}" if name.startswith("uint") else name.capitalize())


def type_text(tensor: Tensor) -> str:
    """PyTorch's name of a tensor's type, as its error messages print it."""
    device, name = tensor.device.type, scalar_type_name(tensor.dtype)
    if device not in ("cpu", "cuda"):
        return name
    return tensor.type() if name in _OLD_NAMES else f"{device.upper()}{name}Type"


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on for tensors of ``device``."""
    # asked of all devices first, which takes a tenth of the time
    if not torch._C._is_any_autocast_enabled():
        return False
    return device.type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device.type)


def autocast_disabled(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which products keep the dtype of their operands."""
    return torch.autocast(device.type, enabled=False) if autocast_enabled(device) else nullcontext()


def autocast_to_lower(input: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Cast floating-point tensors to autocast's dtype (float64 stays), the policy of products."""
    tensors = (input, *others)
    if not autocast_enabled(input.device):
        return tensors
    return tuple(_cast(tensor, torch.get_autocast_dtype(input.device.type)) for tensor in tensors)


def autocast_to_float32(input: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Cast half-width tensors to float32 under autocast, the policy of losses."""
    tensors = (input, *others)
    if not autocast_enabled(input.device):
        return tensors
    return tuple(_cast(tensor, torch.float32) for tensor in tensors)


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def memory_format_of(*tensors: Tensor) -> torch.memory_format:
    """``channels_last`` (of 5-d tensors ``channels_last_3d``) where one of the ``tensors`` is laid out so, else
    ``contiguous_format``.

    Read from the strides, as PyTorch's own suggestion is. Inside ``vmap`` the layout of the tensor that the map
    hides is unknown, and the answer is ``contiguous_format``.
    """
    for tensor in tensors:
        if tensor.dim() in CHANNELS_LAST and _strides_like_channels_last(tensor.shape, tensor.stride()):
            hidden = not torch.compiler.is_compiling() and any(map(is_batched, tensors))
            return torch.contiguous_format if hidden else CHANNELS_LAST[tensor.dim()]
    return torch.contiguous_format


def is_channels_last(tensor: Tensor) -> bool:
    """Whether the numbers lie densely in the layout of channels side by side (which may be the contiguous one too)."""
    layout = CHANNELS_LAST.get(tensor.dim())
    return layout is not None and tensor.is_contiguous(memory_format=layout)


def is_batched(tensor: Tensor) -> bool:
    """Whether ``vmap`` (``torch.func``'s, or the one behind ``is_grads_batched``) maps over ``tensor``."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return functorch.is_legacy_batchedtensor(tensor)


def _strides_like_channels_last(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Strides that grow in the order channels, columns, rows, samples, and are not a contiguous tensor's."""
    if strides[1] == 0:
        return False
    least = 0
    for d in (1, 3, 2, 0) if len(sizes) == 4 else (1, 4, 3, 2, 0):
        size, stride = sizes[d], strides[d]
        if size == 0 or stride < least:
            return False
        # A batch of one, or planes of one element: the strides of the channels decide.
        if d == 0 and least == strides[1]:
            return False
        least = stride * max(size, 1)
    return True
