"""Compares how an emitted model is called, and the structure of what it returns, with the plain model's."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from tpcompiler.check.forward import Refused
from tpcompiler.check.report import Refusal
from tpcompiler.program import Capture, InputLeaf


def compare_signature(capture: Capture, model: nn.Module) -> None:
    """Raises `Refused` unless the forward takes the model's arguments under their names, in their order, with the
    traced constants as the only defaults."""
    found = list(inspect.signature(model.forward).parameters.values())
    expected = _expected(capture)
    names = [p.name for p in found]
    if len(found) != len(expected) or any(n not in (None, p.name) for p, (n, _) in zip(found, expected, strict=True)):
        wanted = ", ".join(n or "an argument" for n, _ in expected)
        raise Refused(Refusal("the source", "forward", f"the arguments {wanted}", ", ".join(names)))
    constants = False
    for p, (_, default) in zip(found, expected, strict=True):
        if p.default is not default and not (type(p.default) is type(default) and p.default == default):
            raise Refused(Refusal("the source", "forward", f"{p.name} as the model was traced", f"default {p.default}"))
        constants = constants or default is not p.empty
        if p.kind is not p.POSITIONAL_OR_KEYWORD and not (p.kind is p.KEYWORD_ONLY and constants):
            raise Refused(Refusal("the source", "forward", f"{p.name} by position or by name", p.kind.description))


def _expected(capture: Capture) -> list[tuple[str | None, Any]]:
    """The name of each argument (None: any) and its default, which is `Parameter.empty` for what has tensors in it."""
    args, kwargs = pytree.tree_unflatten(list(range(len(capture.input_leaves))), capture.in_spec)
    names = iter(capture.arg_names)
    named = {i: next(names) for i, leaf in enumerate(capture.input_leaves) if isinstance(leaf, InputLeaf)}

    def default(value: Any) -> Any:
        constant = isinstance(value, int) and value not in named
        return capture.input_leaves[value] if constant else inspect.Parameter.empty

    first = [next((named[i].split(".")[0] for i in pytree.tree_leaves(a) if i in named), None) for a in args]
    return [*zip(first, map(default, args), strict=True), *((k, default(v)) for k, v in kwargs.items())]


def compare_structure(capture: Capture, result: Any) -> None:
    """Raises `Refused` unless a result is nested as the model's is: tuples, lists, dictionaries, and named records."""
    if (wrong := _otherwise(capture.out_spec, result)) is not None:
        raise Refused(Refusal("the source", "forward", *wrong))


def _otherwise(spec: pytree.TreeSpec, value: Any) -> tuple[str, str] | None:
    """What the model gives, and what the source gives in its place, at the first difference."""
    if spec.type is None:
        nested = isinstance(value, (tuple, list, dict))
        return ("a result that is one value", f"a {type(value).__name__}") if nested else None
    if spec.type in (tuple, list, dict):
        alike = type(value) is spec.type
    else:
        alike = type(value).__name__ == spec.type.__name__ and hasattr(value, "_fields")
    if not alike or len(value) != spec.num_children:
        said = f"a {type(value).__name__}" + (f" of {len(value)}" if hasattr(value, "__len__") else "")
        return f"a {spec.type.__name__} of {spec.num_children}", said
    if spec.type is dict and list(value) != list(spec.context):
        return f"the keys {list(spec.context)}", f"{list(value)}"
    if hasattr(value, "_fields") and (names := _names(spec)) is not None and list(value._fields) != names:
        return f"the fields {names}", f"{list(value._fields)}"
    inner = value.values() if spec.type is dict else value
    pairs = zip(spec.children(), inner, strict=True)
    return next((wrong for s, v in pairs if (wrong := _otherwise(s, v)) is not None), None)


def _names(spec: pytree.TreeSpec) -> list[str] | None:
    """The names of a record's fields; None where torch does not tell them."""
    try:
        record = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
        paths = [path for path, _ in pytree.tree_flatten_with_path(record)[0]]
    except Exception:  # the record's own constructor refuses numbers
        return None
    keys = dict.fromkeys(str(getattr(p[0], "key", getattr(p[0], "name", None))) for p in paths)
    return None if "None" in keys else list(keys)
