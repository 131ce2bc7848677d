"""What of a long list every run tries, and what waits for the nightly one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def sampled(names: Iterable[str], every: int) -> list[Any]:
    """All of `names` as parameters, but only each `every`-th outside the nightly run."""
    return [
        name if i % every == 0 else pytest.param(name, marks=pytest.mark.nightly)
        for i, name in enumerate(sorted(names))
    ]
