"""The modes under which a constructor or a forward runs, so that the values of its tensors go on a tape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tpcompiler.capture.private_tracing import TorchDispatchMode, memory_of, pytree, without_functions, without_modes
from tpcompiler.capture.tape import Tape, TapeEntry, seed_from

_CPU = torch.device("cpu")
_META = torch.device("meta")


class Recording(TorchDispatchMode):
    """Runs every operation on meta and records it.

    Operations that have only real operands (read from a file, or made of Python numbers) run as usual.
    """

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        with without_functions():  # `Values` would hide the device here as well
            tensors = _tensors((args, kwargs))
            if tensors and not any(t.is_meta for t in tensors):
                return self._run_real(func, args, kwargs)
            return self._record(func, args, kwargs)

    def stand_in(self, t: Tensor) -> Tensor:
        """The meta tensor that stands for a real one on the tape; a parameter if the real one is."""
        with without_modes():
            out = self.tape.constant(t.detach())
            if isinstance(t, nn.Parameter):
                return nn.Parameter(out, requires_grad=t.requires_grad)
            return out.requires_grad_(t.requires_grad)

    def real(self, t: Tensor) -> Tensor:
        """The values that a meta tensor has at this moment. Random numbers among them are thereby fixed."""
        if not t.is_meta:
            return t
        view = self.tape.view(t)
        self.tape.drawn.update(i for i in self.tape.slice(view.storage) if self.tape.entries[i].random)
        return self.tape.replay(view, lambda i: seed_from(0, f"#{i}"))

    def _run_real(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _CPU
        for t in _mutated(func, args, kwargs):  # the tape keeps the values that it has read
            for key, content in self.tape.constants.items():
                if memory_of(content) == memory_of(t):
                    self.tape.constants[key] = content.clone()
        return func(*args, **kwargs)

    def _record(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: t if t.is_meta else self.tape.constant(t), (args, kwargs))
        kwargs = {k: v for k, v in kwargs.items() if k not in ("generator", "pin_memory")}
        args = _positional_device(func, args, _CPU)
        takes_device = any(a.name == "device" and a.kwarg_only for a in func._schema.arguments)
        on_cpu = {**kwargs, "device": _CPU} if takes_device else kwargs
        on_meta = {**kwargs, "device": _META} if takes_device else kwargs
        mutated = _mutated(func, args, kwargs)
        try:
            out = func(*_positional_device(func, args, _META), **on_meta)
        except (NotImplementedError, RuntimeError):
            if mutated:
                raise
            return self._by_value(func, args, on_cpu)
        results = _tensors(out)
        if not results and not mutated:
            return self._by_value(func, args, on_cpu)
        reads = frozenset(self.tape.view(t).storage for t in _tensors((args, kwargs)))
        views = tuple(map(self.tape.view, results))
        writes = {self.tape.view(t).storage for t in mutated} | {v.storage for v in views if v.storage not in reads}
        if writes:  # a view needs no entry
            recorded, by_name = pytree.tree_map_only(Tensor, self.tape.view, (args, on_cpu))
            random = torch.Tag.nondeterministic_seeded in func.tags
            self.tape.append(TapeEntry(func, recorded, by_name, views, reads, frozenset(writes), random))
        return out

    def _by_value(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operation whose result depends on values (`item`, `nonzero`). The result is a constant."""
        args, kwargs = pytree.tree_map_only(Tensor, self.real, (args, kwargs))
        return pytree.tree_map_only(Tensor, self.tape.constant, func(*args, **kwargs))


class Values(TorchFunctionMode):
    """Handles what bypasses torch's dispatcher: reading values, and deep copies.

    Every tensor says that its device is the CPU, because some initialisers do nothing on meta.
    """

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _DEVICE and args[0].is_meta:
            return _CPU
        if func == _IS_META:
            return False
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__):
            with without_modes():
                return func(self.recording.real(args[0].detach()), *args[1:], **kwargs)
        if func is Tensor.__deepcopy__ and not args[0].is_meta:
            source, memo = args
            return memo.setdefault(id(source), self.recording.stand_in(source))
        return func(*args, **kwargs)


class Literals(TorchFunctionMode):
    """Puts tensors that a forward makes from Python numbers on the tape, since they would lose their values on meta."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.recording = Recording(tape)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, Tensor.new_tensor):
            data = kwargs.get("data", args[-1] if args else None)
            if not any(isinstance(x, (Tensor, *_SYMBOLIC)) for x in pytree.tree_leaves(data)):
                if func is Tensor.new_tensor:
                    kwargs.setdefault("dtype", args[0].dtype)
                return self._literal(data, kwargs.get("dtype")).requires_grad_(kwargs.get("requires_grad", False))
        if func in (Tensor.__getitem__, Tensor.__setitem__):  # torch turns lists among the indices into tensors
            args = (args[0], self._index(args[1]), *args[2:])
        return func(*args, **kwargs)

    def _literal(self, data: Any, dtype: torch.dtype | None = None) -> Tensor:
        with without_modes():
            made = self.recording.stand_in(torch.as_tensor(data, dtype=dtype))
        return torch.ops.aten.lift_fresh.default(made)

    def _index(self, index: Any) -> Any:
        if isinstance(index, tuple):
            return tuple(map(self._index, index)) if any(isinstance(i, list) for i in index) else index
        if isinstance(index, list) and all(isinstance(i, int) for i in pytree.tree_leaves(index)):
            return self._literal(index)
        return index


_DEVICE = Tensor.device.__get__
_IS_META = Tensor.is_meta.__get__  # type: ignore[attr-defined]
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def _positional_device(func: Any, args: Any, device: torch.device) -> Any:
    """The arguments with another device, if one is given by position."""
    for i, a in enumerate(func._schema.arguments[: len(args)]):
        if a.name == "device" and args[i] is not None:
            return (*args[:i], device, *args[i + 1 :])
    return args


def _mutated(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    found = [
        args[i] if i < len(args) else kwargs.get(a.name)
        for i, a in enumerate(func._schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    ]
    return _tensors(found)
