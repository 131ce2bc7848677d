"""Random modules of legal steps are traced, planned and proven, and compute what the modules compute."""

from __future__ import annotations

import pytest

from tests.fuzz.fragments import Fragment
from tests.fuzz.trial import GOOD, case, shrunk, tried

KEPT: dict[str, tuple[Fragment, int]] = {  # failures of the past, shrunk
    "a norm of a part of an input without a gradient": (
        Fragment(
            "sequence",
            (),
            (
                Fragment(
                    "gated", (), (Fragment("added", (), (Fragment("norm", (0,)), Fragment("convolution", (12, 2)))),)
                ),
                Fragment("experts", (2, 6)),
            ),
        ),
        2,
    ),
}


@pytest.mark.parametrize("seed", range(2))
def test_random_module(seed: int) -> None:
    _holds(*case(seed))


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first", range(1000, 6000, 100))
def test_hundred_random_modules(first: int) -> None:
    for seed in range(first, first + 100):
        _holds(*case(seed))


@pytest.mark.parametrize("name", KEPT)
def test_kept_failure(name: str) -> None:
    _holds(*KEPT[name])


def _holds(fragment: Fragment, degree: int) -> None:
    outcome = tried(fragment, degree)
    if outcome.status not in GOOD:
        pytest.fail(f"{outcome.status}: {outcome.why}; {degree} ranks; {shrunk(fragment, degree, outcome.status)}")
