"""Randomness without state: permutations are bijections, hashes look random and are functions of their integers."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpcompiler.train.data.order import Permutation, hashes, mix, uniform


@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=40)
def test_order_is_a_permutation(n: int, key: int) -> None:
    order = Permutation(n, key)
    assert sorted(order[i] for i in range(n)) == list(range(n))


def test_order_of_a_huge_range_needs_no_table() -> None:
    order = Permutation(10**15 + 7, 5)
    seen = {order[i] for i in range(1000)}
    assert len(seen) == 1000
    assert all(0 <= i < len(order) for i in seen)


def test_orders_of_different_keys_are_unrelated() -> None:
    n = 2000
    orders = [[Permutation(n, key)[i] for i in range(n)] for key in range(4)]
    for a in range(4):
        for b in range(a):
            same = sum(x == y for x, y in zip(orders[a], orders[b], strict=True))
            assert same < 10  # one is expected
    ranks = torch.tensor(orders, dtype=torch.float64)
    assert (
        torch.corrcoef(torch.cat([ranks, torch.arange(float(n)).double()[None]])).fill_diagonal_(0).abs() < 0.12
    ).all()


def test_every_arrangement_of_three_comes_up_equally_often() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for key in range(6000):
        arrangement = tuple(Permutation(3, mix(key))[i] for i in range(3))
        counts[arrangement] = counts.get(arrangement, 0) + 1
    assert len(counts) == 6
    assert all(850 < n < 1150 for n in counts.values())


def test_hashes_are_a_function_of_key_and_place() -> None:
    long, short = hashes(11, 100), hashes(11, 10)
    assert torch.equal(long[:10], short)
    assert not torch.equal(hashes(12, 10), short)
    assert (long >= 0).all()


def test_uniform_numbers_fill_the_interval_evenly() -> None:
    u = uniform(hashes(mix(3), 20000))
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.histc(u, bins=20, min=0, max=1)
    assert (counts - 1000).abs().max() < 150  # 5 standard deviations
    flips = uniform(hashes(mix(4), 20000))
    assert abs(torch.corrcoef(torch.stack([u, flips]))[0, 1]) < 0.03


def test_mix_depends_on_every_word_and_on_their_order() -> None:
    words = [mix(1, 2), mix(2, 1), mix(1, 2, 0), mix(1), mix(), mix(1, 3), mix(-1), mix(2**64 - 1, 0)]
    assert len(set(words)) == len(words)
    assert mix(1, 2) == words[0]
