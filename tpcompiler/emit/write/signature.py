"""The signature of the emitted model's forward and the structure that it returns, which are both the plain model's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.utils import _pytree as pytree

from tpcompiler.emit.names.namer import USED
from tpcompiler.emit.text.expr import constant, tuple_of
from tpcompiler.program import Capture, InputLeaf


@dataclass
class Signature:
    """How the model is called, and the statements that the forward begins with."""

    parameters: list[str]  # as source
    tensors: dict[str, str]  # placeholder → variable
    lines: list[str] = field(default_factory=list)
    constants: set[str] = field(default_factory=set)  # the names of parameters that are no tensors


def signature(capture: Capture) -> Signature:
    """The plain model's signature. An argument that was a constant in the trace may only be that constant."""
    tree = pytree.tree_unflatten(list(range(len(capture.input_leaves))), capture.in_spec)
    args, kwargs = tree
    named = iter(capture.arg_names)
    leaf_names = {i: next(named) for i, leaf in enumerate(capture.input_leaves) if isinstance(leaf, InputLeaf)}
    out = Signature([], {})
    everything = [(_positional(i, a, leaf_names), a) for i, a in enumerate(args)] + list(kwargs.items())
    optional = False
    for name, value in everything:
        constants = [i for _, i in _leaves(value, "") if not isinstance(capture.input_leaves[i], InputLeaf)]
        if isinstance(value, int) and constants:
            default = capture.input_leaves[value]
            out.parameters.append(f"{name}={constant(default)}")
            out.constants.add(name)
            optional = True
            test = f"{name} {'is' if default is None or isinstance(default, bool) else '=='} {constant(default)}"
            out.lines.append(f'assert {test}, "traced with {name}={_plain(default)}"')
            continue
        if optional and name in kwargs and "*" not in out.parameters:
            out.parameters.append("*")
        out.parameters.append(f"{name}: Tensor" if isinstance(value, int) else name)
        for path, i in _leaves(value, ""):
            leaf = capture.input_leaves[i]
            if not isinstance(leaf, InputLeaf):
                continue
            variable = f"{name}_" if name in USED else name
            out.tensors[leaf.node] = variable = leaf_names[i].replace(".", "_") if path else variable
            if variable != name:
                out.lines.append(f"{variable} = {name}{path}")
    return out


def _plain(value: Any) -> str:
    return repr(value).replace('"', "'")


def _positional(position: int, value: Any, names: dict[int, str]) -> str:
    for _, i in _leaves(value, ""):
        if i in names:
            return names[i].split(".")[0]
    return f"argument_{position}"


def _leaves(value: Any, path: str) -> Iterator[tuple[str, int]]:
    """The leaves of one argument: the expression behind the argument that reads it, and the leaf's number."""
    for keys, leaf in pytree.tree_flatten_with_path(value)[0]:
        yield path + "".join(map(_access, keys)), leaf


def _access(key: Any) -> str:
    if isinstance(key, pytree.SequenceKey):
        return f"[{key.idx}]"
    if isinstance(key, pytree.MappingKey):
        return f"[{constant(key.key)}]"
    return f".{key.name}"


@dataclass
class Returned:
    """What the forward returns: an expression, and the definitions of the classes that the expression uses."""

    text: str
    definitions: list[str] = field(default_factory=list)


def returned_structure(spec: pytree.TreeSpec, leaves: list[str]) -> Returned:
    """The flat outputs in the plain model's structure. A class other than a built-in one becomes a named tuple."""
    definition: list[str] = []
    rest = iter(leaves)

    def build(s: pytree.TreeSpec) -> str:
        if s.type is None:
            return next(rest)
        children = [build(c) for c in s.children()]
        if s.type is tuple:
            return tuple_of(children)
        if s.type is list:
            return f"[{', '.join(children)}]"
        fields = _fields(s)
        if s.type is dict:
            return "{" + ", ".join(f"{constant(k)}: {c}" for k, c in zip(fields, children, strict=True)) + "}"
        name = s.type.__name__
        if not any(text.startswith(f"class {name}(") for text in definition):
            definition.append("\n".join([f"class {name}(NamedTuple):", *(f"    {f}: Any" for f in fields)]))
        return f"{name}({', '.join(f'{f}={c}' for f, c in zip(fields, children, strict=True))})"

    text = build(spec)
    return Returned(text[1:-1] if text.startswith("(") and spec.type is tuple and len(leaves) > 1 else text, definition)


def _fields(s: pytree.TreeSpec) -> list[str]:
    """The names of a container's children."""
    context = s.context
    if isinstance(context, (list, tuple)) and context and isinstance(context[0], (list, tuple)):
        context = context[0]
    if isinstance(context, (list, tuple)) and len(context) == s.num_children:
        return [str(c) if not isinstance(c, (int, str)) else c for c in context]  # type: ignore[misc]
    names = getattr(s.type, "_fields", None) or list(getattr(s.type, "__dataclass_fields__", {}))
    return list(names) if len(names) == s.num_children else [f"output_{i}" for i in range(s.num_children)]
