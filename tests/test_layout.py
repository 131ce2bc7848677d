"""Layouts: the ranks' runs cover a dimension once, in order, whatever it is made of."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpcompiler.layout import Concat, Dim, Factor, Mesh, Product, head
from tpcompiler.runtime.mesh import part


@given(st.integers(0, 200), st.integers(1, 17))
def test_parts_are_contiguous_even_and_complete(n: int, degree: int) -> None:
    parts = [part(n, degree, i) for i in range(degree)]
    assert parts[0][0] == 0 and parts[-1][1] == n
    assert all(a[1] == b[0] for a, b in pairwise(parts))
    sizes = [b - a for a, b in parts]
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


def dims(split: tuple[str, ...]) -> st.SearchStrategy[Dim]:
    leaf = st.builds(Factor, st.integers(1, 7), st.just("a"), st.sampled_from([(), split]))
    whole = st.builds(Factor, st.integers(1, 4))
    product = st.tuples(whole, leaf, whole).map(Product)
    return st.one_of(
        leaf, product, st.lists(st.one_of(leaf, product), min_size=2, max_size=3).map(lambda x: Concat(tuple(x)))
    )


@given(dims(("t",)), st.integers(1, 5))
def test_runs_of_all_ranks_cover_a_dimension(dim: Dim, degree: int) -> None:
    mesh = Mesh.of({"t": degree})
    held: list[int] = []
    for rank in range(degree):
        coords = mesh.coords(rank)
        mine = [i for a, b in dim.runs(mesh, coords) for i in range(a, b)]
        assert len(mine) == dim.local_size(mesh, coords)
        assert mine == sorted(mine)
        held += mine
    assert set(held) == set(range(dim.size))
    if all(leaf.split for leaf in dim.leaves if leaf.n > 1):
        assert len(held) >= dim.size


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 4))
def test_a_head_holds_what_the_whole_holds_of_the_same_elements(sizes: list[int], degree: int) -> None:
    mesh = Mesh.of({"t": degree})
    dim = Concat(tuple(Factor(n, "a", ("t",)) for n in sizes)) if len(sizes) > 1 else Factor(sizes[0], "a", ("t",))
    total = 0
    for n in [0, *sizes]:
        total += n
        first = head(dim, total)
        assert first is not None
        for rank in range(degree):
            coords = mesh.coords(rank)
            below = sum(min(b, total) - a for a, b in dim.runs(mesh, coords) if a < total)
            assert first.local_size(mesh, coords) == below


def test_a_dynamic_axis_has_no_local_size() -> None:
    mesh = Mesh.of({"t": 2})
    with pytest.raises(AssertionError, match="run time"):
        Factor(2**31 + 11, "b", (), True).local_size(mesh, mesh.coords(0))
