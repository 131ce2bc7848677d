"""`tpc plan`: what it chooses, what it says of the rest, and that other commands take its specs."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest

from models.gpt2 import GPT2, example_inputs
from tpcompiler.capture import capture
from tpcompiler.cli import main
from tpcompiler.errors import PlanError
from tpcompiler.program import Capture
from tpcompiler.search.planner import Answer, Question, search
from tpcompiler.spec.schema import Spec

ROOT = Path(__file__).parents[2]
SPEC = Spec.load({"mesh": {"tensor": 2}, "hardware": "h200"})
SIZES = ("--set", "hidden=64", "--set", "heads=8", "--set", "layers=2", "--set", "vocab=128")


@cache
def captured() -> Capture:
    """Wide enough that time depends on the layout, and never allocated."""
    return capture(lambda: GPT2(hidden=8192, heads=64, layers=3), example_inputs())


def ask(gpus: int, memory: float, batch: int = 16) -> Answer:
    hardware = SPEC.hardware.model_copy(update={"memory_gib": memory})
    return search(captured(), SPEC, Question(gpus, batch, 1024, hardware))


def test_the_best_fits_and_nothing_that_fits_is_faster() -> None:
    answer = ask(8, 80)
    limit = answer.question.memory
    assert answer.best.memory.total <= limit
    others = [p for p, _ in (*answer.degrees, *answer.choices) if p.memory.total <= limit]
    assert all(p.seconds >= answer.best.seconds for p in others)
    assert sorted(p.layout.tensor for p, _ in answer.degrees) == [1, 2, 4, 8]
    assert all(p.layout.tensor * p.layout.data == 8 for p, _ in answer.degrees)


def test_every_loser_says_the_number_it_lost_by() -> None:
    answer = ask(8, 80)
    for p, why in (*answer.degrees, *answer.choices):
        assert bool(why) == (p is not answer.best)
        assert p is answer.best or any(c.isdigit() for c in why), why


def test_less_memory_gives_another_layout_that_fits() -> None:
    large, small = ask(4, 80, batch=64), ask(4, 24, batch=64)
    assert small.best.layout != large.best.layout
    assert small.best.memory.total <= small.question.memory < large.best.memory.total
    assert small.best.seconds > large.best.seconds


def test_what_fits_nowhere_says_how_much_is_lacking() -> None:
    with pytest.raises(PlanError, match=r"no layout over 2 GPUs fits: .* needs \d+\.\d GiB of \d\.\d GiB"):
        ask(2, 4)


def test_more_gpus_than_sequences_are_tensor_ranks() -> None:
    answer = ask(8, 80, batch=2)
    assert answer.best.layout.tensor >= 4
    assert all(p.layout.data <= 2 for p, _ in answer.degrees)


def test_equal_layers_are_one_decision() -> None:
    """Twice the layers are the same kernels with twice the count."""
    from tpcompiler.api import compile_capture
    from tpcompiler.cost.predict import CostModel

    def work(layers: int) -> tuple[int, int]:
        build = capture(lambda: GPT2(hidden=64, heads=8, layers=layers, vocab=128), example_inputs(vocab=128))
        made = compile_capture(build, SPEC)
        kernels = CostModel(made.program, made.plan).work.kernels
        return len(kernels), max(k.count for k in kernels)

    (few, count), (as_few, twice) = work(3), work(6)
    assert few == as_few
    assert twice == 2 * count


def test_the_spec_that_it_writes_is_taken_by_shard_and_verify(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "best.yaml"
    gpt2 = str(ROOT / "models/gpt2.py")
    code = main.main(
        ["plan", gpt2, "--gpus", "4", "--batch", "2", "--sequence", "32", *SIZES, "-o", str(spec), "--json"]
    )
    found = json.loads(capsys.readouterr().out)
    assert code == 0
    written = Spec.load(spec)
    assert (written.mesh.tensor, written.mesh.data) == (
        found["best"]["layout"]["tensor"],
        found["best"]["layout"]["data"],
    )
    assert written.mesh.tensor * written.mesh.data == 4
    assert written.model["hidden"] == 64
    assert main.main(["shard", gpt2, "--spec", str(spec), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["check"]["refused"] == []
    assert main.main(["verify", gpt2, "--spec", str(spec), "--micro-batches", "1", "--json"]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--gpus", "0"), "--gpus"),
        (("--gpus", "4", "--memory", "much"), "--memory much: not a size"),
        (("--gpus", "4", "--hardware", "h2000"), "--hardware h2000"),
        (("--gpus", "4", "--spec", "nowhere.yaml"), "nowhere.yaml: no such file"),
        (("--gpus", "4", "--set", "heads=7"), "heads"),
        (("--gpus", "2", "--memory", "0.1GiB"), "no layout over 2 GPUs fits"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "never.yaml"
    given = ["plan", str(ROOT / "models/gpt2.py"), "--sequence", "16", "--set", "layers=1", *arguments, "-o", str(out)]
    code = main.main(given)
    err = capsys.readouterr().err
    assert code == 2
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not out.exists()
