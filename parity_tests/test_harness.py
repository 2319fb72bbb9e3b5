"""The tests' own tests: planted bugs are caught, right code passes, and tolerances, recorder and samples do as told."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from parity_tests.oracle import optim as oracle
from parity_tests.planted import PlantedAdam, PlantedSGD
from reimpl.testing import tolerance
from reimpl.testing.declarations import OptimizerConfig, OptimizerTechnique
from reimpl.testing.optimizer_checks import (
    check_bitwise,
    check_checkpoint_exchange,
    check_classes,
    check_fused_step,
    compare_with_oracle,
)
from reimpl.testing.recorder import Recorder, header, read_record, write_json
from reimpl.testing.samples import random_tensor, seeded_generator
from reimpl.testing.tolerance import (
    Verdict,
    assert_bitwise,
    assert_parity,
    bits_equal,
    combine,
    judge,
    operand_ulp,
    oracle_dtype,
    to_oracle,
    ulp_error,
)

ADAM = OptimizerTechnique("PlantedAdam", (), "", "", PlantedAdam, torch.optim.Adam, oracle.adam)
SGD = OptimizerTechnique("PlantedSGD", (), "", "", PlantedSGD, torch.optim.SGD, oracle.sgd)


def _config(**kwargs: Any) -> OptimizerConfig:
    return OptimizerConfig("planted", kwargs, torch_kwargs=kwargs)


EVERYTHING = _config(lr=0.05, betas=(0.5, 0.75), eps=1e-3, weight_decay=0.1, amsgrad=True, maximize=True)
PLAIN = _config(lr=0.05, betas=(0.5, 0.75), eps=1e-3, weight_decay=0.1)
MOMENTUM = _config(lr=0.05, momentum=0.9, dampening=0.5, weight_decay=0.1)
NESTEROV = _config(lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True)


def _bitwise(technique: OptimizerTechnique, config: OptimizerConfig) -> None:
    check_bitwise(technique, config)


def _bitwise_with_small_gradients(technique: OptimizerTechnique, config: OptimizerConfig) -> None:
    check_bitwise(technique, config, scale=1e-3)


def _checkpoint(technique: OptimizerTechnique, config: OptimizerConfig) -> None:
    check_checkpoint_exchange(technique, config)


def _fused(technique: OptimizerTechnique, config: OptimizerConfig) -> None:
    check_fused_step(technique, config)


def _oracle(technique: OptimizerTechnique, config: OptimizerConfig) -> None:
    for quantity, verdict in compare_with_oracle(technique, config).items():
        verdict.check(technique.name, config.desc, quantity)


ALL_CHECKS = (_bitwise, _checkpoint, _fused, _oracle)
BUGS = [
    # An ulp of eps is below what any tolerance sees; only equality of bits does, once eps counts in the denominator.
    ("eps by one ulp", ADAM, _config(lr=0.05, eps=1e-3), (_bitwise_with_small_gradients,)),
    ("eps inside the root", ADAM, PLAIN, ALL_CHECKS),
    ("swapped betas", ADAM, PLAIN, ALL_CHECKS),
    ("stale state", ADAM, PLAIN, ALL_CHECKS),
    ("sign of the decay", ADAM, PLAIN, ALL_CHECKS),
    ("decay beside the gradient", ADAM, PLAIN, ALL_CHECKS),
    ("no bias correction", ADAM, PLAIN, ALL_CHECKS),
    ("step counted late", ADAM, PLAIN, ALL_CHECKS),
    ("maximum not used", ADAM, EVERYTHING, ALL_CHECKS),
    ("maximize ignored", ADAM, EVERYTHING, ALL_CHECKS),
    ("last element forgotten", ADAM, PLAIN, ALL_CHECKS),
    ("state in half precision", ADAM, PLAIN, ALL_CHECKS),
    ("momentum before decay", SGD, MOMENTUM, ALL_CHECKS),
    ("dampening forgotten", SGD, MOMENTUM, ALL_CHECKS),
    # A checkpoint taken in the middle carries the first step's buffer over from the reference.
    ("first step dampened", SGD, MOMENTUM, (_bitwise, _fused, _oracle)),
    ("look-ahead without momentum", SGD, NESTEROV, ALL_CHECKS),
]
CAUGHT = [pytest.param(*row, id=row[0]) for row in BUGS]


def _with_bug(technique: OptimizerTechnique, bug: str) -> OptimizerTechnique:
    base: Any = technique.ours
    return dataclasses.replace(technique, ours=type(base.__name__, (base,), {"bug": bug}))


@pytest.mark.quick
@pytest.mark.parametrize(("bug", "technique", "config", "checks"), CAUGHT)
def test_planted_bugs_are_caught(
    bug: str, technique: OptimizerTechnique, config: OptimizerConfig, checks: tuple[Any, ...]
) -> None:
    source = Path(sys.modules[PlantedAdam.__module__].__file__ or "").read_text(encoding="utf-8")
    assert f'"{bug}"' in source, "no such bug is written"
    planted = _with_bug(technique, bug)
    for check in checks:
        check(technique, config)  # the same code without the bug passes
        with pytest.raises(AssertionError, match=technique.name):
            check(planted, config)


@pytest.mark.quick
def test_every_planted_bug_is_tried() -> None:
    source = Path(sys.modules[PlantedAdam.__module__].__file__ or "").read_text(encoding="utf-8")
    written = {part.split('"')[1] for part in source.split("bug ")[1:] if part.startswith(("== ", "!= "))}
    assert written == {row[0] for row in BUGS}


@pytest.mark.quick
def test_two_classes_are_compared_without_a_declaration() -> None:
    check_classes(PlantedAdam, torch.optim.Adam, lr=0.1, amsgrad=True)
    with pytest.raises(AssertionError, match=r"Wrong \[lr=0\.1, .* after step 1, parameter 0 of shape \(\)"):
        check_classes(type("Wrong", (PlantedAdam,), {"bug": "swapped betas"}), torch.optim.Adam, lr=0.1)


@pytest.mark.quick
def test_a_difference_of_state_keys_and_of_the_step_count_is_caught() -> None:
    class Extra(PlantedAdam):
        def _update(self, p: Any, g: Any, s: Any, group: Any) -> None:
            super()._update(p, g, s, group)
            s.setdefault("seen", torch.zeros(()))

    class Double(PlantedAdam):
        def _update(self, p: Any, g: Any, s: Any, group: Any) -> None:
            super()._update(p, g, s, group)
            s["step"] = s["step"].double()

    with pytest.raises(AssertionError, match="keys"):
        check_bitwise(dataclasses.replace(ADAM, ours=Extra), PLAIN)
    with pytest.raises(AssertionError, match=r"step: ours is torch\.float64"):
        check_bitwise(dataclasses.replace(ADAM, ours=Double), PLAIN)


def _exact(*values: float) -> np.ndarray[Any, Any]:
    return np.array(values, dtype=np.float64)


@pytest.mark.quick
class TestTolerance:
    def test_an_ulp_is_measured_in_the_dtype(self) -> None:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            off = torch.tensor([1.0 + torch.finfo(dtype).eps, 2.0], dtype=dtype)
            assert ulp_error(off, _exact(1.0, 2.0), None, dtype) == (torch.finfo(dtype).eps, 1.0)

    def test_float64_is_held_against_more_than_float64(self) -> None:
        third = np.longdouble(1) / 3
        error, ulp = ulp_error(torch.tensor([1 / 3], dtype=torch.float64), np.array([third]), None, torch.float64)
        assert to_oracle(torch.ones(1, dtype=torch.float64)).dtype == np.longdouble
        assert 0 < error < 2e-17 and 0 < ulp < 0.5

    def test_float64_stands_in_where_nothing_is_wider(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tolerance, "LONGDOUBLE_IS_WIDER", False)
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            assert oracle_dtype(dtype) == to_oracle(torch.ones(1, dtype=dtype)).dtype == np.float64
        assert oracle_dtype(torch.complex128) == np.complex128

    def test_the_magnitude_forgives_cancellation(self) -> None:
        actual, exact = torch.tensor([1e-7]), _exact(0.0)
        assert ulp_error(actual, exact, _exact(1.0), torch.float32)[1] < 1
        assert ulp_error(actual, exact, None, torch.float32)[1] > 1e6

    @pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
    def test_nan_and_infinity_must_agree(self, odd: float) -> None:
        assert ulp_error(torch.tensor([odd, 1.0]), _exact(odd, 1.0), None, torch.float32) == (0.0, 0.0)
        assert ulp_error(torch.tensor([odd, 1.0]), _exact(1.0, 1.0), None, torch.float32) == (math.inf, math.inf)
        assert ulp_error(torch.tensor([1.0, 1.0]), _exact(odd, 1.0), None, torch.float32) == (math.inf, math.inf)
        assert ulp_error(torch.tensor([-odd]), _exact(odd), None, torch.float32)[1] == (
            0 if math.isnan(odd) else math.inf
        )

    def test_overflow_is_right_where_the_truth_lies_beyond_the_type(self) -> None:
        assert ulp_error(torch.tensor([math.inf]), _exact(1e39), None, torch.float32) == (0.0, 0.0)
        assert ulp_error(torch.tensor([math.inf]), _exact(3e38), None, torch.float32)[1] == math.inf

    def test_complex_numbers_are_pairs(self) -> None:
        actual = torch.tensor([complex(1e8, 1.0)], dtype=torch.complex64)
        exact = np.array([complex(1e8, 1.0 + 2**-20)])
        assert ulp_error(actual, exact, None, torch.complex64)[1] == pytest.approx(8, rel=1e-6)

    def test_shapes_must_agree(self) -> None:
        with pytest.raises(ValueError, match=r"shape \(2,\).*\(3,\)"):
            ulp_error(torch.ones(2), np.ones(3), None, torch.float32)

    def test_the_limit_is_twice_pytorchs_error_and_at_least_four(self) -> None:
        eps = torch.finfo(torch.float64).eps
        exact = np.ones(1, dtype=np.longdouble)

        def at(ulps: float) -> torch.Tensor:
            return torch.tensor([1 + ulps * eps], dtype=torch.float64)

        assert judge(at(4), at(0), exact).ok and not judge(at(5), at(0), exact).ok
        assert judge(at(20), at(10), exact).ok and not judge(at(21), at(10), exact).ok
        assert judge(at(4), None, exact).ok and not judge(at(5), None, exact).ok
        assert judge(at(5), None, exact, limit_ulp=6).ok
        assert not judge(at(5), torch.tensor([math.nan], dtype=torch.float64), exact).ok, "a broken reference licenses"

    def test_the_message_says_what_and_where(self) -> None:
        ours, theirs = torch.tensor([1.0, 2.0, 3.5]), torch.tensor([1.0, 2.0, 3.0])
        with pytest.raises(AssertionError) as caught:
            assert_parity(ours, theirs, _exact(1, 2, 3), technique="Softmax", case="odd", quantity="grad")
        for part in ("Softmax [odd] grad", "index (2,)", "ours 3.5", "torch 3", "oracle 3"):
            assert part in str(caught.value)

    def test_seeds_are_judged_together(self) -> None:
        good = Verdict(0.0, 1.0, 0.0, 6.0, 12.0, True, True, "a")
        bad = Verdict(0.1, 10.0, 0.0, 1.0, 4.0, False, False, "b")
        both = combine([good, bad])
        assert (both.ours_ulp, both.torch_ulp, both.limit_ulp, both.ok, both.bitwise) == (10.0, 6.0, 12.0, True, False)
        assert both.where == "b"
        with pytest.raises(ValueError, match="at least one"):
            combine([])

    def test_bits(self) -> None:
        nan = torch.tensor([math.nan, 1.0])
        assert bits_equal(nan, nan.clone()) and not bits_equal(torch.tensor([0.0]), torch.tensor([-0.0]))
        assert not bits_equal(torch.ones(2), torch.ones(2, dtype=torch.float64))
        with pytest.raises(AssertionError, match=r"1 of 2 elements .* index \(1,\): ours 2.0, torch 1.0"):
            assert_bitwise(torch.tensor([1.0, 2.0]), torch.ones(2), technique="T", case="c", quantity="q")
        with pytest.raises(AssertionError, match=r"shape \(2,\)"):
            assert_bitwise(torch.ones(2), torch.ones(3), technique="T", case="c", quantity="q")

    def test_operands(self) -> None:
        eps = torch.finfo(torch.float32).eps
        assert operand_ulp(torch.tensor([2 * eps]), torch.tensor([0.0]), torch.tensor([-1.0])) == 2.0
        assert operand_ulp(torch.tensor([2 * eps]), torch.tensor([eps]), torch.tensor([0.0])) == pytest.approx(1 / eps)


def _row(recorder: Recorder, ours_ulp: float = 1.0) -> None:
    verdict = Verdict(0.0, ours_ulp, None, None, 4.0, True, None)
    recorder.add(
        verdict,
        kind="optimizer",
        technique="Adam",
        ids=("O9",),
        case="default",
        quantity="param",
        implementation="forloop",
        device="cpu",
        dtype=torch.float32,
        seeds=5,
    )


@pytest.mark.quick
class TestRecorder:
    def test_a_record_is_read_as_it_was_written(self, tmp_path: Path) -> None:
        first, second = Recorder(), Recorder()
        _row(first)
        _row(second, math.inf)
        first.merge(second.rows)
        path = tmp_path / "new" / "record.json"
        first.write(path)
        head, rows = read_record(path)
        assert head["torch"] == torch.__version__ and head["devices"][0] == "cpu" and head.keys() == header().keys()
        assert [row["ours_ulp"] for row in rows] == [1.0, "inf"] and float(rows[1]["ours_ulp"]) == math.inf
        assert rows[0]["dtype"] == "float32" and rows[0]["torch_ulp"] is None and rows[0]["ids"] == ["O9"]
        assert [p.name for p in path.parent.iterdir()] == ["record.json"]

    def test_a_failed_write_leaves_the_old_record(self, tmp_path: Path) -> None:
        path = tmp_path / "record.json"
        write_json(path, {"old": 1})
        with pytest.raises((TypeError, ValueError)):
            write_json(path, {"bad": math.nan})
        assert json.loads(path.read_text(encoding="utf-8")) == {"old": 1}
        assert [p.name for p in tmp_path.iterdir()] == ["record.json"]

    @pytest.mark.parametrize("content", ["[]", '{"rows": []}', '{"header": {"schema": 99}, "rows": []}'])
    def test_what_is_no_record_is_refused(self, tmp_path: Path, content: str) -> None:
        path = tmp_path / "record.json"
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=r"record\.json"):
            read_record(path)


@pytest.mark.slow
def test_workers_records_are_merged(tmp_path: Path) -> None:
    path, select = tmp_path / "record.json", "Adagrad and forloop and float32"
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--record", str(path), "-k", select]
    result = subprocess.run(
        [*command, str(root / "parity_tests" / "test_optim_oracle.py")], cwd=root, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    _, rows = read_record(path)
    assert {row["technique"] for row in rows} == {"Adagrad"} and len(rows) > 10
    assert all(row["ok"] and row["seeds"] >= 5 for row in rows)


@pytest.mark.quick
def test_samples_depend_on_their_labels_alone() -> None:
    def draw(*labels: object) -> torch.Tensor:
        return random_tensor((4,), torch.float32, seeded_generator(*labels))  # type: ignore[arg-type]

    first = draw(0, "grad", 1)
    assert bits_equal(first, draw(0, "grad", 1))
    assert not any(bits_equal(first, draw(*labels)) for labels in ((1, "grad", 1), (0, "grad", 2), (0, "param", 1)))
    assert bits_equal(first.bfloat16(), random_tensor((4,), torch.float64, seeded_generator(0, "grad", 1)).bfloat16())
