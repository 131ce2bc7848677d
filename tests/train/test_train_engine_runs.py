"""Runs that are stopped and go on: killed, moved to other degrees, out of disk, without a rank."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.train.test_train_engine import close
from tests.train.train_runs import CASES, DROPPING, Case, Processes, in_processes, in_threads, losses, train_command
from tpcompiler.errors import TpcError
from tpcompiler.train.run import training_run
from tpcompiler.train.run.checkpoint import State, checkpoints, name_of
from tpcompiler.weights import Weights

GPT2 = CASES["gpt2"]


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All of it: weights and optimizer state."""
    with Weights(checkpoint, compare_copies=True) as weights:
        return {name: weights.read(name) for name in weights.tensors}


def newest(directory: Path) -> Path:
    return checkpoints(directory / "run" / "checkpoints")[0]


def same(a: Path, b: Path) -> None:
    mine, other = tensors(a), tensors(b)
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        assert torch.equal(value, other[name]), name


def killed_until_done(
    case: Case, tensor: int, data: int, here: Path, kills: int, draw: random.Random, **train: object
) -> None:
    """Starts a run again and again, kills one rank of it at some moment, and lets the last start end by itself."""
    command = train_command(case, case.spec(tensor, data, **train), here)
    world = tensor * data
    for i in range(kills + 1):
        ranks = Processes(command, world, here / f"output-{i}")
        if i < kills:
            # A moment of some kind, so that all of them are met: start, between steps, a checkpoint half written.
            kind, until = i % 3, time.monotonic() + 60
            folder = here / "run" / "checkpoints"
            kept = checkpoints(folder)  # the run goes on from the newest, and its log too
            seen = State.load(kept[0]).step if kept else 0
            while time.monotonic() < until and any(p.exitcode is None for p in ranks.ranks):
                log = here / "run" / "log.jsonl"
                steps = len(losses(here / "run")) - seen if log.exists() else 0
                if kind == 0 and steps >= 2:
                    break
                if kind == 1 and steps > 0 and list(folder.glob(".*.tmp")):
                    break
                if kind == 2 and draw.random() < 0.02:
                    break
                time.sleep(0.002)
            assert all(p.exitcode is None for p in ranks.ranks), "the run was over before it was killed"
            ranks.kill(draw.randrange(world))
        codes = ranks.wait(1 if i < kills else 120)  # the others are ended, as a launcher would
    assert codes == [0] * world, ranks.said


def test_a_killed_run_ends_bit_equal_to_one_that_was_not(tmp_path: Path) -> None:
    every = {"steps": 10, "checkpoints": {"every": 2, "keep": 2}, "schedule": {"warmup": 2}}
    in_processes(DROPPING, 2, 1, tmp_path / "whole", **every)
    killed_until_done(DROPPING, 2, 1, tmp_path / "killed", 2, random.Random(0), **every)
    assert losses(tmp_path / "killed" / "run") == losses(tmp_path / "whole" / "run")
    same(newest(tmp_path / "killed"), newest(tmp_path / "whole"))


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("tensor", "data"), [(1, 1), (2, 1), (1, 2)])
def test_thirty_kills_change_nothing(tensor: int, data: int, tmp_path: Path) -> None:
    every = {"steps": 160, "checkpoints": {"every": 2, "keep": 2}}
    in_processes(DROPPING, tensor, data, tmp_path / "whole", **every)
    killed_until_done(DROPPING, tensor, data, tmp_path / "killed", 30, random.Random(1), **every)
    assert losses(tmp_path / "killed" / "run") == losses(tmp_path / "whole" / "run")
    same(newest(tmp_path / "killed"), newest(tmp_path / "whole"))


MOVES = [pytest.param([(2, 1), (1, 2), (1, 1)]), pytest.param([(4, 1), (2, 2), (1, 1)], marks=pytest.mark.nightly)]


@pytest.mark.parametrize("degrees", MOVES)
def test_a_checkpoint_goes_on_at_other_degrees(degrees: list[tuple[int, int]], tmp_path: Path) -> None:
    schedule = {"warmup": 2, "until": 9}
    for i, (tensor, data) in enumerate(degrees):
        in_processes(GPT2, tensor, data, tmp_path, steps=3 * (i + 1), schedule=schedule)
    close(losses(tmp_path / "run"), in_threads(GPT2, 1, 9, schedule=schedule))


def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(tmp_path: Path) -> None:
    settings = {"checkpoints": {"every": 2, "keep": 3}, "schedule": {"warmup": 2, "until": 6}}
    in_processes(GPT2, 1, 1, tmp_path, steps=6, **settings)
    shutil.copytree(tmp_path / "run", tmp_path / "whole" / "run")
    last = newest(tmp_path)
    assert last.name == name_of(6)
    file = last / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    in_processes(GPT2, 1, 1, tmp_path, steps=6, **settings)
    said = (tmp_path / "output").read_text()
    assert f"checkpoint refused: {file}: truncated" in said
    assert f"{name_of(4)}: step 4 of 6" in said
    same(newest(tmp_path), newest(tmp_path / "whole"))


def failing(command: list[str], world: int, here: Path, absent: int = 0, **limits: int) -> str:
    """What a command says whose ranks all end with code 2: one line, without a traceback."""
    (here / "output").unlink(missing_ok=True)
    ranks = Processes(command, world, here / "output", absent, **limits)
    codes = ranks.wait()
    assert set(codes) == {2}, ranks.said
    said = [line for line in ranks.said.splitlines() if line.startswith("tpc: ")]
    assert len(said) == 1, ranks.said
    assert "Traceback" not in ranks.said
    return said[0]


def test_a_rank_that_never_arrives_is_named(tmp_path: Path) -> None:
    command = [*train_command(GPT2, GPT2.spec(2), tmp_path), "--timeout", "2"]
    assert "rank 1 of 2 did not arrive within 2 s" in failing(command, 2, tmp_path, absent=1)


def test_the_users_mistakes_end_all_ranks_with_one_line(tmp_path: Path) -> None:
    command = train_command(GPT2, GPT2.spec(2), tmp_path)
    (tmp_path / "empty.txt").write_text("")
    assert "empty.txt: the file is empty" in failing([*command, "--data", str(tmp_path / "empty.txt")], 2, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--set", "vocab=100"], "a vocabulary of"),
        (["--train", "sequence=32"], "sequence 16 or less would work"),
        (["--train", "optimizer.lr=1e300", "--train", "optimizer.clip=null"], "the run stops"),
    ],
)
def test_what_cannot_be_trained_is_said(settings: list[str], message: str, tmp_path: Path) -> None:
    command = train_command(GPT2, GPT2.spec(1), tmp_path)
    assert message in failing([*command, *settings], 1, tmp_path)
    assert not checkpoints(tmp_path / "run" / "checkpoints")


NOTHING_TO_TRAIN = """
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(300, 4)
        {more}

    def forward(self, input_ids, labels):
        return (self.table(input_ids).sum(-1) * labels).mean(){detached}


def example_inputs():
    return {{"input_ids": torch.zeros(2, 8, dtype=torch.int64), "labels": torch.zeros(2, 8, dtype=torch.int64)}}
"""


@pytest.mark.parametrize(
    ("more", "detached", "message"),
    [
        ("self.requires_grad_(False)", "", "no parameter to train: all are frozen"),
        ("", ".detach()", "its loss follows from no trained parameter"),
    ],
)
def test_a_model_with_nothing_to_train_is_said(more: str, detached: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NOTHING_TO_TRAIN.format(more=more, detached=detached))
    case = Case(str(tmp_path / "net.py"), {}, GPT2.train)
    assert message in failing(train_command(case, case.spec(1), tmp_path), 1, tmp_path)


def test_a_log_of_something_else_is_left_alone(tmp_path: Path) -> None:
    in_processes(GPT2, 1, 1, tmp_path, steps=2, schedule={"warmup": 1, "until": 9})
    with (tmp_path / "run" / "log.jsonl").open("a") as log:
        log.write('not json\n[]\n3\n{"step": "x"}\n{"step": 1, "loss": "many"}\n')
    in_processes(GPT2, 1, 1, tmp_path, steps=3, schedule={"warmup": 1, "until": 9})
    assert len(losses(tmp_path / "run")) == 3


def test_a_full_disk_stops_the_run_and_loses_nothing(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"checkpoints": {"every": 2}, "schedule": {"warmup": 2, "until": 6}}
    in_processes(GPT2, 1, 1, tmp_path, steps=2, **settings)
    before = tensors(newest(tmp_path))
    command = train_command(GPT2, GPT2.spec(1, steps=6, **settings), tmp_path)
    said = failing(command, 1, tmp_path, largest_file=20_000)
    assert "checkpoint" in said
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [name_of(2)]
    after = tensors(newest(tmp_path))
    assert all(torch.equal(after[name], value) for name, value in before.items())
    in_processes(GPT2, 1, 1, tmp_path, steps=6, **settings)


def test_two_runs_do_not_share_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_run, "_LOCK_WAIT", 0.2)
    with training_run.locked(tmp_path):
        with pytest.raises(TpcError, match="another run is writing there"), training_run.locked(tmp_path):
            pass
    with training_run.locked(tmp_path):
        pass
