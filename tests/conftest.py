"""What all tests share: one thread a process, one seed a test, no deadline for generated cases."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

# Two workers on two cores: more threads only wait for each other.
torch.set_num_threads(1)

# The first example pays for imports and traces; the same cases everywhere, so that a red run can be repeated.
settings.register_profile("tpc", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tpc")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)
