"""Batch normalisation as modules."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from reimpl import functional as F
from reimpl import init
from reimpl.functional._dispatch import opmath_dtype
from reimpl.nn._recorded import one_node


class _BatchNorm(Module):
    _version = 2
    __constants__: ClassVar[list[str]] = ["track_running_stats", "momentum", "eps", "num_features", "affine"]
    num_features: int
    eps: float
    momentum: float | None
    affine: bool
    track_running_stats: bool
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
    ) -> None:
        Module.__init__(self)
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats

        def parameter(wanted: bool) -> Parameter | None:
            return Parameter(torch.empty(num_features, device=device, dtype=dtype)) if wanted else None

        def buffer(shape: tuple[int, ...], dtype: Any) -> Tensor | None:
            return torch.zeros(shape, device=device, dtype=dtype) if track_running_stats else None

        self.register_parameter("weight", parameter(affine))
        self.register_parameter("bias", parameter(affine and bias))
        self.register_buffer("running_mean", buffer((num_features,), dtype))
        self.register_buffer("running_var", buffer((num_features,), dtype))
        self.register_buffer("num_batches_tracked", buffer((), torch.long))
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Running mean 0, running variance 1, no batches seen."""
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Running statistics anew, weight 1, bias 0."""
        self.reset_running_stats()
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def _check_input_dim(self, input: Tensor) -> None:
        raise NotImplementedError

    def _average_factor(self) -> float | Tensor:
        """Weight of this batch in the running statistics, after counting it."""
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                if torch.compiler.is_compiling() and self.running_mean is not None:
                    # a number would break the graph, and be compiled in anew at each step
                    return self.num_batches_tracked.to(opmath_dtype(self.running_mean.dtype)).reciprocal()
                return 1.0 / float(self.num_batches_tracked)
        return 0.0 if self.momentum is None else self.momentum

    def _normalize(self, *args: Any) -> Tensor:
        return F.batch_norm(*args)

    @one_node
    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        factor = self._average_factor()
        use_averages = not self.training or self.track_running_stats
        return self._normalize(
            input,
            self.running_mean if use_averages else None,
            self.running_var if use_averages else None,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            factor,
            self.eps,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"bias={self.bias is not None}, track_running_stats={self.track_running_stats}"
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        version = local_metadata.get("version")
        key = prefix + "num_batches_tracked"
        if (version is None or version < 2) and self.track_running_stats and key not in state_dict:
            # The count came with version 2; a checkpoint without it keeps the module's own.
            count = self.num_batches_tracked
            state_dict[key] = count if count is not None and not count.is_meta else torch.tensor(0, dtype=torch.long)
        Module._load_from_state_dict(self, state_dict, prefix, local_metadata, *args)


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):  # type: ignore[misc]
    r"""Batch normalisation, :func:`reimpl.functional.batch_norm`, of :math:`(N, C)` or :math:`(N, C, L)`.

    Args:
        num_features: :math:`C`.
        eps: added to the variance.
        momentum: weight of a batch in the running statistics; ``None`` for the plain mean over all batches.
        affine: whether there are a weight and (``bias``) a bias.
        track_running_stats: keep running statistics and use them in evaluation.
        device, dtype: of parameters and buffers.
        bias: whether there is a bias beside the weight.

    Source: F10; N0, N1, N2, N4. PyTorch: :class:`torch.nn.BatchNorm1d`.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 3):
            raise ValueError(f"expected 2D or 3D input (got {input.dim()}D input)")


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):  # type: ignore[misc]
    r"""Batch normalisation of :math:`(N, C, H, W)`; arguments as :class:`BatchNorm1d`. PyTorch:
    :class:`torch.nn.BatchNorm2d`."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 4:
            raise ValueError(f"expected 4D input (got {input.dim()}D input)")


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):  # type: ignore[misc]
    r"""Batch normalisation of :math:`(N, C, D, H, W)`; arguments as :class:`BatchNorm1d`. PyTorch:
    :class:`torch.nn.BatchNorm3d`."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 5:
            raise ValueError(f"expected 5D input (got {input.dim()}D input)")


class SyncBatchNorm(_BatchNorm, torch.nn.SyncBatchNorm):  # type: ignore[misc]
    r"""Batch normalisation of :math:`(N, C, *)` by the batches of all processes together.

    In training, where :mod:`torch.distributed` is initialised with more than one process, mean and variance are those
    of the processes' batches joined (:func:`reimpl.functional.sync_batch_norm`); else it is :class:`BatchNorm1d`.
    Unlike PyTorch's it also runs on the CPU.

    Args:
        process_group: the processes that share statistics; ``None`` for all.

    Other arguments as :class:`BatchNorm1d`'s. PyTorch: :class:`torch.nn.SyncBatchNorm`.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
        if input.shape[1] == 0:
            raise ValueError("SyncBatchNorm number of input channels should be non-zero")

    def _normalize(self, *args: Any) -> Tensor:
        distributed = torch.distributed
        if not (self.training and distributed.is_available() and distributed.is_initialized()):
            return super()._normalize(*args)
        group = self.process_group or distributed.group.WORLD
        if distributed.get_world_size(group) < 2:
            return super()._normalize(*args)
        input, running_mean, running_var, weight, bias, _, momentum, eps = args
        return F.sync_batch_norm(input, running_mean, running_var, weight, bias, momentum, eps, group)

    @classmethod
    def convert_sync_batchnorm(cls, module: Module, process_group: Any = None) -> Module:
        """Put a :class:`SyncBatchNorm` with the same parameters in the place of every batch normalisation, ours or
        PyTorch's.

        Args:
            module: a model, changed in place, or itself a batch normalisation.
            process_group: see the class.

        Returns:
            ``module``, or what takes its place.
        """
        if isinstance(module, (_BatchNorm, torch.nn.modules.batchnorm._BatchNorm)):
            return cls._like(module, process_group)
        for name, child in module.named_children():
            module.add_module(name, cls.convert_sync_batchnorm(child, process_group))
        return module

    @classmethod
    def _like(cls, module: Any, process_group: Any) -> SyncBatchNorm:
        options = (module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
        twin = cls(*options, process_group, device="meta", bias=module.bias is not None)
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            setattr(twin, name, getattr(module, name))
        return twin.train(module.training)
