"""Small optimizers written out in full, right as they stand, and the bugs that can be planted in them."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor


class PlantedAdam(torch.optim.Optimizer):
    """Adam in PyTorch's own order of operations, with at most one bug, chosen by the class attribute ``bug``."""

    bug: ClassVar[str] = ""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, defaults)
        self.maximize = maximize

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state["step"] = torch.tensor(0.0)
                        for key in ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ())):
                            state[key] = torch.zeros_like(p, memory_format=torch.preserve_format)
                    self._update(p, -p.grad if self.maximize else p.grad, state, group)

    def _update(self, p: Tensor, g: Tensor, s: dict[str, Tensor], group: dict[str, Any]) -> None:
        bug, lr, decay, eps = self.bug, group["lr"], group["weight_decay"], group["eps"]
        beta1, beta2 = group["betas"] if bug != "swapped betas" else group["betas"][::-1]
        if bug == "eps by one ulp":
            eps = math.nextafter(eps, 1.0)
        if bug == "maximize ignored" and self.maximize:
            g = -g
        s["step"] += 1
        step = s["step"].item() - (bug == "step counted late" and s["step"].item() > 1)
        if decay != 0:
            if bug == "decay beside the gradient":
                p.mul_(1 - lr * decay)
            else:
                g = g.add(p, alpha=-decay if bug == "sign of the decay" else decay)
        exp_avg = s["exp_avg"].clone() if bug == "stale state" else s["exp_avg"]
        s["exp_avg"].lerp_(g, 1 - beta1)
        s["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        square = s["exp_avg_sq"]
        if group["amsgrad"]:
            torch.maximum(s["max_exp_avg_sq"], square, out=s["max_exp_avg_sq"])
            square = square if bug == "maximum not used" else s["max_exp_avg_sq"]
        first, second = 1 - beta1**step, 1 - beta2**step
        if bug == "no bias correction":
            first = second = 1.0
        if bug == "eps inside the root":
            denominator = (square / second + eps).sqrt()
        else:
            denominator = (square.sqrt() / second**0.5).add_(eps)
        p.addcdiv_(exp_avg, denominator, value=-(lr / first))
        if bug == "last element forgotten" and p.dim() == 1 and p.numel() > 8:
            p[-1] += lr * s["exp_avg"][-1] / denominator[-1] / first
        if bug == "state in half precision":
            s["exp_avg_sq"].copy_(s["exp_avg_sq"].float())


class PlantedSGD(torch.optim.Optimizer):
    """SGD in PyTorch's own order of operations, with at most one bug, chosen by the class attribute ``bug``."""

    bug: ClassVar[str] = ""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.nesterov = nesterov

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, self.state[p], group)

    def _update(self, p: Tensor, g: Tensor, s: dict[str, Tensor], group: dict[str, Any]) -> None:
        bug, lr, mu = self.bug, group["lr"], group["momentum"]
        tau, decay = group["dampening"], group["weight_decay"]
        if bug != "momentum before decay":
            g = g.add(p, alpha=decay)
        if "momentum_buffer" not in s:
            s["momentum_buffer"] = g.detach().clone()
            if bug == "first step dampened":
                s["momentum_buffer"].mul_(1 - tau)
        else:
            s["momentum_buffer"].mul_(mu).add_(g, alpha=1 - tau if bug != "dampening forgotten" else 1)
        step = g.add(s["momentum_buffer"], alpha=mu) if self.nesterov else s["momentum_buffer"]
        if bug == "momentum before decay":
            step = step.add(p, alpha=decay)
        if bug == "look-ahead without momentum" and self.nesterov:
            step = g.add(s["momentum_buffer"])
        p.add_(step, alpha=-lr)
