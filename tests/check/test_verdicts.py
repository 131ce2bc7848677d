"""Verdicts that are kept: a proof is found again by whoever runs the same program, and by nobody else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tpcompiler as tpc
from tpcompiler.api import Sharded, compile_capture
from tpcompiler.capture import capture
from tpcompiler.check import check, verdicts
from tpcompiler.errors import CheckError
from tpcompiler.layout import unsplit
from tpcompiler.spec.schema import Spec


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 48), nn.Linear(48, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def compiled(degree: int = 2) -> Sharded:
    return compile_capture(capture(Model, (torch.randn(2, 6, 12),)), Spec.load({"mesh": {"tensor": degree}}))


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "tpcompiler" / "proven"


def test_one_proof_serves_every_compilation_of_a_program(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled().check.passed
    assert len(list(kept.iterdir())) == 1
    monkeypatch.setattr("tpcompiler.check.check", lambda *a, **k: pytest.fail("proven again"))
    assert compiled().check.passed


def test_a_digest_names_all_that_a_verdict_depends_on() -> None:
    one, other = compiled(), compiled(3)
    program, name = one.program, verdicts.digest(one.program, one.source)
    assert name == verdicts.digest(compiled().program, one.source)
    changed = [
        verdicts.digest(program, one.source + "\n"),
        verdicts.digest(other.program, one.source),
        verdicts.digest(
            replace(program, dims={**program.dims, "up.bias": tuple(map(unsplit, program.dims["up.bias"]))}), one.source
        ),
        verdicts.digest(replace(program, left_sharded=frozenset({0})), one.source),
    ]
    node = next(n for n in program.graph.nodes if n.target is torch.ops.aten.tanh.default)
    node.target = torch.ops.aten.sigmoid.default
    changed.append(verdicts.digest(program, one.source))
    assert len({name, *changed}) == 1 + len(changed)


def test_a_refusal_is_not_kept(kept: Path) -> None:
    sharded = compiled()
    node = next(n for n in sharded.program.graph.nodes if n.target is torch.ops.aten.tanh.default)
    node.target = torch.ops.aten.sigmoid.default
    with pytest.raises(CheckError):
        sharded.proven()
    assert not kept.exists()


def test_what_is_damaged_is_no_proof(kept: Path) -> None:
    sharded = compiled()
    assert sharded.check.passed
    (file,) = kept.iterdir()
    file.write_text("{")
    assert verdicts.recall(file.stem) is None


def test_shard_gives_no_program_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = check(compiled().program, source="import os")
    assert not refusal.passed
    monkeypatch.setattr("tpcompiler.check.proof", lambda program, source: refusal)
    with pytest.raises(CheckError, match="import of os"):
        tpc.shard(Model, (torch.randn(2, 6, 12),), {"mesh": {"tensor": 2}})
