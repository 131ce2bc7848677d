"""Faults in an emitted source, of every class that `benchmarks/source_faults.py` plants: none that changes a value or a
gradient is accepted."""

from __future__ import annotations

from functools import cache

import pytest

from benchmarks.source_faults import VALUES, Case, cases, measured, mutants, verdict
from tpcompiler.api import Sharded, compile_capture
from tpcompiler.capture import capture
from tpcompiler.check.claims import Geometry
from tpcompiler.spec.schema import Spec

NEVER_EQUAL = ("limits", "ranks", "gradients", "state", "values")  # classes that change something wherever they stand


@cache
def compiled() -> tuple[Case, Sharded, Geometry]:
    case = next(cases())
    sharded = compile_capture(capture(case.build, case.inputs()), Spec.load({"mesh": {"tensor": case.degree}}))
    return case, sharded, Geometry(sharded.program.mesh)


@pytest.mark.parametrize("kind", NEVER_EQUAL)
def test_a_fault_of_each_class_is_refused(kind: str) -> None:
    _, sharded, geometry = compiled()
    found = [m for m in mutants(sharded.source) if m.kind == kind]
    for m in (found[1], found[len(found) // 2], found[-2]):
        why, _ = verdict(sharded, geometry, m.text)
        assert why, f"line {m.line}: {m.what}"


def test_every_class_is_planted() -> None:
    _, sharded, _ = compiled()
    assert {m.kind for m in mutants(sharded.source)} == {*VALUES, "constants", "calls", "statements", "parameters"}


@pytest.mark.nightly
@pytest.mark.parametrize("case", list(cases()), ids=lambda c: c.name)
def test_no_fault_that_changes_something_is_accepted(case: Case) -> None:
    assert not measured(case, 2, 0)["missed"]
