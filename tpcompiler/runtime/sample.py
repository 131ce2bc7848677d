"""Chooses the next token from scores that are split over ranks, without gathering them.

Ranks exchange a few numbers per sequence: each rank's best token, its `top_k` best tokens, or the probability above
some scores. A token is drawn by adding Gumbel noise to the scores and taking the largest. The noise is counter-based (a
Philox hash of seed, sequence, position and token). Every rank therefore finds the same token, and the same seed gives
the same text at every degree.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tpcompiler.runtime.groups import Group
from tpcompiler.runtime.random import philox
from tpcompiler.runtime.runs import Runs

_LOW = 0xFFFFFFFF
_NONE = 2**53 - 1  # the index of no token; exact in float64
_CUTS = 63  # scores that are tried at once when the nucleus is looked for


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 takes the most likely one. `top_k` 0 and `top_p` 1 leave nothing out."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0


def choose(scores: Tensor, index: Tensor, group: Group, how: Sampling, sequences: Tensor, positions: Tensor) -> Tensor:
    """The next token of every sequence [b], the same on all ranks.

    `scores` [b, v] are those of this rank's part of the vocabulary, and `index` [v] are its tokens. `sequences` [b]
    numbers the sequences, and `positions` [b] are the positions of the new tokens. The noise depends only on these and
    on the seed. Of tokens with equal scores, the one with the smallest number comes first.
    """
    x = scores.float()
    tokens = index.expand_as(x)
    if how.temperature == 0:
        return _best(x, tokens, group)
    x = x / how.temperature
    if how.top_k:
        x, tokens = _top(x, tokens, how.top_k, group)
        group = Group()  # all ranks have the same from here on
    if how.top_p < 1:
        x = x.masked_fill(x < _nucleus(x, how.top_p, group)[:, None], -torch.inf)
    return _best(x + _gumbel(tokens, how.seed, sequences, positions), tokens, group)


def penalise(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Makes tokens that occurred in a sequence, `seen` [b, v], less likely by `penalty` (arXiv 1909.05858)."""
    return torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)


def held(rows: Runs, device: torch.device | str) -> Tensor:
    """The tokens whose scores a rank holds."""
    parts = [torch.arange(a, b, device=device) for a, b in rows]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=device)


def _best(x: Tensor, tokens: Tensor, group: Group) -> Tensor:
    """The token with the largest score on any rank."""
    there = x.shape[1] > 0
    best = x.amax(1) if there else x.new_full((x.shape[0],), -torch.inf)
    token = tokens.masked_fill(x != best[:, None], _NONE).amin(1) if there else tokens.new_full(best.shape, _NONE)
    pairs = torch.stack([best.double(), token.double()])[None]  # [1, 2, b]
    values, names = group.all_gather(pairs, 0).unbind(1)  # [ranks, b]
    return names.masked_fill(values != values.amax(0), _NONE).amin(0).long()


def _top(x: Tensor, tokens: Tensor, k: int, group: Group) -> tuple[Tensor, Tensor]:
    """The `k` best scores of all ranks and their tokens, best first, each [b, k]."""
    x, tokens = _sorted(x, tokens, k)
    if group.size == 1:
        return x, tokens
    missing = k - x.shape[1]
    x = torch.nn.functional.pad(x, (0, missing), value=-torch.inf)
    tokens = torch.nn.functional.pad(tokens, (0, missing), value=_NONE)
    pairs = group.all_gather(torch.stack([x.double(), tokens.double()]), 2)
    return _sorted(pairs[0].float(), pairs[1].long(), k)


def _sorted(x: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest, equal ones by their token."""
    order = tokens.argsort(stable=True, dim=1)
    x, tokens = x.gather(1, order), tokens.gather(1, order)
    order = x.argsort(stable=True, dim=1, descending=True)[:, :k]
    return x.gather(1, order), tokens.gather(1, order)


def _nucleus(x: Tensor, p: float, group: Group) -> Tensor:
    """The smallest score [b] that is kept: the scores above it have a total probability below `p` (arXiv 1904.09751).

    The search covers all float32 numbers and tries 63 at a time, so that six sums over ranks find the exact score.
    """
    top = group.all_reduce(x.amax(1) if x.shape[1] else x.new_full((x.shape[0],), -torch.inf), "max")
    weight = (x - top[:, None]).double().exp()
    ordered, order = _ordered(x).sort(1)
    below = torch.nn.functional.pad(weight.gather(1, order).cumsum(1), (1, 0))  # weight of the i smallest
    mine = below[:, -1:]
    total = group.all_reduce(mine.clone())
    low = order.new_full((x.shape[0], 1), -(2**31))
    high = _ordered(top)[:, None]  # nothing lies above it
    steps = torch.arange(1, _CUTS + 1, device=x.device)
    while bool((high > low).any()):
        width = high - low
        cuts = torch.minimum(low + (width * steps) // (_CUTS + 1), high)  # [b, 63], ascending
        above = mine - below.gather(1, torch.searchsorted(ordered, cuts, right=True))
        enough = group.all_reduce(above) < p * total  # so much is left out when a cut is where it stops
        low = torch.where(enough, low, cuts + 1).amax(1, keepdim=True)
        high = torch.where(enough, cuts, high).amin(1, keepdim=True)
    return _number(high.squeeze(1))


def _ordered(x: Tensor) -> Tensor:
    """Maps float32 numbers to integers that have the same order."""
    bits = (x + 0.0).view(torch.int32).long()
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF) - 1, bits)


def _number(ordered: Tensor) -> Tensor:
    bits = torch.where(ordered < 0, (-ordered - 1) - 2**31, ordered)
    return bits.to(torch.int32).view(torch.float32)


def _gumbel(tokens: Tensor, seed: int, sequences: Tensor, positions: Tensor) -> Tensor:
    """Gumbel noise [b, v] for these tokens. It depends only on the integers that are given."""
    counter = [tokens & _LOW, positions[:, None], sequences[:, None] & _LOW, sequences[:, None] >> 32]
    key = [torch.tensor(n, device=tokens.device) for n in (seed & _LOW, (seed >> 32) & _LOW)]
    word, fine, *_ = philox(counter, key)
    uniform = ((word << 20) | (fine & 0xFFFFF)).double()  # 52 bits
    return -torch.log(-torch.log((uniform + 0.5) * 2.0**-52)).float()
