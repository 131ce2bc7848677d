"""Building a model without its weights: the constructor's tensor operations are recorded, not run.

Everything that a constructor computes (random weights, rotary frequencies, masks) becomes a tensor on the meta device;
the operations go on a tape. Any one tensor can be had later by replaying the part of the tape it depends on: buffers at
once, parameters one at a time and only by those who need them, at any number of ranks with the same values.

The tape is kept per *storage*, not per tensor: views need no entry, since a view is (storage, size, stride, offset).
"""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tpcompiler.errors import ModelError

_META = torch.device("meta")
_RANDOM = threading.Lock()  # replays seed torch's global generator, one at a time


@dataclass(frozen=True)
class View:
    """A tensor on the tape: how it lies in a storage."""

    storage: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Entry:
    """One recorded operation. `args` and `kwargs` hold `View`s where tensors stood."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[View, ...]  # its flat tensor results
    reads: frozenset[int]  # storages
    writes: frozenset[int]
    random: bool


@dataclass
class Tape:
    """The operations in order, and for each storage who writes it."""

    entries: list[Entry] = field(default_factory=list)
    writers: dict[int, list[int]] = field(default_factory=dict)
    constants: dict[int, Tensor] = field(default_factory=dict)  # storages that hold real values from elsewhere
    alive: dict[int, Any] = field(default_factory=dict)  # keeps storages, whose addresses are the keys

    def append(self, entry: Entry) -> None:
        for storage in entry.writes:
            self.writers.setdefault(storage, []).append(len(self.entries))
        self.entries.append(entry)

    def view(self, t: Tensor) -> View:
        storage = t.untyped_storage()
        key = storage._cdata
        self.alive.setdefault(key, storage)
        return View(key, tuple(t.shape), tuple(t.stride()), t.storage_offset(), t.dtype)

    def knows(self, t: Tensor) -> bool:
        return t.untyped_storage()._cdata in self.alive

    def slice(self, storage: int, before: int | None = None) -> list[int]:
        """The entries that the storage's content depends on, in order."""
        bound = len(self.entries) if before is None else before
        seen: dict[int, int] = {}
        found: set[int] = set()
        todo = [(storage, bound)]
        while todo:
            key, bound = todo.pop()
            start = seen.get(key, 0)
            if bound <= start:
                continue
            seen[key] = bound
            for i in self.writers.get(key, ()):
                if start <= i < bound and i not in found:
                    found.add(i)
                    todo += [(k, i) for k in self.entries[i].reads]
        return sorted(found)

    def replay(self, wanted: View, key_of: Callable[[int], str], seed: int) -> Tensor:
        """The wanted tensor, real, on the CPU. `key_of(entry)` names a random operation; its draw depends on that and the seed."""
        real: dict[int, torch.UntypedStorage] = {}
        keep: list[Tensor] = []

        def storage(key: int) -> torch.UntypedStorage:
            if key not in real:
                if key not in self.constants:
                    raise AssertionError("the tape reads a storage that nothing wrote")
                real[key] = self.constants[key].untyped_storage()
            return real[key]

        def tensor(v: View) -> Tensor:
            return torch.empty(0, dtype=v.dtype).set_(storage(v.storage), v.offset, v.size, v.stride)

        steps = self.slice(wanted.storage)
        last_use = {k: i for i in steps for k in self.entries[i].reads | self.entries[i].writes}
        with torch.no_grad():
            for i in steps:
                entry = self.entries[i]
                for key in entry.writes & self.constants.keys() - real.keys():
                    real[key] = self.constants[key].untyped_storage().clone()
                args, kwargs = pytree.tree_map_only(View, tensor, (entry.args, entry.kwargs))
                if entry.random:
                    with _RANDOM, torch.random.fork_rng(devices=[]):
                        torch.manual_seed(_seed_of(seed, key_of(i)))
                        out = entry.op(*args, **kwargs)
                else:
                    out = entry.op(*args, **kwargs)
                results = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
                for v, t in zip(entry.outputs, results, strict=True):
                    if v.storage not in real:
                        t = _laid_out(t, v)
                        real[v.storage] = t.untyped_storage()
                for key in [k for k in real if last_use.get(k, -1) <= i and k != wanted.storage]:
                    del real[key]
            keep.append(tensor(wanted))
        return keep[0]


def _laid_out(t: Tensor, v: View) -> Tensor:
    if tuple(t.stride()) == v.stride and t.storage_offset() == v.offset:
        return t
    span = v.offset + 1 + sum((n - 1) * s for n, s in zip(v.size, v.stride, strict=True))
    base = torch.empty(span if 0 not in v.size else v.offset, dtype=v.dtype)
    out = base.as_strided(v.size, v.stride, v.offset)
    return out.copy_(t)


def _seed_of(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest(), "little") >> 1


class _Recording(TorchDispatchMode):
    """Runs every operation on meta and writes it down. Operations on real tensors alone (numpy's, a file's) run as they are."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if tensors and all(t.device.type != "meta" for t in tensors):
            return self._run_real(func, args, kwargs)
        return self._record(func, args, kwargs)

    def _run_real(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        for t in _mutated(func, args, kwargs):
            key = t.untyped_storage()._cdata
            if key in self.tape.constants:  # it was read before: keep what was read
                self.tape.constants[key] = self.tape.constants[key].clone()
        return func(*args, **kwargs)

    def _adopt(self, t: Tensor) -> Tensor:
        """A real tensor meets the tape: a constant. Returns its stand-in on meta."""
        flat = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())
        stand_in = torch.empty(flat.numel(), dtype=torch.uint8, device=_META)
        key = self.tape.view(stand_in).storage
        self.tape.constants[key] = flat
        return torch.empty(0, dtype=t.dtype, device=_META).set_(
            stand_in.untyped_storage(), t.storage_offset(), t.shape, t.stride()
        )

    def stand_in(self, t: Tensor) -> Tensor:
        """A real tensor's constant on meta, a parameter where it is one."""
        with _disabled(self):
            out = self._adopt(t.detach())
            if isinstance(t, nn.Parameter):
                return nn.Parameter(out, requires_grad=t.requires_grad)
            return out.requires_grad_(t.requires_grad)

    def real(self, t: Tensor) -> Tensor:
        """What a meta tensor would hold at this moment."""
        if t.device.type != "meta":
            return t
        return self.tape.replay(self.tape.view(t), lambda i: f"#{i}", 0)

    def _record(self, func: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda t: t if t.device.type == "meta" else self._adopt(t), (args, kwargs)
        )
        if kwargs.get("generator") is not None:
            kwargs["generator"] = None
        kwargs.pop("pin_memory", None)
        on_cpu = {**kwargs, "device": torch.device("cpu")} if _takes_device(func) else kwargs
        on_meta = {**kwargs, "device": _META} if _takes_device(func) else kwargs
        op, args = _without_device(func, args)
        read = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        try:
            out = op(*args, **on_meta)
        except (NotImplementedError, RuntimeError) as error:
            out = self._by_value(op, args, on_cpu, error)
            if not any(isinstance(t, Tensor) for t in pytree.tree_leaves(out)):
                return out
            return out
        results = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
        if not results and not _mutated(op, args, kwargs):
            return op(*pytree.tree_map_only(Tensor, self.real, args), **on_cpu)
        known = {v.storage for v in map(self.tape.view, read)}
        written = {self.tape.view(t).storage for t in _mutated(op, args, kwargs)}
        views = tuple(map(self.tape.view, results))
        written |= {v.storage for v in views if v.storage not in known}
        if written:  # else a view: nothing happens
            recorded = pytree.tree_map_only(Tensor, self.tape.view, (args, on_cpu))
            random = torch.Tag.nondeterministic_seeded in op.tags
            self.tape.append(Entry(op, *recorded, views, frozenset(known), frozenset(written), random))
        return out

    def _by_value(self, op: Any, args: Any, kwargs: Any, error: Exception) -> Any:
        """An operation whose result depends on values (`item`, `nonzero`): run it really, go on with its result as a constant."""
        real_args, real_kwargs = pytree.tree_map_only(Tensor, self.real, (args, kwargs))
        if _mutated(op, args, kwargs):
            raise error
        return pytree.tree_map_only(Tensor, self._adopt, op(*real_args, **real_kwargs))


class _Values(TorchFunctionMode):
    """What a constructor does with tensors outside of torch's dispatcher: reading values, deep copies."""

    def __init__(self, recording: _Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__):
            with _disabled(self.recording):
                value = self.recording.real(args[0])
                return func(value, *args[1:], **kwargs)
        if func is Tensor.__deepcopy__ and args[0].device.type != "meta":
            source, memo = args
            return memo.setdefault(id(source), self.recording.stand_in(source))
        return func(*args, **kwargs)


class Literals(TorchFunctionMode):
    """Gives tensors that a forward makes from Python numbers a place on the tape: on meta they would lose their values."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.recording = _Recording(tape)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor):
            data = kwargs.get("data", args[-1] if args else None)
            if _is_literal(data):
                if func is Tensor.new_tensor:
                    kwargs.setdefault("dtype", args[0].dtype)
                return self._literal(data, kwargs.get("dtype")).requires_grad_(kwargs.get("requires_grad", False))
        if func in (Tensor.__getitem__, Tensor.__setitem__):  # lists among the indices become tensors inside of torch
            args = (args[0], self._index(args[1]), *args[2:])
        return func(*args, **kwargs)

    def _literal(self, data: Any, dtype: torch.dtype | None = None) -> Tensor:
        with _disabled(self.recording):
            made = self.recording.stand_in(torch.tensor(data, dtype=dtype))
        return torch.ops.aten.lift_fresh.default(made)

    def _index(self, index: Any) -> Any:
        if isinstance(index, tuple):
            return tuple(self._literal(i) if isinstance(i, list) and _is_literal(i) else i for i in index)
        return self._literal(index) if isinstance(index, list) and _is_literal(index) else index


def _is_literal(data: Any) -> bool:
    return all(isinstance(x, (bool, int, float, complex)) for x in pytree.tree_leaves(data))


@contextmanager
def _disabled(mode: TorchDispatchMode) -> Iterator[None]:
    with torch.utils._python_dispatch._disable_current_modes():
        yield


def _takes_device(func: Any) -> bool:
    return any(a.name == "device" for a in func._schema.arguments)


def _without_device(func: Any, args: Any) -> tuple[Any, Any]:
    """Devices that stand as positional arguments are dropped by position (`to.device`, `empty_strided`)."""
    names = [a.name for a in func._schema.arguments]
    if "device" in names[: len(args)]:
        i = names.index("device")
        args = (*args[:i], _META, *args[i + 1 :])
    return func, args


def _mutated(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    found: list[Any] = []
    for i, a in enumerate(func._schema.arguments):
        if a.alias_info is not None and a.alias_info.is_write:
            found.append(args[i] if i < len(args) else kwargs.get(a.name))
    return [t for t in pytree.tree_leaves(found) if isinstance(t, Tensor)]


@dataclass(frozen=True)
class Recorded:
    """A model whose parameters and buffers lie on meta, and the tape that gives their values."""

    model: nn.Module
    tape: Tape
    keys: Mapping[int, str]  # random entry → the name whose seed it draws with

    def replay(self, name: str, seed: int = 0) -> Tensor:
        """The value that the constructor gives a parameter or buffer. It depends on the seed and the name alone, never on a rank.

        What two parameters share (a deep-copied layer) stays shared: it draws by the first one's name.
        """
        return self.value(_named(self.model)[name], seed)

    def value(self, t: Tensor, seed: int = 0) -> Tensor:
        """The value of any tensor that the constructor made."""
        view = self.tape.view(t)
        value = self.tape.replay(view, lambda i: self.keys.get(i, f"#{i}"), seed)
        return value if view.storage not in self.tape.constants or self.tape.writers.get(view.storage) else value.clone()


def _named(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _keys(tape: Tape, named: Iterable[tuple[str, Tensor]]) -> dict[int, str]:
    keys: dict[int, str] = {}
    for name, t in named:
        count = 0
        for i in tape.slice(tape.view(t).storage):
            if tape.entries[i].random:
                keys.setdefault(i, f"{name}/{count}")
                count += 1
    return keys


def _adopt_attributes(model: nn.Module, recording: _Recording) -> None:
    """Tensors that came from outside of torch's dispatcher (numpy) become constants, wherever a module holds them."""
    memo: dict[int, Tensor] = {}

    def adopt(t: Tensor) -> Tensor:
        return t if t.device.type == "meta" else memo.setdefault(id(t), recording.stand_in(t))

    for module in model.modules():
        for held in (module._parameters, module._buffers, module.__dict__):
            for key, value in list(held.items()):
                if isinstance(value, (Tensor, list, tuple, dict)) and key not in ("_parameters", "_buffers", "_modules"):
                    leaves = pytree.tree_leaves(value)
                    if any(isinstance(v, Tensor) and v.device.type != "meta" for v in leaves):
                        held[key] = pytree.tree_map_only(Tensor, adopt, value)


def record(build: Callable[[], nn.Module] | nn.Module) -> Recorded:
    """Build a model without allocating its parameters; a model that is built already is copied, and left as it is.

    Errors: `ModelError` when the constructor fails or does not return a module.
    """
    tape = Tape()
    recording = _Recording(tape)
    if isinstance(build, nn.Module):
        memo: dict[int, Any] = {id(p): recording.stand_in(p) for p in build.parameters() if p.device.type != "meta"}
        with _Values(recording):
            model = copy.deepcopy(build, memo)
    else:
        with recording, _Values(recording):
            model = build()
    if not isinstance(model, nn.Module):
        raise ModelError(f"the model's constructor returned a {type(model).__name__}, not a torch.nn.Module")
    _adopt_attributes(model, recording)
    return Recorded(model, tape, _keys(tape, _named(model).items()))
