"""Counts in one pass over the relations what each axis is for, and what splitting it saves and costs.

The unit of gains and costs is elements per token, so that a plan does not depend on the model's scale. To reduce a
value of width n costs n. To split a product with a weight of n · m elements saves 4 · √(n · m), which grows like n.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from math import prod, sqrt

from torch import SymInt, Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from tpcompiler.axes.map import AxisMap, Operand, Relation
from tpcompiler.ops.operands import op_name

ATTENTION, MLP, EMBEDDING, HEAD, OTHER = "attention", "mlp", "embedding", "head", "other"
_LONG = 1024  # the length that a second sequence, as in scores, is assumed to have
_TOKENS = 1000  # the tokens that a step is assumed to have: work done once a step costs this much less per token
_SMALL = 8  # a table so many times smaller than the largest one stays whole: a split saves little memory and no time


class Tally:
    """The counts for each axis. `roles` counts where and in which ops an axis stands; it is equal for equal layers."""

    def __init__(
        self,
        axes: AxisMap,
        nodes: Mapping[str, fx.Node],
        roles: dict[int, Counter[object]],
        largest_table: int,
    ) -> None:
        self.axes, self.nodes, self.roles, self.largest_table = axes, nodes, roles, largest_table
        self.kinds: dict[int, set[str]] = defaultdict(set)
        self.fed = _fed(nodes)
        self.products: Counter[int] = Counter()  # how many products of activations have the axis in their result
        self.made: Counter[int] = Counter()  # how many products with a weight have the axis in their result
        self.used: Counter[int] = Counter()  # how many products with a weight contract the axis
        self.gain: dict[int, float] = defaultdict(float)
        self.forward: dict[int, float] = defaultdict(float)
        self.entering: dict[int, set[str]] = defaultdict(set)
        self.depth = min(2, max(map(len, map(self._symbols, nodes)), default=0))

    def relation(self, node: fx.Node, relation: Relation) -> None:
        axes = self.axes
        op = op_name(node)
        contracted = {leaf for t in relation.contracted for leaf in axes.leaves(t)}
        inside = {leaf for dims in relation.results for leaf in axes.axes_of(dims)} | contracted
        for leaf in inside:
            self.roles[leaf][op, relation.pattern, leaf in contracted] += 1
        fused = len(relation.rule.products) > 1
        if fused or relation.contracted:
            self._attention(relation, inside, fused=fused)
        self._special(node, relation)
        for leaf in contracted:
            elements = 1 if relation.rule.form == "loss" else self._static(node.name)[0]
            self.forward[leaf] += elements * self._share(node.name)
        for operand in relation.operands:
            if operand.live and operand.dims is not None:
                if self._static(operand.node)[1] and len(operand.dims) > 1 and relation.contracted:
                    self._weight(node, relation, operand, inside, contracted)
                if operand.node in axes.grads:
                    for leaf in inside.difference(axes.axes_of(operand.dims)):
                        self.entering[leaf].add(operand.node)

    def cost(self, leaf: int) -> float:
        """The cost of the collectives, forward and backward, that splitting an axis needs."""
        backward = 0.0
        for name in sorted(self.entering[leaf]):  # sorted, because a sum of floats depends on the order
            elements, fixed = self._static(name)
            backward += elements / _TOKENS if fixed else elements * self._share(name)
        return self.forward[leaf] + backward

    def kinds_of(self, leaf: int) -> tuple[str, ...]:
        kinds = self.kinds[leaf]
        if not kinds:
            kinds = {MLP} if self.made[leaf] and self.used[leaf] else {OTHER}
        return tuple(k for k in (ATTENTION, MLP, EMBEDDING, HEAD, OTHER) if k in kinds)

    # -- one relation -----------------------------------------------------------------------------------------------

    def _static(self, name: str) -> tuple[int, bool]:
        """The elements of a value per token, and whether the value is the same for any input. A third dynamic dimension
        is a second sequence, as in scores, and counts with an assumed length."""
        val = self.nodes[name].meta["val"]
        fixed = [n for n in val.shape if isinstance(n, int)]
        dynamic = len(val.shape) - len(fixed)
        return prod(fixed) * _LONG ** max(0, dynamic - 2), dynamic == 0 and name not in self.fed

    def _symbols(self, name: str) -> frozenset[object]:
        """The symbols in a value's shape, which stand for the batch and sequences."""
        val = self.nodes[name].meta.get("val")
        sizes = [n for n in getattr(val, "shape", ()) if not isinstance(n, int)]
        return frozenset(symbol for n in sizes for symbol in n.node.expr.free_symbols)

    def _share(self, name: str) -> float:
        """A value's rows per token of a step. In a model with values [b, s, …], a value [b, …] or [s, …] has few rows.
        Rows that are picked by value count as one per token."""
        val = self.nodes[name].meta["val"]
        return 1.0 if len(self._symbols(name)) >= self.depth or free_unbacked_symbols(val) else 1 / _TOKENS

    def _special(self, node: fx.Node, relation: Relation) -> None:
        kind = {"lookup": EMBEDDING, "loss": HEAD}.get(relation.rule.form)
        for leaf in {leaf for t in relation.special for leaf in self.axes.leaves(t)}:
            if kind is not None:
                self.kinds[leaf].add(kind)
            else:  # a norm reduces a few numbers for each token
                elements = self._static(node.name)[0] / self.axes.terms.size(leaf)
                self.forward[leaf] += elements * self._share(node.name)

    def _weight(
        self, node: fx.Node, relation: Relation, operand: Operand, inside: set[int], contracted: set[int]
    ) -> None:
        """Counts a product with a weight, or a lookup in a table."""
        assert operand.dims is not None
        mine = set(self.axes.axes_of(operand.dims))
        elements, _ = self._static(operand.node)
        rows = self._rows(node, relation, elements) * self._share(node.name)
        looked_up = {leaf for t in relation.special for leaf in self.axes.leaves(t)}
        for leaf in mine & inside:
            if not looked_up:
                self.gain[leaf] += 4 * sqrt(elements) * rows
            elif elements * _SMALL > self.largest_table:
                self.gain[leaf] += sqrt(elements) * rows
        self.used.update(mine & contracted - looked_up)
        self.made.update(mine - contracted if not looked_up else ())

    def _rows(self, node: fx.Node, relation: Relation, elements: int) -> float:
        """How many rows per token a weight multiplies. There are more than one where each sample has a fixed number of
        rows, such as the patches of an image."""
        made = elements / prod(self.axes.terms.size(t) for t in relation.contracted)
        return max(1.0, self._static(node.name)[0] / made)

    def _attention(self, relation: Relation, inside: set[int], *, fused: bool) -> None:
        """Counts products of activations. An axis in the results of both products of attention is a batch, as heads.
        Fused attention is both products in one op; the last dimension of its result comes from the values alone."""
        acting = [o for o in relation.operands if o.live and o.dims is not None and not self._static(o.node)[1]]
        if len(acting) < 2:
            return
        for leaf in inside:
            self.kinds[leaf].add(ATTENTION)
        for dims in relation.results:
            for leaf in self.axes.axes_of(dims[:-1] if fused else dims):
                self.products[leaf] += 2 if fused else 1


def _fed(nodes: Mapping[str, fx.Node]) -> frozenset[str]:
    """The floating-point values that depend on an input's values. Where a model fixes its batch and sequence, no symbol
    in their shapes tells them from weights. Integers, such as where each expert's rows end, are not multiplied."""
    found: set[str] = set()
    for name, node in nodes.items():
        given = node.op == "placeholder" and node.meta.get("kind") == "input"
        size = isinstance(node.meta.get("val"), int | SymInt)
        if given or not size and any(n.name in found for n in node.all_input_nodes):
            found.add(name)
    vals = {name: nodes[name].meta.get("val") for name in found}
    return frozenset(name for name, val in vals.items() if isinstance(val, Tensor) and val.is_floating_point())
