"""Statements as lines of text: blocks, comments in columns, at most 120 columns."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tpcompiler.emit.layers.steps import Section
from tpcompiler.emit.text.wrap import LIMIT, wrap

_COLUMN = 84  # comments stand in one column up to here


@dataclass(frozen=True)
class Line:
    """A statement, and what goes behind it: a value's shape, what else there is to say. `section` begins paragraphs."""

    text: str
    shape: str = ""
    note: str = ""
    section: Section | None = None


def returning(lines: list[Line], returned: str) -> list[Line]:
    """The lines and the return; a last assignment of what is returned is itself the return."""
    last = lines[-1] if lines else None
    if last is not None and returned.isidentifier() and last.text.startswith(f"{returned} = "):
        return [*lines[:-1], replace(last, text=f"return {last.text[len(returned) + 3 :]}")]
    return [*lines, Line(f"return {returned}")]


def block(lines: list[Line], indent: int) -> list[str]:
    """Statements with their comments; the code of a submodule is a paragraph that begins with its name."""
    groups: list[list[Line]] = []
    for line in lines:
        if groups and groups[-1][0].section == line.section:
            groups[-1].append(line)
        else:
            groups.append([line])
    out: list[str] = []
    apart = False
    for group in groups:
        section = group[0].section
        title = f"# {section[0]}: {section[1]}" if section is not None and section[1] and len(group) > 1 else ""
        if out and (title or apart):
            out.append("")
        if title:
            out.append(" " * indent + title)
        out += _commented(group, indent)
        apart = bool(title)
    return out


def _commented(lines: list[Line], indent: int) -> list[str]:
    """The statements of one paragraph, their comments in one column where they can be."""
    codes = []
    for line in lines:
        stripped = line.text.lstrip(" ")
        codes.append(wrap(stripped, indent + len(line.text) - len(stripped)))
    lengths = [len(code[-1]) for code, line in zip(codes, lines, strict=True) if line.shape or line.note]
    column = max((n for n in lengths if n <= _COLUMN), default=0)
    return [text for code, line in zip(codes, lines, strict=True) for text in _with_comment(code, line, column)]


def _with_comment(code: list[str], line: Line, column: int) -> list[str]:
    shape = line.shape if len(code) == 1 else ""
    both = "  ".join(c for c in (shape, line.note) if c)
    for comment in (both, line.note):  # a shape alone is not worth a line of its own
        end = next((e for e in (code[-1].ljust(column), code[-1]) if len(e) + 4 + len(comment) <= LIMIT), None)
        if comment and end is not None:
            return [*code[:-1], f"{end}  # {comment}"]
    if not line.note:
        return code
    return [" " * (len(code[0]) - len(code[0].lstrip())) + f"# {line.note}", *code]
