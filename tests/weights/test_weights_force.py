"""`tpc shard -o` replaces weights and checkpoints only with `--force`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tpcompiler import weights
from tpcompiler.cli.main import main
from tpcompiler.errors import WeightsError
from tpcompiler.layout import Factor
from tpcompiler.program import Parameter
from tpcompiler.runtime.mesh import Mesh

PARAMETERS = [Parameter("w", "w", (4,), torch.float32)]
DIMS = {"w": (Factor(4, "h", ("tensor",)),)}


def write(directory: Path, *, with_weights: bool) -> dict[str, bytes]:
    tensors = {"w": torch.arange(4.0)} if with_weights else None
    weights.shard(tensors, PARAMETERS, DIMS, Mesh.of({"tensor": 2}), directory)
    return contents(directory)


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def test_weights_and_checkpoints_are_refused_and_programs_are_not(tmp_path: Path) -> None:
    write(tmp_path / "program", with_weights=False)
    weights.refuse_to_replace(tmp_path / "program")
    weights.refuse_to_replace(tmp_path / "new")
    write(tmp_path / "weights", with_weights=True)
    with pytest.raises(WeightsError, match="weights: holds weights; name another directory, or add --force"):
        weights.refuse_to_replace(tmp_path / "weights")
    (tmp_path / "weights/manifest.json").write_text("damaged")
    with pytest.raises(WeightsError, match="holds weights"):
        weights.refuse_to_replace(tmp_path / "weights")
    (tmp_path / "weights/state.json").write_text("{}")
    with pytest.raises(WeightsError, match="holds a checkpoint of a training run"):
        weights.refuse_to_replace(tmp_path / "weights")


def test_the_command_needs_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = write(tmp_path / "d", with_weights=True)
    command = ["shard", "models/gpt2.py", "--spec", "specs/2way.yaml", "-o", str(tmp_path / "d")]
    assert main(command) == 2
    assert "add --force" in "".join(capsys.readouterr())
    assert contents(tmp_path / "d") == old
    assert main([*command, "--force"]) == 0
    assert "rank-00000.safetensors" not in contents(tmp_path / "d")
    assert "model.py" in contents(tmp_path / "d")
