"""Lines of at most 120 columns: long statements are broken at their outermost brackets."""

from __future__ import annotations

LIMIT = 120


def wrap(line: str, indent: int) -> list[str]:
    """The statement at `indent` columns, as few lines as fit."""
    pad = " " * indent
    if indent + len(line) <= LIMIT:
        return [pad + line]
    found = _brackets(line)
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
        comma = (
            "," if len(inside) > 1 or called or tuple_of_one else ""
        )  # after a value alone in its brackets it would make a tuple
        body = [text for piece in inside for text in wrap(piece + comma, indent + 4)]
    tail_lines = wrap(tail, indent) if indent + len(tail) > LIMIT else [pad + tail]
    return [pad + head, *body, *tail_lines]


def _brackets(line: str) -> tuple[int, int] | None:
    """The longest outermost pair of brackets."""
    best, depth, start, quote = None, 0, 0, ""
    for i, c in enumerate(line):
        if quote:
            quote = "" if c == quote else quote
        elif c in "\"'":
            quote = c
        elif c in "([{":
            if depth == 0:
                start = i
            depth += 1
        elif c in ")]}":
            depth -= 1
            if depth == 0 and i > start + 1 and (best is None or i - start > best[1] - best[0]):
                best = (start, i)
    return best


def _pieces(text: str) -> list[str]:
    """Split at the commas outside of brackets."""
    out, depth, start, quote = [], 0, 0, ""
    for i, c in enumerate(text):
        if quote:
            quote = "" if c == quote else quote
        elif c in "\"'":
            quote = c
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
        elif c == "," and depth == 0:
            out.append(text[start:i].strip())
            start = i + 1
    rest = text[start:].strip()
    return out + ([rest] if rest else [])


def _comprehension(text: str) -> int | None:
    """Where the ` for ` of a comprehension stands."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if depth == 0 and text.startswith(" for ", i):
            return i
    return None
