"""Randomness without state: everything is a function of its integers, so a position in the data is one integer.

`mix` hashes integers (splitmix64: Steele, Lea and Flood, OOPSLA 2014), `hashes` hashes a range of counters as a tensor,
`Permutation` is a keyed bijection of `range(n)` that needs no table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_WORD = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def _finish(z: int) -> int:
    for shift, factor in _ROUNDS:
        z = (z ^ (z >> shift)) * factor & _WORD
    return z ^ (z >> 31)


def mix(*words: int) -> int:
    """A 64-bit hash of a sequence of integers."""
    h = _GAMMA
    for word in words:
        h = _finish(((h + _GAMMA) ^ word) & _WORD)
    return h


def hashes(key: int, n: int) -> Tensor:
    """`n` independent integers in [0, 2^63), int64: the i-th is a hash of (key, i)."""
    counters = torch.arange(1, n + 1, dtype=torch.int64)
    z = counters * _signed(_GAMMA) + _signed(key)
    for shift, factor in _ROUNDS:
        z = (z ^ _shift_right(z, shift)) * _signed(factor)
    return (z ^ _shift_right(z, 31)) & (2**63 - 1)


def uniform(h: Tensor) -> Tensor:
    """`hashes` as numbers in [0, 1), float64."""
    return (h >> 10).double() * 2.0**-53


def _signed(word: int) -> int:
    word &= _WORD
    return word - (1 << 64) if word >> 63 else word


def _shift_right(z: Tensor, n: int) -> Tensor:
    # int64's own shift copies the sign bit in; a logical shift does not.
    return (z >> n) & ((1 << (64 - n)) - 1)


@dataclass(frozen=True)
class Permutation:
    """A bijection of `range(n)`, different for each key: `order[i]` in O(1), with no table.

    A balanced Feistel network over the least even number of bits that holds n, walked along its cycle until the value
    lies in range again (Black and Rogaway, CT-RSA 2002); the expected walk is below 4 steps.
    """

    n: int
    key: int

    def __getitem__(self, i: int) -> int:
        assert 0 <= i < self.n, f"{i} in a permutation of {self.n}"
        half = max(1, ((self.n - 1).bit_length() + 1) // 2)
        while True:
            i = self._feistel(i, half)
            if i < self.n:
                return i

    def __len__(self) -> int:
        return self.n

    def _feistel(self, i: int, half: int) -> int:
        left, right = i >> half, i & ((1 << half) - 1)
        for turn in range(6):
            left, right = right, left ^ (mix(self.key, turn, right) >> (64 - half))
        return left << half | right
