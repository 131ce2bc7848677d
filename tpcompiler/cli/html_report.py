"""`tpc report`: what was done to a model, as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from tpcompiler.cli.compile import compiled, loaded_for
from tpcompiler.cli.options import AsJson, Model, Set, SpecFile
from tpcompiler.cli.screen import Screen
from tpcompiler.errors import SpecError


def report(
    model: Model,
    spec: SpecFile,
    out: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page.")] = Path("report.html"),
    settings: Set = None,
    as_json: AsJson = False,
) -> None:
    """Write one page of HTML that shows what was done to a model.

    Blocks and their axes, collectives, memory a rank, the predicted timeline of a layer, the diff, the spec, and the
    verdict of the check. The page is one file and loads nothing.
    """
    screen = Screen(as_json)
    with screen.open(), screen.progress() as stages:
        if out.is_dir() or not out.parent.is_dir():
            what = "is a directory; write a file's name" if out.is_dir() else f"there is no directory {out.parent}"
            raise SpecError(f"--output {out}: {what}")
        from tpcompiler.api import compile_capture
        from tpcompiler.cli import sides
        from tpcompiler.report.page_facts import page_facts
        from tpcompiler.report.predicted import predicted
        from tpcompiler.report.written_page import written_page
        from tpcompiler.weights.atomic import replacing_file

        with loaded_for(model, spec, settings, stages) as (loaded, read):
            sharded = compiled(loaded, read, stages)
            plain = compile_capture(sharded.capture, read.with_(mesh={"tensor": 1}), progress=stages)
            stages("predicting")
            found = predicted(sharded)
        stages("writing the page")
        programs = [sides.body(program.source.splitlines()) for program in (plain, sharded)]
        lines = [sides.as_dict(line) for line in sides.fold_layers(sides.align(*programs))]
        text = written_page(page_facts(sharded, found, lines, loaded.name))
        with replacing_file(out) as new:
            new.write_text(text)
    screen.show(Text("written to ").append(str(out), style="bold").append(f", {len(text) / 1024:.0f} KiB"))
    screen.result({"written": str(out), "bytes": len(text.encode()), "milliseconds": found.step.seconds * 1e3})
