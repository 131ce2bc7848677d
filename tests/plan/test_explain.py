"""`tpc explain`: every parameter has a layout, and every axis that is not split has a reason."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from tpcompiler.axes.infer import AxisMap, infer_axes
from tpcompiler.capture import capture
from tpcompiler.errors import PlanError
from tpcompiler.load.model import load_model
from tpcompiler.plan import Plan, make_plan
from tpcompiler.plan.explain import explain
from tpcompiler.program import Capture
from tpcompiler.spec.schema import Spec

MODELS = Path(__file__).parents[2] / "models"


@cache
def compiled(name: str, degree: int = 2) -> tuple[Capture, AxisMap, Plan]:
    spec = Spec.load({"mesh": {"tensor": degree}, "model": {"layers": 2}})
    loaded = load_model(str(MODELS / f"{name}.py"), spec)
    found = capture(loaded.build, loaded.inputs(), source=loaded.source)
    axes = infer_axes(found)
    return found, axes, make_plan(found, axes, spec)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_star_explains_every_parameter_and_agrees_with_the_plan(name: str) -> None:
    found, axes, plan = compiled(name)
    rows = explain(found, axes, plan, "*")
    assert [r.name for r in rows] == [p.name for p in found.parameters if not p.buffer]
    assert {r.name for r in rows if not r.split} == {r.name for r in plan.replicated}
    for row in rows:
        assert len(row.layout) == len(row.axes) == len(row.shape)
        for axis in (a for dimension in row.axes for a in dimension):
            assert bool(axis.over) != bool(axis.reasons)
            assert row.name in axis.stands_in


def test_a_reason_names_the_line_of_the_model() -> None:
    (row,) = explain(*compiled("gpt2"), "h.1.attn.c_attn.weight")
    lines = (MODELS / "gpt2.py").read_text().splitlines()
    told = [reason for dimension in row.axes for axis in dimension for reason in axis.reasons]
    place = next(reason.split(": ", 2) for reason in told if "gpt2.py:" in reason)
    number = int(place[1].removeprefix("gpt2.py:"))
    assert place[2] == lines[number - 1].strip()


def test_one_rank_is_a_reason() -> None:
    rows = explain(*compiled("gpt2", degree=1), "h.0.mlp.c_fc.weight")
    assert all(a.reasons for row in rows for dimension in row.axes for a in dimension)


def test_a_module_is_its_parameters_and_a_wrong_name_is_one_line() -> None:
    found, axes, plan = compiled("gpt2")
    assert [r.name for r in explain(found, axes, plan, "h.0.mlp")] == [
        f"h.0.mlp.{m}.{p}" for m in ("c_fc", "c_proj") for p in ("weight", "bias")
    ]
    with pytest.raises(
        PlanError, match=r"h\.0\.mlq: no parameter or module of GPT2 has that name; did you mean 'h\.0\.mlp'"
    ):
        explain(found, axes, plan, "h.0.mlq")
