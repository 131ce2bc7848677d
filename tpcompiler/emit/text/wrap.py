"""Long statements broken at their outermost brackets, so that lines have at most 120 columns."""

from __future__ import annotations

from collections.abc import Iterator

LIMIT = 120


def wrap(line: str, indent: int) -> list[str]:
    """The statement at `indent` columns, in as few lines as fit. A statement without brackets stays one line."""
    pad = " " * indent
    found = None if indent + len(line) <= LIMIT else _brackets(line)
    if found is None:
        return [pad + line]
    start, stop = found
    inside = _pieces(line[start + 1 : stop])
    head, tail = line[: start + 1], line[stop:]
    tuple_of_one = len(inside) == 1 and line[start + 1 : stop].rstrip().endswith(",")
    joined = ", ".join(inside) + ("," if tuple_of_one else "")
    if not joined:
        return [pad + line]
    if indent + 4 + len(joined) <= LIMIT:
        body = [" " * (indent + 4) + joined]
    elif (at := _comprehension(joined)) is not None:
        body = [*wrap(joined[:at], indent + 4), *wrap(joined[at + 1 :], indent + 4)]
    else:
        called = line[start] == "(" and start > 0 and (line[start - 1].isalnum() or line[start - 1] in "_)]")
        # A comma behind a single value in plain parentheses would make it a tuple.
        comma = "," if len(inside) > 1 or called or tuple_of_one else ""
        body = [text for piece in inside for text in wrap(piece + comma, indent + 4)]
    tail_lines = wrap(tail, indent) if indent + len(tail) > LIMIT else [pad + tail]
    return [pad + head, *body, *tail_lines]


def _outside_strings(text: str) -> Iterator[tuple[int, str, int]]:
    """(index, character, depth in brackets) of what is not in a string. A bracket has the depth around it."""
    depth, quote = 0, ""
    for i, c in enumerate(text):
        if quote:
            quote = "" if c == quote else quote
            continue
        if c in "\"'":
            quote = c
        depth -= c in ")]}"
        yield i, c, depth
        depth += c in "([{"


def _brackets(line: str) -> tuple[int, int] | None:
    """The longest outermost pair of brackets with something inside."""
    best, start = None, 0
    for i, c, depth in _outside_strings(line):
        if depth == 0 and c in "([{":
            start = i
        elif depth == 0 and c in ")]}" and i > start + 1 and (best is None or i - start > best[1] - best[0]):
            best = (start, i)
    return best


def _pieces(text: str) -> list[str]:
    """The text split at its outermost commas."""
    commas = [i for i, c, depth in _outside_strings(text) if c == "," and depth == 0]
    pieces = [text[a:b].strip() for a, b in zip([0, *(i + 1 for i in commas)], [*commas, len(text)], strict=True)]
    return pieces if pieces[-1] else pieces[:-1]


def _comprehension(text: str) -> int | None:
    """Where the ` for ` of an outermost comprehension begins."""
    return next((i for i, _, depth in _outside_strings(text) if depth == 0 and text.startswith(" for ", i)), None)
