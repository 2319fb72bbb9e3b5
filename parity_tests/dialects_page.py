"""Reads docs/dialects.md: which call of another library each call of ours reproduces, section by section."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "dialects.md"


@dataclass(frozen=True)
class Row:
    """A row of a table: two calls that are claimed to compute the same, optimizers without their parameters."""

    section: str
    theirs: str
    ours: str

    @property
    def library(self) -> str:
        return self.theirs.partition(".")[0]


def sections() -> dict[str, str]:
    """The text under each heading of the second level."""
    parts = re.split(r"^## (.+)\n", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def rows() -> Iterator[Row]:
    """Every row of a table whose two cells are calls."""
    for section, text in sections().items():
        for theirs, ours in re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|$", text, flags=re.MULTILINE):
            yield Row(section, theirs, ours)
