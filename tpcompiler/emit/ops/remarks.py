"""What stands behind a statement: the shape where it changes, what crosses ranks."""

from __future__ import annotations

from torch import fx

from tpcompiler.emit.layers.outline import count, items
from tpcompiler.emit.names.names import Value
from tpcompiler.emit.names.scope import File


def shape_of(file: File, v: Value) -> str | None:
    """`[b, s, heads/8·96]`"""
    if isinstance(v, fx.Node):
        return file.shape(v)
    picked = items(v[0]).get(v[1])
    return None if picked is None else file.shape(picked)


def shape(file: File, node: fx.Node, first: Value | None) -> str:
    """The shape of a statement's result, "" if it is that of the value it begins with, `first`."""
    if count(node) is None:
        said = file.shape(node)
    else:
        picked = [s for _, u in sorted(items(node).items()) if (s := file.shape(u)) is not None]
        said = ", ".join(dict.fromkeys(picked)) + (" each" if len(picked) > 1 and len(set(picked)) == 1 else "")
    before = None if first is None else shape_of(file, first)
    return said if said and said not in (before, "[]") else ""


def notes(file: File, node: fx.Node) -> str:
    """`all-reduce 48.0 MiB`: the node's collectives, or whatever the stages before had to say of it."""
    found = file.collectives.get(node.name)
    if not found:
        return str(node.meta.get("note") or "")
    said = []
    for c in found:
        text = c.kind.replace("_", "-") + (f" {amount(c.bytes)}" if c.bytes else "")
        said.append(f"backward: {text}" if c.direction == "backward" else text)
    return ", ".join(said)


def amount(n: float) -> str:
    """A number of bytes for a reader: `48.0 MiB`."""
    if n < 1024:
        return f"{n:.0f} B"
    units = ["KiB", "MiB", "GiB", "TiB"]
    while n >= 1024 and len(units) > 1 and n >= 1024 * 1024:
        n, units = n / 1024, units[1:]
    return f"{n / 1024:.1f} {units[0]}"
