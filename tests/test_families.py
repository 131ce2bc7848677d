"""The results of `make families` on disk: one line a family, and the documentation's table made from them."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.families import _write, table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "families.json"


def test_a_family_is_one_line_and_what_was_written_reads_back_the_same(tmp_path: Path) -> None:
    results = json.loads(RESULTS.read_text())
    lines = RESULTS.read_text().splitlines()
    assert len(lines) == len(results) + 2
    for line in lines[1:-1]:
        json.loads("{" + line.removesuffix(",") + "}")
    _write(tmp_path / "again.json", results)
    assert (tmp_path / "again.json").read_text() == RESULTS.read_text()


def test_the_page_shows_the_stored_results() -> None:
    assert table(json.loads(RESULTS.read_text())) in (ROOT / "docs" / "families.md").read_text()
