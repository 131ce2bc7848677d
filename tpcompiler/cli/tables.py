"""Draws the reports of `tpc shard`, `tpc verify` and `tpc explain`, which `--json` prints, as tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tpcompiler.errors import format_bytes

Row = Mapping[str, Any]
Folded = Sequence[tuple[str, Sequence[Row]]]  # groups of rows: each has a common name and is drawn as one line

_KIND = {"mlp": "green", "attention": "cyan", "embedding": "yellow", "head": "magenta", "other": "blue"}
_COLLECTIVE = {"all_reduce": "all-reduce", "all_gather": "all-gather", "reduce_scatter": "reduce-scatter"}
_DIRECTION = {"forward": "→ forward", "backward": "← backward"}
_DIRECTION_STYLE = {"forward": "green", "backward": "yellow"}
_WIDE = 110  # columns; from this width on, every fact about a collective has a column of its own


def shard_report(report: Mapping[str, Any], device_gib: float | None = None) -> RenderableType:
    """The tables of blocks, collectives, memory per rank, and replicated parameters."""
    parts = [
        blocks(report["blocks"]),
        collectives(report["collectives"]),
        memory(report["memory"], device_gib),
        replicated(report["replicated"]),
    ]
    return Group(*(part for part in parts if part is not None))


def blocks(rows: Sequence[Row]) -> RenderableType | None:
    """The table of blocks. Blocks that differ only in their layers' numbers share a line: `h.*.mlp` × 72."""
    if not rows:
        return None
    same = lambda r: (r["kind"], r["axis"], r["size"], tuple(r["local"]), tuple(r["over"]))  # noqa: E731
    groups = fold(rows, "name", same)
    tables = _Widths(_blocks(groups, wide=True), _blocks(groups, wide=False))
    return _titled("Blocks", "what is split, and how much of it a rank holds", tables)


def _blocks(groups: Folded, wide: bool) -> Table:
    table = _table("block", "kind", "axis", numbers=("layers", "size", "a rank", *(["parameters"] * wide)))
    if wide:
        table.add_column("over")
    for name, group in groups:
        row = group[0]
        parameters, over = sum(_count(r["parameters"]) for r in group), " · ".join(row["over"])
        table.add_row(
            name if wide else _below(name, f"{parameters} parameter{'s' * (parameters > 1)}, over {over}"),
            Text(row["kind"], style=_KIND.get(row["kind"], "")),
            row["axis"],
            str(sum(r["layers"] for r in group)),
            f"{row['size']:,}",
            local_sizes(row["local"]),
            *((str(parameters), over) if wide else ()),
        )
    return table


def collectives(rows: Sequence[Row]) -> RenderableType:
    """The table of collectives. Those that differ only in their layer share a line, with their number in a step."""
    same = lambda r: (r["kind"], r["direction"], tuple(r["over"]), r["bytes"], _alike(r["reason"]))  # noqa: E731
    groups = fold(rows, "block", same)
    tables = _Widths(_collectives_wide(groups), _collectives_narrow(groups))
    return _titled("Collectives", "what a rank sends in one forward and backward", tables)


def _collectives_wide(groups: Folded) -> Table:
    """The wide table, with a column for every fact."""
    table = _table("where", "kind", "direction", "over", numbers=("bytes", "count", "in all"))
    table.add_column("reason", ratio=1, style="dim")
    for where, group in groups:
        row = group[0]
        kind = _COLLECTIVE.get(row["kind"], row["kind"])
        arrow = Text(_DIRECTION[row["direction"]], style=_DIRECTION_STYLE[row["direction"]])
        reason = _one_of([r["reason"] for r in group])
        table.add_row(where, kind, arrow, " · ".join(row["over"]), *_traffic(group), reason)
    table.add_section()
    for direction, count, total in _totals(groups):
        table.add_row("all", "", _DIRECTION[direction], "", "", f"× {count}", format_bytes(total), "", style="bold")
    if not groups:
        table.add_row("none")
    return table


def _collectives_narrow(groups: Folded) -> Table:
    """The narrow table, with columns for numbers only. The reason, and the mesh dimensions if they vary, go below."""
    table = _table("where", "kind", numbers=("bytes", "count", "in all"))
    several = len({tuple(group[0]["over"]) for _, group in groups}) > 1
    for where, group in groups:
        row = group[0]
        reason = _one_of([r["reason"] for r in group]) + (f", over {' · '.join(row['over'])}" if several else "")
        kind = _arrow(row["direction"], str(_COLLECTIVE.get(row["kind"], row["kind"])))
        table.add_row(_below(where, reason), kind, *_traffic(group))
    table.add_section()
    for direction, count, total in _totals(groups):
        table.add_row("all", _arrow(direction, direction), "", f"× {count}", format_bytes(total), style="bold")
    if not groups:
        table.add_row("none")
    return table


def _traffic(group: Sequence[Row]) -> tuple[str, str, str]:
    """The bytes of one collective, how many there are, and the bytes of all."""
    each, count = group[0]["bytes"], _times(group)
    return format_bytes(each), f"× {count}", format_bytes(count * each)


def _arrow(direction: str, word: str) -> Text:
    return Text(f"{_DIRECTION[direction][0]} {word}", style=_DIRECTION_STYLE[direction])


def _times(group: Sequence[Row]) -> int:
    return sum(row["count"] for row in group)


def _totals(groups: Folded) -> Iterator[tuple[str, int, int]]:
    """The number of collectives and of bytes, for each direction that has any."""
    for direction in _DIRECTION:
        members = [row for _, group in groups for row in group if row["direction"] == direction]
        if members:
            yield direction, _times(members), sum(row["count"] * row["bytes"] for row in members)


def memory(row: Row, device_gib: float | None = None) -> RenderableType:
    """The table of memory on the rank that holds most. Activations, which depend on the batch, are not included."""
    table = _table(numbers=("parameters", "gradients", "optimizer", "total"))
    table.columns[-1].style = "bold"
    cells = [format_bytes(row[key]) for key in ("parameters", "gradients", "optimizer", "total")]
    if device_gib:
        share = row["total"] / (device_gib * 2**30)
        table.add_column(f"of {device_gib:g} GiB", justify="right", style="red" if share > 1 else "green")
        cells.append(f"{share:.0%}")
    table.add_row(*cells)
    return _titled("Memory a rank", "without activations", table)


def replicated(rows: Sequence[Row]) -> RenderableType | None:
    """The table of parameters that every rank holds whole, with the reasons. The largest come first."""
    if not rows:
        return None
    table = _table("parameter", numbers=("count", "bytes each", "in all"))
    table.add_column("reason", ratio=1, style="dim")
    folded = fold(rows, "name", lambda r: (r["bytes"], _alike(r["reason"])))
    for name, group in sorted(folded, key=lambda f: -sum(r["bytes"] for r in f[1])):
        total = sum(r["bytes"] for r in group)
        table.add_row(
            name,
            f"× {len(group)}",
            format_bytes(group[0]["bytes"]),
            format_bytes(total),
            _one_of([r["reason"] for r in group]),
        )
    return _titled("Replicated", "every rank holds it whole", table)


def verify_report(report: Mapping[str, Any]) -> RenderableType:
    """One line for each case, the largest error, and the verdict."""
    table = _table()
    table.add_column("case", ratio=1)
    table.add_column("what is worst", ratio=1, overflow="fold")
    for heading in ("relative error", "allowed"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for case in report["cases"]:
        passed, clean = case["passed"], not case.get("notes")
        mark = Text("equal", style="green") if passed else Text("DIFFERS", style="bold red")
        worst = Text("\n".join([case.get("worst", ""), *case.get("notes", ())]), style="" if clean else "red")
        table.add_row(case["what"], worst, error(case["max_rel_error"]), error(case.get("tolerance")), mark)
    style = "bold green" if report["passed"] else "bold red"
    verdict = Text("passed" if report["passed"] else "FAILED", style=style)
    facts = [f"largest relative error {error(report['max_rel_error'])}"]
    if "sharded_fraction" in report:
        facts.append(f"{report['sharded_fraction']:.1%} of the matrices' bytes are split")
    facts += [f"{count} {name.replace('_', '-')}" for name, count in report.get("collectives", {}).items()]
    found = _titled("Verification", "all ranks against the plain model", table)
    refused = [Text(f"the check refuses {r['said']}", style="red") for r in report.get("check", {}).get("refused", ())]
    return Group(found, *refused, verdict.append("   " + ", ".join(facts), style="not bold default"))


def explain_report(rows: Sequence[Row]) -> RenderableType:
    """The layouts of parameters, and the axes that they are made of, with the reasons why some are whole."""
    layouts = _table("parameter", numbers=("shape",))
    layouts.add_column("layout")
    for name, group in fold(rows, "name", lambda r: (tuple(r["shape"]), tuple(r["layout"]))):
        shape = " × ".join(map(str, group[0]["shape"]))
        layouts.add_row(f"{name}  × {len(group)}" if len(group) > 1 else name, shape, _coloured(group[0]["layout"]))
    axes = _table("axis", numbers=("size",))
    axes.add_column("stands in", overflow="fold")
    axes.add_column("split over, or why not", ratio=1)
    found = [axis for row in rows for dimension in row["axes"] for axis in dimension]
    same = lambda a: (a["size"], tuple(a["over"]), tuple(map(_pattern, a["stands_in"])), tuple(a["reasons"]))  # noqa: E731
    for name, group in fold(found, "name", same):
        axis = group[0]
        names = [shown for shown, _ in fold([{"name": n} for a in group for n in a["stands_in"]], "name", lambda r: 0)]
        why = _few(axis["reasons"], 3)
        over = Text(" · ".join(axis["over"]), style="green") if axis["over"] else Text(why, style="dim")
        axes.add_row(name, f"{axis['size']:,}", _few(names, 4), over)
    return Group(
        _titled("Layout", "the axes of each dimension, major first; axis/ranks is split", layouts),
        _titled("Axes", "split together or not at all", axes),
    )


def _few(items: Sequence[str], most: int) -> str:
    more = [f"… {len(items) - most} more"] if len(items) > most else []
    return "\n".join([*items[:most], *more])


def _coloured(layout: Sequence[str]) -> Text:
    text = Text(", ".join(layout))
    text.highlight_regex(r"[\w]+/[\w·]+", "green")
    return text


def heading(name: str, source: str, ranks: str) -> Text:
    """The first line: what was compiled, for which ranks."""
    return Text(name, style="bold").append(f"  {source}  over {ranks}\n", style="not bold dim")


def fold(rows: Iterable[Row], key: str, same: Callable[[Row], Hashable]) -> list[tuple[str, list[Row]]]:
    """Groups rows that are `same` and whose `key` differs only in numbers; the group of `h.0` … `h.71` is `h.*`.

    A number that all rows of a group have in common is kept. Groups are in the order of their first rows.
    """
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        groups.setdefault((_pattern(row[key]), same(row)), []).append(row)
    return [(common([row[key] for row in group]), group) for group in groups.values()]


def local_sizes(local: Sequence[int]) -> str:
    """The elements of each rank: `4`, or `4, 3, 3` if they differ, or `4, 3 × 7` if there are many."""
    if len(set(local)) <= 1:
        return f"{local[0]:,}" if local else "-"
    runs: list[list[int]] = []
    for n in local:
        if runs and runs[-1][0] == n:
            runs[-1][1] += 1
        else:
            runs.append([n, 1])
    return ", ".join(f"{n:,}" if k == 1 else f"{n:,} × {k}" for n, k in runs)


def error(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}"


@dataclass(frozen=True)
class _Widths:
    """A wide and a narrow table of the same rows. The width of the screen decides which one is drawn."""

    wide: Table
    narrow: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.wide if options.max_width >= _WIDE else self.narrow


def _table(*words: str, numbers: Sequence[str] = ()) -> Table:
    """An empty table, in which long names continue on the next line instead of being cut off."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    for i, heading in enumerate(words):
        table.add_column(heading, overflow="fold", no_wrap=i > 0)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _below(name: str, detail: str) -> RenderableType:
    """A name, with details in an indented line below it."""
    return Group(name, Padding(Text(detail, style="dim"), (0, 0, 0, 2)))


def _titled(title: str, caption: str, table: RenderableType) -> RenderableType:
    """A table under its title and caption, which may be wider than the table."""
    return Group(Text(title, style="bold").append(f"  {caption}", style="not bold dim"), table)


def _count(parameters: Any) -> int:
    return parameters if isinstance(parameters, int) else len(parameters)


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _alike(reason: str) -> str:
    """A reason without the numbers of layers and graph nodes, such as `layer_norm_3` (a first node has no number)."""
    return _pattern(re.sub(r"_\d+\b", "", reason))


def _one_of(reasons: Sequence[str]) -> str:
    return reasons[0] if len(set(reasons)) == 1 else common([re.sub(r"_\d+\b", "", reason) for reason in reasons])


def common(names: Sequence[str]) -> str:
    """One name for several names that differ only in numbers, which become `*`."""
    split = [re.split(r"(\d+)", name) for name in names]
    return "".join(parts[0] if len(set(parts)) == 1 else "*" for parts in zip(*split, strict=True))
