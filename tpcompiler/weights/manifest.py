"""`manifest.json`: what a directory of weights holds, precise enough to be read by other programs (docs/format.md)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from tpcompiler.layout import Dim
from tpcompiler.program import Parameter
from tpcompiler.runtime.mesh import Mesh
from tpcompiler.version import __version__
from tpcompiler.weights.layouts import Layout
from tpcompiler.weights.tensor_files import FileInfo, Spot, in_order

RANK_FILE = "rank-{rank:05d}.safetensors"
BUFFER_FILE = "buffers.safetensors"
EXTRA_FILE = "extra.safetensors"
KINDS = ("parameter", "buffer", "state", "extra")
DATA = "data"  # the mesh dimension whose ranks hold the same weights


def weight_mesh(mesh: Mesh) -> Mesh:
    """The mesh without its `data` dimension. Each of its ranks has a file of weights."""
    return Mesh(tuple((name, degree) for name, degree in mesh.dims if name != DATA))


@dataclass(frozen=True)
class Entry:
    """A tensor, and the file that holds each rank's slice of it.

    If `file` contains `{rank:05d}`, there is a file for each rank with that rank's slice; else one file holds the whole
    tensor. An empty `file` means that the tensor has no values here, as in a program without weights. `stored` lists
    the names that the tensor had in its source. A merge gives them back, and leaves out a tensor that has none. `like`
    names the parameter whose layout the tensor follows, for optimizer state.
    """

    name: str  # what the files call it
    kind: str  # parameter | buffer | state | extra
    dtype: torch.dtype
    layout: Layout
    file: str = RANK_FILE
    aliases: tuple[str, ...] = ()
    stored: tuple[str, ...] = ()
    like: str = ""
    trainable: bool = True

    @classmethod
    def of(cls, parameter: Parameter, dims: Iterable[Dim], mesh: Mesh) -> Entry:
        """The entry of a model's parameter or buffer. Buffers that are not split are stored once, all else per rank."""
        layout = Layout.of(tuple(dims), weight_mesh(mesh))
        once = parameter.buffer and layout.is_whole
        return cls(
            name=parameter.name,
            kind="buffer" if parameter.buffer else "parameter",
            dtype=parameter.dtype,
            layout=layout,
            file=BUFFER_FILE if once else RANK_FILE,
            aliases=parameter.aliases,
            stored=parameter.names if parameter.persistent else (),
            trainable=parameter.trainable and not parameter.buffer,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    @property
    def per_rank(self) -> bool:
        return "{rank" in self.file

    def file_of(self, rank: int) -> str:
        return self.file.format(rank=rank)

    def spot(self, rank: int) -> Spot:
        """The part of the tensor that a rank's file holds."""
        return Spot(self.name, self.dtype, self.layout.local_shape(rank))

    def check(self) -> None:
        """Raises `WeightsError` when no rank holds some element."""
        self.layout.check(self.name)


@dataclass(frozen=True)
class Manifest:
    """What a directory of weights holds. `mesh` has the dimensions whose ranks have files of their own."""

    mesh: Mesh
    entries: tuple[Entry, ...]
    files: tuple[FileInfo, ...] = ()
    spec: Mapping[str, Any] = field(default_factory=dict)
    tpcompiler: str = __version__
    torch: str = torch.__version__

    @cached_property
    def by_name(self) -> Mapping[str, Entry]:
        return {e.name: e for e in self.entries}

    @cached_property
    def _homes(self) -> Mapping[str, tuple[int, list[Entry]]]:
        """Maps each file to the rank that it belongs to and to its entries."""
        groups: dict[str, list[Entry]] = {}
        for e in filter(lambda e: e.file, self.entries):
            groups.setdefault(e.file, []).append(e)
        return {
            entries[0].file_of(r): (r, entries)
            for entries in groups.values()
            for r in range(self.mesh.size if entries[0].per_rank else 1)
        }

    @property
    def tensor_files(self) -> Iterable[str]:
        """The names of the files that hold tensors."""
        return self._homes.keys()

    def contents(self, file: str) -> list[Spot]:
        """The tensors of a file, in the file's order."""
        rank, entries = self._homes[file]
        return in_order(e.spot(rank) for e in entries)

    @property
    def has_weights(self) -> bool:
        """Whether every tensor is in a file. It is not so for a program that was sharded without weights."""
        return all(e.file for e in self.entries)

    def with_files(self, files: Iterable[FileInfo]) -> Manifest:
        return replace(self, files=tuple(sorted(files, key=lambda f: f.name)))

    def __str__(self) -> str:
        size = sum(f.bytes for f in self.files)
        lines = [f"{len(self.entries)} tensors, {self.mesh}, {len(self.files)} files, {size / 2**20:,.1f} MiB"]
        width = max((len(e.name) for e in self.entries), default=0)
        for e in self.entries:
            dims = ", ".join(str(d.size if d.is_whole or d.tree is None else d.tree) for d in e.layout.dims)
            dtype = str(e.dtype).removeprefix("torch.")
            tied = f"  = {', '.join(e.aliases)}" if e.aliases else ""
            lines.append(f"{e.name:<{width}}  {e.kind:<9}  {dtype:<8}  {list(e.shape)}  [{dims}]{tied}")
        return "\n".join(lines)
