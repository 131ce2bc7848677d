"""Which calls are written inside of the statement that uses them: those that the user's own line held together."""

from __future__ import annotations

from typing import Any

from torch import fx

from tpcompiler.emit.layers.outline import count
from tpcompiler.emit.layers.roll import AnyStep, Repeat, RepeatEnd
from tpcompiler.emit.layers.steps import Op
from tpcompiler.emit.layers.tidy import RANDOM, aten_name
from tpcompiler.emit.names.names import Value
from tpcompiler.emit.names.scope import Scope, runtime_name
from tpcompiler.emit.ops.remarks import notes
from tpcompiler.emit.text.expr import Expr

_WIDTH = 100  # a call is not nested where the statement would grow beyond this
_WITH_NOTE = 104  # nor where the statement and its note would


def step_reads(step: AnyStep, scope: Scope) -> list[Value]:
    """The values from before that a step needs."""
    if isinstance(step, Op):
        return scope.reads(step.node)
    if isinstance(step, Repeat):
        return [v for v, _, _ in step.carried]
    if isinstance(step, RepeatEnd):
        return [*step.start.kept, *(made for _, made, _ in step.start.carried)]
    return [v for k in range(len(step.frames)) for v in step.inputs(k)]


def nesting(steps: list[AnyStep], outputs: list[Value], scope: Scope) -> set[fx.Node]:
    """The nodes to nest. A call that draws random numbers or talks to other ranks keeps its place among such calls."""
    users = _users(steps, outputs, scope)
    place = {s.node: i for i, s in enumerate(steps) if isinstance(s, Op)}
    ordered = [i for i, s in enumerate(steps) if not isinstance(s, Op) or _in_order(s.node)]
    texts: dict[Value, Expr] = {}
    said: dict[Value, str] = {}  # the notes on a call and on what is nested in it
    nested: set[fx.Node] = set()

    def fits(inner: fx.Node, outer: fx.Node) -> bool:
        if users.get(inner) != [outer] or inner not in place:
            return False
        if _in_order(inner) and any(place[inner] < j < place[outer] for j in ordered):
            return False
        return _one_line(inner, outer)

    for step in steps:
        if isinstance(step, (Repeat, RepeatEnd)):
            scope.loop = step if isinstance(step, Repeat) else None
        if not isinstance(step, Op):
            continue
        node = step.node
        chosen = [v for v in dict.fromkeys(scope.reads(node)) if isinstance(v, fx.Node) and fits(v, node)]
        while True:
            scope.nested = {v: texts[v] for v in chosen}
            text = scope.spell(node)
            note = ", ".join(n for n in (*(said[v] for v in chosen), notes(scope.file, node)) if n)
            if not chosen or len(text.text) <= (min(_WIDTH, _WITH_NOTE - len(note)) if note else _WIDTH):
                break
            chosen.remove(max(chosen, key=lambda v: len(texts[v].text)))
        texts[node], said[node] = text, note
        nested.update(chosen)
    scope.nested = {}
    return nested


def _users(steps: list[AnyStep], outputs: list[Value], scope: Scope) -> dict[Value, list[Any]]:
    """For each value, who reads it: nodes, and None for anything that is no single call."""
    out: dict[Value, list[Any]] = {}
    for step in steps:
        for v in step_reads(step, scope):
            out.setdefault(v, []).append(step.node if isinstance(step, Op) else None)
    for v in outputs:
        out.setdefault(v, []).append(None)
    return out


def _in_order(node: fx.Node) -> bool:
    return bool(runtime_name(node)) or aten_name(node) in RANDOM or aten_name(node) == "scaled_dot_product_attention"


def _one_line(inner: fx.Node, outer: fx.Node) -> bool:
    """Did one line of the user's hold both? What carries a note stands alone, but for a bias behind a reduction."""
    if count(inner) is not None:
        return False
    if inner.meta.get("note"):
        return runtime_name(inner) == "reduce" and aten_name(outer) == "add" and not outer.meta.get("note")
    line = inner.meta.get("line")
    return line is not None and line[:2] == (outer.meta.get("line") or ())[:2]
