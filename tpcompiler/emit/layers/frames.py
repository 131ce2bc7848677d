"""The tree of module calls that a program consists of.

A `Frame` is one call of one module: the nodes that its forward made, with the calls inside it as children.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import fx

from tpcompiler.emit.layers.hoist import hoist
from tpcompiler.emit.layers.members import ParameterNames
from tpcompiler.emit.ops.nodes import RANDOM, Stack, aten_name, is_item, is_size, stack_of


@dataclass(eq=False)
class Frame:
    """One call of the module `name` (the root's name is ""): call number `number` of it."""

    name: str
    number: int
    title: str  # the name of the module's class
    parts: list[fx.Node | Frame] = field(default_factory=list)

    @cached_property
    def nodes(self) -> list[fx.Node]:
        """All nodes, including those of the calls inside."""
        return [n for part in self.parts for n in (part.nodes if isinstance(part, Frame) else [part])]

    @property
    def frames(self) -> list[Frame]:
        """The calls made directly by this one."""
        return [p for p in self.parts if isinstance(p, Frame)]

    def walk(self) -> Iterator[Frame]:
        """All calls inside this one."""
        for frame in self.frames:
            yield frame
            yield from frame.walk()

    def relative(self, name: str) -> str:
        """The name of a module or parameter as this module knows it."""
        return name[len(self.name) + 1 :] if self.name else name


def called_modules(graph: fx.Graph) -> set[str]:
    """The qualified names of the modules that a program calls."""
    return {call[0] for n in graph.nodes for call in stack_of(n) or ()}


def frames(graph: fx.Graph, names: ParameterNames) -> Frame:
    """The call of the root, with all others inside. The nodes of a call are brought together."""
    nodes = [n for n in graph.nodes if n.op == "call_function" and not is_size(n) and not is_item(n)]
    stacks: dict[fx.Node, Stack] = {}
    last: Stack = ()
    for n in nodes:
        stack = stack_of(n)
        last = last if stack is None else tuple(s for s in stack if s[0])
        stacks[n] = last
    nodes, stacks = hoist(nodes, stacks, lambda module, parameter: names.inside(parameter, module) is not None)
    return Frame("", 0, "", _group(nodes, stacks, 0))


def _group(nodes: list[fx.Node], stacks: Mapping[fx.Node, Stack], depth: int) -> list[fx.Node | Frame]:
    """The nodes, with those of each call at `depth` of their stacks gathered in one frame."""
    out: list[fx.Node | Frame] = []
    calls = [(s[depth][0], s[depth][2]) if len(s := stacks[n]) > depth else None for n in nodes]
    i = 0
    while i < len(nodes):
        call = calls[i]
        if call is None:
            out.append(nodes[i])
            i += 1
            continue
        stop = _end_of_call(calls, i)
        title = stacks[nodes[i]][depth][1].rsplit(".", 1)[-1]
        before, rest = _apart(nodes[i:stop], [c == call for c in calls[i:stop]])
        inside = {n: stacks[n] if calls[j] == call else stacks[n][:depth] for j, n in enumerate(nodes[i:stop], i)}
        out += before
        out.append(Frame(call[0], call[1], title, _group(rest, inside, depth + 1)))
        i = stop
    return out


def _apart(nodes: list[fx.Node], own: list[bool]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Divides the nodes between a call's first and last: foreign nodes that can move to before it, and the rest."""
    before: list[fx.Node] = []
    rest: dict[fx.Node, None] = {}
    for node, mine in zip(nodes, own, strict=True):
        needs = {n.args[0] if is_item(n) else n for n in node.all_input_nodes}
        if mine or aten_name(node) in RANDOM or any(n in rest for n in needs):
            rest[node] = None
        else:
            before.append(node)
    return before, list(rest)


def _end_of_call(calls: list[tuple[str, int] | None], start: int) -> int:
    """Where the nodes of `calls[start]` end. Foreign nodes among them are included if they are a minority."""
    stop, call = start + 1, calls[start]
    while True:
        while stop < len(calls) and calls[stop] == call:
            stop += 1
        again = next((j for j in range(stop, min(len(calls), 2 * stop - start)) if calls[j] == call), None)
        if again is None:
            return stop
        stop = again
