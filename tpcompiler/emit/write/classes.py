"""One class of the emitted file: its constructor and its forward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from tpcompiler.emit.layers.alike import Comparer
from tpcompiler.emit.layers.frames import Frame
from tpcompiler.emit.layers.loops import BodyPart, with_loops
from tpcompiler.emit.layers.numbers import Number
from tpcompiler.emit.layers.outline import Layer
from tpcompiler.emit.layers.statements import LayerClass, statements
from tpcompiler.emit.names.attributes import Fields
from tpcompiler.emit.names.symbols import told_by
from tpcompiler.emit.ops.arguments import Arguments, arguments_of, replaced
from tpcompiler.emit.ops.nodes import NodeResult, is_size, node_of, result_of
from tpcompiler.emit.text.expr import ADD, Expr, binary, number
from tpcompiler.emit.text.lines import CodeLine, block, returning
from tpcompiler.emit.text.wrap import wrap
from tpcompiler.emit.write.body import WrittenBody, write_body
from tpcompiler.emit.write.constructor import constructor
from tpcompiler.emit.write.scope import File, Scope
from tpcompiler.emit.write.signature import Signature, returned_structure
from tpcompiler.program import Capture


@dataclass(frozen=True)
class ClassText:
    """What stands in the class of a layer, without its name and docstring."""

    base: str  # the name of the base class
    code: str
    sizes: tuple[str, ...]  # symbols that forward is given
    draws: bool  # Are random numbers needed?


class ClassWriter:
    """Writes classes. `inner` are always the classes of the layers that the class calls, written before it."""

    def __init__(self, file: File, comparer: Comparer, signature: Signature) -> None:
        self.file, self.comparer, self.signature = file, comparer, signature

    def layer(self, layer: Layer, inner: list[LayerClass]) -> ClassText:
        """The class of a layer."""
        frame = layer.first
        fields = self._fields(frame, inner)
        arguments = dict(zip(layer.inputs[frame], self._argument_names(layer), strict=True))
        outputs = layer.results(frame)
        parts = self._parts(frame, inner, outputs)
        scope = Scope.of(self.file, fields, frame, parts, list(arguments), _with_numbers(layer, fields))
        by_call = [n for n in layer.numbers if n.by_call]
        body = write_body(scope, parts, arguments, outputs, [n.name for n in by_call])
        opening, sizes = self._sizes(body)
        made = constructor(frame, inner, self.file.names, self.comparer.dims, fields)
        given = ["ranks: Ranks"] + (["rng: Rng"] if fields.draws else [])
        code = _init(given + [_typed(n) for n in layer.numbers if not n.by_call], fields.lines() + made + fields.later)
        declared = [f"{name}: Tensor" for name in body.arguments.values()]
        declared += [f"{self.file.letters[s]}: int" for s in sizes] + [_typed(n) for n in by_call]
        returns = "tuple[Tensor, ...]" if len(outputs) > 1 else "Tensor"
        returned = ", ".join(body.scope.value(v).text for v in outputs)
        code += wrap(f"def forward({', '.join(['self', *declared])}) -> {returns}:", 4)
        code += block([*opening, *returning(body.lines, returned)], 8)
        return ClassText(self._base(frame), "\n".join(code), tuple(sizes), fields.draws)

    def model(
        self, root: Frame, inner: list[LayerClass], inputs: list[fx.Node], flat: list[Any], capture: Capture
    ) -> tuple[str, list[str]]:
        """The class `Model`, and the definitions of the classes that it returns. `flat` are the graph's outputs."""
        fields = self._fields(root, inner)
        outputs = [result_of(n) for n in flat if isinstance(n, fx.Node) and not is_size(n)]
        parts = self._parts(root, inner, outputs)
        scope = Scope.of(self.file, fields, root, parts, inputs, {})
        arguments: dict[NodeResult, str] = {node: self.signature.tensors[node.name] for node in inputs}
        body = write_body(scope, parts, arguments, outputs, self.signature.constants)
        structure = returned_structure(capture.out_spec, [body.scope.expr(n).text for n in flat])
        opening, missing = self._sizes(body)
        assert not missing, f"sizes of no input: {missing}"
        made = constructor(root, inner, self.file.names, self.comparer.dims, fields)
        fields.rng()
        mesh = self.file.mesh
        on = "on one rank" if mesh.size == 1 else f"on each rank of {mesh}"
        code = [f"class Model(nn.{self._base(root)}):", f'    """{capture.model}, {on}."""', ""]
        made = fields.lines("rng or Rng(seed=0)") + made + fields.later
        code += _init(["ranks: Ranks", "rng: Rng | None = None"], made)
        code += wrap(f"def forward({', '.join(['self', *self.signature.parameters])}):", 4)
        code += block([*map(CodeLine, self.signature.lines), *opening, *returning(body.lines, structure.text)], 8)
        return "\n".join(code), structure.definitions

    def _base(self, frame: Frame) -> str:
        """The base class: a module whose members have numbers for names is indexed like a list."""
        return "ModuleList" if self.file.names.is_list(frame.name) else "Module"

    def _fields(self, frame: Frame, inner: list[LayerClass]) -> Fields:
        names = [n for n, _ in self.file.names.under(frame.name)]
        names += [frame.relative(n) for c in inner for n in c.layer.instances]
        return Fields(self.file.mesh, {n.split(".")[0] for n in names})

    def _parts(self, frame: Frame, inner: list[LayerClass], outputs: list[NodeResult]) -> list[BodyPart]:
        return with_loops(statements(frame, inner), frame, self.comparer, outputs)

    def _argument_names(self, layer: Layer) -> Iterator[str]:
        """Names for a layer's inputs, from its second call: the first call is often given something special."""
        for v in layer.inputs[layer.frames[min(1, len(layer.frames) - 1)]]:
            node = v if isinstance(v, fx.Node) else None
            own = None if node is None else self.file.names.of(node)
            if own is not None:
                yield next((p for p in reversed(own.name.split(".")) if p.isidentifier()), "weight")
            else:
                picked = node_of(v)
                yield self.file.hints.get(v) or self.signature.tensors.get(picked.name if picked else "") or "x"

    def _sizes(self, body: WrittenBody) -> tuple[list[CodeLine], list[str]]:
        """`b, s = ids.shape` for the sizes that a body uses, and the symbols that no argument tells."""
        missing = dict(body.scope.needed)
        letters, lines = self.file.letters, []
        told = {name: symbols for v, name in body.arguments.items() if (symbols := told_by(v))}
        while missing and told:
            name = max(told, key=lambda name: sum(s in missing for s in told[name]))
            wanted = {i: s for i, s in enumerate(told[name]) if s in missing}
            if not wanted:
                break
            if len(wanted) == 1 and len(told[name]) > 1:
                ((i, s),) = wanted.items()
                lines.append(CodeLine(f"{letters[s]} = {name}.shape[{i}]"))
            else:
                left = ", ".join(letters[wanted[i]] if i in wanted else "_" for i in range(len(told[name])))
                lines.append(CodeLine(f"{left}{',' if len(told[name]) == 1 else ''} = {name}.shape"))
            missing = {s: None for s in missing if s not in wanted.values()}
        return lines, list(missing)


def _with_numbers(layer: Layer, fields: Fields) -> dict[fx.Node, Arguments]:
    """The arguments of nodes whose numbers differ by instance or call, with names in place of the numbers."""
    out: dict[fx.Node, Arguments] = {}
    for n in layer.numbers:
        for (index, path), offset in n.uses.items():
            node = layer.first.nodes[index]
            base = Expr(n.name if n.by_call else fields.argument(n.name))
            text = binary(base, "+" if offset > 0 else "-", number(abs(offset)), ADD) if offset else base
            out[node] = replaced(out.get(node) or arguments_of(node), path, text)
    return out


def _typed(n: Number) -> str:
    return f"{n.name}: {type(next(iter(n.values.values()))).__name__}"


def _init(arguments: list[str], lines: list[str]) -> list[str]:
    code = wrap(f"def __init__({', '.join(['self', *arguments])}) -> None:", 4) + ["        super().__init__()"]
    for line in lines:
        statement, _, comment = line.partition("  # ")
        wrapped = wrap(statement, 8)
        code += [*wrapped[:-1], wrapped[-1] + (f"  # {comment}" if comment else "")]
    return [*code, ""]
