"""Dynamic loss scaling for fp16, in step on all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from tpcompiler.errors import TpcError
from tpcompiler.runtime.groups import Ranks
from tpcompiler.train.optim.clip import local
from tpcompiler.train.private_torch import largest_values
from tpcompiler.train.settings import LossScale


@dataclass(frozen=True)
class Scale:
    """The factor on the loss before backward, and how it came to be (Micikevicius et al., arXiv 1710.03740, §3.2).

    Multiply the loss by `value`, divide the gradients by it, skip the step when any gradient is not finite, and go
    on with `after`.
    """

    value: float
    good: int = 0  # steps in a row since the scale last changed
    skipped: int = 0  # steps in all

    @classmethod
    def start(cls, config: LossScale) -> Scale:
        return cls(config.start)

    def after(self, finite: bool, config: LossScale) -> Scale:
        """The next step's scale. Raises `TpcError` when it would fall below `config.smallest`."""
        if not finite:
            value = self.value * config.backoff
            if value < config.smallest:
                raise TpcError(
                    f"loss scale {self.value:g} cannot fall further (train.loss_scale.smallest is {config.smallest:g}) "
                    f"and gradients are still not finite; a lower learning rate or precision: bf16 would work"
                )
            return Scale(value, 0, self.skipped + 1)
        if self.good + 1 < config.interval:
            return replace(self, good=self.good + 1)
        return replace(self, value=self.value * config.growth, good=0)

    def state_dict(self) -> dict[str, float | int]:
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, float | int]) -> Scale:
        return cls(float(state["value"]), int(state["good"]), int(state["skipped"]))


def all_finite(gradients: Iterable[Tensor], ranks: Ranks) -> Tensor:
    """Whether every gradient on every rank is finite: a bool scalar, the same on all ranks. One scalar all-reduce.

    Collective over the whole mesh, also over dimensions on which gradients are replicated: should replicas ever
    differ, the ranks still skip the same steps.
    """
    mine = [local(g) for g in gradients]
    held = [x for x in mine if x.numel()] or [torch.zeros(1, device=x.device) for x in mine[:1]] or [torch.zeros(1)]
    norms = largest_values(held)
    bad = (~torch.isfinite(torch.stack(norms))).any().float()
    return ranks.group(ranks.mesh.names).all_reduce(bad, "max") == 0
