"""The walk over a model that :func:`reimpl.init.apply` is: which parameter gets which rule and which facts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import Module

from reimpl.init._activations import LINEAR, PRELU_SLOPE, Activation, named
from reimpl.init._kinds import AFFINE, ATTENTION, EMBEDDINGS, LSTMS, NORMS, RECURRENT, is_a
from reimpl.init._modules import leaves, own_names, parameters_behind, rewrite
from reimpl.init._rules import draw, label, needs_activation, takes
from reimpl.init._table import LEFT, Initialisation, Initialised
from reimpl.init.biases import lstm_forget_bias_
from reimpl.init.gain import Fans, layer_fans
from reimpl.init.scaled import xavier_normal_
from reimpl.init.simple import constant_, ones_, zeros_

Filler = Callable[..., Any]


@dataclass
class Job:
    """One call of :func:`reimpl.init.apply`."""

    weight: Filler
    recurrent: Filler
    embedding: Filler
    bias: Filler | None
    forget_bias: float
    activations: Mapping[str, Activation]
    overrides: Mapping[str, Filler]
    generator: Generator | None
    rows: list[Initialised] = field(default_factory=list)
    first_use: dict[int, str] = field(default_factory=dict)

    def run(self, model: Module) -> Initialisation:
        """Fill every parameter of the model that is known or overridden.

        Raises:
            ValueError: an override that matches no parameter.
        """
        everything = [(_join(prefix, name), module, name) for prefix, module in model.named_modules()
                      if not prefix.endswith("parametrizations") and ".parametrizations." not in f".{prefix}."
                      for name in own_names(module)]  # fmt: skip
        for pattern in self.overrides:
            if not any(fnmatchcase(full, pattern) for full, _, _ in everything):
                raise ValueError(f"overrides has the pattern {pattern!r}, which matches no parameter")
        for prefix, module in leaves(model):
            self._layer(prefix, module)
        seen = {row.parameter for row in self.rows}
        for full, module, name in everything:
            if full not in seen:
                self._fill(full, module, name, None)
        return Initialisation(tuple(self.rows))

    def _layer(self, prefix: str, module: Module) -> None:
        fill = partial(self._named, prefix, module)
        if is_a(module, AFFINE):
            fans, activation = layer_fans(module), self.activations.get(prefix, LINEAR)
            fill("weight", self.weight, activation=activation, fans=fans, groups=getattr(module, "groups", 1))
            fill("bias", self.bias, fans=fans)
        elif is_a(module, NORMS):
            fill("weight", ones_)
            fill("bias", zeros_)
            reset = getattr(module, "reset_running_stats", None)
            if callable(reset):
                reset()
        elif is_a(module, EMBEDDINGS):
            fill("weight", self.embedding, zero_row=module.padding_idx)
        elif is_a(module, RECURRENT):
            self._recurrent(fill, module)
        elif is_a(module, ATTENTION):
            _attention(fill, self.weight, self.bias, module)
        elif is_a(module, ("PReLU",)):
            fill("weight", partial(constant_, val=PRELU_SLOPE))

    def _recurrent(self, fill: Callable[..., None], module: Module) -> None:
        hidden = module.hidden_size
        assert isinstance(hidden, int)
        nonlinearity = getattr(module, "nonlinearity", None) or getattr(module, "mode", "").lower().removeprefix("rnn_")
        activation = named(nonlinearity) if nonlinearity in ("tanh", "relu") else LINEAR
        for name in own_names(module):
            kind = name.split("_l")[0]
            weight = getattr(module, name)
            if kind.startswith("bias"):
                forget = (self.forget_bias if kind == "bias_ih" else 0.0) if is_a(module, LSTMS) else None
                fill(name, self.bias, forget=forget)
            elif kind == "weight_hr":
                fill(name, self.weight, fans=(weight.shape[1], weight.shape[0]))
            else:
                facts = {"fans": (weight.shape[1], hidden), "groups": weight.shape[0] // hidden}
                if kind == "weight_ih":
                    fill(name, self.weight, activation=activation, **facts)
                else:
                    fill(name, self.recurrent, **facts)

    def _named(self, prefix: str, module: Module, name: str, function: Filler | None, **facts: Any) -> None:
        if isinstance(getattr(module, name, None), Tensor):
            self._fill(_join(prefix, name), module, name, function, **facts)

    def _fill(
        self,
        full: str,
        module: Module,
        name: str,
        function: Filler | None,
        *,
        activation: Activation = LINEAR,
        fans: Fans | None = None,
        groups: int = 1,
        zero_row: int | None = None,
        forget: float | None = None,
    ) -> None:
        """Fill one parameter, and note it: by its override, else by ``function``, else not at all."""
        shape = tuple(getattr(module, name).shape)
        behind = [id(parameter) for parameter in parameters_behind(module, name)]
        if behind and all(key in self.first_use for key in behind):
            self.rows.append(Initialised(full, shape, f"shared with {self.first_use[behind[0]]}"))
            return
        override = next((rule for pattern, rule in self.overrides.items() if fnmatchcase(full, pattern)), None)
        chosen = override or function
        if chosen is None:
            self.rows.append(Initialised(full, shape, LEFT, std=_std(getattr(module, name))))
            return
        how = label(chosen)

        def fill(tensor: Tensor) -> None:
            draw(chosen, full, tensor, self.generator, activation, fans, groups)
            if override is None and zero_row is not None:
                tensor[zero_row].zero_()
            if override is None and forget is not None:
                lstm_forget_bias_(tensor, forget)

        try:
            rewrite(module, name, fill)
        except Exception as error:
            error.add_note(f"while initialising {full}, shape {shape}, by {how}")
            raise
        if override is None and forget:
            how = f"{how}, forget gate {forget:g}"
        self.first_use.update(dict.fromkeys(behind, full))
        row = Initialised(
            full,
            shape,
            how,
            activation.name if needs_activation(chosen) else "",
            fans if "fans" in takes(chosen) else None,
            _std(getattr(module, name)),
        )
        self.rows.append(row)


def _attention(fill: Callable[..., None], weight: Filler, bias: Filler | None, module: Module) -> None:
    width = module.embed_dim
    fill("in_proj_weight", weight, fans=(width, width), groups=3)
    for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        matrix = getattr(module, name, None)
        if matrix is not None:
            fill(name, weight, fans=(matrix.shape[1], matrix.shape[0]))
    fill("in_proj_bias", bias)
    # The key and value that attention appends, (1, 1, width): on the scale of one projected input.
    fill("bias_k", xavier_normal_)
    fill("bias_v", xavier_normal_)


def _std(tensor: Tensor) -> float:
    if tensor.is_meta or tensor.numel() == 0:
        return float("nan")
    value = tensor.detach()
    return float((value if value.is_complex() or value.dtype is torch.float64 else value.float()).std(correction=0))


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
