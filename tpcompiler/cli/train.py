"""`tpc train` and `tpc reshard`: train a model, and move weights and checkpoints to another mesh."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from tpcompiler.cli.options import AsJson, Set, SpecFile, command_with
from tpcompiler.cli.ranks import Change, RankOptions, Texts, joined, start_ranks, train_section
from tpcompiler.cli.screen import Screen
from tpcompiler.errors import TpcError


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RankOptions):
    """The options of `tpc train`."""

    data: Annotated[
        Texts,
        typer.Option("--data", "-d", metavar="PATH", help="Text, .jsonl or token files to train on. Can be repeated."),
    ] = None
    out: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="RUN",
            help="Keep the log and the checkpoints in RUN. A run that has checkpoints there continues.",
        ),
    ] = None
    weights: Annotated[
        Path | None,
        typer.Option("--weights", "-w", metavar="FILE", help="Start from these weights instead of new ones."),
    ] = None
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, metavar="N", help="How many steps to train, instead of the spec's train.steps."),
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show where in --weights each parameter is found, and stop.")
    ] = False
    stop_after: Annotated[
        str | None,
        typer.Option("--stop-after", metavar="TIME", help="Write a checkpoint and end after this time: 3h50m, 90s."),
    ] = None
    allow_changed: Annotated[
        Texts,
        typer.Option(
            "--allow-changed",
            metavar="KEY",
            help="Continue RUN although settings that match this glob have changed since it began. Can be repeated.",
        ),
    ] = None

    @property
    def changes(self) -> list[Change]:
        """The settings that the options change. Options such as `--steps` win over `--train`."""
        out = super().changes
        if self.data:
            out += [(("train", "data", "path"), list(self.data), "--data"), (("train", "data", "mix"), {}, "--data")]
        if self.steps is not None:
            out.append((("train", "steps"), self.steps, f"--steps {self.steps}"))
        return out


@command_with(TrainOptions)
def train(options: TrainOptions) -> None:
    """Train a model on the ranks of a spec.

    Starts the ranks on this host, or joins those that torchrun started. Continues from the newest checkpoint in RUN.
    SIGTERM, Ctrl-C, SIGUSR1 and --stop-after write a checkpoint first; the exit codes are 143, 130, 0 and 0.
    """
    from tpcompiler.train.run.stop import parse_duration

    seconds = None if options.stop_after is None else parse_duration(options.stop_after)
    spec = options.read_spec()
    if options.dry_run:
        _show_names(options)
        return
    start_ranks(spec)
    screen = Screen(options.as_json)
    with joined(screen, spec, options) as place:
        from tpcompiler.train.run.loop import run
        from tpcompiler.train.run.saving import Start

        def tell(line: str) -> None:
            if place.rank == 0:
                screen.err.write(line + "\n")

        loaded = options.load(spec)
        start = Start(options.weights or loaded.weights, options.renaming, tuple(options.allow_changed or ()))
        report = run(loaded, spec, train_section(spec), place, options.out, start=start, stop_after=seconds, tell=tell)
    if report.stopped is not None:
        tell(f"stopped by {report.stopped} after step {report.steps}; the same command continues")
    if place.rank == 0:
        screen.result(report.as_dict())
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def _show_names(options: TrainOptions) -> None:
    """`--dry-run`: shows where each parameter is in the weights. Nothing is compiled, and no value is read."""
    from tpcompiler.train.run.saving import names_in

    screen = Screen(options.as_json)
    with screen.open():
        loaded = options.load(options.read_spec())
        there = options.weights or loaded.weights
        if there is None:
            raise TpcError("tpc train --dry-run: shows where parameters are found in weights; give --weights FILE")
        names = names_in(loaded, there, options.renaming)
    screen.show(*names.lines(), width=1000)
    screen.result({"names": dict(names.stored), "transposed": sorted(names.transposed)})


def reshard(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An output of `tpc shard`, or a checkpoint.")],
    spec: SpecFile,
    out: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="The new directory.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="The plain model. It is needed where DIR's layouts cannot be turned into the spec's.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace OUT even if it holds weights or a checkpoint.")
    ] = False,
    settings: Set = None,
    as_json: AsJson = False,
) -> None:
    """Move weights to another degree or mesh.

    Values stay equal bit for bit. The optimizer's state moves with its parameters.
    """
    screen = Screen(as_json)
    with screen.open(), screen.progress() as stages:
        from tpcompiler.spec.schema import Spec
        from tpcompiler.train.run.reshard import reshard as move
        from tpcompiler.weights import refuse_to_replace

        if not force:
            refuse_to_replace(out)
        stages("reading the layouts")
        read = Spec.load(spec)
        manifest = move(directory, read, out, model=model, settings=settings or [], progress=stages.bytes, tell=stages)
    screen.show(f"{out}  {manifest.mesh}, {len(manifest.files)} files")
    screen.result({"mesh": dict(manifest.mesh.dims), "files": [f.name for f in manifest.files]})
