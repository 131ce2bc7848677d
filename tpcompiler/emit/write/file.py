"""The file: a header, a class for each distinct layer, the model."""

from __future__ import annotations

import re
from collections import Counter

from torch import fx

from tpcompiler.emit.layers.alike import Comparer
from tpcompiler.emit.layers.frames import Frame, frames
from tpcompiler.emit.layers.outline import Layer, outline
from tpcompiler.emit.layers.parameters import ParameterNames
from tpcompiler.emit.layers.statements import LayerClass
from tpcompiler.emit.layers.tidy import tidy
from tpcompiler.emit.names import symbols
from tpcompiler.emit.names.hints import hints
from tpcompiler.emit.names.namer import RESERVED
from tpcompiler.emit.ops.values import runtime_name
from tpcompiler.emit.text.wrap import wrap
from tpcompiler.emit.write.classes import ClassWriter
from tpcompiler.emit.write.header import header
from tpcompiler.emit.write.scope import File
from tpcompiler.emit.write.signature import signature
from tpcompiler.program import Collective, Program


def emit(program: Program) -> str:
    """The program of every rank as one self-contained Python file with a class `Model`.

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
    names = ParameterNames(program.capture.parameters)
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
    used = [n for n in ("Parameters", "Ranks", "Rng", *sorted(operators)) if re.search(rf"\b{n}\b", code)]
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
    """The classes of layers in the order in which they must stand: inner ones first. Equal code is written once."""

    def __init__(self, writer: ClassWriter, comparer: Comparer) -> None:
        self.writer, self.comparer = writer, comparer
        self.texts: list[str] = []
        self._by_code: dict[str, str] = {}  # code → name of the class
        self._taken: set[str] = {"Model", "Parameters", "Ranks", "Rng", "NamedTuple", "Any"}

    def inside(self, frame: Frame, root: bool = False) -> list[LayerClass]:
        """Writes the classes of the layers inside of `frame`."""
        layers = outline(frame, self.comparer, root)
        out = []
        for layer, name in [(layer, self._name(layer, layers)) for layer in layers]:
            text = self.writer.layer(layer, self.inside(layer.first))
            same = self._by_code.setdefault(text.code, name)
            if same == name:
                self.texts.append(f"class {name}(nn.Module):\n{text.docstring}\n{text.code}")
            else:
                self._taken.discard(name)
            out.append(LayerClass(layer, same, text.sizes, text.draws))
        return out

    def _name(self, layer: Layer, layers: list[Layer]) -> str:
        """The user's class name; with what contains the layer, or a number, if several layers are of that class."""
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
