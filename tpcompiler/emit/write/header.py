"""The docstring of the file: what it was made from, what is communicated, and how to run it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from textwrap import wrap
from typing import Any

from tpcompiler.emit.text.expr import quoted
from tpcompiler.emit.text.wrap import LIMIT
from tpcompiler.errors import format_bytes
from tpcompiler.program import Collective, Program

_REASON = 20  # the narrowest column for reasons
_HANG = " " * 8


def header(program: Program) -> list[str]:
    """The file's docstring."""
    capture, mesh = program.capture, program.mesh
    made = capture.model + (f" of {capture.source}" if capture.source else "")
    whom = "for one rank" if mesh.size == 1 else f"for each rank of a mesh of {mesh}"
    return [
        f'"""{_plain(made)}, {whom}.',
        "",
        "Written by tpcompiler. It needs torch and tpcompiler.runtime.",
        *_collectives(program.collectives),
        "",
        "To run it:",
        "",
        f"    # torchrun --nproc-per-node {mesh.size} run.py",
        "    from tpcompiler.runtime import Mesh, Ranks, load",
        "    from model import Model",
        "",
        f"    ranks = Ranks.from_env(Mesh.of({{{', '.join(f'{quoted(n)}: {d}' for n, d in mesh.dims)}}}))",
        "    model = Model(ranks)",
        '    load(model, ".", ranks)  # the directory that this file stands in',
        '"""',
    ]


def _plain(text: str) -> str:
    return text.replace("\\", "/").replace('"', "'")


def _collectives(collectives: tuple[Collective, ...]) -> Iterable[str]:
    """A table of what is communicated in a step. Equal layers share a line."""
    found: dict[tuple[Any, ...], int] = {}
    for c in collectives:
        row = (re.sub(r"\d+", "*", c.block), c.kind, c.direction, c.over, c.bytes, c.reason)
        found[row] = found.get(row, 0) + 1
    if not found:
        return
    yield from ("", "What crosses ranks in a step, at the sizes of the example:", "")
    rows = [
        (f"{times} ×", kind.replace("_", "-"), direction, "·".join(over), format_bytes(size), block, reason)
        for (block, kind, direction, over, size, reason), times in found.items()
    ]
    widths = [max(len(r[i]) for r in rows) for i in range(6)]
    wide = 4 + sum(w + 2 for w in widths) > LIMIT - _REASON
    for *cells, block, reason in rows:
        lead = "    " + "".join(c.ljust(w + 2) for c, w in zip(cells, widths, strict=False))
        if wide:  # There is no room for columns of blocks and reasons.
            lines = [lead.rstrip(), *wrap(f"{block}: {reason}", LIMIT, initial_indent=_HANG, subsequent_indent=_HANG)]
        else:
            lead += block.ljust(widths[5] + 2)
            lines = wrap(reason, LIMIT, initial_indent=lead, subsequent_indent=" " * len(lead))
        yield from map(_plain, lines)
