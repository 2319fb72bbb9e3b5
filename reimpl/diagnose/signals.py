"""``signal_report``: what each layer of any model passes forward and gets back (catalogue D11)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from reimpl.diagnose._plots import finish, new_figure
from reimpl.diagnose._preserve import preserved

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAN = math.nan
_ENOUGH = 8  # examples, below which half of all ReLUs being 0 for each lets many seem dead by chance


@dataclass
class LayerSignal:
    """One call of one layer.

    Attributes:
        name: the layer's name in the model; a second call of the same layer ends in ``#2``.
        kind: its class.
        shape: of its output.
        mean, std: of all numbers of its output.
        spread: how much the output differs from example to example: the root mean square, over the output's numbers,
            of their standard deviation over the batch.
        dead: the share of units that give every example the same; NaN for a batch of fewer than 8.
        gradient: the norm of the loss's gradient with respect to the output; NaN where there is none, infinite where
            a number of it is not finite.
        weight, weight_gradient: the norm of the layer's own parameters and of their gradient; NaN where it has none.
        verdicts: of ``"vanishing"``, ``"exploding"`` and ``"dead"`` those that hold.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    mean: float
    std: float
    spread: float
    dead: float
    gradient: float = NAN
    weight: float = NAN
    weight_gradient: float = NAN
    verdicts: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SignalReport:
    """The layers in the order in which they ran; ``print`` it for a table, or :meth:`plot` it."""

    layers: tuple[LayerSignal, ...]
    input_spread: float

    @property
    def vanishing(self) -> tuple[str, ...]:
        """Layers that the gradient or the signal does not reach."""
        return self._names("vanishing")

    @property
    def exploding(self) -> tuple[str, ...]:
        """Layers where the gradient or the signal is too large, or not finite."""
        return self._names("exploding")

    @property
    def dead(self) -> tuple[str, ...]:
        """Layers most of whose units give every example the same."""
        return self._names("dead")

    @property
    def healthy(self) -> bool:
        """Whether no layer vanishes, explodes or is dead."""
        return not any(layer.verdicts for layer in self.layers)

    def _names(self, verdict: str) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers if verdict in layer.verdicts)

    def __str__(self) -> str:
        head = ("layer", "kind", "output", "mean", "std", "spread", "dead", "|grad|", "|w|", "|grad w|", "")
        rows = [
            (
                layer.name,
                layer.kind,
                "x".join(map(str, layer.shape)),
                *(_short(x) for x in (layer.mean, layer.std, layer.spread)),
                "-" if math.isnan(layer.dead) else f"{layer.dead:.0%}",
                *(_short(x) for x in (layer.gradient, layer.weight, layer.weight_gradient)),
                ", ".join(layer.verdicts),
            )
            for layer in self.layers
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in (head, *rows)]
        for verdict in ("vanishing", "exploding", "dead"):
            names = self._names(verdict)
            if names:
                lines.append(f"{verdict}: {', '.join(names)}")
        return "\n".join([*lines, *(["every layer passes its signal"] if self.healthy else [])])

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draws spread, gradient and dead units through the depth, and writes the figure to ``path`` if given.

        Raises:
            ImportError: matplotlib is not installed.
        """
        figure, (signal, dead) = new_figure(2)
        depth = range(1, len(self.layers) + 1)
        signal.semilogy(depth, [_positive(layer.spread) for layer in self.layers], "o-", label="spread of activations")
        signal.semilogy(depth, [_positive(layer.gradient) for layer in self.layers], "s-", label="norm of gradient")
        signal.set(title="Signal through the depth", xlabel="layer")
        signal.legend()
        dead.bar(depth, [100 * layer.dead for layer in self.layers])
        dead.set(title="Dead units", xlabel="layer", ylabel="%", ylim=(0, 100))
        return finish(figure, path)


def signal_report(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any], Tensor] | None = None,
    *,
    ratio: float = 1e4,
    dead: float = 0.5,
) -> SignalReport:
    r"""Runs a batch through ``model`` and back, and says what each layer's signal was like.

    Looked at are modules without children and modules with parameters of their own. A layer is

    - *vanishing* where its gradient's norm is below that of the last layer with weights by ``ratio``, or its
      activations' spread is below the input's by ``ratio``;
    - *exploding* where it is above by that much, or not finite;
    - *dead* where at least the share ``dead`` of its units give every example the same: ReLUs that are never positive,
      saturated sigmoids, all of a network whose weights are 0.

    Gradients that have been accumulated, training modes, buffers (running statistics), parameters and random number
    generators are afterwards as they were, hooks are removed, also where the model raises.

    Args:
        model: any module, in the mode in which it is to be looked at. Of a compiled one the original is run.
        batch: what it is called with: a tensor, a tuple or list of arguments, or a mapping of keyword arguments.
        loss: a function of the output that returns a scalar. Left out, it is the inner product of the output with
            normal numbers (always the same), or the output itself where that is a scalar.
        ratio: how many times smaller or larger is too much.
        dead: the share of dead units that makes a layer dead.

    Raises:
        TypeError: ``model`` is no module, or ``batch`` holds no tensor.
        ValueError: ``ratio`` is not above 1 or ``dead`` not in (0, 1]; the batch is empty; no layer ran under the
            model's hooks; the loss is no scalar.

    Source: D11 (N1, N2 §8.2.5, N4).
    """
    if not ratio > 1:
        raise ValueError(f"ratio must be above 1, got {ratio}")
    if not 0 < dead <= 1:
        raise ValueError(f"dead must lie in (0, 1], got {dead}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    tensors = list(_tensors(batch))
    if not tensors:
        raise TypeError(f"batch must be a tensor, or a tuple, list or mapping with one, got {type(batch).__name__}")
    if not any(x.numel() for x in tensors):
        raise ValueError(f"batch must hold at least one example, got shape {tuple(tensors[0].shape)}")
    model = getattr(model, "_orig_mod", model)
    with preserved(model):
        arguments, keywords = _arguments(batch)
        watch = _Watch(model)
        try:
            output = model(*arguments, **keywords)
        finally:
            watch.remove()  # before the backward pass, in which checkpointed layers run again
        if not watch.layers:
            raise ValueError("no layer of the model ran: its modules must be called, and not be compiled or scripted")
        parameters = [p for p in model.parameters() if p.requires_grad]
        inputs = [x for x in _tensors([arguments, keywords]) if x.requires_grad]
        target = _loss_of(output, loss)
        if target is not None:
            grads = torch.autograd.grad(target, [*parameters, *inputs], allow_unused=True)
            watch.take_weights(dict(zip(parameters, grads)))
    spread = next((_spread(x) for x in _tensors(batch) if x.is_floating_point() and x.dim()), NAN)
    report = SignalReport(tuple(watch.layers), spread)
    _judge(report, ratio, dead)
    return report


class _Watch:
    """Hooks on a model's layers, which note what they put out and what comes back."""

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[LayerSignal] = []
        self.modules: list[nn.Module] = []
        self.calls: dict[str, int] = {}
        self.channels_first = False  # whether the last weight seen was a convolution's
        self.handles: list[RemovableHandle] = [
            module.register_forward_hook(partial(self.note, name or type(model).__name__))
            for name, module in model.named_modules()
            if not any(True for _ in module.children()) or any(True for _ in module.parameters(recurse=False))
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def note(self, name: str, module: nn.Module, _input: Any, output: Any) -> None:
        x = next((x for x in _tensors(output) if x.is_floating_point() and x.numel()), None)
        if x is None or x.layout is not torch.strided:
            return
        dims = max((p.dim() for p in module.parameters(recurse=False)), default=0)
        if dims >= 2:
            self.channels_first = dims >= 3
        self.calls[name] = self.calls.get(name, 0) + 1
        again = f"#{self.calls[name]}" if self.calls[name] > 1 else ""
        value = x.detach().double()
        channel = 1 if x.dim() > 3 or (self.channels_first and x.dim() == 3) else x.dim() - 1
        std = float(value.std(correction=0))
        layer = LayerSignal(
            name + again, type(module).__name__, tuple(x.shape), float(value.mean()), std, _spread(x), _dead(x, channel)
        )
        self.layers.append(layer)
        self.modules.append(module)
        if x.requires_grad:
            x.register_hook(partial(_take_gradient, layer))

    def take_weights(self, grads: Mapping[Tensor, Tensor | None]) -> None:
        for layer, module in zip(self.layers, self.modules):
            own = list(module.parameters(recurse=False))
            seen = [grad for p in own if (grad := grads.get(p)) is not None]
            layer.weight = _norm(own)
            layer.weight_gradient = _norm(seen)


def _take_gradient(layer: LayerSignal, grad: Tensor) -> None:
    """Notes the gradient; of a tensor that two layers return, both do."""
    norm = _norm([grad])
    layer.gradient = norm if math.isfinite(norm) else math.inf


def _judge(report: SignalReport, ratio: float, dead: float) -> None:
    weighted = [x for x in report.layers if x.gradient > 0 and not math.isnan(x.weight) and math.isfinite(x.gradient)]
    last = weighted[-1].gradient if weighted else NAN
    first = next((x.spread for x in report.layers if x.spread > 0), NAN)
    source = report.input_spread if report.input_spread > 0 else first
    for layer in report.layers:
        signals = ((layer.gradient, last), (layer.spread, source))
        not_finite = not (math.isfinite(layer.mean) and math.isfinite(layer.std)) or layer.gradient == math.inf
        if any(value < reference / ratio for value, reference in signals):
            layer.verdicts.append("vanishing")
        if not_finite or any(value > reference * ratio for value, reference in signals):
            layer.verdicts.append("exploding")
        if layer.dead >= dead:
            layer.verdicts.append("dead")


def _arguments(batch: Any) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments, their floating-point tensors copied and with a gradient to come."""
    if isinstance(batch, Mapping):
        return [], {name: _with_gradient(value) for name, value in batch.items()}
    return [_with_gradient(value) for value in (batch if isinstance(batch, (tuple, list)) else [batch])], {}


def _with_gradient(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    # A normal tensor where the caller's is of inference mode; and no leaf, which a layer may not change in place.
    return value.detach().clone().requires_grad_().clone()


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _loss_of(output: Any, loss: Callable[[Any], Tensor] | None) -> Tensor | None:
    """The scalar to differentiate, ``None`` where nothing has a gradient."""
    if loss is not None:
        value: Any = loss(output)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss must return a tensor of one number, got {got}")
        return value.sum() if value.requires_grad else None
    outputs = [x for x in _tensors(output) if x.requires_grad and x.is_floating_point()]
    if len(outputs) == 1 and outputs[0].dim() == 0:
        return outputs[0]
    generator = torch.Generator().manual_seed(0)
    products = [(x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in outputs]
    return torch.stack([p.to(products[0].device, torch.float32) for p in products]).sum() if products else None


def _spread(x: Tensor) -> float:
    value = x.detach().double()
    return float(value.var(0, correction=0).mean().sqrt()) if x.dim() and len(x) > 1 else NAN


def _dead(x: Tensor, channel: int) -> float:
    if x.dim() == 0 or len(x) < _ENOUGH:
        return NAN
    same = (x == x[:1]).all(0)
    if x.dim() > 1:
        same = same.movedim(channel - 1, 0).reshape(x.shape[channel], -1).all(1)
    return float(same.double().mean())


def _norm(tensors: Sequence[Tensor]) -> float:
    """The Euclidean norm of all numbers together, NaN of none."""
    return math.sqrt(sum(float(x.detach().double().square().sum()) for x in tensors)) if tensors else NAN


def _positive(value: float) -> float:
    return value if value > 0 else NAN  # a logarithmic axis has no 0


def _short(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"
