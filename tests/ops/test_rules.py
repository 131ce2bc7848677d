"""The table of rules: the notation, and every kind of rule against the op itself."""

from __future__ import annotations

from math import prod

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tpcompiler.errors import RuleError
from tpcompiler.ops.measured import Measured
from tpcompiler.ops.notation import LetterGroup, check_line, parse
from tpcompiler.ops.record import OpCall
from tpcompiler.ops.table import RULES, find, rule
from tpcompiler.ops.views import view_pattern


def test_every_line_of_the_table_parses() -> None:
    for name, record in RULES.items():
        if isinstance(record.line, str):
            assert check_line(record.line) or name.split("::")[1].startswith(("new_", "type_as", "to.")), name


@pytest.mark.parametrize(
    ("line", "operands", "results", "contracted"),
    [
        ("... i, o i, o -> ... o", ((2, 3, 4), (5, 4), (5,)), ((2, 3, 5),), {"i"}),
        ("... n! -> ...", ((2, 3),), ((2,),), set()),  # what is needed whole is not summed
        ("a (p | q) -> a q", ((2, 7),), ((2, 4),), set()),  # a segment that is left out is not summed
        ("v+ h, ... -> ... h", ((9, 4), (2, 3)), ((2, 3, 4),), {"v"}),
        ("... k -> ...", ((2, 3),), ((2,),), {"k"}),
    ],
)
def test_contracted_letters_are_those_that_are_summed(
    line: str, operands: tuple[tuple[int, ...], ...], results: tuple[tuple[int, ...], ...], contracted: set[str]
) -> None:
    fitted = Measured("here", parse(line), {}, OpCall(operands, results, {}), ())
    assert fitted.contracted == contracted


@pytest.mark.parametrize("bad", ["a b", "a -> b -> c", "a (b -> b", "a ; b -> a", "a ) -> a"])
def test_a_rule_that_cannot_be_read_says_so(bad: str) -> None:
    with pytest.raises(RuleError) as e:
        rule("mylib::op", bad)
    assert "\n" not in str(e.value) and repr(bad) in str(e.value)


shapes = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4).map(tuple)


@given(shapes, st.data())
def test_a_view_is_written_in_common_factors_of_the_right_sizes(before: tuple[int, ...], data: st.DataObject) -> None:
    total = prod(before)
    after: list[int] = []
    while total > 1:
        n = data.draw(st.sampled_from([d for d in range(2, total + 1) if total % d == 0]))
        after.append(n)
        total //= n
    text, sizes = view_pattern(before, tuple(after))
    pattern = parse(text)
    for items, shape in ((pattern.operands[0], before), (pattern.results[0], tuple(after))):
        assert items is not None and len(items) == len(shape)
        for item, n in zip(items, shape, strict=True):
            if isinstance(item, LetterGroup):
                assert prod(sizes[x.name] for x in item.letters()) == n
            elif not isinstance(item, str) and not item.whole:
                assert sizes[item.name] == n
    if not pattern.marked("whole"):
        flat = [
            [
                x.name
                for i in side
                for x in (i.letters() if isinstance(i, LetterGroup) else () if isinstance(i, str) else (i,))
            ]
            for side in (pattern.operands[0] or (), pattern.results[0])
        ]
        assert flat[0] == flat[1], "the same factors in the same order"


def test_uneven_factors_have_no_common_axis() -> None:
    text, _ = view_pattern((4, 6), (3, 8))
    assert parse(text).marked("whole") == {"x0", "x1", "y0", "y1"}


@given(st.integers(2, 30), st.integers(0, 29), st.integers(1, 30))
def test_a_slice_takes_its_dimension_apart(n: int, start: int, length: int) -> None:
    assume(start + length <= n and length < n)
    import torch

    call = OpCall(((n,),), ((length,),), {"dim": 0, "start": start, "end": start + length, "step": 1})
    found = find(torch.ops.aten.slice.Tensor)
    assert found is not None
    line = found.pattern(call)
    assert line is not None
    text, sizes = line
    assert sum(sizes.values()) == n and sizes["q"] == length
    assert parse(text).results[0][0].name == "q"  # type: ignore[union-attr]
