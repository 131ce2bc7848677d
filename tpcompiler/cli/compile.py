"""`tpc shard`, `diff`, `verify` and `explain`: the commands that compile a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from tpcompiler.cli.options import AsJson, Model, Set, SpecFile
from tpcompiler.cli.screen import Screen, Stages
from tpcompiler.errors import TpcError

if TYPE_CHECKING:
    import torch

    from tpcompiler.api import Sharded
    from tpcompiler.load.target import Loaded
    from tpcompiler.spec.schema import Spec


@contextmanager
def loaded_for(model: str, spec: Path, settings: list[str] | None, stages: Stages) -> Iterator[tuple[Loaded, Spec]]:
    """Loads a command's model and spec. Within the block, the modules next to the model can be imported."""
    from tpcompiler.spec.schema import Spec

    read = Spec.load(spec)
    stages("loading the model")
    from tpcompiler.load.model import load_model, parse_settings

    loaded = load_model(model, read, parse_settings(settings or []))
    with loaded.environment:
        yield loaded, read


def compiled(loaded: Loaded, spec: Spec, stages: Stages) -> Sharded:
    """The command's model, compiled and proven."""
    from tpcompiler.api import shard

    return shard(loaded.build, loaded.inputs(), spec, progress=stages, source=loaded.source)


def shard(
    model: Model,
    spec: SpecFile,
    out: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Write the program, the manifest, and the weights if any."),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option("--weights", "-w", metavar="FILE", help="Weights to shard: safetensors, a .pt file, a directory."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace DIR even if it holds weights or a checkpoint.")
    ] = False,
    settings: Set = None,
    as_json: AsJson = False,
) -> None:
    """Compile a model for the ranks of a spec.

    Shows blocks, collectives, memory per rank and what stays replicated. With -o, writes the program, its manifest and
    the weights.
    """
    screen = Screen(as_json)
    with screen.open(), screen.progress() as stages:
        if out is not None and not force:  # before minutes of compiling
            from tpcompiler.weights import refuse_to_replace

            refuse_to_replace(out)
        with loaded_for(model, spec, settings, stages) as (loaded, read):
            sharded = compiled(loaded, read, stages)
        if out is not None:
            stages(f"writing {out}")
            sharded.write(out, weights or loaded.weights, progress=stages.bytes, force=force)
    from tpcompiler.cli import tables

    report = sharded.report()
    screen.show(
        tables.heading(loaded.name, loaded.source, str(read.ranks)),
        tables.shard_report(report, read.hardware.memory_gib),
    )
    if out is not None:
        screen.show(Text("written to ").append(str(out), style="bold"))
    screen.result(report)


def diff(
    model: Model,
    spec: SpecFile,
    context: Annotated[
        int | None,
        typer.Option(
            "--context", "-U", metavar="N", help="How many equal lines to show around each change. Default: all."
        ),
    ] = None,
    settings: Set = None,
    as_json: AsJson = False,
) -> None:
    """Show the plain and the sharded program side by side.

    Collectives are in colour, and equal layers are shown once.
    """
    from tpcompiler.cli import sides

    screen = Screen(as_json)
    with screen.open(), screen.progress() as stages:
        with loaded_for(model, spec, settings, stages) as (loaded, read):
            sharded = compiled(loaded, read, stages)
            from tpcompiler.api import compile_capture

            plain = compile_capture(sharded.capture, read.with_(mesh={"tensor": 1}), progress=stages).proven()
            stages("writing both programs")
            programs = [sides.body(program.source.splitlines()) for program in (plain, sharded)]
    lines = sides.align(*programs)
    shown = sides.squeeze(sides.fold_layers(lines), context)
    screen.show(sides.Picture(shown, ("one rank", f"a rank of {read.ranks}")), width=180)
    screen.result({"lines": [sides.as_dict(line) for line in lines], "collectives": sharded.report()["collectives"]})


def verify(
    model: Model,
    spec: SpecFile,
    dtype: Annotated[
        str, typer.Option("--dtype", help="The precision to compare in: float64, float32, bfloat16.")
    ] = "float64",
    micro_batches: Annotated[
        int, typer.Option("--micro-batches", min=1, help="How many micro-batches to accumulate gradients over.")
    ] = 3,
    distributed: Annotated[
        bool,
        typer.Option(
            "--distributed", help="Also run the emitted source with written weights, each rank in its own process."
        ),
    ] = False,
    settings: Set = None,
    as_json: AsJson = False,
) -> None:
    """Run all ranks and compare with the plain model.

    Outputs, loss and every gradient must agree. If they do not, the exit code is 1.
    """
    screen = Screen(as_json)
    with screen.open(), screen.progress() as stages:
        with loaded_for(model, spec, settings, stages) as (loaded, read):
            from tpcompiler.verification.verify import verify as run

            report = run(
                loaded.build,
                loaded.inputs(),
                read,
                dtype=_dtype(dtype),
                source=loaded.source,
                micro_batches=micro_batches,
                distributed=distributed,
                progress=stages,
            )
    from tpcompiler.cli import tables

    result = report.as_dict()
    screen.show(tables.heading(loaded.name, loaded.source, str(report.mesh)), tables.verify_report(result))
    screen.result(result)
    if not report.passed:
        raise typer.Exit(1)


def explain(
    model: Model,
    spec: SpecFile,
    name: Annotated[str, typer.Argument(metavar="NAME", help="A parameter, a module, or a glob over either.")],
    settings: Set = None,
    as_json: AsJson = False,
) -> None:
    """Show why a parameter is split or not.

    Prints the axes that its dimensions are made of, and for each axis that is whole the line of the model that needs it
    whole.
    """
    screen = Screen(as_json)
    with screen.open(), screen.progress() as stages:
        with loaded_for(model, spec, settings, stages) as (loaded, read):
            sharded = compiled(loaded, read, stages)
            from tpcompiler.plan.explain import explain as explained

            rows = [e.as_dict() for e in explained(sharded.capture, sharded.axes, sharded.plan, name)]
    from tpcompiler.cli import tables

    screen.show(tables.explain_report(rows))
    screen.result({"parameters": rows})


def _dtype(name: str) -> torch.dtype:
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TpcError(f"--dtype {name}: not a floating-point type of torch; write float64, float32 or bfloat16")
    return dtype
