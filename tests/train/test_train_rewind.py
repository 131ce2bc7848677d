"""A whole run that meets a spike: it goes back as many checkpoints as asked, and on behind the batch."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest

from tests.train.test_train_unattended import MODEL, PLAIN
from tests.train.train_runs import CASES, Case, in_processes, losses
from tpcompiler.spec.schema import Spec
from tpcompiler.train.data.batches import open_corpus
from tpcompiler.train.run.checkpoint import name_of
from tpcompiler.train.settings import Train

SPIKES = PLAIN + " * (1 + 20 * (input_ids == 7).to(logits.dtype).amax())"  # a token 7 makes a batch's loss 21 times it


def with_spike(here: Path, **settings: Any) -> tuple[Case, dict[str, Any], int]:
    """A case whose text has one token 7, its settings, and the step that meets it: between the 27th and the 40th."""
    draw = random.Random(0)
    text = [chr(97 + draw.randrange(6)) for _ in range(4000)]
    text[2000] = "\x07"
    (here / "text.txt").write_text("".join(text))
    (here / "net.py").write_text(MODEL.format(loss=SPIKES))
    data = {"path": str(here / "text.txt"), "held_out": 0, "cache": str(here / "cache")}
    case = Case(str(here / "net.py"), {}, {**CASES["gpt2"].train, "data": data})
    for seed in range(100):
        given = {"steps": 45, "batch": 4, "micro_batch": 4, "seed": seed, **settings}
        batches = open_corpus(Spec.load(case.spec(1, **given)).section(Train)).train
        met = [s for s in range(45) if bool((batches.batch_at(s, 0).tensors["input_ids"] == 7).any())]
        if len(met) == 1 and 27 <= met[0] + 1 <= 40:
            return case, given, met[0] + 1
    raise AssertionError("no seed")


@pytest.mark.parametrize(("tensor", "back"), [(1, 2), pytest.param(2, 3, marks=pytest.mark.nightly)])
def test_a_spike_sends_a_run_back_and_the_batch_is_left_behind(tensor: int, back: int, tmp_path: Path) -> None:
    case, given, spike = with_spike(
        tmp_path, spike=8.0, on_bad_batch=f"rewind {back}", checkpoints={"every": 5, "keep": 4}, micro_batch=4
    )
    in_processes(case, tensor, 1, tmp_path, **given)
    said = (tmp_path / "output").read_text()
    newest = (spike - 1) // 5 * 5
    found = re.search(r"step (\d+) had a bad batch: goes back to .*step-0*(\d+) and continues", said)
    assert found is not None, said
    assert (int(found[1]), int(found[2])) == (spike, newest - 5 * (back - 1))
    kept = tmp_path / "run" / "checkpoints"
    assert {p.name for p in kept.glob("left-*")} == {f"left-{name_of(newest - 5 * i)}" for i in range(back - 1)}
    curve = losses(tmp_path / "run")
    assert len(curve) == 45
    assert max(curve[5:]) < curve[0] * 1.5


def test_a_spike_stops_a_run_or_is_skipped(tmp_path: Path) -> None:
    case, given, spike = with_spike(tmp_path, spike=8.0, on_bad_batch="skip", checkpoints={"every": 5})
    in_processes(case, 1, 1, tmp_path, **given)
    said = (tmp_path / "output").read_text()
    assert re.search(rf"step {spike}: the loss is .* standard deviations above its mean .*were left as they are", said)
    curve = losses(tmp_path / "run")
    assert curve[spike - 1] > 10 * curve[spike - 2]
    assert max(curve[spike:]) < curve[0] * 1.5
