"""Shows a run's progress: a live panel on a terminal, plain lines anywhere else."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from datetime import timedelta
from math import inf, isfinite
from statistics import median
from time import monotonic
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tpcompiler.train.show.log import StepRecord

_REDRAW = 0.2  # seconds between two drawings of the panel, each of which takes milliseconds
_BARS = "▁▂▃▄▅▆▇█"


class Meter:
    """The speed of a run. A step's time is the median of the last few, so that a checkpoint does not show as a dip."""

    def __init__(
        self, tokens: int, flops_per_token: float, ranks: int, peak_tflops: float | None = None, over: int = 10
    ) -> None:
        """`tokens` is their number in a step, on all ranks. `flops_per_token` counts forward and backward. `over` is
        the number of steps of which the median is taken."""
        self.tokens, self.flops_per_token, self.ranks, self.peak = tokens, flops_per_token, ranks, peak_tflops
        self._seconds: deque[float] = deque(maxlen=over)

    def step(self, seconds: float) -> dict[str, float | None]:
        """The speeds of a `StepRecord`, after a step that took `seconds`."""
        self._seconds.append(seconds)
        middle = sorted(self._seconds)[len(self._seconds) // 2]
        rate = self.tokens / middle
        tflops = rate * self.flops_per_token / self.ranks / 1e12
        return {
            "seconds": seconds,
            "tokens_per_second": rate,
            "tflops": tflops,
            "peak_fraction": tflops / self.peak if self.peak else None,
        }


class Display:
    """A context manager that shows records of a run, which `title` names."""

    def __init__(self, title: str, steps: int, console: Console | None = None) -> None:
        self.title, self.steps = title, steps
        self.console = console or Console(stderr=True)
        self._losses: deque[float] = deque(maxlen=60)
        self._drawn = -inf
        self._latest: StepRecord | None = None
        self._seconds: deque[float] = deque(maxlen=10)
        self._live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._draw()
            self._live.stop()

    def show(self, record: StepRecord) -> None:
        if record.loss is not None and isfinite(record.loss):
            self._losses.append(record.loss)
        if record.seconds is not None:
            self._seconds.append(record.seconds)
        if self._live is None:
            self.message(line(record, self.steps))
        else:
            self._latest = record
            now = monotonic()
            if now - self._drawn >= _REDRAW:
                self._draw()
                self._drawn = now

    def _draw(self) -> None:
        if self._live is not None and self._latest is not None:
            self._live.update(self._panel(self._latest), refresh=True)

    def message(self, text: str) -> None:
        """Prints a line that stays, such as one about a checkpoint, an evaluation or a skipped step."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _panel(self, record: StepRecord) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        pairs = 3 if self.console.width >= 110 else 2  # values are never cut short
        for _ in range(pairs):
            table.add_column(style="dim", justify="right")
            table.add_column(min_width=16)
        cells = facts(record, self.steps, median(self._seconds) if self._seconds else None)
        for i in range(0, len(cells), pairs):
            table.add_row(*(Text(word) for cell in cells[i : i + pairs] for word in cell))
        bar = ProgressBar(total=self.steps, completed=record.step)
        return Panel(
            Group(table, Text(sparkline(self._losses), style="cyan"), bar), title=self.title, title_align="left"
        )


def facts(record: StepRecord, steps: int, seconds: float | None = None) -> list[tuple[str, str]]:
    """The facts of a record: pairs of a word and a value with its unit. `seconds` is what a step usually takes."""
    r = record
    usual = seconds if seconds is not None else r.seconds
    left = (steps - r.step) * usual if usual is not None else None
    share = f" ({r.peak_fraction:.1%} of peak)" if r.peak_fraction is not None else ""
    rows = [
        ("step", f"{r.step}/{steps}"),
        ("loss", f"{r.loss:.4f}" if r.loss is not None else None),
        ("evaluation", f"{r.evaluation:.4f}" if r.evaluation is not None else None),
        ("lr", f"{r.lr:.3g}" if r.lr is not None else None),
        ("gradient norm", f"{r.grad_norm:.3g}" if r.grad_norm is not None else None),
        ("loss scale", f"{r.loss_scale:g}" if r.loss_scale is not None else None),
        ("skipped", str(r.skipped) if r.skipped else None),
        ("tokens/s", _short(r.tokens_per_second) if r.tokens_per_second is not None else None),
        ("TFLOP/s a GPU", f"{r.tflops:.3g}{share}" if r.tflops is not None else None),
        ("memory", f"{r.memory / 2**30:.2f} GiB" if r.memory is not None else None),
        ("left", str(timedelta(seconds=round(left))) if left is not None else None),
    ]
    return [(word, value) for word, value in rows if value is not None]


def line(record: StepRecord, steps: int) -> str:
    """A record as one plain line."""
    return "  ".join(f"{word} {value}" for word, value in facts(record, steps))


def sparkline(values: Iterable[float]) -> str:
    """A curve in one line of text, scaled from its lowest to its highest value."""
    values = list(values)
    if not values:
        return ""
    low, high = min(values), max(values)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((v - low) * scale)] for v in values)


def _short(n: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g} {letter}"
    return f"{n:.3g}"
