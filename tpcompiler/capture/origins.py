"""Where a node comes from: the modules whose forward ran it, and the user's line."""

from __future__ import annotations

import os
import re
from typing import Any

import torch
from torch import fx

_TORCH = os.path.dirname(torch.__file__) + os.sep
_SLICED = re.compile(r"slice\((None|-?\d+), (None|-?\d+), (None|\d+)\)\.(\d+)")
_FRAME = re.compile(r'^ *File "(?P<file>[^"]+)", line (?P<line>\d+), in .*\n(?:    (?P<code>.*))?', re.MULTILINE)


def stack_of(node: fx.Node) -> tuple[tuple[str, str, int], ...]:
    """(qualified name, class name, call number) of the modules around the node, outermost first."""
    out = []
    for key, (name, cls) in (node.meta.get("nn_module_stack") or {}).items():
        call = key.rsplit("@", 1)[1] if "@" in key else "0"
        cls = cls if isinstance(cls, str) else cls.__qualname__
        out.append((_SLICED.sub(_of_slice, name.split("@")[0]), cls.rsplit(".", 1)[-1], int(call)))
    return tuple(out)


def _of_slice(found: re.Match[str]) -> str:
    """`layers[1:]` is a list of its own to torch: its member 0 is the model's member 1."""
    start, step, i = (0 if found[1] == "None" else int(found[1])), found[3], int(found[4])
    if start < 0:
        return found[0]
    return str(start + i * (1 if step == "None" else int(step)))


def draws_apart(node: fx.Node) -> bool:
    """Whether a node draws random numbers that would differ between ranks, as all but dropout's do."""
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    if random and (at_train := recurrent_mode(node)) is not None:
        random = bool(node.args[at_train] and node.args[at_train - 1])  # dropout between its layers
    return random and not any(name in str(node.target) for name in ("dropout", "scaled_dot_product"))


def recurrent_mode(node: fx.Node) -> int | None:
    """The position of a recurrent network's argument `train`, which stands behind its `dropout`."""
    schema = getattr(node.target, "_schema", None)
    names = [a.name for a in schema.arguments] if schema is not None else []
    return names.index("train") if "train" in names and "dropout" in names else None


def line_of(node: fx.Node) -> tuple[str, int, str] | None:
    """The innermost line of the node's stack trace that is not torch's own."""
    found: dict[str, Any] | None = None
    for match in _FRAME.finditer(node.meta.get("stack_trace") or ""):
        if not match["file"].startswith(_TORCH):
            found = match.groupdict()
    return (found["file"], int(found["line"]), (found["code"] or "").strip()) if found else None


def at(node: fx.Node) -> str:
    """`file:line: source` for messages, or the node's own name."""
    line = node.meta.get("line") or line_of(node)
    return f"{line[0]}:{line[1]}: {line[2]}" if line else node.name
