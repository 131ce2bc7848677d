"""Shows the plain and the sharded program side by side, or as one with the changes marked. Equal layers appear once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from typing import Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

Change = Literal["same", "changed", "inserted", "removed", "folded"]

_FEW = 7  # lines; shorter repetitions are not layers
_TWO_PROGRAMS = 160  # columns; from this width on, two programs are shown side by side
_HANG = 4  # columns by which the rest of a long line is indented further
_ALIKE = 0.55  # similarity above which two lines count as one changed line
# Calls of the runtime's operators, which a program imports by name; `F.cross_entropy` is torch's. The plain program
# calls `linear_cross_entropy` as well, but without a group.
_FORWARD = re.compile(
    r"(?<![.\w])((reduce|gather|gather_sequence|scatter_sequence|cross_entropy)\(|linear_cross_entropy\(.*\bgroup=)"
)
_BACKWARD = re.compile(r"(?<![.\w])enter\(")
_ALIKE_LAYERS = re.compile(r"\((\d+) alike\)")  # in the docstring of an emitted class
_TOKEN = re.compile(r"\w+|\s+|[^\w\s]")


@dataclass(frozen=True)
class Line:
    """One line of the picture. A side without such a line is None. The line stands for `times` equal layers."""

    plain: str | None
    sharded: str | None
    change: Change
    times: int = 1

    @property
    def collective(self) -> Literal["forward", "backward"] | None:
        """The direction in which only the sharded side communicates here; None if it does not."""
        if self.sharded is None or self.change in ("same", "folded"):
            return None
        now, before = _code(self.sharded), _code(self.plain or "")
        if _BACKWARD.search(now) and not _BACKWARD.search(before):
            return "backward"
        return "forward" if _FORWARD.search(now) and not _FORWARD.search(before) else None


def align(plain: Sequence[str], sharded: Sequence[str]) -> list[Line]:
    """Matches the lines of both programs: equal lines, changed lines, and lines that only one side has."""
    a, b = [_code(x) for x in plain], [_code(x) for x in sharded]
    out: list[Line] = []
    for tag, i0, i1, j0, j1 in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if tag == "equal":
            out += [Line(p, s, "same") for p, s in zip(plain[i0:i1], sharded[j0:j1], strict=True)]
        else:
            out += _match(plain[i0:i1], sharded[j0:j1])
    return out


def body(lines: Sequence[str]) -> list[str]:
    """A program from its first class on, without the head that says how to run it."""
    start = next((i for i, line in enumerate(lines) if line.startswith("class ")), 0)
    return list(lines[start:])


def fold_layers(lines: Sequence[Line]) -> list[Line]:
    """Folds repetitions of lines that differ only in numbers into one, marked as "× 72"."""
    shapes = [(_numberless(x.plain), _numberless(x.sharded), x.change) for x in lines]
    out: list[Line] = []
    i = 0
    while i < len(lines):
        period, times = _repetition(shapes, i)
        if times > 1:
            out.append(Line(f"× {times}", f"× {times}", "folded", times))
            out += [Line(x.plain, x.sharded, x.change, times) for x in lines[i : i + period]]
            i += period * times
        else:
            out.append(lines[i])
            i += 1
    return out


def squeeze(lines: Sequence[Line], context: int | None = 3) -> list[Line]:
    """Cuts long stretches of equal lines to `context` lines around each change; with None, all lines stay."""
    if context is None:
        return list(lines)
    near = [False] * len(lines)
    for i, line in enumerate(lines):
        if line.change != "same":
            for j in range(max(0, i - context), min(len(lines), i + context + 1)):
                near[j] = True
    out: list[Line] = []
    i = 0
    while i < len(lines):
        if near[i]:
            out.append(lines[i])
            i += 1
            continue
        stop = next((j for j in range(i, len(lines)) if near[j]), len(lines))
        out.append(
            Line(f"⋮ {stop - i} equal lines", f"⋮ {stop - i} equal lines", "folded") if stop - i > 1 else lines[i]
        )
        i = stop
    return out


def as_dict(line: Line) -> dict[str, str | None]:
    return {"plain": line.plain, "sharded": line.sharded, "change": line.change, "collective": line.collective}


@dataclass(frozen=True)
class Picture:
    """Draws both programs side by side, or one program with its changes marked where there is no room for two.

    Changed parts are red and green. A green line communicates forward, a yellow line backward.
    """

    lines: Sequence[Line]
    titles: tuple[str, str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = options.max_width >= _TWO_PROGRAMS
        yield _two(self.lines, self.titles) if wide else _one(self.lines, self.titles)
        legend = Text("→ collective, forward", style="bold green")
        legend.append("   ← collective, backward", style="bold yellow")
        yield legend


@dataclass(frozen=True)
class _Code:
    """A line of code. A rest that does not fit continues below, indented further."""

    text: Text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        start = len(self.text.plain) - len(self.text.plain.lstrip())
        if len(self.text) <= options.max_width:
            yield self.text
            return
        code = len(_code(self.text.plain))
        room = max(options.max_width - start - _HANG, _HANG)
        whole = start < code <= options.max_width  # then only the comment goes below
        first, *rest = [self.text[start:code]] if whole else self.text[start:].wrap(console, room, overflow="fold")
        rest += self.text[code + 2 :].wrap(console, room, overflow="fold") if whole else []
        yield Text(" " * start).append_text(first)
        yield from (Text(" " * (start + _HANG)).append_text(line) for line in rest)


def _two(lines: Sequence[Line], titles: tuple[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, expand=True, header_style="bold", padding=(0, 1))
    table.add_column(titles[0], ratio=1)
    table.add_column("", width=1)
    table.add_column(titles[1], ratio=1)
    for line, times in _counted(lines):
        plain, mark, sharded = _row(line)
        table.add_row(_Code(plain.append_text(times)), mark, _Code(sharded.append_text(times)))
    return table


def _one(lines: Sequence[Line], titles: tuple[str, str]) -> Table:
    """The sharded program, with the plain program's differing lines before its own, marked with a minus."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 1, 0, 0))
    table.add_column(width=1)
    table.add_column()
    table.add_row(Text("-", style="red"), Text(titles[0], style="bold"))
    table.add_row(Text("+", style="green"), Text(titles[1], style="bold"))
    for line, times in _counted(lines):
        plain, mark, sharded = _row(line)
        if line.change in ("changed", "removed"):
            table.add_row(Text("-", style="red"), _Code(plain))
        if line.change != "removed":
            mark = Text("+", style="green") if line.change == "changed" and not line.collective else mark
            table.add_row(mark, _Code(sharded.append_text(times)))
    return table


def _counted(lines: Sequence[Line]) -> Iterator[tuple[Line, Text]]:
    """Each line with its suffix, which says for a class how many layers it stands for."""
    for line, following in zip(lines, [*lines[1:], None], strict=True):
        alike = _ALIKE_LAYERS.search(following.sharded or "") if following else None
        times = f"  × {alike[1]}" if alike and (line.sharded or "").startswith("class ") else ""
        yield line, Text(times, style="bold cyan")


def _row(line: Line) -> tuple[Text, Text, Text]:
    """Both sides of a line and the mark between them, coloured."""
    plain, sharded = _text(line.plain), _text(line.sharded)
    if line.change == "folded":
        return Text(line.plain or "", style="bold cyan"), Text(""), Text(line.sharded or "", style="bold cyan")
    if line.change == "same":
        return plain, Text(""), sharded
    if line.collective:
        style = "bold green" if line.collective == "forward" else "bold yellow"
        sharded.stylize(style, 0, len(_code(line.sharded or "")))
        return plain, Text("→" if line.collective == "forward" else "←", style=style), sharded
    if line.plain is None:
        return plain, Text("+", style="green"), _over(sharded, "green")
    if line.sharded is None:
        return _over(plain, "red"), Text("-", style="red"), sharded
    for text, spans, style in zip(
        (plain, sharded), _changes(_code(line.plain), _code(line.sharded)), ("red", "green"), strict=True
    ):
        for start, stop in spans:
            text.stylize(style, start, stop)
    return plain, Text("~", style="dim"), sharded


def _text(line: str | None) -> Text:
    """A line of code, its comment two spaces behind it and dim."""
    if line is None:
        return Text("")
    if line.lstrip().startswith("#"):
        return Text(line, style="dim")
    code = _code(line)
    comment = line[len(code) :].strip()
    return Text(code).append(f"  {comment}" if comment else "", style="dim")


def _over(text: Text, style: str) -> Text:
    text.stylize(style)
    return text


def _changes(plain: str, sharded: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The spans of two lines, word by word, in which they differ."""
    a, b = _TOKEN.findall(plain), _TOKEN.findall(sharded)
    left: list[tuple[int, int]] = []
    right: list[tuple[int, int]] = []
    for tag, i0, i1, j0, j1 in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if tag != "equal":
            left.append((len("".join(a[:i0])), len("".join(a[:i1]))))
            right.append((len("".join(b[:j0])), len("".join(b[:j1]))))
    return left, right


def _match(plain: Sequence[str], sharded: Sequence[str]) -> Iterator[Line]:
    """Pairs the lines of two stretches that have no equal line, in order, such that the total similarity is largest."""
    if not plain or not sharded:
        yield from (Line(p, None, "removed") for p in plain)
        yield from (Line(None, s, "inserted") for s in sharded)
        return

    @cache
    def likeness(i: int, j: int) -> float:
        ratio = SequenceMatcher(None, _code(plain[i]), _code(sharded[j]), autojunk=False).ratio()
        return ratio if ratio >= _ALIKE else 0.0

    n, m = len(plain), len(sharded)
    best = [[0.0] * (m + 1) for _ in range(n + 1)]
    for i in range(n - 1, -1, -1):
        for j in range(m - 1, -1, -1):
            best[i][j] = max(best[i + 1][j], best[i][j + 1], best[i + 1][j + 1] + likeness(i, j))
    i = j = 0
    while i < n and j < m:
        if likeness(i, j) and best[i][j] == best[i + 1][j + 1] + likeness(i, j):
            yield Line(plain[i], sharded[j], "changed")
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            yield Line(plain[i], None, "removed")
            i += 1
        else:
            yield Line(None, sharded[j], "inserted")
            j += 1
    yield from (Line(p, None, "removed") for p in plain[i:])
    yield from (Line(None, s, "inserted") for s in sharded[j:])


def _repetition(shapes: Sequence[tuple[object, ...]], start: int, longest: int = 400) -> tuple[int, int]:
    """The period and the count of the repetition from `start` on that covers most lines; of equals, the shorter one."""
    found = (1, 1)
    for period in range(2, min(longest, (len(shapes) - start) // 2) + 1):
        if shapes[start] != shapes[start + period]:
            continue
        times = 1
        while shapes[start : start + period] == shapes[start + times * period : start + (times + 1) * period]:
            times += 1
        if times > 1 and period * times > max(_FEW, found[0] * found[1]):
            found = (period, times)
    return found


def _code(line: str) -> str:
    """A line without its comment, by which the two programs are compared."""
    return re.sub(r"\s+#.*$", "", line).rstrip()


def _numberless(line: str | None) -> str | None:
    return None if line is None else re.sub(r"\d+", "#", line)
