"""A tape of tensor operations that were not run, and the replay of the part that one tensor depends on.

The tape records *storages*, not tensors: a view is (storage, size, stride, offset) and needs no entry.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tpcompiler.capture.private_tracing import memory_of, pytree

_RANDOM = threading.Lock()  # replays seed torch's global generator, one at a time


@dataclass(frozen=True)
class View:
    """A tensor on the tape: its storage, and how it lies there."""

    storage: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclass(frozen=True)
class TapeEntry:
    """One recorded operation. `args` and `kwargs` hold `View`s where tensors stood."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[View, ...]  # the tensor results, flattened
    reads: frozenset[int]  # the storages that it reads
    writes: frozenset[int]
    random: bool


@dataclass
class Tape:
    """The operations in order, and the entries that write each storage."""

    entries: list[TapeEntry] = field(default_factory=list)
    writers: dict[int, list[int]] = field(default_factory=dict)
    constants: dict[int, Tensor] = field(default_factory=dict)  # storages with real values from elsewhere, as bytes
    drawn: set[int] = field(default_factory=set)  # random entries whose numbers the constructor itself has seen
    alive: dict[int, Any] = field(default_factory=dict)  # keeps the storages, whose addresses are the keys

    def append(self, entry: TapeEntry) -> None:
        for storage in entry.writes:
            self.writers.setdefault(storage, []).append(len(self.entries))
        self.entries.append(entry)

    def view(self, t: Tensor) -> View:
        storage = t.untyped_storage()
        key = memory_of(t)
        self.alive.setdefault(key, storage)
        return View(key, tuple(t.shape), tuple(t.stride()), int(t.storage_offset()), t.dtype)

    def has_value(self, t: Tensor) -> bool:
        """Whether the tape can give the values of a meta tensor."""
        key = memory_of(t)
        return key in self.constants or key in self.writers

    def constant(self, t: Tensor) -> Tensor:
        """Puts a real tensor on the tape, without a copy. Returns its stand-in on meta."""
        content = torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())
        stand_in = torch.empty(content.numel(), dtype=torch.uint8, device="meta")
        self.constants[self.view(stand_in).storage] = content
        place = (t.storage_offset(), t.shape, t.stride())
        return torch.empty(0, dtype=t.dtype, device="meta").set_(stand_in.untyped_storage(), *place)

    def slice(self, storage: int) -> list[int]:
        """The entries that the storage's content depends on, in order."""
        reached: dict[int, int] = {}  # storage → all its writers before this entry are found
        found: set[int] = set()
        todo = [(storage, len(self.entries))]
        while todo:
            key, bound = todo.pop()
            start = reached.get(key, 0)
            if bound <= start:
                continue
            reached[key] = bound
            for i in self.writers.get(key, ()):
                if start <= i < bound and i not in found:
                    found.add(i)
                    todo += [(k, i) for k in self.entries[i].reads]
        return sorted(found)

    def replay(self, wanted: View, seed_of: Callable[[int], int]) -> Tensor:
        """The wanted tensor with its values, on the CPU. `seed_of(entry)` gives the seed of a random operation.

        A storage is freed when no later step needs it, so that the peak is what the constructor needs for this tensor.
        """
        real: dict[int, torch.UntypedStorage] = {}
        steps = self.slice(wanted.storage)
        last_use = {k: i for i in steps for k in self.entries[i].reads | self.entries[i].writes}

        def tensor(v: View) -> Tensor:
            if v.storage not in real:
                real[v.storage] = self.constants[v.storage].cpu().untyped_storage()
            return torch.empty(0, dtype=v.dtype).set_(real[v.storage], v.offset, v.size, v.stride)

        with torch.no_grad():
            for i in steps:
                entry = self.entries[i]
                for key in (entry.writes & self.constants.keys()) - real.keys():
                    real[key] = self.constants[key].cpu().untyped_storage().clone()
                args, kwargs = pytree.tree_map_only(View, tensor, (entry.args, entry.kwargs))
                out = _draw(entry.op, args, kwargs, seed_of(i)) if entry.random else entry.op(*args, **kwargs)
                results = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
                for v, t in zip(entry.outputs, results, strict=True):
                    if v.storage not in real:
                        real[v.storage] = _laid_out(t, v).untyped_storage()
                del args, kwargs, out, results
                for key in [k for k in real if last_use.get(k, -1) <= i and k != wanted.storage]:
                    del real[key]
        untouched = wanted.storage not in real
        value = tensor(wanted)
        return value.clone() if untouched else value  # a constant's tensor belongs to someone else


def _draw(op: Any, args: Any, kwargs: Any, seed: int) -> Any:
    with _RANDOM, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return op(*args, **kwargs)


def _laid_out(t: Tensor, v: View) -> Tensor:
    """`t` with the strides on the tape. Kernels on meta and on the CPU may choose different ones."""
    if tuple(t.stride()) == v.stride and t.storage_offset() == v.offset:
        return t
    span = 1 + sum((n - 1) * s for n, s in zip(v.size, v.stride, strict=True)) if t.numel() else 0
    return torch.empty(v.offset + span, dtype=v.dtype).as_strided(v.size, v.stride, v.offset).copy_(t)


def seed_from(seed: int, name: str) -> int:
    """A seed for torch's generators from the run's seed and a name."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little") >> 1
