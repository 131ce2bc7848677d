"""An average of the weights over the steps, in which a step counts less with every one after it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tpcompiler.train.optim.by_class import kind_of
from tpcompiler.train.optim.clip import local
from tpcompiler.train.optim.update import MOMENTS, Update
from tpcompiler.train.settings import Optimizer

AVERAGE = "average"  # what a checkpoint calls it, among the optimizer's state


def kept_state(config: Optimizer) -> tuple[str, ...]:
    """The names of the state that an update keeps of each trained parameter, all of the parameter's shape."""
    own = MOMENTS if config.class_ is None else kind_of(config).state
    return own if config.average is None else (*own, AVERAGE)


class Averaged:
    """An update that also keeps the average: `decay` times what it was, and the rest of the new masters."""

    def __init__(self, update: Update, masters: Mapping[str, Tensor], trained: Iterable[str], decay: float) -> None:
        self._update, self._masters, self._decay = update, masters, decay
        self._averages = {name: torch.zeros_like(masters[name]).detach() for name in trained}

    def moments(self, name: str) -> dict[str, Tensor]:
        own = {AVERAGE: self._averages[name]} if name in self._averages else {}
        return {**self._update.moments(name), **own}

    def filled(self) -> None:
        self._update.filled()
        for name, average in self._averages.items():
            local(average).copy_(local(self._masters[name]).detach())

    def restore(self, steps: int) -> None:
        self._update.restore(steps)

    def prepare(self, lr: float) -> None:
        self._update.prepare(lr)

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], norm: Tensor, scale: float) -> Tensor:
        out = self._update.step(gradients, norm, scale)
        for name, average in self._averages.items():
            local(average).lerp_(local(self._masters[name]).detach(), 1 - self._decay)
        return out
