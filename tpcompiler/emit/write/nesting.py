"""Decides which calls are written inside the call that uses them: those that share a line of the user's source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from tpcompiler.emit.layers.loop_proof import Loop, LoopEnd
from tpcompiler.emit.layers.loops import BodyPart
from tpcompiler.emit.layers.statements import Operation
from tpcompiler.emit.ops.nodes import RANDOM, NodeResult, aten_name, count, line_of, runtime_name
from tpcompiler.emit.text.expr import Expr
from tpcompiler.emit.write.remarks import notes
from tpcompiler.emit.write.scope import Scope
from tpcompiler.graphs import note_of

_WIDTH = 100  # the longest statement that nesting may make
_WITH_NOTE = 104  # the longest statement with its note


def reads(part: BodyPart, scope: Scope) -> list[NodeResult]:
    """The values that a part of a body needs from before it."""
    if isinstance(part, Operation):
        return scope.reads(part.node)
    if isinstance(part, Loop):
        return [v for v, _, _ in part.carried]
    if isinstance(part, LoopEnd):
        return [*part.loop.kept, *(made for _, made, _ in part.loop.carried)]
    return [v for frame in part.frames for v in part.layer.inputs[frame]]


def nested_calls(parts: Sequence[BodyPart], outputs: list[NodeResult], scope: Scope) -> set[fx.Node]:
    """The nodes to be nested.

    Calls that draw random numbers or communicate keep their order among each other.
    """
    users = _users(parts, outputs, scope)
    position = {p.node: i for i, p in enumerate(parts) if isinstance(p, Operation)}
    ordered = [i for i, p in enumerate(parts) if not isinstance(p, Operation) or _in_order(p.node)]
    texts: dict[NodeResult, Expr] = {}
    said: dict[NodeResult, str] = {}  # the notes on a call and on the calls nested in it
    nested: set[fx.Node] = set()

    def fits(inner: fx.Node, outer: fx.Node) -> bool:
        if users.get(inner) != [outer] or inner not in position:
            return False
        if _in_order(inner) and any(position[inner] < j < position[outer] for j in ordered):
            return False
        return _one_line(inner, outer)

    for part in parts:
        if isinstance(part, (Loop, LoopEnd)):
            scope = scope.inside(part if isinstance(part, Loop) else None)
        if not isinstance(part, Operation):
            continue
        node = part.node
        chosen = [v for v in dict.fromkeys(scope.reads(node)) if isinstance(v, fx.Node) and fits(v, node)]
        while True:
            text = scope.nesting({v: texts[v] for v in chosen}).spell(node)
            note = ", ".join(n for n in (*(said[v] for v in chosen), notes(scope.file, node)) if n)
            if not chosen or len(text.text) <= (min(_WIDTH, _WITH_NOTE - len(note)) if note else _WIDTH):
                break
            chosen.remove(max(chosen, key=lambda v: len(texts[v].text)))
        texts[node], said[node] = text, note
        nested.update(chosen)
    return nested


def _users(parts: Sequence[BodyPart], outputs: list[NodeResult], scope: Scope) -> dict[NodeResult, list[Any]]:
    """Who reads each value: nodes, and None for a reader that is not a single call."""
    out: dict[NodeResult, list[Any]] = {}
    for part in parts:
        for v in reads(part, scope):
            out.setdefault(v, []).append(part.node if isinstance(part, Operation) else None)
    for v in outputs:
        out.setdefault(v, []).append(None)
    return out


def _in_order(node: fx.Node) -> bool:
    return bool(runtime_name(node)) or aten_name(node) in RANDOM or aten_name(node) == "scaled_dot_product_attention"


def _one_line(inner: fx.Node, outer: fx.Node) -> bool:
    """Did one line of the user's source hold both calls?

    A call with a note stands alone, except for a reduction in front of the addition of a bias.
    """
    if count(inner) is not None:
        return False
    if note_of(inner):
        return runtime_name(inner) == "reduce" and aten_name(outer) == "add" and not note_of(outer)
    line, other = line_of(inner), line_of(outer)
    return line is not None and other is not None and line[:2] == other[:2]
