"""The rest of ``torch.optim``'s elementwise optimizers, which the notes do not treat: one row each."""

from __future__ import annotations

import torch

import reimpl.optim
from parity_tests.declarations.optim import _EXACT, DTYPES, _dialect, _shared
from parity_tests.oracle import optim_rest as oracle
from reimpl.testing.declarations import OptimizerTechnique

ADAMAX = OptimizerTechnique(
    name="Adamax",
    ids=("O16", "O10"),
    source="Kingma and Ba (2015), algorithm 2",
    formula=r"u \leftarrow \max(\beta_2 u, |g| + \delta),\quad "
    r"\theta \leftarrow \theta - \varepsilon m / ((1 - \beta_1^t)\, u)",
    ours=reimpl.optim.Adamax,
    torch=torch.optim.Adamax,
    oracle=oracle.adamax,
    dtypes=DTYPES,
    configs=(
        _shared("large eps", lr=0.05, eps=0.25, betas=(0.5, 0.75)),
        _shared("tensor lr, maximize", lr=torch.tensor(0.01, dtype=torch.float64), weight_decay=0.1, maximize=True),
        _dialect("eps beside the maximum", "O16", **_EXACT, eps_inside_max=False),
        _dialect("decoupled_weight_decay", "O10", **_EXACT, decoupled_weight_decay=True),
    ),
)

NADAM = OptimizerTechnique(
    name="NAdam",
    ids=("O16", "O10"),
    source="Dozat (2016)",
    formula=r"\theta \leftarrow \theta - \varepsilon \left(\frac{1 - \mu_t}{1 - \Pi_t} g "
    r"+ \frac{\mu_{t+1}}{1 - \Pi_{t+1}} m\right) / (\sqrt{\hat v} + \delta)",
    ours=reimpl.optim.NAdam,
    torch=torch.optim.NAdam,
    oracle=oracle.nadam,
    dtypes=DTYPES,
    configs=(
        _shared("large eps, fast schedule", lr=0.05, eps=0.25, betas=(0.5, 0.75), momentum_decay=0.5),
        _shared("tensor lr, maximize", lr=torch.tensor(0.01, dtype=torch.float64), weight_decay=0.1, maximize=True),
        _shared("decoupled_weight_decay", lr=0.05, weight_decay=0.1, decoupled_weight_decay=True),
        _shared("Keras's schedule of the momentum", lr=0.05, momentum_decay=1.0),
        _shared("no schedule of the momentum", lr=0.05, momentum_decay=1e6),
    ),
)

RADAM = OptimizerTechnique(
    name="RAdam",
    ids=("O16", "O10"),
    source="Liu et al. (2020), algorithm 2",
    formula=r"\theta \leftarrow \theta - \varepsilon \hat m\, r_t \sqrt{1 - \beta_2^t} / (\sqrt{v} + \delta) "
    r"\text{ if } \rho_t > 5 \text{, else } \theta - \varepsilon \hat m",
    ours=reimpl.optim.RAdam,
    torch=torch.optim.RAdam,
    oracle=oracle.radam,
    dtypes=DTYPES,
    configs=(
        _shared("large eps, rectified early", lr=0.05, eps=0.25, betas=(0.5, 0.9)),
        # 2/(1 - 0.6) - 1 is 4 exactly: the rectification divides by zero, and must not be computed
        _shared("never rectified", lr=0.05, betas=(0.9, 0.6)),
        _shared("tensor lr, maximize", lr=torch.tensor(0.01, dtype=torch.float64), weight_decay=0.1, maximize=True),
        _shared("decoupled_weight_decay", lr=0.05, weight_decay=0.1, decoupled_weight_decay=True),
        _dialect("eps beside the corrected root", "O16", lr=0.0625, eps=0.25, betas=(0.5, 0.875), eps_hat=False),
    ),
)

ASGD = OptimizerTechnique(
    name="ASGD",
    ids=("O16", "O10"),
    source="Polyak and Juditsky (1992)",
    formula=r"\theta \leftarrow (1 - \lambda_0\eta)\theta - \eta g,\quad a \leftarrow a + \mu(\theta - a)",
    ours=reimpl.optim.ASGD,
    torch=torch.optim.ASGD,
    oracle=oracle.asgd,
    magnitude=oracle.asgd_magnitude,
    dtypes=DTYPES,
    configs=(
        _shared("averages from the fourth step on", lr=0.05, lambd=0.1, alpha=0.5, t0=2.0, weight_decay=0.1),
        _shared("tensor lr, maximize", lr=torch.tensor(0.05, dtype=torch.float64), lambd=0.1, t0=3, maximize=True),
    ),
)

RPROP = OptimizerTechnique(
    name="Rprop",
    ids=("O16",),
    source="Riedmiller and Braun (1993)",
    formula=r"\theta \leftarrow \theta - \eta\, \mathrm{sign}(g),\quad "
    r"\eta \leftarrow \eta_{\pm}\eta \text{ where the sign lasts or turns}",
    ours=reimpl.optim.Rprop,
    torch=torch.optim.Rprop,
    oracle=oracle.rprop,
    magnitude=oracle.rprop_magnitude,
    dtypes=DTYPES,
    configs=(
        _shared("narrow bounds", lr=0.05, etas=(0.3, 1.7), step_sizes=(0.02, 0.08)),
        _shared("tensor lr, maximize", lr=torch.tensor(0.01, dtype=torch.float64), maximize=True),
    ),
)

OPTIMIZERS = (ADAMAX, NADAM, RADAM, ASGD, RPROP)
