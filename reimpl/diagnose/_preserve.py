"""A look at a model that leaves no trace: buffers and random numbers are afterwards what they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restores the buffers, the training modes and the random number generators when the block ends, however it ends.

    Inside, gradients are recorded, whatever the caller's mode.
    """
    saved = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    modes = [(module, module.training) for module in model.modules()]
    devices = cuda_devices([*model.parameters(), *model.buffers()])
    try:
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for module, name, buffer, value in saved:
                module._buffers[name] = buffer
                if buffer is not None and value is not None and not torch.equal(buffer, value):
                    buffer.copy_(value)


def cuda_devices(tensors: Iterable[Tensor]) -> list[torch.device]:
    """The CUDA devices that ``tensors`` lie on."""
    return sorted({x.device for x in tensors if x.device.type == "cuda"}, key=str)
