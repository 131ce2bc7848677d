"""`tpc train`, `eval`, `plot` and `reshard`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tpcompiler.cli.options import AsJson, Model, Set, SpecFile
from tpcompiler.cli.screen import Screen, complain, our_warnings
from tpcompiler.errors import TpcError

if TYPE_CHECKING:
    from tpcompiler.spec.schema import Spec
    from tpcompiler.train.hold.mapping import Renaming
    from tpcompiler.train.settings import Train

Change = tuple[tuple[str, ...], Any, str]  # a key of the spec, its value, and the option that gave it
Ranks = Annotated[
    int | None,
    typer.Option(
        "--nproc",
        "-n",
        min=1,
        metavar="N",
        help="How many ranks to run on this host. More than the tensor degree are data ranks. Default: the spec's.",
    ),
]
Tensor = Annotated[
    int | None,
    typer.Option("--tensor", min=1, metavar="N", help="The tensor degree, instead of the spec's mesh.tensor."),
]
Device = Annotated[
    str | None, typer.Option("--device", metavar="KIND", help="cuda or cpu. Default: cuda if there is a GPU.")
]
Timeout = Annotated[
    float,
    typer.Option(
        "--timeout",
        min=1,
        metavar="S",
        help="Seconds without an answer after which a rank counts as lost, and the run ends.",
    ),
]
Strip = Annotated[str, typer.Option("--strip", metavar="PREFIX", help="A prefix that the weights' names lose.")]
Rename = Annotated[
    list[str] | None,
    typer.Option("--rename", metavar="OLD=NEW", help="Replaces OLD by NEW in the weights' names. Can be repeated."),
]
Transpose = Annotated[
    list[str] | None,
    typer.Option("--transpose", metavar="GLOB", help="Matrices that the weights store transposed. Can be repeated."),
]
TrainSet = Annotated[
    list[str] | None,
    typer.Option(
        "--train",
        "-t",
        metavar="KEY=VALUE",
        help="Replaces a setting of the spec's train: section, e.g. optimizer.lr=1e-3.",
    ),
]


def train(
    model: Model,
    spec: SpecFile,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", "-d", metavar="PATH", help="Text, .jsonl or token files, instead of the spec's. Can be repeated."
        ),
    ] = None,
    nproc: Ranks = None,
    tensor: Tensor = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="RUN",
            help="Keeps the log and the checkpoints in RUN. A run that has checkpoints there continues.",
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option("--weights", "-w", metavar="FILE", help="Starts from these weights instead of new ones."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, metavar="N", help="How many steps, instead of the spec's train.steps."),
    ] = None,
    train_settings: TrainSet = None,
    settings: Set = None,
    strip: Strip = "",
    rename: Rename = None,
    transpose: Transpose = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Shows where in --weights each parameter is found, and stops.")
    ] = False,
    stop_after: Annotated[
        str | None,
        typer.Option("--stop-after", metavar="TIME", help="Writes a checkpoint after this time, and ends: 3h50m, 90s."),
    ] = None,
    allow_changed: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-changed",
            metavar="KEY",
            help="Continues RUN although this setting differs from what it began with. A glob. Can be repeated.",
        ),
    ] = None,
    device: Device = None,
    timeout: Timeout = 600.0,
    as_json: AsJson = False,
) -> None:
    """Train a model on the ranks of a spec.

    Starts the ranks on this host, or joins those that torchrun started. Continues from the newest checkpoint in RUN.
    SIGTERM, Ctrl-C, SIGUSR1 and --stop-after write a checkpoint first; the exit codes are 143, 130, 0 and 0.
    """
    from tpcompiler.train.run.stop import parse_duration

    changes = _train_changes(train_settings, data, steps)
    seconds = None if stop_after is None else parse_duration(stop_after)
    read = _spec(spec, nproc, tensor, changes)
    if dry_run:
        _show_names(model, read, settings, weights, _renaming(strip, rename, transpose), as_json)
        return
    if _starts(read):
        raise typer.Exit(_start(read))
    from tpcompiler.train.run.launch import join
    from tpcompiler.train.run.together import together

    screen = Screen(as_json)
    with _live(screen):
        from tpcompiler.load.model import load_model, parse_settings
        from tpcompiler.train.run.loop import run
        from tpcompiler.train.run.saving import Start

        with _first_rank_says():
            place = join(read.ranks.size, device, timeout)

        def tell(line: str) -> None:
            if place.rank == 0:
                screen.err.write(line + "\n")

        with together(place, lambda line: _complain(screen, line)):
            loaded = load_model(model, read, parse_settings(settings or []))
            renaming = _renaming(strip, rename, transpose)
            start = Start(weights or loaded.weights, renaming, tuple(allow_changed or ()))
            report = run(loaded, read, _train(read), place, out, start=start, stop_after=seconds, tell=tell)
    if report.stopped is not None:
        tell(f"stopped by {report.stopped} after step {report.steps}; the same command continues")
    if place.rank == 0:
        screen.result(report.as_dict())
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def _renaming(strip: str, rename: list[str] | None, transpose: list[str] | None) -> Renaming:
    from tpcompiler.train.hold.mapping import Renaming

    return Renaming(strip, tuple(rename or ()), tuple(transpose or ()))


def _show_names(
    model: str, spec: Spec, settings: list[str] | None, weights: Path | None, renaming: Renaming, as_json: bool
) -> None:
    """`--dry-run`: where each parameter is in the weights. Nothing is compiled, and no value is read."""
    from tpcompiler.load.model import load_model, parse_settings
    from tpcompiler.train.run.saving import names_in

    screen = Screen(as_json)
    with screen.open():
        loaded = load_model(model, spec, parse_settings(settings or []))
        there = weights or loaded.weights
        if there is None:
            raise TpcError("tpc train --dry-run: shows how weights are read; give --weights FILE")
        names = names_in(loaded, there, renaming)
    screen.show(*names.lines(), width=1000)
    screen.result({"names": dict(names.stored), "transposed": sorted(names.transposed)})


def evaluate(
    model: Model,
    spec: SpecFile,
    weights: Annotated[
        Path,
        typer.Option("--weights", "-w", metavar="DIR", help="A run, a checkpoint, what `tpc shard` wrote, or a file."),
    ],
    perplexity: Annotated[
        Path | None,
        typer.Option("--perplexity", metavar="FILE", help="A text: its perplexity over overlapping windows."),
    ] = None,
    cloze: Annotated[
        Path | None,
        typer.Option("--cloze", metavar="FILE", help="Texts, one a line or .jsonl: is each one's last word guessed?"),
    ] = None,
    stride: Annotated[int, typer.Option("--stride", min=1, help="Tokens from one window to the next.")] = 32,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Windows at once on a rank.")] = 8,
    wikitext: Annotated[
        bool, typer.Option("--wikitext", help="The text has spaces around its punctuation, as WikiText's files do.")
    ] = False,
    strip: Strip = "",
    rename: Rename = None,
    transpose: Transpose = None,
    nproc: Ranks = None,
    tensor: Tensor = None,
    train_settings: TrainSet = None,
    settings: Set = None,
    device: Device = None,
    timeout: Timeout = 600.0,
    as_json: AsJson = False,
) -> None:
    """Measure a causal language model.

    Perplexity by the original words, and cloze accuracy, as the Megatron-LM paper does.
    """
    if perplexity is None and cloze is None:
        raise TpcError("eval: nothing to measure; give --perplexity FILE, --cloze FILE, or both")
    read = _spec(spec, nproc, tensor, _train_changes(train_settings, None, None))
    if _starts(read):
        raise typer.Exit(_start(read))
    from tpcompiler.train.run.launch import join
    from tpcompiler.train.run.together import together

    screen = Screen(as_json)
    with _live(screen):
        from tpcompiler.load.model import load_model, parse_settings
        from tpcompiler.train.evaluate.measure import Question, measure

        with _first_rank_says():
            place = join(read.ranks.size, device, timeout)
        with together(place, lambda line: _complain(screen, line)):
            loaded = load_model(model, read, parse_settings(settings or []))
            question = Question(perplexity, cloze, stride, batch, wikitext, _renaming(strip, rename, transpose))
            result = measure(loaded, read, _train(read), place, weights, question)
    if place.rank == 0:
        screen.show(*(f"{key}  {value:.6g}" for key, value in result.items()))
        screen.result(result)


def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Directories of runs, or their log.jsonl.")],
    out: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The picture: .png, .svg or .pdf.")
    ] = Path("loss.png"),
    labels: Annotated[
        list[str] | None,
        typer.Option("--label", "-l", metavar="TEXT", help="What to call a run; one for each, in order."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw the loss curves of runs over each other."""
    screen = Screen(as_json)
    with screen.open():
        from tpcompiler.train.show.plot import plot as draw

        written = draw(runs, out, labels)
    screen.show(str(written))
    screen.result({"file": str(written), "runs": [str(r) for r in runs]})


def reshard(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What `tpc shard -o` or a checkpoint wrote.")],
    spec: SpecFile,
    out: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="The new directory.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="MODEL", help="The plain model, for layouts that DIR's own cannot be turned into."
        ),
    ] = None,
    settings: Set = None,
    as_json: AsJson = False,
) -> None:
    """Move weights to another degree or mesh.

    Slice by slice, bit for bit; optimizer state goes with its parameters.
    """
    screen = Screen(as_json)
    with screen.open(), screen.progress() as stages:
        stages("reading the layouts")
        from tpcompiler.spec.schema import Spec
        from tpcompiler.train.run.reshard import reshard as move

        read = Spec.load(spec)
        manifest = move(directory, read, out, model=model, settings=settings or [], progress=stages.bytes, tell=stages)
    screen.show(f"{out}  {manifest.mesh}, {len(manifest.files)} files")
    screen.result({"mesh": dict(manifest.mesh.dims), "files": [f.name for f in manifest.files]})


@contextmanager
def _live(screen: Screen) -> Iterator[None]:
    """Shows what a command says at once: it may run for days."""
    with redirect_stdout(screen.err), our_warnings():
        yield


def _complain(screen: Screen, line: str) -> None:
    with redirect_stdout(screen.out):
        complain(line, screen.as_json)
        sys.stdout.flush()


def _spec(path: Path, nproc: int | None, tensor: int | None, changes: list[Change]) -> Spec:
    """The spec with the command's settings, its data degree such that all ranks have a place.

    What is wrong with it is said before anything is started; of ranks that run already, by the first.
    """
    with _first_rank_says():
        return _fitted(path, nproc, tensor, changes)


@contextmanager
def _first_rank_says() -> Iterator[None]:
    """Of ranks that all make the same mistake, such as `--device cuda` without a GPU, the first one reports it."""
    from tpcompiler.train.run.launch import launched

    try:
        yield
    except TpcError:
        if launched() and os.environ["RANK"] != "0":
            raise typer.Exit(2) from None
        raise


def _fitted(path: Path, nproc: int | None, tensor: int | None, changes: list[Change]) -> Spec:
    from tpcompiler.spec.schema import Spec
    from tpcompiler.train.run.launch import launched

    read = Spec.load(path)
    for key, value, said in changes:
        read = read.put(key, value, said)
    _train(read)
    if tensor is not None:
        read = read.put(("mesh", "tensor"), tensor, f"--tensor {tensor}")
    ranks = int(os.environ["WORLD_SIZE"]) if launched() else nproc
    if ranks is None or ranks == read.ranks.size:
        return read
    degree = read.mesh.tensor
    if ranks % degree:
        raise TpcError(
            f"{ranks} ranks are not a multiple of the tensor degree {degree}; {-(-ranks // degree) * degree} ranks or "
            f"--tensor {ranks} would work"
        )
    return read.with_(mesh={"tensor": degree, "data": ranks // degree})


def _train(spec: Spec) -> Train:
    from tpcompiler.train.settings import Train

    return spec.section(Train)


def _train_changes(settings: list[str] | None, data: list[str] | None, steps: int | None) -> list[Change]:
    """What the options change in the spec's train: section; those that have a name of their own win over `-t`."""
    from tpcompiler.load.model import parse_settings

    changes: list[Change] = []
    for setting in settings or []:
        for key, value in parse_settings([setting], "--train").items():
            changes.append((("train", *key.split(".")), value, f"--train {setting}"))
    if data:
        changes.append((("train", "data", "path"), list(data), "--data"))
    if steps is not None:
        changes.append((("train", "steps"), steps, f"--steps {steps}"))
    return changes


def _starts(spec: Spec) -> bool:
    """Whether this process is to start the ranks, rather than to be one."""
    from tpcompiler.train.run.launch import launched

    return spec.ranks.size > 1 and not launched()


def _start(spec: Spec) -> int:
    from tpcompiler.train.run.launch import launch

    return launch(sys.argv[1:], spec.ranks.size)
