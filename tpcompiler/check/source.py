"""The emitted source, read again: it must do what the checked graph does.

The module is run on each of a few ranks, in evaluation and in training, on tensors without values. Every call it makes
is compared with the graph's, whose arguments are this rank's: what it sends to other ranks must be the same calls on
the same values, as often; what lies between may be written differently (`x.split` for `split_with_sizes`), and is then
run both ways, forward and through its gradient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily
from torch.utils import _pytree as pytree

from tpcompiler.check.calls import (
    Call,
    Draws,
    Over,
    Slot,
    dims_of,
    make_call,
    outputs,
    read_call,
    run,
    runtime_signature,
)
from tpcompiler.check.claims import Geometry
from tpcompiler.check.cones import Operand
from tpcompiler.check.equal import Equal, counts
from tpcompiler.check.forward import Refused, line_of, live_nodes
from tpcompiler.check.report import Refusal
from tpcompiler.check.sizes import Sizes
from tpcompiler.check.steps import Steps
from tpcompiler.check.values import INPUT, PARAMETER, Value, Values
from tpcompiler.layout import LocalRuns, LocalSize
from tpcompiler.program import InputLeaf, Program, Training
from tpcompiler.runtime import Group, Ranks, Rng, dropout, gather

_FULL = 4  # ranks of a mesh that are all looked at


def compare_source(program: Program, text: str, geometry: Geometry, sizes: Sizes) -> None:
    """Raises `Refused` for the first thing that the source does otherwise than the graph."""
    names: dict[str, Any] = {"__name__": "emitted"}
    try:
        exec(compile(text, "<emitted>", "exec"), names)
    except Exception as e:
        raise Refused(Refusal("the source", "", "a module", f"{type(e).__name__}: {e}")) from None
    ranks = range(geometry.size) if geometry.size <= _FULL else (0, geometry.size - 1)
    steps = Steps(geometry)
    known: dict[Any, bool] = {}
    for rank in ranks:
        for training in (False, True) if rank == 0 else (False,):
            _Reading(
                program, names, geometry, sizes, rank, training, Equal(steps, Values(), sizes.numbers.values(), known)
            ).compare()
    for rank in range(geometry.size):
        _shapes(program, names, geometry, rank)


class Silent(Group):
    """A group whose other ranks are not there: results have the right shapes, and no meaning."""

    def all_gather(self, x: Tensor, dim: int, sizes: Sequence[int] | None = None, direction: str = "") -> Tensor:
        shape = list(x.shape)
        shape[dim] = x.shape[dim] * self.size if sizes is None else sum(sizes)
        return x.new_zeros(shape)

    def reduce_scatter(self, x: Tensor, dim: int, sizes: Sequence[int] | None = None, direction: str = "") -> Tensor:
        return x.narrow(dim, 0, x.shape[dim] // self.size if sizes is None else sizes[self.index])


def _alone(geometry: Geometry, rank: int) -> Ranks:
    mesh = geometry.mesh

    def connect(over: tuple[str, ...]) -> Group:
        return Silent(mesh.degree(over), mesh.index(over, geometry.coords[rank]), over)

    return Ranks(mesh, rank, connect)


def _shapes(program: Program, names: dict[str, Any], geometry: Geometry, rank: int) -> None:
    """A rank's parameters have the shapes of its slices."""
    with torch.device("meta"):
        model = names["Model"](_alone(geometry, rank))
    found = dict(model.named_parameters(remove_duplicate=False))
    for p in program.capture.parameters:
        if p.buffer or p.name not in program.dims:
            continue
        mine = next((found[n] for n in p.names if n in found), None)
        expected = tuple(d.local_size(geometry.mesh, geometry.coords[rank]) for d in program.dims[p.name])
        if mine is None or tuple(mine.shape) != expected:
            shown = "no such parameter" if mine is None else f"{tuple(mine.shape)}"
            raise Refused(Refusal(p.name, "", f"the source gives rank {rank} the shape {expected}", shown))


class _Reading:
    """One rank's graph as values, and the source run against them."""

    def __init__(
        self,
        program: Program,
        names: dict[str, Any],
        geometry: Geometry,
        sizes: Sizes,
        rank: int,
        training: bool,
        equal: Equal,
    ) -> None:
        self.program = program
        self.names = names
        self.geometry = geometry
        self.sizes = sizes
        self.rank = rank
        self.training = training
        self.equal = equal
        self.ranks = _alone(geometry, rank)
        self.values = equal.values
        self.outlines: dict[Any, Any] = {}
        self.parameters: dict[str, Value] = {}
        self.inputs: dict[str, Value] = {}
        self.sent: Counter[Value] = Counter()
        self.outputs = self.read_graph()

    # -- the graph --------------------------------------------------------------------------------------------------

    def read_graph(self) -> list[Any]:
        env: dict[fx.Node, Any] = {}
        stored = {p.node: p for p in self.program.capture.parameters}
        for node in live_nodes(self.program.graph):
            if node.op == "output":
                return [env[a] if isinstance(a, fx.Node) else a for a in node.args[0]]  # type: ignore[union-attr]
            if node.op == "placeholder":
                env[node] = self.placeholder(node, stored.get(node.name))
            else:
                env[node] = self.node(node, env)
        raise AssertionError("a graph without an output")

    def placeholder(self, node: fx.Node, parameter: Any) -> Value:
        val = node.meta["val"]
        shape = self.sizes.shape(val.shape)
        if parameter is not None and parameter.name in self.program.dims:
            dims = self.program.dims[parameter.name]
            shape = tuple(d.local_size(self.geometry.mesh, self.geometry.coords[self.rank]) for d in dims)
        grad = parameter is not None and not parameter.buffer and parameter.trainable and val.is_floating_point()
        value = self.values.add(
            node.name, INPUT if parameter is None else PARAMETER, Operand(shape, val.dtype, grad), None, ()
        )
        value.original = True
        if parameter is None:
            self.inputs[node.name] = value
        else:
            self.parameters.update(dict.fromkeys(parameter.names, value))
        return value

    def node(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        call, given = read_call(node, env)
        operands = tuple(env[n] for n in given)
        if node.target is torch.ops.aten.sym_size.int:
            return operands[0].out.shape[call.args[1]]
        if not given and not isinstance(node.target, torch._ops.OpOverload):
            return call.target(*call.args)
        call = self.local(call)
        value = self.make(call, operands)
        if not _sends(call) and (unchanged := self.unchanged(value)) is not None:
            return unchanged
        value.original = True
        value.name = node.name
        if _sends(call):
            value.opaque = True
            self.sent[value] += 1
        return value

    def unchanged(self, value: Value) -> Value | None:
        """The operand that integers are (rows written over with themselves), so that each value is there once."""
        if value.out is None or not counts(value):
            return None
        alike = [o for o in value.operands if o.out == value.out]
        return next((o for o in alike if self.equal.same(value, o, value.operands)), None)

    def local(self, call: Call) -> Call:
        """A program's call with this rank's numbers in it."""
        mesh, coords = self.geometry.mesh, self.geometry.coords

        def fill(a: Any) -> Any:
            if isinstance(a, LocalSize):
                return a.resolve(mesh, coords[self.rank])
            if isinstance(a, LocalRuns):
                if call.target is gather:
                    assert call.over is not None
                    group = next(g for g in self.geometry.groups(call.over) if self.rank in g)
                    return tuple(a.resolve(mesh, coords[r]) for r in group)
                return a.resolve(mesh, coords[self.rank])
            if isinstance(a, Training):
                return fill(a.on if self.training else a.off)
            return tuple(map(fill, a)) if isinstance(a, tuple) else a

        made = make_call(call.target, fill(call.args), tuple((k, fill(v)) for k, v in call.kwargs))
        assert not dims_of(made)
        return _complete(made)

    def make(self, call: Call, operands: tuple[Value, ...]) -> Value:
        """The value of a call, its shape worked out."""
        out, many = self.outline(call, operands)
        value = self.values.find(call, operands, None if many else out[0])
        if many:
            for i, o in enumerate(out):
                item = self.values.item(value, i, o)
                item.original = item.original or value.original
        return value

    def outline(self, call: Call, operands: tuple[Value, ...]) -> tuple[list[Operand], bool]:
        if call.target is dropout:  # every site is another call; what comes out is like what goes in
            x = dict(call.kwargs)["x"]
            out = operands[x.i].out
            assert isinstance(x, Slot) and out is not None
            return [out], False
        outs = tuple(o.out for o in operands)
        key = (call.key, outs)
        if key not in self.outlines:
            small = sum(torch.Size(o.shape).numel() for o in outs if o is not None) < 1 << 18
            device = "cpu" if small else "meta"
            made = [
                torch.zeros(o.shape, dtype=o.dtype, device=device, requires_grad=o.grad)
                if o is not None
                else self.listed(v, device)
                for o, v in zip(outs, operands, strict=True)
            ]
            result = run(call, made, self.group, False, wide=False, device=device)
            found = [Operand(tuple(t.shape), t.dtype, t.requires_grad) for t in outputs(result)]
            self.outlines[key] = found, not isinstance(result, Tensor)
        return self.outlines[key]

    def listed(self, value: Value, device: str) -> list[Tensor]:
        """A list of tensors of the right shapes."""
        items = [u for u in value.users if getattr(u.call, "target", None) is _ITEM]
        items.sort(key=lambda u: u.call.args[1])  # type: ignore[union-attr]
        return [torch.zeros(u.out.shape, dtype=u.out.dtype, device=device) for u in items if u.out is not None]

    def group(self, a: Any) -> Any:
        assert isinstance(a, Over)
        return self.ranks.group(a.names)

    # -- the source ---------------------------------------------------------------------------------------------------

    def compare(self) -> None:
        with torch.device("meta"):
            model: nn.Module = self.names["Model"](self.ranks).train(self.training)
        recorder = _Recorder(self, model)
        args, kwargs = self.arguments(recorder)
        hidden = {k: v for k, v in self.names.items() if callable(v) and runtime_signature(v) is not None}
        try:
            self.names.update({k: recorder.operator(v) for k, v in hidden.items()})
            with recorder:
                result = model(*args, **kwargs)
        except Refused:
            raise
        except Exception as e:
            raise Refused(Refusal("the source", "", "a forward that runs", f"{type(e).__name__}: {e}")) from None
        finally:
            self.names.update(hidden)
        self.finish(
            [recorder.known(t) if isinstance(t, Tensor) else t for t in pytree.tree_leaves(result)], recorder.sent
        )

    def arguments(self, recorder: _Recorder) -> tuple[Any, Any]:
        leaves = []
        for leaf in self.program.capture.input_leaves:
            if isinstance(leaf, InputLeaf):
                value = self.inputs.get(leaf.node)
                node = next(n for n in self.program.graph.nodes if n.name == leaf.node)
                out = Operand(self.sizes.shape(node.meta["val"].shape), node.meta["val"].dtype, False)
                t = torch.empty(out.shape, dtype=out.dtype, device="meta")
                recorder.learn(t, value or self.values.add(leaf.node, INPUT, out, None, ()))
                leaves.append(t)
            else:
                leaves.append(leaf)
        return pytree.tree_unflatten(leaves, self.program.capture.in_spec)

    def finish(self, got: list[Any], sent: Counter[Value]) -> None:
        where = f"rank {self.rank}, {'training' if self.training else 'evaluation'}"
        if len(got) != len(self.outputs):
            raise Refused(Refusal("the source", "", f"{len(self.outputs)} outputs", f"{len(got)}", where))
        for i, (a, b) in enumerate(zip(got, self.outputs, strict=True)):
            same = a is b or (isinstance(a, Value) and isinstance(b, Value) and self.equal.same(a, b))
            if not same and not (not isinstance(a, Value) and a == b):
                raise Refused(Refusal("the source", "", f"output {i} is {b} of the graph", f"it is {a}", where))
        if sent != self.sent:
            odd = next(iter((self.sent - sent) + (sent - self.sent)))
            true = f"{sent[odd]} times"
            raise Refused(Refusal(odd.name, "", f"the source communicates it {self.sent[odd]} times", true, where))


class _Recorder(TorchFunctionMode):
    """Watches the source's calls, and gives each result its value."""

    def __init__(self, reading: _Reading, model: nn.Module) -> None:
        super().__init__()
        self.reading = reading
        self.seen: dict[int, tuple[Any, Value]] = {}
        self.sent: Counter[Value] = Counter()
        for name, t in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
            if name in reading.parameters:
                self.learn(t, reading.parameters[name])

    def learn(self, t: Any, value: Value) -> None:
        self.seen[id(t)] = t, value

    def known(self, t: Any) -> Value | None:
        return self.seen[id(t)][1] if id(t) in self.seen else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__" or func in _ASKING:
            asked = func(*args, **kwargs)
            if not isinstance(asked, Tensor):  # x.shape, but not x.T
                return asked
        return self.record(func, tuple(args), tuple(sorted(kwargs.items())))

    def operator(self, target: Callable[..., Any]) -> Callable[..., Any]:
        """An operator of the runtime, recorded as one call."""
        signature = runtime_signature(target)
        assert signature is not None

        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            with _pop_mode_temporarily():
                return self.record(target, (), tuple(sorted(bound.arguments.items())))

        return call

    def record(self, target: Any, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> Any:
        operands: dict[Value, Slot] = {}

        def read(a: Any) -> Any:
            if isinstance(a, Tensor) or (isinstance(a, (list, tuple)) and id(a) in self.seen):
                value = self.known(a)
                if value is None:
                    raise Refused(
                        Refusal(
                            "the source",
                            "",
                            f"{target} of known values",
                            f"a tensor of shape {tuple(getattr(a, 'shape', ()))} from nowhere",
                        )
                    )
                return operands.setdefault(value, Slot(len(operands)))
            if isinstance(a, Group):
                return Over(a.over)
            if isinstance(a, Rng):
                return Draws
            if isinstance(a, slice):
                return slice(read(a.start), read(a.stop), read(a.step))
            return tuple(map(read, a)) if isinstance(a, (tuple, list)) else a

        pairs = tuple((k, read(v)) for k, v in kwargs if k != "device")
        call = _complete(make_call(target, tuple(map(read, args)), pairs))
        return self.result(call, tuple(operands))

    def result(self, call: Call, operands: tuple[Value, ...]) -> Any:
        reading = self.reading
        outs, many = reading.outline(call, operands)
        value = reading.make(call, operands)
        if _sends(call):
            value = value if value.original else self.communication(call, operands) or value
            if not value.original:
                what = ", ".join(o.name for o in operands)
                raise Refused(
                    Refusal(
                        f"the source's {call}", "", "a communication of the graph", f"the graph has no {call} of {what}"
                    )
                )
            self.sent[value] += 1
        value = self.original(value)
        made = [torch.empty(o.shape, dtype=o.dtype, device="meta") for o in outs]
        if not many:
            self.learn(made[0], value)
            return made[0]
        for i, t in enumerate(made):
            self.learn(t, self.original(reading.values.item(value, i, outs[i])))
        return tuple(made)

    def communication(self, call: Call, operands: tuple[Value, ...]) -> Value | None:
        """The graph's communication of the same values, however written: without a view that changes nothing."""
        for value in self.reading.sent:
            if value.call is not None and value.call.key == call.key and len(value.operands) == len(operands):
                same = self.reading.equal.same
                if all(a is b or same(b, a) or same(a, b) for a, b in zip(operands, value.operands, strict=True)):
                    return value
        return None

    def original(self, value: Value) -> Value:
        if value.original:
            return value
        return self.reading.equal.original(value) or value


_ITEM = __import__("operator").getitem
_ASKING = {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__, Tensor.ndimension}


def _sends(call: Call) -> bool:
    return call.over is not None and len(call.over) > 0


def _complete(call: Call) -> Call:
    """A call of the runtime with its defaults written out."""
    signature = runtime_signature(call.target)
    if signature is None:
        return call
    given = dict(call.kwargs)
    for name, parameter in signature.parameters.items():
        if name not in given and parameter.default is not parameter.empty:
            given[name] = parameter.default
    return make_call(call.target, (), tuple(sorted(given.items())))


__all__ = ["compare_source", "line_of"]
