"""`tpc generate`: a trained model continues prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from tpcompiler.cli.options import command_with
from tpcompiler.cli.ranks import RankOptions, joined, start_ranks, train_section
from tpcompiler.cli.screen import Screen
from tpcompiler.errors import TpcError


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(RankOptions):
    """The options of `tpc generate`."""

    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights",
            "-w",
            metavar="DIR",
            help="A run, a checkpoint, an output of `tpc shard`, or a file of weights.",
        ),
    ] = None
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="A text to continue.")] = None
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="Texts as JSON lines, each a string or {'prompt': string}."),
    ] = None
    out: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write each text as a JSON line when it is finished."),
    ] = None
    tokens: Annotated[int, typer.Option("--tokens", min=1, metavar="N", help="The most new tokens of a text.")] = 64
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature", min=0, help="Below 1, likely tokens become likelier. 0 always takes the likeliest."
        ),
    ] = 1.0
    top_k: Annotated[
        int, typer.Option("--top-k", min=0, metavar="K", help="Choose among the K likeliest tokens; 0: among all.")
    ] = 0
    top_p: Annotated[
        float,
        typer.Option(
            "--top-p", metavar="P", help="Choose among the likeliest tokens that together have probability P."
        ),
    ] = 1.0
    penalty: Annotated[
        float,
        typer.Option(
            "--repetition-penalty", metavar="X", help="Above 1, tokens that already occurred become less likely."
        ),
    ] = 1.0
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same text at any degree.")] = 0
    batch: Annotated[int, typer.Option("--batch", min=1, help="How many prompts are continued at the same time.")] = 8

    def texts(self) -> list[str]:
        """The prompts. Raises `TpcError` for mistakes that can be found without the model."""
        from tpcompiler.generation.prompts import read_prompts

        if (self.prompt is None) == (self.prompts is None):
            raise TpcError("generate: give either --prompt TEXT or --prompts FILE")
        if not 0 < self.top_p <= 1:
            raise TpcError(f"generate: --top-p {self.top_p} must be above 0 and at most 1")
        if self.penalty <= 0:
            raise TpcError(f"generate: --repetition-penalty {self.penalty} must be above 0; 1 changes nothing")
        if self.prompts is not None:
            return read_prompts(self.prompts)
        if not self.prompt:
            raise TpcError("generate: --prompt is empty: a model can only continue a text of at least one token")
        return [self.prompt]


@command_with(GenerateOptions)
def generate(options: GenerateOptions) -> None:
    """Continue prompts with a trained causal language model.

    The key-value cache is derived from the model and split as its heads are. The text of a single prompt is shown token
    by token.
    """
    texts = options.texts()
    spec = options.read_spec()
    if spec.mesh.data > 1:
        raise TpcError(f"generate: runs on one copy of the model, not {spec.mesh.data}; --nproc {spec.mesh.tensor}")
    start_ranks(spec)
    screen = Screen(options.as_json)
    with joined(screen, spec, options) as place:
        from tpcompiler.generation.run import WeightsSource, opened, run
        from tpcompiler.generation.stream import Sampling, Wish

        o, first = options, place.rank == 0
        how = Sampling(o.temperature, o.top_k, o.top_p, o.penalty, o.seed)
        wish = Wish(o.tokens, how, batch=o.batch)
        loaded = o.load(spec)
        there = o.weights or loaded.weights
        if there is None:
            raise TpcError("generate: give --weights DIR: a run, a checkpoint, or what `tpc shard` wrote")
        with (
            opened(o.out) if o.out is not None and first else nullcontext() as file,
            _showing(screen, texts, first and not o.as_json, o.out is not None) as show,
        ):
            report = run(
                loaded, spec, train_section(spec), place, WeightsSource(there, o.renaming), texts, wish, show, file
            )
    if place.rank == 0:
        screen.err.write(f"{report['tokens']} tokens, {report['tokens_per_second']:.4g} a second\n")
        screen.result(report)


@contextmanager
def _showing(
    screen: Screen, texts: Sequence[str], shown: bool, written: bool
) -> Iterator[Callable[[int, str, bool], None]]:
    """A function that shows texts: one text as it grows, or each of several when it is finished. Of texts that are
    written to a file, it shows only the number."""
    grown = [""] * len(texts)
    done = 0
    if not shown:
        yield lambda number, more, last: None
    elif len(texts) == 1 and not written:

        def grow(number: int, more: str, last: bool) -> None:
            if not grown[0]:
                grown[0] = texts[0]
                more = texts[0] + more
            screen.out.write(more + "\n" * last)
            screen.out.flush()

        yield grow
    else:
        with screen.progress() as stages:

            def finish(number: int, more: str, last: bool) -> None:
                nonlocal done
                grown[number] += more
                if last:
                    done += 1
                    stages(f"{done} of {len(texts)} texts")
                    stages.bytes(done, len(texts))
                    if not written:
                        screen.out.write(f"[{number + 1}] {texts[number]}{grown[number]}\n")
                        screen.out.flush()

            yield finish
