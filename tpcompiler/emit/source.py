"""The file: a header, a class for each distinct layer, the model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from tpcompiler.emit import sizes
from tpcompiler.emit.body import Body, File, Line, megabytes
from tpcompiler.emit.constructor import Constructor
from tpcompiler.emit.expr import ADD, Expr, binary, number
from tpcompiler.emit.fields import Fields
from tpcompiler.emit.layers import Comparer, Frame, Names, frames
from tpcompiler.emit.names import RESERVED, Value, hints, value
from tpcompiler.emit.outline import Layer, Number, outline
from tpcompiler.emit.roll import Arguments, put, roll
from tpcompiler.emit.signature import result, signature
from tpcompiler.emit.steps import steps
from tpcompiler.emit.tidy import tidy
from tpcompiler.emit.wrap import LIMIT, wrap
from tpcompiler.program import Collective, Program

_COMMENT_COLUMN = 84


def emit(program: Program) -> str:
    """One self-contained Python file: `class Model(ranks)`, the program of every rank. Same program, same text."""
    return _Writer(program).file_text()


class _Writer:
    def __init__(self, program: Program) -> None:
        self.program = program
        graph = tidy(program.graph)
        self.nodes = {n.name: n for n in graph.nodes}
        self.output = next(n for n in graph.nodes if n.op == "output")
        self.inputs = [self.nodes[n] for n in program.capture.inputs]
        names = Names(program.capture.parameters)
        collectives: dict[str, list[Collective]] = {}
        for c in program.collectives:
            collectives.setdefault(c.node, []).append(c)
        known = hints(graph.nodes)
        self.signature = signature(program.capture)
        letters = sizes.letters(self.inputs, set(self.signature.tensors.values()))
        self.file = File(program.mesh, names, letters, known, collectives)
        self.comparer = Comparer(names, program.dims)
        self.classes: list[str] = []
        self.written: dict[str, str] = {}  # a class's text → its name
        self.titles: set[str] = {"Model", "Parameters", "Ranks", "Rng", "NamedTuple", "Any"}
        self.root = frames(graph)

    def file_text(self) -> str:
        layers = self._layers(self.root, root=True)
        model, definition = self._model(layers)
        imports = sorted({"Parameters", "Ranks", "Rng"} | self.file.imports, key=lambda n: (n.islower(), n))
        used = [n for n in imports if re.search(rf"\b{n}\b", "\n".join([*self.classes, model]))]
        head = [
            *self._header(),
            "from __future__ import annotations",
            "",
            *(["from typing import Any, NamedTuple", ""] if definition else []),
            "import torch",
            "import torch.nn.functional as F" if re.search(r"\bF\.", "\n".join([*self.classes, model])) else "",
            "from torch import Tensor, nn",
            "",
            *wrap(f"from tpcompiler.runtime import {', '.join(used)}", 0),
            "",
            "",
        ]
        if "" == head[-6]:
            del head[-6]
        return "\n".join(head + definition + [c + "\n\n" for c in self.classes] + [model])

    # --- classes ------------------------------------------------------------------------------------------------------

    def _layers(self, frame: Frame, root: bool = False) -> list[Layer]:
        """The layers inside of `frame`, their classes written (their own inner ones first)."""
        layers = outline(frame, self.comparer, root)
        for layer, name in zip(layers, self._class_names(layers), strict=True):
            layer.name = name
        for layer in layers:
            head, text = self._class(layer)
            same = self.written.get(text)
            if same is not None:  # the same class in another layer
                self.titles.discard(layer.name)
                layer.name = same
            else:
                self.written[text] = layer.name
                self.classes.append(f"class {layer.name}(nn.Module):\n{head}\n{text}")
        return layers

    def _class_names(self, layers: list[Layer]) -> list[str]:
        titles = Counter(layer.title for layer in layers)
        out = []
        for layer in layers:
            name = layer.title
            if titles[layer.title] > 1:
                others = [o for o in layers if o.title == layer.title]
                parents = {id(o): o.first.name.rpartition(".")[0].split(".") for o in others}
                distinct = [p for p in parents[id(layer)] if not all(p in q for q in parents.values()) and not p.isdigit()]
                if distinct:
                    name = _camel(distinct[0]) + name
            stem, i = name, 2
            while name in self.titles or name in RESERVED:
                name, i = f"{stem}{i}", i + 1
            self.titles.add(name)
            out.append(name)
        return out

    def _class(self, layer: Layer) -> tuple[str, str]:
        """Its docstring, and what follows."""
        frame = layer.first
        inner = self._layers(frame)
        own = {n.split(".")[0] for n, _ in self.file.names.under(frame.name)} | {n.split(".")[0] for n in _relative(inner, frame)}
        fields = Fields(self.program.mesh, own)
        inputs = [value(n) for n in layer.inputs[id(frame)]]
        nodes = frame.nodes
        outputs: list[Value] = [nodes[o.node] if o.item is None else (nodes[o.node], o.item) for o in layer.outputs]
        run = roll(steps(frame, inner), frame, self.comparer, outputs)
        body = Body(self.file, fields, frame, run, inputs, outputs, self._replaced(layer, fields))
        self._argument_names(body, layer)
        lines = body.write()
        header, layer.sizes = self._sizes(body, inputs)
        constructor = Constructor(frame.name, inner, self.file.names, self.program.dims, fields).lines()
        layer.draws = fields.draws
        kept = [f"{n.name}: {type(next(iter(n.values.values()))).__name__}" for n in layer.numbers if not n.by_call]
        varying = [f"{n.name}: {type(next(iter(n.values.values()))).__name__}" for n in layer.numbers if n.by_call]
        extra = [f"{self.file.letters[s]}: int" for s in layer.sizes]
        arguments = [f"{body.first_names[v]}: Tensor" for v in inputs] + extra + varying
        returned = ", ".join(body.say_output(v) for v in outputs)
        several = "tuple[Tensor, ...]" if len(outputs) > 1 else "Tensor"
        text = self._init(["ranks: Ranks"] + (["rng: Rng"] if fields.draws else []) + kept, fields.lines + constructor)
        text += [*wrap(f"def forward({', '.join(['self', *arguments])}) -> {several}:", 4)]
        text += _block(header + _returning(lines, returned), 8)
        return f'    """{_where(layer)}"""\n', "\n".join(text)

    def _argument_names(self, body: Body, layer: Layer) -> None:
        """Names for a layer's inputs: what later calls are given says more than what the first is."""
        body.first_names = {}
        sample = layer.frames[1 if len(layer.frames) > 1 else 0]
        taken = {n.name for n in layer.numbers if n.by_call}
        body.namer.taken |= taken
        for v, node in zip(body.arguments, layer.inputs[id(sample)], strict=True):
            own = self.file.names.by_node.get(node.name) if node.op == "placeholder" else None
            known = self.file.hints.get(value(node)) or self.signature.tensors.get(node.name)
            if own is not None:
                known = own.name.rpartition(".")[2] if not own.name.rpartition(".")[2].isdigit() else own.name.split(".")[-2]
            body.first_names[v] = body.namer.argument(v, known or "x")

    def _replaced(self, layer: Layer, fields: Fields) -> dict[fx.Node, Arguments]:
        """The nodes of the class whose numbers differ by instance or call, with the attribute's name for the number."""
        by_node: dict[int, list[tuple[tuple[Any, ...], Expr]]] = {}
        for n in layer.numbers:
            for place, offset in n.places.items():
                by_node.setdefault(place.node, []).append((place.path, _with_offset(n, fields, offset)))
        out: dict[fx.Node, Arguments] = {}
        for i, changes in by_node.items():
            node = layer.first.nodes[i]
            args: tuple[Any, ...] = tuple(node.args)
            kwargs = dict(node.kwargs)
            for path, text in changes:
                if isinstance(path[0], int):
                    args = put(args, path, text)
                else:
                    kwargs[path[0]] = put(kwargs[path[0]], path[1:], text) if path[1:] else text
            out[node] = (args, kwargs)
        return out

    def _model(self, layers: list[Layer]) -> tuple[str, list[str]]:
        own = {n.split(".")[0] for n, _ in self.file.names.under("")} | {n.split(".")[0] for n in _relative(layers, self.root)}
        fields = Fields(self.program.mesh, own)
        flat = list(self.output.args[0])  # type: ignore[arg-type, union-attr]
        outputs = [value(n) for n in flat if isinstance(n, fx.Node) and not sizes.is_size(n)]
        inputs: list[Value] = list(self.inputs)
        run = roll(steps(self.root, layers), self.root, self.comparer, outputs)
        body = Body(self.file, fields, self.root, run, inputs, outputs, {})
        body.first_names = {}
        for node in self.inputs:
            body.first_names[node] = body.namer.bind(node, self.signature.tensors[node.name])
        body.namer.taken |= {re.split("[:=]", p)[0] for p in self.signature.parameters} - set(self.signature.tensors.values())
        lines = body.write()
        header, missing = self._sizes(body, inputs)
        assert not missing, f"sizes of no input: {missing}"
        constructor = Constructor("", layers, self.file.names, self.program.dims, fields).lines()
        returned = result(self.program.capture.out_spec, [body.say_output(n) for n in flat])
        opening = [Line(line) for line in self.signature.lines]
        if not fields.draws:
            fields.rng()
        fields._groups[:] = [g if g != "self.rng = rng" else "self.rng = rng or Rng(seed=0)" for g in fields._groups]
        text = ["class Model(nn.Module):", f'    """{self.program.capture.model}, one rank of {self.program.mesh}."""', ""]
        text += self._init(["ranks: Ranks", "rng: Rng | None = None"], fields.lines + constructor)
        text += wrap(f"def forward({', '.join(['self', *self.signature.parameters])}):", 4)
        text += _block(opening + header + _returning(lines, returned.text), 8)
        return "\n".join(text) + "\n", returned.definition

    def _init(self, arguments: list[str], lines: list[str]) -> list[str]:
        text = wrap(f"def __init__({', '.join(['self', *arguments])}) -> None:", 4) + ["        super().__init__()"]
        for line in lines:
            code, _, comment = line.partition("  # ")
            wrapped = wrap(code, 8)
            wrapped[-1] += f"  # {comment}" if comment else ""
            text += wrapped
        return text + [""]

    def _sizes(self, body: Body, inputs: list[Value]) -> tuple[list[Line], list[str]]:
        """`b, s = ids.shape` for the sizes that a body uses, and the symbols that no input tells."""
        missing = dict(body.needed)
        lines = []
        candidates = []
        for v in inputs:
            node = v if isinstance(v, fx.Node) else sizes_item(v)
            val = node.meta.get("val") if node is not None else None
            if node is None or not isinstance(val, torch.Tensor):
                continue
            told = {sizes.key(n): i for i, n in enumerate(val.shape) if isinstance(n, torch.SymInt) and sizes.whole(node, i)}
            candidates.append((v, val.dim(), told))
        while missing and candidates:
            best = max(candidates, key=lambda c: sum(s in missing for s in c[2]))
            v, rank, told = best
            wanted = {i: s for s, i in told.items() if s in missing}
            if not wanted:
                break
            name = body.first_names[v]
            if len(wanted) == 1 and rank > 1:
                ((i, s),) = wanted.items()
                lines.append(Line(f"{self.file.letters[s]} = {name}.shape[{i}]"))
            else:
                left = ", ".join(self.file.letters[wanted[i]] if i in wanted else "_" for i in range(rank))
                lines.append(Line(f"{left}{',' if rank == 1 else ''} = {name}.shape"))
            for s in wanted.values():
                del missing[s]
        return lines, list(missing)

    # --- header -------------------------------------------------------------------------------------------------------

    def _header(self) -> list[str]:
        capture, mesh = self.program.capture, self.program.mesh
        made = f"{capture.model}" + (f" of {capture.source}" if capture.source else "")
        lines = [f'"""{made}, for each rank of a mesh of {mesh}.', "", "Written by tpcompiler. It needs torch and tpcompiler.runtime."]
        lines += self._collectives()
        lines += ["", "Run it with torchrun:", "", *_USE(self.program.mesh), '"""', ""]
        return lines

    def _collectives(self) -> Iterable[str]:
        found: dict[tuple[Any, ...], list[Collective]] = {}
        for c in self.program.collectives:
            block = re.sub(r"\d+", "*", c.block)
            found.setdefault((block, c.kind, c.direction, c.over, c.bytes, c.reason), []).append(c)
        if not found:
            return
        yield from ("", "Collectives a step, at the sizes of the example:", "")
        rows = [
            (f"{len(cs)} ×", kind.replace("_", "-"), direction, " ".join(over), megabytes(size), block, reason)
            for (block, kind, direction, over, size, reason), cs in found.items()
        ]
        widths = [max(len(r[i]) for r in rows) for i in range(6)]
        for row in rows:
            yield ("    " + "  ".join(c.ljust(w) for c, w in zip(row, [*widths, 0], strict=True))).rstrip()[:LIMIT]


def _USE(mesh: Any) -> list[str]:
    dims = ", ".join(f'"{n}": {d}' for n, d in mesh.dims)
    return [
        "    # torchrun --nproc-per-node " + str(mesh.size) + " run.py",
        "    from tpcompiler.runtime import Mesh, Ranks, load",
        f"    ranks = Ranks.from_env(Mesh.of({{{dims}}}))",
        "    model = Model(ranks)",
        "    load(model, DIRECTORY, ranks)",
    ]


def _relative(layers: list[Layer], frame: Frame) -> list[str]:
    lead = len(frame.name) + 1 if frame.name else 0
    return [n[lead:] for layer in layers for n in layer.instances]


def sizes_item(v: tuple[fx.Node, int]) -> fx.Node | None:
    return next((u for u in v[0].users if u.args[1:] == (v[1],)), None)


def _with_offset(n: Number, fields: Fields, offset: int | float) -> Expr:
    base = Expr(n.name if n.by_call else fields.argument(n.name))
    if not offset:
        return base
    return binary(base, "+" if offset > 0 else "-", number(abs(offset)), ADD)


def _camel(name: str) -> str:
    return "".join(w[:1].upper() + w[1:] for w in re.split(r"\W|_", name))


def _where(layer: Layer) -> str:
    """`h.0 … h.71`, and how often."""
    names = layer.instances
    calls = len(layer.frames) // max(1, len(names))
    said = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)} alike)"
    return said + (f", called {calls} times" if len(layer.frames) > len(names) else "")


def _block(lines: list[Line], indent: int) -> list[str]:
    """Statements with their comments behind them, and a line before each submodule's."""
    groups: list[list[Line]] = []
    for line in lines:
        if not line.text:
            continue
        if groups and groups[-1][0].section == line.section:
            groups[-1].append(line)
        else:
            groups.append([line])
    out: list[str] = []
    opened = False
    for group in groups:
        section = group[0].section
        titled = section is not None and section[1] and len(group) > 1
        if out and (titled or opened):
            out.append("")
        if titled:
            assert section is not None
            out.append(" " * indent + f"# {section[0]}: {section[1]}")
        out += _commented(group, indent)
        opened = bool(titled)
    return out


def _commented(lines: list[Line], indent: int) -> list[str]:
    """The statements of one block, their comments in one column where they can be."""
    codes = []
    for line in lines:
        stripped = line.text.lstrip(" ")
        codes.append(wrap(stripped, indent + len(line.text) - len(stripped)))
    said = [line.shape or line.note for line in lines]
    short = [len(code[-1]) for code, s in zip(codes, said, strict=True) if s and len(code[-1]) <= _COMMENT_COLUMN]
    column = max(short, default=0)
    out: list[str] = []
    for code, line in zip(codes, lines, strict=True):
        shape = line.shape if len(code) == 1 else ""
        for comment in dict.fromkeys(("  ".join(c for c in (shape, line.note) if c), line.note)):
            end = next((e for e in (code[-1].ljust(column), code[-1]) if len(e) + 4 + len(comment) <= LIMIT), None)
            if not comment:
                out += code
            elif end is not None:
                out += [*code[:-1], f"{end}  # {comment}"]
            elif comment == line.note:
                out += [" " * (len(code[0]) - len(code[0].lstrip())) + f"# {comment}", *code]
            else:
                continue  # a shape alone is not worth a line
            break
    return out


def _returning(lines: list[Line], returned: str) -> list[Line]:
    """The lines and the return; a last assignment of what is returned is itself the return."""
    last = lines[-1] if lines else None
    if last is not None and last.text.startswith(f"{returned} = ") and returned.isidentifier():
        lines = [*lines[:-1], replace(last, text=f"return {last.text[len(returned) + 3 :]}")]
        return lines
    return [*lines, Line(f"return {returned}")]


__all__ = ["emit"]
