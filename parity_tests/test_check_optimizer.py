"""The checker for other people's optimizers: equal classes pass, planted bugs and PyTorch's own faults are found."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import reimpl.optim
from parity_tests.planted import PlantedAdam, PlantedSGD
from parity_tests.versions import IS_REFERENCE, reference_only
from reimpl.testing import SCENARIOS, OptimizerComparison, assert_optimizers_agree, compare_optimizers, load_optimizer
from reimpl.testing.comparison import VARIANTS
from reimpl.testing.optimizers import OptimizerClass

ROOT = Path(__file__).resolve().parent.parent
WITHOUT_KERNELS = ("forloop", "foreach")  # compiling kernels is test_optim_fused's business


def first(result: OptimizerComparison, scenario: str, implementation: str = "default", dtype: str = "float64") -> Any:
    """The outcome of one case."""
    return next(
        o for o in result.outcomes if (o.scenario, o.implementation, o.dtype) == (scenario, implementation, dtype)
    )


class HazardousSGD(torch.optim.Optimizer):
    """θ ← θ − γb with b ← μb + g, and at most one of the faults that real optimizers have had."""

    fault: ClassVar[str] = ""

    def __init__(self, params: Any, lr: float = 0.1, momentum: float = 0.5, maximize: bool = False) -> None:
        self.used = 0
        super().__init__(params, {"lr": lr, "momentum": momentum, "maximize": maximize})
        self.rate = lr
        self.buffers: dict[Tensor, Tensor] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.fault != "lost by deep copies":
            self.rate, self.buffers, self.used = self.param_groups[0]["lr"], {}, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None and self.fault != "closure ignored":
            with torch.set_grad_enabled(self.fault != "closure without autograd"):
                loss = closure()
        self.used += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)
                elif self.fault == "missing gradient taken for zero" and "b" in self.state[p]:
                    self._update(p, torch.zeros_like(p), group)
                elif self.fault == "missing gradient raises":
                    raise RuntimeError("no gradient")
        return None if self.fault == "loss not returned" else loss

    def _update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        fault, state = self.fault, self.state[p]
        if group["maximize"] and fault != "maximize ignored":
            g = -g
        if fault == "gradient changed":
            p.grad.mul_(2)  # type: ignore[union-attr]
        if fault == "dense gradients only" and g.is_sparse:
            raise RuntimeError("no sparse gradients")
        g = g.to_dense() if g.is_sparse else g
        home = self.buffers if fault == "state outside the state dict" else state
        key = p if fault == "state outside the state dict" else "b"
        if key not in home:
            home[key] = g if fault == "gradient kept as state" else g.clone()
        else:
            home[key] = home[key] * group["momentum"] + g
        rate = self.rate if fault == "rate kept from the start" else group["lr"]
        if fault == "rate of the first group":
            rate = self.param_groups[0]["lr"]
        if fault == "not in place":
            p.data = p - rate * home[key]
        elif fault == "view of the storage" and p.numel():
            flat = torch.as_strided(p, (p.numel(),), (1,), p.storage_offset())
            step = torch.as_strided(home[key], (p.numel(),), (1,), home[key].storage_offset())
            flat.sub_(rate * step)
        elif fault == "whole vectors of eight" and p.dim() == 1 and p.numel() > 8:
            p[: p.numel() // 8 * 8].sub_(rate * home[key][: p.numel() // 8 * 8])
        elif fault == "NaN at zero":
            p.sub_(rate * home[key] * home[key].abs() / home[key].abs())
        elif fault == "rounded to float32":
            p.sub_((rate * home[key].to(torch.complex64 if p.is_complex() else torch.float32)).to(p.dtype))
        else:
            p.sub_(rate * home[key])


class SoundSGD(HazardousSGD):
    pass


def faulty(fault: str) -> OptimizerClass:
    return type(f"Faulty {fault}", (HazardousSGD,), {"fault": fault})


#: Each fault, a scenario that must find it, and what must be said.
FAULTS = {
    "lost by deep copies": ("deep copy", "raises AttributeError at step 4"),
    "closure ignored": ("closure", "step 1"),
    "closure without autograd": ("closure", "[False], expected [True]"),
    "loss not returned": ("closure", "loss returned by step of closure: None, expected 1.0"),
    "missing gradient taken for zero": ("missing gradients", "step 2, b of vector 3 (3,): 3 of 3 elements"),
    "missing gradient raises": ("no gradients at all", "raises RuntimeError at step 1: no gradient; reference: steps"),
    "maximize ignored": ("maximize", "step 1"),
    "gradient changed": ("gradients untouched", "gradient after the step"),
    "dense gradients only": ("sparse", "raises RuntimeError at step 1: no sparse gradients; reference: steps"),
    "state outside the state dict": ("state dict of a file", "step 4, param of"),
    "gradient kept as state": ("gradients in place", "step 2"),
    "rate kept from the start": ("changing rates", "step 2, param of"),
    "rate of the first group": ("groups", "param of second group (4, 6)"),
    "not in place": ("views", "a view of it taken before"),
    "view of the storage": ("transposed, contiguous gradient", "step 1, param of"),
    "whole vectors of eight": ("sizes", "step 1, param of"),
    "NaN at zero": ("zero gradients", "nan, expected"),
    "rounded to float32": ("sizes", "step 1, param of"),
}


@pytest.mark.quick
def test_equal_classes_agree(device: torch.device) -> None:
    result = assert_optimizers_agree(SoundSGD, HazardousSGD, device=device, bitwise=True, state="exact")
    assert all(outcome.ok for outcome in result.outcomes) and result.compared > 50
    assert {outcome.scenario for outcome in result.outcomes} == {scenario.name for scenario in SCENARIOS}
    assert [skipped.what for skipped in result.skipped] == [name for name in VARIANTS if name != "default"]
    assert "takes no argument foreach" in result.skipped[0].why


@pytest.mark.quick
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault: str) -> None:
    scenario, said = FAULTS[fault]
    with pytest.raises(AssertionError) as caught:
        assert_optimizers_agree(faulty(fault), HazardousSGD, scenarios=[scenario], dtypes=[torch.float64])
    assert said in str(caught.value) and f"[{scenario}, float64, default]" in str(caught.value)


@pytest.mark.parametrize(
    "fault", ["state outside the state dict", "gradient kept as state", "view of the storage", "lost by deep copies"]
)
def test_a_class_is_held_against_its_own_plain_walk(fault: str) -> None:
    """Without any reference; and the fault is not excused as one that the two share."""
    result = compare_optimizers(faulty(fault), dtypes=[torch.float64])
    assert FAULTS[fault][0] in {outcome.scenario for outcome in result.partings}
    assert compare_optimizers(HazardousSGD, dtypes=[torch.float64]).ok


@pytest.mark.quick
def test_a_shared_fault_is_no_difference() -> None:
    one, other = faulty("gradient kept as state"), faulty("gradient kept as state")
    result = compare_optimizers(one, other, scenarios=["gradients in place"], dtypes=[torch.float64])
    assert result.ok and [outcome.status for outcome in result.outcomes] == ["both leave"]


@pytest.mark.parametrize(
    ("planted", "bug", "kwargs"),
    [
        (PlantedAdam, "swapped betas", {}),
        (PlantedAdam, "stale state", {}),
        (PlantedAdam, "no bias correction", {}),
        (PlantedAdam, "eps inside the root", {}),
        (PlantedAdam, "step counted late", {}),
        (PlantedAdam, "maximize ignored", {}),
        (PlantedAdam, "last element forgotten", {}),
        (PlantedAdam, "state in half precision", {}),
        (PlantedAdam, "sign of the decay", {"weight_decay": 0.1}),
        (PlantedAdam, "decay beside the gradient", {"weight_decay": 0.1}),
        (PlantedAdam, "maximum not used", {"amsgrad": True}),
        (PlantedSGD, "first step dampened", {"momentum": 0.9, "dampening": 0.5}),
        (PlantedSGD, "dampening forgotten", {"momentum": 0.9, "dampening": 0.5}),
        (PlantedSGD, "momentum before decay", {"momentum": 0.9, "weight_decay": 0.1}),
        (PlantedSGD, "look-ahead without momentum", {"momentum": 0.9, "nesterov": True}),
    ],
)
def test_planted_bugs_part_from_pytorch(planted: type, bug: str, kwargs: dict[str, Any]) -> None:
    reference = torch.optim.Adam if planted is PlantedAdam else torch.optim.SGD
    options = {"kwargs": {"lr": 0.01, **kwargs}, "implementations": ["default"], "dtypes": [torch.float64]}
    scenarios = [s.name for s in SCENARIOS if s.name in ("sizes", "tiny gradients", "maximize")]
    wrong = compare_optimizers(type("Wrong", (planted,), {"bug": bug}), reference, scenarios=scenarios, **options)
    right = compare_optimizers(planted, reference, scenarios=scenarios, **options)
    assert [o for o in wrong.partings if o.divergence and o.divergence.ulp > o.divergence.limit_ulp], wrong.summary()
    assert not [o for o in right.partings if o.scenario != "maximize"], right.summary()


@pytest.mark.quick
def test_one_ulp_of_eps_needs_bitwise() -> None:
    """No derived tolerance can see it; ``bitwise`` does, and still passes the right one."""
    wrong = type("Wrong", (PlantedAdam,), {"bug": "eps by one ulp"})
    options: dict[str, Any] = {
        "kwargs": {"lr": 1.0, "eps": 0.9}, "scenarios": ["sizes"], "dtypes": [torch.float64],
        "implementations": ["default"],
    }  # fmt: skip
    assert compare_optimizers(wrong, torch.optim.Adam, **options).ok
    assert not compare_optimizers(wrong, torch.optim.Adam, bitwise=True, **options).ok
    assert compare_optimizers(PlantedAdam, torch.optim.Adam, bitwise=True, **options).ok


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam", "Rprop", "NAdam"])
def test_ours_agrees_with_pytorchs(name: str, device: torch.device) -> None:
    # Adagrad of older releases makes its state when it is built, and has none for a group that comes later
    no_later_groups = name == "Adagrad" and not IS_REFERENCE
    scenarios = [scenario.name for scenario in SCENARIOS]
    assert_optimizers_agree(
        getattr(reimpl.optim, name),
        getattr(torch.optim, name),
        scenarios=[s for s in scenarios if not (no_later_groups and s.startswith("group"))],
        implementations=WITHOUT_KERNELS,
        dtypes=[torch.float64, torch.bfloat16, torch.complex64],
        device=device,
    )


@reference_only
@pytest.mark.quick
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_pytorchs_fused_steps_update_wrong_elements_on_the_cpu(name: str) -> None:
    """Where strides of a parameter and its gradient differ, or a parameter has gaps; and with equal strides not."""
    result = compare_optimizers(
        getattr(torch.optim, name),
        implementations=["default", "foreach", "fused"],
        scenarios=["sizes", "transposed", "transposed, contiguous gradient", "gaps"],
        dtypes=[torch.float64, torch.float32],
    )
    parted = {(outcome.scenario, outcome.implementation) for outcome in result.partings}
    assert parted == {("transposed, contiguous gradient", "fused"), ("gaps", "fused")}
    found = first(result, "transposed, contiguous gradient", "fused").divergence
    assert found.step == 1 and found.tensor == "transposed, contiguous gradient (6, 5)"
    assert found.elements == (28, 30)  # all but those that a transposition leaves where they are
    steps = Tensor([[1.0, 2.0], [3.0, 4.0]])
    p = torch.nn.Parameter(torch.zeros(2, 2).t())
    p.grad = steps.clone()
    torch.optim.SGD([p], lr=1.0, fused=True).step()
    assert torch.equal(p.detach(), -steps.t())  # should be -steps


def test_ours_fused_updates_the_right_elements() -> None:
    pytest.importorskip("numba", reason="the fused kernels of the CPU are compiled by Numba")
    assert_optimizers_agree(
        reimpl.optim.SGD,
        torch.optim.SGD,
        implementations=["fused"],
        scenarios=["transposed, contiguous gradient", "gaps", "gradient with gaps", "expanded gradient"],
        dtypes=[torch.float32],
    )


@pytest.mark.quick
def test_lengths_that_a_vector_unit_leaves_over_in_low_precision() -> None:
    """As fused SGD in PyTorch 2.13 did: whole vectors stay as they are, the rest is updated."""

    class Remainder(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            before = [p.detach().clone() for group in self.param_groups for p in group["params"]]
            super().step(closure)
            for p, old in zip((p for group in self.param_groups for p in group["params"]), before):
                if p.dtype == torch.bfloat16 and p.dim() == 1:
                    p.data[: p.numel() // 16 * 16] = old[: p.numel() // 16 * 16]

    result = compare_optimizers(Remainder, torch.optim.SGD, scenarios=["sizes"], implementations=["default"])
    assert [outcome.dtype for outcome in result.partings] == ["bfloat16"]


def test_only_sparse_gradients() -> None:
    result = assert_optimizers_agree(torch.optim.SparseAdam, scenarios=["sizes", "state dict", "sparse"])
    assert result.compared > 0


@pytest.mark.quick
def test_random_optimizers_are_named() -> None:
    class Noisy(SoundSGD):
        def _update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
            super()._update(p, g + 0.01 * torch.randn_like(g), group)

    assert compare_optimizers(Noisy, scenarios=["sizes"], dtypes=[torch.float32]).random
    assert not compare_optimizers(SoundSGD, scenarios=["sizes"], dtypes=[torch.float32]).random


@pytest.mark.quick
def test_state_can_be_required_or_ignored() -> None:
    class Renamed(HazardousSGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            for state in self.state.values():
                state["b"] = state.pop("velocity")
            loss = super().step(closure)
            for state in self.state.values():
                state["velocity"] = state.pop("b")
            return loss

    options: dict[str, Any] = {"scenarios": ["sizes"], "dtypes": [torch.float64]}
    assert compare_optimizers(Renamed, HazardousSGD, **options).ok
    exact = compare_optimizers(Renamed, HazardousSGD, state="exact", **options)
    assert "absent" in str(exact.partings[0])

    class Doubled(HazardousSGD):
        def _update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
            if "b" in self.state[p]:
                self.state[p]["b"] /= 2
            super()._update(p, g, group)
            self.state[p]["b"] = self.state[p]["b"] * 2

    assert first(compare_optimizers(Doubled, HazardousSGD, **options), "sizes").divergence.entry == "b"
    assert compare_optimizers(Doubled, HazardousSGD, state="ignored", **options).ok


@pytest.mark.quick
@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: compare_optimizers(torch.optim.Adam, kwargs={"lrr": 1}), TypeError, "'lrr'; did you mean lr?"),
        (lambda: compare_optimizers(torch.optim.Adam, kwargs={"lr": -1}), ValueError, "Invalid learning rate: -1"),
        (lambda: compare_optimizers(torch.optim.SGD, torch.optim.Adam, kwargs={"momentum": 0.5}), TypeError,
         "reference torch.optim.Adam takes no argument 'momentum'"),
        (lambda: compare_optimizers(torch.optim.Adam, scenarios=["shapes"]), ValueError, "unknown scenario 'shapes'"),
        (lambda: compare_optimizers(torch.optim.Adam, implementations=["x"]), ValueError, "unknown implementation 'x'"),
        (lambda: compare_optimizers(torch.optim.Adam, state="all"), ValueError, "state must be"),
        (lambda: compare_optimizers(3), TypeError, "subject must be an optimizer class"),
        (lambda: compare_optimizers(torch.optim.LBFGS), ValueError, "argument: 'closure'"),
        (lambda: load_optimizer("Adam"), ValueError, "named with its module"),
        (lambda: load_optimizer("no.such.Adam"), ValueError, "cannot import 'no.such'"),
        (lambda: load_optimizer("torch.optim.Adma"), ValueError, "did you mean torch.optim.Adam"),
        (lambda: load_optimizer("torch.nn.Linear"), TypeError, "is no optimizer"),
        (lambda: load_optimizer("torch.optim.lr_scheduler"), TypeError, "is no optimizer"),
    ],
    ids=["typo", "range", "other class", "scenario", "implementation", "state", "no class", "needs a closure",
         "no module", "no package", "near", "no optimizer", "a module"],
)  # fmt: skip
def test_bad_input(make: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert said in str(caught.value)


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "check_optimizer.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, env=environment)


def test_command_line(tmp_path: Path) -> None:
    pytest.importorskip("tyro", reason="the command line is read by tyro")
    pytest.importorskip("rich", reason="the tables are rich's")
    only = ("--scenario", "sizes", "--implementation", "default", "--dtype", "float64")
    seen = tmp_path / "seen.json"
    same = run_script(
        "torch.optim.Adam", "--against", "reimpl.optim.Adam", *only, "--set", "lr=0.1", "--json", str(seen)
    )
    assert same.returncode == 0, same.stderr
    assert "1 cases, 1 equal to the last bit, none part" in same.stdout and "lr=0.1" in same.stdout
    assert json.loads(seen.read_text())["outcomes"][0]["bitwise"] is True
    apart = run_script(
        "torch.optim.RMSprop", "--against", "reimpl.optim.RMSprop", *only, "--set", "against.eps_inside_sqrt=true"
    )
    assert apart.returncode == 1 and "step 1, param of" in apart.stdout and "eps_inside_sqrt=True" in apart.stdout
    wrong = run_script("torch.optim.Adam", "--set", "other.lr=1")
    assert wrong.returncode == 2 and wrong.stderr.startswith("check_optimizer: --set takes key=value")


def test_timms_rmsprop_starts_its_average_at_one() -> None:
    """A dialect, not a fault: everything else is our RMSprop with ε inside the root."""
    timm_optim = pytest.importorskip("timm.optim", reason="timm's RMSpropTF is held against ours")
    ours = {"eps_inside_sqrt": True, "alpha": 0.9, "eps": 1e-10}
    options: dict[str, Any] = {"kwargs": {"lr": 0.01}, "reference_kwargs": ours, "dtypes": [torch.float64]}
    result = compare_optimizers(timm_optim.RMSpropTF, reimpl.optim.RMSprop, scenarios=["sizes"], **options)
    assert first(result, "sizes").divergence.entry == "square_avg"

    class FromZero(timm_optim.RMSpropTF):  # type: ignore[misc,name-defined]
        def step(self, closure: Any = None) -> Any:
            for p in (p for group in self.param_groups for p in group["params"]):
                if p.grad is not None and not self.state[p]:
                    self.state[p] = {"step": torch.tensor(0.0), "square_avg": torch.zeros_like(p)}
            return super().step(closure)

    assert_optimizers_agree(FromZero, reimpl.optim.RMSprop, scenarios=["sizes", "tiny gradients"], **options)


def examples(page: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


@reference_only
@pytest.mark.quick
@pytest.mark.parametrize("number", range(len(examples("findings.md"))))
def test_findings_hold(number: int) -> None:
    """Each smallest example says what it says, where its library is installed."""
    code = examples("findings.md")[number]
    for library in ("timm", "pytorch_optimizer", "heavyball"):
        if f"import {library}" in code:
            pytest.importorskip(library, reason=f"the finding is about {library}")
    exec(compile(code, f"findings.md, example {number}", "exec"), {})


def test_documentation_names_every_scenario_and_runs() -> None:
    text = (ROOT / "docs" / "check_optimizer.md").read_text(encoding="utf-8")
    assert not [scenario.name for scenario in SCENARIOS if f"| {scenario.name} | {scenario.about} |" not in text]
    (code,) = examples("check_optimizer.md")
    exec(compile(code, "check_optimizer.md", "exec"), {"__name__": "check_optimizer"})
