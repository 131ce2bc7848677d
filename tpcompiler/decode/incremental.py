"""Runs one rank's decoder: it takes tokens and gives this rank's part of the next tokens' logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tpcompiler.decode.decoder import Decoder, Table
from tpcompiler.errors import TpcError
from tpcompiler.execute.interpret import interpret
from tpcompiler.runtime import Ranks
from tpcompiler.runtime.cache import Session


class Incremental:
    """A batch of sequences that grows. Call it with the next tokens of every sequence; it keeps what they leave.

    `state`: this rank's parameters and buffers by name; `capacity`: positions of a sequence at most; `inputs`: by
    placeholder, those that are not along the sequence, such as an encoder's. Raises `TpcError` when the model itself
    has fewer positions than the capacity.
    """

    def __init__(
        self,
        decoder: Decoder,
        ranks: Ranks,
        state: Mapping[str, Tensor],
        capacity: int,
        batch: int,
        inputs: Mapping[str, Tensor] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.decoder, self.ranks, self.state, self.batch, self.device = decoder, ranks, state, batch, device
        self.session = Session(capacity, batch)
        self.tables = self._tables(capacity, dict(inputs or {}))

    def _tables(self, capacity: int, inputs: dict[str, Any]) -> dict[str, Tensor]:
        shape = (self.batch if self.decoder.uniform or inputs else 1, capacity)
        sizes = {name: torch.empty(shape, device="meta") for name in self.decoder.rows}
        try:
            with torch.no_grad():
                made = interpret(self.decoder.once, self.ranks, self.state, {**sizes, **inputs}, device=self.device)
        except (RuntimeError, IndexError) as e:
            raise self._too_long(capacity) from e
        for table, value in zip(self.decoder.tables, made, strict=True):
            self._check(table, value, capacity)
        return {t.name: v for t, v in zip(self.decoder.tables, made, strict=True)}

    def _check(self, table: Table, value: Tensor, capacity: int) -> None:
        if any(n < capacity for n, along in zip(value.shape, table.along, strict=True) if along):
            raise self._too_long(capacity)

    def _too_long(self, capacity: int) -> TpcError:
        model = self.decoder.program.capture.model
        return TpcError(f"{model} has no {capacity} positions: fewer tokens, or a shorter prompt, would work")

    @torch.no_grad()
    def __call__(self, *rows: Tensor, counts: Tensor | None = None, slot: int | None = None) -> Tensor:
        """`rows`: the next tokens [b, n] of every sequence, and what else the model takes of each. Gives logits
        [b, n, vocabulary], this rank's part of them.

        `counts` [b]: how many of the n are a sequence's own, when the others only fill its row up on the right.
        `slot`: the rows are the first of a new sequence, which takes the place of this one of the batch; b is 1 then.
        Raises `TpcError` for either when the model wants all sequences to be of one length, with the reason.
        """
        n = rows[0].shape[1]
        if (counts is not None or slot is not None) and self.decoder.uniform:
            raise TpcError(f"sequences of different lengths cannot share a batch: {self.decoder.uniform}")
        session = self.session if slot is None else self.session.only(slot)
        session.begin(n)
        given: dict[str, Any] = dict(zip(self.decoder.rows, rows, strict=True))
        inputs = {**given, **self.tables, "session": session}
        (logits,) = interpret(self.decoder.step, self.ranks, self.state, inputs, device=self.device)
        if slot is None:
            session.advance(n if counts is None else counts)
        else:
            self.session.begins(slot, n)
        assert isinstance(logits, Tensor)
        return logits

    def again(self) -> None:
        """Starts all sequences anew in the memory of the old ones."""
        self.session.past = 0
