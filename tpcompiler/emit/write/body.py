"""One forward function, statement by statement. The variables get their names here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from tpcompiler.emit.layers.loop_proof import Loop, LoopEnd
from tpcompiler.emit.layers.loops import BodyPart
from tpcompiler.emit.layers.statements import LayerCalls, Operation
from tpcompiler.emit.names.namer import POOL, RESERVED, Namer
from tpcompiler.emit.ops.nodes import NodeResult, aten_name, count, runtime_name
from tpcompiler.emit.text.expr import Expr, constant
from tpcompiler.emit.text.lines import CodeLine
from tpcompiler.emit.write import remarks
from tpcompiler.emit.write.layer_calls import call_numbers, callee, cannot_halve, halves, is_cut, loop_head, sizes
from tpcompiler.emit.write.nesting import nested_calls, reads
from tpcompiler.emit.write.scope import Scope

# The result of these operators is another thing than their operand, so it does not take over the operand's name.
_NEW_THING = set(
    """scaled_dot_product_attention cross_entropy_loss cross_entropy linear_cross_entropy embedding lookup matmul bmm
    einsum eq ne lt le gt ge""".split()
)


@dataclass(frozen=True)
class WrittenBody:
    """The statements of a function, without the sizes at the top and the return at the end."""

    lines: list[CodeLine]
    arguments: dict[NodeResult, str]
    scope: Scope  # writes values by their names at the end of the function


def write_body(
    scope: Scope,
    parts: Sequence[BodyPart],
    arguments: Mapping[NodeResult, str],
    outputs: list[NodeResult],
    taken: Iterable[str],
) -> WrittenBody:
    """Writes a function that is given `arguments` (values and the names wanted for them) and returns `outputs`.

    `taken` are names that no variable may have.
    """
    body = _Body(scope, parts, arguments, outputs, taken)
    lines = [line for i in range(len(parts)) for line in body.lines(i)]
    return WrittenBody(lines, body.arguments, body.scope)


class _Body:
    def __init__(
        self,
        scope: Scope,
        parts: Sequence[BodyPart],
        arguments: Mapping[NodeResult, str],
        outputs: list[NodeResult],
        taken: Iterable[str],
    ) -> None:
        self.file, self.parts, self.outputs = scope.file, parts, outputs
        counter = {"i"} if any(isinstance(p, Loop) for p in parts) else set()
        self.namer = Namer({*self.file.letters.values(), *taken, *counter}, self.file.hints)
        self.arguments = {v: self.namer.argument(v, name) for v, name in arguments.items()}
        self.nested = nested_calls(parts, outputs, scope)
        self.texts: dict[fx.Node, Expr] = {}  # of nested calls
        self.scope = replace(scope, say=self._variable, nested=self.texts)
        self.last = self._last_uses()
        self.dying: dict[int, list[NodeResult]] = {}
        for v, i in self.last.items():
            self.dying.setdefault(i, []).append(v)
        self.namer.release(v for v in self.arguments if v not in self.last)

    def _variable(self, v: NodeResult) -> Expr:
        assert v in self.namer.names, f"{v} has no name in {self.scope.frame.name or 'the model'}"
        return Expr(self.namer.names[v])

    def _last_uses(self) -> dict[NodeResult, int]:
        """For each value, the index of the part that reads it last. The return follows the last part."""
        written_at: dict[NodeResult, int] = {}  # nested calls
        last: dict[NodeResult, int] = dict.fromkeys(self.outputs, len(self.parts))
        for i in reversed(range(len(self.parts))):
            part = self.parts[i]
            at = written_at[part.node] if isinstance(part, Operation) and part.node in self.nested else i
            for v in reads(part, self.scope):
                last[v] = max(last.get(v, -1), at)
                if v in self.nested:
                    written_at[v] = at
        return last

    def lines(self, i: int) -> list[CodeLine]:
        """The statements of part `i`."""
        indent = "    " if self.scope.loop is not None else ""
        part, dead = self.parts[i], self.dying.get(i, [])
        if isinstance(part, Operation):
            found = self._operation(part, dead)
        elif isinstance(part, LayerCalls):
            found = self._loop_of_calls(part, dead) if len(part.frames) > 1 else self._call(part, dead)
        else:
            found = self._begin(part) if isinstance(part, Loop) else self._end(part, dead)
        return [replace(line, text=indent + line.text) for line in found]

    # --- operations ---------------------------------------------------------------------------------------------------

    def _operation(self, part: Operation, dead: list[NodeResult]) -> Iterator[CodeLine]:
        """`y = f(x)`"""
        node = part.node
        if self._cut(self.scope.reads(node)):
            raise cannot_halve(node.name, "it is not written as a call of a layer")
        text = self.scope.spell(node)
        if node in self.nested:
            self.texts[node] = text
            return
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
            target = f"({names[0]},)" if len(names) == 1 else ", ".join(names)
        if text.text != target:
            note = ", ".join(n for m in self._together(node) if not is_cut(m) and (n := remarks.notes(self.file, m)))
            shape = remarks.new_shape(self.file, node, leaves[0] if leaves else None)
            yield CodeLine(f"{target} = {text}", shape, note, part.section)

    def _cut(self, read: Iterable[NodeResult]) -> tuple[int, ...]:
        """The places of the values that are marked here, not outside, as computed in halves."""
        return tuple(i for i, v in enumerate(read) if is_cut(v) and v not in self.arguments)

    def _reused(self, node: fx.Node, leaves: list[NodeResult], dead: list[NodeResult]) -> str | None:
        """The name of the value that the statement replaces, where a person would write `y = f(y)`."""
        if not leaves or leaves[0] not in dead or (aten_name(node) or runtime_name(node)) in _NEW_THING:
            return None
        if not self.scope.frame.name and leaves[0] in self.arguments:  # The model's own arguments keep their names.
            return None
        name = self.namer.names[leaves[0]]
        return name if len(leaves) == 1 or name in POOL else None

    def _together(self, node: fx.Node) -> list[fx.Node]:
        """The calls of a statement, innermost first."""
        inner = [v for v in self.scope.reads(node) if isinstance(v, fx.Node) and v in self.nested]
        return [m for v in inner for m in self._together(v)] + [node]

    def _leaves(self, node: fx.Node) -> list[NodeResult]:
        """The values that a statement reads, in order, through the calls nested in it."""
        out: list[NodeResult] = []
        for v in self.scope.reads(node):
            out.extend(self._leaves(v) if isinstance(v, fx.Node) and v in self.nested else [v])
        return out

    # --- calls of layers ----------------------------------------------------------------------------------------------

    def _call(self, step: LayerCalls, dead: list[NodeResult]) -> Iterator[CodeLine]:
        """`x = self.layer(x, mask)`"""
        if self._cut(step.inputs):
            raise cannot_halve(step.frames[0].name, "it is a call of its own")
        inputs, outputs, hinted = step.inputs, step.results, self.file.hints
        given = [self.scope.value(v).text for v in inputs] + sizes(step, self.scope)
        given += [f"{n.name}={constant(n.values[step.frames[0]])}" for n in step.layer.numbers if n.by_call]
        first = next((v for v in inputs if v in dead and v in self.namer.names), None)
        reuse = None if first is None else self.namer.names[first]
        self.namer.release(dead)
        results = dict.fromkeys(outputs, "_")
        for v in sorted((v for v in outputs if v in self.last), key=lambda v: v in hinted):
            alike = first is not None and remarks.shape_of(self.file, v) == remarks.shape_of(self.file, first)
            if v not in hinted and alike and reuse is not None and self.namer.free(reuse):
                results[v] = self.namer.bind(v, reuse)
            else:
                results[v] = self.namer.fresh(v)
        text = f"{', '.join(results.values())} = {callee(step, self.scope)}({', '.join(given)})"
        yield CodeLine(text, section=(step.made.name, ""))

    def _loop_of_calls(self, step: LayerCalls, dead: list[NodeResult]) -> Iterator[CodeLine]:
        """`for block in self.h:` with a call that takes what the call before it returned."""
        inputs, outputs = step.inputs, step.results
        names = [self.scope.value(v).text for v in inputs]
        names_given = list(names)
        results: dict[NodeResult, str] = {}
        for i, o in step.carried.items():
            out = outputs[o]
            if out not in results:
                if inputs[i] in dead and self.namer.holds(inputs[i]) and names[i] not in RESERVED:
                    self.namer.release([inputs[i]])
                    results[out] = self.namer.bind(out, self.namer.names[inputs[i]])
                else:
                    results[out] = self.namer.fresh(out)
                    yield CodeLine(f"{results[out]} = {names[i]}")
            names[i] = results[out]
        for v in outputs:
            if v in self.last and v not in results:
                results[v] = self.namer.fresh(v)
        self.namer.release(dead)
        self.namer.release(v for v in outputs if v not in self.last)
        section = (step.made.name, "")
        if cut := self._cut(inputs):
            in_turn = halves(step, self.scope, cut)
            note = f"{step.made.name} {len(step.frames)} times, halves of the batch in turn"
            yield CodeLine(f"{results[outputs[0]]} = {in_turn}({', '.join(names_given)})", "", note, section)
            return
        called, head = loop_head(step, self.scope, self.namer.free)
        given = names + sizes(step, self.scope) + [f"{n}={n}" for n in call_numbers(step)]
        yield CodeLine(f"for {head}:", section=section)
        target = ", ".join(results.get(v, "_") for v in outputs)
        yield CodeLine(f"    {target} = {called}({', '.join(given)})", section=section)

    # --- loops --------------------------------------------------------------------------------------------------------

    def _begin(self, loop: Loop) -> Iterator[CodeLine]:
        for v, made, _ in loop.carried:
            self.namer.prefer(made, self.namer.names[v])
        self.scope = self.scope.inside(loop)
        yield CodeLine(f"for i in range({loop.count}):")

    def _end(self, end: LoopEnd, dead: list[NodeResult]) -> Iterator[CodeLine]:
        """Moves what an iteration made to where the next one looks for it. After the loop the results are there too."""
        before, made, final = zip(*end.loop.carried, strict=True)
        names = [self.namer.names[v] for v in before]
        moved = [(n, m) for n, v in zip(names, made, strict=True) if n != (m := self.namer.names[v])]
        self.namer.release([*made, *dead, *before])
        for name, v in zip(names, final, strict=True):
            self.namer.bind(v, name)
        self.scope = self.scope.inside(None)
        if moved:
            yield CodeLine(f"{', '.join(n for n, _ in moved)} = {', '.join(m for _, m in moved)}")
