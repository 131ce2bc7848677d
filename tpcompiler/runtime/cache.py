"""What an incremental decoder keeps of the past, and what its program does with it.

A `Session` is one rank's memory of a batch of sequences: a buffer for each value that later tokens look back at, of a
fixed length, and how many tokens of each sequence are there. All functions here act on the new rows of a step: the
tokens at the positions `past … past + new − 1` of each sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcompiler.errors import TpcError


@dataclass
class Session:
    """`size`: how many sequences. `past`: tokens of each so far, one number when it is the same for all, else [size].
    `total`: the most that a sequence has after the step that runs. `slot`: the one sequence that the steps are for."""

    capacity: int
    size: int
    past: int | Tensor = 0
    total: int = 0
    buffers: dict[str, Tensor] = field(default_factory=dict)
    slot: int | None = None

    def begin(self, new: int) -> None:
        """A step of `new` rows begins. Raises `TpcError` when they do not fit."""
        longest = self.past if isinstance(self.past, int) else int(self.past.max())
        self.total = longest + new
        if self.total > self.capacity:
            raise TpcError(f"{self.total} tokens do not fit into a cache for {self.capacity}")

    def advance(self, new: int | Tensor) -> None:
        """The step is done; of its rows, `new` count: a number, or one for each sequence [b]."""
        self.past = self.past + new

    def only(self, slot: int) -> Session:
        """The memory of one of the sequences, which begins anew."""
        return Session(self.capacity, self.size, buffers=self.buffers, slot=slot)

    def begins(self, slot: int, past: int) -> None:
        """One of the sequences has `past` tokens now."""
        if isinstance(self.past, int):
            self.past = torch.full((self.size,), self.past)
        self.past[slot] = past

    def positions(self, new: int, device: torch.device) -> Tensor:
        """[b, new], or [1, new] when they are the same for all sequences."""
        rows = torch.arange(new, device=device)
        return rows[None] + (self.past if isinstance(self.past, int) else self.past.to(device)[:, None])

    @property
    def bytes(self) -> int:
        return sum(b.numel() * b.element_size() for b in self.buffers.values())


def total(session: Session) -> int:
    """How many positions there are after this step."""
    return session.total


def keep(x: Tensor, session: Session, name: str, dim: int, batch: int | None) -> Tensor:
    """Puts the new rows `x` at their positions along `dim` of a buffer, and returns all rows so far.

    Rows between a shorter sequence's end and `total` hold what was there before; whoever reads them masks them.
    """
    buffer = session.buffers.get(name)
    if buffer is None:
        sizes = {dim: session.capacity} | ({} if batch is None else {batch: session.size})
        buffer = session.buffers[name] = x.new_zeros([sizes.get(i, n) for i, n in enumerate(x.shape)])
    if session.slot is not None:
        assert batch is not None
        buffer = buffer.narrow(batch, session.slot, 1)
    if isinstance(session.past, int):
        buffer.narrow(dim, session.past, x.shape[dim]).copy_(x)
    else:
        assert batch is not None
        at = session.positions(x.shape[dim], x.device)
        sequences = torch.arange(at.shape[0], device=x.device)[:, None]
        buffer.movedim((batch, dim), (0, 1))[sequences, at] = x.movedim((batch, dim), (0, 1))
    return buffer.narrow(dim, 0, session.total)


def rows_of(x: Tensor, session: Session, new: int, dim: int) -> Tensor:
    """The new rows of a value of all positions so far, all sequences being of one length."""
    assert isinstance(session.past, int)
    return x.narrow(dim, session.past, new)


def rows_at(
    table: Tensor, session: Session, new: int, row: int | None, column: int | None = None, batch: int | None = None
) -> Tensor:
    """The new positions' rows along dimension `row` of a constant, and along `column` all positions so far.

    All three dimensions count from the right. With sequences of different lengths each takes rows of its own, and
    their dimension becomes `batch`, which counts in the result.
    """
    if column is not None:
        table = table.narrow(column, 0, session.total)
    if row is None:
        return table
    if isinstance(session.past, int):
        return table.narrow(row, session.past, new)
    assert batch is not None
    at = session.positions(new, table.device)
    while table.dim() < -batch:
        table = table.unsqueeze(0)
    table = table.squeeze(batch) if table.shape[batch] == 1 else table
    row = row + 1 if row < batch else row
    return table.movedim(row, 0)[at].movedim(1, row).movedim(0, batch)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    session: Session,
    mask: Tensor | None,
    causal: bool,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` of the new rows `q` [b, …, new, d] to all rows `k`, `v` [b, …, total, d].

    `causal`: a row sees positions up to its own.
    """
    new, there = q.shape[-2], k.shape[-2]
    if causal and new == there and isinstance(session.past, int):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa)
    if causal and not (new == 1 and isinstance(session.past, int)):
        at = session.positions(new, q.device)
        seen = torch.arange(there, device=q.device) <= at[:, :, None]  # [b or 1, new, total]
        seen = seen.view(seen.shape[0], *[1] * (q.dim() - 3), new, there)
        mask = seen
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
