"""What a technique declares about itself; tests, report and documentation tables are made from these rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

REAL_DTYPES: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16)
COMPLEX_DTYPES: tuple[torch.dtype, ...] = (torch.complex128, torch.complex64)

Array = np.ndarray[Any, np.dtype[Any]]
Vjp = Callable[[Array], Sequence[Array | None]]
Dtypes = tuple[torch.dtype, ...]  # an alias, because the field ``torch`` hides the module inside the class body


@dataclass(frozen=True)
class Technique:
    """One row: a technique of the catalogue, our code, PyTorch's and the oracle.

    Args:
        name: public name under its namespace, e.g. ``"Adam"`` or ``"softmax"``.
        ids: catalogue ids that the row covers, e.g. ``("O9", "O9b")``.
        source: where the formula stands: note and equation, paper, or both.
        formula: the definition in one line of LaTeX, without dollar signs.
        ours: our class or function.
        torch: PyTorch's counterpart, or ``None`` where PyTorch has none.
        oracle: the same computation in NumPy alone, in the dtype of the arrays it is given.
        dtypes: dtypes that the generic tests run.
    """

    name: str
    ids: tuple[str, ...]
    source: str
    formula: str
    ours: Callable[..., Any]
    torch: Callable[..., Any] | None
    oracle: Callable[..., Any]
    dtypes: Dtypes = REAL_DTYPES


@dataclass(frozen=True)
class OptimizerConfig:
    """One configuration of an optimizer.

    ``kwargs`` go to our class. ``torch_kwargs`` go to PyTorch's: ``None`` says that PyTorch has no such dialect,
    and the case is then held against the oracle alone. ``oracle_kwargs`` are the oracle's (default: ``kwargs``).
    """

    desc: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    torch_kwargs: Mapping[str, Any] | None = None
    oracle_kwargs: Mapping[str, Any] | None = None
    id: str | None = None
    note: str = ""


@dataclass(frozen=True)
class OptimizerTechnique(Technique):
    """An optimizer. ``oracle(param, grads, **hyperparameters) -> (param, state)`` runs all of ``grads`` in order.

    ``state`` maps the optimizer's own state keys (``exp_avg``, ...) to arrays. ``configs`` holds the dialects and
    whatever PyTorch's own database of inputs does not have; the database's inputs are added by the generic tests.
    The oracle also takes ``state=None``, an earlier state to go on from. ``magnitude`` works like the oracle and gives
    the scale of the numbers added up; by default it is the oracle on absolute values with ``lr`` negated. Where either
    takes ``machine_eps``, it gets that of the dtype under test.

    ``implementations`` are the ways of running that the class has, ``takes_shape`` tells the shapes of parameters that
    it takes (default: all), ``only_sparse`` says that every gradient must be sparse.
    """

    configs: tuple[OptimizerConfig, ...] = ()
    supports_sparse: bool = False
    supports_complex: bool = True
    supports_capturable: bool = True
    torch_fused: bool = False
    implementations: tuple[str, ...] = ("forloop", "foreach", "fused", "differentiable")
    takes_shape: Callable[[tuple[int, ...]], bool] | None = None
    only_sparse: bool = False
    magnitude: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Sample:
    """Inputs of one call: ``args`` and ``kwargs`` as our function takes them, and a short description.

    Floating-point tensors among ``args`` and ``kwargs`` that have ``requires_grad`` are differentiated.
    ``torch_kwargs`` replaces ``kwargs`` for PyTorch's function where the names differ.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    desc: str = ""
    torch_kwargs: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class FunctionTechnique(Technique):
    """A layer or loss. ``oracle(*args, **kwargs) -> (output, vjp)`` on arrays.

    ``vjp(grad_output)`` returns the gradients in the order of ``args`` (``None`` where there is none).
    ``samples(device, dtype, generator)`` yields the calls. ``magnitude`` works like the oracle and gives the scale,
    element by element, of the numbers that were added up; by default it is the oracle itself on absolute values.
    ``module`` is our ``nn`` class and ``torch_module`` PyTorch's, where there are any. ``composition`` is the same out
    of PyTorch's own pieces, where PyTorch has no such function: derivatives are held against it. A function that is
    ``random`` is held against PyTorch's bits for the same seed where its result depends on chance.
    """

    samples: Callable[[torch.device, torch.dtype, torch.Generator], Iterable[Sample]] | None = None
    magnitude: Callable[..., Any] | None = None
    module: type | None = None
    torch_module: type | None = None
    composition: Callable[..., Any] | None = None
    differentiable: bool = True
    random: bool = False
    forbidden: tuple[str, ...] = ()


@dataclass(frozen=True)
class InitTechnique(Technique):
    """An initialisation. ``oracle(shape, **kwargs) -> dict`` with ``mean``, ``std``, ``low``, ``high``, ``kind``.

    ``kind`` names the distribution: ``"normal"``, ``"uniform"``, ``"constant"``, ... Where ``torch`` is given, the same
    generator and seed must give the same bits, for each of the ``shapes``.
    """

    shapes: tuple[tuple[int, ...], ...] = ((64, 32), (16, 8, 3, 3), (5, 7, 3), (1, 1), (3, 2, 2, 2, 2))
    kwargs: tuple[Mapping[str, Any], ...] = ({},)
