"""`OpRule`, the one record of what any stage knows about an op, and `OpCall`, the call that its line is written for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tpcompiler.ops.views import Shape

FORMS = ("", "lookup", "layer_norm", "rms_norm", "loss")
PARTS = ("", "span", "segments")


@dataclass(frozen=True)
class OpCall:
    """One call of an op, as its rule sees it."""

    operands: tuple[Shape | None, ...]  # shapes of tensors in schema order, lists flattened; None for one left out
    results: tuple[Shape, ...]
    args: Mapping[str, Any]  # every argument by its schema name, with defaults filled in; a tensor is its node
    floating: tuple[bool, ...] = ()  # whether each operand has a floating dtype

    def shape(self, i: int = 0) -> Shape:
        shape = self.operands[i]
        assert shape is not None
        return shape

    def rank(self, i: int = 0) -> int:
        return len(self.shape(i))

    def dim(self, name: str = "dim") -> int:
        return int(self.args[name]) % max(self.rank(), 1)

    def dims(self, name: str = "dim") -> list[int]:
        """The dimensions that an argument lists. As in torch, an empty list or None stands for all dimensions."""
        given, n = self.args.get(name), self.rank()
        if given is None or given == [] or n == 0:
            return list(range(n))
        return [i % n for i in (given if isinstance(given, list | tuple) else [given])]


Line = str | tuple[str, dict[str, int]] | None  # a line, perhaps with sizes of letters; None: these arguments have none


@dataclass(frozen=True)
class WeightProduct:
    """The names of the arguments of an op that computes `x @ weight + bias`."""

    x: str
    weight: str
    bias: str = ""
    along: int = -1  # the weight's output dimension: 0 for a weight [out, in], as `linear` has it


@dataclass(frozen=True)
class OpRule:
    """What axes, plan, partition, passes, the FLOP counter and recomputation know about an op.

    `line` is in the notation of `notation.py`, or a function that writes it for one call.

    What the dimensions are
        sizes     letter → the argument that is its size; an argument that is a list has the sizes of `r0`, `r1`, ….
                  When the letter is split, the partitioner replaces the argument by this rank's size
        shape     the argument that lists the result's sizes, from dimension `dim` on if the op has such an argument
        part      "span": `start` and `end` are positions along dimension `dim`; "segments": the results are segments
                  of dimension `dim`, as `split_with_sizes` gives them
    What the op computes
        sums      a contracted letter may be split, since the result is the sum of the ranks' partial results
        average   the op divides the sum by the number of elements that are summed
        scales    arguments that must be 1 for the sum to be one of products and a bias
        form      the runtime's operator for a part of a letter marked `+`: "lookup", "layer_norm", "rms_norm", "loss".
                  It reads the op's arguments by the names that torch's own op has
        product   the op is `x @ weight + bias`
        bias      of another product: the argument that is added to it, a number per element of dimension 1
        products  pairs of operands that are multiplied (-1 is the result), for counting FLOPs, where `sums` does not
                  say it. An op with two pairs is attention
        linear    the operands in which the op is linear, each while the others are fixed
    What happens around it
        gradient  gradients flow through the op to its operands
        forgets   backward needs neither the op's operands nor its result, as for a sum
        kept      selective recomputation keeps the result for backward instead of computing it again
        taught    the record is a user's (`tpc.rule`)
        constant  the op reads no values, so that any rank can compute it
        sizes_alone  the op reads the sizes of its operand and none of its values
    Along the sequence, for generation token by token
        moves     the op returns values of its one operand, all or some of them, and computes nothing
        neutral   the value at which an element along a dimension marked `!` does not change the other results
        scan      along such a dimension, a result depends only on the elements up to its own
    """

    line: str | Callable[[OpCall], Line]
    sizes: Mapping[str, str] = field(default_factory=dict)
    shape: str = ""
    part: str = ""
    sums: bool = False
    average: bool = False
    scales: tuple[str, ...] = ()
    form: str = ""
    product: WeightProduct | None = None
    bias: str = ""
    products: tuple[tuple[int, int], ...] = ()
    linear: tuple[int, ...] = ()
    gradient: bool = True
    forgets: bool = False
    kept: bool = False
    taught: bool = False
    constant: bool = False
    sizes_alone: bool = False
    moves: bool = False
    neutral: float | None = None
    scan: bool = False

    def __post_init__(self) -> None:
        for name, known in (("form", FORMS), ("part", PARTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is not known: use one of {', '.join(known[1:])}")

    @property
    def unread(self) -> frozenset[int]:
        """The indices of the operands whose values the op does not read (`_` in the line)."""
        sides = self.line.split("->")[0].split(",") if isinstance(self.line, str) else ()
        return frozenset(i for i, side in enumerate(sides) if side.strip() == "_")

    def adds_up(self, args: Mapping[str, Any]) -> bool:
        """Whether the ranks' partial results of a call with these arguments add up."""
        return self.sums and all(args[name] == 1 for name in self.scales)

    def bound(self, args: Mapping[str, Any]) -> dict[str, tuple[str, int | None]]:
        """For each letter whose size is an argument: the argument's name, and an index when the argument is a list."""
        out: dict[str, tuple[str, int | None]] = {}
        for letter, name in self.sizes.items():
            if isinstance(args[name], list | tuple):
                out |= {f"{letter}{i}": (name, i) for i in range(len(args[name]))}
            else:
                out[letter] = (name, None)
        return out

    def pattern(self, call: OpCall) -> tuple[str, dict[str, int]] | None:
        """The line for one call, and the sizes of letters that shapes alone do not tell. None if the record has no line
        for such arguments."""
        said = self.line if isinstance(self.line, str) else self.line(call)
        text, sizes = said if isinstance(said, tuple) else (said, {})
        if text is not None and "<" in text:
            text = _around(text, call)
        for letter, (name, i) in self.bound(call.args).items():
            value = call.args[name] if i is None else call.args[name][i]
            if not isinstance(value, int):
                return None
            sizes = {**sizes, letter: value}
        return None if text is None else (text, sizes)


def _around(text: str, call: OpCall) -> str | None:
    """The line with `<` and `>` written out as the first operand's dimensions before and after dimension `dim`."""
    name = "dim" if "dim" in call.args else "dimension"
    if call.args.get(name) is None:
        return None
    d, i = letters(call.rank()), call.dim(name)
    return text.replace("<", " ".join(d[:i])).replace("->", "\0").replace(">", " ".join(d[i + 1 :])).replace("\0", "->")


def letters(n: int, prefix: str = "d") -> list[str]:
    return [f"{prefix}{i}" for i in range(n)]


def line(operand: list[str], result: list[str]) -> str:
    return f"{' '.join(operand)} -> {' '.join(result)}"
