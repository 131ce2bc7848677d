"""`tpc export`: a spec's plan in the words of another library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from tpcompiler.cli.compile import compiled, loaded_for
from tpcompiler.cli.options import AsJson, Model, Set, SpecFile
from tpcompiler.cli.screen import Screen
from tpcompiler.errors import SpecError


def export(
    model: Model,
    spec: SpecFile,
    form: Annotated[str, typer.Option("--format", "-f", metavar="FORM", help="hf-tp-plan, dtensor or megatron-args.")],
    out: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to write it. Default: stdout.")
    ] = None,
    settings: Set = None,
    as_json: AsJson = False,
) -> None:
    """Say a spec's plan in the words of another library.

    transformers' tp_plan, a call of torch's parallelize_module, or arguments of Megatron-LM. An axis that the other
    library has no words for stays whole there; a line on stderr says which one and why.
    """
    screen = Screen(as_json)
    with screen.open(), screen.progress() as stages:
        from tpcompiler.export.plan_texts import FORMATS, exported
        from tpcompiler.weights.atomic import replacing_file

        if form not in FORMATS:
            raise SpecError(f"--format {form}: there is none of this name; write {', '.join(FORMATS)}")
        if out is not None and not out.parent.is_dir():
            raise SpecError(f"--output {out}: there is no directory {out.parent}")
        with loaded_for(model, spec, settings, stages) as (loaded, read):
            sharded = compiled(loaded, read, stages)
        text, unsaid = exported(sharded, form)
        if out is not None:
            with replacing_file(out) as new:
                new.write_text(text)
    if not as_json:
        for u in unsaid:
            screen.err.write(f"tpc: {u}\n")
    screen.show(Text(text.rstrip()) if out is None else Text("written to ").append(str(out), style="bold"))
    screen.result({"format": form, "text": text, "unsaid": [{**vars(u), "said": str(u)} for u in unsaid]})
