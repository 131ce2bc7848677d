"""The degree is a deployment choice: uneven heads in real processes, and weights that go from degree to degree."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

import tpcompiler as tpc
from models import gpt2, llama
from tpcompiler import weights

CASES = [
    ("gpt2", 5, 5, 2),
    ("gpt2", 5, 5, 3),
    ("gpt2", 6, 6, 4),
    ("gpt2", 12, 12, 5),
    ("llama", 5, 1, 2),
    ("llama", 6, 1, 4),
    ("llama", 6, 2, 3),
    ("llama", 6, 2, 5),
    ("llama", 6, 3, 4),
    ("llama", 6, 3, 5),
    ("llama", 12, 2, 8),
    ("llama", 12, 3, 5),
]


def build(name: str, heads: int, kv: int) -> tuple[Any, Any]:
    sizes = {"vocab": 129, "positions": 32, "hidden": 4 * heads, "heads": heads, "layers": 1}
    if name == "gpt2":
        return (lambda: gpt2.Model(**sizes)), gpt2.example_inputs(vocab=129)
    return (lambda: llama.Model(**sizes, kv_heads=kv, intermediate=37)), llama.example_inputs(vocab=129)


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "heads", "kv", "degree"), CASES)
def test_uneven_heads_in_processes(name: str, heads: int, kv: int, degree: int) -> None:
    model, inputs = build(name, heads, kv)
    report = tpc.verify(model, inputs, {"mesh": {"tensor": degree}}, distributed=True)
    assert report.passed, str(report)
    assert any("processes" in case.what for case in report.cases)


def digests(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.glob("*.safetensors"))}


def test_weights_of_25_heads_come_back_from_other_degrees_bit_for_bit(tmp_path: Path) -> None:
    model, inputs = build("gpt2", 25, 25)
    compiled = {n: tpc.shard(model, inputs, {"mesh": {"tensor": n}}) for n in (8, 3, 5)}
    compiled[8].write(tmp_path / "8", dict(model().state_dict()))
    last = tmp_path / "8"
    for degree in (3, 5, 8):
        program, out = compiled[degree].program, tmp_path / f"to-{degree}"
        weights.reshard(last, program.dims, program.mesh, out, spec={"mesh": {"tensor": degree}})
        last = out
    assert digests(last) == digests(tmp_path / "8")
    assert len(digests(last)) == 8
