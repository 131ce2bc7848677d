"""Which elements of a parameter a rank trains: its chunk, over the data ranks, of its tensor-parallel slice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from math import prod

import torch
from torch import Tensor, nn

from tpcompiler.layout import Dim, slice_on
from tpcompiler.program import Program
from tpcompiler.runtime.mesh import Coords, Mesh, chunk
from tpcompiler.runtime.runs import Slice, cut, length, shape_of, slice_of
from tpcompiler.train.optim.clip import local
from tpcompiler.train.optim.update import MOMENTS
from tpcompiler.train.private_torch import buffers_here, parameters_here
from tpcompiler.weights import Entry, Layout, RankRuns, weight_mesh
from tpcompiler.weights.manifest import DATA

OPTIMIZER_FILE = "optimizer-{rank:05d}.safetensors"


def trained_slice(dims: Sequence[Dim], mesh: Mesh, coords: Coords) -> Slice:
    """The global indices of a parameter that a rank trains. Data ranks divide dimension 0 of a rank's slice."""
    held = slice_on(dims, mesh, coords)
    if not held or DATA not in mesh or mesh[DATA] == 1:
        return held
    return (cut(held[0], *chunk(length(held[0]), mesh[DATA], coords[DATA])), *held[1:])


@lru_cache(4096)
def layout(dims: tuple[Dim, ...], mesh: Mesh) -> Layout:
    """The layout of a parameter's trained elements on the mesh of `checkpoint_mesh`."""
    if not dims or DATA not in mesh or mesh[DATA] == 1:
        return Layout.of(dims, mesh)
    first = [trained_slice(dims[:1], mesh, mesh.coords(r))[0] for r in range(mesh.size)]
    return Layout((RankRuns.of_runs(dims[0].size, first), *(RankRuns.of(d, mesh) for d in dims[1:])), mesh.size)


def checkpoint_mesh(mesh: Mesh) -> Mesh:
    """The mesh of ranks that write files of their own. It has the data ranks, if these divide the parameters."""
    return mesh if DATA in mesh and mesh[DATA] > 1 else weight_mesh(mesh)


def entries(program: Program, dtype: torch.dtype, state: Sequence[str] = MOMENTS) -> list[Entry]:
    """The tensors of a checkpoint: parameters at master precision, buffers, and each parameter's optimizer state."""
    mesh = checkpoint_mesh(program.mesh)
    out = []
    for p in program.capture.parameters:
        if p.buffer:
            out.append(Entry.of(p, program.dims[p.name], program.mesh))
            continue
        where = layout(program.dims[p.name], mesh)
        stored = p.names if p.persistent else ()
        out.append(Entry(p.name, "parameter", dtype, where, aliases=p.aliases, stored=stored, trainable=p.trainable))
        if p.trainable:
            out += [Entry(state_name(p.name, m), "state", dtype, where, OPTIMIZER_FILE, like=p.name) for m in state]
    return out


def state_name(parameter: str, moment: str) -> str:
    """The name in a checkpoint of a moment of a parameter's optimizer state."""
    return f"optimizer.{moment}.{parameter}"


def allocate(module: nn.Module, device: torch.device | str, dtype: torch.dtype | None = None) -> None:
    """Allocates the parameters and buffers of a module on meta, parameters in `dtype`. Tied ones stay tied."""
    memo: dict[int, nn.Parameter] = {}
    for m in module.modules():
        for name, p in parameters_here(m).items():
            if p is None:
                continue
            if id(p) not in memo:
                memo[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=dtype or p.dtype, device=device), p.requires_grad)
                memo[id(memo[id(p)])] = memo[id(p)]
            parameters_here(m)[name] = memo[id(p)]
        for name, b in buffers_here(m).items():
            if b is not None:
                buffers_here(m)[name] = torch.empty_like(b, device=device)


@torch.no_grad()
def fill(masters: Mapping[str, Tensor], slices: Mapping[str, Slice], read: Callable[[str, Slice], Tensor]) -> None:
    """Gives every master its values by `read(name, slice)`, one at a time.

    The largest come first, while most memory is free, because reading one can take more memory than its slice.
    """
    for name in sorted(masters, key=lambda n: -prod(shape_of(slices[n]))):
        target = local(masters[name])
        target.copy_(read(name, slices[name]).reshape(target.shape))


def from_constructor(replay: Callable[[str], Tensor]) -> Callable[[str, Slice], Tensor]:
    """A function that reads slices of the constructor's initial values. It makes one whole parameter at a time."""
    return lambda name, runs: slice_of(replay(name).contiguous(), runs)


@torch.no_grad()
def fill_buffers(module: nn.Module, program: Program, coords: Coords) -> None:
    """Gives buffers the values that the constructor computed, sliced where they are split."""
    targets = dict(module.named_buffers(remove_duplicate=False))
    for p in program.capture.parameters:
        if not p.buffer or p.value is None:
            continue
        part = slice_on(program.dims[p.name], program.mesh, coords)
        for name in p.names:
            if name in targets:
                targets[name].copy_(slice_of(p.value.contiguous(), part))
