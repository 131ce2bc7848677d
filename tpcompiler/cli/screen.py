"""A command's output: results on stdout, progress and errors on stderr, one JSON object with `--json`."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from tpcompiler.errors import TpcError, TpcWarning

_WIDTH = 120  # columns when stdout is not a terminal, which a log or a page shows without wrapping


@dataclass
class Screen:
    """The output of one command. While it is open, what the user's model prints goes to stderr."""

    as_json: bool
    out: TextIO = field(default_factory=lambda: sys.stdout)
    err: TextIO = field(default_factory=lambda: sys.stderr)

    @contextmanager
    def open(self) -> Iterator[Screen]:
        """Opens the screen. What libraries print on stderr is shown at the end, but not if the command ends with an
        error, which must stay one line."""
        said = io.StringIO()
        with redirect_stdout(self.err), redirect_stderr(said), _quiet():
            try:
                yield self
            except (TpcError, KeyboardInterrupt):
                raise
            except BaseException:
                self.err.write(said.getvalue())
                raise
        self.err.write(said.getvalue())

    def show(self, *parts: RenderableType, width: int = _WIDTH) -> None:
        """Prints something for people to read. With `--json`, it prints nothing.

        The width is that of the terminal, or COLUMNS. For a file or a pipe without COLUMNS, it is `width`.
        """
        if self.as_json:
            return
        known = self.out.isatty() or "COLUMNS" in os.environ
        console = Console(file=self.out, width=None if known else width, highlight=False)
        for part in parts:
            console.print(part)

    def result(self, value: Mapping[str, Any]) -> None:
        """Prints the command's result as one JSON object. Without `--json`, it prints nothing."""
        if self.as_json:
            self.out.write(json.dumps(_finite(value), allow_nan=False, ensure_ascii=False) + "\n")
            self.out.flush()

    @contextmanager
    def progress(self) -> Iterator[Stages]:
        """Shows the running stage in one line on stderr, if that is a terminal."""
        console = Console(file=self.err)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True, disable=not self.err.isatty()) as bar:
            yield Stages(bar)


class Stages:
    """Shows the running stage. It is called with a stage's name when the stage starts."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("starting", total=None)

    def __call__(self, stage: str) -> None:
        self._bar.update(self._task, description=stage, total=None)

    def bytes(self, done: int, total: int) -> None:
        """Shows how many bytes of the running stage are done."""
        self._bar.update(self._task, completed=done, total=total)


@contextmanager
def our_warnings() -> Iterator[None]:
    """Shows tpcompiler's warnings, one line each, and hides those of torch and the model unless they were asked for.

    Where several ranks run, only the first shows them.
    """

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not issubclass(category, TpcWarning):
            foreign(message, category, filename, lineno, file, line)
        elif os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"tpc: warning: {message}\n")

    with warnings.catch_warnings():
        foreign, warnings.showwarning = warnings.showwarning, show
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        warnings.simplefilter("always", TpcWarning)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides warnings and log lines of torch and of the model, unless they were asked for."""
    before = logging.root.manager.disable
    with our_warnings():
        if "TORCH_LOGS" not in os.environ:
            logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def _finite(value: Any) -> Any:
    """Turns numbers that are not finite into words, because JSON has no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value


def complain(message: str, as_json: bool) -> None:
    """Prints an error in one line: in red on stderr, or with `--json` as `{"error": …}` on stdout."""
    line = " ".join(message.split())
    if as_json:
        sys.stdout.write(json.dumps({"error": line}, ensure_ascii=False) + "\n")
        return
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text("tpc: ").append(line), style="red")
