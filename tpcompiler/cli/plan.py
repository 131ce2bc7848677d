"""`tpc plan`: the best spec for a number of GPUs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from tpcompiler.cli.options import AsJson, Model, Set
from tpcompiler.cli.screen import Screen, Stages
from tpcompiler.errors import ModelError, TpcError

if TYPE_CHECKING:
    from tpcompiler.cost.predict import Prediction
    from tpcompiler.load.target import Inputs, Loaded
    from tpcompiler.search.planner import Answer, Question
    from tpcompiler.spec.machine import Hardware

_UNITS = {"": 1.0, "gib": 1.0, "gb": 1e9 / 2**30, "mib": 1 / 1024, "tib": 1024.0}


def plan(
    model: Model,
    gpus: Annotated[int, typer.Option("--gpus", "-n", min=1, max=65536, help="How many GPUs to use.", metavar="N")],
    base: Annotated[
        Path | None, typer.Option("--spec", "-s", metavar="FILE", help="A spec whose other sections are kept.")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch",
            min=1,
            metavar="N",
            help="Sequences per step over all GPUs. Default: 8, but at least one per GPU.",
        ),
    ] = None,
    sequence: Annotated[
        int | None, typer.Option("--sequence", min=2, metavar="N", help="Tokens in a sequence. Default: 1024.")
    ] = None,
    hardware: Annotated[
        str, typer.Option("--hardware", metavar="H", help="a100, h100, h200, b200, dgx-2h, or a file.")
    ] = "h100",
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="Memory of a GPU (80GiB), instead of the hardware's.")
    ] = None,
    replicated: Annotated[
        bool, typer.Option("--replicated", help="Let data ranks hold whole copies (DDP) instead of FSDP2's shards.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the spec here.")] = None,
    settings: Set = None,
    as_json: AsJson = False,
) -> None:
    """Find the fastest layout for a number of GPUs.

    Chooses tensor and data ranks, micro-batch, recomputation and overlap by predicted time and memory.
    """
    from tpcompiler.search.planner import Question

    screen = Screen(as_json)
    with screen.open(), screen.progress() as stages:
        question = Question(gpus, batch or max(8, gpus), sequence or 1024, _machine(hardware, memory), replicated)
        answer, text = _search(model, base, question, settings, hardware, sequence is not None, stages)
        if out is not None:
            _write(out, text)
    screen.show(*_tables(answer, hardware))
    screen.show(Text("\nwritten to ").append(str(out), style="bold") if out is not None else Text("\n" + text))
    screen.result({**answer.as_dict(), "spec": text, "written": None if out is None else str(out)})


def _search(
    model: str,
    base: Path | None,
    question: Question,
    settings: list[str] | None,
    hardware: str,
    asked: bool,
    stages: Stages,
) -> tuple[Answer, str]:
    """The answer of the search, and the text of its spec. `asked` says whether the user gave the sequence."""
    from tpcompiler.capture import capture
    from tpcompiler.load.model import load_model, parse_settings
    from tpcompiler.search.planner import search
    from tpcompiler.search.spec_file import as_spec, written
    from tpcompiler.spec.schema import Spec

    spec = Spec.load(base) if base is not None else Spec.load({"mesh": {"tensor": 1}})
    spec = spec.with_(mesh={"tensor": min(question.gpus, 2)})
    given = parse_settings(settings or [])
    stages("loading the model")
    loaded = load_model(model, spec, given)
    with loaded.environment:
        example, sizes = _example(loaded, question.sequence, asked)
        stages("capturing the model")
        captured = capture(loaded.build, example, source=loaded.source)
    stages("pricing layouts")
    answer = search(captured, spec, question, stages)
    spec = spec.with_(model={**spec.model, **given}) if given else spec
    sizes = {**sizes, "batch": answer.best.layout.micro} if sizes else {}
    return answer, written(answer, as_spec(answer, spec, sizes), model, hardware)


def _machine(name: str, memory: str | None) -> Hardware:
    from tpcompiler.spec.schema import Spec

    spec = Spec.load({"mesh": {"tensor": 1}})
    found = spec.put(("hardware",), {"base": name}, f"--hardware {name}").hardware
    return found if memory is None else found.model_copy(update={"memory_gib": _gib(memory)})


def _gib(text: str) -> float:
    """The number of GiB in a text such as `80GiB`, `24GB` or `80`. Raises `TpcError`."""
    said = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if said is None or said[2] not in _UNITS or not float(said[1]):
        raise TpcError(f"--memory {text}: not a size; write e.g. 80GiB or 24GB")
    return float(said[1]) * _UNITS[said[2]]


def _example(loaded: Loaded, sequence: int, asked: bool) -> tuple[Inputs, dict[str, Any]]:
    """Example inputs with sequences of `sequence` tokens, and the sizes that give them. If the model's inputs have no
    such size, they are the model's own, unless the user asked for a sequence."""
    try:
        return loaded.inputs(batch=2, sequence=sequence), {"sequence": sequence}
    except ModelError:
        if asked:
            raise
        return loaded.inputs(), {}


def _write(path: Path, text: str) -> None:
    from tpcompiler.weights.atomic import replacing_file

    with replacing_file(path) as new:
        new.write_text(text)


def _tables(answer: Answer, hardware: str) -> list[Any]:
    question, best = answer.question, answer.best
    title = Text(f"{question.gpus} GPUs, {hardware}, {question.batch} sequences of {question.sequence} tokens a step; ")
    title.append(f"{answer.layouts} layouts priced in {answer.seconds:.1f} s\n", style="dim")
    parts: list[Any] = [title, _table("by degree", answer.degrees, best)]
    if answer.choices:
        parts += [Text(), _table("the best with one choice changed", ((best, ""), *answer.choices), best)]
    parts += [Text(f"refused: {why}", style="dim") for why in answer.refused]
    m = best.memory
    sizes = {"parameters": m.parameters, "gradients": m.gradients, "optimizer": m.optimizer}
    sizes |= {"activations": m.activations, "loss": m.loss}
    said = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in sizes.items())
    times = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in best.parts.items() if seconds > 5e-5)
    known = (("measured", question.hardware.measured), ("fitted to steps", question.hardware.fitted))
    origin = "; ".join(f"{what}: {', '.join(keys) or 'none'}" for what, keys in known)
    parts.append(Text(f"\nmemory of the best, GiB: {said}\ntime of the best, ms: {times}"))
    parts.append(Text(f"constants of {hardware} {origin}; all others are assumed", style="dim"))
    return parts


def _table(title: str, rows: Any, best: Prediction) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in ("tensor × data", "micro", "recompute", "overlap"):
        table.add_column(name)
    for name in ("ms a step", "MFU", "comm. ms", "GiB"):
        table.add_column(name, justify="right")
    table.add_column("lost by")
    for p, why in rows:
        layout = p.layout
        table.add_row(
            f"{layout.tensor} × {layout.data}",
            str(layout.micro),
            layout.recompute,
            "yes" if layout.overlap else "no",
            f"{p.seconds * 1e3:.1f}",
            f"{p.mfu * 100:.0f} %",
            f"{(p.communication + p.parts['data']) * 1e3:.1f}",
            f"{p.memory.total / 2**30:.1f}",
            why or "the best",
            style="bold green" if p is best else None,
        )
    return table
