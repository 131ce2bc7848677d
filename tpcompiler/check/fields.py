"""The attributes of emitted classes that depend on the rank (sizes and rows), computed for every rank of the mesh."""

from __future__ import annotations

import ast
from types import SimpleNamespace
from typing import Any

from tpcompiler.check.claims import Geometry
from tpcompiler.check.forward import Refused
from tpcompiler.check.report import Refusal
from tpcompiler.runtime import Group

Fields = dict[str, dict[str, list[Any]]]  # class → attribute → a value for each rank


class _Groups:
    """Stands for `ranks` in a constructor: gives a rank's groups."""

    def __init__(self, geometry: Geometry, rank: int) -> None:
        self.geometry, self.rank = geometry, rank

    def group(self, *over: str) -> Group:
        mesh = self.geometry.mesh
        return Group(mesh.degree(over), mesh.index(over, self.geometry.coords[self.rank]), over)


def fields_of(tree: ast.Module, geometry: Geometry) -> Fields:
    """Every attribute that depends on the rank. Raises `Refused` for one that cannot be computed."""
    constants: dict[str, Any] = {}
    for n in tree.body:
        if isinstance(n, ast.Assign):
            try:
                exec(compile(ast.Module([n], []), "<source>", "exec"), {"__builtins__": {}}, constants)
            except Exception as e:
                raise _refused(n.lineno, str(e)) from None
    out: Fields = {}
    for cls in tree.body:
        if isinstance(cls, ast.ClassDef):
            out[cls.name] = _of_class(cls, geometry, constants)
    return out


def _of_class(cls: ast.ClassDef, geometry: Geometry, constants: dict[str, Any]) -> dict[str, list[Any]]:
    steps = []
    for f in cls.body:
        if isinstance(f, ast.FunctionDef) and f.name == "__init__":
            for n in f.body:
                name = _attribute(n)
                if not _asks_rank(n):
                    continue
                if name is None or not isinstance(n, ast.Assign):
                    raise _refused(n.lineno, "the rank is asked of outside of an attribute of its own")
                steps.append((name, n.lineno, compile(ast.Expression(n.value), "<source>", "eval")))
    out: dict[str, list[Any]] = {name: [] for name, _, _ in steps}
    for rank in range(geometry.size):
        me = SimpleNamespace()
        names = {**constants, "self": me, "ranks": _Groups(geometry, rank), "__builtins__": {}}
        for name, line, code in steps:
            try:
                value = eval(code, names)
            except Exception as e:
                raise _refused(line, str(e)) from None
            if not isinstance(value, (int, Group)) and not is_rows(value):
                raise _refused(line, f"{value!r}")
            setattr(me, name, value)
            out[name].append(value)
    return {name: values for name, values in out.items() if not isinstance(values[0], Group)}


def is_rows(value: Any) -> bool:
    """Whether this is rows: pairs of whole numbers."""
    return isinstance(value, tuple) and all(
        isinstance(run, tuple) and len(run) == 2 and all(type(i) is int for i in run) for run in value
    )


def _refused(line: int, why: str) -> Refused:
    return Refused(Refusal("the source", f"line {line}", "a size or rows of a rank", why))


def _attribute(n: ast.stmt) -> str | None:
    if isinstance(n, ast.Assign) and len(n.targets) == 1 and isinstance(n.targets[0], ast.Attribute):
        target = n.targets[0]
        return target.attr if isinstance(target.value, ast.Name) and target.value.id == "self" else None
    return None


def _asks_rank(value: ast.AST) -> bool:
    """Whether a piece of source depends on the rank, as `ranks.group("tensor")`, `self.tensor.local(8)`,
    `(self.tensor.part(8),)` and `(…)[self.tensor.index]` do."""
    return any(
        (isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr in ("group", "local", "part"))
        or (isinstance(n, ast.Attribute) and n.attr == "index")
        for n in ast.walk(value)
    )
