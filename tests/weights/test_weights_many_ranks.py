"""What 512 ranks cost: a checkpoint's entries are made, and its manifest is written and read, in a second each."""

from __future__ import annotations

import gc
from pathlib import Path
from time import process_time  # others may share the machine
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tpcompiler.layout import Concat, Dim, Factor, Product
from tpcompiler.program import Parameter
from tpcompiler.runtime.mesh import Mesh
from tpcompiler.runtime.runs import Runs, length
from tpcompiler.train.hold.owned import checkpoint_mesh, entries, layout
from tpcompiler.weights import FileInfo, Manifest, load_manifest, save_manifest

LAYERS = 96
WIDE, HEADS = Factor(8192), Factor(64, "heads", ("tensor",))
QKV = Concat((Product((HEADS, Factor(128))),) * 3)
FF = Factor(32768, "ff", ("tensor",))
LAYER: dict[str, tuple[Dim, ...]] = {
    "ln_1.weight": (WIDE,),
    "ln_1.bias": (WIDE,),
    "attn.qkv.weight": (QKV, WIDE),
    "attn.qkv.bias": (QKV,),
    "attn.out.weight": (WIDE, Product((HEADS, Factor(128)))),
    "attn.out.bias": (WIDE,),
    "ln_2.weight": (WIDE,),
    "ln_2.bias": (WIDE,),
    "mlp.up.weight": (FF, WIDE),
    "mlp.up.bias": (FF,),
    "mlp.down.weight": (WIDE, FF),
    "mlp.down.bias": (WIDE,),
}
MESHES = [{"data": 64, "tensor": 8}, {"data": 8, "tensor": 64}, {"tensor": 512}]


def program(mesh: Mesh) -> Any:
    dims = {f"h.{i}.{name}": tree for i in range(LAYERS) for name, tree in LAYER.items()}
    shapes = {name: tuple(d.size for d in tree) for name, tree in dims.items()}
    parameters = tuple(Parameter(name, name, shape, torch.bfloat16) for name, shape in shapes.items())
    return SimpleNamespace(mesh=mesh, dims=dims, capture=SimpleNamespace(parameters=parameters))


@pytest.mark.parametrize(
    "degrees", [pytest.param(m, marks=pytest.mark.nightly if i else ()) for i, m in enumerate(MESHES)], ids=str
)
def test_a_manifest_of_512_ranks_takes_a_second(degrees: dict[str, int], tmp_path: Path) -> None:
    mesh = Mesh.of(degrees)
    layout.cache_clear()
    gc.collect()
    gc.freeze()  # what the tests before have left is not walked through while this one is timed
    started = process_time()
    made = tuple(entries(program(mesh), torch.float32))
    making = process_time() - started
    files = [FileInfo(f"rank-{r:05d}.safetensors", 1, "0" * 64) for r in range(512)]
    save_manifest(Manifest(checkpoint_mesh(mesh), made).with_files(files), tmp_path)
    started = process_time()
    read = load_manifest(tmp_path)
    reading = process_time() - started
    gc.unfreeze()
    assert read.entries == made
    assert making < 1 and reading < 1, f"entries {making:.2f} s, reading {reading:.2f} s"
    started = process_time()
    spots = read.contents("rank-00511.safetensors")
    assert process_time() - started < 1
    held: list[Runs] = [d.runs[d.rank[511]] for d in made[0].layout.dims]
    assert spots[0].shape == tuple(map(length, held))
    assert len(spots) == LAYERS * len(LAYER)
