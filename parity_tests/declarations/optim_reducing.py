"""The optimizers that are not elementwise: rules over sparse rows and rules that reduce over a whole tensor."""

from __future__ import annotations

import torch

import reimpl.optim
from parity_tests.declarations.optim import REAL
from parity_tests.oracle import optim_reducing as oracle
from reimpl.testing.declarations import OptimizerConfig, OptimizerTechnique


def _shared(desc: str, **kwargs: object) -> OptimizerConfig:
    """A configuration that PyTorch has as well."""
    return OptimizerConfig(desc, kwargs, torch_kwargs=kwargs)


SPARSE_ADAM = OptimizerTechnique(
    name="SparseAdam",
    ids=("O16",),
    source="beyond the notes; torch.optim.SparseAdam",
    formula=r"\theta_i \leftarrow \theta_i - \varepsilon \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} "
    r"m_i / (\sqrt{v_i} + \delta)\quad\text{where } g_i \text{ is given}",
    ours=reimpl.optim.SparseAdam,
    torch=torch.optim.SparseAdam,
    oracle=oracle.sparse_adam,
    dtypes=REAL,
    configs=(
        _shared("large eps, maximize", lr=0.05, eps=0.25, betas=(0.5, 0.75), maximize=True),
        _shared("tensor lr", lr=torch.tensor(0.01, dtype=torch.float64)),
    ),
    supports_sparse=True,
    supports_complex=False,
    supports_capturable=False,
    implementations=("forloop",),
    takes_shape=lambda shape: len(shape) > 0,
    only_sparse=True,
)

ADAFACTOR = OptimizerTechnique(
    name="Adafactor",
    ids=("O16",),
    source="beyond the notes; torch.optim.Adafactor; Shazeer and Stern (2018)",
    formula=r"\theta \leftarrow (1 - \varepsilon\lambda)\,\theta - \alpha\,U / \max(1, \mathrm{RMS}(U)/d),\quad "
    r"U = g / \sqrt{RC / \overline{R}},\quad "
    r"\alpha = \max(\epsilon_2, \mathrm{RMS}(\theta)) \min(\varepsilon, 1/\sqrt{t})",
    ours=reimpl.optim.Adafactor,
    torch=torch.optim.Adafactor,
    oracle=oracle.adafactor,
    magnitude=oracle.adafactor_magnitude,
    dtypes=REAL,
    configs=(
        _shared("large epsilons, clipping", lr=0.5, eps=(0.1, 0.5), d=1.25, weight_decay=0.1),
        _shared("tensor lr, beta2_decay, maximize", lr=torch.tensor(0.1), beta2_decay=-0.3, maximize=True),
    ),
    supports_complex=False,
    supports_capturable=False,
    implementations=("forloop", "foreach"),
    takes_shape=lambda shape: 0 not in shape,  # PyTorch's divides by the number of elements
)

# Earlier releases of PyTorch do not know the one, and with the other write bfloat16's direction over its momentum.
_OF_LATE = (
    _shared("no nesterov, match_rms_adamw", lr=0.05, nesterov=False, adjust_lr_fn="match_rms_adamw"),
    _shared("spectral_unclamped, three steps", lr=0.05, adjust_lr_fn="spectral_unclamped", ns_steps=3),
)

MUON = OptimizerTechnique(
    name="Muon",
    ids=("O16",),
    source="beyond the notes; torch.optim.Muon; Jordan (2024)",
    formula=r"B \leftarrow \mu B + (1 - \mu) g,\quad "
    r"\theta \leftarrow (1 - \varepsilon\lambda)\,\theta - \varepsilon\, r\, \mathrm{NS}_k(B)",
    ours=reimpl.optim.Muon,
    torch=torch.optim.Muon,
    oracle=oracle.muon,
    magnitude=oracle.muon_magnitude,
    dtypes=REAL,
    configs=(
        *(_OF_LATE if torch.__version__ >= "2.15" else ()),
        _shared("tensor lr, large eps", lr=torch.tensor(0.05), momentum=0.5, eps=1.0, ns_coefficients=(1.5, -0.5, 0.0)),
    ),
    supports_complex=False,
    supports_capturable=False,
    implementations=("forloop",),
    takes_shape=lambda shape: len(shape) == 2,
)

OPTIMIZERS = (SPARSE_ADAM, ADAFACTOR, MUON)
