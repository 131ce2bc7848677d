"""What somebody writes who has read the README alone: every mistake is answered with something that works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_cli import run

NET = """
from dataclasses import dataclass
import torch
from torch import nn

@dataclass
class Config:
    width: int = 8
    inner: int = 64

class Net(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.up = nn.Linear(config.width, config.inner)
        self.down = nn.Linear(config.inner, config.width)
    def forward(self, x):
        return {"y": self.down(torch.relu(self.up(x)))}

def example_inputs(batch=2, sequence=4):
    return {"x": torch.ones(batch, sequence, 8)}
"""
FACTORY = "\ndef Model(inner=64):\n    return Net(Config(inner=inner))\n"


def net(tmp_path: Path, spec: str, text: str = NET + FACTORY) -> tuple[Path, str, Path]:
    """The start of a command line: a model file, and a spec beside it."""
    (tmp_path / "net.py").write_text(text)
    (tmp_path / "spec.yaml").write_text(spec)
    return tmp_path / "net.py", "--spec", tmp_path / "spec.yaml"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line of an error."""
    status, out, err = run(capsys, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    return err.removeprefix("tpc: ").removesuffix("\n")


def test_a_constructor_that_takes_an_object_is_answered_with_a_function_that_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    err = refused(capsys, "shard", *net(tmp_path, "mesh: {tensor: 2}", NET))
    assert "`def Model(layers=2): return Net(Config(layers=layers))`" in err
    assert "--set" not in err
    status, out, _ = run(capsys, "shard", *net(tmp_path, "mesh: {tensor: 2}"), "--set", "inner=32", "--json")
    assert (status, json.loads(out)["blocks"][0]["size"]) == (0, 32)


def test_a_plain_argument_is_asked_for_in_the_spec(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    err = refused(capsys, "shard", *net(tmp_path, "mesh: {tensor: 2}", NET + FACTORY.replace("inner=64", "inner: int")))
    assert "give it under `model:` in the spec, or --set inner=" in err


def test_an_output_that_the_model_does_not_have_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = "mesh: {tensor: 2}\noutputs:\n  nope: shard\n"
    assert "spec.yaml:3: outputs.nope: matches no output" in refused(capsys, "shard", *net(tmp_path, spec))
    for known in ("y", "'0'", "'*'"):
        assert run(capsys, "shard", *net(tmp_path, spec.replace("nope", known)))[0] == 0


@pytest.mark.parametrize(("uneven", "status"), [("allow", 0), ("warn", 0), ("error", 2)])
def test_an_uneven_axis_is_allowed_warned_of_or_refused(
    uneven: str, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = net(tmp_path, f"mesh: {{tensor: 3}}\nuneven: {uneven}\n")
    code, out, err = run(capsys, "shard", *place)
    assert code == status
    what = "ff (64) of up does not divide by 3 ranks"
    ours = [line for line in err.splitlines() if line.startswith("tpc: ")]
    expected = {
        "allow": [],
        "warn": [f"tpc: warning: {what}: ranks hold 22 or 21"],
        "error": [f"tpc: {place[2]}:2: uneven: {what}; 2-way would work, or `uneven: allow`"],
    }
    assert ours == expected[uneven]
    assert bool(out) is (status == 0)
    even = run(capsys, "shard", *place, "--set", "inner=63")
    assert even[0] == 0
    assert "tpc: " not in even[2]


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["-t", "steps=x"], "--train steps=x: 'x' is not an integer"),
        (["-t", "optimizer.lrr=1"], "--train optimizer.lrr=1: unknown key 'lrr'; did you mean 'lr'?"),
        (["-t", "steps"], "--train steps: not of the form key=value; write e.g. --train steps=100"),
        (["--tensor", "100000"], "--tensor 100000: 100000 is out of range; it must be at most 65536"),
    ],
)
def test_an_error_in_an_option_names_the_option_and_no_line_of_the_spec(
    option: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = "mesh: {tensor: 2}\ntrain:\n  optimizer: {lr: 1e-3}\n"
    assert refused(capsys, "train", *net(tmp_path, spec), *option) == words
    wrong_file = spec.replace("lr", "lrr")
    assert "spec.yaml:3: train.optimizer.lrr: unknown" in refused(
        capsys, "train", *net(tmp_path, wrong_file), "-t", "steps=2"
    )


def test_merge_names_the_checkpoints_of_a_run_and_the_format_that_it_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = tmp_path / "run" / "checkpoints" / "step-00000200"
    newest.mkdir(parents=True)
    (newest.parent / "step-00000100").mkdir()
    err = refused(capsys, "merge", tmp_path / "run", "-o", tmp_path / "x.safetensors")
    assert str(newest) in err
    for name in ("x.pt", "x.bin"):
        assert "x.safetensors would work" in refused(capsys, "merge", newest, "-o", tmp_path / name)
    assert {p.name for p in tmp_path.iterdir()} == {"run"}


def test_ranks_that_make_the_same_mistake_say_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = ("train", *net(tmp_path, "mesh: {tensor: 2}"), "--device", "cuda")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        status, _, err = run(capsys, *command)
        assert (status, err.count("\n")) == (2, lines)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verify_compares_in_every_precision_that_its_help_names(
    dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dtype in run(capsys, "verify", "--help")[1]
    assert run(capsys, "verify", *net(tmp_path, "mesh: {tensor: 2}"), "--dtype", dtype)[0] == 0
    wrong = NET.replace('"x": torch', '"z": torch') + FACTORY
    assert "net.py: the example inputs do not fit" in refused(
        capsys, "verify", *net(tmp_path, "mesh: {tensor: 2}", wrong)
    )
