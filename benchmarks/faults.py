"""Kinds of faults that a compiler like this one could make, each planted in a correct program.

A fault says where it can be planted (names of nodes or of parameters), and plants itself there in a copy. Nothing here
knows what the checker looks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from operator import getitem
from typing import Any

import torch
from torch import fx

from tpcompiler import runtime
from tpcompiler.graphs import copy_value
from tpcompiler.layout import Concat, Dim, Factor, LocalRuns, LocalSize, Product
from tpcompiler.program import Program, Training

aten = torch.ops.aten
Site = Any


@dataclass(frozen=True)
class Fault:
    """A kind of fault: where it can stand, and how it is planted there."""

    name: str
    sites: Callable[[Program], Iterator[Site]]
    plant: Callable[[Program, Site], Program]


FAULTS: list[Fault] = []


def copied(program: Program) -> Program:
    """The program with a graph of its own; nodes keep their names."""
    graph = fx.Graph()
    result = graph.graph_copy(program.graph, {}, return_output_node=True)
    assert result is not None
    values, old = result
    graph.output(values).meta.update(old.meta)
    return replace(program, graph=graph, dims=dict(program.dims))


def nodes_of(program: Program, *targets: Any) -> Iterator[fx.Node]:
    """The nodes that call one of the targets."""
    return (n for n in program.graph.nodes if n.op == "call_function" and n.target in targets)


def on_nodes(
    name: str, where: Callable[[Program], Iterator[fx.Node]]
) -> Callable[[Callable[[Program, fx.Node], None]], None]:
    """Registers a fault that edits the graph at a node."""

    def register(edit: Callable[[Program, fx.Node], None]) -> None:
        def plant(program: Program, site: Site) -> Program:
            mutant = copied(program)
            node = next(n for n in mutant.graph.nodes if n.name == site)
            edit(mutant, node)
            mutant.graph.lint()
            return mutant

        FAULTS.append(Fault(name, lambda p: (n.name for n in where(p)), plant))

    return register


def on_layouts(name: str) -> Callable[[Callable[[Dim], Dim | None]], None]:
    """Registers a fault that gives one dimension of one parameter another layout."""

    def register(edit: Callable[[Dim], Dim | None]) -> None:
        def sites(program: Program) -> Iterator[Site]:
            for name, dims in program.dims.items():
                for i, dim in enumerate(dims):
                    if dim.over and (other := edit(dim)) is not None and _differs(program, dim, other):
                        yield name, i

        def plant(program: Program, site: Site) -> Program:
            name, i = site
            dims = list(program.dims[name])
            other = edit(dims[i])
            assert other is not None
            dims[i] = other
            mutant = copied(program)
            mutant.dims[name] = tuple(dims)
            return mutant

        FAULTS.append(Fault(name, sites, plant))

    return register


def _differs(program: Program, a: Dim, b: Dim) -> bool:
    mesh = program.mesh
    return any(a.runs(mesh, mesh.coords(r)) != b.runs(mesh, mesh.coords(r)) for r in range(mesh.size))


def calls(*targets: Any) -> Callable[[Program], Iterator[fx.Node]]:
    """Sites: calls of the targets."""
    return lambda p: nodes_of(p, *targets)


def after(node: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A new node after one, taking over its users; `args` may name the node itself."""
    graph = node.graph
    users = list(node.users)
    with graph.inserting_after(node):
        new = graph.call_function(target, args)
    copy_value(new, node)
    for user in users:
        user.replace_input_with(node, new)
    return new


def skip(node: fx.Node, instead: fx.Node | None = None) -> None:
    """The node's users take its first operand, or another."""
    operand = instead or node.args[0]
    assert isinstance(operand, fx.Node)
    node.replace_all_uses_with(operand)
    node.graph.erase_node(node)


def floating(node: fx.Node) -> bool:
    """Whether it makes one real tensor."""
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and val.is_floating_point() and val.dim() > 0


def computed(program: Program) -> Iterator[fx.Node]:
    """Sites: real tensors that are computed."""
    return (n for n in program.graph.nodes if n.op == "call_function" and floating(n) and n.target is not getitem)


# -- collectives ----------------------------------------------------------------------------------------------------

collective = calls(runtime.reduce)
entering = calls(runtime.enter)


@on_nodes("reduction missing", collective)
def _(program: Program, node: fx.Node) -> None:
    skip(node)


@on_nodes("reduction doubled", collective)
def _(program: Program, node: fx.Node) -> None:
    after(node, runtime.reduce, node, node.args[1])


def other_group(program: Program, over: Any) -> tuple[str, ...]:
    """Another group than the right one: a part of it, or one across it."""
    rest = tuple(n for n in program.mesh.names if n not in over)
    return over[1:] if len(over) > 1 else rest[:1]


@on_nodes("reduction over the wrong group", collective)
def _(program: Program, node: fx.Node) -> None:
    node.update_arg(1, other_group(program, node.args[1]))


@on_nodes("reduction in backward (f for g)", collective)
def _(program: Program, node: fx.Node) -> None:
    node.target = runtime.enter


@on_nodes("reduce-scatter and all-gather for a reduction", collective)
def _(program: Program, node: fx.Node) -> None:
    size = node.meta["val"].shape[-1]
    node.target = runtime.scatter_sequence
    node.args = (*node.args, node.meta["val"].dim() - 1)
    after(node, runtime.gather_sequence, node, node.args[1], node.args[2], int(size))


@on_nodes("enter missing", lambda p: (n for n in entering(p) if n.args[0].op != "placeholder"))
def _(program: Program, node: fx.Node) -> None:
    skip(node)


@on_nodes("enter missing on a parameter", lambda p: (n for n in entering(p) if n.args[0].op == "placeholder"))
def _(program: Program, node: fx.Node) -> None:
    skip(node)


@on_nodes("enter missing for one of its users", lambda p: (n for n in entering(p) if len(n.users) > 1))
def _(program: Program, node: fx.Node) -> None:
    list(node.users)[-1].replace_input_with(node, node.args[0])  # type: ignore[arg-type]


@on_nodes("enter doubled", entering)
def _(program: Program, node: fx.Node) -> None:
    after(node, runtime.enter, node, node.args[1])


@on_nodes("enter over the wrong group", entering)
def _(program: Program, node: fx.Node) -> None:
    node.update_arg(1, other_group(program, node.args[1]))


@on_nodes("reduction in forward (g for f)", entering)
def _(program: Program, node: fx.Node) -> None:
    node.target = runtime.reduce


def made(node: fx.Node) -> bool:
    return (
        isinstance(node.args[0], fx.Node) and node.args[0].op == "call_function" and bool(node.args[0].all_input_nodes)
    )


@on_nodes("enter one operation too early", lambda p: (n for n in entering(p) if made(n)))
def _(program: Program, node: fx.Node) -> None:
    op = node.args[0]
    assert isinstance(op, fx.Node)
    operand, over = op.all_input_nodes[0], node.args[1]
    skip(node)
    with op.graph.inserting_before(op):
        op.replace_input_with(operand, op.graph.call_function(runtime.enter, (operand, over)))


@on_nodes(
    "enter on the other operand",
    lambda p: (n for n in nodes_of(p, aten.linear.default) if n.args[0].target is runtime.enter),
)
def _(program: Program, node: fx.Node) -> None:
    entered, weight = node.args[:2]
    assert isinstance(entered, fx.Node)
    with node.graph.inserting_before(node):
        new = node.graph.call_function(runtime.enter, (weight, entered.args[1]))
    node.update_arg(0, entered.args[0])
    node.update_arg(1, new)


@on_nodes(
    "enter on a sharded value",
    lambda p: (n for n in nodes_of(p, aten.gelu.default, aten.silu.default, aten.relu.default)),
)
def _(program: Program, node: fx.Node) -> None:
    after(node, runtime.enter, node, tuple(n for n, d in program.mesh.dims if d > 1))


@on_nodes("gather missing", calls(runtime.gather))
def _(program: Program, node: fx.Node) -> None:
    skip(node)


@on_nodes(
    "gather along the wrong dimension", lambda p: (n for n in nodes_of(p, runtime.gather) if n.meta["val"].dim() > 1)
)
def _(program: Program, node: fx.Node) -> None:
    node.update_arg(2, (node.args[2] + 1) % node.meta["val"].dim())  # type: ignore[operator]


@on_nodes("gather with a gradient summed (all-gather / reduce-scatter)", calls(runtime.gather))
def _(program: Program, node: fx.Node) -> None:
    rows = node.args[3]
    assert isinstance(rows, LocalRuns)
    node.target = runtime.gather_sequence
    node.args = (*node.args[:3], rows.dim.size)


@on_nodes("gather of other rows", lambda p: (n for n in nodes_of(p, runtime.gather) if flat(n.args[3].dim) is not None))
def _(program: Program, node: fx.Node) -> None:
    node.update_arg(3, LocalRuns(flat(node.args[3].dim)))  # type: ignore[arg-type, union-attr]


# -- biases, and what must not meet a partial value -------------------------------------------------------------------


def biased(program: Program) -> Iterator[fx.Node]:
    """Sites: additions of a parameter to a reduced product."""
    for n in nodes_of(program, aten.add.Tensor):
        x, b = n.args[:2]
        if isinstance(x, fx.Node) and x.target is runtime.reduce and isinstance(b, fx.Node) and b.op == "placeholder":
            yield n


@on_nodes("bias added before the reduction", biased)
def _(program: Program, node: fx.Node) -> None:
    reduced, bias = node.args[:2]
    assert isinstance(reduced, fx.Node)
    with node.graph.inserting_before(reduced):
        added = node.graph.call_function(aten.add.Tensor, (reduced.args[0], bias))
    reduced.update_arg(0, added)
    reduced.prepend(added)
    skip(node)


@on_nodes("bias missing", biased)
def _(program: Program, node: fx.Node) -> None:
    skip(node)


@on_nodes("bias added twice", biased)
def _(program: Program, node: fx.Node) -> None:
    after(node, aten.add.Tensor, node, node.args[1])


def unary_users(program: Program) -> Iterator[fx.Node]:
    """Sites: operations on a reduced value that could be moved before the reduction."""
    for n in program.graph.nodes:
        if n.op == "call_function" and n.target is not getitem and floating(n):
            first = n.args[0] if n.args else None
            if isinstance(first, fx.Node) and first.target is runtime.reduce and n.target is not runtime.enter:
                yield n


@on_nodes("partial value used before its reduction", unary_users)
def _(program: Program, node: fx.Node) -> None:
    reduced = node.args[0]
    assert isinstance(reduced, fx.Node)
    node.update_arg(0, reduced.args[0])
    after(node, runtime.reduce, node, reduced.args[1])


# -- slices -----------------------------------------------------------------------------------------------------------


def flat(dim: Dim) -> Dim | None:
    """The dimension as one axis split in order, whatever stands in it."""
    return Factor(dim.size, "", dim.over) if not isinstance(dim, Factor) else None


@on_layouts("parameter sliced in order, not by segments")
def _(dim: Dim) -> Dim | None:
    return flat(dim)


@on_layouts("segments of a fused parameter exchanged")
def _(dim: Dim) -> Dim | None:
    return Concat((*dim.parts[1:], dim.parts[0])) if isinstance(dim, Concat) else None


@on_layouts("factors of a parameter's dimension exchanged")
def _(dim: Dim) -> Dim | None:
    return Product(tuple(reversed(dim.parts))) if isinstance(dim, Product) else None


@on_layouts("parameter sliced with a stride")
def _(dim: Dim) -> Dim | None:
    if isinstance(dim, Factor) and dim.n % 2 == 0:
        return Product((Factor(2), Factor(dim.n // 2, "", dim.split)))
    return None


@on_layouts("mesh dimensions of a split exchanged")
def _(dim: Dim) -> Dim | None:
    if isinstance(dim, Factor) and len(dim.split) > 1:
        return replace(dim, split=tuple(reversed(dim.split)))
    return None


def runs_at(node: fx.Node) -> list[int]:
    return [i for i, a in enumerate(node.args) if isinstance(a, LocalRuns)]


def shifted(dim: Dim) -> Dim:
    """The same sizes, other rows."""
    return Product((Factor(1), flat(dim) or Factor(dim.size, "", dim.over[::-1])))


def strided(dim: Dim) -> Dim | None:
    if isinstance(dim, Factor):
        return Product((Factor(2), Factor(dim.n // 2, "", dim.split))) if dim.n % 2 == 0 else None
    return flat(dim)


@on_nodes(
    "lookup, take or loss of other rows",
    lambda p: (
        n
        for n in nodes_of(p, runtime.lookup, runtime.take, runtime.cross_entropy, runtime.linear_cross_entropy)
        if any(strided(n.args[i].dim) is not None for i in runs_at(n))
    ),
)
def _(program: Program, node: fx.Node) -> None:
    for i in runs_at(node):
        node.update_arg(i, LocalRuns(strided(node.args[i].dim)))  # type: ignore[arg-type, union-attr]


def lists(node: fx.Node) -> list[int]:
    return [
        i
        for i, a in enumerate(node.args)
        if isinstance(a, (tuple, list)) and len(a) > 1 and not isinstance(a[0], fx.Node)
    ]


shaping = calls(aten.view.default, aten.reshape.default, aten.unflatten.int, aten.expand.default)


def _swappable(node: fx.Node) -> int | None:
    sizes = list(node.args[-1]) if isinstance(node.args[-1], (tuple, list)) else []
    for i in range(len(sizes) - 1):
        a, b = sizes[i : i + 2]
        if isinstance(a, LocalSize) and isinstance(b, int) and b > 1:
            return i
    return None


@on_nodes("local view with two sizes exchanged", lambda p: (n for n in shaping(p) if _swappable(n) is not None))
def _(program: Program, node: fx.Node) -> None:
    i = _swappable(node)
    assert i is not None
    sizes = list(node.args[-1])  # type: ignore[arg-type]
    sizes[i], sizes[i + 1] = sizes[i + 1], sizes[i]
    node.update_arg(len(node.args) - 1, sizes)


def has_local(a: Any) -> bool:
    return isinstance(a, LocalSize) or (isinstance(a, (tuple, list)) and any(map(has_local, a)))


def whole(a: Any) -> Any:
    if isinstance(a, LocalSize):
        return a.dim.size
    return [whole(b) for b in a] if isinstance(a, (tuple, list)) else a


@on_nodes(
    "global size for a local one", lambda p: (n for n in p.graph.nodes if n.op == "call_function" and has_local(n.args))
)
def _(program: Program, node: fx.Node) -> None:
    node.args = tuple(map(whole, node.args))


def split_sizes(node: fx.Node) -> list[Any]:
    return list(node.args[1])  # type: ignore[arg-type]


@on_nodes(
    "sizes of a split exchanged",
    lambda p: (n for n in nodes_of(p, aten.split_with_sizes.default) if len(set(map(str, split_sizes(n)))) > 1),
)
def _(program: Program, node: fx.Node) -> None:
    node.update_arg(1, split_sizes(node)[::-1])


@on_nodes(
    "items of a split exchanged",
    lambda p: (n for n in nodes_of(p, getitem) if isinstance(n.args[1], int) and n.args[1] > 0),
)
def _(program: Program, node: fx.Node) -> None:
    node.update_arg(1, node.args[1] - 1)  # type: ignore[operator]


@on_nodes(
    "slice moved by one",
    lambda p: (
        n
        for n in nodes_of(p, aten.slice.Tensor)
        if floating(n) and any(type(a) is int and 0 < a < 1 << 40 for a in n.args[2:4])
    ),
)
def _(program: Program, node: fx.Node) -> None:
    node.args = (
        *node.args[:2],
        *(a - 1 if type(a) is int and 0 < a < 1 << 40 else a for a in node.args[2:4]),
        *node.args[4:],
    )


# -- vocabulary -------------------------------------------------------------------------------------------------------

losses = calls(runtime.cross_entropy, runtime.linear_cross_entropy)
joined_losses = calls(runtime.linear_cross_entropy)


def degree(program: Program) -> int:
    return program.mesh.size


@on_nodes(
    "mean instead of sum of looked-up rows", lambda p: (n for n in collective(p) if n.args[0].target is runtime.lookup)
)
def _(program: Program, node: fx.Node) -> None:
    after(node, aten.div.Tensor, node, degree(program))


@on_nodes("loss averaged over the vocabulary's ranks", losses)
def _(program: Program, node: fx.Node) -> None:
    after(node, aten.div.Tensor, node, degree(program))


@on_nodes("label smoothing over the local vocabulary", calls(runtime.cross_entropy))
def _(program: Program, node: fx.Node) -> None:
    smoothing = node.kwargs.get("label_smoothing", 0.0)
    node.update_kwarg("label_smoothing", smoothing * degree(program) if smoothing else 0.05)  # type: ignore[operator, arg-type]


@on_nodes("another class ignored", losses)
def _(program: Program, node: fx.Node) -> None:
    node.update_kwarg("ignore_index", 3 if node.kwargs.get("ignore_index", -100) != 3 else 4)


@on_nodes("ignored targets counted (sum for mean)", losses)
def _(program: Program, node: fx.Node) -> None:
    node.update_kwarg("reduction", "mean" if node.kwargs.get("reduction") == "sum" else "sum")


@on_nodes("loss of an input that entered already", joined_losses)
def _(program: Program, node: fx.Node) -> None:
    if len(node.args) > 3:
        x = node.args[0]
        with node.graph.inserting_before(node):
            entered = node.graph.call_function(runtime.enter, (x, node.args[3]))
        entered.meta = dict(x.meta)  # type: ignore[union-attr]
        node.update_arg(0, entered)


@on_nodes("loss over the classes of one rank", joined_losses)
def _(program: Program, node: fx.Node) -> None:
    node.args = node.args[:3]


@on_nodes("targets in another order", losses)
def _(program: Program, node: fx.Node) -> None:
    place = 2 if node.target is runtime.linear_cross_entropy else 1
    with node.graph.inserting_before(node):
        flipped = node.graph.call_function(aten.flip.default, (node.args[place], [0]))
    flipped.meta = dict(node.args[place].meta)  # type: ignore[union-attr]
    node.update_arg(place, flipped)


@on_nodes("padding row of an embedding", calls(runtime.lookup))
def _(program: Program, node: fx.Node) -> None:
    node.args = (*node.args[:3], *((1,) if len(node.args) == 3 else ()))


# -- values and gradients ----------------------------------------------------------------------------------------------


@on_nodes("value scaled", computed)
def _(program: Program, node: fx.Node) -> None:
    after(node, aten.mul.Tensor, node, 1.01)


@on_nodes("gradient scaled", computed)
def _(program: Program, node: fx.Node) -> None:
    users = list(node.users)
    graph = node.graph
    with graph.inserting_after(node):
        part = graph.call_function(aten.mul.Tensor, (node, 0.5))
    with graph.inserting_after(part):
        cut = graph.call_function(aten.detach.default, (part,))
    with graph.inserting_after(cut):
        zero = graph.call_function(aten.sub.Tensor, (part, cut))
    with graph.inserting_after(zero):
        new = graph.call_function(aten.add.Tensor, (node, zero))
    for user in users:
        user.replace_input_with(node, new)


@on_nodes("gradient cut", computed)
def _(program: Program, node: fx.Node) -> None:
    after(node, aten.detach.default, node)


OTHERS = {
    aten.gelu.default: aten.silu.default,
    aten.silu.default: aten.gelu.default,
    aten.relu.default: aten.gelu.default,
    aten.add.Tensor: aten.sub.Tensor,
    aten.sub.Tensor: aten.add.Tensor,
    aten.mul.Tensor: aten.add.Tensor,
    aten.tanh.default: aten.sigmoid.default,
    aten.sigmoid.default: aten.tanh.default,
    aten.rsqrt.default: aten.sqrt.default,
    aten.cos.default: aten.sin.default,
}


@on_nodes("another operation", lambda p: (n for n in nodes_of(p, *OTHERS) if floating(n)))
def _(program: Program, node: fx.Node) -> None:
    kept = 1 if OTHERS[node.target] in (aten.gelu.default, aten.silu.default) else len(node.args)
    node.args, node.kwargs = node.args[:kept], {}
    node.target = OTHERS[node.target]


@on_nodes(
    "operands exchanged",
    lambda p: (
        n
        for n in nodes_of(
            p,
            aten.sub.Tensor,
            aten.div.Tensor,
            aten.matmul.default,
            aten.bmm.default,
            aten.scaled_dot_product_attention.default,
        )
        if all(isinstance(a, fx.Node) for a in n.args[:2]) and n.args[0] is not n.args[1]
    ),
)
def _(program: Program, node: fx.Node) -> None:
    node.args = (node.args[1], node.args[0], *node.args[2:])


@on_nodes(
    "constant changed", lambda p: (n for n in computed(p) if any(type(a) is float and a not in (0.0,) for a in n.args))
)
def _(program: Program, node: fx.Node) -> None:
    if node.target is not runtime.dropout:
        node.args = tuple(a * 1.5 if type(a) is float else a for a in node.args)


@on_nodes(
    "residual missing",
    lambda p: (
        n
        for n in nodes_of(p, aten.add.Tensor)
        if floating(n) and all(isinstance(a, fx.Node) and a.op != "placeholder" for a in n.args[:2])
    ),
)
def _(program: Program, node: fx.Node) -> None:
    skip(node, node.args[1])  # type: ignore[arg-type]


@on_nodes("causal mask", calls(aten.scaled_dot_product_attention.default))
def _(program: Program, node: fx.Node) -> None:
    args = list(node.args) + [None, 0.0, False][len(node.args) - 3 :]
    if args[3] is None:
        args[5] = not args[5]
    else:
        args[3] = None
    node.args = tuple(args)


def alike(program: Program) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Pairs of parameters of one shape and layout."""
    found: dict[Any, fx.Node] = {}
    nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    for p in program.capture.parameters:
        if not p.buffer and p.node in nodes:
            key = (p.shape, program.dims.get(p.name))
            if key in found:
                yield found[key], nodes[p.node]
            found[key] = nodes[p.node]


@on_nodes("parameters of two layers exchanged", lambda p: (a for a, _ in alike(p)))
def _(program: Program, node: fx.Node) -> None:
    other = next(b for a, b in alike(program) if a.name == node.name)
    mine, theirs = list(node.users), list(other.users)
    for user in mine:
        user.replace_input_with(node, other)
    for user in theirs:
        if user not in mine:
            user.replace_input_with(other, node)


@on_nodes(
    "tied weights untied",
    lambda p: (n for n in p.graph.nodes if n.op == "placeholder" and floating(n) and len(n.users) > 1),
)
def _(program: Program, node: fx.Node) -> None:
    user = list(node.users)[-1]
    with node.graph.inserting_before(user):
        user.replace_input_with(node, node.graph.call_function(aten.detach.default, (node,)))


# -- dropout ----------------------------------------------------------------------------------------------------------

dropouts = calls(runtime.dropout)


@on_nodes("dropout counted locally", lambda p: (n for n in dropouts(p) if n.args[5:] and n.args[5]))
def _(program: Program, node: fx.Node) -> None:
    node.args = node.args[:5]


@on_nodes("one mask for two dropouts", lambda p: (n for n in dropouts(p) if n.args[4]))
def _(program: Program, node: fx.Node) -> None:
    node.update_arg(4, node.args[4] - 1)  # type: ignore[operator]


@on_nodes("dropout of another probability", dropouts)
def _(program: Program, node: fx.Node) -> None:
    node.update_arg(1, node.args[1] / 2)  # type: ignore[operator]


@on_nodes("dropout missing", dropouts)
def _(program: Program, node: fx.Node) -> None:
    skip(node)


@on_nodes("dropout in evaluation", dropouts)
def _(program: Program, node: fx.Node) -> None:
    node.update_arg(2, Training(True, True))


@on_nodes(
    "dropout of a partial value",
    lambda p: (
        n for n in dropouts(p) if n.args[0].target is aten.add.Tensor and n.args[0].args[0].target is runtime.reduce
    ),
)
def _(program: Program, node: fx.Node) -> None:
    added = node.args[0]
    assert isinstance(added, fx.Node)
    reduced = added.args[0]
    assert isinstance(reduced, fx.Node)
    added.update_arg(0, reduced.args[0])
    after(node, runtime.reduce, node, reduced.args[1])
