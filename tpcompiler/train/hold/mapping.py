"""Maps the names in a file of weights to a model's parameters. Names and shapes are compared before a value is read."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial

from torch import Tensor

from tpcompiler.errors import WeightsError
from tpcompiler.program import Capture, Parameter
from tpcompiler.runtime.runs import Slice
from tpcompiler.weights import StateSource

Read = Callable[[str, Slice], Tensor]


@dataclass(frozen=True)
class Renaming:
    """What the user says of a file's tensors, applied in this order."""

    strip: str = ""
    rename: tuple[str, ...] = ()  # OLD=NEW: every OLD in a name becomes NEW
    transpose: tuple[str, ...] = ()  # globs over the names of matrices that are stored transposed

    def __call__(self, name: str) -> str:
        name = name.removeprefix(self.strip)
        for change in self.rename:
            old, equals, new = change.partition("=")
            if not equals or not old:
                raise WeightsError(f"--rename {change}: write OLD=NEW, the old text and the new one")
            name = name.replace(old, new)
        return name


@dataclass(frozen=True)
class NameMap:
    """Where each parameter of a model is in a source."""

    stored: Mapping[str, str]  # parameter → its name in the source
    transposed: frozenset[str]  # parameters that are stored transposed
    shapes: Mapping[str, tuple[int, ...]]  # parameter → its shape in the model
    note: str = ""  # what the user should know about the names, such as a prefix that was found

    def lines(self) -> list[str]:
        """The mapping as text, one parameter a line."""
        return [
            f"{name} {list(self.shapes[name])} ← {stored}{', transposed' if name in self.transposed else ''}"
            for name, stored in self.stored.items()
        ]


def values_of(source: StateSource, capture: Capture, renaming: Renaming | None = None) -> tuple[NameMap, Read]:
    """Where a model's parameters are in `source`, and a function that reads a slice of one. See `map_names`."""
    mapping = map_names(source, [p for p in capture.parameters if not p.buffer], renaming or Renaming())

    def read(name: str, runs: Slice) -> Tensor:
        stored = mapping.stored[name]
        if name in mapping.transposed:
            return source.read(stored, (runs[1], runs[0])).t().contiguous()
        return source.read(stored, runs)

    return mapping, read


def map_names(source: StateSource, parameters: Sequence[Parameter], renaming: Renaming) -> NameMap:
    """Finds every parameter in a source, and compares its shape. No value is read.

    A prefix that all names of the source have, or that all of them lack, is found without an option. Every parameter
    must then be found, so that nothing is guessed. Raises `WeightsError` for names that are missing, for shapes that
    differ, and for another number of layers.
    """
    named = _renamed(source, renaming)
    change, note = _prefix(parameters, named)
    found = {p.name: next((n for n in map(change, p.names) if n in named), None) for p in parameters}
    missing = [p.name for p in parameters if found[p.name] is None]
    if missing:
        raise WeightsError(_missing(source, missing, [n for n in named if n not in set(found.values())]))
    stored = {name: named[there] for name, there in found.items() if there is not None}
    transposed = _compare_shapes(source, parameters, stored, renaming.transpose)
    used = {named[n] for p in parameters for n in map(change, p.names) if n in named}
    more = _other_layers(stored.values(), [n for n in source.tensors if n not in used])
    if more:
        raise WeightsError(
            f"{source.where}: holds {more}, which the model does not have, although it has others of that name with "
            f"other numbers: the model has fewer layers than the weights"
        )
    return NameMap(stored, frozenset(transposed), {p.name: p.shape for p in parameters}, note)


def check_checkpoint(source: StateSource, capture: Capture) -> None:
    """Raises `WeightsError` unless a checkpoint holds exactly this model's parameters, in its shapes."""
    map_names(source, [p for p in capture.parameters if not p.buffer], Renaming())


def _renamed(source: StateSource, renaming: Renaming) -> dict[str, str]:
    named: dict[str, str] = {}
    for old in source.tensors:
        new = renaming(old)
        if new in named:
            raise WeightsError(
                f"{source.where}: {named[new]} and {old} would both be {new}; another --rename would work"
            )
        named[new] = old
    return named


def _prefix(parameters: Sequence[Parameter], named: Mapping[str, str]) -> tuple[Callable[[str], str], str]:
    """A function from the model's names to the source's, and a note, if the names differ by one prefix only."""

    def all_there(change: Callable[[str], str]) -> bool:
        return all(any(change(n) in named for n in p.names) for p in parameters)

    if all_there(lambda n: n) or not parameters:
        return (lambda n: n), ""
    first = parameters[0].name
    for prefix in sorted({n.removesuffix(first) for n in named if n.endswith("." + first)}, key=len):
        if all_there(longer := partial(operator.add, prefix)):
            return longer, f"; its names begin with {prefix!r}"
    if "." in first:
        prefix = first[: first.index(".") + 1]
        if all_there(shorter := partial(_without, prefix)):
            return shorter, f"; its names lack the prefix {prefix!r}"
    return (lambda n: n), ""


def _without(prefix: str, name: str) -> str:
    return name.removeprefix(prefix)


def _compare_shapes(
    source: StateSource, parameters: Sequence[Parameter], stored: Mapping[str, str], globs: Sequence[str]
) -> list[str]:
    transposed = []
    for p in parameters:
        name, shape = stored[p.name], source.tensors[stored[p.name]].shape
        if len(shape) == 2 and any(fnmatchcase(p.name, g) or fnmatchcase(name, g) for g in globs):
            transposed.append(p.name)
            shape = shape[::-1]
        if shape == p.shape:
            continue
        turned = p.name not in transposed and len(shape) == 2 and shape[::-1] == p.shape
        hint = (
            "; it is stored transposed (Conv1D): --transpose, with a glob of all such names, would work"
            if turned
            else ""
        )
        raise WeightsError(f"{source.where}: {name} is {list(shape)}, the model's {p.name} is {list(p.shape)}{hint}")
    return transposed


def _other_layers(known: Iterable[str], rest: Iterable[str]) -> str:
    """A name in `rest` that differs from a known name only in its numbers."""
    patterns = {re.sub(r"\d+", "#", n) for n in known if re.search(r"\d", n)}
    return next((n for n in rest if re.search(r"\d", n) and re.sub(r"\d+", "#", n) in patterns), "")


def _missing(source: StateSource, missing: Sequence[str], free: Sequence[str]) -> str:
    name = missing[0]
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    nearest = get_close_matches(name, free[:2000], n=3, cutoff=0.5)
    hint = f"; nearest: {', '.join(nearest)}" if nearest else "; no name in it is near"
    return f"{source.where}: no {name}{more}{hint}; --strip PREFIX or --rename OLD=NEW map other names"
