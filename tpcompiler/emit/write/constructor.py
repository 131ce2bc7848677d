"""The constructor of an emitted class: parameters under the plain model's names, layers in lists, tied weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import cast

import torch

from tpcompiler.emit.layers.frames import Frame
from tpcompiler.emit.layers.members import ParameterNames
from tpcompiler.emit.layers.statements import LayerClass
from tpcompiler.emit.names.attributes import Fields
from tpcompiler.emit.text.expr import assignment, constant, is_name, list_of, member, progression, tuple_of
from tpcompiler.layout import Dim
from tpcompiler.program import Parameter

Layouts = Mapping[str, tuple[Dim, ...]]  # by parameter


def constructor(
    frame: Frame, inner: list[LayerClass], names: ParameterNames, dims: Layouts, fields: Fields
) -> list[str]:
    """The statements that register a module's parameters, buffers and layers (instances of `inner`)."""
    root, ties = _tree(frame, inner, names)
    writer = _Registrations(names, dims, fields)
    if names.is_list(frame.name):
        made, rest = writer.list_(frame.name, root)
        lines = [f"self.extend({made})", *writer.module("self", frame.name, rest)]
    else:
        lines = writer.module("self", frame.name, root)
    for name, first, parameter in ties:
        container, _, last = name.rpartition(".")
        base = names.attribute(frame.name, container).text if container else "self"
        module = ".".join(p for p in (frame.name, container) if p)
        value = names.attribute(frame.name, first).text
        if parameter.buffer:
            lines.append(_buffer(base, last, value, parameter))
        else:
            lines.append(f"{base}[{last}] = {value}" if names.is_list(module) else assignment(base, last, value))
    return lines


def _buffer(base: str, name: str, value: str, parameter: Parameter) -> str:
    keep = "" if parameter.persistent else ", persistent=False"
    return f"{base}.register_buffer({constant(name)}, {value}{keep})"


@dataclass(frozen=True)
class Instance:
    """A module that is a layer, by its qualified name."""

    made: LayerClass
    name: str

    @property
    def numbers(self) -> dict[str, int | float]:
        """The arguments of the layer's constructor that tell its instances apart."""
        return {n.name: n.of(self.name) for n in self.made.layer.numbers if not n.by_call}


@dataclass
class Namespace:
    """A module without code of its own: what it contains, by name."""

    members: dict[str, Namespace | Parameter | Instance] = field(default_factory=dict)
    made: frozenset[str] = frozenset()  # members that exist already and only need their own members

    def put(self, name: str, item: Namespace | Parameter | Instance) -> None:
        """Adds an item under a dotted name."""
        first, _, rest = name.partition(".")
        if not rest:
            self.members.setdefault(first, item)
            return
        inside = self.members.setdefault(first, Namespace())
        assert isinstance(inside, Namespace), f"{name}: {first} contains nothing else"
        inside.put(rest, item)


def _tree(
    frame: Frame, inner: list[LayerClass], names: ParameterNames
) -> tuple[Namespace, list[tuple[str, str, Parameter]]]:
    """What the module contains, and its tied parameters as (name, first name, parameter)."""
    instances = {frame.relative(n): Instance(made, n) for made in inner for n in made.layer.instances}
    root, ties = Namespace(), []
    first: dict[str, tuple[str, str]] = {}
    for name, parameter in names.under(frame.name):
        parts = name.split(".")
        within = next((p for i in range(1, len(parts)) if (p := ".".join(parts[:i])) in instances), "")
        before = first.setdefault(parameter.name, (name, within))
        if within:
            root.put(within, instances[within])
        if before[0] != name and not (within and before[1] == within):
            ties.append((name, before[0], parameter))
            if not within and "." in name:
                root.put(name.rpartition(".")[0], Namespace())
        elif not within:
            root.put(name, parameter)
    for name, instance in instances.items():
        root.put(name, instance)
    return root, ties


class _Registrations:
    """Writes the statements that register the members of namespaces."""

    def __init__(self, names: ParameterNames, dims: Layouts, fields: Fields) -> None:
        self.names, self.dims, self.fields = names, dims, fields

    def module(self, base: str, module: str, space: Namespace) -> list[str]:
        """The statements that register the members of `space`, the module named `module` and written `base`."""
        out: list[str] = []
        for name, item in space.members.items():
            inside = f"{module}.{name}" if module else name
            target = f"{base}[{name}]" if self.names.is_list(module) else member(base, name).text
            if isinstance(item, Parameter):
                out.append(self._parameter(base, name, item))
            elif isinstance(item, Instance):
                out.append(assignment(base, name, self._instance(item)))
            elif name in space.made:
                out += self.module(target, inside, item)
            else:
                made, rest = self._namespace(inside, item)
                out += [assignment(base, name, made), *self.module(target, inside, rest)]
        return out

    def _namespace(self, module: str, space: Namespace) -> tuple[str, Namespace]:
        """The expression that makes a namespace with all that it can be given at once, and the rest."""
        if space.members and self.names.is_list(module):
            made, rest = self.list_(module, space)
            parameters = all(isinstance(i, Parameter) for i in space.members.values())
            return f"nn.{'Parameter' if parameters else 'Module'}List({made})", rest
        own = {n: p for n, p in space.members.items() if isinstance(p, Parameter)}
        found = {n: p for n, p in own.items() if not p.buffer and is_name(n)}
        frozen = bool(found) and not any(p.trainable for p in found.values())
        dtype = next((p.dtype for p in found.values()), torch.float32)
        given = {n: p for n, p in found.items() if p.trainable is not frozen and p.dtype == dtype}
        rest = Namespace({n: i for n, i in space.members.items() if n not in given})
        shapes = ", ".join(f"{n}={self._shape(p)}" for n, p in given.items())
        kind = "" if dtype == torch.float32 else f".to({dtype})"
        return f"Parameters({shapes}){kind}{'.requires_grad_(False)' if frozen else ''}", rest

    # --- lists --------------------------------------------------------------------------------------------------------

    def list_(self, module: str, space: Namespace) -> tuple[str, Namespace]:
        """The members of a list of parameters, of layers, or of namespaces and layers, and what they still need."""
        items = {int(n): item for n, item in space.members.items()}
        if all(isinstance(i, Parameter) for i in items.values()):
            return _repeated([self._empty(cast(Parameter, items[i])) for i in sorted(items)], 1), Namespace()
        if all(isinstance(i, Instance) for i in items.values()) and sorted(items) == list(range(len(items))):
            return self._layer_list([cast(Instance, items[i]) for i in range(len(items))]), Namespace()
        rows, later = [], {}
        for i in range(max(items) + 1):
            item = items.get(i, Namespace())
            if isinstance(item, Instance):
                rows.append(self._instance(item))
                continue
            assert isinstance(item, Namespace), f"{module} contains modules and parameters"
            made, rest = self._namespace(f"{module}.{i}" if module else str(i), item)
            rows.append(made)
            if rest.members:
                later[str(i)] = rest
        return _repeated(rows, 3), Namespace(dict(later), frozenset(later))

    def _layer_list(self, items: list[Instance]) -> str:
        """`Block(ranks, site=3 * i) for i in range(72)`, or a list with such a comprehension for each class."""
        start, parts = 0, []
        for _, group in groupby(items, key=lambda item: item.made):
            run = list(group)
            each = self._each(run, start)
            if len(run) == len(items) > 1:
                return each
            parts.append(f"*({each})" if len(run) > 1 else self._instance(run[0]))
            start += len(run)
        return list_of(parts)

    def _each(self, run: list[Instance], start: int) -> str:
        """A comprehension over instances of one class. The first is member `start` of its list."""
        made, names = run[0].made, list(run[0].numbers)
        rows = [tuple(i.numbers.values()) for i in run]
        said = [progression([row[k] for row in rows], start) for k in range(len(names))]
        if all(s is not None for s in said):
            args = ", ".join(f"{n}={s}" for n, s in zip(names, said, strict=True))
            where = f"{start}, {start + len(run)}" if start else f"{len(run)}"
            return f"{self._new(made, args)} for {'i' if said else '_'} in range({where})"
        values = ", ".join(constant(r if len(r) > 1 else r[0]).text for r in rows)
        return f"{self._new(made, ', '.join(f'{n}={n}' for n in names))} for {', '.join(names)} in ({values})"

    def _instance(self, instance: Instance) -> str:
        """`Block(ranks, site=3)`"""
        return self._new(instance.made, ", ".join(f"{n}={constant(v)}" for n, v in instance.numbers.items()))

    def _new(self, made: LayerClass, args: str) -> str:
        given = ["ranks"] + ([self.fields.rng()] if made.draws else []) + ([args] if args else [])
        return f"{made.name}({', '.join(given)})"

    # --- parameters ---------------------------------------------------------------------------------------------------

    def _shape(self, p: Parameter) -> str:
        dims = self.dims.get(p.name)
        return tuple_of(map(str, p.shape) if dims is None else (self.fields.size(d).text for d in dims))

    def _empty(self, p: Parameter) -> str:
        inner = self._shape(p)[1:-1].rstrip(",") or "()"
        return f"torch.empty({inner}{'' if p.dtype == torch.float32 else f', dtype={p.dtype}'})"

    def _parameter(self, base: str, name: str, p: Parameter) -> str:
        """The statement that registers one parameter or buffer."""
        if p.buffer:
            return _buffer(base, name, self._empty(p), p)
        made = f"nn.Parameter({self._empty(p)}{'' if p.trainable else ', requires_grad=False'})"
        if not is_name(name):
            return f"{base}.register_parameter({constant(name)}, {made})"
        return assignment(base, name, made)


def _repeated(rows: list[str], least: int) -> str:
    """The rows as a list, or as a comprehension if they are all the same and at least `least`."""
    if len(rows) >= least and len(set(rows)) == 1:
        return f"{rows[0]} for _ in range({len(rows)})"
    return list_of(rows)
