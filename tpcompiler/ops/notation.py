"""The notation of rules: how an op's operands' and results' dimensions relate, in one line.

    linear   "... i, o i, o -> ... o"         a letter is a dimension; shared letters are one axis; i is contracted
    softmax  "... n! -> ... n!"               ! = needed whole
    lookup   "v+ h, ... -> ... h"             + = may be split, because the runtime has a form of the op for a part
    split    "... (q | k) -> ... q, ... k"    a concatenation
    view     "b (h d) -> b h d"               a product, major first
    repeat   "< n > -> < (n r) >"             < and > = the dimensions before and after dimension `dim`
    type_as  "..., _ -> ..."                  _ = an operand whose values the op does not read

`...` stands for any number of dimensions, which are aligned at the right and broadcast. `...!` stands for dimensions
that are all needed whole. `1` is a dimension of one element.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from tpcompiler.errors import RuleError

ELLIPSIS, WHOLE_ELLIPSIS = "...", "...!"
_TOKEN = re.compile(r"\.\.\.!?|[A-Za-z][A-Za-z0-9]*[!+]?|1|[()|_]")


@dataclass(frozen=True)
class Letter:
    """A letter of a rule: a dimension or a factor of one."""

    name: str
    whole: bool = False  # marked `!`
    special: bool = False  # marked `+`


@dataclass(frozen=True)
class LetterGroup:
    """A dimension made of several letters: a product `(a b)` or a concatenation `(a | b)`."""

    kind: str  # "product" | "concat"
    parts: tuple[Letter | LetterGroup, ...]

    def letters(self) -> tuple[Letter, ...]:
        return tuple(x for p in self.parts for x in ((p,) if isinstance(p, Letter) else p.letters()))


Item = Letter | LetterGroup | str  # str: "...", "...!" or "1"


@dataclass(frozen=True)
class Pattern:
    """A rule's line, parsed: one side for each operand and result, one item for each dimension."""

    text: str
    operands: tuple[tuple[Item, ...] | None, ...]  # None for `_`
    results: tuple[tuple[Item, ...], ...]

    def letters(self, side: tuple[tuple[Item, ...] | None, ...]) -> set[str]:
        return {x.name for items in side for item in items or () for x in letters_of(item)}

    @property
    def dropped(self) -> set[str]:
        """The letters of segments that no result has. The op leaves such segments out; it does not sum them."""
        segments = {x.name for items in self.operands for item in items or () for x in _segments(item)}
        return segments - self.letters(self.results)

    def marked(self, attribute: str) -> set[str]:
        """The letters that are "whole" or "special" in any place."""
        sides = (*self.operands, *self.results)
        return {x.name for items in sides for item in items or () for x in letters_of(item) if getattr(x, attribute)}


def letters_of(item: Item) -> tuple[Letter, ...]:
    """The letters of one dimension, in order."""
    if isinstance(item, Letter):
        return (item,)
    return item.letters() if isinstance(item, LetterGroup) else ()


def _segments(item: Item) -> tuple[Letter, ...]:
    return item.letters() if isinstance(item, LetterGroup) and item.kind == "concat" else ()


@lru_cache(maxsize=4096)
def parse(text: str) -> Pattern:
    """Parses a rule's line. Raises `RuleError`, which names the part that cannot be read."""
    sides = text.split("->")
    if len(sides) != 2:
        raise RuleError(f"rule {text!r}: needs exactly one '->'")
    operands = tuple(None if part.strip() == "_" else _tensor(part, text) for part in sides[0].split(","))
    results = tuple(_tensor(part, text) for part in sides[1].split(","))
    return Pattern(text, operands, results)


def _tensor(part: str, text: str) -> tuple[Item, ...]:
    if rest := _TOKEN.sub("", part).strip():
        raise RuleError(f"rule {text!r}: cannot read {rest!r}")
    tokens = _TOKEN.findall(part)[::-1]
    items: list[Item] = []
    while tokens:
        token = tokens.pop()
        if token in (ELLIPSIS, WHOLE_ELLIPSIS, "1"):
            items.append(token)
        elif token == "(":
            items.append(_group(tokens, text))
        elif token in ")|_":
            raise RuleError(f"rule {text!r}: unexpected {token!r}")
        else:
            items.append(_letter(token))
    return tuple(items)


def _group(tokens: list[str], text: str) -> LetterGroup:
    segments: list[list[Letter | LetterGroup]] = [[]]
    while True:
        if not tokens:
            raise RuleError(f"rule {text!r}: a parenthesis is not closed")
        token = tokens.pop()
        if token == ")":
            break
        if token == "|":
            segments.append([])
        elif token == "(":
            segments[-1].append(_group(tokens, text))
        else:
            segments[-1].append(_letter(token))
    if len(segments) == 1:
        return LetterGroup("product", tuple(segments[0]))
    return LetterGroup("concat", tuple(s[0] if len(s) == 1 else LetterGroup("product", tuple(s)) for s in segments))


def _letter(token: str) -> Letter:
    return Letter(token.rstrip("!+"), whole=token.endswith("!"), special=token.endswith("+"))


def check_line(text: str) -> set[str]:
    """The letters of a line, which may contain `<` and `>`. Raises `RuleError` as `parse` does."""
    pattern = parse(re.sub(r"<|(?<!-)>", "", text))
    return pattern.letters((*pattern.operands, *pattern.results))
