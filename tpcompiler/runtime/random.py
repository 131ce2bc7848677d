"""Dropout whose mask depends on an element's place in the unsharded run, and not on the rank that computes it.

The mask is a hash, Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), of (seed, step,
site, global element index). Any layout over tensor- and data-parallel ranks and micro-batches gives the mask of the
unsharded model, bit for bit. The hash consists of integer operations of torch, which give the same bits on CPU and GPU
and which torch.compile fuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tpcompiler.runtime.runs import Runs, take_rows

LANES = 8  # elements served by one Philox call, 16 bits each
ROUNDS = 7  # the fewest that pass BigCrush (Salmon et al., table 2)
_LOW = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85

ShardedRows = tuple[int, int, Runs]  # dimension, its global size, the rows held


class Rng:
    """The state that dropout draws from: a seed, the optimizer step, and the micro-batch's first sample in the step.

    The numbers are in a tensor, so that a compiled program is not compiled again when they change. It is on the CPU
    unless it is moved. Forward and backward of a step must both have run before `at` is called for the next step.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        assert 0 <= seed < 2**64
        self.seed = seed
        low, high = seed & _LOW, seed >> 32
        self.state = torch.tensor([low, high, 0, 0], dtype=torch.int64, device=device)

    def at(self, step: int, first_sample: int = 0) -> Rng:
        """Moves to an optimizer step and, in its batch, to the micro-batch that begins with sample `first_sample`."""
        assert 0 <= step < 2**32
        assert first_sample >= 0
        self.state[2:] = torch.tensor([step, first_sample], dtype=torch.int64)
        return self

    def follow(self, other: Rng, samples: int) -> None:
        """Takes over the place of `other`, moved on by `samples` samples."""
        self.state = other.state.clone()
        self.state[3] += samples

    def to(self, device: torch.device | str) -> Rng:
        """Moves the tensor of numbers to the device that uses them."""
        self.state = self.state.to(device)
        return self


def philox(counter: Sequence[Tensor], key: Sequence[Tensor], rounds: int = ROUNDS) -> list[Tensor]:
    """Four words of 32 random bits, as int64, from four words of a counter and two of a key, which are broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for i in range(rounds):
        if i:
            k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
        # 32 × 32 bits wrap around int64's sign, and the mask takes it off again.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW
        c2, c3 = ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
    return [c0, c1, c2, c3]


def dropout(
    x: Tensor,
    p: float,
    training: bool,
    rng: Rng,
    site: int | Tensor,
    rows: Sequence[ShardedRows] = (),
    batch_dim: int | None = 0,
    samples: int | None = None,
) -> Tensor:
    """`F.dropout` with a mask that no layout changes; `p` counts in steps of 2⁻¹⁶.

    `site` (below 2³²) tells the calls of one step apart. `rows` has (dimension, global size, rows held) for each
    sharded dimension. `batch_dim` is the dimension of samples, or None if there is none. With `samples`, it holds the
    rows of so many samples, one sample after the other: (b s).
    """
    if not training or p == 0:
        return x
    if p == 1:
        return x * 0
    bits, packing = mask_bits(x.shape, p, rng, site, rows, batch_dim, samples, x.device)
    return _Dropout.apply(x, bits, 1 / (1 - p), packing)


class _Dropout(torch.autograd.Function):
    """Scales and masks `x`. It keeps one bit per element for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: Tensor, scale: float, packing: _Packing) -> Tensor:
        ctx.save_for_backward(bits)
        ctx.scale, ctx.packing = scale, packing
        return _scaled(x, _keep(bits, packing), scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (bits,) = ctx.saved_tensors
        return _scaled(grad, _keep(bits, ctx.packing), ctx.scale), None, None, None


def _scaled(x: Tensor, keep: Tensor, scale: float) -> Tensor:
    return torch.where(keep, x * scale, 0)


class _Packing(NamedTuple):
    """How `mask_bits` packed a mask."""

    lanes: Runs  # the lanes of the last dimension that are used
    batch: int | None  # the position of the packed first dimension in the value
    scalar: bool  # whether the last dimension, of one element, was added to a value with no dimension but the batch


def mask_bits(
    shape: Sequence[int],
    p: float,
    rng: Rng,
    site: int | Tensor,
    rows: Sequence[ShardedRows],
    batch_dim: int | None,
    samples: int | None,
    device: torch.device,
) -> tuple[Tensor, _Packing]:
    """The mask, one bit per element in bytes of `LANES` neighbours, and how to unpack it.

    Elements are counted in the order (batch, other dimensions …). The last dimension comes in whole blocks of `LANES`.
    """
    held = {dim % len(shape): (size, runs) for dim, size, runs in rows}
    batch = None if batch_dim is None else batch_dim % len(shape)
    order = [d for d in range(len(shape)) if d != batch]
    last = order.pop() if order else None
    last_size, last_rows = (1, ((0, 1),)) if last is None else held.get(last, (shape[last], ((0, shape[last]),)))
    lead = order if batch is None else [batch, *order]

    index, lanes = _blocks(last_rows, device)
    stride = -(-last_size // LANES)
    for place, d in enumerate(reversed(lead), start=1):
        size, runs = held.get(d, (shape[d], ((0, shape[d]),)))
        position = _positions(runs, device)
        if d == batch:
            position = position + rng.state[3].to(device) * (1 if samples is None else size // samples)
        index = index + (position * stride).view([-1] + [1] * place)
        stride = stride * size
    return _bits(index, p, rng, site), _Packing(lanes, batch, last is None)


def _positions(rows: Runs, device: torch.device) -> Tensor:
    pieces = [torch.arange(start, stop, device=device) for start, stop in rows]
    return pieces[0] if len(pieces) == 1 else torch.cat([torch.arange(0, device=device), *pieces])


def _blocks(rows: Runs, device: torch.device) -> tuple[Tensor, Runs]:
    """The blocks that hold the rows, each run's on their own, and where the rows stand among the blocks' lanes."""
    blocks = tuple((start // LANES, -(-stop // LANES)) for start, stop in rows)
    lanes, place = [], 0
    for (start, stop), (first, end) in zip(rows, blocks, strict=True):
        at = (place - first) * LANES + start
        lanes.append((at, at + stop - start))
        place += end - first
    return _positions(blocks, device), tuple(lanes)


def _bits(index: Tensor, p: float, rng: Rng, site: int | Tensor) -> Tensor:
    state = rng.state.to(index.device)
    where = site if isinstance(site, Tensor) else torch.full((), site, dtype=torch.int64, device=index.device)
    words = philox([index & _LOW, index >> 32, where, state[2]], [state[0], state[1]])
    threshold = round(p * 2**16)
    bits = torch.zeros((), dtype=torch.uint8, device=index.device)
    for lane in range(LANES):
        draw = words[lane // 2]
        draw = draw >> 16 if lane % 2 else draw & 0xFFFF
        bits = bits + (draw >= threshold).to(torch.uint8) * (1 << lane)
    return bits


def _keep(bits: Tensor, packing: _Packing) -> Tensor:
    weights = 1 << torch.arange(LANES, device=bits.device, dtype=torch.uint8)
    keep = ((bits.unsqueeze(-1) & weights) != 0).flatten(-2)
    keep = take_rows(keep, -1, packing.lanes)
    if packing.scalar:
        keep = keep.squeeze(-1)
    return keep if packing.batch is None else keep.movedim(0, packing.batch)
