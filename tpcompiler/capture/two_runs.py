"""Whether a model does the same in two runs, on meta and written down: in training and in evaluation, dropout aside, or
in float32 and in bfloat16, casts aside.

A run without values and without symbols costs a fraction of an export. Where both runs call the same operations with
the same arguments, one export says both. Where they do not, nothing is concluded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tpcompiler.capture.kept import as_it_was
from tpcompiler.capture.own_dtype import LIMITS, OWN, SHOWN, lowered
from tpcompiler.capture.private_tracing import TorchDispatchMode, as_in_export, memory_of, pytree
from tpcompiler.capture.tape import Tape

LITERAL = 2**16  # bytes of a constant that are compared
TORCH = str(Path(torch.__file__).parent)


class NotAlike(Exception):
    """Something that training and evaluation may do differently."""


Results = dict[Any, Any]  # how an operator's results are laid out, by its operands: several runs find each once


def alike(model: nn.Module, tape: Tape, runs: Sequence[Callable[[], Any]], shapes: Results) -> bool:
    """Whether the model does the same in both modes, at the sizes that are tried. False means that it is not known.

    `runs` call the model, each at other sizes, the example's first. The others are for models whose own code asks for
    the mode, which may ask for a length as well. Where both modes fail alike at a size, the next one is tried.
    """
    for i, run in enumerate(runs):
        asked: list[str] = []
        found = [_written(model, tape, shapes, run, training, asked) for training in (True, False)]
        if found[0] != found[1] or found[0] is None or (i == 0 and found[0][1] is None):
            return False
        if not asked or (i > 0 and found[0][1] is not None):
            return True
    return True


def alike_but_casts(
    model: nn.Module, tape: Tape, run: Callable[[list[Any]], Any], plain: list[Any], low: list[Any], shapes: Results
) -> bool:
    """Whether `run` does the same in float32, with inputs `plain`, and in bfloat16, with `low`: casts and the dtypes'
    limits aside."""
    given = {id(t): id(t) for t in (*model.parameters(), *model.buffers(), *plain)}
    try:
        shown = _log(model, _WithoutCasts(tape, shapes, given, OWN), lambda: run(plain))
        with lowered(model) as parameters:
            stands_for = {**given, **parameters, **{id(b): id(a) for a, b in zip(plain, low, strict=True)}}
            return bool(shown == _log(model, _WithoutCasts(tape, shapes, stands_for, None), lambda: run(low)))
    except Exception:
        return False


def _log(model: nn.Module, log: _Writes, run: Callable[[], Any]) -> Any:
    model.train()
    with as_it_was(model), as_in_export(), log:
        out = run()
    return log.lines, log.key(out)


def _written(
    model: nn.Module, tape: Tape, shapes: Results, run: Callable[[], Any], training: bool, asked: list[str]
) -> tuple[list[Any], Any] | None:
    """What a run does and what it gives, which is None where it fails; None where nothing can be said."""
    model.train(training)
    with as_it_was(model), _asking(model, training, asked), as_in_export(), _Writes(tape, shapes, training) as log:
        try:
            out = run()
        except NotAlike:
            return None
        except Exception:  # what runs on fake tensors need not run on meta, nor at every length
            return log.lines, None
    return log.lines, log.key(out)


@contextmanager
def _asking(model: nn.Module, training: bool, asked: list[str]) -> Iterator[None]:
    """Notes the files of the model's own code that reads `training`; the attribute is put back by `as_it_was`."""
    ordinary = nn.Module.__getattr__

    def read(module: nn.Module, name: str) -> Any:
        if name != "training":
            return ordinary(module, name)
        file = sys._getframe(1).f_code.co_filename
        if not file.startswith(TORCH):
            asked.append(file)
        return training

    for module in model.modules():
        vars(module).pop("training", None)
    with mock.patch.object(nn.Module, "__getattr__", read):
        yield


class _Writes(TorchDispatchMode):
    """Writes down each operation below autograd, each tensor by the operation that made it. Dropout is left out."""

    def __init__(self, tape: Tape, shapes: Results, training: bool) -> None:
        super().__init__()
        self.tape, self.shapes = tape, shapes
        self.lines: list[Any] = []
        self.made: dict[int, Any] = {}
        self.kept: list[Tensor] = []  # alive, so that no other tensor gets its identity
        self.functions = _WithoutDropout(self, training)

    def __enter__(self) -> Self:
        self.functions.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.functions.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for i in _written_operands(func):
            if i < len(args) and any(map(self.functions.passed, pytree.tree_leaves(args[i]))):
                raise NotAlike  # dropout gives a copy in training, and its operand in evaluation
        leaves, spec = pytree.tree_flatten((args, kwargs))
        keys = [self._tensor(x) if isinstance(x, Tensor) else self.leaf(x) for x in leaves]
        line = (func, spec, keys, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))
        out = func(*args, **kwargs) if _makes_views(func) else self._remembered(func, args, kwargs, leaves, spec)
        for i, t in enumerate([out] if isinstance(out, Tensor) else pytree.tree_leaves(out)):
            if isinstance(t, Tensor) and id(t) not in self.made:
                self.kept.append(t)
                self.made[id(t)] = ("made", len(self.lines), i)
        self.lines.append(line)
        return out

    def _remembered(self, func: Any, args: Any, kwargs: Any, leaves: list[Any], spec: Any) -> Any:
        """The result on meta; for operands of known shapes it is remembered, since most kernels on meta are slow."""
        key = (func, spec, *(_laid_out(x) if isinstance(x, Tensor) else (type(x), str(x)) for x in leaves))
        if key in self.shapes:
            return pytree.tree_map_only(_Like, _Like.make, self.shapes[key])
        out = func(*args, **kwargs)
        if all(isinstance(t, Tensor) and t.layout is torch.strided and t.is_meta for t in pytree.tree_leaves(out)):
            self.shapes[key] = pytree.tree_map_only(Tensor, lambda t: _Like(*_laid_out(t)), out)
        return out

    def key(self, tree: Any) -> Any:
        """A tree with its tensors as the place where each was made."""
        leaves, spec = pytree.tree_flatten(tree)
        return [self._tensor(x) if isinstance(x, Tensor) else self.leaf(x) for x in leaves], spec

    def leaf(self, x: Any) -> Any:
        """What is compared of an argument that is no tensor."""
        return type(x), str(x)

    def _tensor(self, t: Tensor) -> Any:
        if id(t) not in self.made:
            content = self.tape.constants.get(memory_of(t))
            self.kept.append(t)
            if content is None or isinstance(t, nn.Parameter) or content.numel() > LITERAL or not content.is_cpu:
                self.made[id(t)] = ("given", id(t))
            else:
                self.made[id(t)] = ("literal", _laid_out(t), t.storage_offset(), bytes(content.tolist()))
        return self.made[id(t)]


class _WithoutCasts(_Writes):
    """Passes over casts between the model's dtype and float32, of which one run has none."""

    def __init__(self, tape: Tape, shapes: Results, given: Mapping[int, int], foreign: torch.dtype | None) -> None:
        super().__init__(tape, shapes, True)
        self.made = {key: ("given", place) for key, place in given.items()}
        self.foreign = foreign  # a dtype that only the model's own words can bring in

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func is torch.ops.aten._to_copy.default and {args[0].dtype, out.dtype} <= {SHOWN, OWN}:
            self.lines.pop()
            self.made[id(out)] = self.made[id(args[0])]
            self.functions.storages |= {memory_of(t) for t in (args[0], out)}
        if any(isinstance(t, Tensor) and t.dtype == self.foreign for t in pytree.tree_leaves(out)):
            raise NotAlike
        return out

    def leaf(self, x: Any) -> Any:
        if x is OWN:
            x = SHOWN
        elif type(x) is float:
            x = dict(LIMITS).get(x, x)
        return super().leaf(x)


@cache
def _written_operands(func: Any) -> tuple[int, ...]:
    """The positions of the operands that an operator writes into."""
    arguments = enumerate(func._schema.arguments)
    return tuple(i for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


@cache
def _makes_views(func: Any) -> bool:
    """Whether an operator's results may lie in the memory of its operands."""
    return any(a.alias_info is not None for a in (*func._schema.arguments, *func._schema.returns))


@dataclass(frozen=True)
class _Like:
    """A result that is no view of an operand."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


def _laid_out(t: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype]:
    return tuple(t.shape), tuple(t.stride()), t.dtype


class _WithoutDropout(TorchFunctionMode):
    """Passes over dropout, which training does and evaluation must not."""

    def __init__(self, log: _Writes, training: bool) -> None:
        super().__init__()
        self.log, self.training = log, training
        self.storages: set[int] = set()

    def passed(self, x: Any) -> bool:
        """Whether a tensor lies in the memory of one that went through dropout."""
        return isinstance(x, Tensor) and memory_of(x) in self.storages

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.dropout, torch.dropout):
            x, _, on = _dropout(*args, **kwargs)
            if on and not self.training:
                raise NotAlike
            self.storages.add(memory_of(x))
            return x
        if func is F.scaled_dot_product_attention:
            args, kwargs = _without_p(self.training, *args, **kwargs)
        return func(*args, **kwargs)


def _dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    train: bool | None = None,
) -> tuple[Tensor, float, bool]:
    if inplace:
        raise NotAlike
    return input, p, bool(training if train is None else train)


def _without_p(
    training: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if dropout_p and not training:
        raise NotAlike
    return (query, key, value, attn_mask, 0.0, *args), kwargs
