"""Two gloo processes: DDP, FSDP2 and a sharded optimizer train alike with ours and PyTorch's, and save and reshard."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parity_tests.optim_cases import EVERY_TECHNIQUE
from parity_tests.twins import RICH, small_model
from parity_tests.versions import IS_REFERENCE
from reimpl.testing.declarations import OptimizerTechnique
from reimpl.testing.tolerance import bits_equal

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this PyTorch has no gloo", allow_module_level=True)

from parity_tests.distributed_worker import (
    RUNS,
    SHARDED_BY_OURS_ALONE,
    STEPS,
    WORLD,
    checks_of,
    chosen,
    load,
    maker,
    runs_of,
    step_by_hand,
)

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one run of all checks in two processes, with what each said and the checkpoints."""
    folder = tmp_path_factory.mktemp("distributed")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    names = [str(param.id) for param in EVERY_TECHNIQUE]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "parity_tests.distributed_worker", str(folder), str(rank), *names],
            cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(WORLD)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(outputs)
    return folder


@pytest.mark.parametrize(
    ("technique", "kind"),
    [
        pytest.param(*param.values, kind, id=f"{param.id}-{kind}")
        for param in EVERY_TECHNIQUE
        for kind in checks_of(param.id)
    ],
)
def test_ours_and_pytorchs_train_alike(technique: OptimizerTechnique, kind: str, session: Path) -> None:
    for rank in range(WORLD):
        said = json.loads((session / f"{rank}.json").read_text())[f"{kind} {technique.name}"]
        if said.startswith(" ".join(RUNS[0])) and not IS_REFERENCE:
            pytest.skip("this release of PyTorch's own class cannot")
        assert said == ""


@pytest.mark.parametrize("technique", [param for param in EVERY_TECHNIQUE if "checkpoint" in checks_of(str(param.id))])
def test_a_checkpoint_of_two_processes_goes_on_in_one(technique: OptimizerTechnique, session: Path) -> None:
    """From ours to ours, from ours to PyTorch's, from PyTorch's to ours: where the two processes went."""
    name = technique.name
    # three steps: each within a few ulp if fused; of squares summed up in another order; and of Muon by products
    # in another order, which leaves the direction, whose elements are below 1, within eight roundings of bfloat16
    tolerance = {"rtol": 0, "atol": STEPS * RICH[name]["lr"] * 8 * 2**-8} if name == "Muon" else {}
    for saved in runs_of(name):
        path = session / "-".join((name, *saved))
        if not (path / "end.pt").exists():
            assert saved == RUNS[0] and (not IS_REFERENCE or name in SHARDED_BY_OURS_ALONE)
            continue  # PyTorch's own class, or that of this release, cannot
        end = torch.load(path / "end.pt")
        for loaded in runs_of(name):
            model = small_model()
            with torch.no_grad():
                for p in model.parameters():
                    p.zero_()
            make = maker(name, *loaded)
            optimizer = make(chosen(make, model))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that no process group is there
                load(model, optimizer, path)
            for group in optimizer.param_groups:  # a state dict says how it is run, too
                group.update({key: value for key, value in optimizer.defaults.items() if key in ("foreach", "fused")})
            step_by_hand(model, optimizer, STEPS, 2 * STEPS)
            for p, q in zip(model.parameters(), end, strict=True):
                if "fused" in (*saved, *loaded) or name in ("Adafactor", "Muon"):
                    torch.testing.assert_close(p, q, **tolerance)
                else:
                    assert bits_equal(p, q), f"{saved} to {loaded}"
