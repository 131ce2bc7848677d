"""The command line: what it draws, what it prints with --json, and that every mistake is one line and exit code 2."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console

from tpcompiler.cli import main
from tpcompiler.errors import format_bytes
from tpcompiler.spec.schema import Spec
from tpcompiler.version import __version__

ROOT = Path(__file__).parents[2]


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `tpc …`."""
    code = main.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


# -- the program ------------------------------------------------------------------------------------------------------


def test_the_schema_is_that_of_the_spec(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["schema"], ["schema", "--json"]):
        status, out, err = run(capsys, *arguments)
        assert (status, err) == (0, "")
        assert json.loads(out) == Spec.json_schema()


MODEL = ROOT / "models" / "gpt2.py"
SPEC = ROOT / "specs" / "2way.yaml"
WRONG = [
    (["nothing"], "No such command 'nothing'"),
    (["shard"], "Missing argument 'MODEL'"),
    (["shard", MODEL], "Missing option '--spec'"),
    (["shard", MODEL, "--spec", SPEC, "--colour"], "No such option: --colour"),
    (["shard", MODEL, "--spec", "9way.yaml"], "9way.yaml: no such file"),
    (["shard", "modl.py", "--spec", SPEC], "modl.py: no such file"),
    (["shard", MODEL, "--spec", SPEC, "--set", "layers"], "not of the form key=value"),
    (["shard", MODEL, "--spec", SPEC, "--set", "layer=2"], "did you mean 'layers'"),
    (["diff", ROOT, "--spec", SPEC], "is a directory"),
    (["verify", "hf:nothing-of-the-kind", "--spec", SPEC], "neither a directory nor a model type"),
    (["explain", MODEL, "--spec", SPEC], "Missing argument 'NAME'"),
    (["merge", "no-such-directory", "-o", "x.safetensors"], "no-such-directory"),
]


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=[w[1] for w in WRONG])
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str | Path], words: str, as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, *arguments, *(["--json"] if as_json else []))
    assert status == 2
    if as_json:
        assert words in json.loads(out)["error"]
        assert not err
    else:
        assert words in err
        assert err.count("\n") == 1
        assert err.startswith("tpc: ")
        assert not out


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert {"shard", "diff", "verify", "explain", "merge", "schema"} <= set(out.split())
    assert run(capsys, "--version")[:2] == (0, f"tpc {__version__}\n")


@pytest.mark.parametrize("name", main.COMMANDS)
def test_help_ends_in_examples_that_the_command_takes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, name, "--help")
    examples = [line.strip() for line in out.partition("Example")[2].splitlines()[1:] if line.strip()]
    assert status == 0
    assert examples
    group: Any = typer.main.get_command(main.app)
    for example in examples:
        words = shlex.split(example.partition(" > ")[0])
        program, command, *arguments = words[words.index("tpc") :]  # torchrun and its options may start it
        assert (program, command) == ("tpc", name)
        group.commands[command].make_context(command, arguments)  # raises for what the command does not take


def test_help_and_schema_come_without_torch() -> None:
    """They must be at hand at once: importing torch takes seconds."""
    program = "import sys; from tpcompiler.cli.main import main; main(['schema']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


# -- compiling --------------------------------------------------------------------------------------------------------

SMALL = ("--set", "layers=2", "--set", "hidden=16", "--set", "heads=4", "--set", "vocab=40")


def shard(capsys: pytest.CaptureFixture[str], *arguments: str | Path, spec: Path = SPEC) -> dict[str, Any]:
    status, out, err = run(capsys, "shard", MODEL, "--spec", spec, *SMALL, "--json", *arguments)
    assert (status, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


def test_shard_reports_what_its_contract_says(capsys: pytest.CaptureFixture[str]) -> None:
    found = shard(capsys)
    assert {"blocks", "collectives", "memory", "replicated", "seconds"} <= set(found)
    for row in found["blocks"]:
        assert sum(row["local"]) == row["size"]
        assert len(row["local"]) == 2
    for row in found["collectives"]:
        assert {"kind", "direction", "bytes", "block", "node", "count", "reason"} <= set(row)
        assert row["direction"] in ("forward", "backward")
        assert row["bytes"] > 0
        assert row["count"] >= 1
    assert found["memory"]["total"] == sum(v for k, v in found["memory"].items() if k != "total")


def test_the_picture_shows_the_report_s_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    found = shard(capsys)
    status, out, _ = run(capsys, "shard", MODEL, "--spec", SPEC, *SMALL)
    assert status == 0
    assert max(map(len, out.splitlines())) <= 120
    for row in found["blocks"]:
        assert row["name"] in out
    for direction in ("forward", "backward"):
        count = sum(r["count"] for r in found["collectives"] if r["direction"] == direction)
        assert re.search(rf"all .*{direction} .*× {count} ", out)
    assert format_bytes(found["memory"]["total"]) in out


def test_shard_writes_a_program_and_replaces_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        shard(capsys, "-o", out)
        assert {"model.py", "manifest.json"} <= {p.name for p in out.iterdir()}
        compile((out / "model.py").read_text(), "model.py", "exec")
        assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_weights_are_sharded_and_merged_to_the_same_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from tpcompiler.load.model import load_model, parse_settings

    model = load_model(str(MODEL), Spec.load(SPEC), parse_settings([*SMALL[1::2]])).build()
    before = {k: v.detach().clone() for k, v in model.named_parameters()}
    save_file(before, str(tmp_path / "w.safetensors"))
    shard(capsys, "-o", tmp_path / "out", "-w", tmp_path / "w.safetensors")
    assert (tmp_path / "out" / "rank-00001.safetensors").exists()
    status, out, _ = run(capsys, "merge", tmp_path / "out", "-o", tmp_path / "m.safetensors", "--json")
    assert status == 0
    assert [f["file"] for f in json.loads(out)["files"]] == [str(tmp_path / "m.safetensors")]
    after = load_file(str(tmp_path / "m.safetensors"))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)


def refused_output(tmp_path: Path, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The error of a `shard -o` that must leave the directory as it was."""
    before = {p: p.read_bytes() if p.is_file() else None for p in tmp_path.rglob("*")}
    status, out, err = run(capsys, "shard", MODEL, "--spec", SPEC, *SMALL, *arguments)
    assert status == 2
    assert err.count("\n") == 1
    assert not out
    assert {p: p.read_bytes() if p.is_file() else None for p in tmp_path.rglob("*")} == before
    return err


def test_an_output_that_cannot_be_written_leaves_everything_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    (tmp_path / "bad.safetensors").write_bytes(b"not safetensors at all")
    out = tmp_path / "out"
    assert "holds other files" in refused_output(tmp_path, capsys, "-o", tmp_path / "mine")
    assert "in the way" in refused_output(tmp_path, capsys, "-o", tmp_path / "file")
    assert "no such file" in refused_output(tmp_path, capsys, "-o", out, "-w", tmp_path / "none.safetensors")
    assert "bad.safetensors" in refused_output(tmp_path, capsys, "-o", out, "-w", tmp_path / "bad.safetensors")


def test_a_full_disk_and_an_interrupt_leave_no_half_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tpcompiler import weights

    def full(path: Path, text: str) -> None:
        path.write_text(text[:10])
        raise OSError(28, "No space left on device", str(path))

    def interrupted(path: Path, text: str) -> None:
        path.write_text(text[:10])
        raise KeyboardInterrupt

    for fails, status, words in ((full, 2, "no space left on device"), (interrupted, 130, "")):
        monkeypatch.setattr(weights, "write_text", fails)
        code, out, err = run(capsys, "shard", MODEL, "--spec", SPEC, *SMALL, "-o", tmp_path / "out")
        assert code == status
        assert words in err
        assert err.count("\n") == (1 if words else 0)
        assert not out
        assert not list(tmp_path.iterdir())


def test_what_the_model_prints_does_not_spoil_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "loud.py"
    file.write_text(
        "print('hello')\n" + MODEL.read_text().replace("super().__init__()", "super().__init__(); print('built')")
    )
    status, out, err = run(capsys, "shard", file, "--spec", SPEC, *SMALL, "--json")
    assert status == 0
    assert "blocks" in json.loads(out)
    assert "hello" in err
    assert "built" in err


UNTRACEABLE = """
import sys
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
    def forward(self, x):
        print("tracing", file=sys.stderr)
        y = self.up(x)
        if y.sum() > 0:
            y = y * 2
        return self.down(y)

example_inputs = {"x": torch.ones(2, 8)}
"""


def test_a_model_that_cannot_be_traced_is_one_line_that_names_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "net.py"
    file.write_text(UNTRACEABLE)
    status, out, err = run(capsys, "shard", file, "--spec", SPEC, "-o", tmp_path / "out")
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert f"net.py:{UNTRACEABLE[: UNTRACEABLE.index('if y.sum')].count(chr(10)) + 1}" in err
    assert [p.name for p in tmp_path.iterdir()] == ["net.py"]


def test_a_degree_longer_than_every_axis_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "net.py"
    file.write_text(UNTRACEABLE.replace("if y.sum() > 0", "if True"))
    (tmp_path / "wide.yaml").write_text("mesh: {tensor: 64}")
    status, out, err = run(capsys, "shard", file, "--spec", tmp_path / "wide.yaml")
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert "64" in err


def test_diff_shows_every_collective_of_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "diff", MODEL, "--spec", SPEC, *SMALL, "--json")
    assert status == 0
    lines, rows = json.loads(out)["lines"], json.loads(out)["collectives"]
    assert all(x["plain"] == x["sharded"] or x["change"] != "same" or "#" in x["sharded"] for x in lines)
    found = [x["collective"] for x in lines if x["collective"]]
    # Equal layers are one class, and one row. The loss communicates forward and backward in one line, a forward one.
    assert found.count("backward") == sum(r["direction"] == "backward" for r in rows) - 1 > 0
    assert found.count("forward") == sum(r["direction"] == "forward" for r in rows) > 0
    status, out, _ = run(capsys, "diff", MODEL, "--spec", SPEC, *SMALL)
    assert status == 0
    assert "class Block(nn.Module):  × 2" in out


def test_explain_prints_the_layout_of_what_was_asked(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "explain", MODEL, "--spec", SPEC, "h.*.mlp", *SMALL, "--json")
    assert status == 0
    names = [row["name"] for row in json.loads(out)["parameters"]]
    assert names == [f"h.{i}.mlp.{m}.{p}" for i in range(2) for m in ("c_fc", "c_proj") for p in ("weight", "bias")]
    status, out, _ = run(capsys, "explain", MODEL, "--spec", SPEC, "h.*.mlp", *SMALL)
    assert "h.*.mlp.c_fc.weight  × 2" in out
    status, out, _ = run(capsys, "explain", MODEL, "--spec", SPEC, "h.1.attn.c_attn.weight", *SMALL)
    assert "gpt2.py:" in out  # the line whose attention needs the head size whole
    status, _, err = run(capsys, "explain", MODEL, "--spec", SPEC, "h.9", *SMALL)
    assert status == 2
    assert err.count("\n") == 1


@pytest.mark.parametrize("tolerance", [1e-10, -1.0])
def test_verify_says_what_it_compared_and_exits_with_the_verdict(
    tolerance: float, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    tolerances = importlib.import_module("tpcompiler.verification.against_model").TOLERANCE
    monkeypatch.setitem(tolerances, torch.float64, tolerance)
    status, out, _ = run(capsys, "verify", MODEL, "--spec", SPEC, *SMALL, "--json")
    found = json.loads(out)
    assert status == (0 if tolerance > 0 else 1)
    assert found["passed"] is (tolerance > 0)
    assert found["max_rel_error"] == max(case["max_rel_error"] for case in found["cases"])
    assert all({"what", "max_rel_error", "passed"} <= set(case) for case in found["cases"])


def test_verify_says_what_the_check_refuses() -> None:
    from tpcompiler.check.report import CheckReport, Refusal
    from tpcompiler.cli.tables import verify_report
    from tpcompiler.runtime import Mesh
    from tpcompiler.verification.verify import Report

    refusal = Refusal("mul", "net.py:3: y = x * 2", "partial over tensor", "whole")
    found = CheckReport(nodes=1, distinct_steps=1, seconds=0.1, refused=(refusal,)).as_dict()
    report = Report("Net", Mesh.of({"tensor": 2}), (), {}, 1.0, found)
    console = Console(width=200)
    with console.capture() as shown:
        console.print(verify_report(report.as_dict()))
    for text in (str(report), shown.get()):
        assert "FAILED" in text and str(refusal) in text


def test_verify_takes_only_types_of_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "verify", MODEL, "--spec", SPEC, *SMALL, "--dtype", "int8")
    assert status == 2
    assert "--dtype int8: not a floating-point type" in err
