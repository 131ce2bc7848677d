"""Fills a rank's parameters with slices of a file, of a model's own values, or of what its constructor would draw."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tpcompiler.capture import Recorded
from tpcompiler.layout import slice_on
from tpcompiler.program import Program
from tpcompiler.runtime import Mesh, Ranks
from tpcompiler.runtime.mesh import Coords
from tpcompiler.runtime.runs import Slice, slice_of
from tpcompiler.weights import StateSource, entries_of, open_source
from tpcompiler.weights.manifest import DATA
from tpcompiler.weights.match import match
from tpcompiler.weights.sources import Info


class InitialValues:
    """A source of the values that the recorded constructor draws. They depend on seed and name, not on the mesh.

    Each read draws one whole parameter and returns the slice of it.
    """

    def __init__(self, recorded: Recorded, seed: int = 0) -> None:
        self.where = f"the constructor of {type(recorded.model).__name__}"
        self._recorded = recorded
        self._seed = seed
        named = recorded.model.named_parameters(remove_duplicate=False)
        self.tensors: Mapping[str, Info] = {n: Info(p.dtype, tuple(p.shape), (n,)) for n, p in named}

    def read(self, name: str, runs: Slice | None = None) -> Tensor:
        whole = self._recorded.replay(name, self._seed).detach()
        return whole if runs is None else slice_of(whole, runs).clone()

    def close(self) -> None:
        """Does nothing, as no file is open."""


def own_values(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters and buffers, each under all of its names, as a source that shares their memory."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: t.detach() for name, t in named}


def ranks_of(device_mesh: Any, mesh: Mesh) -> Ranks:
    """The place of this process in `mesh`, by a `DeviceMesh`, or by torchrun's environment when that is None.

    A program for one copy of the model runs on any number of copies, because nothing in it is split over `data`.
    """
    if device_mesh is None:
        return Ranks.from_env(mesh)
    return Ranks.from_device_mesh(device_mesh, Mesh(tuple(d for d in mesh.dims if d != (DATA, 1))))


def device_of(device_mesh: Any) -> torch.device:
    """The device of this process's parameters: its GPU if the mesh consists of GPUs or the ranks use NCCL, else CPU."""
    kind = None if device_mesh is None else device_mesh.device_type
    if kind is None:
        kind = "cuda" if dist.is_initialized() and "nccl" in str(dist.get_backend()) else "cpu"
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


@torch.no_grad()
def fill_from(
    module: nn.Module, program: Program, coords: Coords, source: StateSource | Mapping[str, Tensor] | Path | str
) -> None:
    """Gives every parameter and buffer of a rank's module its slice of `source`, cast to the module's own dtype.

    `coords` is the rank's place in the mesh. Buffers that the source lacks keep the value that the model's constructor
    computed. One parameter is read at a time, and only its slice where the source allows that. Raises `WeightsError`
    when a name is missing or a shape differs.
    """
    capture, mesh = program.capture, program.mesh
    place = {name: coords.get(name, 0) for name in mesh.names}
    targets = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    entries = entries_of(capture.parameters, program.dims, mesh)
    with open_source(source) as opened:
        for job in match(opened, capture.parameters, entries, mesh):
            part = slice_on(program.dims.get(job.entry.name, ()), mesh, place)
            found = [targets.pop(n) for n in (job.entry.name, *job.entry.aliases) if n in targets]
            if found:  # else the program does not use it: a buffer, or a tensor that the model does not have
                value = job.read(part)
                for target in {id(t): t for t in found}.values():
                    target.copy_(value)
    assert not targets, f"no value for {next(iter(targets))}"
