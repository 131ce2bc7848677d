"""The result of a loader: a model that can be built, its example inputs, and the arguments that were given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tpcompiler.errors import ModelError, TpcError
from tpcompiler.spec.schema import Spec

Inputs = tuple[tuple[Any, ...], dict[str, Any]]  # args, kwargs of forward


@dataclass(frozen=True)
class Loaded:
    """A model that can be built, and example inputs for it."""

    build: Callable[[], nn.Module]  # raises ModelError
    make_inputs: Callable[[Mapping[str, Any]], Inputs]  # from sizes such as those in `inputs:`; raises ModelError
    source: str  # where the model stands, for messages
    name: str  # the name of the class or function that builds it
    sizes: Mapping[str, Any] = field(default_factory=dict)  # the spec's `inputs:`
    seed: int = 0
    weights: Path | None = None  # the model's directory, if it has safetensors
    overrides: Mapping[str, Any] = field(default_factory=dict)  # `--set`, which wins over the spec's `model:`
    accepts: Mapping[str, Any] = field(default_factory=dict)  # the constructor's arguments that have plain defaults
    environment: AbstractContextManager[Any] = field(default_factory=nullcontext)  # in which the model's imports work

    def inputs(self, **changes: Any) -> Inputs:
        """Example inputs (args, kwargs) at the spec's sizes, or at others: `inputs(batch=3)`. Equal at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self.make_inputs({**self.sizes, **changes})


@dataclass(frozen=True)
class Arguments:
    """The constructor's arguments and where each comes from, so that an error can name the place of a wrong one."""

    spec: Spec
    overrides: dict[str, Any]

    @property
    def values(self) -> dict[str, Any]:
        return {**self.spec.model, **self.overrides}

    def error(self, name: str, what: str) -> TpcError:
        if name in self.overrides:
            return ModelError(f"--set {name}: {what}")
        return self.spec.error("model", name, what=what)
