"""Finds a model's parameters in a source, by name or alias, and checks all of them before a byte is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

import torch

from tpcompiler.errors import WeightsError
from tpcompiler.layout import Dim, Factor
from tpcompiler.program import Parameter
from tpcompiler.runtime.mesh import Mesh
from tpcompiler.runtime.runs import Slice, same_bits, slice_of
from tpcompiler.weights.layouts import Layout
from tpcompiler.weights.manifest import EXTRA_FILE, Entry, weight_mesh
from tpcompiler.weights.sources import Info, StateSource


@dataclass(frozen=True)
class Job:
    """A tensor to be written: its destination, and how to read a slice of it."""

    entry: Entry
    read: Callable[[Slice], torch.Tensor]


def whole_layout(shape: Iterable[int], ranks: int) -> Layout:
    return Layout.of(tuple(Factor(n) for n in shape), Mesh((("all", ranks),)))


def entries_of(parameters: Iterable[Parameter], dims: Mapping[str, Sequence[Dim]], mesh: Mesh) -> tuple[Entry, ...]:
    """The manifest's entries of a sharded model."""
    out = []
    for p in parameters:
        tree = tuple(dims[p.name])
        assert tuple(d.size for d in tree) == p.shape, f"{p.name} {p.shape} has the layout {[str(d) for d in tree]}"
        entry = Entry.of(p, tree, mesh)
        entry.check()
        out.append(entry)
    return tuple(out)


def match(
    source: StateSource | None,
    parameters: Sequence[Parameter],
    entries: Sequence[Entry],
    mesh: Mesh,
    dtype: torch.dtype | None = None,
) -> tuple[Job, ...]:
    """What to write, in order: the model's tensors, then all others of the source (kind `extra`).

    Buffers that the source lacks, or that no state_dict has, come from the model. `dtype` converts floating-point
    parameters; without it they keep the source's. Without a source, parameters have no job. Raises `WeightsError` for a
    name that is missing, a wrong shape, or tied names whose tensors differ.
    """
    jobs: list[Job] = []
    used: set[str] = set()
    missing: list[str] = []
    for p, entry in zip(parameters, entries, strict=True):
        names = [n for n in p.names if source is not None and p.persistent and n in source.tensors]
        used.update(names)
        if names:
            assert source is not None
            jobs.append(_from_source(source, p, entry, names, dtype))
        elif p.buffer:
            jobs.append(_from_model(p, entry))
        elif source is not None:
            missing.append(p.name)
    if missing:
        assert source is not None
        raise WeightsError(_missing(source, missing, [n for n in source.tensors if n not in used]))
    if source is not None:
        ranks = weight_mesh(mesh).size
        taken = {entry.name for entry in entries}
        rest = [(n, info) for n, info in source.tensors.items() if n not in used and info.stored]
        jobs += [_extra(source, n, info, ranks, f"extra:{n}" if n in taken else n) for n, info in rest]
    return tuple(jobs)


def _from_source(source: StateSource, p: Parameter, entry: Entry, names: list[str], dtype: torch.dtype | None) -> Job:
    first = source.tensors[names[0]]
    for n in names:
        info = source.tensors[n]
        if info.shape != p.shape:
            raise WeightsError(f"{source.where}: {n} is {list(info.shape)}, the model's {p.name} is {list(p.shape)}")
        if info.dtype != first.dtype:
            kinds = f"{n} is {info.dtype}, {names[0]} is {first.dtype}"
            raise WeightsError(f"{source.where}: {kinds}, but the model ties them")
    convert = dtype is not None and entry.kind == "parameter" and first.dtype.is_floating_point
    target = dtype if dtype is not None and convert else first.dtype
    stored = tuple(name for n in names for name in source.tensors[n].stored)

    def read(runs: Slice) -> torch.Tensor:
        value = source.read(names[0], runs)
        for n in names[1:]:
            if not same_bits(value, source.read(n, runs)):
                raise WeightsError(f"{source.where}: {names[0]} and {n} differ, but the model ties them")
        return value.to(target)

    return Job(replace(entry, dtype=target, stored=stored), read)


def _from_model(p: Parameter, entry: Entry) -> Job:
    if p.value is None or p.value.is_meta:
        raise WeightsError(f"buffer {p.name} has no values, neither in the model nor in the weights")
    value = p.value.detach()
    assert tuple(value.shape) == p.shape, (p.name, value.shape, p.shape)
    return Job(replace(entry, dtype=value.dtype, stored=()), lambda runs: slice_of(value, runs).cpu())


def _extra(source: StateSource, name: str, info: Info, ranks: int, called: str) -> Job:
    """The job for a tensor that the model does not have. `called` is its name in the new files. It differs from `name`
    where the model has a buffer of that name that is not persistent."""
    layout = whole_layout(info.shape, ranks)
    entry = Entry(called, "extra", info.dtype, layout, EXTRA_FILE, stored=info.stored, trainable=False)
    return Job(entry, lambda runs: source.read(name, runs))


def _missing(source: StateSource, missing: Sequence[str], free: Sequence[str]) -> str:
    name = missing[0]
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    prefixes = [n.removesuffix(name) for n in free if n.endswith("." + name)]
    for prefix in prefixes:
        if all(prefix + n in free for n in missing):
            return f"{source.where}: no {name}{more}: its names begin with {prefix!r}; strip that prefix"
    ends = sorted(free, key=lambda n: -_common_end(n, name))[:20]
    nearest = get_close_matches(name, [*dict.fromkeys([*ends, *free[:2000]])], n=3, cutoff=0.5)
    hint = f"; nearest: {', '.join(nearest)}" if nearest else "; no name in it is near"
    return f"{source.where}: no {name}{more}{hint}"


def _common_end(a: str, b: str) -> int:
    n = 0
    for x, y in zip(reversed(a.split(".")), reversed(b.split(".")), strict=False):
        if x != y:
            break
        n += 1
    return n
