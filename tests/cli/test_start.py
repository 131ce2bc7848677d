"""`tpc doctor` and `tpc init`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tpcompiler.cli import findings, main
from tpcompiler.spec.schema import Spec

ROOT = Path(__file__).parents[2]
GPT2 = str(ROOT / "models/gpt2.py")


def test_doctor_says_what_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["usable"]
    assert {f["what"] for f in found["findings"]} >= {"Python", "torch", "gloo", "transformers"}
    assert all(f["state"] in ("ok", "limited", "missing") and f["means"] for f in found["findings"])
    assert main.main(["doctor"]) == 0
    assert "torch" in capsys.readouterr().out


@pytest.mark.parametrize(("version", "state", "code"), [("2.4.0", "missing", 1), ("2.99.1+cu1", "limited", 0)])
def test_doctor_knows_which_versions_of_torch_work(
    version: str, state: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(findings.torch, "__version__", version)
    assert main.main(["doctor", "--json"]) == code
    found = json.loads(capsys.readouterr().out)["findings"]
    assert next(f["state"] for f in found if f["what"] == "torch") == state


def test_a_first_spec_works_and_names_what_the_model_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "first.yaml"
    assert main.main(["init", GPT2, "--tensor", "3", "--set", "layers=1", "-o", str(out)]) == 0
    spec = Spec.load(out)
    assert spec.mesh.tensor == 3
    assert spec.model == {"layers": 1}
    assert spec.explicit == {"attention", "mlp", "embedding", "head"}
    assert "hidden: 128" in out.read_text()
    capsys.readouterr()
    assert main.main(["shard", GPT2, "--spec", str(out), "--json"]) == 0
    before = out.read_text()
    assert main.main(["init", GPT2, "-o", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert out.read_text() == before


def test_a_model_that_cannot_be_loaded_leaves_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "first.yaml"
    assert main.main(["init", "nowhere.py", "-o", str(out)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not out.exists()
