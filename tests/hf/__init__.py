"""Hugging Face's families as models of a few thousand weights: `tiny(family)` is one, `inputs(family)` its inputs."""

from __future__ import annotations

from tests.hf.families import FAMILIES, TASKS, Family, families
from tests.hf.inputs import inputs
from tests.hf.shrink import shrunk

__all__ = ["FAMILIES", "TASKS", "Family", "families", "inputs", "shrunk"]
