"""What the optimizer tests share: techniques and configurations as parameters, and failures collected over a loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from parity_tests.declarations import OPTIMIZERS
from reimpl.testing.declarations import OptimizerConfig, OptimizerTechnique
from reimpl.testing.optimizer_cases import flags_of
from reimpl.testing.optimizers import clone_params, construct
from reimpl.testing.torch_database import optimizer_inputs

EVERY_TECHNIQUE = [pytest.param(technique, id=technique.name) for technique in OPTIMIZERS]
#: The elementwise ones, which take any parameter and have every implementation.
TECHNIQUES = [param for param in EVERY_TECHNIQUE if "fused" in param.values[0].implementations]


def dtype_id(value: object) -> str | None:
    """``float32`` rather than ``torch.float32`` as a test's id."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def pytorch_configs(technique: OptimizerTechnique, device: torch.device, dtype: torch.dtype) -> list[OptimizerConfig]:
    """What PyTorch can do too: its own database's inputs, and the declared configurations that it shares."""
    own = [config for config in technique.configs if config.torch_kwargs is not None]
    return [*optimizer_inputs(technique.name, device, dtype), *own]


def dialect_configs(technique: OptimizerTechnique) -> list[OptimizerConfig]:
    """The configurations that PyTorch lacks."""
    return [config for config in technique.configs if config.torch_kwargs is None]


def all_configs(technique: OptimizerTechnique, device: torch.device, dtype: torch.dtype) -> list[OptimizerConfig]:
    """Every configuration."""
    return [*pytorch_configs(technique, device, dtype), *dialect_configs(technique)]


def skip_unless_it_runs(technique: OptimizerTechnique, implementation: str, dtype: torch.dtype = torch.float64) -> None:
    """Skip a test of an implementation or a dtype that the technique does not have."""
    if implementation not in ("default", *technique.implementations):
        pytest.skip(f"{technique.name} has no {implementation} implementation")
    if dtype not in technique.dtypes:
        pytest.skip(f"{technique.name} does not take {dtype}")


def is_refused(
    technique: OptimizerTechnique, config: OptimizerConfig, implementation: str, reference: Callable[..., Any]
) -> bool:
    """Whether ``reference`` refuses these arguments; if so, ours must refuse them in the same words.

    PyTorch's Adam takes no learning-rate tensor with ``foreach`` unless ``capturable``.
    """
    kwargs = {**config.kwargs, **flags_of(technique, implementation)}
    params = [torch.ones(1, 1, requires_grad=True)]
    try:
        construct(reference, clone_params(params), **kwargs)
    except ValueError as expected:
        with pytest.raises(type(expected)) as caught:
            construct(technique.ours, clone_params(params), **kwargs)
        assert str(caught.value) == str(expected)
        return True
    return False


class Failures:
    """Runs many cases in one test and reports every one that failed, not the first alone."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.ran = 0

    @contextmanager
    def case(self) -> Iterator[None]:
        self.ran += 1
        try:
            yield
        except AssertionError as error:
            self.messages.append(str(error))

    def report(self) -> None:
        """Fail the test if any case failed, or if there was none."""
        assert self.ran, "no case ran"
        if self.messages:
            pytest.fail(f"{len(self.messages)} of {self.ran} cases failed:\n" + "\n".join(self.messages), pytrace=False)


def for_each(cases: Iterable[Any], check: Callable[[Any], None]) -> None:
    """Call ``check`` on every case and fail with all that went wrong."""
    failures = Failures()
    for case in cases:
        with failures.case():
            check(case)
    failures.report()


def ready(p: torch.Tensor, grad: torch.Tensor | None = None) -> torch.Tensor:
    """A parameter with a gradient, over the same memory."""
    p = p.detach()
    if p.is_floating_point():
        p.requires_grad_()
    p.grad = torch.linspace(1, 2, p.numel()).reshape(p.shape).to(p.dtype) if grad is None else grad
    return p


def stepped(optimizer: torch.optim.Optimizer, steps: int = 2) -> torch.optim.Optimizer:
    """The optimizer, after some steps."""
    for _ in range(steps):
        optimizer.step()
    return optimizer
