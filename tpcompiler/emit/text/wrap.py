"""Long statements broken at their outermost brackets, so that lines have at most 120 columns."""

from __future__ import annotations

from collections.abc import Iterator

LIMIT = 120


_SHORT = 12  # Brackets with less inside are no good place to break a line.


def wrap(line: str, indent: int, inside: bool = False) -> list[str]:
    """The statement at `indent` columns, in as few lines as fit.

    `inside` tells that the line stands in brackets, where it can also be broken at dots.
    """
    pad = " " * indent
    if indent + len(line) <= LIMIT:
        return [pad + line]
    found = _brackets(line)
    useless = found is None or found[1] - found[0] < _SHORT or indent + found[0] >= LIMIT
    if useless and inside:
        return _at_dots(line, indent)
    target, equals, value = line.partition(" = ")
    if useless and equals and indent + len(target) + 5 > LIMIT:
        base, _, last = target.rpartition(".")
        rest = wrap(f"_.{last} = {value}", indent)  # The closing parenthesis takes the place of the underscore.
        return [f"{pad}(", *wrap(base, indent + 4, inside=True), f"{pad}){rest[0][indent + 1 :]}", *rest[1:]]
    if useless and equals:
        return [f"{pad}{target} = (", *wrap(value, indent + 4, inside=True), f"{pad})"]
    return [pad + line] if found is None else _at_brackets(line, indent, *found)


def _at_brackets(line: str, indent: int, start: int, stop: int) -> list[str]:
    """The line broken inside the pair of brackets at `start` and `stop`, and further as needed."""
    pad = " " * indent
    pieces = _pieces(line[start + 1 : stop])
    head, tail = line[: start + 1], line[stop:]
    tuple_of_one = len(pieces) == 1 and line[start + 1 : stop].rstrip().endswith(",")
    joined = ", ".join(pieces) + ("," if tuple_of_one else "")
    if not joined:
        return [pad + line]
    if indent + 4 + len(joined) <= LIMIT:
        body = [" " * (indent + 4) + joined]
    elif (at := _comprehension(joined)) is not None:
        body = [*wrap(joined[:at], indent + 4, True), *wrap(joined[at + 1 :], indent + 4, True)]
    else:
        called = line[start] == "(" and start > 0 and (line[start - 1].isalnum() or line[start - 1] in "_)]")
        # A comma behind a single value in plain parentheses would make it a tuple.
        comma = "," if len(pieces) > 1 or called or tuple_of_one else ""
        body = [text for piece in pieces for text in wrap(piece + comma, indent + 4, True)]
    tail_lines = wrap(tail, indent) if indent + len(tail) > LIMIT else [pad + tail]
    return [pad + head, *body, *tail_lines]


def _at_dots(text: str, indent: int) -> list[str]:
    """The text broken before dots that begin an attribute. Each line is as long as fits."""
    dots = [i for i, c, depth in _outside_strings(text) if c == "." and depth == 0 and text[i + 1 :][:1].isidentifier()]
    out, pad = [""], " " * indent
    for a, b in zip([0, *dots], [*dots, len(text)], strict=True):
        if out[-1] and len(pad) + len(out[-1]) + b - a > LIMIT:
            out[-1] = pad + out[-1]
            out.append("")
            pad = " " * (indent + 4)
        out[-1] += text[a:b]
    return [*out[:-1], pad + out[-1]]


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
