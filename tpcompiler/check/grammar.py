"""The small language that emitted sources are written in. Anything else is refused with its line.

A source is a module of constants and of `nn.Module` classes with two methods each. `__init__` makes parameters, groups
and numbers; `forward` is a list of assignments. The only branches are on `self.training`. There is no state, there are
no hooks and no operations in place, and only the sizes and rows that `__init__` keeps depend on the rank.
"""

from __future__ import annotations

import ast
from functools import cache
from types import BuiltinFunctionType
from typing import NoReturn, TypeGuard

import torch
from torch.overrides import get_overridable_functions

from tpcompiler import runtime
from tpcompiler.check.forward import Refused
from tpcompiler.check.report import Refusal

_IMPORTS = {
    ("torch", None),
    ("torch.nn.functional", None),
    ("math", None),
    ("torch", "Tensor"),
    ("torch", "nn"),
    ("__future__", "annotations"),
    ("typing", "Any"),
    ("typing", "NamedTuple"),
    *(("tpcompiler.runtime", n) for n in runtime.__all__),
}
_BUILDERS = {"group", "local", "part", "empty", "register_buffer", "register_parameter", "to", "requires_grad_"}
_BUILDERS |= {"Parameters", "ModuleList", "ParameterList", "Parameter", "Rng", "range", "super", "__init__", "getattr"}
_BUILDERS |= {"setattr", "add_module", "Module", "extend", "Halves"}
_PYTHON = {"range", "zip", "enumerate", "slice", "tuple", "getattr", "reversed"}
_METHODS = {"float", "long", "bool", "half", "double", "int", "bfloat16", "size", "dim", "to", "type", "new_tensor"}
_METHODS |= {"new_zeros", "new_ones", "new_full", "new_empty", "items", "finfo", "iinfo", "type_as", "reshape_as"}
_DTYPES = ("float64", "float32", "float16", "bfloat16", "complex64", "complex128", "int64", "int32", "bool")
_HIDDEN = {"data", "grad", "grad_fn", "requires_grad", "index", "rank", "coords", "mesh", "names", "apply", "storage"}
_EXPRESSIONS = (
    ast.Name, ast.Attribute, ast.Subscript, ast.Slice, ast.Call, ast.Constant, ast.Tuple, ast.List, ast.BinOp,
    ast.UnaryOp, ast.Compare, ast.IfExp, ast.Starred, ast.keyword, ast.GeneratorExp, ast.ListComp, ast.comprehension,
    ast.BoolOp, ast.boolop,
    ast.expr_context, ast.operator, ast.unaryop, ast.cmpop, ast.JoinedStr, ast.FormattedValue, ast.Dict,
)  # fmt: skip


def read_source(text: str) -> ast.Module:
    """Parses a source. Raises `Refused` for the first part that is not in the language."""
    try:
        tree = ast.parse(text)
    except SyntaxError as e:
        raise Refused(Refusal("the source", f"line {e.lineno}", "Python", str(e.msg))) from None
    _Reader(text.splitlines()).module(tree)
    return tree


class _Reader:
    def __init__(self, lines: list[str]) -> None:
        self.lines = lines
        self.classes: set[str] = set()
        self.imported: set[str] = set()
        self.records: set[str] = set()

    def refuse(self, node: ast.AST, what: str) -> NoReturn:
        at = getattr(node, "lineno", 0)
        line = self.lines[at - 1].strip() if 0 < at <= len(self.lines) else ""
        raise Refused(Refusal("the source", f"line {at}: {line}", "the language of emitted programs", what))

    def module(self, tree: ast.Module) -> None:
        self.classes = {n.name for n in tree.body if isinstance(n, ast.ClassDef)}
        for n in tree.body:
            if isinstance(n, ast.Import):
                self.imports(n, [(a.name, None) for a in n.names])
            elif isinstance(n, ast.ImportFrom):
                self.imports(n, [(n.module or "", a.name) for a in n.names])
            elif isinstance(n, ast.ClassDef):
                self.class_(n)
            elif isinstance(n, ast.Assign):
                self.expression(n.value, set(), building=True)
            elif not _text(n):
                self.refuse(n, f"a statement of the kind {type(n).__name__}")

    def imports(self, node: ast.Import | ast.ImportFrom, names: list[tuple[str, str | None]]) -> None:
        for module, name in names:
            if (module, name) not in _IMPORTS:
                self.refuse(node, f"an import of {name or module}")
        for a in node.names:
            wanted = "F" if isinstance(node, ast.Import) and a.name == "torch.nn.functional" else a.name
            if (a.asname or a.name) != wanted:
                self.refuse(node, f"{a.name} under another name")
            self.imported.add(wanted)

    def class_(self, node: ast.ClassDef) -> None:
        fields = all(
            isinstance(n, ast.AnnAssign) and isinstance(n.value, (ast.Constant, type(None))) or _text(n)
            for n in node.body
        )
        if [ast.unparse(b) for b in node.bases] == ["NamedTuple"] and fields and not node.decorator_list:
            self.records.add(node.name)  # what a model returns
            return
        plain = [ast.unparse(b) for b in node.bases] in (["nn.Module"], ["nn.ModuleList"])
        if not plain or node.keywords or node.decorator_list:
            self.refuse(node, "a class that is no plain nn.Module")
        seen = set()
        for n in node.body:
            if isinstance(n, ast.FunctionDef) and n.name in ("__init__", "forward") and not n.decorator_list:
                if n.name in seen:
                    self.refuse(n, f"a second {n.name}")
                seen.add(n.name)
                self.function(n)
            elif not _text(n) and not (isinstance(n, ast.AnnAssign) and n.value is None):
                self.refuse(n, "something other than __init__ and forward")

    def function(self, node: ast.FunctionDef) -> None:
        building = node.name == "__init__"
        names = {a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
        for extra in (node.args.vararg, node.args.kwarg):
            names |= {extra.arg} if extra else set()
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None and not isinstance(default, (ast.Constant, ast.UnaryOp)):
                self.refuse(default, "a default that is no constant")
        self.statements(node.body, names, building)

    def statements(self, body: list[ast.stmt], names: set[str], building: bool) -> None:
        arguments = frozenset(names) - {x.id for n in body for x in ast.walk(n) if _stored(x)}
        for n in body:
            if _text(n):
                continue
            if isinstance(n, ast.Assign):
                self.expression(n.value, names, building)
                for target in n.targets:
                    self.target(target, names, building)
            elif isinstance(n, ast.Return) and not building:
                if n.value is not None:
                    self.expression(n.value, names, building)
            elif isinstance(n, ast.For) and not n.orelse:
                self.expression(n.iter, names, building)
                self.target(n.target, names, False)
                self.statements(n.body, names, building)
            elif isinstance(n, ast.Assert) and not building and _fixes_argument(n, arguments):
                continue
            elif isinstance(n, ast.Expr) and building and isinstance(n.value, ast.Call):
                self.expression(n.value, names, building)
            else:
                self.refuse(n, f"a statement of the kind {type(n).__name__}")

    def target(self, node: ast.expr, names: set[str], building: bool) -> None:
        if isinstance(node, ast.Name):
            if node.id in self.imported or node.id in self.classes or node.id == "self":
                self.refuse(node, f"{node.id} assigned to")
            names.add(node.id)
        elif isinstance(node, (ast.Tuple, ast.List)):
            for e in node.elts:
                self.target(e.value if isinstance(e, ast.Starred) else e, names, building)
        elif not building or not isinstance(node, (ast.Attribute, ast.Subscript)):
            self.refuse(node, "state that is changed")
        elif isinstance(node, ast.Attribute) and node.attr in ("forward", "training", "_parameters", "__class__"):
            self.refuse(node, f"{node.attr} assigned to")

    def expression(self, node: ast.AST, names: set[str], building: bool) -> None:
        for n in ast.walk(node):
            if not isinstance(n, _EXPRESSIONS):
                self.refuse(n if hasattr(n, "lineno") else node, f"an expression of the kind {type(n).__name__}")
            if isinstance(n, ast.comprehension):
                if n.ifs or n.is_async:
                    self.refuse(node, "a condition")
                self.target(n.target, names, False)
        for n in ast.walk(node):
            if isinstance(n, ast.IfExp) and ast.unparse(n.test) != "self.training":
                self.refuse(n, "a condition other than self.training")
            elif isinstance(n, ast.Compare) and len(n.ops) != 1:
                self.refuse(n, "a comparison of more than two values")
            elif isinstance(n, ast.Not):
                self.refuse(node, "a condition")
            elif isinstance(n, ast.BoolOp) and not (building and ast.unparse(n) == "rng or Rng(seed=0)"):
                self.refuse(n, "a condition")
            elif isinstance(n, ast.Attribute):
                self.attribute(n, building)
            elif isinstance(n, ast.Call):
                self.call(n, names, building)

    def attribute(self, n: ast.Attribute, building: bool) -> None:
        table = building and n.attr == "index"  # (rows of rank 0, rows of rank 1, …)[self.tensor.index]
        if n.attr in _HIDDEN and not table:
            self.refuse(n, f"the attribute {n.attr}")
        operation = not n.attr.endswith("_") and ast.unparse(n.value) == "torch.ops.aten"  # aten._weight_norm
        if n.attr.startswith("_") and n.attr != "__init__" and not operation:
            self.refuse(n, f"the attribute {n.attr}")
        if not building and isinstance(n.value, ast.Attribute) and n.value.attr == "rng":
            self.refuse(n, f"{n.attr} of the random number generator")

    def call(self, n: ast.Call, names: set[str], building: bool) -> None:
        device = next((k.value for k in n.keywords if k.arg == "device"), None)
        if device is not None and not (isinstance(device, ast.Attribute) and device.attr == "device" and not building):
            self.refuse(n, "a device that is not an operand's")
        if isinstance(n.func, ast.Name) and n.func.id == "getattr":
            self.named(n)
        if isinstance(n.func, ast.Name) and n.func.id == "range" and not all(map(_number, n.args)):
            self.refuse(n, "as many times as a size says")
        name = n.func.id if isinstance(n.func, ast.Name) else n.func.attr if isinstance(n.func, ast.Attribute) else ""
        if building:
            if name not in _BUILDERS and name not in self.classes:
                self.refuse(n, f"a call of {name or ast.unparse(n.func)} in a constructor")
        elif isinstance(n.func, ast.Name):
            known = name in _PYTHON or name in self.records or name in runtime.__all__ or name in names
            if not known or (name in runtime.__all__ and (name not in self.imported or name[0].isupper())):
                self.refuse(n, f"a call of {name}")
        elif isinstance(n.func, ast.Attribute):
            own = ast.unparse(n.func).startswith("self.")
            functional = ast.unparse(n.func.value) == "F" and hasattr(torch.nn.functional, name) and name[-1] != "_"
            path = ast.unparse(n.func).split(".")
            if path[:2] == ["torch", "ops"] and len(path) == 5 and path[3][-1] != "_":
                return
            if not own and not functional and not self.operation(name):
                self.refuse(n, f"a call of {name}")
            if path[0] == "torch" and len(path) == 2 and not _operates(name):
                self.refuse(n, f"a call of {name}")
            if own and (name.endswith("_") or name in dir(torch.nn.Module)) and not _is_cast(n):
                self.refuse(n, f"a call of {name}")
        elif not isinstance(n.func, ast.Subscript):
            self.refuse(n, f"a call of {ast.unparse(n.func)}")

    def named(self, n: ast.Call) -> None:
        """`getattr(x, "0")`, `getattr(x, f"block_{i}")`: only what `x.name` could not say."""
        text = n.args[1] if len(n.args) == 2 else None
        said = text.value if isinstance(text, ast.Constant) and isinstance(text.value, str) else ""
        if isinstance(text, ast.JoinedStr):
            said = "".join(str(v.value) if isinstance(v, ast.Constant) else "0" for v in text.values)
        if not said or said.startswith("_") or said in _HIDDEN or said.endswith("_"):
            self.refuse(n, "an attribute under a name that is no module's")

    def operation(self, name: str) -> bool:
        return not name.endswith("_") and (
            name in _METHODS
            or any(hasattr(torch.ops.aten, f"{prefix}{name}") for prefix in ("", "linalg_", "special_"))
        )


def _is_cast(n: ast.Call) -> bool:
    """`x.to(torch.float32)`. Of a module, what it gives is no tensor, and the run ends there."""
    plain = isinstance(n.func, ast.Attribute) and n.func.attr == "to" and len(n.args) == 1 and not n.keywords
    return plain and ast.unparse(n.args[0]) in {f"torch.{d}" for d in _DTYPES}


def _number(n: ast.expr) -> bool:
    return isinstance(n, ast.Constant) or (isinstance(n, ast.UnaryOp) and isinstance(n.operand, ast.Constant))


@cache
def _operates(name: str) -> bool:
    """Whether `torch.name` is about tensors, and not about how torch works."""
    target = getattr(torch, name, None)
    about = name.startswith(("set_", "get_", "is_", "use_", "init_", "manual_seed", "seed"))
    builtin = isinstance(target, BuiltinFunctionType) and not about
    return builtin or target in get_overridable_functions()[torch] or isinstance(target, type)


def _text(n: ast.stmt) -> bool:
    return isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) and isinstance(n.value.value, str)


def _stored(n: ast.AST) -> TypeGuard[ast.Name]:
    return isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)


def _fixes_argument(n: ast.Assert, arguments: frozenset[str]) -> bool:
    """`assert is_causal is True, "…"`: an argument that was a constant in the trace may only be that constant."""
    test = n.test
    return (
        isinstance(test, ast.Compare)
        and isinstance(test.left, ast.Name)
        and test.left.id in arguments
        and [type(o) in (ast.Is, ast.Eq) for o in test.ops] == [True]
        and _literal(test.comparators[0])
        and isinstance(n.msg, ast.Constant)
    )


def _literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except ValueError:
        return False
    return True


_TELLING = (ast.Mod, ast.FloorDiv, ast.LShift, ast.RShift, ast.BitAnd, ast.BitOr, ast.BitXor)


class Guarded(ast.NodeTransformer):
    """Replaces arithmetic that could tell lengths apart by calls of named functions, which refuse it for sizes."""

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        return node  # about an argument, not about lengths

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        if len(node.ops) != 1:
            return node
        args = [ast.Constant(type(node.ops[0]).__name__), node.left, node.comparators[0]]
        return ast.copy_location(ast.Call(ast.Name("_compared", ast.Load()), args, []), node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.op, _TELLING):
            return node
        args = [ast.Constant(type(node.op).__name__), node.left, node.right]
        return ast.copy_location(ast.Call(ast.Name("_compared", ast.Load()), args, []), node)
