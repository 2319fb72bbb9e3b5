"""``torch.optim.swa_utils``: averages of weights over training as own code (catalogue O14); ``SWALR`` is PyTorch's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim.swa_utils import SWALR
from torch.utils._foreach_utils import _get_foreach_kernels_supported_devices, _group_tensors_by_device_and_dtype

REIMPLEMENTED = (
    "AveragedModel",
    "get_ema_avg_fn",
    "get_ema_multi_avg_fn",
    "get_swa_avg_fn",
    "get_swa_multi_avg_fn",
    "update_bn",
)

__all__ = ["SWALR", *REIMPLEMENTED]

Tensors = tuple[Tensor, ...] | list[Tensor]
Average = Callable[[Tensor, Tensor, Tensor | int], Tensor]
MultiAverage = Callable[[Tensors, Tensors, Tensor | int], None]


def get_ema_multi_avg_fn(decay: float = 0.999) -> MultiAverage:
    r"""The moving average, over all tensors at once.

    .. math:: \bar\theta \leftarrow \alpha \bar\theta + (1 - \alpha) \theta

    Args:
        decay: α, in [0, 1]; the average spans about 1/(1 - α) updates.

    Returns:
        ``f(averaged, current, num_averaged)``, which changes the first list in place.

    Raises:
        ValueError: ``decay`` outside [0, 1].

    Source: O14 (N2 §8.7.3).
    """
    _check_decay(decay)

    @torch.no_grad()
    def update(averaged: Tensors, current: Tensors, num_averaged: Tensor | int) -> None:
        if _interpolates(averaged):
            torch._foreach_lerp_(averaged, current, 1 - decay)
        else:
            for mean, value in zip(averaged, current, strict=True):
                mean.copy_(mean * decay + value * (1 - decay))

    return update


def get_swa_multi_avg_fn() -> MultiAverage:
    r"""Polyak's average, the mean of all so far, over all tensors at once.

    .. math:: \bar\theta_t = \bar\theta_{t-1} - (\bar\theta_{t-1} - \theta_t) / t

    Returns:
        ``f(averaged, current, num_averaged)``, which changes the first list in place; ``num_averaged`` is t - 1.

    Source: O14 (N2 §8.7.3).
    """

    @torch.no_grad()
    def update(averaged: Tensors, current: Tensors, num_averaged: Tensor | int) -> None:
        if _interpolates(averaged):
            weight: Any = 1 / (num_averaged + 1)
            torch._foreach_lerp_(averaged, current, weight)
        else:  # a count of batches among the buffers, say; PyTorch's raises here
            for mean, value in zip(averaged, current, strict=True):
                mean.copy_(mean + (value - mean) / (num_averaged + 1))

    return update


def get_ema_avg_fn(decay: float = 0.999) -> Average:
    """As :func:`get_ema_multi_avg_fn`, for one tensor: ``f(averaged, current, num_averaged)`` returns the new average.

    Raises:
        ValueError: ``decay`` outside [0, 1].
    """
    _check_decay(decay)

    @torch.no_grad()
    def update(averaged: Tensor, current: Tensor, num_averaged: Tensor | int) -> Tensor:
        return decay * averaged + (1 - decay) * current

    return update


def get_swa_avg_fn() -> Average:
    """As :func:`get_swa_multi_avg_fn`, for one tensor: ``f(averaged, current, num_averaged)`` returns the new mean."""

    @torch.no_grad()
    def update(averaged: Tensor, current: Tensor, num_averaged: Tensor | int) -> Tensor:
        return averaged + (current - averaged) / (num_averaged + 1)

    return update


def _check_decay(decay: float) -> None:
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"Invalid decay value {decay} provided. Please provide a value in [0,1] range.")


def _interpolates(tensors: Tensors) -> bool:
    return tensors[0].is_floating_point() or tensors[0].is_complex()  # foreach lerp takes no integers


class AveragedModel(Module):
    r"""A copy of a model whose parameters are averages of the model's over training.

    .. math:: \bar\theta_1 = \theta_1, \qquad \bar\theta_t = \bar\theta_{t-1} - (\bar\theta_{t-1} - \theta_t)/t

    or, with ``multi_avg_fn=get_ema_multi_avg_fn(alpha)``, :math:`\bar\theta_t = \alpha\bar\theta_{t-1} +
    (1 - \alpha)\theta_t`. Buffers are copied, or with ``use_buffers`` averaged too. The count t is in the state dict as
    ``n_averaged``, the copy under ``module.``; the functions are not in it.

    Args:
        model: what is copied.
        device: where the copy lives.
        avg_fn: ``f(averaged, current, num_averaged)`` returning the new average of one tensor.
        multi_avg_fn: the same in place over lists of one device and dtype.
        use_buffers: average buffers as well.

    Raises:
        AssertionError: both functions are given.

    Source: O14 (N2 §8.7.3); ``torch.optim.swa_utils.AveragedModel``.
    """

    n_averaged: Tensor

    def __init__(
        self,
        model: Module,
        device: int | torch.device | None = None,
        avg_fn: Average | None = None,
        multi_avg_fn: MultiAverage | None = None,
        use_buffers: bool = False,
    ) -> None:
        super().__init__()
        if avg_fn is not None and multi_avg_fn is not None:
            raise AssertionError("Only one of avg_fn and multi_avg_fn should be provided")
        self.module = copy.deepcopy(model)
        if device is not None:
            self.module = self.module.to(device)
        self.register_buffer("n_averaged", torch.tensor(0, dtype=torch.long, device=device))
        self.avg_fn = avg_fn
        self.multi_avg_fn = multi_avg_fn
        self.use_buffers = use_buffers

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The averaged copy's output."""
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update_parameters(self, model: Module) -> None:
        """Take the parameters that ``model`` has now into the average; the first call copies them.

        Raises:
            ValueError: the numbers of parameters or buffers differ.
        """
        averaged, current = self._tensors(self.module), self._tensors(model)
        if len(averaged) != len(current):
            raise ValueError(f"expected a model of {len(averaged)} tensors to average, got one of {len(current)}")
        current = [value.to(mean.device) for mean, value in zip(averaged, current, strict=True)]
        if self.n_averaged == 0:
            for mean, value in zip(averaged, current, strict=True):
                mean.copy_(value)
        elif self.avg_fn is not None:
            self._average_each(self.avg_fn, averaged, current)
        else:
            for (device, _), (lists, _) in _group_tensors_by_device_and_dtype([averaged, current]).items():  # type: ignore[list-item]
                self._average_group(device, *lists)
        if not self.use_buffers:
            for mean, value in zip(self.module.buffers(), model.buffers(), strict=True):
                mean.detach().copy_(value.detach())
        self.n_averaged += 1

    def _tensors(self, model: Module) -> list[Tensor]:
        buffers = model.buffers() if self.use_buffers else ()
        return [x.detach() for x in chain(model.parameters(), buffers)]

    def _average_each(self, average: Average, averaged: Tensors, current: Tensors) -> None:
        for mean, value in zip(averaged, current, strict=True):
            mean.copy_(average(mean, value, self.n_averaged.to(mean.device)))

    def _average_group(self, device: torch.device, averaged: Any, current: Any) -> None:
        """The mean of all so far where no function is given: in PyTorch's roundings, which differ by device."""
        if self.multi_avg_fn is not None:
            self.multi_avg_fn(averaged, current, self.n_averaged.to(device))
        elif device.type in _get_foreach_kernels_supported_devices():
            get_swa_multi_avg_fn()(averaged, current, self.n_averaged.to(device))
        else:
            self._average_each(get_swa_avg_fn(), averaged, current)


@torch.no_grad()
def update_bn(loader: Iterable[Any], model: Module, device: int | torch.device | None = None) -> None:
    """Set the running statistics of a model's batch normalisation to those of one pass over ``loader``.

    An average of weights is a model that no batch has been through, so that its statistics must be taken anew. Each is
    the plain mean over all batches; momenta and the training mode are afterwards as they were. Batch normalisation of
    PyTorch's and of ``reimpl.nn`` is found; a model without any is left alone.

    Args:
        loader: batches, tensors or lists or tuples whose first element is the model's input.
        model: what they run through.
        device: where each is moved to first.

    Source: O14; ``torch.optim.swa_utils.update_bn``.
    """
    from reimpl.nn.batchnorm import _BatchNorm  # here, so that optimizers alone import no layers

    kinds = (torch.nn.modules.batchnorm._BatchNorm, _BatchNorm)
    momenta = {module: module.momentum for module in model.modules() if isinstance(module, kinds)}
    if not momenta:
        return
    was_training = model.training
    model.train()
    for module in momenta:
        module.reset_running_stats()
        module.momentum = None
    try:
        for batch in loader:
            batch = batch[0] if isinstance(batch, (list, tuple)) else batch
            model(batch if device is None else batch.to(device))
    finally:
        for module, momentum in momenta.items():
            module.momentum = momentum
        model.train(was_training)
