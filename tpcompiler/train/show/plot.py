"""Draws the loss curves of several runs in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tpcompiler.errors import TpcError
from tpcompiler.train.show.log import StepRecord, read_log


def plot(runs: Sequence[str | Path], out: str | Path, labels: Sequence[str] | None = None) -> Path:
    """Draws the training loss (line) and the evaluation loss (dots) of runs against the step. Returns `out`.

    A run is named by its directory or its log.jsonl. Labels are by default the directories' names. The suffix of `out`
    chooses the format (png, svg, pdf). Raises `TpcError`.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise TpcError("tpc plot: needs matplotlib: pip install 'tpcompiler[train]'") from None
    curves = [_curve(Path(run)) for run in runs]
    if not curves:
        raise TpcError("tpc plot: no run given")
    names = list(labels) if labels is not None else _names([Path(run) for run in runs])
    if len(names) != len(curves):
        raise TpcError(f"tpc plot: {len(names)} labels for {len(curves)} runs")
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, records in zip(names, curves, strict=True):
        trained = [(r.step, r.loss) for r in records if r.loss is not None]
        tested = [(r.step, r.evaluation) for r in records if r.evaluation is not None]
        (line,) = axes.plot(*_columns(trained), label=name, linewidth=1.2, alpha=0.8)
        if tested:
            axes.plot(*_columns(tested), "o", color=line.get_color(), markersize=5, label=f"{name}, evaluation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    out = Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out)
    except (OSError, ValueError) as e:
        raise TpcError(f"tpc plot: cannot write {out}: {' '.join(str(e).split())}") from None
    return out


def _curve(run: Path) -> list[StepRecord]:
    records = read_log(run)
    if not any(r.loss is not None or r.evaluation is not None for r in records):
        raise TpcError(f"{run}: holds no step with a loss yet")
    return records


def _names(runs: Sequence[Path]) -> list[str]:
    """The names of the runs' directories. Where two are equal, as much of their paths as tells them apart."""
    parts = [(run if run.is_dir() else run.parent).resolve().parts for run in runs]
    depth = 1
    while depth < max(map(len, parts)) and len({p[-depth:] for p in parts}) < len(set(parts)):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
