"""The optimizers: one row each, with the notes' dialects; PyTorch's own sample inputs are added by the tests."""

from __future__ import annotations

from typing import Any

import torch

import reimpl.optim
from parity_tests.oracle import optim as oracle
from reimpl.testing.declarations import COMPLEX_DTYPES, REAL_DTYPES, OptimizerConfig, OptimizerTechnique

#: What a parameter may be; an optimizer is tried in float16 too, which the other techniques are not.
REAL = (*REAL_DTYPES, torch.float16)
DTYPES = (*REAL, *COMPLEX_DTYPES)


# A dialect has no error of PyTorch's beside it, only the limit of 4 ulp. So its decays and rates are such that 1 - βᵗ,
# which loses digits for a β near 1, and 1 - γλ, which is rounded to the parameter's dtype, are exact.
_EXACT: dict[str, Any] = {"lr": 0.0625, "betas": (0.5, 0.75), "eps": 0.25, "weight_decay": 0.125}
_DECOUPLED: dict[str, Any] = {"weight_decay": 0.125, "decoupled_weight_decay": True}


def _shared(desc: str, **kwargs: object) -> OptimizerConfig:
    """A configuration that PyTorch has as well."""
    return OptimizerConfig(desc, kwargs, torch_kwargs=kwargs)


def _dialect(desc: str, id: str, note: str = "", **kwargs: object) -> OptimizerConfig:
    """A configuration that PyTorch lacks: held against the oracle alone."""
    return OptimizerConfig(desc, kwargs, id=id, note=note)


SGD = OptimizerTechnique(
    name="SGD",
    ids=("O1", "O2", "O2t", "O3", "O5", "O10"),
    source="N0 eq. 4.49; N1 (1), (2), (5); N2 alg. 8.1, 8.2; N3; N4",
    formula=r"b \leftarrow \mu b + (1 - \tau) g,\quad \theta \leftarrow \theta - \varepsilon b",
    ours=reimpl.optim.SGD,
    torch=torch.optim.SGD,
    oracle=oracle.sgd,
    dtypes=DTYPES,
    configs=(
        _shared("nesterov, maximize", lr=0.05, momentum=0.8, nesterov=True, maximize=True),
        _shared("tensor lr, momentum", lr=torch.tensor(0.01, dtype=torch.float64), momentum=0.9),
        _dialect("velocity", "O2", lr=0.05, momentum=0.9, momentum_form="velocity"),
        _dialect("velocity, nesterov", "O5", lr=0.05, momentum=0.9, nesterov=True, momentum_form="velocity"),
        _dialect(
            "velocity, weight_decay, maximize",
            "O2",
            lr=0.05,
            momentum=0.5,
            weight_decay=0.1,
            maximize=True,
            momentum_form="velocity",
        ),
        _dialect("ewa", "O3", lr=0.05, momentum=0.9, momentum_form="ewa"),
        _dialect("ewa, bias_correction", "O3", lr=0.05, momentum=0.9, momentum_form="ewa", bias_correction=True),
        _dialect(
            "ewa, bias_correction, weight_decay",
            "O3",
            lr=0.05,
            momentum=0.9,
            weight_decay=0.1,
            momentum_form="ewa",
            bias_correction=True,
        ),
        _dialect("decoupled_weight_decay", "O10", lr=0.0625, momentum=0.9, **_DECOUPLED),
    ),
    supports_sparse=True,
    supports_capturable=False,
    torch_fused=True,
)

ADAGRAD = OptimizerTechnique(
    name="Adagrad",
    ids=("O6", "O6i", "O10"),
    source="N0 eq. 4.56; N1; N2 alg. 8.4",
    formula=r"r \leftarrow r + g^2,\quad \theta \leftarrow \theta - \varepsilon g / (\sqrt{r} + \delta)",
    ours=reimpl.optim.Adagrad,
    torch=torch.optim.Adagrad,
    oracle=oracle.adagrad,
    dtypes=DTYPES,
    configs=(
        _shared("large eps", lr=0.05, eps=0.25, lr_decay=0.1),
        _dialect("eps_inside_sqrt", "O6i", lr=0.05, eps_inside_sqrt=True),
        _dialect("eps_inside_sqrt, large eps", "O6i", lr=0.05, eps=0.25, eps_inside_sqrt=True),
        _dialect(
            "eps_inside_sqrt, lr_decay, weight_decay",
            "O6i",
            lr=0.1,
            lr_decay=0.5,
            weight_decay=0.1,
            initial_accumulator_value=0.1,
            eps_inside_sqrt=True,
        ),
        _dialect("decoupled_weight_decay", "O10", lr=0.0625, **_DECOUPLED),
    ),
    supports_sparse=True,
    supports_capturable=False,
    torch_fused=True,
)

ADADELTA = OptimizerTechnique(
    name="Adadelta",
    ids=("O7", "O10"),
    source="N0 eq. 4.59-4.66; N2",
    formula=r"\Delta = -\frac{\mathrm{RMS}[\Delta]_{t-1}}{\mathrm{RMS}[g]_t} \odot g,\quad "
    r"\theta \leftarrow \theta + \Delta,\quad \mathrm{RMS}[x] = \sqrt{\mathrm{E}[x^2] + \delta}",
    ours=reimpl.optim.Adadelta,
    torch=torch.optim.Adadelta,
    oracle=oracle.adadelta,
    dtypes=DTYPES,
    configs=(
        _shared("large eps", eps=0.25, lr=0.5),
        _shared("tensor lr, maximize", lr=torch.tensor(0.1, dtype=torch.float64), maximize=True),
        _dialect("decoupled_weight_decay", "O10", lr=0.5, rho=0.5, eps=0.25, **_DECOUPLED),
    ),
)

RMSPROP = OptimizerTechnique(
    name="RMSprop",
    ids=("O8", "O8i", "O8m", "O10"),
    source="N0 eq. 4.68; N1; N2 alg. 8.5, §8.5.4; N4",
    formula=r"r \leftarrow \rho r + (1 - \rho) g^2,\quad "
    r"\theta \leftarrow \theta - \varepsilon g / (\sqrt{r} + \delta)",
    ours=reimpl.optim.RMSprop,
    torch=torch.optim.RMSprop,
    oracle=oracle.rmsprop,
    dtypes=DTYPES,
    configs=(
        _shared("large eps, momentum", lr=0.05, eps=0.25, momentum=0.9),
        _shared("tensor lr, centered", lr=torch.tensor(0.01, dtype=torch.float64), centered=True),
        _dialect("eps_inside_sqrt", "O8i", alpha=0.9, eps_inside_sqrt=True),
        _dialect("eps_inside_sqrt, large eps", "O8i", alpha=0.9, eps=0.25, weight_decay=0.1, eps_inside_sqrt=True),
        _dialect("eps_inside_sqrt, centered", "O8i", centered=True, momentum=0.9, eps_inside_sqrt=True),
        _dialect("velocity", "O8m", momentum=0.9, momentum_form="velocity"),
        _dialect("velocity, nesterov", "O8m", momentum=0.9, momentum_form="velocity", nesterov=True),
        _dialect("torch form, nesterov", "O8m", momentum=0.9, nesterov=True),
        _dialect(
            "velocity, eps_inside_sqrt, weight_decay, maximize",
            "O8m",
            momentum=0.5,
            momentum_form="velocity",
            eps_inside_sqrt=True,
            weight_decay=0.1,
            maximize=True,
        ),
        _dialect("average from ones", "O8", alpha=0.9, initial_accumulator_value=1.0),
        _dialect(
            "TensorFlow 1",
            "O8m",
            alpha=0.9,
            eps=0.25,
            momentum=0.9,
            centered=True,
            eps_inside_sqrt=True,
            momentum_form="velocity",
            initial_accumulator_value=1.0,
        ),
        _dialect("decoupled_weight_decay", "O10", lr=0.0625, momentum=0.5, **_DECOUPLED),
    ),
)

_ADAM_CONFIGS = (
    _shared("large eps", lr=0.05, eps=0.25, betas=(0.5, 0.75)),
    _shared("tensor lr, amsgrad", lr=torch.tensor(0.01, dtype=torch.float64), amsgrad=True, weight_decay=0.1),
    _dialect("no bias correction", "O9b", bias_correction=False),
    _dialect("no bias correction, amsgrad", "O9b", bias_correction=False, amsgrad=True, weight_decay=0.1),
    _dialect("eps_hat", "O9", **_EXACT, eps_hat=True),
    _dialect("eps_inside_sqrt", "O9", **_EXACT, eps_inside_sqrt=True),
)

ADAM = OptimizerTechnique(
    name="Adam",
    ids=("O9", "O9b", "O10"),
    source="N0 eq. 4.69-4.77; N1; N2; N4",
    formula=r"m \leftarrow \beta_1 m + (1 - \beta_1) g,\quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2,\quad "
    r"\theta \leftarrow \theta - \varepsilon \hat m / (\sqrt{\hat v} + \delta)",
    ours=reimpl.optim.Adam,
    torch=torch.optim.Adam,
    oracle=oracle.adam,
    dtypes=DTYPES,
    configs=(
        *_ADAM_CONFIGS,
        _shared("decoupled_weight_decay", weight_decay=0.1, decoupled_weight_decay=True),
        _dialect("eps_inside_sqrt, no bias correction", "O9b", **_EXACT, eps_inside_sqrt=True, bias_correction=False),
        _dialect("eps_inside_sqrt, eps_hat", "O9", **_EXACT, eps_inside_sqrt=True, eps_hat=True),
        _dialect("eps_inside_sqrt, eps_hat, amsgrad", "O9", **_EXACT, eps_inside_sqrt=True, eps_hat=True, amsgrad=True),
    ),
    torch_fused=True,
)

ADAMW = OptimizerTechnique(
    name="AdamW",
    ids=("O10",),
    source="N1 (penalty); N4",
    formula=r"\theta \leftarrow (1 - \varepsilon\lambda)\,\theta - \varepsilon \hat m / (\sqrt{\hat v} + \delta)",
    ours=reimpl.optim.AdamW,
    torch=torch.optim.AdamW,
    oracle=oracle.adamw,
    dtypes=DTYPES,
    configs=_ADAM_CONFIGS,
    torch_fused=True,
)

OPTIMIZERS = (SGD, ADAGRAD, ADADELTA, RMSPROP, ADAM, ADAMW)
