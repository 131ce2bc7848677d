"""`tpc train` starts its ranks itself; `tpc eval` and `tpc reshard` at any degree."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel

from tests.train.train_runs import CASES, Processes, in_processes, losses, train_command
from tpcompiler.cli.main import main
from tpcompiler.spec.schema import Spec
from tpcompiler.train.run.checkpoint import checkpoints
from tpcompiler.train.settings import Train
from tpcompiler.weights import Weights

GPT2 = CASES["gpt2"]
TEXT = "An assertion is a statement that is true. A statement that is not true is not one.\n" * 4


def workers(launcher: int) -> list[int]:
    """The processes that the launcher started, by rank."""
    found = []
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        rank = [e.removeprefix(b"RANK=") for e in environment if e.startswith(b"RANK=")]
        if rank:
            found.append((int(rank[0]), int(pid)))
    return [pid for _, pid in sorted(found)]


def launching(here: Path, *more: str) -> subprocess.Popen[str]:
    arguments = [*train_command(GPT2, GPT2.spec(2, steps=3), here), "--json", "--set", "layers=1", *more]
    return subprocess.Popen(
        [sys.executable, "-m", "tpcompiler.cli.main", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.nightly
def test_ranks_are_started_and_give_one_json_object(tmp_path: Path) -> None:
    running = launching(tmp_path)
    out, said = running.communicate(timeout=200)
    assert running.returncode == 0, said
    assert json.loads(out)["steps"] == 3


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
def test_a_rank_that_is_killed_ends_all_that_were_started(tmp_path: Path) -> None:
    running = launching(tmp_path, "--steps", "100000")
    try:
        end = time.monotonic() + 200
        while not (tmp_path / "run" / "log.jsonl").exists() or len(losses(tmp_path / "run")) < 2:
            assert running.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        ranks = workers(running.pid)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        out, said = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 2
    assert "rank 1 was killed by SIGKILL" in json.loads(out)["error"]
    assert "Traceback" not in said
    for pid in ranks:
        assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text()


def scores(case_file: Path, here: Path, tensor: int, data: int) -> dict[str, Any]:
    command = ["eval", GPT2.path, "--spec", str(case_file), "--weights", str(here / "run"), "--device", "cpu", "--json"]
    command += ["--perplexity", str(here / "text"), "--cloze", str(here / "cloze"), "--stride", "4", "--batch", "3"]
    ranks = Processes([*command, "--tensor", str(tensor)], tensor * data, here / f"scores-{tensor}x{data}")
    assert set(ranks.wait()) == {0}, ranks.said
    result: dict[str, Any] = json.loads(ranks.said.splitlines()[-1])
    return result


def test_scores_are_the_same_at_every_degree(tmp_path: Path) -> None:
    in_processes(GPT2, 1, 1, tmp_path, steps=3)
    (tmp_path / "text").write_text(TEXT)
    (tmp_path / "cloze").write_text("\n".join(["a statement", "is true", "not one"]))
    alone = scores(tmp_path / "spec.yaml", tmp_path, 1, 1)
    assert alone["tokens"] == len(TEXT) - 1
    assert alone["words"] == len(TEXT.split()) + 3  # and line breaks, but the last
    assert scores(tmp_path / "spec.yaml", tmp_path, 2, 2) == pytest.approx(alone, rel=1e-9)


def test_checkpoints_come_back_from_other_meshes_bit_for_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    in_processes(GPT2, 2, 2, tmp_path, steps=3)
    first = checkpoints(tmp_path / "run" / "checkpoints")[0]
    here = first
    for i, degree in enumerate([3, 1, 2]):
        spec = tmp_path / f"{degree}.yaml"
        spec.write_text(json.dumps(GPT2.spec(degree)))
        there = tmp_path / f"moved-{i}"
        assert main(["reshard", str(here), "--spec", str(spec), "-o", str(there)]) == 0
        with Weights(there) as a, Weights(first) as b:
            assert a.tensors.keys() == b.tensors.keys()
            assert all(torch.equal(a.read(n), b.read(n)) for n in a.tensors)
        here = there
    model = ["--model", GPT2.path]  # by the plain model's own layouts: the same
    assert main(["reshard", str(first), "--spec", str(spec), "-o", str(tmp_path / "model"), *model]) == 0
    for file in ("rank-00000.safetensors", "optimizer-00001.safetensors"):
        assert (tmp_path / "model" / file).read_bytes() == (here / file).read_bytes()
    again = ["reshard", str(first), "--spec", str(spec), "-o", str(tmp_path / "moved-1")]  # which holds another degree
    before = (tmp_path / "moved-1" / "manifest.json").read_bytes()
    assert main(again) == 2
    assert "add --force" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "moved-1" / "manifest.json").read_bytes() == before
    assert main([*again, "--force"]) == 0
    assert (tmp_path / "moved-1" / "manifest.json").read_bytes() != before


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[2] / "specs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_spec_in_the_repository_can_be_trained(file: Path) -> None:
    spec = Spec.load(file)
    train = spec.section(Train)
    assert train.batch % (spec.mesh.data * train.micro_batch) == 0 or not spec.train
    if spec.train:
        assert train.sequence <= spec.model["positions"]


def test_the_page_on_training_lists_every_setting() -> None:
    def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
        for name, field in model.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from keys(inner, f"{prefix}{name}.")
            else:
                yield f"{prefix}{field.alias or name}"

    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    assert [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")][-len([*keys(Train)]) :] == [
        *keys(Train)
    ]
