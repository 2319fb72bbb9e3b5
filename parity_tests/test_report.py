"""The report: what it counts, what it says when cases fail, and that the page needs nothing but a browser."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("tyro")

from parity_tests.describe import describe
from reimpl.testing.recorder import header, write_json
from reimpl.testing.timing import Timings
from scripts import report as command
from scripts._report_data import Comparison, Comparisons, make_cards, unmeasured
from scripts._report_page import Report, format_seconds, format_ulp, render, speed_verdict, write_text
from scripts._report_parity import read_suite
from scripts._report_plots import formula_svg
from scripts._report_training import CurvePair
from scripts.step_times import WORKLOADS, StepTimes

pytestmark = pytest.mark.quick


def test_declarations_are_described() -> None:
    rows = {(row["kind"], row["name"]): row for row in describe()}
    assert rows["optimizer", "Adam"]["torch"] == "torch.optim.Adam"
    assert rows["function", "softmax"]["ours"] == "reimpl.functional.softmax"
    assert rows["init", "lecun_normal_"]["torch"] == "torch.nn.init.kaiming_normal_(nonlinearity='linear')"
    (dialect,) = (d for d in rows["optimizer", "SGD"]["dialects"] if d["description"] == "velocity")
    assert dialect["id"] == "O2" and "momentum_form='velocity'" in dialect["arguments"] and dialect["torch"] is None
    assert all(row["source"] and row["formula"] and row["ids"] for row in rows.values())
    unset = [name for (_, name), row in rows.items() if formula_svg(row["formula"]) is None]
    assert not unset


def row(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "optimizer", "technique": "Adam", "ids": ["O9"], "case": "default", "quantity": "param",
        "implementation": "forloop", "device": "cpu", "dtype": "float32", "seeds": 5, "ours_abs": 1e-7, "ours_ulp": 1.5,
        "torch_abs": 2e-7, "torch_ulp": 3.0, "limit_ulp": 6.0, "bitwise": False, "ok": True, **changes,
    }  # fmt: skip


ROWS = [
    row(),
    row(dtype="float64", ours_ulp=3.0, bitwise=True),
    row(case="no bias correction", torch_abs=None, torch_ulp=None, bitwise=None, ours_ulp=2.0, limit_ulp=4.0),
    row(implementation="fused", ours_ulp=5.0),
]
FAILED = row(case="a <case> that fails", ours_ulp="inf", ours_abs="inf", ok=False)
TECHNIQUES = [
    {
        "kind": "optimizer", "name": "Adam", "ids": ["O9", "O9b"], "source": "N0", "ours": "reimpl.optim.Adam",
        "torch": "torch.optim.Adam", "dtypes": ["float32"], "formula": r"\theta \leftarrow \theta - \frac{m}{\sqrt{v}}",
        "dialects": [
            {"id": "O9b", "description": "no bias correction", "arguments": "bias_correction=False", "torch": None,
             "note": "what the correction is for"},
        ],
    },
]  # fmt: skip


def make_page(rows: list[dict[str, Any]], **changes: Any) -> str:
    return render(Report(header(), make_cards(TECHNIQUES, map(Comparison.from_row, rows)), **changes))


def step_times(**medians: float) -> StepTimes:
    names = {name.replace("_", " "): (value,) * 3 for name, value in medians.items()}
    return StepTimes("Adam", next(iter(WORKLOADS)), "cpu", Timings(names))


def test_counts() -> None:
    total = Comparisons(map(Comparison.from_row, ROWS))
    assert (len(total), len(total.paired), total.bitwise) == (4, 3, 1)
    assert (total.closer, total.level, total.farther) == (1, 1, 1)
    assert total.worst.execution == "fused" and total.median_ulp == 2.5
    assert total.ok and not total.same
    assert total.dialects.ours_ulp == 2.0 and total.shared.ours_ulp == 5.0
    assert not Comparisons([Comparison.from_row(FAILED)]).ok


def test_lines_are_ordered_from_the_plain_and_wide_to_the_fused_and_narrow() -> None:
    (card,) = make_cards(TECHNIQUES, map(Comparison.from_row, reversed(ROWS)))
    order = [(line.execution, line.dtype) for line in card.lines]
    assert order == [("for-loop", "float64"), ("for-loop", "float32"), ("fused", "float32")]


def test_pytorch_beside_itself_is_shown_and_not_counted() -> None:
    rows = [*ROWS, row(kind="pytorch", implementation="foreach", ours_ulp=77.0, ok=False)]
    (card,) = make_cards(TECHNIQUES, map(Comparison.from_row, rows))
    assert len(card.all) == len(ROWS) and [line.execution for line in card.beside] == ["foreach"]
    text = make_page(rows)
    assert "everything agrees" in text and "torch foreach" in text and ">77 · 3<" in text


def test_declared_but_not_measured() -> None:
    cards = make_cards(TECHNIQUES, [Comparison.from_row(row(technique="SGD"))])
    assert [card.name for card in cards] == ["SGD"] and unmeasured(TECHNIQUES, cards) == ["Adam"]


class Page(html.parser.HTMLParser):
    """Tags that are open at the end, and everything that a browser would fetch."""

    VOID = frozenset({"meta", "link", "br", "input", "img", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.stack.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href") and value:
                self.links.append(value)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def test_page_is_whole_and_self_contained() -> None:
    curves = CurvePair("SGD", (2.0, 1.0), (2.0, 1.0), 0.9, 0.9, "two epochs")
    text = make_page(ROWS, training=[curves], steps=[step_times(ours_fused=1e-3, torch_fused=2e-3)])
    page = Page(text)
    assert not page.stack
    assert len(page.ids) == len(set(page.ids))
    assert all(re.match(r"#|data:|parity\.json$", link) for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert not re.search(r"@import|url\((?!#)", text)
    for expected in ("1 techniques, 4 comparisons", "everything agrees", "bias_correction=False", "2.0× as fast"):
        assert expected in text
    assert "equal to the last bit" in text and "#01020" not in text


def test_page_says_what_failed() -> None:
    text = make_page([*ROWS, FAILED])
    assert "1 of 5 comparisons are beyond their limit" in text
    assert "a &lt;case&gt; that fails" in text and "∞" in text
    assert "everything agrees" not in text


def test_page_without_any_record() -> None:
    text = render(Report(header()))
    assert not Page(text).stack and "Nothing was compared" in text


def write_record(folder: Path, rows: list[dict[str, Any]]) -> None:
    write_json(folder / "parity.json", {"header": header(), "rows": rows})
    write_json(folder / "techniques.json", TECHNIQUES)


@pytest.mark.parametrize(("rows", "status"), [(ROWS, 0), ([*ROWS, FAILED], 1)], ids=["all well", "one failed"])
def test_command(rows: list[dict[str, Any]], status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_record(tmp_path, rows)
    assert command.main(command.Options(out=tmp_path, reuse=True, training=False, speed=False)) == status
    said = capsys.readouterr().out
    assert (tmp_path / "index.html").resolve().as_uri() in said.replace("\n", "")
    assert "Optimizers" in said


def test_command_writes_a_page_when_the_suite_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "run_suite", lambda *_: (3, "INTERNAL ERROR in the suite"))
    assert command.main(command.Options(out=tmp_path, training=False, speed=False)) == 1
    assert "INTERNAL ERROR in the suite" in (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "parity suite" in capsys.readouterr().out


def test_failing_suite_is_a_problem_even_where_its_record_is_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_record(tmp_path, ROWS)
    monkeypatch.setattr(command, "run_suite", lambda *_: (1, "1 failed"))
    assert command.main(command.Options(out=tmp_path, training=False, speed=False)) == 1


def test_record_of_a_later_layout_is_refused(tmp_path: Path) -> None:
    write_record(tmp_path, ROWS)
    record = json.loads((tmp_path / "parity.json").read_text())
    record["header"]["schema"] = 99
    (tmp_path / "parity.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="99"):
        read_suite(tmp_path / "parity.json", tmp_path / "techniques.json")


def test_formulas() -> None:
    one, two = formula_svg(r"a \leftarrow b"), formula_svg(r"a \leftarrow b,\quad c = \sqrt{d}")
    assert one is not None and two is not None
    assert (one.count("<svg"), two.count("<svg")) == (1, 2)
    assert formula_svg(r"\begin{cases}") is None and formula_svg("") is None


def test_numbers_in_words() -> None:
    assert [format_ulp(v) for v in (None, 0.0, 0.123, 1.234, 123456.0, float("inf"))] == [
        "–", "0", "0.12", "1.23", "1e5", "∞",
    ]  # fmt: skip
    assert [format_seconds(v) for v in (0.0123, 4.56e-5)] == ["12.3 ms", "45.6 µs"]
    speeds = [speed_verdict(step_times(ours_fused=ours, torch_fused=1.0)) for ours in (0.25, 1.0, 3.0)]
    assert speeds == ["4.0× as fast", "level", "3.0× as long"]


def test_times_of_a_busy_machine_are_marked() -> None:
    wide = Timings({"ours fused": (1.0, 1.0, 9.0, 9.0), "torch fused": (1.0, 2.0, 9.0, 9.0)})
    assert "say little" in make_page(ROWS, steps=[StepTimes("Adam", next(iter(WORKLOADS)), "cpu", wide)])
    calm = [step_times(ours_fused=1.0, torch_fused=2.0)]
    assert "say little" not in make_page(ROWS, steps=calm)
    assert "say little" in make_page(ROWS, steps=calm, load=2.0)


def test_page_is_replaced_whole(tmp_path: Path) -> None:
    page = tmp_path / "index.html"
    write_text(page, "first")
    with pytest.raises(UnicodeEncodeError):
        write_text(page, "half \udcff")
    assert page.read_text() == "first" and [p.name for p in tmp_path.iterdir()] == ["index.html"]
