"""One class of the emitted file: its constructor, its forward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from tpcompiler.emit.layers.frames import Comparer, Frame
from tpcompiler.emit.layers.outline import Layer, Number, items
from tpcompiler.emit.layers.roll import AnyStep, Arguments, put, roll
from tpcompiler.emit.layers.steps import steps
from tpcompiler.emit.names import symbols
from tpcompiler.emit.names.fields import Fields
from tpcompiler.emit.names.names import Value, value
from tpcompiler.emit.names.scope import File, Scope
from tpcompiler.emit.text.expr import ADD, Expr, binary, number
from tpcompiler.emit.text.lines import Line, block, returning
from tpcompiler.emit.text.wrap import wrap
from tpcompiler.emit.write.body import Body
from tpcompiler.emit.write.constructor import Constructor, Dims
from tpcompiler.emit.write.signature import Signature, result
from tpcompiler.program import Capture


class Classes:
    """Writes classes; what they share is in `file`."""

    def __init__(self, file: File, comparer: Comparer, dims: Dims, signature: Signature) -> None:
        self.file, self.comparer, self.dims, self.signature = file, comparer, dims, signature

    def layer(self, layer: Layer, inner: list[Layer]) -> tuple[str, str]:
        """The docstring of a layer's class, and all that follows it; `inner` layers are written already."""
        frame = layer.first
        fields = self._fields(frame, inner)
        inputs = [value(n) for n in layer.inputs[id(frame)]]
        outputs = [frame.nodes[o.node] if o.item is None else (frame.nodes[o.node], o.item) for o in layer.outputs]
        run = self._run(frame, inner, outputs)
        scope = Scope(self.file, fields, frame, run, _replaced(layer, fields))
        body = Body(scope, run, inputs, outputs)
        body.namer.taken |= {n.name for n in layer.numbers if n.by_call}
        for v, name in zip(inputs, self._argument_names(layer), strict=True):
            body.argument(v, name)
        lines = body.write()
        opening, layer.sizes = self._sizes(body)
        made = Constructor(frame.name, inner, self.file.names, self.dims, fields).lines()
        layer.draws = fields.draws
        given = ["ranks: Ranks"] + (["rng: Rng"] if fields.draws else [])
        text = _init(given + [_typed(n) for n in layer.numbers if not n.by_call], fields.lines + made)
        arguments = [f"{body.names[v]}: Tensor" for v in inputs] + [f"{self.file.letters[s]}: int" for s in layer.sizes]
        arguments += [_typed(n) for n in layer.numbers if n.by_call]
        returns = "tuple[Tensor, ...]" if len(outputs) > 1 else "Tensor"
        text += wrap(f"def forward({', '.join(['self', *arguments])}) -> {returns}:", 4)
        text += block([*opening, *returning(lines, ", ".join(map(body.say, outputs)))], 8)
        return f'    """{_where(layer)}"""\n', "\n".join(text)

    def model(
        self, root: Frame, layers: list[Layer], inputs: list[fx.Node], flat: list[Any], capture: Capture
    ) -> tuple[str, list[str]]:
        """The class `Model`, and the definitions that its results need."""
        fields = self._fields(root, layers)
        outputs = [value(n) for n in flat if isinstance(n, fx.Node) and not symbols.is_size(n)]
        run = self._run(root, layers, outputs)
        scope = Scope(self.file, fields, root, run, {})
        body = Body(scope, run, list(inputs), outputs)
        body.namer.taken |= self.signature.constants
        for node in inputs:
            body.argument(node, self.signature.tensors[node.name])
        lines = body.write()
        opening, missing = self._sizes(body)
        assert not missing, f"sizes of no input: {missing}"
        made = Constructor("", layers, self.file.names, self.dims, fields).lines()
        fields.rng()
        returned = result(capture.out_spec, [scope.expr(n).text for n in flat])
        mesh = self.file.mesh
        on = "on one rank" if mesh.size == 1 else f"on each rank of {mesh}"
        text = ["class Model(nn.Module):", f'    """{capture.model}, {on}."""', ""]
        text += _init(["ranks: Ranks", "rng: Rng | None = None"], fields.lines_of("rng or Rng(seed=0)") + made)
        text += wrap(f"def forward({', '.join(['self', *self.signature.parameters])}):", 4)
        text += block([*map(Line, self.signature.lines), *opening, *returning(lines, returned.text)], 8)
        return "\n".join(text), returned.definition

    def _fields(self, frame: Frame, layers: list[Layer]) -> Fields:
        lead = len(frame.name) + 1 if frame.name else 0
        names = [n for n, _ in self.file.names.under(frame.name)] + [n[lead:] for a in layers for n in a.instances]
        return Fields(self.file.mesh, {n.split(".")[0] for n in names})

    def _run(self, frame: Frame, layers: list[Layer], outputs: list[Value]) -> list[AnyStep]:
        return roll(steps(frame, layers), frame, self.comparer, outputs)

    def _argument_names(self, layer: Layer) -> Iterable[str]:
        """Names for a layer's inputs: what its second call is given says more than what the first is."""
        sample = layer.frames[1 if len(layer.frames) > 1 else 0]
        for node in layer.inputs[id(sample)]:
            own = self.file.names.by_node.get(node.name) if node.op == "placeholder" else None
            if own is not None:
                yield next((p for p in reversed(own.name.split(".")) if p.isidentifier()), "weight")
            else:
                yield self.file.hints.get(value(node)) or self.signature.tensors.get(node.name) or "x"

    def _sizes(self, body: Body) -> tuple[list[Line], list[str]]:
        """`b, s = ids.shape` for the sizes that a body uses, and the symbols that no argument tells."""
        missing = dict(body.scope.needed)
        letters, lines = self.file.letters, []
        told = {v: t for v in body.names if (t := _told(v))}
        while missing and told:
            v = max(told, key=lambda v: sum(s in missing for s in told[v]))
            wanted = {i: s for i, s in enumerate(told[v]) if s in missing}
            if not wanted:
                break
            if len(wanted) == 1 and len(told[v]) > 1:
                ((i, s),) = wanted.items()
                lines.append(Line(f"{letters[s]} = {body.names[v]}.shape[{i}]"))
            else:
                left = ", ".join(letters[wanted[i]] if i in wanted else "_" for i in range(len(told[v])))
                lines.append(Line(f"{left}{',' if len(told[v]) == 1 else ''} = {body.names[v]}.shape"))
            missing = {s: None for s in missing if s not in wanted.values()}
        return lines, list(missing)


def _told(v: Value) -> list[str]:
    """The symbol that each dimension of a tensor tells, "" for none; each symbol once."""
    node = v if isinstance(v, fx.Node) else items(v[0]).get(v[1])
    val = None if node is None else node.meta.get("val")
    if node is None or not isinstance(val, torch.Tensor):
        return []
    symbolic = [isinstance(n, torch.SymInt) and symbols.whole(node, i) for i, n in enumerate(val.shape)]
    found = [symbols.key(n) if s else "" for n, s in zip(val.shape, symbolic, strict=True)]
    return [s if s not in found[:i] else "" for i, s in enumerate(found)]


def _replaced(layer: Layer, fields: Fields) -> dict[fx.Node, Arguments]:
    """The nodes whose numbers differ by instance or call, with the name of the number in its place."""
    out: dict[fx.Node, Arguments] = {}
    for n in layer.numbers:
        for place, offset in n.places.items():
            node = layer.first.nodes[place.node]
            args, kwargs = out.get(node, (tuple(node.args), dict(node.kwargs)))
            base = Expr(n.name if n.by_call else fields.argument(n.name))
            text = binary(base, "+" if offset > 0 else "-", number(abs(offset)), ADD) if offset else base
            first, *rest = place.path
            if isinstance(first, int):
                args = put(args, place.path, text)
            else:
                kwargs[first] = put(kwargs[first], tuple(rest), text)
            out[node] = (args, kwargs)
    return out


def _typed(n: Number) -> str:
    return f"{n.name}: {type(next(iter(n.values.values()))).__name__}"


def _init(arguments: list[str], lines: list[str]) -> list[str]:
    text = wrap(f"def __init__({', '.join(['self', *arguments])}) -> None:", 4) + ["        super().__init__()"]
    for line in lines:
        code, _, comment = line.partition("  # ")
        wrapped = wrap(code, 8)
        text += [*wrapped[:-1], wrapped[-1] + (f"  # {comment}" if comment else "")]
    return [*text, ""]


def _where(layer: Layer) -> str:
    """`h.0 … h.71 (72 alike)`"""
    names = layer.instances
    said = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)} alike)"
    return said + (f", called {len(layer.frames) // len(names)} times" if len(layer.frames) > len(names) else "")
