"""One forward function, statement by statement: variables get their names here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import fx

from tpcompiler.emit.layers.nesting import nesting, step_reads
from tpcompiler.emit.layers.outline import count
from tpcompiler.emit.layers.roll import AnyStep, Repeat
from tpcompiler.emit.layers.steps import Apply, Op
from tpcompiler.emit.layers.tidy import aten_name
from tpcompiler.emit.names.fields import attribute
from tpcompiler.emit.names.names import POOL, Namer, Value
from tpcompiler.emit.names.scope import Scope, runtime_name
from tpcompiler.emit.ops import remarks
from tpcompiler.emit.text.expr import Expr, constant
from tpcompiler.emit.text.lines import Line

# Their result is another thing than what they are made from, and is not called the same.
_NEW_THING = set(
    """scaled_dot_product_attention cross_entropy_loss cross_entropy embedding lookup matmul bmm einsum
    eq ne lt le gt ge""".split()
)


class Body:
    """Writes one function: `arguments` are the values that come in, with their names, `outputs` those that go out."""

    def __init__(self, scope: Scope, steps: list[AnyStep], arguments: list[Value], outputs: list[Value]) -> None:
        self.scope, self.steps, self.outputs = scope, steps, outputs
        self.namer = Namer(set(scope.file.letters.values()), scope.file.hints)
        if any(isinstance(s, Repeat) for s in steps):
            self.namer.taken.add("i")
        self.names: dict[Value, str] = dict.fromkeys(arguments, "")
        scope.reference = next((v for v in arguments if _is_tensor(v)), None)

    def argument(self, v: Value, name: str) -> None:
        """Names an argument, or something like it if the name is in use."""
        self.names[v] = self.namer.argument(v, name)

    def write(self) -> list[Line]:
        """The statements, without the sizes at the top and the return at the end."""
        self.inlined = nesting(self.steps, self.outputs, self.scope)
        self.scope.say = self._named
        self.last = self._last_uses()
        dies: dict[int, list[Value]] = {}
        for v, i in self.last.items():
            dies.setdefault(i, []).append(v)
        self.namer.release(v for v in self.names if v not in self.last)
        out: list[Line] = []
        for i, step in enumerate(self.steps):
            indent = "    " if self.scope.loop is not None else ""
            out += [replace(x, text=indent + x.text) for x in self._lines(step, dies.get(i, [])) if x.text]
        return out

    def say(self, v: Value) -> str:
        """A value as the return statement says it."""
        return self.scope.value(v).text

    def _named(self, v: Value) -> Expr:
        assert v in self.namer.names, f"{v} has no name in {self.scope.frame.name or 'the model'}"
        return Expr(self.namer.names[v])

    def _last_uses(self) -> dict[Value, int]:
        """For each value, the step that reads it last (the return is one step after all)."""
        root: dict[Value, int] = {}
        last: dict[Value, int] = dict.fromkeys(self.outputs, len(self.steps))
        for i in reversed(range(len(self.steps))):
            step = self.steps[i]
            at = root[step.node] if isinstance(step, Op) and step.node in self.inlined else i
            for v in step_reads(step, self.scope):
                last[v] = max(last.get(v, -1), at)
                if v in self.inlined:
                    root[v] = at
        return last

    def _lines(self, step: AnyStep, dead: list[Value]) -> Iterable[Line]:
        if isinstance(step, Op):
            if step.node in self.inlined:
                self.scope.nested[step.node] = self.scope.spell(step.node)
                return []
            return [self._statement(step, dead)]
        if isinstance(step, Apply):
            return list(self._loop_of_calls(step, dead) if len(step.frames) > 1 else self._call(step, dead))
        return self._begin(step) if isinstance(step, Repeat) else self._end(step.start, dead)

    # --- statements ---------------------------------------------------------------------------------------------------

    def _statement(self, step: Op, dead: list[Value]) -> Line:
        node, file = step.node, self.scope.file
        text = self.scope.spell(node).text
        leaves = [v for v in dict.fromkeys(self._leaves(node)) if v in self.namer.names]
        reuse = self._reused(node, leaves, dead)
        self.namer.release(dead)
        several = count(node)
        if several is None:
            target = self.namer.fresh(node, reuse)
            if node not in self.last:
                self.namer.release([node])
        else:
            names = [self.namer.fresh((node, k)) if (node, k) in self.last else "_" for k in range(several)]
            target = ", ".join(names) + ("," if len(names) == 1 else "")
        if text == target:
            return Line("")
        note = ", ".join(n for m in self._together(node) if (n := remarks.notes(file, m)))
        return Line(f"{target} = {text}", remarks.shape(file, node, leaves[0] if leaves else None), note, step.section)

    def _reused(self, node: fx.Node, leaves: list[Value], dead: list[Value]) -> str | None:
        """`y = f(y)`: the name of the value that a statement replaces, where a person would keep it."""
        if not leaves or leaves[0] not in dead or (aten_name(node) or runtime_name(node)) in _NEW_THING:
            return None
        if not self.scope.frame.name and leaves[0] in self.names:  # the model's own arguments keep their names
            return None
        name = self.namer.names[leaves[0]]
        return name if len(leaves) == 1 or name in POOL else None

    def _together(self, node: fx.Node) -> list[fx.Node]:
        """The calls of a statement, innermost first."""
        inner = [v for v in self.scope.reads(node) if isinstance(v, fx.Node) and v in self.inlined]
        return [m for v in inner for m in self._together(v)] + [node]

    def _leaves(self, node: fx.Node) -> list[Value]:
        """The values that a statement reads, in order, through what is nested in it."""
        out: list[Value] = []
        for v in self.scope.reads(node):
            out.extend(self._leaves(v) if isinstance(v, fx.Node) and v in self.inlined else [v])
        return out

    # --- calls of layers ----------------------------------------------------------------------------------------------

    def _call(self, step: Apply, dead: list[Value]) -> Iterable[Line]:
        """`x = self.layer(x, mask)`"""
        layer, frame, file = step.layer, step.frames[0], self.scope.file
        inputs, outputs = step.inputs(), step.outputs()
        given = [self.scope.value(v).text for v in inputs] + self._sizes(step)
        given += [f"{n.name}={constant(n.values[id(frame)])}" for n in layer.numbers if n.by_call]
        first = next((v for v in inputs if v in dead and v in self.namer.names), None)
        reuse = None if first is None else self.namer.names[first]
        self.namer.release(dead)
        results = dict.fromkeys(outputs, "_")
        for v in sorted((v for v in outputs if v in self.last), key=lambda v: v in file.hints):
            alike = first is not None and remarks.shape_of(file, v) == remarks.shape_of(file, first)
            if v not in file.hints and alike and reuse is not None and self.namer.free(reuse):
                results[v] = self.namer.bind(v, reuse)
            else:
                results[v] = self.namer.fresh(v)
        callee = self.scope.callees.get(id(frame)) or attribute("self", self.scope.relative(frame))
        yield Line(f"{', '.join(results.values())} = {callee}({', '.join(given)})", section=(layer.name, ""))

    def _loop_of_calls(self, step: Apply, dead: list[Value]) -> Iterable[Line]:
        """`for block in self.h:` and a call that takes what the one before gave."""
        inputs, outputs = step.inputs(), step.outputs()
        names = [self.scope.value(v).text for v in inputs]
        results: dict[Value, str] = {}
        for i, o in step.carried.items():
            out = outputs[o]
            if out not in results:
                own = self.namer.names.get(inputs[i])
                if own is not None and inputs[i] in dead and self.namer.live.get(own) == inputs[i]:
                    self.namer.release([inputs[i]])
                    results[out] = self.namer.bind(out, own)
                else:
                    results[out] = self.namer.fresh(out)
                    yield Line(f"{results[out]} = {names[i]}")
            names[i] = results[out]
        for v in outputs:
            if v in self.last and v not in results:
                results[v] = self.namer.fresh(v)
        self.namer.release(dead)
        self.namer.release(v for v in outputs if v not in self.last)
        section = (step.layer.name, "")
        callee, head = self._over(step)
        by_call = [f"{n.name}={n.name}" for n in step.layer.numbers if n.by_call]
        yield Line(f"for {head}:", section=section)
        target = ", ".join(results.get(v, "_") for v in outputs)
        yield Line(f"    {target} = {callee}({', '.join(names + self._sizes(step) + by_call)})", section=section)

    def _over(self, step: Apply) -> tuple[str, str]:
        """What a loop calls, and its head: ("block", "block in self.h")."""
        by_call = [n for n in step.layer.numbers if n.by_call]
        rows = [", ".join(constant(n.values[id(f)]).text for n in by_call) for f in step.frames]
        listed = f"({', '.join(f'({r})' if len(by_call) > 1 else r for r in rows)})"
        names = ", ".join(n.name for n in by_call)
        if step.frames[0].name == step.frames[-1].name:
            callee = attribute("self", self.scope.relative(step.frames[0])).text
            return callee, f"{names} in {listed}" if by_call else f"_ in range({len(step.frames)})"
        callee, over = self._list(step)
        if not by_call:
            return callee, f"{callee} in {over}"
        return callee, f"{callee}, {f'({names})' if len(by_call) > 1 else names} in zip({over}, {listed})"

    def _list(self, step: Apply) -> tuple[str, str]:
        """The loop's variable and the list: ("block", "self.h[1:]")."""
        first, last = step.frames[0], step.frames[-1]
        container, _, start = self.scope.relative(first).rpartition(".")
        stop = int(last.name.rpartition(".")[2]) + 1
        base = attribute("self", container).text if container else "self"
        qualified = first.name.rpartition(".")[0]
        longer = any(int(n.split(".")[0]) >= stop for n, _ in self.scope.file.names.under(qualified))
        word = "".join(f" {c}" if c.isupper() else c for c in step.layer.title).split()[-1].lower()
        word = "".join(c for c in word if c.isalpha())
        variable = next(w for w in (word, "layer", "module", "each", "this") if w and self.namer.free(w))
        if start == "0" and not longer:
            return variable, base
        return variable, f"{base}[{start if start != '0' else ''}:{stop if longer else ''}]"

    def _sizes(self, step: Apply) -> list[str]:
        """The sizes that a layer is given, since none of its inputs tells them."""
        self.scope.needed.update(dict.fromkeys(step.layer.sizes))
        return [self.scope.file.letters[s] for s in step.layer.sizes]

    # --- loops --------------------------------------------------------------------------------------------------------

    def _begin(self, loop: Repeat) -> list[Line]:
        for v, made, _ in loop.carried:
            self.namer.preferred[made] = self.namer.names[v]
        self.scope.loop = loop
        return [Line(f"for i in range({loop.count}):")]

    def _end(self, loop: Repeat, dead: list[Value]) -> list[Line]:
        """What an iteration made goes where the next looks for it, and is there after the last."""
        names = [self.namer.names[v] for v, _, _ in loop.carried]
        made = [self.namer.names[out] for _, out, _ in loop.carried]
        moved = [(n, m) for n, m in zip(names, made, strict=True) if n != m]
        self.namer.release([out for _, out, _ in loop.carried])
        self.namer.release(dead)
        self.namer.release([before for before, _, _ in loop.carried])
        for name, (_, _, final) in zip(names, loop.carried, strict=True):
            self.namer.bind(final, name)
        self.scope.loop = None
        if not moved:
            return []
        return [Line(f"{', '.join(n for n, _ in moved)} = {', '.join(m for _, m in moved)}")]


def _is_tensor(v: Value) -> bool:
    return isinstance(v, tuple) or isinstance(v.meta.get("val"), torch.Tensor)
