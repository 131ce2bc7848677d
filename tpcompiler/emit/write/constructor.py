"""The constructor of an emitted class: parameters under the plain model's names, layers in lists, tied weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from tpcompiler.emit.layers.frames import Names
from tpcompiler.emit.layers.outline import Layer, Number
from tpcompiler.emit.names.fields import Fields, attribute
from tpcompiler.emit.text.expr import constant, tuple_of
from tpcompiler.layout import Dim
from tpcompiler.program import Parameter

Dims = Mapping[str, tuple[Dim, ...]]


@dataclass
class Space:
    """A module that is only a namespace: what stands under each name."""

    inside: dict[str, Space | Parameter | Instance] = field(default_factory=dict)
    made: set[str] = field(default_factory=set)  # those that are there already


@dataclass(frozen=True)
class Instance:
    layer: Layer
    name: str  # qualified


class Constructor:
    """Writes the statements that register a module's parameters, buffers and layers."""

    def __init__(self, prefix: str, layers: list[Layer], names: Names, dims: Dims, fields: Fields) -> None:
        self.dims, self.fields = dims, fields
        self.ties: list[tuple[str, str]] = []
        self.out: list[str] = []
        self.tree = self._tree(prefix, layers, names)

    def lines(self) -> list[str]:
        self._module("self", self.tree)
        for name, first in self.ties:
            self.out.append(f"{attribute('self', name)} = {attribute('self', first)}")
        return self.out

    def _tree(self, prefix: str, layers: list[Layer], names: Names) -> Space:
        lead = len(prefix) + 1 if prefix else 0
        instances = {n[lead:]: Instance(layer, n) for layer in layers for n in layer.instances}
        root = Space()
        first: dict[str, tuple[str, str]] = {}
        for name, parameter in names.under(prefix):
            parts = name.split(".")
            within = next((p for i in range(1, len(parts)) if (p := ".".join(parts[:i])) in instances), "")
            before = first.setdefault(parameter.name, (name, within))
            if within:
                _put(root, within, instances[within])
            if before[0] != name and not (within and before[1] == within):
                self.ties.append((name, before[0]))
                if not within:
                    _put(root, name.rpartition(".")[0], Space()) if "." in name else None
            elif not within:
                _put(root, name, parameter)
        for name, instance in instances.items():
            _put(root, name, instance)
        return root

    # --- modules ------------------------------------------------------------------------------------------------------

    def _module(self, base: str, space: Space) -> None:
        """Registers what stands in `space` under the module that `base` says."""
        for name, item in space.inside.items():
            target = attribute(base, name).text
            if isinstance(item, Parameter):
                self._single(base, target, name, item)
            elif isinstance(item, Instance):
                self.out.append(f"{target} = {self._call(item)}")
            elif name in space.made:
                self._module(target, item)
            else:
                self._space(target, item)

    def _space(self, target: str, space: Space) -> None:
        made, rest = self._made(space)
        self.out.append(f"{target} = {made}")
        self._module(target, rest)

    def _made(self, space: Space) -> tuple[str, Space]:
        """The expression that makes a namespace with what it can be given at once, and the rest."""
        members = list(space.inside)
        if members and all(m.isdigit() for m in members):
            return self._list({int(n): item for n, item in space.inside.items()})
        own = {n: p for n, p in space.inside.items() if isinstance(p, Parameter)}
        parameters = {n: p for n, p in own.items() if not p.buffer and n.isidentifier()}
        frozen = bool(parameters) and not any(p.trainable for p in parameters.values())
        dtype = next((p.dtype for p in parameters.values()), torch.float32)
        parameters = {n: p for n, p in parameters.items() if p.trainable is not frozen and p.dtype == dtype}
        rest = Space({n: i for n, i in space.inside.items() if n not in parameters})
        shapes = ", ".join(f"{n}={self._shape(p)}" for n, p in parameters.items())
        kind = "" if dtype == torch.float32 else f".to({dtype})"
        return f"Parameters({shapes}){kind}{'.requires_grad_(False)' if frozen else ''}", rest

    def _list(self, items: dict[int, Space | Parameter | Instance]) -> tuple[str, Space]:
        if all(isinstance(i, Parameter) for i in items.values()):
            return self._parameter_list(items), Space()  # type: ignore[arg-type]
        if all(isinstance(i, Instance) for i in items.values()) and sorted(items) == list(range(len(items))):
            return self._layer_list([items[i] for i in range(len(items))]), Space()  # type: ignore[misc]
        rows, later = [], Space()
        for i in range(max(items) + 1):
            item = items.get(i, Space())
            if isinstance(item, Instance):
                rows.append(self._call(item))
                continue
            assert isinstance(item, Space), "a list of modules and parameters"
            made, rest = self._made(item)
            rows.append(made)
            if rest.inside:
                later.inside[str(i)] = rest
                later.made.add(str(i))
        if len(rows) > 2 and len(set(rows)) == 1:
            return f"nn.ModuleList({rows[0]} for _ in range({len(rows)}))", later
        return f"nn.ModuleList([{', '.join(rows)}])", later

    def _parameter_list(self, items: dict[int, Parameter]) -> str:
        shapes = [self._empty(items[i]) for i in sorted(items)]
        if len(set(shapes)) == 1:
            return f"nn.ParameterList({shapes[0]} for _ in range({len(shapes)}))"
        return f"nn.ParameterList([{', '.join(shapes)}])"

    def _layer_list(self, items: list[Instance]) -> str:
        """`nn.ModuleList(Block(ranks, site=3 * i) for i in range(72))`, runs of one class one comprehension each."""
        runs: list[list[Instance]] = []
        for item in items:
            if runs and runs[-1][0].layer is item.layer:
                runs[-1].append(item)
            else:
                runs.append([item])
        start, parts = 0, []
        for run in runs:
            each = self._each(run, start)
            parts.append(f"*({each})" if len(run) > 1 else self._call(run[0]))
            if len(runs) == 1 and len(run) > 1:
                return f"nn.ModuleList({each})"
            start += len(run)
        return f"nn.ModuleList([{', '.join(parts)}])"

    def _each(self, run: list[Instance], start: int) -> str:
        layer = run[0].layer
        said = []
        for n in _kept(layer):
            values = [_number(n, layer, i.name) for i in run]
            said.append(progression(values, start))
        if all(s is not None for s in said):
            args = ", ".join(f"{n.name}={s}" for n, s in zip(_kept(layer), said, strict=True))
            stop = start + len(run)
            counter = "i" if said else "_"
            return f"{self._new(layer, args)} for {counter} in range({f'{start}, ' if start else ''}{stop})"
        rows = [tuple(_number(n, layer, i.name) for n in _kept(layer)) for i in run]
        names = [n.name for n in _kept(layer)]
        args = ", ".join(f"{n}={n}" for n in names)
        values_ = ", ".join(constant(r if len(r) > 1 else r[0]).text for r in rows)
        return f"{self._new(layer, args)} for {', '.join(names)} in ({values_})"

    def _call(self, instance: Instance) -> str:
        layer = instance.layer
        numbers = [f"{n.name}={constant(_number(n, layer, instance.name))}" for n in _kept(layer)]
        return self._new(layer, ", ".join(numbers))

    def _new(self, layer: Layer, args: str) -> str:
        given = ["ranks"] + ([self.fields.rng()] if layer.draws else []) + ([args] if args else [])
        return f"{layer.name}({', '.join(given)})"

    # --- parameters ---------------------------------------------------------------------------------------------------

    def _shape(self, p: Parameter) -> str:
        dims = self.dims.get(p.name)
        if dims is None:
            return tuple_of(map(str, p.shape))
        return tuple_of(self.fields.size(d).text for d in dims)

    def _empty(self, p: Parameter) -> str:
        shape = self._shape(p)
        inner = shape[1:-1].rstrip(",") or "()"
        return f"torch.empty({inner}{'' if p.dtype == torch.float32 else f', dtype={p.dtype}'})"

    def _single(self, base: str, target: str, name: str, p: Parameter) -> None:
        if p.buffer:
            keep = "" if p.persistent else ", persistent=False"
            self.out.append(f"{base}.register_buffer({constant(name)}, {self._empty(p)}{keep})")
            return
        made = f"nn.Parameter({self._empty(p)}{'' if p.trainable else ', requires_grad=False'})"
        if target.startswith("getattr") or name.isdigit():
            self.out.append(f"{base}.register_parameter({constant(name)}, {made})")
        else:
            self.out.append(f"{target} = {made}")


def _put(root: Space, name: str, item: Space | Parameter | Instance) -> None:
    parts = name.split(".")
    for part in parts[:-1]:
        inner = root.inside.setdefault(part, Space())
        assert isinstance(inner, Space), f"{name}: {part} is no namespace"
        root = inner
    root.inside.setdefault(parts[-1], item)


def _kept(layer: Layer) -> list[Number]:
    return [n for n in layer.numbers if not n.by_call]


def _number(n: Number, layer: Layer, instance: str) -> int | float:
    return next(n.values[id(f)] for f in layer.frames if f.name == instance)


def progression(values: list[int | float], start: int) -> str | None:
    """`3 * i + 1` for 1, 4, 7, … where i counts from `start`; None when the values are no such row."""
    if len(values) < 2 or not all(isinstance(v, int) for v in values):
        return None
    step = values[1] - values[0]
    base = values[0] - step * start
    if any(v != base + step * i for i, v in enumerate(values, start)):
        return None
    term = "i" if step == 1 else f"{step} * i"
    return term if base == 0 else f"{term} + {base}" if base > 0 else f"{term} - {-base}"
