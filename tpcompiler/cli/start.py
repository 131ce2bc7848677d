"""`tpc doctor` and `tpc init`: show what this machine can do, and write a first spec for a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from tpcompiler.cli.options import AsJson, Model, Set
from tpcompiler.cli.screen import Screen
from tpcompiler.errors import SpecError

if TYPE_CHECKING:
    from tpcompiler.cli.findings import Finding

_MARKS = {"ok": ("works", "green"), "limited": ("limited", "yellow"), "missing": ("missing", "red")}


def doctor(as_json: AsJson = False) -> None:
    """Show what works on this machine: versions, devices, links and packages.

    If something that every command needs is missing, the exit code is 1.
    """
    screen = Screen(as_json)
    with screen.open():
        from tpcompiler.cli.findings import findings

        found = findings()
    screen.show(_table(found))
    needed = [f for f in found if f.state == "missing"]
    screen.result({"findings": [vars(f) for f in found], "usable": not needed})
    if needed:
        raise typer.Exit(1)


def _table(found: list[Finding]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("", "found", "", "what it means"):
        table.add_column(name)
    for f in found:
        word, colour = _MARKS[f.state]
        table.add_row(f.what, f.found, Text(word, style=colour), f.means)
    return table


def init(
    model: Model,
    out: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write it.")] = Path("spec.yaml"),
    tensor: Annotated[int, typer.Option("--tensor", min=2, metavar="N", help="Ranks that share the model.")] = 2,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
    settings: Set = None,
    as_json: AsJson = False,
) -> None:
    """Write a first spec for a model, with comments.

    The model is compiled first. The spec therefore names only blocks that the model has, and is known to work.
    """
    screen = Screen(as_json)
    with screen.open(), screen.progress() as stages:
        if out.exists() and not force:
            raise SpecError(f"{out}: exists already; --force replaces it, -o FILE writes another file")
        from tpcompiler.api import shard
        from tpcompiler.load.model import load_model, parse_settings
        from tpcompiler.spec.first import first_spec
        from tpcompiler.spec.schema import Spec
        from tpcompiler.weights.atomic import replacing_file

        given = parse_settings(settings or [])
        spec = Spec.load({"mesh": {"tensor": tensor}})
        stages("loading the model")
        loaded = load_model(model, spec, given)
        with loaded.environment:
            made = shard(loaded.build, loaded.inputs(), spec, progress=stages, source=loaded.source)
        blocks = [
            (b.kind, f"{b.name}: {b.layers} × {b.axis}, {b.size} = {b.local[0]} a rank") for b in made.plan.blocks
        ]
        text = first_spec(model, tensor, given, loaded.accepts, blocks)
        Spec.parse(text, str(out))
        with replacing_file(out) as new:
            new.write_text(text)
    screen.show(Text(text), Text("written to ").append(str(out), style="bold"))
    screen.result({"written": str(out), "spec": text})
