"""Python expressions as text with a precedence, so that parentheses appear only where they are needed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from keyword import iskeyword
from typing import Any

import torch

# Python's precedence, loosest first (the table of the reference manual, reduced to the levels used here).
TERNARY, OR, AND, NOT, COMPARE, BIT_OR, BIT_XOR, BIT_AND, SHIFT, ADD, MULTIPLY, UNARY, POWER, ATOM = range(14)


@dataclass(frozen=True)
class Expr:
    """A Python expression. A subscript `base[entries]` keeps its parts in `index`, so that another can join it."""

    text: str
    level: int = ATOM
    index: tuple[Expr, tuple[str, ...]] | None = None

    def at(self, level: int) -> str:
        """The text as an operand of an operator of `level`, in parentheses if that operator binds tighter."""
        return self.text if self.level >= level else f"({self.text})"

    def __str__(self) -> str:
        return self.text


def binary(left: Expr, symbol: str, right: Expr, level: int) -> Expr:
    """`left symbol right`. Operators associate to the left; comparisons do not associate."""
    return Expr(f"{left.at(level + (level == COMPARE))} {symbol} {right.at(level + 1)}", level)


def call(function: str, args: Iterable[str]) -> Expr:
    return Expr(f"{function}({', '.join(args)})")


def tuple_of(items: Iterable[str]) -> str:
    """A tuple in parentheses."""
    items = list(items)
    return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"


def list_of(items: Iterable[str]) -> str:
    return f"[{', '.join(items)}]"


def member(base: str, name: str) -> Expr:
    """`base.name`, whatever the name is."""
    return Expr(f"{base}.{name}" if is_name(name) else f"getattr({base}, {constant(name)})")


def assignment(base: str, name: str, value: str) -> str:
    """The statement that sets `base.name`, whatever the name is."""
    return f"{base}.{name} = {value}" if is_name(name) else f"setattr({base}, {constant(name)}, {value})"


def is_name(text: str) -> bool:
    """Can the text stand in source as a name?"""
    return text.isidentifier() and not iskeyword(text)


def progression(values: Sequence[int | float], start: int) -> str | None:
    """`3 * i + 1` for 1, 4, 7, …, where `i` counts from `start`; None if the values are no arithmetic progression."""
    if len(values) < 2 or not all(isinstance(v, int) for v in values):
        return None
    step = values[1] - values[0]
    base = values[0] - step * start
    if any(v != base + step * i for i, v in enumerate(values, start)):
        return None
    term = "i" if step == 1 else f"{step} * i"
    return term if base == 0 else f"{term} + {base}" if base > 0 else f"{term} - {-base}"


# --- literals ---------------------------------------------------------------------------------------------------------

_FINFO = {
    getattr(torch.finfo(dtype), which): f"torch.finfo({dtype}).{which}"
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float32)
    for which in ("min", "max")
}


def number(value: int | float | complex) -> Expr:
    """A literal that evaluates to exactly `value`, including negative zero, infinities and NaN."""
    if isinstance(value, float):
        if math.isnan(value):
            return Expr("torch.nan")
        if math.isinf(value):
            return Expr("torch.inf") if value > 0 else Expr("-torch.inf", UNARY)
        if abs(value) > 1e4 and value in _FINFO:
            return Expr(_FINFO[value])
        if (root := _root(value)) is not None:
            return root
    text = repr(value)
    return Expr(text, UNARY if text.startswith("-") else ATOM)


def _root(value: float) -> Expr | None:
    """`128**-0.5` where that equals the value exactly: the model's author will recognize the number."""
    square = value * value
    if not 1e-9 < square < 1e9:
        return None
    for n, power in ((round(square), 0.5), (round(1 / square), -0.5)):
        if n > 1 and not (n**0.5).is_integer() and value == n**power:
            return Expr(f"{n}**{power}", POWER)
    return None


def constant(value: Any) -> Expr:
    """A literal of any constant that graphs contain. An `Expr` stands for itself."""
    if isinstance(value, Expr):
        return value
    if value is None or isinstance(value, bool):
        return Expr(repr(value))
    if value is Ellipsis:
        return Expr("...")
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
        return Expr(list_of(constant(v).text for v in value))
    if isinstance(value, dict):
        return Expr("{" + ", ".join(f"{constant(k)}: {constant(v)}" for k, v in value.items()) + "}")
    raise AssertionError(f"no literal for {value!r}")


def quoted(text: str) -> str:
    """A string literal, in double quotes unless the text contains some."""
    inner = repr(text)[1:-1]
    if '"' in text or repr(text)[0] == '"':
        return repr(text)
    return f'"{inner}"'
