"""What all tests share: one thread a process, one seed a test, no deadline for generated cases."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

import pytest
import torch
from hypothesis import HealthCheck, settings

# A cache of the run's own, which its workers share: no test finds what an earlier run has proven or tokenised.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="tpc-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# Two workers on two cores: more threads only wait for each other.
torch.set_num_threads(1)

# The first example pays for imports and traces; the same cases everywhere, so that a red run can be repeated.
settings.register_profile("tpc", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tpc")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)
