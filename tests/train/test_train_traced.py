"""What of communication is hidden, from the times of kernels."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tpcompiler.train.run import reporter
from tpcompiler.train.settings import Train
from tpcompiler.train.step.traced import common, hidden, length, union

spans = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)).map(lambda p: (p[0], p[0] + p[1])), max_size=8)


@given(spans, spans)
def test_unions_and_what_they_share_are_those_of_moments(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> None:
    moments = [{t for start, end in s for t in range(start, end)} for s in (a, b)]
    first, second = union(a), union(b)
    assert length(first) == len(moments[0])
    assert all(x[1] < y[0] for x, y in pairwise(first))
    assert common(first, second) == len(moments[0] & moments[1])


def test_a_collective_is_hidden_by_what_runs_meanwhile() -> None:
    kernels = [
        ("nvjet_tst_128x256", 0.0, 1000.0),
        ("ncclDevKernel_AllReduce_Sum_bf16", 500.0, 2000.0),
        ("triton_poi_fused_add", 1500.0, 1750.0),
    ]
    found = hidden(kernels, steps=1)
    assert (found.communicating, found.beside, found.beside_products) == (1.5, 0.75, 0.5)
    assert found.computing == 1.25
    assert str(found) == "communication 1.5 ms a step, 50% of it beside computation"
    assert hidden([], 1).share is None


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_step_that_is_to_be_traced_is_traced_once(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def traced(step: Any) -> Any:
        step()
        return hidden([("ncclAllReduce", 0.0, 1000.0), ("gemm", 250.0, 1000.0)]), []

    monkeypatch.setattr(reporter, "traced", traced)
    run = SimpleNamespace(train=Train(logging={"trace": 2}), place=SimpleNamespace(device=torch.device(device)))
    r: Any = SimpleNamespace(_run=run, _hidden=None, said=[], taken=[])
    r.add, r.message = r.taken.append, r.said.append
    for step in (1, 2, 3):
        reporter.Reporter.take(r, step, lambda step=step: step)  # type: ignore[misc]
    assert r.taken == [1, 2, 3]
    assert r._hidden == (0.75 if device == "cuda" else None)
    expected = "communication 1.0 ms a step, 75% of it beside computation" if device == "cuda" else "not traced"
    assert [expected in line for line in r.said] == [True]
