"""The proof that later positions change nothing in a step's new rows, call by call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from tpcompiler.decode.decoder import ALL, NEW, Want
from tpcompiler.decode.future import Future
from tpcompiler.decode.positional import LOW, Positional
from tpcompiler.decode.relate import Related
from tpcompiler.errors import DecodeError
from tpcompiler.ops.notation import Item, LetterGroup
from tpcompiler.ops.notation import letters_of as names

NEARLY = 1 << 20  # a dimension may be the sequence and a few more: a sink beside the scores


class Proof:
    """`long`: the number that stands for the length of the sequence."""

    def __init__(
        self, positional: Positional, future: Future, long: int, refuse: Callable[[fx.Node, str], DecodeError]
    ) -> None:
        self._positional, self._future, self._long, self._refuse = positional, future, long, refuse

    def is_long(self, n: int) -> bool:
        """Whether a size has the length of the sequence in it."""
        return n % self._long == 0 or abs(n - self._long) < NEARLY

    def prove(self, node: fx.Node, related: Related, operands: list[Want], extents: dict[str, str]) -> None:
        """Raises `DecodeError` unless later positions provably change nothing in this call's new rows."""
        for side in (*related.operands, *related.results):
            for item, _ in side or ():
                self.check_segments(node, related, item, extents)
        letters = {
            x.name
            for side in (*related.operands, *related.results)
            for item, _ in side or ()
            for x in names(item)
            if self.is_long(related.sizes.get(x.name, 1))
        }
        for letter in sorted(letters):
            summed = letter in related.contracted
            if not summed and letter not in related.whole:
                if letter not in extents and letter not in related.copies:
                    raise self._refuse(node, "takes positions out of the sequence")
                continue
            neutral = 0.0 if summed and related.rule.sums and not related.rule.average else related.rule.neutral
            if related.rule.scan and extents.get(letter) == ALL:
                continue
            having = [i for i in range(len(operands)) if related.places(related.operands[i], letter)]
            if all(related.nodes[i] not in self._positional.live for i in having) and letter not in extents:
                continue
            if (
                extents.get(letter) == NEW
                or neutral is None
                or not any(self.is_neutral(related, i, operands[i], letter, neutral) for i in having)
            ):
                raise self._refuse(node, "mixes positions, and later ones are not masked out of it")

    def check_segments(self, node: fx.Node, related: Related, item: Item, extents: dict[str, str]) -> None:
        """Raises `DecodeError` where all positions are asked of segments of which the sequence is not the first."""
        if not isinstance(item, LetterGroup):
            return
        long = [
            i for i, p in enumerate(item.parts) if any(self.is_long(related.sizes.get(x.name, 1)) for x in names(p))
        ]
        if item.kind == "concat" and long:
            asked = {extents.get(x.name) for x in names(item) if self.is_long(related.sizes.get(x.name, 1))}
            if long != [0] or asked != {ALL}:
                raise self._refuse(node, "moves positions along the sequence")
        for part in item.parts:
            self.check_segments(node, related, part, extents)

    def is_neutral(self, related: Related, i: int, want: Want, letter: str, neutral: float) -> bool:
        if NEW not in want:
            return False
        places = related.places(related.operands[i], letter)
        if len(places) != 1:
            return False
        value = self._future.upper(related.nodes[i], want.index(NEW), places[0])
        if value is None:
            return False
        return value <= LOW if neutral == -torch.inf else value >= -LOW if neutral == torch.inf else value == neutral

    def masked(self, mask: Any) -> bool:
        if not isinstance(mask, fx.Node) or mask.meta["val"].dim() < 2:
            return False
        rank = mask.meta["val"].dim()
        value = self._future.upper(mask, rank - 2, rank - 1)
        return value is not None and (value == 0 if mask.meta["val"].dtype is torch.bool else value <= LOW)
