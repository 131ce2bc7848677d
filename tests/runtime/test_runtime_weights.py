"""Loading fills everything or says in one line what does not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tpcompiler.errors import WeightsError
from tpcompiler.runtime import Mesh, Parameters, Ranks, load, stored

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
DEGREE = 2


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = Parameters(weight=(5, 3))
        self.head = Parameters()
        self.head.weight = self.wte.weight
        self.ln = Parameters(scale=(), empty=(0, 4))
        self.register_buffer("steps", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("mask", torch.zeros(3, dtype=torch.bool), persistent=False)


def value(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).mul(100).to(dtype)


def write(directory: Path, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    """A directory as docs/format.md has it, of two weight-ranks; what each rank must find there."""
    ranks = [
        {"wte.weight": value((5, 3), dtype), "ln.scale": value((), dtype), "ln.empty": value((0, 4), dtype)}
        for _ in range(DEGREE)
    ]
    buffers = {"steps": value((2,), torch.int64), "mask": torch.tensor([True, False, True]), "gone": torch.ones(1)}
    for r, tensors in enumerate(ranks):
        save_file(tensors, directory / f"rank-{r:05d}.safetensors")
    save_file(buffers, directory / "buffers.safetensors")
    entries: list[dict[str, Any]] = [
        {"name": name, "kind": "parameter", "file": "rank-{rank:05d}.safetensors"} for name in ranks[0]
    ]
    entries[0]["aliases"] = ["head.weight"]
    entries += [{"name": name, "kind": "buffer", "file": "buffers.safetensors"} for name in buffers]
    files = [{"name": p.name, "bytes": p.stat().st_size} for p in directory.glob("*.safetensors")]
    seal(directory, {"mesh": [["tensor", DEGREE]], "tensors": entries, "files": files})
    return [tensors | buffers for tensors in ranks]


def seal(directory: Path, manifest: dict[str, Any]) -> None:
    manifest = {"format": "tpcompiler", "version": 1} | {k: v for k, v in manifest.items() if k != "sha256"}
    text = json.dumps(manifest).removesuffix("}") + ",\n"
    (directory / "manifest.json").write_text(text + stored.seal(text.encode()))


def ranks(rank: int, **mesh: int) -> Ranks:
    class Never:
        def __call__(self, over: tuple[str, ...]) -> Any:
            raise AssertionError("loading needs no communication")

    return Ranks(Mesh.of(mesh), rank, Never())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [8, 1 << 20])
def test_every_rank_finds_its_own(dtype: torch.dtype, block: int, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(stored, "BLOCK", block)
    written = write(tmp_path, dtype)
    for rank in range(3 * DEGREE):
        model = Model().to(dtype)
        load(model, tmp_path, ranks(rank, data=3, tensor=DEGREE))
        found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, t in found.items():
            assert torch.equal(t, written[rank % DEGREE][name]), name
            assert t.dtype == written[rank % DEGREE][name].dtype
        assert model.head.weight is model.wte.weight


def test_a_tied_weight_is_found_by_its_other_name(tmp_path: Path) -> None:
    written = write(tmp_path)
    model = Model()
    del model.wte.weight
    load(model, tmp_path, ranks(1, tensor=DEGREE))
    assert torch.equal(model.head.weight, written[1]["wte.weight"])


def test_values_take_the_models_dtype_and_memory_order(tmp_path: Path) -> None:
    written = write(tmp_path)
    model = Model()
    model.wte.weight = nn.Parameter(torch.empty(3, 5, dtype=torch.bfloat16).T)
    del model.head.weight
    load(model, tmp_path, ranks(0, tensor=DEGREE))
    assert torch.equal(model.wte.weight, written[0]["wte.weight"].bfloat16())


def test_a_program_without_split_weights_loads_alone(tmp_path: Path) -> None:
    write(tmp_path)
    edit(tmp_path, mesh=[])
    load(Model(), tmp_path, Ranks.single())


def edit(directory: Path, **changes: Any) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    seal(directory, manifest | changes)


def cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def wrong_shape(model: Model, _: Path) -> None:
    model.ln = Parameters(scale=(2,), empty=(0, 4))


def surplus(model: Model, _: Path) -> None:
    model.extra = Parameters(weight=(1,))


def lacking(model: Model, _: Path) -> None:
    del model.ln.scale


def on_meta(model: Model, _: Path) -> None:
    model.to("meta")


def wrong_kind(model: Model, _: Path) -> None:
    model.steps = model.steps.float()


def alter(_: Model, directory: Path) -> None:
    path = directory / "manifest.json"
    path.write_text(path.read_text().replace('"head.weight"', '"tail.weight"'))


def lengthen(_: Model, directory: Path) -> None:
    with (directory / "rank-00001.safetensors").open("ab") as file:
        file.write(b"more")


def leave(directory: Path, file: str) -> None:
    """Writes a manifest, with a right digest, that sends the reader elsewhere."""
    entries = json.loads((directory / "manifest.json").read_text())["tensors"]
    edit(directory, tensors=[entry | {"file": file} for entry in entries])


ERRORS: dict[str, tuple[Any, str]] = {
    "no manifest": (lambda m, d: (d / "manifest.json").unlink(), "no manifest.json here"),
    "not json": (lambda m, d: cut(d / "manifest.json", 40), "manifest.json: truncated or not JSON"),
    "other version": (lambda m, d: edit(d, version=2), "version 2"),
    "other degree": (lambda m, d: edit(d, mesh=[["tensor", 4]]), "sharded for tensor 4, and 2 run"),
    "other mesh": (lambda m, d: edit(d, mesh=[["kv", 2], ["tensor", 2]]), "sharded for kv 2, and 1 run"),
    "no rank file": (lambda m, d: (d / "rank-00001.safetensors").unlink(), "rank-00001.safetensors: missing"),
    "cut in the header": (
        lambda m, d: cut(d / "rank-00001.safetensors", 30),
        "truncated: 30 bytes",
    ),
    "cut in the data": (lambda m, d: cut(d / "rank-00001.safetensors", -4), "truncated"),
    "empty file": (lambda m, d: cut(d / "rank-00001.safetensors", 0), "truncated: 0 bytes"),
    "wrong shape": (wrong_shape, r"ln.scale has the shape \[\], the model \[2\]"),
    "a name too many in the model": (surplus, "no 'extra.weight', which the model needs"),
    "a name too many in the file": (lacking, "'ln.scale', which the model does not have"),
    "altered": (alter, "manifest.json: altered"),
    "no format": (lambda m, d: edit(d, format="other"), "not a manifest of tpcompiler"),
    "keys missing": (lambda m, d: edit(d, tensors=[{"name": "x"}]), "not a manifest: 'kind'"),
    "another directory": (lambda m, d: leave(d, "../rank-{rank:05d}.safetensors"), "not a file name: '../rank-"),
    "another disk": (lambda m, d: leave(d, "/etc/{rank:05d}"), "not a file name"),
    "any attribute": (lambda m, d: leave(d, "{rank.__class__}"), "not a file name"),
    "a file longer than it was": (lengthen, "rank-00001.safetensors: altered: .* the manifest says"),
    "an unlisted file": (lambda m, d: edit(d, files=[]), "the manifest does not list it"),
    "on meta": (on_meta, "to_empty"),
    "wrong kind": (wrong_kind, "steps is int64, in the model float32"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_does_not_fit_is_told_in_a_line(case: str, tmp_path: Path) -> None:
    spoil, message = ERRORS[case]
    write(tmp_path)
    model = Model()
    spoil(model, tmp_path)
    with pytest.raises(WeightsError, match=message) as e:
        load(model, tmp_path, ranks(1, tensor=DEGREE))
    assert "\n" not in str(e.value)


def test_the_runtime_needs_torch_alone() -> None:
    """In a new interpreter, nothing of the compiler is imported, and no third package but torch and what it needs."""
    script = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import tpcompiler.runtime\n"
        "new = {n for n in set(sys.modules) - before if n.split('.')[0] not in sys.stdlib_module_names}\n"
        "print(*sorted(n for n in new if n.split('.')[0] != 'torch'))\n"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    allowed = ("tpcompiler.runtime.", "tpcompiler.errors")
    assert [n for n in out if not n.startswith(allowed) and n not in ("tpcompiler", "tpcompiler.runtime")] == []
