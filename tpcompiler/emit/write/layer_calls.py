"""How calls of layers are written: what is called, and the loop around several calls."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from tpcompiler.emit.layers.statements import LayerCalls
from tpcompiler.emit.ops.nodes import NodeResult, runtime_name
from tpcompiler.emit.text.expr import constant
from tpcompiler.emit.write.scope import Scope
from tpcompiler.errors import TpcError


def callee(step: LayerCalls, scope: Scope) -> str:
    """`self.layer`, or what a surrounding loop calls instead."""
    frame = step.frames[0]
    return str(scope.callees.get(frame) or scope.module(frame.name))


def sizes(step: LayerCalls, scope: Scope) -> list[str]:
    """The sizes that a layer is given because none of its inputs tells them."""
    scope.needed.update(dict.fromkeys(step.made.sizes))
    return [scope.file.letters[s] for s in step.made.sizes]


def call_numbers(step: LayerCalls) -> list[str]:
    """The names of the numbers that differ between the calls of one instance."""
    return [n.name for n in step.layer.numbers if n.by_call]


def loop_head(step: LayerCalls, scope: Scope, free: Callable[[str], bool]) -> tuple[str, str]:
    """What a loop over the calls calls, and the loop's head: ("block", "block in self.h").

    `free` tells whether a name for the loop's variable is not in use.
    """
    names = call_numbers(step)
    by_call = [n for n in step.layer.numbers if n.by_call]
    rows = [", ".join(constant(n.values[f]).text for n in by_call) for f in step.frames]
    listed = f"({', '.join(f'({r})' if len(names) > 1 else r for r in rows)})"
    head = ", ".join(names)
    if step.frames[0].name == step.frames[-1].name:
        return callee(step, scope), f"{head} in {listed}" if names else f"_ in range({len(step.frames)})"
    variable = _loop_variable(step, free)
    over = _members(step, scope)
    if not names:
        return variable, f"{variable} in {over}"
    return variable, f"{variable}, {f'({head})' if len(names) > 1 else head} in zip({over}, {listed})"


def halves(step: LayerCalls, scope: Scope, cut: tuple[int, ...]) -> str:
    """`self.halves`: what makes calls on two halves of a batch. `cut` are the places of the inputs to be halved.

    Raises `TpcError` for calls that the runtime's `Halves` cannot make.
    """
    last = step.results[-1]
    whole = isinstance(last, fx.Node) and all(runtime_name(u) == "join_batch" for u in last.users)
    if len(step.results) != 1 or dict(step.carried) != {0: 0} or 0 not in cut or not whole:
        raise cannot_halve(step.frames[0].name, "its calls are not one loop that hands one value on")
    if step.made.sizes or call_numbers(step):
        raise cannot_halve(step.frames[0].name, "it is given sizes or numbers")
    return scope.fields.halves(_members(step, scope), cut)


def is_cut(v: NodeResult) -> bool:
    """Whether a value is marked: from here on, halves are computed in turn."""
    return isinstance(v, fx.Node) and runtime_name(v) == "cut_batch"


def cannot_halve(what: str, why: str) -> TpcError:
    return TpcError(f"overlap: halves is not possible: {what}: {why}; overlap: true would work")


def _loop_variable(step: LayerCalls, free: Callable[[str], bool]) -> str:
    """The last word of the class's name: `block` for `TransformerBlock`."""
    word = "".join(f" {c}" if c.isupper() else c for c in step.layer.title).split()[-1].lower()
    word = "".join(c for c in word if c.isalpha())
    return next(w for w in (word, "layer", "module", "each", "this") if w and free(w))


def _members(step: LayerCalls, scope: Scope) -> str:
    """The list that the called modules are members of, or a slice of the list: `self.h[1:]`."""
    first, last = step.frames[0].name, step.frames[-1].name
    container, _, start = first.rpartition(".")
    stop = int(last.rpartition(".")[2]) + 1
    base = scope.module(container)
    longer = any(int(n.split(".")[0]) >= stop for n, _ in scope.file.names.under(container))
    if start == "0" and not longer:
        return base
    return f"{base}[{start if start != '0' else ''}:{stop if longer else ''}]"
