"""`tpc eval` and `tpc plot`: measure a trained model, and draw the loss curves of runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from tpcompiler.cli.options import AsJson, command_with
from tpcompiler.cli.ranks import RankOptions, joined, start_ranks, train_section
from tpcompiler.cli.screen import Screen
from tpcompiler.errors import TpcError


@dataclass(frozen=True, kw_only=True)
class EvalOptions(RankOptions):
    """The options of `tpc eval`."""

    weights: Annotated[
        Path,
        typer.Option(
            "--weights",
            "-w",
            metavar="DIR",
            help="A run, a checkpoint, an output of `tpc shard`, or a file of weights.",
        ),
    ]
    perplexity: Annotated[
        Path | None,
        typer.Option("--perplexity", metavar="FILE", help="A text. Its perplexity is measured in overlapping windows."),
    ] = None
    cloze: Annotated[
        Path | None,
        typer.Option(
            "--cloze",
            metavar="FILE",
            help="Texts, one per line or as .jsonl. Cloze accuracy is the share whose last word is predicted.",
        ),
    ] = None
    stride: Annotated[int, typer.Option("--stride", min=1, help="Tokens from one window to the next.")] = 32
    batch: Annotated[int, typer.Option("--batch", min=1, help="How many windows or texts a rank runs at once.")] = 8
    wikitext: Annotated[
        bool, typer.Option("--wikitext", help="The text has spaces around its punctuation, as WikiText's files do.")
    ] = False


@command_with(EvalOptions)
def evaluate(options: EvalOptions) -> None:
    """Measure a causal language model.

    Measures perplexity per original word and cloze accuracy, as the Megatron-LM paper does.
    """
    if options.perplexity is None and options.cloze is None:
        raise TpcError("eval: nothing to measure; give --perplexity FILE, --cloze FILE, or both")
    spec = options.read_spec()
    start_ranks(spec)
    screen = Screen(options.as_json)
    with joined(screen, spec, options) as place:
        from tpcompiler.train.evaluate.measure import EvalRequest, measure

        o = options
        request = EvalRequest(o.perplexity, o.cloze, o.stride, o.batch, o.wikitext, o.renaming)
        result = measure(o.load(spec), spec, train_section(spec), place, o.weights, request)
    if place.rank == 0:
        screen.show(*(f"{key}  {value:.6g}" for key, value in result.items()))
        screen.result(result)


def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Directories of runs, or their log.jsonl files.")],
    out: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The picture: .png, .svg or .pdf.")
    ] = Path("loss.png"),
    labels: Annotated[
        list[str] | None,
        typer.Option("--label", "-l", metavar="TEXT", help="A name for each run, in order."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw the loss curves of several runs in one picture."""
    screen = Screen(as_json)
    with screen.open():
        from tpcompiler.train.show.plot import plot as draw

        written = draw(runs, out, labels)
    screen.show(str(written))
    screen.result({"file": str(written), "runs": [str(r) for r in runs]})
