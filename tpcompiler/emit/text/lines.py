"""Statements as lines of at most 120 columns, with their comments aligned and the code of submodules in paragraphs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby

from tpcompiler.emit.text.wrap import LIMIT, wrap

_COLUMN = 84  # comments are aligned at the widest statement that ends before this column

Section = tuple[str, str]  # a submodule: its name within the module being written, and its class


@dataclass(frozen=True)
class CodeLine:
    """A statement, the shape of its result, a note about it, and the submodule whose code it is."""

    text: str
    shape: str = ""
    note: str = ""
    section: Section | None = None


def returning(lines: list[CodeLine], returned: str) -> list[CodeLine]:
    """The lines followed by a return. An assignment to the returned variable in the last line becomes the return."""
    last = lines[-1] if lines else None
    if last is not None and returned.isidentifier() and last.text.startswith(f"{returned} = "):
        return [*lines[:-1], replace(last, text=f"return {last.text[len(returned) + 3 :]}")]
    return [*lines, CodeLine(f"return {returned}")]


def block(lines: list[CodeLine], indent: int) -> list[str]:
    """The statements with their comments. The code of a submodule is a paragraph headed by the submodule's name."""
    out: list[str] = []
    apart = False
    for section, members in groupby(lines, key=lambda line: line.section):
        group = list(members)
        title = f"# {section[0]}: {section[1]}" if section is not None and section[1] and len(group) > 1 else ""
        if out and (title or apart):
            out.append("")
        if title:
            out.append(shortened(" " * indent + title))
        out += _commented(group, indent)
        apart = bool(title)
    return out


def _commented(lines: list[CodeLine], indent: int) -> list[str]:
    """The statements of one paragraph, with their comments in one column where they fit there."""
    codes = []
    for line in lines:
        stripped = line.text.lstrip(" ")
        codes.append(wrap(stripped, indent + len(line.text) - len(stripped)))
    lengths = [len(code[-1]) for code, line in zip(codes, lines, strict=True) if line.shape or line.note]
    column = max((n for n in lengths if n <= _COLUMN), default=0)
    return [text for code, line in zip(codes, lines, strict=True) for text in _with_comment(code, line, column)]


def _with_comment(code: list[str], line: CodeLine, column: int) -> list[str]:
    """The comment goes behind the statement if it fits, a note otherwise above it. A shape is then left out."""
    shape = line.shape if len(code) == 1 else ""
    both = "  ".join(c for c in (shape, line.note) if c)
    for comment in (both, line.note):
        end = next((e for e in (code[-1].ljust(column), code[-1]) if len(e) + 4 + len(comment) <= LIMIT), None)
        if comment and end is not None:
            return [*code[:-1], f"{end}  # {comment}"]
    if not line.note:
        return code
    return [" " * (len(code[0]) - len(code[0].lstrip())) + f"# {line.note}", *code]


def shortened(line: str) -> str:
    """A comment or docstring shortened to one line by leaving out its middle."""
    return line if len(line) <= LIMIT else f"{line[: LIMIT // 2 - 1]}…{line[-(LIMIT // 2) :]}"
