"""Python expressions as text with a precedence, so that parentheses stand where they must and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

# Python's precedence, loosest first (the reference manual's table, the levels used here).
TERNARY, OR, AND, NOT, COMPARE, BIT_OR, BIT_XOR, BIT_AND, SHIFT, ADD, MULTIPLY, UNARY, POWER, ATOM = range(14)


@dataclass(frozen=True)
class Expr:
    """A piece of Python. `index` is set on a subscript (`base[index]`), so that a further one can join it."""

    text: str
    level: int = ATOM
    index: tuple[Expr, tuple[str, ...]] | None = None

    def at(self, level: int) -> str:
        """The text, in parentheses where an operator of `level` would tear it apart."""
        return self.text if self.level >= level else f"({self.text})"

    def __str__(self) -> str:
        return self.text


def binary(left: Expr, symbol: str, right: Expr, level: int) -> Expr:
    """`left symbol right`; left-associative, comparisons not associative at all."""
    return Expr(f"{left.at(level + (level == COMPARE))} {symbol} {right.at(level + 1)}", level)


def call(function: str, args: Iterable[str]) -> Expr:
    return Expr(f"{function}({', '.join(args)})")


def tuple_of(items: Iterable[str]) -> str:
    items = list(items)
    return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"


_FINFO = {
    getattr(torch.finfo(dtype), which): f"torch.finfo({dtype}).{which}"
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float32)
    for which in ("min", "max")
}


def number(value: int | float | complex) -> Expr:
    """A literal that evaluates to `value` exactly, negative zero, infinities and NaN included."""
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value):
            return Expr("torch.nan")
        return Expr("torch.inf") if value > 0 else Expr("-torch.inf", UNARY)
    if isinstance(value, float) and abs(value) > 1e4 and value in _FINFO:
        return Expr(_FINFO[value])
    if isinstance(value, float) and (root := _root(value)) is not None:
        return root
    text = repr(value)
    return Expr(text, UNARY if text.startswith("-") else ATOM)


def _root(value: float) -> Expr | None:
    """`128**-0.5`, where a value is just that: the model's author will know the number again."""
    square = value * value
    if not 1e-9 < square < 1e9:
        return None
    for n, power in ((round(square), 0.5), (round(1 / square), -0.5)):
        if n > 1 and not (n**0.5).is_integer() and value == n**power:
            return Expr(f"{n}**{power}", POWER)
    return None


def constant(value: Any) -> Expr:
    """A literal of a value that graphs carry: numbers, strings, None, dtypes, formats, slices, containers of them."""
    if isinstance(value, Expr):
        return value
    if value is None or value is Ellipsis or isinstance(value, bool):
        return Expr("..." if value is Ellipsis else repr(value))
    if isinstance(value, (int, float, complex)):
        return number(value)
    if isinstance(value, str):
        return Expr(quoted(value))
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return Expr(str(value))
    if isinstance(value, torch.device):
        return Expr(f"torch.device({quoted(str(value))})")
    if isinstance(value, slice):
        return call("slice", (constant(v).text for v in (value.start, value.stop, value.step)))
    if isinstance(value, tuple):
        return Expr(tuple_of(constant(v).text for v in value))
    if isinstance(value, list):
        return Expr(f"[{', '.join(constant(v).text for v in value)}]")
    if isinstance(value, dict):
        return Expr("{" + ", ".join(f"{constant(k)}: {constant(v)}" for k, v in value.items()) + "}")
    raise AssertionError(f"no literal for {value!r}")


def quoted(text: str) -> str:
    """A string literal in double quotes."""
    inner = repr(text)[1:-1]
    if '"' in text or repr(text)[0] == '"':
        return repr(text)
    return f'"{inner}"'
