"""Makes in-place operations functional, so that no node writes to a tensor.

The trace says which tensors share memory: fake tensors share storages as real ones do. A write to a view becomes a new
value of the view, which is scattered back into its base. Other views of that base are computed again when next used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from tpcompiler.capture.origins import at
from tpcompiler.capture.private_tracing import memory_of
from tpcompiler.errors import ModelError

aten = torch.ops.aten


def functionalise(graph: fx.Graph) -> None:
    """Makes a graph functional, in place.

    A write into a buffer is kept for what reads the buffer later in the same call, and noted as the placeholder's
    `meta["written"]`; `unkept_writes` decides about it. Errors: `ModelError` when the model writes into an input or a
    parameter, or through a view that has no inverse.
    """
    _Functionaliser(graph).run()


def unkept_writes(*graphs: fx.Graph) -> None:
    """Buffers keep their values from call to call. A write to one is dropped where no graph of the model reads the
    buffer, such as a count of batches. Errors: `ModelError` where one does."""
    read = {n.meta.get("shown") for g in graphs for n in g.nodes if n.op == "placeholder" and n.users}
    for node in (n for g in graphs for n in g.nodes if "written" in n.meta):
        if node.meta["shown"] in read:
            raise ModelError(node.meta["written"])


def _writes(node: fx.Node) -> int | None:
    """The position of the argument that the node writes to."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return None
    for i, a in enumerate(schema.arguments):
        if a.alias_info is not None and a.alias_info.is_write:
            return i
    return None


def _argument(node: fx.Node, i: int) -> fx.Node:
    name = node.target._schema.arguments[i].name  # type: ignore[union-attr]
    found: Any = node.args[i] if i < len(node.args) else node.kwargs[name]
    assert isinstance(found, fx.Node)
    return found


def _storage(node: fx.Node) -> int | None:
    val = node.meta.get("val")
    if isinstance(val, Tensor):
        return memory_of(val)
    if isinstance(val, (list, tuple)) and all(isinstance(v, Tensor) for v in val):  # the pieces of one tensor, or none
        storages = {memory_of(v) for v in val}
        return storages.pop() if len(storages) == 1 else None
    return None


class _Functionaliser:
    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.base: dict[int, fx.Node] = {}  # storage → the node that made it
        self.family: dict[fx.Node, list[fx.Node]] = {}
        self.parent: dict[fx.Node, fx.Node] = {}
        self.now: dict[fx.Node, fx.Node | None] = {}  # a tensor's present value; None if it is out of date

    def run(self) -> None:
        if not any(_writes(n) is not None for n in self.graph.nodes):
            return
        for node in list(self.graph.nodes):
            self._know(node)
            with self.graph.inserting_before(node):
                at_write = _writes(node)
                if at_write is None:
                    node.args = fx.map_arg(node.args, self._value)
                    node.kwargs = fx.map_arg(node.kwargs, self._value)
                else:
                    self._write(node, _argument(node, at_write))

    def _know(self, node: fx.Node) -> None:
        key = _storage(node)
        if key is None:
            return
        base = self.base.setdefault(key, node)
        self.family.setdefault(base, []).append(node)
        if node is not base:
            inputs = [i for i in node.all_input_nodes if _storage(i) == key]
            self.parent[node] = inputs[0] if inputs else base

    def _value(self, node: fx.Node) -> fx.Node:
        now = self.now.get(node, node)
        if now is None:
            now = self.graph.node_copy(node, lambda n: self._value(n))
            self.now[node] = now
        return now

    def _write(self, node: fx.Node, target: Any) -> None:
        root = self.base[_storage(target)]  # type: ignore[index]
        if root.op == "placeholder":
            said = (
                f"{at(node)}: writes into {root.meta.get('shown', root.name)}, which the model is given; "
                "work on a copy (out of place)"
            )
            if root.meta.get("kind") != "buffer":
                raise ModelError(said)
            root.meta["written"] = said
        value = self._out_of_place(node, target)
        path = {target: value}
        while target is not root:
            up = self.parent[target]
            value = self._scatter(target, self._value(up), value, node)
            target = up
            path[target] = value
        for member in self.family[root]:
            self.now[member] = path.get(member)
        self.now[node] = self._value(next(iter(path)))
        self.family[root].append(node)
        self.parent.setdefault(node, next(iter(path)))
        node.replace_all_uses_with(next(iter(path)))
        self.graph.erase_node(node)

    def _out_of_place(self, node: fx.Node, target: fx.Node) -> fx.Node:
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._value)
        name = node.target._schema.name.split("::")[1]  # type: ignore[union-attr]
        overload = node.target._overloadname  # type: ignore[union-attr]
        if name in ("copy_", "fill_") and isinstance(args[1], fx.Node):
            source: Any = args[1]
            dtype = target.meta["val"].dtype
            if source.meta["val"].dtype != dtype:
                source = self._call(aten.to.dtype, (source, dtype), node, source.meta["val"].to(dtype))
            if tuple(source.meta["val"].shape) == tuple(target.meta["val"].shape):
                return source
            return self._call(aten.expand.default, (source, self._shape(target)), node, target.meta["val"])
        if name in ("fill_", "zero_"):
            fill = args[1] if name == "fill_" else 0
            return self._call(aten.full_like.default, (args[0], fill), node, target.meta["val"])
        packet = getattr(aten, name[:-1] if name.endswith("_") else name, None)
        op = getattr(packet, overload, None) if packet is not None and name.endswith("_") else None
        kwargs = {k: v for k, v in kwargs.items() if k != "out"}
        if op is None and packet is not None:
            op = _same_arguments(packet, node.target)
        if op is None or op._schema.is_mutable:
            raise ModelError(f"{at(node)}: {node.target} works in place and has no out-of-place form")
        dtype = target.meta["val"].dtype
        if "dtype" in _keywords(op) - _keywords(node.target):
            kwargs["dtype"] = dtype  # a factory writes what its `out` holds
        out = self._call(op, args, node, target.meta["val"], kwargs)
        result = op(*fx.map_arg(args, _val), **fx.map_arg(kwargs, _val)) if _promotes(args) else target.meta["val"]
        if result.dtype != dtype:  # int_tensor += float: in place keeps the dtype
            out.meta["val"] = result
            out = self._call(aten.to.dtype, (out, dtype), node, target.meta["val"])
        return out

    def _scatter(self, view: fx.Node, base: fx.Node, value: fx.Node, node: fx.Node) -> fx.Node:
        """`base` with its view replaced by `value`."""
        t, a = view.target, view.args
        like = base.meta["val"]
        if t is aten.slice.Tensor:
            return self._call(aten.slice_scatter.default, (base, value, *self._args(a[1:])), node, like)
        if t is aten.select.int:
            return self._call(aten.select_scatter.default, (base, value, *self._args(a[1:])), node, like)
        if t is aten.diagonal.default:
            return self._call(aten.diagonal_scatter.default, (base, value, *self._args(a[1:])), node, like)
        if t in _UNORDERED and _shape(view) == _shape(base):
            return value
        if t is aten.unsqueeze.default:
            return self._call(aten.squeeze.dim, (value, a[1]), node, like)
        if t is aten.squeeze.dim:
            return self._call(aten.unsqueeze.default, (value, a[1]), node, like)
        if t in (aten.transpose.int, aten.t.default):
            return self._call(t, (value, *a[1:]), node, like)
        if t is aten.permute.default:
            order: Any = a[1]
            inverse = [[d % len(order) for d in order].index(i) for i in range(len(order))]
            return self._call(t, (value, inverse), node, like)
        if t in _RESHAPES:
            return self._call(aten.reshape.default, (value, self._shape(base)), node, like)
        raise ModelError(f"{at(node)}: writes in place through a view made by {t}; write into the tensor itself")

    def _args(self, args: Any) -> Any:
        return fx.map_arg(args, self._value)

    def _shape(self, node: fx.Node) -> list[Any]:
        """The sizes of a value, as nodes where they are symbolic."""
        return [
            self._call(aten.sym_size.int, (node, i), node, n) if isinstance(n, torch.SymInt) else n
            for i, n in enumerate(node.meta["val"].shape)
        ]

    def _call(self, op: Callable[..., Any], args: Any, like: fx.Node, val: Any, kwargs: Any = None) -> fx.Node:
        out = self.graph.call_function(op, tuple(args), dict(kwargs or {}))
        out.meta = {**like.meta, "val": val}
        return out


_RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten._unsafe_view.default,
)
_UNORDERED = (
    *_RESHAPES,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh.default,
    aten.contiguous.default,
    aten.expand.default,
    aten.slice.Tensor,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten.type_as.default,
    aten.expand_as.default,
)  # views that are identities where they keep the shape


def _val(node: fx.Node) -> Any:
    return node.meta["val"]


def _shape(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _promotes(args: Any) -> bool:
    return len({a.meta["val"].dtype for a in args if isinstance(a, fx.Node) and isinstance(a.meta["val"], Tensor)}) > 1


def _keywords(op: Any) -> set[str]:
    return {a.name for a in op._schema.arguments}


def _same_arguments(packet: Any, op: Any) -> Any:
    """The overload of `packet` that takes what the in-place `op` takes (`bernoulli_.float` → `bernoulli.p`), or all
    but `out`. A factory also takes what its `out` says: a dtype and a device."""
    wanted = [str(a.type) for a in op._schema.arguments if a.name != "out"]
    for name in packet.overloads():
        candidate = getattr(packet, name)
        mine = [a for a in candidate._schema.arguments if a.name not in _FACTORY or a.name in _keywords(op)]
        if [str(a.type) for a in mine] == wanted and not candidate._schema.is_mutable:
            return candidate
    return None


_FACTORY = ("dtype", "layout", "device", "pin_memory")
