"""Unification of terms: whatever is unified, sizes are kept, and a dimension stays the product or sum of its axes."""

from __future__ import annotations

from itertools import pairwise
from math import prod

from hypothesis import given
from hypothesis import strategies as st

from tpcompiler.axes.algebra import Terms

factors = st.lists(st.integers(2, 6), min_size=1, max_size=4)


def size_of(terms: Terms, t: int) -> int:
    bound = terms.binding(t)
    if bound is None:
        return terms.size(t)
    sizes = [size_of(terms, p) for p in bound.parts]
    return prod(sizes) if bound.kind == "product" else sum(sizes)


@given(factors, st.data())
def test_two_products_of_one_size_have_a_common_refinement_or_are_marked(left: list[int], data: st.DataObject) -> None:
    terms = Terms()
    right = data.draw(st.permutations(left))
    a = terms.product([terms.new(n) for n in left], "a")
    b = terms.product([terms.new(n) for n in right], "b")
    terms.unify(a, b, "view")
    assert terms.find(a) == terms.find(b)
    assert size_of(terms, a) == prod(left)
    cuts = [{prod(x[i:]) for i in range(len(x) + 1)} for x in (left, right)]
    chain = sorted(cuts[0] | cuts[1], reverse=True)
    aligned = all(m % n == 0 for m, n in pairwise(chain))
    assert aligned or terms.leaf_marks()


@given(factors, factors)
def test_segments_refine_at_every_boundary(left: list[int], more: list[int]) -> None:
    right = [sum(left)] if len(more) == 1 else [1] * sum(left)
    terms = Terms()
    a = terms.concat([terms.new(n) for n in left], "a")
    b = terms.concat([terms.new(n) for n in right], "b")
    terms.unify(a, b, "cat")
    leaves = list(terms.leaves(a))
    assert sum(terms.size(t) for t in leaves) == sum(left)
    assert len(leaves) == max(len(left), len(right))
    assert not terms.leaf_marks()


@given(st.integers(2, 5), st.integers(2, 7), st.integers(2, 4))
def test_equal_segments_seen_as_a_product_share_their_axis(n: int, heads: int, width: int) -> None:
    terms = Terms()
    one = terms.new(heads)
    segments = terms.concat([terms.new(heads * width) for _ in range(n)], "split")
    product = terms.product([terms.new(n), one, terms.new(width)], "view")
    terms.unify(segments, product, "both")
    found = list(terms.leaves(segments))
    assert found.count(terms.find(one)) == n, "heads stand in every segment"


def test_taken_apart_in_one_place_is_taken_apart_everywhere() -> None:
    terms = Terms()
    weight, activation = terms.new(12), terms.new(12)
    terms.unify(weight, activation, "linear")
    heads, width = terms.new(4), terms.new(3)
    terms.unify(activation, terms.product([heads, width], "view"), "view")
    assert list(terms.leaves(weight)) == [terms.find(heads), terms.find(width)]


@given(st.integers(1, 3))
def test_a_sequence_laid_over_a_shift_of_itself_stays_whole(shift: int) -> None:
    terms = Terms()
    middle, first, last = terms.new(2**36), terms.new(shift), terms.new(shift)
    terms.unify(terms.concat([middle, last], "left"), terms.concat([first, middle], "right"), "add")
    assert {terms.find(t) for t in (middle, first, last)} <= set(terms.leaf_marks())


def test_segments_that_change_places_share_their_axis() -> None:
    terms = Terms()
    short, long = terms.new(3), terms.new(6)
    terms.unify(terms.concat([short, long], "left"), terms.concat([long, short], "right"), "add")
    assert list(terms.leaves(long)) == [terms.find(short)] * 2
    assert not terms.leaf_marks()
