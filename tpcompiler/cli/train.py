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
    from tpcompiler.train.run.config import Train

Change = tuple[tuple[str, ...], Any, str]  # a key of the spec, its value, and the option that gave it
Ranks = Annotated[
    int | None,
    typer.Option(
        "--nproc",
        "-n",
        min=1,
        metavar="N",
        help="Ranks on this host; over the spec's tensor degree, they are data ranks. Left out: those of the spec.",
    ),
]
Tensor = Annotated[
    int | None, typer.Option("--tensor", min=1, metavar="N", help="Tensor degree; over the spec's mesh.tensor.")
]
Device = Annotated[str | None, typer.Option("--device", metavar="KIND", help="cuda or cpu. Left out: cuda if any.")]
Timeout = Annotated[
    float, typer.Option("--timeout", min=1, metavar="S", help="Seconds until a rank that does not come is given up.")
]
TrainSet = Annotated[
    list[str] | None,
    typer.Option(
        "--train", "-t", metavar="KEY=VALUE", help="A setting over the spec's train:, e.g. optimizer.lr=1e-3."
    ),
]


def train(
    model: Model,
    spec: SpecFile,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", "-d", metavar="PATH", help="Text, .jsonl or token files; over the spec's. Repeatable."),
    ] = None,
    nproc: Ranks = None,
    tensor: Tensor = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="RUN", help="Keep log and checkpoints there; one with checkpoints goes on."
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option("--weights", "-w", metavar="FILE", help="Begin with these weights, not with new ones."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, metavar="N", help="Over the spec's train.steps.")
    ] = None,
    train_settings: TrainSet = None,
    settings: Set = None,
    device: Device = None,
    timeout: Timeout = 600.0,
    as_json: AsJson = False,
) -> None:
    """Train a model on the ranks of a spec.

    Starts the ranks on this host, or joins those that torchrun started. A RUN with checkpoints is gone on with.
    """
    changes = _train_changes(train_settings, data, steps)
    read = _spec(spec, nproc, tensor, changes)
    if _starts(read):
        raise typer.Exit(_start(read))
    from tpcompiler.train.run.start import join, together

    screen = Screen(as_json)
    with _live(screen):
        from tpcompiler.load.model import load_model, parse_settings
        from tpcompiler.train.run.loop import run

        with _first_rank_says():
            place = join(read.ranks.size, device, timeout)

        def tell(line: str) -> None:
            if place.rank == 0:
                screen.err.write(line + "\n")

        with together(place, lambda line: _complain(screen, line)):
            loaded = load_model(model, read, parse_settings(settings or []))
            report = run(loaded, read, _train(read), place, out, weights=weights or loaded.weights, tell=tell)
    if place.rank == 0:
        screen.result(report.as_dict())


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
        bool, typer.Option("--wikitext", help="The text has its words and marks apart, as WikiText's files do.")
    ] = False,
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
    from tpcompiler.train.run.start import join, together

    screen = Screen(as_json)
    with _live(screen):
        from tpcompiler.load.model import load_model, parse_settings
        from tpcompiler.train.evaluate.measure import Question, measure

        with _first_rank_says():
            place = join(read.ranks.size, device, timeout)
        with together(place, lambda line: _complain(screen, line)):
            loaded = load_model(model, read, parse_settings(settings or []))
            question = Question(perplexity, cloze, stride, batch, wikitext)
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
    """A command that runs for days shows what it says at once: nothing is held back."""
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
    from tpcompiler.train.run.start import launched

    try:
        yield
    except TpcError:
        if launched() and os.environ["RANK"] != "0":
            raise typer.Exit(2) from None
        raise


def _fitted(path: Path, nproc: int | None, tensor: int | None, changes: list[Change]) -> Spec:
    from tpcompiler.spec.schema import Spec
    from tpcompiler.train.run.start import launched

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
    from tpcompiler.train.run.config import Train

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
    from tpcompiler.train.run.start import launched

    return spec.ranks.size > 1 and not launched()


def _start(spec: Spec) -> int:
    from tpcompiler.train.run.start import launch

    return launch(sys.argv[1:], spec.ranks.size)
