"""`tpc calibrate`: what it measures makes a description that `hardware:` takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tpcompiler.cli import main
from tpcompiler.cost.measured_rates import fit
from tpcompiler.spec.schema import Spec


def test_a_line_is_found_again() -> None:
    alpha, beta = fit([(n, 5e-5 + n / 3e11) for n in (1e3, 1e5, 1e7, 1e9)])
    assert alpha == pytest.approx(5e-5, rel=1e-6)
    assert beta == pytest.approx(3e11, rel=1e-6)


def test_the_machine_at_hand_is_described(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    out = tmp_path / "here.yaml"
    assert main.main(["calibrate", "--device", "cpu", "--base", "a100", "-o", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    hardware = Spec.load({"mesh": {"tensor": 2}, "hardware": str(out)}).hardware
    assert hardware.peak_tflops == found["peak_tflops"] > 0
    assert 0 < hardware.attention_efficiency <= 1
    assert set(hardware.measured) == {"efficiency", "narrow", "attention_efficiency"} | {
        "bandwidth_gbps",
        "bandwidth_efficiency",
    }
    assert hardware.beta_gbps == Spec.load({"mesh": {"tensor": 2}, "hardware": "a100"}).hardware.beta_gbps


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--device", "tpu"), "--device tpu: not a kind of device; write cuda or cpu"),
        (("--base", "h2000"), "--base h2000"),
        (("-o", "machine.json"), "a .yaml file"),
        pytest.param(
            ("--device", "cuda"),
            "no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_what_is_wrong_is_one_line(arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["calibrate", *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.strip().splitlines()) == 1
