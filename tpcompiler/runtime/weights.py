"""Fills a program's parameters and buffers from the directory that `tpc shard` or the trainer wrote (docs/format.md).

It needs only torch. Each file is read once, in blocks, so that a rank holds no more in memory than its own model and
one block. The manifest's digest and the names and sizes of files are checked as `tpcompiler.weights` checks them.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tpcompiler.errors import WeightsError
from tpcompiler.runtime.groups import Ranks
from tpcompiler.runtime.mesh import Mesh
from tpcompiler.runtime.stored import (
    MANIFEST,
    Reader,
    blocks,
    check_file_name,
    check_size,
    parse_manifest,
    read_manifest,
)


@dataclass(frozen=True)
class _Described:
    """What loading needs to know of a tensor, from the manifest."""

    names: tuple[str, ...]  # the first is its name in the file, the others are those of tied weights
    buffer: bool
    file: str


def load(model: nn.Module, directory: str | Path, ranks: Ranks) -> None:
    """Fills every parameter and buffer of `model` with this rank's slice, cast to the model's own dtype.

    Raises `WeightsError`, one line, when a file or a name is missing or altered, when the directory has a parameter
    that the model does not have, when a shape differs, or when a parameter is on the meta device.
    """
    directory = Path(directory)
    mesh, described, sizes = _manifest(directory)
    rank = _weight_rank(mesh, ranks, directory)
    todo = _targets(model)
    for file in dict.fromkeys(t.file for t in described):
        if not file:
            raise WeightsError(f"{directory}: holds a program without weights; tpc shard --weights writes them")
        path = directory / file.format(rank=rank)
        if path.name not in sizes:
            raise WeightsError(f"{path}: the manifest does not list it")
        check_size(path, sizes[path.name])
        with closing(Reader(path)) as reader:
            here = [t for t in described if t.file == file]
            for t in here:
                if t.names[0] not in reader.tensors:
                    raise WeightsError(f"{path}: has no {t.names[0]!r}, which {MANIFEST} says it holds")
            for t in sorted(here, key=lambda t: reader.tensors[t.names[0]].start):
                _fill(reader, t, todo)
    if todo:
        raise WeightsError(f"{directory}: has no {next(iter(todo))!r}, which the model needs")


def _manifest(directory: Path) -> tuple[Mesh, list[_Described], dict[str, int]]:
    """The mesh, the parameters and buffers, and the size of each file in bytes."""
    path = directory / MANIFEST
    data = parse_manifest(read_manifest(directory), path)
    try:
        mesh = Mesh(tuple((str(name), int(degree)) for name, degree in data["mesh"]))
        sizes = {str(f["name"]): int(f["bytes"]) for f in data["files"]}
        described = [
            _Described((t["name"], *t.get("aliases", ())), t["kind"] == "buffer", t["file"])
            for t in data["tensors"]
            if t["kind"] in ("parameter", "buffer")
        ]
        for name in (*(t.file for t in described), *sizes):
            check_file_name(name)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise WeightsError(f"{path}: not a manifest: {e}") from None
    return mesh, described, sizes


def _weight_rank(mesh: Mesh, ranks: Ranks, directory: Path) -> int:
    """The number of this rank's file: its rank on the mesh without dimensions that do not split weights."""
    for name, degree in mesh.dims:
        running = dict(ranks.mesh.dims).get(name, 1)
        if running != degree:
            raise WeightsError(
                f"{directory}: sharded for {name} {degree}, and {running} run; start {mesh} or reshard it (tpc reshard)"
            )
    return mesh.rank({name: ranks.coords.get(name, 0) for name in mesh.names})


def _targets(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name. A tied one is under each of its names."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, t in named:
        if t.is_meta:
            raise WeightsError(f"{name} is on the meta device: call model.to_empty(device=…) before loading")
    return dict(named)


def _fill(reader: Reader, described: _Described, todo: dict[str, Tensor]) -> None:
    found = [todo.pop(name) for name in dict.fromkeys(described.names) if name in todo]
    if not found and not described.buffer:  # a buffer may have been folded away by the program
        raise WeightsError(f"{reader.path}: holds {described.names[0]!r}, which the model does not have")
    for target in {id(t): t for t in found}.values():
        _read_into(reader, described.names[0], target)


@torch.no_grad()
def _read_into(reader: Reader, name: str, target: Tensor) -> None:
    """Copies a stored tensor into `target`, which must have the same shape and a dtype of the same kind."""
    stored = reader.tensors[name]
    if stored.shape != tuple(target.shape):
        raise WeightsError(f"{reader.path}: {name} has the shape {list(stored.shape)}, the model {list(target.shape)}")
    if stored.dtype != target.dtype and stored.dtype.is_floating_point != target.dtype.is_floating_point:
        kinds = [str(t).removeprefix("torch.") for t in (stored.dtype, target.dtype)]
        raise WeightsError(f"{reader.path}: {name} is {kinds[0]}, in the model {kinds[1]}")
    for block in blocks(stored.shape, stored.dtype.itemsize):
        rows = target if not block or not block[0] else target[slice(*block[0][0])]
        rows.copy_(reader.read(name, block))
