"""Rewrites every symbolic size as an expression in the sizes of the inputs."""

from __future__ import annotations

import operator
from functools import reduce
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils._sympy import functions as symbolic

from tpcompiler.capture.origins import at
from tpcompiler.errors import ModelError

aten = torch.ops.aten


def sizes_from_inputs(graph: fx.Graph, inputs: list[fx.Node]) -> None:
    """Puts one `sym_size` node for each symbol at the top, and computes each other size once, from those nodes.

    Errors: `ModelError` when a size depends on the values of a tensor.
    """
    nodes = list(graph.nodes)
    first = next(n for n in nodes if n.op != "placeholder")
    builder = _Builder(graph, first)
    for x in inputs:
        val = x.meta["val"]
        if isinstance(val, Tensor):
            for i, n in enumerate(val.shape):
                if isinstance(n, torch.SymInt):
                    builder.know(n, x, i)
    for node in nodes:
        val = node.meta.get("val")
        if node.op != "call_function" or isinstance(val, (Tensor, list, tuple)) or val is None:
            continue
        if isinstance(val, torch.SymInt):
            value = builder.build(val.node.expr, node, val)
        elif isinstance(val, int):
            value = int(val)
        else:
            continue
        replace(node, value)


def replace(node: fx.Node, value: Any) -> None:
    """Replaces all uses of a node, including those inside lists, by a node or a number."""
    for user in list(node.users):
        user.args = fx.map_arg(user.args, lambda n: value if n is node else n)
        user.kwargs = fx.map_arg(user.kwargs, lambda n: value if n is node else n)


class _Builder:
    def __init__(self, graph: fx.Graph, before: fx.Node) -> None:
        self.graph = graph
        self.before = before
        self.known: dict[Any, fx.Node] = {}

    def know(self, n: torch.SymInt, x: fx.Node, dim: int) -> None:
        expr = n.node.expr
        if expr not in self.known:
            self.known[expr] = self._call(aten.sym_size.int, (x, dim), n)

    def _call(self, op: Any, args: Any, val: Any) -> fx.Node:
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(op, args)
        node.meta = {"val": val, "module": "", "stack": (), "line": None}
        return node

    def build(self, expr: Any, node: fx.Node, val: torch.SymInt) -> Any:
        """The node or the number that gives an expression's value."""
        if expr.is_number:
            return int(expr)
        if expr in self.known:
            return self.known[expr]
        op, args = self._parts(expr, node)
        built = [self.build(a, node, val) for a in args]
        env = val.node.shape_env
        step = reduce if op in (operator.add, operator.mul, torch.sym_max, torch.sym_min) else lambda f, xs: f(*xs)
        del env
        result = step(lambda *xs: self._combine(op, xs), built)
        self.known[expr] = result
        return result

    def _combine(self, op: Any, xs: Any) -> fx.Node:
        vals = [x.meta["val"] if isinstance(x, fx.Node) else x for x in xs]
        return self._call(op, tuple(xs), op(*vals))

    def _parts(self, expr: Any, node: fx.Node) -> tuple[Any, Any]:
        if isinstance(expr, sympy.Add):
            return operator.add, expr.args
        if isinstance(expr, sympy.Mul):
            return operator.mul, expr.args
        if isinstance(expr, sympy.Pow) and expr.exp.is_Integer and expr.exp > 0:
            return operator.mul, (expr.base,) * int(expr.exp)
        if isinstance(expr, (symbolic.FloorDiv, symbolic.CleanDiv)):
            return operator.floordiv, expr.args
        if isinstance(expr, (symbolic.Mod, symbolic.PythonMod)):
            return operator.mod, expr.args
        if isinstance(expr, (symbolic.Max, sympy.Max)):
            return torch.sym_max, expr.args
        if isinstance(expr, (symbolic.Min, sympy.Min)):
            return torch.sym_min, expr.args
        raise ModelError(f"{at(node)}: the size {expr} does not follow from the inputs' sizes")
