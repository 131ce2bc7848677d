"""The plain graph rewritten for one rank: local sizes, sliced constants, and the collectives that the plan implies.

What an op does to a split axis is said by its rule (`axes`); this stage knows only four consequences:

    contracted    the result is partial          → `reduce` (a bias is added after it, once)
    looked up     a special form of the op       → `lookup`, `cross_entropy`
    lacked        an operand that needs a gradient and does not carry a split axis, in an op whose result or
                  contraction does               → it enters, once per value
    leaves whole  a sharded output               → `gather`
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from tpcompiler import runtime
from tpcompiler.axes.infer import AxisMap, Relation, bind, op_name
from tpcompiler.errors import PlanError
from tpcompiler.layout import Concat, Dim, Factor, LocalRuns, LocalSize, Product, head, minor
from tpcompiler.plan import Plan
from tpcompiler.program import Capture, Program, Training
from tpcompiler.spec import Spec

aten = torch.ops.aten
Over = tuple[str, ...]
_SIZED = {"view", "reshape", "_unsafe_view", "expand", "broadcast_to"}


class CannotSplit(PlanError):
    """Axes that turned out to have no form on one rank. The plan is made again without them."""

    def __init__(self, node: str, why: str, leaves: tuple[int, ...]) -> None:
        super().__init__(f"{why} (at {node})")
        self.node, self.why, self.leaves = node, why, leaves


def partition(capture: Capture, axes: AxisMap, plan: Plan, spec: Spec) -> Program:
    """One graph for all ranks. Raises `CannotSplit` for axes without a form on one rank, naming the node."""
    rewriter = _Rewriter(capture, axes, plan, spec)
    graph = rewriter.run()
    dims = {
        p.name: plan.dims(axes, axes.values[p.node][0]) if not p.buffer else tuple(Factor(n) for n in p.shape)
        for p in capture.parameters
    }
    return Program(graph, plan.mesh, capture, dims)


class Folded(Exception):
    """An axis lies in a dimension together with a batch in a way that a local shape cannot say."""


@dataclass(frozen=True)
class Apart:
    """A value of which the axis to work on is a dimension of its own."""

    value: fx.Node
    at: int
    dim: Dim
    flat: int | None  # where the two dimensions must become one again


class _Rewriter:
    def __init__(self, capture: Capture, axes: AxisMap, plan: Plan, spec: Spec) -> None:
        self.capture, self.axes, self.plan, self.spec = capture, axes, plan, spec
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.entered: dict[tuple[fx.Node, Over], fx.Node] = {}
        self.taken: dict[tuple[fx.Node, int, Dim], fx.Node] = {}
        self.sites = 0

    def run(self) -> fx.Graph:
        for node in self.capture.graph.nodes:
            if node.op == "output":
                self.output(node)
            else:
                self.env[node] = self.rewrite(node)
        for new in reversed(self.graph.nodes):
            if (
                new.op == "call_function" and not new.users
            ):  # a bias that entered before it was moved past the reduction
                self.graph.erase_node(new)
        self.graph.lint()
        return self.graph

    def rewrite(self, node: fx.Node) -> fx.Node:
        relation = self.axes.relations.get(node.name)
        try:
            if node.op == "call_function" and node.target is aten.dropout.default:
                return self.dropout(node)
            if relation is None:
                return self.copy(node)
            return self.sliced(node, self.op(node, relation)) if node.name in self.axes.cut else self.op(node, relation)
        except Folded as e:
            assert relation is not None
            terms = [t for dims in (*relation.results, *(o.dims or () for o in relation.operands)) for t in dims]
            raise self.refuse(node, str(e), *terms) from None

    # -- building ---------------------------------------------------------------------------------------------------

    def copy(self, node: fx.Node) -> fx.Node:
        new = self.graph.node_copy(node, self.env.__getitem__)
        self.describe(new, node)
        return new

    def describe(self, new: fx.Node, like: fx.Node, dims: Sequence[Dim] | None = None) -> fx.Node:
        """Give a new node its origin's metadata, and its layout."""
        for key in ("val", "module", "stack", "line"):
            if key in like.meta and key not in new.meta:
                new.meta[key] = like.meta[key]
        if dims is None and like.name in self.axes.cut:
            dims = self.plan.dims(self.axes, self.axes.relations[like.name].results[0])
        if dims is None and like.name in self.axes.values:
            found = [self.plan.dims(self.axes, d) for d in self.axes.values[like.name]]
            dims = found[0] if isinstance(like.meta.get("val"), torch.Tensor) else None
            if dims is None:
                new.meta["dims_of"] = tuple(found)
        if dims is not None:
            new.meta["dims"] = tuple(dims)
        return new

    def insert(
        self,
        target: Any,
        args: tuple[Any, ...],
        like: fx.Node,
        note: str,
        dims: Sequence[Dim] | None = None,
        because: tuple[str, tuple[int, ...]] | None = None,
    ) -> fx.Node:
        """A node of the runtime. `because`: of which op and axes, for the list of collectives."""
        new = self.graph.call_function(target, args)
        self.describe(new, like, dims)
        new.meta["note"] = note
        if because is not None:
            new.meta["because"] = because
        return new

    def split_axes(self, terms: Sequence[int | None]) -> tuple[int, ...]:
        return tuple(dict.fromkeys(leaf for t in terms for leaf in self.axes.leaves(t) if leaf in self.plan.split))

    # -- one op -----------------------------------------------------------------------------------------------------

    def refuse(self, node: fx.Node, why: str, *terms: int | None) -> CannotSplit:
        leaves = tuple(leaf for t in terms for leaf in self.axes.leaves(t) if leaf in self.plan.split)
        return CannotSplit(node.name, why, leaves)

    def over(self, terms: Sequence[int | None]) -> Over:
        """Mesh dimensions, in the mesh's order, that split any axis of these terms."""
        found = {n for t in terms for leaf in self.axes.leaves(t) for n in self.plan.split.get(leaf, ())}
        return tuple(n for n in self.plan.mesh.names if n in found)

    def op(self, node: fx.Node, relation: Relation) -> fx.Node:
        everywhere = [t for dims in relation.results for t in dims] + list(relation.contracted)
        present = self.over(everywhere)
        if self.mixed(node, relation):
            return self.take_apart(node, relation)
        replaced = {}
        for operand in relation.operands:
            source = next(n for n in node.all_input_nodes if n.name == operand.node)
            if operand.dims is None:
                continue
            value = self.env[source]
            if operand.live:
                lacking = tuple(n for n in present if n not in self.over(operand.dims))
                if lacking and source.name in self.axes.grads:
                    mine = self.split_axes(operand.dims)
                    because = (op_name(node), tuple(a for a in self.split_axes(everywhere) if a not in mine))
                    value = self.enter(value, source, lacking, because)
            else:
                for i, term in enumerate(operand.dims):
                    if self.over([term]):
                        value = self.take(value, source, i, self.plan.dim(self.axes, term))
            replaced[source] = value
        inputs = {**self.env, **replaced}
        special = self.over(relation.special)
        if special and op_name(node) in ("layer_norm", "rms_norm"):
            return self.norm(node, relation, inputs, special)
        partial = self.over(relation.contracted)
        if not partial:
            return self.local(node, relation, inputs)
        return self.contraction(node, relation, inputs, partial)

    def sliced(self, node: fx.Node, value: fx.Node) -> fx.Node:
        """Of a value that every rank has made whole, this rank's slice; its gradient is a sum over ranks."""
        terms = self.axes.values[node.name][0]
        over = self.over(terms)
        if over and node.name in self.axes.grads:
            value = self.enter(value, node, over, (op_name(node), self.split_axes(terms)))
        for i, term in enumerate(terms):
            if self.over([term]):
                value = self.take(value, node, i, self.plan.dim(self.axes, term))
        return value

    def mixed(self, node: fx.Node, relation: Relation) -> bool:
        """Whether the result is split in some of its segments only, and an operand lacks what splits them: its gradient
        would count the whole segments once a rank."""
        results = [d for dims in relation.results for d in self.plan.dims(self.axes, dims)]
        if not any(uneven_segments(d) for d in results):
            return False
        present = self.over([t for dims in relation.results for t in dims])
        return any(
            o.live and o.dims is not None and o.node in self.axes.grads and set(present) - set(self.over(o.dims))
            for o in relation.operands
        )

    def take_apart(self, node: fx.Node, relation: Relation) -> fx.Node:
        """A product whose weight is fused from segments, as one product a segment, each with an `enter` of its own."""
        name, args = op_name(node), bind(node)
        terms = relation.results[0]
        dims = self.plan.dims(self.axes, terms)
        at = len(dims) - 1
        segments = dims[at]
        if name == "linear":
            x, weight, bias, along = args["input"], args["weight"], args["bias"], 0
        elif name in ("matmul", "mm"):
            x, weight, bias, along = args["self"], args[{"mm": "mat2"}.get(name, "other")], None, -1
        elif name == "addmm" and args["beta"] == 1 and args["alpha"] == 1:
            x, weight, bias, along = args["mat1"], args["mat2"], args["self"], -1
        else:
            raise self.refuse(node, f"{name} of segments of which some are split", terms[at])
        fused = uneven_segments(segments)
        if fused is None or any(d.over for d in dims[:at]) or self.over(relation.contracted):
            raise self.refuse(node, f"{name} of segments of which some are split", terms[at])
        weights = self.segments(weight, along, fused)
        biases = [None] * len(weights) if bias is None else self.segments(bias, -1, fused)
        out = []
        for part, w, b in zip(fused.parts, weights, biases, strict=True):
            piece = fused.around(part)
            value = self.env[x]
            if piece.over and x.name in self.axes.grads:
                leaves = tuple(a for a in self.split_axes(terms[-1:]) if set(self.plan.split[a]) <= set(piece.over))
                value = self.enter(value, x, tuple(n for n in self.plan.mesh.names if n in piece.over), (name, leaves))
            own = [*dims[:at], piece]
            if name == "linear":
                new = self.graph.call_function(node.target, (value, w) if b is None else (value, w, b))
            else:
                new = self.graph.call_function(aten.matmul.default, (value, w))
                new = (
                    new if b is None else self.graph.call_function(aten.add.Tensor, (self.describe(new, node, own), b))
                )
            out.append(self.unfold(self.describe(new, node, own), at, fused, part, node))
        return self.fold(out, at, fused, node, dims)

    def segments(self, source: fx.Node, along: int, fused: Fused) -> list[fx.Node]:
        """A parameter's segments, as views: `(kv (q | k | v) d)` is three weights `(kv q d)`, `(kv k d)`, `(kv v d)`."""
        value = self.env[source]
        along %= len(value.meta["dims"])
        opened = value if fused.plain else self.graph.call_function(aten.unflatten.int, (value, along, fused.sizes))
        at = along if fused.plain else along + bool(fused.before)
        sizes = [LocalSize(p) if p.over else p.size for p in fused.parts]
        whole = self.graph.call_function(aten.split_with_sizes.default, (opened, sizes, at))
        out = []
        for i, part in enumerate(fused.parts):
            piece = self.graph.call_function(operator.getitem, (whole, i))
            if not fused.plain:
                last = along + bool(fused.before) + bool(fused.after)
                piece = self.graph.call_function(aten.flatten.using_ints, (piece, along, last))
            dims = list(value.meta["dims"])
            dims[along] = fused.around(part)
            piece.meta["val"] = _sized(source.meta["val"], along, dims[along].size)
            out.append(self.describe(piece, source, dims))
        return out

    def unfold(self, value: fx.Node, at: int, fused: Fused, part: Dim, like: fx.Node) -> fx.Node:
        if fused.plain:
            return value
        new = self.graph.call_function(aten.unflatten.int, (value, at, fused.sizes_with(part)))
        return new

    def fold(self, pieces: list[fx.Node], at: int, fused: Fused, like: fx.Node, dims: Sequence[Dim]) -> fx.Node:
        """The segments' results joined again as the fused product gives them."""
        if fused.plain:
            return self.describe(self.graph.call_function(aten.cat.default, (pieces, -1)), like, dims)
        joined = self.graph.call_function(aten.cat.default, (pieces, at + bool(fused.before)))
        last = at + bool(fused.before) + bool(fused.after)
        return self.describe(self.graph.call_function(aten.flatten.using_ints, (joined, at, last)), like, dims)

    def enter(self, value: fx.Node, source: fx.Node, over: Over, because: tuple[str, tuple[int, ...]]) -> fx.Node:
        if (value, over) not in self.entered:
            self.entered[value, over] = self.insert(
                runtime.enter, (value, over), source, "backward: all-reduce", value.meta.get("dims"), because
            )
        return self.entered[value, over]

    def take(self, value: fx.Node, source: fx.Node, i: int, dim: Dim) -> fx.Node:
        if (value, i, dim) not in self.taken:
            n = source.meta["val"].dim()
            dims = list(value.meta.get("dims") or [Factor(1)] * n)
            dims[i] = dim
            apart = self.apart(value, i, dim, whole=True)
            new = self.insert(
                runtime.take, (apart.value, apart.at, LocalRuns(apart.dim)), source, "this rank's part", dims
            )
            self.taken[value, i, dim] = self.together(new, apart, source, dims)
        return self.taken[value, i, dim]

    def dropout(self, node: fx.Node) -> fx.Node:
        """Counter-based: the mask depends on where an element stands in the whole value, not on the rank."""
        source, p, mode = node.args[:3]
        assert isinstance(source, fx.Node)
        dims = self.axes.values[node.name][0] if node.name in self.axes.values else ()
        value = self.env[source]
        layout = self.plan.dims(self.axes, dims)
        rows, undo, shift = [], [], 0
        for i, dim in enumerate(layout):
            if dim.over:
                apart = self.apart(value, i + shift, dim, whole=False)
                rows.append((apart.at, apart.dim.size, LocalRuns(apart.dim)))
                if apart.value is not value:
                    undo.append(apart)
                    shift += 1
                value = apart.value
        site, self.sites = self.sites, self.sites + 1
        args = (value, p, mode if isinstance(mode, Training) else Training(mode, mode), None, site, tuple(rows))
        new = self.graph.call_function(runtime.dropout, args, self.batch(node, [a.at for a in undo]))
        for apart in reversed(undo):
            new = self.together(new, apart, node, layout)
        return self.describe(new, node, layout)

    def batch(self, node: fx.Node, moved: list[int]) -> dict[str, Any]:
        """Where a value has its samples, so that a mask depends on which samples of the step these are, and not on how
        the step was cut into micro-batches: dimension 0 is what the first input's dimension 0 is, or that times more."""
        first = next(n for n in self.capture.graph.nodes if n.name == self.capture.inputs[0])
        batch = first.meta["val"].shape[0] if first.meta["val"].dim() else None
        shape = node.meta["val"].shape
        if batch is None or isinstance(batch, int):
            return {} if shape and batch == shape[0] else {"batch_dim": None}
        symbol = batch.node.expr
        for i, n in enumerate(shape):
            expr = getattr(getattr(n, "node", None), "expr", None)
            place = i + sum(at <= i for at in moved)
            if expr == symbol:
                return {"batch_dim": place} if place else {}
            if expr is not None and symbol in expr.free_symbols:
                if i in [at - 1 for at in moved]:  # (b heads) seen as b, heads
                    return {"batch_dim": place} if place else {}
                size = self.graph.call_function(aten.sym_size.int, (self.env[first], 0))
                size.meta["val"] = batch
                return {**({"batch_dim": place} if place else {}), "samples": size}
        return {"batch_dim": None}

    def contraction(self, node: fx.Node, relation: Relation, inputs: dict[fx.Node, fx.Node], partial: Over) -> fx.Node:
        """An op over a split axis: its partial result is summed; what must be added or divided once comes after."""
        name = op_name(node)
        args = bind(node)
        (dims,) = [self.plan.dims(self.axes, d) for d in relation.results]
        special = self.over(relation.special)
        if special:
            if name == "cross_entropy_loss":
                return self.cross_entropy(node, relation, inputs, special, args)
            if name == "embedding":
                return self.lookup(node, relation, inputs, special, args)
            raise self.refuse(node, f"{name} has no form for a part of it", *relation.special)
        bias = None
        if name == "linear":
            bias = args["bias"]
            new = self.graph.call_function(node.target, (inputs[args["input"]], inputs[args["weight"]]))
        elif name in ("addmm", "baddbmm") and args["beta"] == 1 and args["alpha"] == 1:
            bias = args["self"]
            first, second = ("mat1", "mat2") if name == "addmm" else ("batch1", "batch2")
            new = self.graph.call_function(aten.matmul.default, (inputs[args[first]], inputs[args[second]]))
        elif name == "mean":
            return self.mean(node, relation, inputs, partial, args)
        elif name in ("matmul", "mm", "bmm", "mv", "dot", "einsum", "sum", "tpcompiler::grouped_mm"):
            new = self.graph.node_copy(node, inputs.__getitem__)
            new.kwargs = dict(new.kwargs)
        else:
            raise self.refuse(node, f"{name} has no form for a part of it", *relation.contracted)
        new.meta["note"] = f"partial over {'·'.join(partial)}"
        self.describe(new, node, dims)
        out = self.reduce(new, node, partial, dims, relation)
        if bias is None:
            return out
        return self.add_bias(node, relation, out, bias, dims)

    def add_bias(self, node: fx.Node, relation: Relation, out: fx.Node, bias: fx.Node, dims: Sequence[Dim]) -> fx.Node:
        """After the reduction, once. The bias may still lack an axis that the result has."""
        value = self.env[bias]
        mine = next(o for o in relation.operands if o.node == bias.name)
        assert mine.dims is not None
        present = self.over([t for t in relation.results[0]])
        lacking = tuple(n for n in present if n not in self.over(mine.dims))
        if lacking and bias.name in self.axes.grads:
            value = self.enter(value, bias, lacking, ("add", self.split_axes(relation.results[0])))
        new = self.graph.call_function(aten.add.Tensor, (out, value))
        return self.describe(new, node, dims)

    def reduce(self, value: fx.Node, like: fx.Node, over: Over, dims: Sequence[Dim], relation: Relation) -> fx.Node:
        because = (op_name(like), self.split_axes(relation.contracted))
        return self.insert(runtime.reduce, (value, over), like, "all-reduce", dims, because)

    def mean(
        self, node: fx.Node, relation: Relation, inputs: dict[fx.Node, fx.Node], partial: Over, args: dict[str, Any]
    ) -> fx.Node:
        """Sum of this rank's part, all-reduced, over the whole count: parts may be of different lengths."""
        source = args["self"]
        count = 1
        dims = range(source.meta["val"].dim()) if args.get("dim") in (None, []) else args["dim"]
        for i in dims if isinstance(dims, list | tuple | range) else [dims]:
            count *= source.meta["val"].shape[i]
        if not isinstance(count, int):
            raise self.refuse(node, "a mean over it and over the batch at once", *relation.contracted)
        layout = self.plan.dims(self.axes, relation.results[0])
        kwargs = {"dtype": args["dtype"]} if args.get("dtype") is not None else {}
        new = self.graph.call_function(
            aten.sum.dim_IntList, (inputs[source], list(dims), bool(args.get("keepdim", False))), kwargs
        )
        new.meta["note"] = f"partial over {'·'.join(partial)}"
        self.describe(new, node, layout)
        out = self.reduce(new, node, partial, layout, relation)
        return self.describe(self.graph.call_function(aten.div.Tensor, (out, count)), node, layout)

    def norm(self, node: fx.Node, relation: Relation, inputs: dict[fx.Node, fx.Node], over: Over) -> fx.Node:
        args = bind(node)
        (size,) = args["normalized_shape"]
        names = ("weight", "bias") if op_name(node) == "layer_norm" else ("weight",)
        target = getattr(runtime, op_name(node))
        because = (op_name(node), self.split_axes(relation.special))
        dims = self.plan.dims(self.axes, relation.results[0])
        call = (
            inputs[args["input"]],
            over,
            size,
            *(None if args[n] is None else inputs[args[n]] for n in names),
            args["eps"],
        )
        return self.insert(target, call, node, "all-reduces of a number a token", dims, because)

    def lookup(
        self, node: fx.Node, relation: Relation, inputs: dict[fx.Node, fx.Node], over: Over, args: dict[str, Any]
    ) -> fx.Node:
        table = next(o for o in relation.operands if o.node == args["weight"].name)
        assert table.dims is not None
        rows = LocalRuns(self.plan.dim(self.axes, table.dims[0]))
        padding = args["padding_idx"] if args["padding_idx"] >= 0 else None
        dims = self.plan.dims(self.axes, relation.results[0])
        call = (inputs[args["weight"]], inputs[args["indices"]], rows, *(() if padding is None else (padding,)))
        new = self.insert(runtime.lookup, call, node, f"partial over {'·'.join(over)}", dims)
        return self.reduce(new, node, over, dims, relation)

    def cross_entropy(
        self, node: fx.Node, relation: Relation, inputs: dict[fx.Node, fx.Node], over: Over, args: dict[str, Any]
    ) -> fx.Node:
        logits = relation.operands[0]
        assert logits.dims is not None
        rows = LocalRuns(self.plan.dim(self.axes, logits.dims[min(1, len(logits.dims) - 1)]))
        weight = None if args["weight"] is None else inputs[args["weight"]]
        reduction = ("none", "mean", "sum")[args["reduction"]]
        call = (inputs[args["self"]], inputs[args["target"]], over, rows)
        kwargs = {
            "weight": weight,
            "reduction": reduction,
            "ignore_index": args["ignore_index"],
            "label_smoothing": args["label_smoothing"],
        }
        defaults = {"weight": None, "reduction": "mean", "ignore_index": -100, "label_smoothing": 0.0}
        because = (op_name(node), self.split_axes(relation.special))
        layout = self.plan.dims(self.axes, relation.results[0])
        new = self.insert(runtime.cross_entropy, call, node, "all-reduces of a few numbers a token", layout, because)
        new.kwargs = {k: v for k, v in kwargs.items() if v != defaults[k]}
        return new

    # -- local sizes ------------------------------------------------------------------------------------------------

    def local(self, node: fx.Node, relation: Relation, inputs: dict[fx.Node, fx.Node]) -> fx.Node:
        """The op on this rank's parts: arguments that are sizes become this rank's."""
        new = self.graph.node_copy(node, inputs.__getitem__)
        self.describe(new, node)
        results = [self.plan.dims(self.axes, d) for d in relation.results]
        if not any(d.over for dims in results for d in dims) and not any(
            self.over(o.dims or ()) for o in relation.operands
        ):
            return new
        name, args = op_name(node), bind(node) if isinstance(node.target, torch._ops.OpOverload) else {}
        if name in _SIZED:
            new.update_arg(1, self.shape(new.args[1], results[0], node.meta["val"].shape))  # type: ignore[arg-type]
        elif name == "unflatten":
            at = args["dim"] % args["self"].meta["val"].dim()
            part = slice(at, at + len(args["sizes"]))
            new.update_arg(2, self.shape(new.args[2], results[0][part], node.meta["val"].shape[part]))  # type: ignore[arg-type]
        elif name in ("split", "split_with_sizes", "chunk", "tensor_split"):
            self.split(new, args, results)
        elif name == "slice":
            self.slice(new, relation, args, results[0])
        elif name == "group_norm":
            groups = head_of_product(results[0][1], args["num_groups"])
            if groups is not None and groups.over:
                new.update_arg(1, LocalSize(groups))
        elif name in ("repeat_interleave", "repeat"):
            self.repeats(new, name, args, relation, results[0])
        return new

    def apart(self, value: fx.Node, i: int, dim: Dim, *, whole: bool) -> Apart:
        """Where a dimension is a batch times an axis, `(b heads)`: the value seen with the two as dimensions."""
        if not dim.dynamic_size:
            return Apart(value, i, dim, None)
        parts = dim.parts if isinstance(dim, Product) else ()
        static = [p for p in parts if not p.dynamic_size]
        first = bool(parts) and not parts[0].dynamic_size
        rest = parts[len(static) :] if first else parts[: len(parts) - len(static)]
        if not static or any(not p.dynamic_size for p in rest):
            raise Folded(f"a dimension folds it into the batch as {dim}")
        inner: Dim = static[0] if len(static) == 1 else Product(tuple(static))
        size = inner.size if whole or not inner.over else LocalSize(inner)
        sizes = [size, -1] if first else [-1, size]
        new = self.graph.call_function(aten.unflatten.int, (value, i, sizes))
        return Apart(new, i if first else i + 1, inner, i)

    def together(self, new: fx.Node, apart: Apart, like: fx.Node, dims: Sequence[Dim]) -> fx.Node:
        if apart.flat is None:
            return new
        return self.describe(
            self.graph.call_function(aten.flatten.using_ints, (new, apart.flat, apart.flat + 1)), like, dims
        )

    def shape(self, given: Sequence[Any], dims: Sequence[Dim], whole: Sequence[Any]) -> list[Any]:
        """A list of sizes with this rank's in the place of those that are split; `whole` are the plain graph's."""
        sizes = [LocalSize(d) if d.over else n for n, d in zip(given, dims, strict=True)]
        dynamic = [i for i, d in enumerate(dims) if d.over and d.dynamic_size]
        for i in dynamic:  # known at run time only: the one that torch works out
            open_ = [j for j, n in enumerate(given) if j != i and isinstance(n, int) and n == -1 and not dims[j].over]
            found = [self.known(whole[j]) for j in open_]
            if len(dynamic) > 1 or None in found:
                raise Folded(f"a shape folds it into the batch as {dims[i]}")
            for j, n in zip(open_, found, strict=True):
                sizes[j] = n
            sizes[i] = -1
        return sizes

    def known(self, size: Any) -> Any:
        """A size of the plain graph as a number or as the node that computes it; None when no node does."""
        if isinstance(size, int):
            return size
        for node, new in self.env.items():
            val = node.meta.get("val")
            if isinstance(val, torch.SymInt) and val.node.expr == size.node.expr:
                return new
        return None

    def split(self, new: fx.Node, args: dict[str, Any], results: list[tuple[Dim, ...]]) -> None:
        i = args["dim"] % args["self"].meta["val"].dim()
        if not any(dims[i].over for dims in results):
            return
        new.target = aten.split_with_sizes.default
        new.args = (
            new.args[0],
            [LocalSize(dims[i]) if dims[i].over else dims[i].size for dims in results],
            args["dim"],
        )
        new.kwargs = {}

    def slice(self, new: fx.Node, relation: Relation, args: dict[str, Any], result: tuple[Dim, ...]) -> None:
        source = args["self"].meta["val"]
        i = args["dim"] % source.dim()
        dims = relation.operands[0].dims
        assert dims is not None
        before = self.plan.dim(self.axes, dims[i])
        if not before.over:
            return
        n, m, step = before.size, result[i].size, args["step"] or 1
        start = args["start"] or 0
        start = max(start + n if start < 0 else start, 0)
        if step != 1 or n == m:
            new.args = (new.args[0], args["dim"], start if step != 1 else 0, torch.iinfo(torch.int64).max, step)
            return
        first, last = head(before, start), head(before, start + m)
        assert first is not None and last is not None, f"{new.name}: a slice of {before} at {start}"
        new.args = (
            new.args[0],
            args["dim"],
            LocalSize(first) if first.over else start,
            LocalSize(last) if last.over else start + m,
        )

    def repeats(
        self, new: fx.Node, name: str, args: dict[str, Any], relation: Relation, result: tuple[Dim, ...]
    ) -> None:
        operand = relation.operands[0].dims
        assert operand is not None
        if name == "repeat_interleave":
            i = args["dim"] % len(operand)
            times = minor(result[i], args["repeats"])
            assert times is not None, f"{new.name}: {args['repeats']} repeats in {result[i]}"
            new.update_arg(1, LocalSize(times) if times.over else args["repeats"])
            if args.get("output_size") is not None:
                new.update_kwarg("output_size", LocalSize(result[i]))
            return
        lead = len(result) - len(operand)
        counts = []
        for i, times in enumerate(args["repeats"]):
            own = 1 if i < lead or operand[i - lead] is None else self.axes.terms.size(operand[i - lead])  # type: ignore[arg-type]
            parts = head_of_product(result[i], times) if own != 1 else result[i]
            counts.append(LocalSize(parts) if parts is not None and parts.over else times)
        new.update_arg(1, counts)

    # -- the end ----------------------------------------------------------------------------------------------------

    def output(self, node: fx.Node) -> None:
        def leave(value: Any) -> Any:
            return self.leave(value) if isinstance(value, fx.Node) else value

        values = node.args[0]
        assert isinstance(values, tuple | list)
        new = self.graph.output(
            tuple(
                leave(v) if self.whole(i) else self.env[v] if isinstance(v, fx.Node) else v
                for i, v in enumerate(values)
            )
        )
        new.meta.update(node.meta)

    def whole(self, i: int) -> bool:
        return self.spec.output(str(i), *self.names(i)) == "gather"

    def names(self, i: int) -> tuple[str, ...]:
        names = getattr(self.capture, "output_names", ())
        return (names[i],) if i < len(names) else ()

    def leave(self, value: fx.Node) -> fx.Node:
        new = self.env[value]
        for i, dim in enumerate(new.meta.get("dims", ())):
            if dim.over:
                dims = list(new.meta["dims"])
                dims[i] = unsplit(dim)
                apart = self.apart(new, i, dim, whole=False)
                because = ("output", self.split_axes([self.axes.values[value.name][0][i]]))
                args = (apart.value, dim.over, apart.at, LocalRuns(apart.dim))
                new = self.insert(runtime.gather, args, value, "all-gather", dims, because)
                new = self.together(new, apart, value, dims)
        return new


@dataclass(frozen=True)
class Fused:
    """A dimension `(before (part | part | …) after)` of whose segments only some are split."""

    before: tuple[Dim, ...]
    parts: tuple[Dim, ...]
    after: tuple[Dim, ...]

    @property
    def plain(self) -> bool:
        return not self.before and not self.after

    def around(self, part: Dim) -> Dim:
        return part if self.plain else Product((*self.before, part, *self.after))

    @property
    def sizes(self) -> list[Any]:
        return self.sizes_with(Concat(self.parts))

    def sizes_with(self, part: Dim) -> list[Any]:
        dims = [Product(d) if len(d) > 1 else d[0] for d in (self.before, (part,), self.after) if d]
        return [LocalSize(d) if d.over else d.size for d in dims]


def uneven_segments(dim: Dim) -> Fused | None:
    """The segments of a dimension, when they are not all split alike."""
    if isinstance(dim, Concat) and len({p.over for p in dim.parts}) > 1:
        return Fused((), dim.parts, ())
    if isinstance(dim, Product):
        for i, p in enumerate(dim.parts):
            if isinstance(p, Concat) and len({q.over for q in p.parts}) > 1:
                return Fused(dim.parts[:i], p.parts, dim.parts[i + 1 :])
    return None


def _sized(val: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    return val.new_empty([size if i == dim else n for i, n in enumerate(val.shape)])


def head_of_product(dim: Dim, n: int) -> Dim | None:
    """The major factors of a dimension that make up `n`, None when no cut falls there."""
    if dim.size == n:
        return dim
    if not isinstance(dim, Product):
        return None
    for k in range(len(dim.parts), 0, -1):
        parts = dim.parts[:k]
        if Product(parts).size == n:
            return parts[0] if k == 1 else Product(parts)
    return None


def unsplit(dim: Dim) -> Dim:
    if isinstance(dim, Factor):
        return replace(dim, split=())
    assert isinstance(dim, Product | Concat)
    return type(dim)(tuple(map(unsplit, dim.parts)))
