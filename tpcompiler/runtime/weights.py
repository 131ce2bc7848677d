"""Fills a program's parameters and buffers from the directory that `tpc shard` or the trainer wrote (docs/format.md).

Needs torch alone. Reads a file once, front to back where the model's order is the file's, a block at a time: a rank
never has more in memory than its own model and one block.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpcompiler.errors import WeightsError
from tpcompiler.runtime.groups import Ranks
from tpcompiler.runtime.mesh import Mesh

_BLOCK = 32 << 20  # bytes read at once
_VERSION = 1  # of the manifest
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def load(model: nn.Module, directory: str | Path, ranks: Ranks) -> None:
    """Fills every parameter and buffer of `model` with this rank's slice, cast to the model's own dtype.

    Errors: `WeightsError`, one line, when a file or a name is missing, a name is left over, a shape does not fit, or a
    parameter is still on the meta device.
    """
    directory = Path(directory)
    manifest = _manifest(directory)
    mesh = Mesh(tuple((name, degree) for name, degree in manifest["mesh"]))
    rank = _weight_rank(mesh, ranks, directory)
    entries = [t for t in manifest["tensors"] if t["kind"] in ("parameter", "buffer")]
    sizes = {f["name"]: f["bytes"] for f in manifest["files"]}
    todo = _targets(model)
    with torch.no_grad():
        for file in dict.fromkeys(t["file"] for t in entries):
            if not file:
                raise WeightsError(f"{directory}: holds the program alone, no weights; tpc shard --weights writes them")
            path = directory / file.format(rank=rank)
            if path.name not in sizes and not any(_names(t) & todo.keys() for t in entries if t["file"] == file):
                continue
            source = SafetensorsFile(path)
            for t in sorted((t for t in entries if t["file"] == file), key=lambda t: source.start(t["name"])):
                _fill(source, t, todo)
    if todo:
        raise WeightsError(f"{directory}: has no {next(iter(todo))!r}, which the model needs")


def _weight_rank(mesh: Mesh, ranks: Ranks, directory: Path) -> int:
    """The file of this rank: its place on the mesh of the dimensions that split weights."""
    for name, degree in mesh.dims:
        running = dict(ranks.mesh.dims).get(name, 1)
        if running != degree:
            raise WeightsError(
                f"{directory}: sharded for {name} {degree}, and {running} run; start {mesh} or reshard it (tpc reshard)"
            )
    return mesh.rank({name: ranks.coords.get(name, 0) for name in mesh.names})


def _manifest(directory: Path) -> dict[str, Any]:
    path = directory / "manifest.json"
    try:
        out = json.loads(path.read_bytes())
        version = out["version"]
    except OSError as e:
        raise WeightsError(f"{path}: cannot read: {(e.strerror or str(e)).lower()}") from None
    except (ValueError, KeyError, TypeError) as e:
        raise WeightsError(f"{path}: not a manifest: {e}") from None
    if version != _VERSION:
        raise WeightsError(f"{path}: format version {version}; this runtime reads version {_VERSION}")
    return out


def _targets(model: nn.Module) -> dict[str, Tensor]:
    """All names of all parameters and buffers; a tied one stands under each of its names."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, t in named:
        if t.is_meta:
            raise WeightsError(f"{name} is on the meta device: call model.to_empty(device=…) before loading")
    return dict(named)


def _names(entry: Mapping[str, Any]) -> set[str]:
    return {entry["name"], *entry.get("aliases", ())}


def _fill(source: SafetensorsFile, entry: Mapping[str, Any], todo: dict[str, Tensor]) -> None:
    found = [name for name in _names(entry) if name in todo]
    if not found:
        if entry["kind"] == "buffer":  # the program may have folded it away
            return
        raise WeightsError(f"{source.path}: holds {entry['name']!r}, which the model does not have")
    filled: list[Tensor] = []
    for name in found:
        target = todo.pop(name)
        if not any(target is t for t in filled):
            source.read_into(entry["name"], target)
            filled.append(target)


@dataclass(frozen=True)
class _Spot:
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """A safetensors file: where its tensors lie, and their values."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as f:
            self._spots = self._header(f)

    def start(self, name: str) -> int:
        return self._spot(name).start

    def read_into(self, name: str, target: Tensor) -> None:
        """Copies the tensor `name` into `target`, of the same shape and of the same or another dtype of its kind."""
        spot = self._spot(name)
        if spot.shape != tuple(target.shape):
            raise WeightsError(f"{self.path}: {name} has the shape {list(spot.shape)}, the model {list(target.shape)}")
        if spot.dtype != target.dtype and spot.dtype.is_floating_point != target.dtype.is_floating_point:
            raise WeightsError(f"{self.path}: {name} is {_short(spot.dtype)}, in the model {_short(target.dtype)}")
        whole = target if target.is_contiguous() else torch.empty(spot.shape, dtype=target.dtype, device=target.device)
        flat = whole.view(-1)
        at = 0
        for piece in self._pieces(spot):
            flat[at : at + piece.numel()].copy_(piece)
            at += piece.numel()
        if whole is not target:
            target.copy_(whole)

    def _pieces(self, spot: _Spot) -> Iterator[Tensor]:
        with self._open() as f:
            f.seek(spot.start)
            left = spot.stop - spot.start
            while left:
                block = bytearray(min(left, _BLOCK))
                if f.readinto(block) != len(block):
                    raise WeightsError(f"{self.path}: truncated: ends before byte {spot.stop}")
                yield torch.frombuffer(block, dtype=spot.dtype)
                left -= len(block)

    @contextmanager
    def _open(self) -> Iterator[BufferedReader]:
        try:
            with open(self.path, "rb") as f:
                yield f
        except OSError as e:
            raise WeightsError(f"{self.path}: cannot read: {(e.strerror or str(e)).lower()}") from None

    def _spot(self, name: str) -> _Spot:
        if name not in self._spots:
            raise WeightsError(f"{self.path}: has no {name!r}, which manifest.json says it holds")
        return self._spots[name]

    def _header(self, f: BufferedReader) -> dict[str, _Spot]:
        prefix = f.read(8)
        n = int.from_bytes(prefix, "little")
        text = f.read(n) if len(prefix) == 8 and n < 100_000_000 else b""
        out: dict[str, _Spot] = {}
        try:
            for name, e in json.loads(text).items():
                if name != "__metadata__":
                    start, stop = (8 + n + offset for offset in e["data_offsets"])
                    out[name] = _Spot(_DTYPES[e["dtype"]], tuple(e["shape"]), start, stop)
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise WeightsError(f"{self.path}: not a safetensors file: {e}") from None
        for name, s in out.items():
            if s.stop - s.start != prod(s.shape) * s.dtype.itemsize:
                what = f"{name} {list(s.shape)} has {s.stop - s.start} bytes"
                raise WeightsError(f"{self.path}: the header is corrupt: {what}")
        return out


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
