"""The file: a header, a class for each distinct layer, the model."""

from __future__ import annotations

import re
from collections import Counter
from io import StringIO
from tokenize import COMMENT, NL, generate_tokens

from torch import fx

from tpcompiler.emit.layers.alike import Comparer
from tpcompiler.emit.layers.frames import Frame, called_modules, frames
from tpcompiler.emit.layers.members import ParameterNames
from tpcompiler.emit.layers.outline import Layer, outline
from tpcompiler.emit.layers.statements import LayerClass
from tpcompiler.emit.layers.tidy import tidy
from tpcompiler.emit.names import symbols
from tpcompiler.emit.names.hints import hints
from tpcompiler.emit.names.namer import RESERVED
from tpcompiler.emit.ops.nodes import runtime_name
from tpcompiler.emit.text.lines import shortened
from tpcompiler.emit.text.wrap import wrap
from tpcompiler.emit.write.classes import ClassText, ClassWriter
from tpcompiler.emit.write.header import header
from tpcompiler.emit.write.scope import File
from tpcompiler.emit.write.signature import signature
from tpcompiler.program import Collective, Program


def emit(program: Program) -> str:
    """Writes a program, for every rank, as one self-contained Python file with a class `Model`.

    `Model(ranks, rng=None)` is a module with the plain model's parameter names and forward signature. The file
    imports only torch and `tpcompiler.runtime`. The same program always gives the same text. Raises `TpcError` for a
    call that cannot be written as source.
    """
    graph = tidy(program.graph)
    nodes = {n.name: n for n in graph.nodes}
    output = next(n for n in graph.nodes if n.op == "output")
    inputs = [nodes[n] for n in program.capture.inputs]
    called = signature(program.capture)
    collectives: dict[str, list[Collective]] = {}
    for c in program.collectives:
        collectives.setdefault(c.node, []).append(c)
    names = ParameterNames(program.capture.parameters, called_modules(graph))
    letters = symbols.letters(inputs, {*called.tensors.values(), *called.constants})
    file = File(program.mesh, names, letters, hints(graph.nodes, names), collectives)
    comparer = Comparer(names, program.dims)
    root = frames(graph, names)
    classes = _Classes(ClassWriter(file, comparer, called), comparer)
    layers = classes.inside(root, root=True)
    model, definitions = classes.writer.model(root, layers, inputs, list(output.args[0]), program.capture)
    parts = [*definitions, *classes.texts, model]
    head = [*header(program), "", *_imports("\n".join(parts), graph), ""]
    return "\n\n\n".join(["\n".join(head).rstrip(), *parts]) + "\n"


def _imports(code: str, graph: fx.Graph) -> list[str]:
    operators = {name for n in graph.nodes if (name := runtime_name(n))}
    used = [n for n in ("Halves", "Parameters", "Ranks", "Rng", *sorted(operators)) if re.search(rf"\b{n}\b", code)]
    return [
        "from __future__ import annotations",
        "",
        *(["from typing import Any, NamedTuple", ""] if "(NamedTuple)" in code else []),
        *(["import torch"] if re.search(r"\btorch\.", code) else []),
        *(["import torch.nn.functional as F"] if re.search(r"\bF\.", code) else []),
        "from torch import Tensor, nn" if re.search(r"\bTensor\b", code) else "from torch import nn",
        "",
        *wrap(f"from tpcompiler.runtime import {', '.join(used)}", 0),
    ]


class _Classes:
    """The classes of layers in the order in which they must stand: inner ones first."""

    def __init__(self, writer: ClassWriter, comparer: Comparer) -> None:
        self.writer, self.comparer = writer, comparer
        self._names: dict[tuple[str, ...], str] = {}  # what a class does → its name
        self._found: dict[str, tuple[ClassText, list[Layer]]] = {}  # name → its text, the layers that it is
        self._taken: set[str] = {"Model", "Halves", "Parameters", "Ranks", "Rng", "NamedTuple", "Any"}

    @property
    def texts(self) -> list[str]:
        return [
            f"class {name}(nn.{text.base}):\n{_docstring(layers)}\n\n{text.code}"
            for name, (text, layers) in self._found.items()
        ]

    def inside(self, frame: Frame, root: bool = False) -> list[LayerClass]:
        """Writes the classes of the layers inside of `frame`. Layers whose code differs only in comments share one."""
        layers = outline(frame, self.comparer, root)
        out = []
        for layer, name in [(layer, self._name(layer, layers)) for layer in layers]:
            text = self.writer.layer(layer, self.inside(layer.first))
            same = self._names.setdefault(_without_comments(text.code), name)
            if same != name:
                self._taken.discard(name)
            self._found.setdefault(same, (text, []))[1].append(layer)
            out.append(LayerClass(layer, same, text.sizes, text.draws))
        return out

    def _name(self, layer: Layer, layers: list[Layer]) -> str:
        """The name of a layer's class: the user's own. If several layers have it, the container's name is put before
        it, as in `EncoderBlock`, or a number behind it."""
        name = layer.title if layer.title.isidentifier() else "Layer"
        if Counter(o.title for o in layers)[layer.title] > 1:
            name = _container(layer, [o for o in layers if o.title == layer.title]) + name
        stem, i = name, 2
        while name in self._taken or name in RESERVED:
            name, i = f"{stem}{i}", i + 1
        self._taken.add(name)
        return name


def _container(layer: Layer, others: list[Layer]) -> str:
    """`Encoder` for `encoder.block.0`, if one of the others is `decoder.block.0`."""
    paths = {o: o.first.name.rpartition(".")[0].split(".") for o in others}
    own = [p for p in paths[layer] if not p.isdigit() and not all(p in path for path in paths.values())]
    return "".join(w[:1].upper() + w[1:] for w in re.split(r"\W|_", own[0])) if own else ""


def _without_comments(code: str) -> tuple[str, ...]:
    """The tokens of the body of a class."""
    tokens = generate_tokens(StringIO("class _:\n" + code + "\n").readline)
    return tuple(t.string for t in tokens if t.type not in (COMMENT, NL))


def _docstring(layers: list[Layer]) -> str:
    """`h.0 … h.71 (72 alike)`: the modules that a class is."""
    said = []
    for layer in layers:
        names = layer.instances
        text = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)} alike)"
        calls = len(layer.frames) // len(names)
        said.append(text + (f", called {calls} times" if len(layer.frames) > len(names) else ""))
    return shortened(f'    """{"; ".join(said)}"""')
