"""The comments at the ends of statements: shapes where they change, and what is communicated."""

from __future__ import annotations

from torch import fx

from tpcompiler.emit.names import symbols
from tpcompiler.emit.ops.nodes import NodeResult, count, items, node_of
from tpcompiler.emit.write.scope import File
from tpcompiler.errors import format_bytes
from tpcompiler.graphs import note_of


def shape_of(file: File, v: NodeResult) -> str | None:
    """`[b, s, heads/8·96]`"""
    node = node_of(v)
    return None if node is None else symbols.shape(node, file.letters, file.mesh)


def new_shape(file: File, node: fx.Node, first: NodeResult | None) -> str:
    """The shape of a statement's result, "" if it is the shape of `first`, the value that the statement begins with."""
    if count(node) is None:
        said = shape_of(file, node)
    else:
        picked = [s for _, u in sorted(items(node).items()) if (s := shape_of(file, u)) is not None]
        said = ", ".join(dict.fromkeys(picked)) + (" each" if len(picked) > 1 and len(set(picked)) == 1 else "")
    before = None if first is None else shape_of(file, first)
    return said if said and said not in (before, "[]") else ""


def notes(file: File, node: fx.Node) -> str:
    """`all-reduce 48.0 MiB`: the node's collectives, or else the note that an earlier stage made."""
    found = file.collectives.get(node.name)
    if not found:
        return note_of(node)
    said = []
    for c in found:
        text = c.kind.replace("_", "-") + (f" {format_bytes(c.bytes)}" if c.bytes else "")
        said.append(f"backward: {text}" if c.direction == "backward" else text)
    return ", ".join(said)
