"""The file: a header, a class for each distinct layer, the model."""

from __future__ import annotations

import re
from collections import Counter

from tpcompiler.emit.layers.frames import Comparer, Frame, Names, frames
from tpcompiler.emit.layers.outline import Layer, outline
from tpcompiler.emit.layers.tidy import tidy
from tpcompiler.emit.names import symbols
from tpcompiler.emit.names.names import RESERVED, hints
from tpcompiler.emit.names.scope import File
from tpcompiler.emit.text.wrap import wrap
from tpcompiler.emit.write.classes import Classes
from tpcompiler.emit.write.header import header
from tpcompiler.emit.write.signature import signature
from tpcompiler.program import Collective, Program


def emit(program: Program) -> str:
    """One self-contained Python file: `class Model`, the program of every rank. Same program, same text.

    `Model(ranks, rng=None)` is a module with the plain model's parameter names and forward signature. The file
    imports torch and `tpcompiler.runtime` alone. Raises `TpcError` for a call that cannot be written as source.
    """
    graph = tidy(program.graph)
    nodes = {n.name: n for n in graph.nodes}
    output = next(n for n in graph.nodes if n.op == "output")
    inputs = [nodes[n] for n in program.capture.inputs]
    called = signature(program.capture)
    collectives: dict[str, list[Collective]] = {}
    for c in program.collectives:
        collectives.setdefault(c.node, []).append(c)
    names = Names(program.capture.parameters)
    letters = symbols.letters(inputs, {*called.tensors.values(), *called.constants})
    file = File(program.mesh, names, letters, hints(graph.nodes, names), collectives)
    comparer = Comparer(names, program.dims)
    root = frames(graph, names)
    written = _Layers(Classes(file, comparer, program.dims, called), comparer)
    layers = written.write(root, root=True)
    model, definitions = written.classes.model(root, layers, inputs, list(output.args[0]), program.capture)
    parts = [*definitions, *written.texts, model]
    head = [*header(program), "", *_imports("\n".join(parts), file.imports), ""]
    return "\n\n\n".join(["\n".join(head).rstrip(), *parts]) + "\n"


def _imports(code: str, operators: set[str]) -> list[str]:
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


class _Layers:
    """Writes the classes of layers, inner ones first, equal texts once."""

    def __init__(self, classes: Classes, comparer: Comparer) -> None:
        self.classes, self.comparer = classes, comparer
        self.texts: list[str] = []
        self._known: dict[str, str] = {}  # a class's text → its name
        self._taken: set[str] = {"Model", "Parameters", "Ranks", "Rng", "NamedTuple", "Any"}

    def write(self, frame: Frame, root: bool = False) -> list[Layer]:
        """The layers inside of `frame`, their classes written."""
        layers = outline(frame, self.comparer, root)
        self._name(layers)
        for layer in layers:
            docstring, text = self.classes.layer(layer, self.write(layer.first))
            same = self._known.get(text)
            if same is None:
                self._known[text] = layer.name
                self.texts.append(f"class {layer.name}(nn.Module):\n{docstring}\n{text}")
            else:  # the same class in another layer
                self._taken.discard(layer.name)
                layer.name = same
        return layers

    def _name(self, layers: list[Layer]) -> None:
        """The user's class names; two layers of one class by what contains them, or by number."""
        titles = Counter(layer.title for layer in layers)
        for layer in layers:
            name = layer.title if layer.title.isidentifier() else "Layer"
            if titles[layer.title] > 1:
                name = _prefix(layer, [o for o in layers if o.title == layer.title]) + name
            stem, i = name, 2
            while name in self._taken or name in RESERVED:
                name, i = f"{stem}{i}", i + 1
            self._taken.add(name)
            layer.name = name


def _prefix(layer: Layer, others: list[Layer]) -> str:
    """`Encoder` of `encoder.block.0`, where there is a `decoder.block.0` too."""
    paths = {id(o): o.first.name.rpartition(".")[0].split(".") for o in others}
    own = [p for p in paths[id(layer)] if not p.isdigit() and not all(p in path for path in paths.values())]
    return "".join(w[:1].upper() + w[1:] for w in re.split(r"\W|_", own[0])) if own else ""
