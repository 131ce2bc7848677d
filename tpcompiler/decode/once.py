"""Computes once for a session what no token changes: tables by position, and values of other inputs."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from tpcompiler.decode.decoder import ALL, NEW, Table, Want
from tpcompiler.decode.positional import Positional, ancestors, sizes_alone
from tpcompiler.decode.relate import Related
from tpcompiler.errors import DecodeError
from tpcompiler.graphs import call, layout_of, operand, tensors
from tpcompiler.layout import LocalSize
from tpcompiler.ops.compute import pointwise
from tpcompiler.ops.notation import letters_of
from tpcompiler.ops.operands import bind, op_name
from tpcompiler.ops.table import find
from tpcompiler.program import Program
from tpcompiler.runtime import cache

aten = torch.ops.aten


class Tables:
    """The program that is computed once, and the rows of its results that a step takes."""

    def __init__(
        self,
        positional: Positional,
        step: fx.Graph,
        relation: Callable[[fx.Node], Related | str],
        refuse: Callable[[fx.Node, str], DecodeError],
    ) -> None:
        given = {n.name: n for n in step.nodes}  # parameters are placeholders of the step already
        self.positional, self.step, self.relation, self.refuse = positional, step, relation, refuse
        self.session = step.placeholder("session")
        self.graph = fx.Graph()
        self.tables: list[Table] = []
        self.uniform = ""
        self._copies: dict[fx.Node, fx.Node] = {}
        self._inputs: dict[fx.Node, fx.Node] = {}
        self._taken: dict[Any, fx.Node] = {}
        self._stable: dict[fx.Node, bool] = {}
        for node in positional.program.graph.nodes:
            if node.op == "placeholder":
                new = self.graph.placeholder(node.name)
                new.meta = dict(node.meta)
                self._copies[node] = new
                if node.name in given:
                    self._inputs[node] = given[node.name]

    def value(
        self,
        node: fx.Node,
        want: Want,
        length: fx.Node,
        user: fx.Node | None = None,
        result: Want | None = None,
    ) -> fx.Node:
        """Returns a value that no token changes, at these extents, as an operand of `user`."""
        source = self._input(node)
        if NEW not in want and ALL not in want:
            return source
        rank = len(want)
        row = want.index(NEW) - rank if NEW in want else None
        column = want.index(ALL) - rank if ALL in want else None
        batch = None if row is None else self._beside(node, row, user, result)
        key = (node, row, column, batch)
        if key not in self._taken:
            new = call(self.step, cache.rows_at, (source, self.session, length, row, column, batch))
            new.meta = dict(node.meta)
            self._taken[key] = new
        return self._taken[key]

    def _beside(self, node: fx.Node, row: int, user: fx.Node | None, result: Want | None) -> int | None:
        """Where, from the right, sequences of different lengths find a dimension for themselves in this operand."""
        batch = None
        if user is not None and result is not None and isinstance(user.meta["val"], torch.Tensor):
            shape = user.meta["val"].shape
            same = [i for i, n in enumerate(shape) if self._is_batch(n)]
            aligned = result[row] == NEW if -row <= len(result) else False
            if len(same) == 1 and aligned and _aligns(user):
                batch = same[0] - len(shape)
        rank = node.meta["val"].dim()
        taken = batch is not None and rank >= -batch and not self._shared(node, batch)
        if batch is None or taken or batch == row:
            self.uniform = self.uniform or f"{op_name(user or node)} has no place for rows of each sequence's own"
            return None
        return batch

    def _shared(self, node: fx.Node, batch: int) -> bool:
        n = node.meta["val"].shape[batch]
        return (isinstance(n, int) and n == 1) or self._is_batch(n)

    def _is_batch(self, n: Any) -> bool:
        return isinstance(n, torch.SymInt) and n.node.expr == self.positional.batch

    def _input(self, node: fx.Node) -> fx.Node:
        if node.op == "placeholder" and node not in self._copies:
            raise self.refuse(node, "is no input of the step")
        if node in self._inputs:
            return self._inputs[node]
        if not self.stable(node):
            raise self.refuse(node, "gives a position another value when there are more of them")
        if any(self.positional.along(node)) and not self._same_for_all(node):
            self.uniform = self.uniform or f"{node.name} differs between the sequences of a batch"
        name = f"table_{len(self.tables)}"
        with self.step.inserting_before(self.session):
            new = self.step.placeholder(name)
        new.meta = dict(node.meta)
        self.tables.append(Table(name, node.name, self.positional.along(node), tuple(node.meta["val"].shape)))
        self._inputs[node] = new
        self._copy(node)
        return new

    def _has_batch(self, n: Any) -> bool:
        return isinstance(n, torch.SymInt) and self.positional.batch in n.node.expr.free_symbols

    def _same_for_all(self, node: fx.Node) -> bool:
        """Whether all sequences of a batch share a value, so that it can be computed for a batch of one."""
        if not any(self._has_batch(n) for n in node.meta["val"].shape):
            return True
        if node in self.positional.free:
            return self.positional.same_for_all(node)
        related = self.relation(node) if node.op == "call_function" else ""
        if isinstance(related, str):
            return False
        (side,) = related.results
        over = [
            x.name
            for (item, _), n in zip(side, node.meta["val"].shape, strict=True)
            if self._has_batch(n)
            for x in letters_of(item)
        ]
        return set(over) <= related.copies or all(self._same_for_all(n) for n in related.nodes)

    # -- stability --------------------------------------------------------------------------------------------------

    def stable(self, node: fx.Node) -> bool:
        """Whether what stands at a position does not depend on how many positions there are."""
        if node not in self._stable:
            self._stable[node] = self._is_stable(node)
        return self._stable[node]

    def _is_stable(self, node: fx.Node) -> bool:
        if node.op == "placeholder":
            return True
        if node in self.positional.free:
            return self.positional.prefix_stable(node) if self._sees_length(node) else True
        if not self._sees_length(node):
            return True
        if not tensors(node.meta.get("val")):
            return False
        if not isinstance(node.meta["val"], torch.Tensor) or node.target is operator.getitem:
            return all(self.stable(n) for n in node.all_input_nodes)
        if node.target is aten.slice.Tensor and not bind(node)["start"] and bind(node)["step"] == 1:
            return self.stable(operand(node))  # the first positions
        related = self.relation(node)
        if isinstance(related, str) or sizes_alone(node):
            return False
        long = {
            x.name
            for side, n in zip((*related.operands, *related.results), (*related.nodes, node), strict=False)
            for (item, _), seq in zip(side or (), self.positional.along(n), strict=False)
            if seq
            for x in letters_of(item)
        }
        if long & (related.whole | related.contracted):
            return False
        return all(self.stable(n) for n in related.nodes)

    def _sees_length(self, node: fx.Node) -> bool:
        return any(
            isinstance(n.meta.get("val"), torch.SymInt) and self.positional.has_length(n.meta["val"])
            for n in ancestors(node)
        )

    # -- the program ------------------------------------------------------------------------------------------------

    def _copy(self, node: fx.Node) -> fx.Node:
        if node in self._copies:
            return self._copies[node]
        if sizes_alone(node):
            for n in node.all_input_nodes:
                if tensors(n.meta.get("val")) and n in self.positional.live:
                    self._copies[n] = self._empty(n)
        for n in node.all_input_nodes:
            self._copy(n)
        new = self.graph.node_copy(node, self._copies.__getitem__)
        new.meta = dict(node.meta)
        self._copies[node] = new
        return new

    def _empty(self, node: fx.Node) -> fx.Node:
        """Returns a value of the same sizes, for calls that read only the sizes."""
        layout = layout_of(node)
        sizes: list[Any] = []
        for i, n in enumerate(node.meta["val"].shape):
            if isinstance(n, int):
                sizes.append(LocalSize(layout[i]) if layout and layout[i].over else n)
            else:
                sizes.append(self._size(node, n.node.expr))
        new = call(self.graph, aten.empty.memory_format, (sizes,), {"dtype": node.meta["val"].dtype, "device": None})
        new.meta = dict(node.meta)
        return new

    def _size(self, node: fx.Node, expr: Any) -> fx.Node:
        ids = self._copies[next(n for n in self.positional.program.graph.nodes if n in self.positional.rows)]
        for i, symbol in enumerate((self.positional.batch, self.positional.length)):
            if expr == symbol:
                return self.graph.call_function(aten.sym_size.int, (ids, i))
        raise self.refuse(node, f"has a dimension of {expr} elements that a constant is made from")

    def program(self) -> Program:
        """Computes all tables."""
        by_name = {n.name: n for n in self.positional.program.graph.nodes}
        self.graph.output(tuple(self._copies[by_name[t.node]] for t in self.tables))
        self.graph.lint()
        return replace(self.positional.program, graph=self.graph, collectives=())


def _aligns(user: fx.Node) -> bool:
    """Whether an op's operands are aligned at the right, so that one may have more dimensions on the left."""
    if user.target is aten.scaled_dot_product_attention.default or op_name(user) == "matmul":
        return True
    rule = find(user.target)
    return rule is not None and rule.line is pointwise
