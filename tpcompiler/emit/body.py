"""One forward function: which calls are nested into one statement, what the variables are called, the comments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from tpcompiler.emit import sizes
from tpcompiler.emit.expr import TERNARY, Expr, call, constant, tuple_of
from tpcompiler.emit.fields import Fields, attribute
from tpcompiler.emit.layers import Frame, Names
from tpcompiler.emit.names import POOL, Namer, Value, value
from tpcompiler.emit.operators import spell
from tpcompiler.emit.outline import Layer, count, items
from tpcompiler.emit.roll import AnyStep, Arguments, Repeat, RepeatEnd
from tpcompiler.emit.steps import Apply, Op, Section
from tpcompiler.emit.tidy import aten_name
from tpcompiler.errors import TpcError
from tpcompiler.layout import LocalRuns, LocalSize
from tpcompiler.program import Collective, Training
from tpcompiler.runtime.mesh import Mesh

WIDTH = 100  # a statement is not nested beyond this


@dataclass
class File:
    """What the functions of one emitted file share."""

    mesh: Mesh
    names: Names
    letters: dict[str, str]  # symbol → variable
    hints: dict[Value, str]
    collectives: dict[str, list[Collective]]  # by node
    imports: set[str] = field(default_factory=set)

    def shape(self, node: fx.Node) -> str | None:
        return sizes.shape(node, self.letters, self.mesh.degree)


@dataclass
class Line:
    """A statement, with what goes behind it: a value's shape, and what else there is to say. `section` begins blocks."""

    text: str
    shape: str = ""
    note: str = ""
    section: Section | None = None


def is_runtime(node: fx.Node) -> bool:
    return str(getattr(node.target, "__module__", "")).startswith("tpcompiler.runtime")


def runtime_name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", "") if is_runtime(node) else ""


class Body:
    """Writes one function: `arguments` are the values that come in, `outputs` those that go out."""

    def __init__(
        self,
        file: File,
        fields: Fields,
        frame: Frame,
        steps: list[AnyStep],
        arguments: list[Value],
        outputs: list[Value],
        replaced: Mapping[fx.Node, Arguments],
    ) -> None:
        self.file, self.fields, self.frame, self.steps = file, fields, frame, steps
        self.arguments, self.outputs = arguments, outputs
        self.namer = Namer(set(file.letters.values()), file.hints)
        loops = [s for s in steps if isinstance(s, Repeat)]
        self.replaced = {**replaced, **{n: a for loop in loops for n, a in loop.numbers.items()}}
        self._loop: Repeat | None = None  # the one being written
        self.callees = {k: e for loop in loops for k, e in loop.callees.items()}
        if loops:
            self.namer.taken.add("i")
        self.needed: dict[str, None] = {}  # symbols whose size the function uses
        self.nested: dict[fx.Node, Expr] = {}
        self._say: Callable[[Value], Expr] = self._provisional
        self._references = [v for v in arguments if _is_tensor(v)]
        self.first_names: dict[Value, str] = {}  # the arguments' names
        self.inlined = self._plan()

    # --- how values are said (the Scope of `operators.spell`) ---------------------------------------------------------

    def expr(self, v: Any) -> Expr:
        if isinstance(v, fx.Node):
            if v in self.nested:
                return self.nested[v]
            if sizes.is_size(v):
                return self._size(v)
            return self._say(value(v))
        if isinstance(v, LocalSize):
            return self.fields.size(v.dim)
        if isinstance(v, LocalRuns):
            return self.fields.rows(v.dim)
        if isinstance(v, Training):
            if (v.on, v.off) == (True, False):
                return Expr("self.training")
            return Expr(f"{self.expr(v.on)} if self.training else {self.expr(v.off)}", TERNARY)
        if isinstance(v, slice):
            return call("slice", (self.expr(p).text for p in (v.start, v.stop, v.step)))
        if isinstance(v, list):
            return Expr(f"[{', '.join(self.expr(i).text for i in v)}]")
        if isinstance(v, tuple):
            return Expr(tuple_of(self.expr(i).text for i in v))
        return constant(v)

    def positive(self, v: Any) -> bool:
        """Is the size above zero on every rank?"""
        if isinstance(v, LocalSize):
            return all(leaf.n >= self.file.mesh.degree(leaf.split) for leaf in v.dim.leaves)
        return isinstance(v, int) and v > 0

    def device(self) -> str:
        """A tensor that comes in lies on the right device; without one, a parameter does."""
        if self._references:
            return f"{self._say(self._references[0])}.device"
        return f"next(self.{'parameters' if any(not p.buffer for p in self.file.names.all) else 'buffers'}()).device"

    def parameter(self, v: Value) -> Expr | None:
        """`self.attn.weight`, if the value is a parameter of this module."""
        if isinstance(v, fx.Node) and self._loop is not None and v in self._loop.indexed:
            return self._loop.indexed[v]
        if isinstance(v, fx.Node) and (name := self.file.names.inside(v, self.frame.name)) is not None:
            return attribute("self", name)
        return None

    def _provisional(self, v: Value) -> Expr:
        return self.parameter(v) or Expr(self.file.hints.get(v, "y"))

    def _named(self, v: Value) -> Expr:
        own = self.parameter(v)
        if own is not None and v not in self.namer.names:
            return own
        assert v in self.namer.names, f"{v} has no name in {self.frame.name or 'the model'}"
        return Expr(self.namer.names[v])

    def _size(self, node: fx.Node) -> Expr:
        val = node.meta["val"]
        if not isinstance(val, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return constant(val)
        if aten_name(node) == "sym_size":
            symbol = sizes.key(val)
            if symbol not in self.file.letters:
                raise TpcError(f"{node.name}: no input has the size {symbol}")
            self.needed[symbol] = None
            return Expr(self.file.letters[symbol])
        return spell(node, node.args, dict(node.kwargs), self)

    # --- what is nested -----------------------------------------------------------------------------------------------

    def _plan(self) -> set[fx.Node]:
        """The nodes that are written inside the statement that uses them, as the user's own line did."""
        users = self._users()
        place = {s.node: i for i, s in enumerate(self.steps) if isinstance(s, Op)}
        impure = [i for i, s in enumerate(self.steps) if not isinstance(s, Op) or is_impure(s.node)]
        texts: dict[fx.Node, Expr] = {}
        inlined: set[fx.Node] = set()

        def fits(v: Value, node: fx.Node) -> bool:
            if not isinstance(v, fx.Node) or v not in place or users[v] != [node] or not may_nest(v, node):
                return False
            return not is_impure(v) or not any(place[v] < j < place[node] for j in impure)

        for node in place:
            chosen = [v for v in dict.fromkeys(self._reads(node)) if fits(v, node)]
            while True:
                self.nested = {v: texts[v] for v in chosen}  # type: ignore[index, misc]
                text = self._spell(node)
                if not chosen or len(text.text) <= WIDTH:
                    break
                chosen.remove(max(chosen, key=lambda v: len(texts[v].text)))  # type: ignore[index]
            texts[node] = text
            inlined.update(chosen)  # type: ignore[arg-type]
        self.nested = {}
        return inlined

    def _users(self) -> dict[Value, list[Any]]:
        """For each value, who reads it: nodes, and None for a call of a layer or the function's return."""
        out: dict[Value, list[Any]] = {}
        for step in self.steps:
            for v in self._step_reads(step):
                out.setdefault(v, []).append(step.node if isinstance(step, Op) else None)
        for v in self.outputs:
            out.setdefault(v, []).append(None)
        return out

    def _step_reads(self, step: AnyStep) -> list[Value]:
        if isinstance(step, Op):
            return self._reads(step.node)
        if isinstance(step, Repeat):
            return [v for v, _, _ in step.carried]
        if isinstance(step, RepeatEnd):
            return [*step.start.kept, *(out for _, out, _ in step.start.carried)]
        return [v for k in range(len(step.frames)) for v in step.inputs(k)]

    def _reads(self, node: fx.Node) -> list[Value]:
        """The tensors that a node reads, in order."""
        args, kwargs = self.replaced.get(node, (node.args, node.kwargs))
        out: list[Value] = []
        fx.map_arg((args, kwargs), lambda n: out.append(value(n)) if not sizes.is_size(n) else None)
        return out

    def _spell(self, node: fx.Node) -> Expr:
        args, kwargs = self.replaced.get(node, (node.args, node.kwargs))
        if is_runtime(node):
            return self._operator(node, args, dict(kwargs))
        return spell(node, args, dict(kwargs), self)

    def _operator(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Expr:
        """`reduce(y, self.tensor)`: a call of the run-time library."""
        signature = inspect.signature(node.target).parameters  # type: ignore[arg-type]
        given = dict(zip(signature, args, strict=False)) | kwargs
        out, gap = [], False
        for name, parameter in signature.items():
            if name == "rng":
                text = self.fields.rng()
            elif name not in given or (given[name] is parameter.default and name != "group"):
                gap = True
                continue
            elif name == "group":
                text = self.fields.group(tuple(given[name]))
            elif isinstance(given[name], LocalRuns) and runtime_name(node) == "gather":
                text = self.fields.all_rows(given[name].dim, tuple(given["group"])).text
            else:
                text = self._argument(given[name])
            gap = gap or name == "dim" or parameter.default is not parameter.empty and name not in ("rows", "group")
            out.append(f"{name}={text}" if gap else text)
        self.file.imports.add(runtime_name(node))
        return call(runtime_name(node), out)

    def _argument(self, v: Any) -> str:
        if isinstance(v, tuple) and v and _all_ints(v) and len(repr(v)) > 40:
            return self.fields.table(v).text
        return self.expr(v).text

    # --- writing ------------------------------------------------------------------------------------------------------

    def write(self) -> list[Line]:
        """The statements, without the sizes at the top and the return at the end."""
        self._say = self._named
        last = self._last_uses()
        dies: dict[int, list[Value]] = {}
        for v, i in last.items():
            dies.setdefault(i, []).append(v)
        out: list[Line] = []
        for v in self.arguments:
            if v not in last:
                self.namer.release([v])
        for i, step in enumerate(self.steps):
            dead = dies.get(i, [])
            if isinstance(step, Op) and step.node in self.inlined:
                self.nested[step.node] = self._spell(step.node)
            elif isinstance(step, Repeat):
                self._loop = step
                for v, made, _ in step.carried:
                    self.namer.preferred[made] = self.namer.names[v]
                out.append(Line(f"for i in range({step.count}):"))
            else:
                lines = self._lines(step, dead, last)
                out += lines if self._loop is None else [replace(x, text="    " + x.text) for x in lines if x.text]
            if isinstance(step, RepeatEnd):
                self._loop = None
        return out

    def _lines(self, step: Op | Apply | RepeatEnd, dead: list[Value], last: Mapping[Value, int]) -> list[Line]:
        if isinstance(step, Op):
            return [self._statement(step, dead, last)]
        if isinstance(step, Apply):
            return list(self._application(step, dead, last))
        return self._end(step.start, dead)

    def _end(self, loop: Repeat, dead: list[Value]) -> list[Line]:
        """What an iteration made goes where the next looks for it, and is there after the last."""
        names = [self.namer.names[v] for v, _, _ in loop.carried]
        moved = [(n, self.namer.names[out]) for n, (_, out, _) in zip(names, loop.carried, strict=True)]
        moved = [(n, m) for n, m in moved if n != m]
        self.namer.release([v for _, out, _ in loop.carried for v in (out,)])
        self.namer.release(dead)
        for n, (before, _, final) in zip(names, loop.carried, strict=True):
            self.namer.release([before])
            self.namer.bind(final, n)
        if not moved:
            return []
        return [Line(f"{', '.join(n for n, _ in moved)} = {', '.join(m for _, m in moved)}")]

    def _last_uses(self) -> dict[Value, int]:
        """For each value, the step that reads it last (the return is one step after all)."""
        root: dict[fx.Node, int] = {}
        last: dict[Value, int] = dict.fromkeys(self.outputs, len(self.steps))
        for i in reversed(range(len(self.steps))):
            step = self.steps[i]
            at = i
            if isinstance(step, Op):
                at = root[step.node] if step.node in self.inlined else i
            for v in self._step_reads(step):
                last[v] = max(last.get(v, -1), at)
                if v in self.inlined:
                    root[v] = at  # type: ignore[index]
        return last

    def _statement(self, step: Op, dead: list[Value], last: Mapping[Value, int]) -> Line:
        node = step.node
        text = self._spell(node).text
        leaves = [v for v in dict.fromkeys(self._leaves(node)) if v in self.namer.names]
        first = leaves[0] if leaves else None
        reuse = self._reused(node, leaves, dead)
        self.namer.release(dead)
        several = self._items(node)
        if several is None:
            target = self.namer.fresh(node, reuse)
            if node not in last:
                self.namer.release([node])
        else:
            names = [self.namer.fresh(v) if v in last else "_" for v in several]
            target = ", ".join(names) + ("," if len(names) == 1 else "")
        if text == target:
            return Line("")
        return Line(f"{target} = {text}", self._shape(node, first), self._notes(node), step.section)

    def _reused(self, node: fx.Node, leaves: list[Value], dead: list[Value]) -> str | None:
        """`y = f(y)`: the name of the value that a statement replaces, where a person would keep it."""
        if not leaves or leaves[0] not in dead or (aten_name(node) or runtime_name(node)) in _NEW_THING:
            return None
        name = self.namer.names[leaves[0]]
        if not self.frame.name and leaves[0] in self.arguments:  # the model's own arguments keep their names
            return None
        return name if len(leaves) == 1 or name in POOL else None

    def _items(self, node: fx.Node) -> list[Value] | None:
        """A call's several results, if it has several."""
        several = count(node)
        return None if several is None else [(node, k) for k in range(several)]

    def _leaves(self, node: fx.Node) -> list[Value]:
        """The named values that a statement reads, in order, through what is nested in it."""
        out: list[Value] = []
        for v in self._reads(node):
            out.extend(self._leaves(v) if isinstance(v, fx.Node) and v in self.inlined else [v])
        return out

    def _application(self, step: Apply, dead: list[Value], last: Mapping[Value, int]) -> Iterable[Line]:
        layer, many = step.layer, len(step.frames) > 1
        inputs, outputs = step.inputs(), step.outputs()
        names = [self._named(v).text for v in inputs]
        results: dict[Value, str] = {}
        if many:
            for i, o in step.carried.items():
                old = inputs[i]
                if outputs[o] in results:
                    names[i] = results[outputs[o]]
                    continue
                own = self.namer.names.get(old)
                if own is not None and old in dead and self.namer.live.get(own) == old:
                    self.namer.release([old])
                    self.namer.bind(outputs[o], own)
                else:
                    own = self.namer.fresh(outputs[o])
                    yield Line(f"{own} = {names[i]}")
                names[i] = results[outputs[o]] = own
        else:
            first = next((v for v in inputs if v in dead and v in self.namer.names), None)
            reuse = self.namer.names[first] if first is not None else None
            self.namer.release(dead)
            for v in outputs:
                if v in last and v not in self.file.hints and reuse is not None and self._alike(v, first):
                    if self.namer.free(reuse):
                        results[v] = self.namer.bind(v, reuse)
        for v in outputs:
            if v in last and v not in results:
                results[v] = self.namer.fresh(v)
        self.namer.release(dead)
        self.namer.release(v for v in outputs if v not in last)
        yield from self._calls(step, names, ", ".join(results.get(v, "_") for v in outputs))

    def _alike(self, v: Value, other: Value | None) -> bool:
        """Have two values one shape?"""
        return other is not None and self._shape_of(v) == self._shape_of(other)

    def _shape_of(self, v: Value) -> str | None:
        return self.file.shape(v) if isinstance(v, fx.Node) else self._item_shape(v)

    def _calls(self, step: Apply, names: list[str], target: str) -> Iterable[Line]:
        layer = step.layer
        for symbol in layer.sizes:
            self.needed[symbol] = None
        names = names + [self.file.letters[s] for s in layer.sizes]
        section = (layer.name, "")
        by_call = [n for n in layer.numbers if n.by_call]
        if len(step.frames) == 1:
            frame = step.frames[0]
            numbers = [f"{n.name}={constant(n.values[id(frame)])}" for n in by_call]
            callee = self.callees.get(id(frame)) or attribute("self", self._relative(frame))
            yield Line(f"{target} = {callee}({', '.join(names + numbers)})", section=section)
            return
        variable, over = self._over(step)
        if by_call:
            rows = [", ".join(constant(n.values[id(f)]).text for n in by_call) for f in step.frames]
            listed = ", ".join(f"({r})" if len(by_call) > 1 else r for r in rows)
            loop = ", ".join(n.name for n in by_call)
            same = len({f.name for f in step.frames}) == 1
            if same:
                yield Line(f"for {loop} in ({listed}):", section=section)
                variable = over
            else:
                loop = f"({loop})" if len(by_call) > 1 else loop
                yield Line(f"for {variable}, {loop} in zip({over}, ({listed})):", section=section)
            names = names + [f"{n.name}={n.name}" for n in by_call]
        elif len({f.name for f in step.frames}) == 1:
            yield Line(f"for _ in range({len(step.frames)}):", section=section)
            variable = over
        else:
            yield Line(f"for {variable} in {over}:", section=section)
        yield Line(f"    {target} = {variable}({', '.join(names)})", section=section)

    def _over(self, step: Apply) -> tuple[str, str]:
        """The loop's variable, and what it runs over."""
        first, last = step.frames[0], step.frames[-1]
        if first.name == last.name:
            return "", attribute("self", self._relative(first)).text
        container, _, start = self._relative(first).rpartition(".")
        stop = int(last.name.rpartition(".")[2]) + 1
        base = attribute("self", container).text if container else "self"
        qualified = first.name.rpartition(".")[0]
        members = {n.split(".")[0] for n, _ in self.file.names.under(qualified)}
        whole = int(start) == 0 and all(int(m) < stop for m in members if m.isdigit())
        everything = f"{base}[{start if int(start) else ''}:{'' if all(int(m) < stop for m in members) else stop}]"
        word = "".join(f" {c}" if c.isupper() else c for c in step.layer.title).split()[-1].lower()
        word = "".join(c for c in word if c.isalpha()) or "layer"
        variable = next(w for w in (word, "layer", "module", "each", "layer_") if self.namer.free(w))
        return variable, base if whole else everything

    def _relative(self, frame: Frame) -> str:
        return frame.name[len(self.frame.name) + 1 :] if self.frame.name else frame.name

    def say_output(self, v: Any) -> str:
        """An output as the return statement says it."""
        return self.expr(v).text if not isinstance(v, tuple) else self._say(v).text

    # --- comments -----------------------------------------------------------------------------------------------------

    def _shape(self, node: fx.Node, first: Value | None) -> str:
        """The statement's shape, if it is not that of the value it begins with."""
        several = self._items(node)
        shape = self.file.shape(node) if several is None else self._shapes(node)
        before = self._shape_of(first) if first is not None else None
        return shape if shape is not None and shape not in (before, "[]") else ""

    def _notes(self, node: fx.Node) -> str:
        return ", ".join(note for n in self._together(node) if (note := self._note(n)))

    def _together(self, node: fx.Node) -> list[fx.Node]:
        inner = [v for v in self._reads(node) if isinstance(v, fx.Node) and v in self.inlined]
        return [m for v in inner for m in self._together(v)] + [node]

    def _note(self, node: fx.Node) -> str:
        found = self.file.collectives.get(node.name)
        if not found:
            return str(node.meta.get("note") or "")
        said = []
        for c in found:
            text = c.kind.replace("_", "-") + (f" {megabytes(c.bytes)}" if c.bytes else "")
            said.append(f"backward: {text}" if c.direction == "backward" else text)
        return ", ".join(said)

    def _shapes(self, node: fx.Node) -> str | None:
        picked = [s for s in (self.file.shape(u) for _, u in sorted(items(node).items())) if s is not None]
        if not picked:
            return None
        return picked[0] + (" each" if len(picked) > 1 else "") if len(set(picked)) == 1 else ", ".join(picked)

    def _item_shape(self, v: tuple[fx.Node, int]) -> str | None:
        picked = items(v[0]).get(v[1])
        return self.file.shape(picked) if picked is not None else None


def megabytes(n: int) -> str:
    """A number of bytes for a reader: 48.0 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n} B" if unit == "B" else f"{n:.1f} {unit}"
        n = n / 1024  # type: ignore[assignment]
    raise AssertionError


_NEW_THING = {"scaled_dot_product_attention", "cross_entropy_loss", "cross_entropy", "embedding", "lookup", "matmul", "bmm", "einsum", "eq", "ne", "lt", "le", "gt", "ge"}
_RANDOM = {"dropout", "native_dropout", "bernoulli", "rand", "randn", "rand_like", "randn_like", "randint", "multinomial"}


def is_impure(node: fx.Node) -> bool:
    """Does it draw random numbers or talk to other ranks, so that its place among such calls matters?"""
    return is_runtime(node) or aten_name(node) in _RANDOM or aten_name(node) == "scaled_dot_product_attention"


def may_nest(inner: fx.Node, outer: fx.Node) -> bool:
    """Did the user's own line hold both? What carries a note stands alone, but for a sum behind a reduction."""
    if count(inner) is not None:
        return False
    if inner.meta.get("note"):
        return runtime_name(inner) == "reduce" and aten_name(outer) == "add" and not outer.meta.get("note")
    line = inner.meta.get("line")
    return line is not None and line[:2] == (outer.meta.get("line") or ())[:2]


def _all_ints(v: Any) -> bool:
    return isinstance(v, int) or isinstance(v, tuple) and all(map(_all_ints, v))


def _is_tensor(v: Value) -> bool:
    return isinstance(v, tuple) or isinstance(v.meta.get("val"), torch.Tensor)

