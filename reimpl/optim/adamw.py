"""AdamW: Adam with decoupled weight decay (catalogue O10)."""

from __future__ import annotations

import torch
from torch import Tensor

from ._torch import ParamsT, StateDict
from .adam import Adam


class AdamW(Adam):
    r"""``Adam`` whose weight decay shrinks the parameter itself and stays out of both averages.

    .. math::
        \theta \leftarrow (1 - \gamma\lambda)\theta, \qquad \text{then Adam's step}

    For ``SGD`` a penalty and a decay are the same; for Adam they are not, since a penalty's gradient is divided by √v̂.

    Args:
        weight_decay: λ.

    The other arguments and the errors are those of :class:`Adam`.

    Source: O10 (AdamW itself is beyond the notes); Loshchilov and Hutter,
    `Decoupled Weight Decay Regularization <https://arxiv.org/abs/1711.05101>`_ (2019).
    """

    torch_class = torch.optim.AdamW

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-3, betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 1e-2, amsgrad: bool = False, *, maximize: bool = False,
        foreach: bool | None = None, capturable: bool = False, differentiable: bool = False, fused: bool | None = None,
        bias_correction: bool = True, eps_inside_sqrt: bool = False, eps_hat: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, foreach=foreach, maximize=maximize, capturable=capturable,
            differentiable=differentiable, fused=fused, decoupled_weight_decay=True, bias_correction=bias_correction,
            eps_inside_sqrt=eps_inside_sqrt, eps_hat=eps_hat,
        )  # fmt: skip

    def __setstate__(self, state: StateDict) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            # a checkpoint from before the option existed, or of Adam, is stepped as AdamW all the same
            group["decoupled_weight_decay"] = True
