"""What commands that ranks run, such as `tpc train`, have in common: options, and how a process joins the ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tpcompiler.cli.options import AsJson, Model, Set, SpecFile
from tpcompiler.cli.screen import Screen, complain, our_warnings
from tpcompiler.errors import TpcError

if TYPE_CHECKING:
    from tpcompiler.load.target import Loaded
    from tpcompiler.spec.schema import Spec
    from tpcompiler.train.hold.mapping import Renaming
    from tpcompiler.train.run.launch import Place
    from tpcompiler.train.settings import Train

Change = tuple[tuple[str, ...], Any, str]  # a key of the spec, its value, and the option that gave it
Texts = list[str] | None


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """The options of a command that ranks run."""

    model: Model
    spec: SpecFile
    nproc: Annotated[
        int | None,
        typer.Option(
            "--nproc",
            "-n",
            min=1,
            metavar="N",
            help="How many ranks to run on this host, a multiple of the tensor degree. Default: the spec's number.",
        ),
    ] = None
    tensor: Annotated[
        int | None,
        typer.Option("--tensor", min=1, metavar="N", help="The tensor degree, instead of the spec's mesh.tensor."),
    ] = None
    train_settings: Annotated[
        Texts,
        typer.Option(
            "--train",
            "-t",
            metavar="KEY=VALUE",
            help="Replace a setting of the spec's train: section, e.g. optimizer.lr=1e-3. Can be repeated.",
        ),
    ] = None
    settings: Set = None
    strip: Annotated[
        str, typer.Option("--strip", metavar="PREFIX", help="Remove this prefix from the weights' names.")
    ] = ""
    rename: Annotated[
        Texts,
        typer.Option("--rename", metavar="OLD=NEW", help="Replace OLD by NEW in the weights' names. Can be repeated."),
    ] = None
    transpose: Annotated[
        Texts,
        typer.Option(
            "--transpose", metavar="GLOB", help="Names of matrices that the weights store transposed. Can be repeated."
        ),
    ] = None
    device: Annotated[
        str | None, typer.Option("--device", metavar="KIND", help="cuda or cpu. Default: cuda if there is a GPU.")
    ] = None
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout",
            min=1,
            metavar="S",
            help="Seconds without an answer after which a rank counts as lost and the run ends.",
        ),
    ] = 600.0
    as_json: AsJson = False

    @property
    def changes(self) -> list[Change]:
        """The settings that the options change in the spec's train: section."""
        from tpcompiler.load.model import parse_settings

        return [
            (("train", *key.split(".")), value, f"--train {setting}")
            for setting in self.train_settings or []
            for key, value in parse_settings([setting], "--train").items()
        ]

    @property
    def renaming(self) -> Renaming:
        from tpcompiler.train.hold.mapping import Renaming

        return Renaming(self.strip, tuple(self.rename or ()), tuple(self.transpose or ()))

    def read_spec(self) -> Spec:
        """The spec with the command's settings, and with the data degree that the number of ranks gives.

        Raises `TpcError` for a mistake in it, before anything is started. Of several ranks, only the first reports it.
        """
        with _first_rank_says():
            return self._fitted()

    def _fitted(self) -> Spec:
        from tpcompiler.spec.schema import Spec
        from tpcompiler.train.run.launch import launched

        read = Spec.load(self.spec)
        for key, value, said in self.changes:
            read = read.put(key, value, said)
        train_section(read)
        if self.tensor is not None:
            read = read.put(("mesh", "tensor"), self.tensor, f"--tensor {self.tensor}")
        ranks = int(os.environ["WORLD_SIZE"]) if launched() else self.nproc
        if ranks is None or ranks == read.ranks.size:
            return read
        degree = read.mesh.tensor
        if ranks % degree:
            raise TpcError(
                f"{ranks} ranks are not a multiple of the tensor degree {degree}; {-(-ranks // degree) * degree} ranks "
                f"or --tensor {ranks} would work"
            )
        return read.with_(mesh={"tensor": degree, "data": ranks // degree})

    def load(self, spec: Spec) -> Loaded:
        from tpcompiler.load.model import load_model, parse_settings

        return load_model(self.model, spec, parse_settings(self.settings or []))


def train_section(spec: Spec) -> Train:
    from tpcompiler.train.settings import Train

    return spec.section(Train)


def start_ranks(spec: Spec) -> None:
    """Starts the ranks of the spec with this command, and exits with their exit code. On a rank, it returns at once."""
    from tpcompiler.train.run.launch import launch, launched

    if spec.ranks.size > 1 and not launched():
        raise typer.Exit(launch(sys.argv[1:], spec.ranks.size))


@contextmanager
def joined(screen: Screen, spec: Spec, options: RankOptions) -> Iterator[Place]:
    """Joins this process to the ranks and yields its place among them. Within the block, an error on any rank ends all
    ranks. Output appears at once, because a run may take days."""
    with redirect_stdout(screen.err), our_warnings():
        from tpcompiler.train.run.launch import join
        from tpcompiler.train.run.together import together

        with _first_rank_says():
            place = join(spec.ranks.size, options.device, options.timeout)
        with together(place, lambda line: _complain(screen, line)):
            yield place


def _complain(screen: Screen, line: str) -> None:
    with redirect_stdout(screen.out):
        complain(line, screen.as_json)
        sys.stdout.flush()


@contextmanager
def _first_rank_says() -> Iterator[None]:
    """Makes only the first rank report a mistake that all ranks find, such as `--device cuda` without a GPU."""
    from tpcompiler.train.run.launch import launched

    try:
        yield
    except TpcError:
        if launched() and os.environ["RANK"] != "0":
            raise typer.Exit(2) from None
        raise
