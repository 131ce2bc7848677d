"""Writes and reads the text of `manifest.json`: strict, versioned, and sealed with a digest of its own."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tpcompiler.errors import WeightsError
from tpcompiler.layout import Concat, Dim, Factor, Product
from tpcompiler.runtime.mesh import Mesh
from tpcompiler.runtime.runs import Runs
from tpcompiler.runtime.stored import (
    DTYPES,
    FORMAT,
    MANIFEST,
    VERSION,
    check_file_name,
    parse_manifest,
    read_manifest,
    seal,
)
from tpcompiler.weights.layouts import Layout, RankRuns
from tpcompiler.weights.manifest import KINDS, Entry, Manifest
from tpcompiler.weights.tensor_files import CODES, FileInfo, write_text


def save_manifest(manifest: Manifest, directory: Path) -> FileInfo:
    """Writes and syncs `manifest.json`. It is written last, because a directory without it counts as unfinished."""
    return write_text(directory / MANIFEST, encode(manifest))


def load_manifest(directory: Path | str) -> Manifest:
    """Reads and checks `manifest.json`.

    Raises `WeightsError` when it is missing, altered, of another version or contradicts itself, and when a layout
    leaves elements out.
    """
    return decode(read_manifest(directory), Path(directory) / MANIFEST)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Dim(_Strict):
    size: int = Field(ge=0)
    tree: Any = None
    runs: list[list[tuple[int, int]]]
    rank: list[int]


class _Tensor(_Strict):
    name: str
    kind: str
    dtype: str
    shape: list[int]
    dims: list[int]
    file: str
    aliases: list[str] = []
    stored: list[str] = []
    like: str = ""
    trainable: bool = True


class _File(_Strict):
    name: str
    bytes: int
    sha256: str


class _Manifest(_Strict):
    format: str
    version: int
    tpcompiler: str
    torch: str
    mesh: list[tuple[str, int]]
    spec: dict[str, Any]
    dims: list[_Dim]
    tensors: list[_Tensor]
    files: list[_File]
    sha256: str


def encode(manifest: Manifest) -> str:
    """The manifest as JSON, with one line for each dimension, tensor and file. Equal dimensions are written once."""
    dims: dict[RankRuns, int] = {}
    tensors = []
    for e in manifest.entries:
        places = [dims.setdefault(d, len(dims)) for d in e.layout.dims]
        tensors.append(_tensor(e, places))
    out: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "tpcompiler": manifest.tpcompiler,
        "torch": manifest.torch,
        "mesh": [list(d) for d in manifest.mesh.dims],
        "spec": manifest.spec,
        "dims": [_dim(d) for d in dims],
        "tensors": tensors,
        "files": [{"name": f.name, "bytes": f.bytes, "sha256": f.sha256} for f in manifest.files],
    }
    blocks = ("dims", "tensors", "files")
    lines = [f"{_dump(key)}: {_block(value) if key in blocks else _dump(value)}" for key, value in out.items()]
    text = "{\n" + ",\n".join(lines) + ",\n"
    return text + seal(text.encode())


def _dim(held: RankRuns) -> dict[str, Any]:
    tree = {} if held.tree is None else {"tree": to_tree(held.tree)}
    slices = [[list(run) for run in runs] for runs in held.runs]
    return {"size": held.size, **tree, "runs": slices, "rank": list(held.rank)}


def _tensor(e: Entry, dims: list[int]) -> dict[str, Any]:
    always = {"name": e.name, "kind": e.kind, "dtype": CODES[e.dtype], "shape": list(e.shape), "dims": dims}
    optional = {"aliases": list(e.aliases), "stored": list(e.stored), "like": e.like, "trainable": e.trainable}
    default = {"aliases": [], "stored": [], "like": "", "trainable": True}
    return always | {"file": e.file} | {key: value for key, value in optional.items() if value != default[key]}


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _block(items: Iterable[Any]) -> str:
    lines = ",\n".join("  " + _dump(item) for item in items)
    return f"[\n{lines}\n]" if lines else "[]"


def decode(raw: bytes, path: Path) -> Manifest:
    """The inverse of `encode`. Raises `WeightsError`, which names `path`."""
    parse_manifest(raw, path)
    try:
        return _build(_Manifest.model_validate_json(raw))
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise WeightsError(f"{path}: {where}: {first['msg'].lower()}") from None
    except (ValueError, RecursionError) as e:
        raise WeightsError(f"{path}: {e}") from None
    except WeightsError as e:
        raise WeightsError(f"{path}: {e}") from None


def _build(wire: _Manifest) -> Manifest:
    mesh = Mesh(tuple(wire.mesh))
    if len(set(mesh.names)) < len(mesh.names) or any(degree < 1 for _, degree in mesh.dims):
        raise ValueError(f"mesh: {wire.mesh} is none")
    dims = [_held(d, mesh, i) for i, d in enumerate(wire.dims)]
    entries = tuple(_entry(t, dims, mesh) for t in wire.tensors)
    if len({e.name for e in entries}) < len(entries):
        raise ValueError("tensors: a name stands twice")
    for name in (f.name for f in wire.files):
        check_file_name(name or ".")
    files = tuple(FileInfo(f.name, f.bytes, f.sha256) for f in wire.files)
    return Manifest(mesh, entries, files, wire.spec, wire.tpcompiler, wire.torch)


def _held(wire: _Dim, mesh: Mesh, i: int) -> RankRuns:
    runs: tuple[Runs, ...] = tuple(tuple(r) for r in wire.runs)
    for r in runs:
        bounds = [bound for run in r for bound in run]
        inside = not bounds or 0 <= bounds[0] <= bounds[-1] <= wire.size
        if not inside or any(a >= b for a, b in pairwise(bounds)):
            raise ValueError(f"dims.{i}: runs are not ascending within {wire.size}")
    if len(wire.rank) != mesh.size or any(not 0 <= j < len(runs) for j in wire.rank):
        raise ValueError(f"dims.{i}: needs one slice for each of {mesh.size} ranks")
    if wire.tree is None:
        return RankRuns(wire.size, runs, tuple(wire.rank))
    tree = from_tree(wire.tree)
    if missing := [name for name in tree.over if name not in mesh]:
        raise ValueError(f"dims.{i}: split over {missing[0]}, which the mesh ({mesh}) does not have")
    held = RankRuns.of(tree, mesh)
    if (held.size, held.runs, held.rank) != (wire.size, runs, tuple(wire.rank)):
        raise ValueError(f"dims.{i}: tree and runs disagree")
    return held


def _entry(wire: _Tensor, dims: list[RankRuns], mesh: Mesh) -> Entry:
    if wire.kind not in KINDS:
        raise ValueError(f"{wire.name}: unknown kind {wire.kind!r}")
    if wire.dtype not in DTYPES:
        raise ValueError(f"{wire.name}: unknown dtype {wire.dtype!r}")
    if any(not 0 <= i < len(dims) for i in wire.dims) or [dims[i].size for i in wire.dims] != wire.shape:
        raise ValueError(f"{wire.name}: shape {wire.shape} and dims disagree")
    entry = Entry(
        name=wire.name,
        kind=wire.kind,
        dtype=DTYPES[wire.dtype],
        layout=Layout(tuple(dims[i] for i in wire.dims), mesh.size),
        file=wire.file,
        aliases=tuple(wire.aliases),
        stored=tuple(wire.stored),
        like=wire.like,
        trainable=wire.trainable,
    )
    check_file_name(entry.file)
    if entry.file and not entry.per_rank and not entry.layout.is_whole:
        raise ValueError(f"{entry.name}: split, but all ranks share the file {entry.file}")
    entry.check()
    return entry


def to_tree(dim: Dim) -> Any:
    """A layout as JSON: an integer for a dimension that is whole and has no name, else an object."""
    match dim:
        case Factor(n, "", ()):
            return n
        case Factor(n, name, split):
            return {"size": n, "axis": name, "over": list(split)}
        case Product(parts):
            return {"product": [to_tree(p) for p in parts]}
        case Concat(parts):
            return {"concat": [to_tree(p) for p in parts]}
    raise AssertionError(dim)


def from_tree(tree: Any) -> Dim:
    """The inverse of `to_tree`. Raises `ValueError` for anything else."""
    match tree:
        case bool():
            pass
        case int(n) if n >= 0:
            return Factor(n)
        case {"size": int(n), "axis": str(name), "over": list(over)} if n >= 0 and all(type(o) is str for o in over):
            return Factor(n, name, tuple(over))
        case {"product": list(parts)}:
            return Product(tuple(from_tree(p) for p in parts))
        case {"concat": list(parts)}:
            return Concat(tuple(from_tree(p) for p in parts))
    raise ValueError(f"not a layout: {json.dumps(tree)[:80]}")
