"""The optimizer's step, two ways: torch's fused AdamW, and one that reads and writes every number once.

In 16-bit training the second takes 28 bytes of memory traffic a parameter: it reads the 16-bit gradient, the master and
both moments, clips on the way, and writes master, moments and the 16-bit parameter. Torch's needs 52 for the same, in
five passes (gradient to float32, clip, step, copy back, and the norm over float32). It is plain elementwise code, which
torch.compile fuses; equal layers share one compiled function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tpcompiler.train.optim.clip import clip_
from tpcompiler.train.optim.clip import clip_factor as factor_of
from tpcompiler.train.optim.optimizer import make_optimizer, set_learning_rate, treatment
from tpcompiler.train.settings import Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


class Update(Protocol):
    """AdamW over a rank's masters, by name."""

    def moments(self, name: str) -> dict[str, Tensor]:
        """The optimizer's state of a parameter; none when it is not trained."""

    def filled(self) -> None:
        """The masters have their first values."""

    def restore(self, steps: int) -> None:
        """So many steps have been made; the moments are filled by whoever calls."""

    def prepare(self, lr: float) -> None:
        """Counts a step, and says its learning rate."""

    def step(self, gradients: Mapping[str, Tensor], norm: Tensor, scale: float) -> Tensor:
        """One step on `gradients`, whose norm is `norm`, both times `scale`. Returns the norm without the scale."""


class Torch:
    """`torch.optim.AdamW`, fused, on plain tensors or FSDP2's. Gradients are clipped in place."""

    def __init__(self, masters: Mapping[str, Tensor], config: Optimizer, publish: Callable[[], None]) -> None:
        self._masters, self._largest, self._publish = masters, config.clip, publish
        self._optimizer = make_optimizer(masters.items(), config)
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                zeros = {m: torch.zeros_like(p, memory_format=torch.preserve_format).detach() for m in MOMENTS}
                self._optimizer.state[p] = {"step": torch.zeros((), device=p.device), **zeros}

    def moments(self, name: str) -> dict[str, Tensor]:
        state = self._optimizer.state.get(self._masters[name], {})
        return {m: state[m] for m in MOMENTS if m in state}

    def filled(self) -> None:
        pass

    def restore(self, steps: int) -> None:
        for state in self._optimizer.state.values():
            state["step"].fill_(steps)

    def prepare(self, lr: float) -> None:
        set_learning_rate(self._optimizer, lr)

    def step(self, gradients: Mapping[str, Tensor], norm: Tensor, scale: float) -> Tensor:
        norm = clip_(gradients.values(), norm, self._largest, scale)
        self._optimizer.step()
        self._publish()
        return norm


class OnePass:
    """Masters in float32, parameters and gradients in 16 bits or float32, all plain tensors.

    `units` are the names that are stepped together, one call each: an emitted layer's.
    """

    def __init__(
        self,
        masters: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
        units: Iterable[Sequence[str]],
        config: Optimizer,
        compiled: bool = True,
    ) -> None:
        trained = {n for n, p in parameters.items() if p.requires_grad}
        self._units = [kept for names in units if (kept := [n for n in names if n in trained])]
        assert sorted(n for unit in self._units for n in unit) == sorted(trained), "each parameter is in one unit"
        self._masters, self._parameters, self._config = masters, parameters, config
        self._moments = {n: {m: torch.zeros_like(masters[n]).detach() for m in MOMENTS} for n in trained}
        self._steps = 0
        some = next(iter(masters.values()))
        self._numbers = torch.zeros(3, dtype=some.dtype, device=some.device)
        self._apply = torch.compile(adamw_, dynamic=False) if compiled else adamw_

    def moments(self, name: str) -> dict[str, Tensor]:
        return self._moments.get(name, {})

    def filled(self) -> None:
        pass

    def restore(self, steps: int) -> None:
        self._steps = steps

    def prepare(self, lr: float) -> None:
        self._steps += 1
        first, second = (1 - beta**self._steps for beta in self._config.betas)
        for place, number in enumerate((lr, lr / first, second**-0.5)):
            self._numbers[place].fill_(number)  # a tensor of new numbers would make the host wait for the device

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], norm: Tensor, scale: float) -> Tensor:
        """The same calls for the same tensors, always: what changes from step to step is on the device."""
        config = self._config
        norm, factor = factor_of(norm, config.clip, scale)
        for unit in self._units:
            names = [n for n in unit if n in gradients]
            if not names:
                continue
            exp_avg, exp_avg_sq = MOMENTS
            self._apply(
                [self._masters[n].detach() for n in names],
                [self._parameters[n].detach() for n in names],
                [gradients[n] for n in names],
                [self._moments[n][exp_avg] for n in names],
                [self._moments[n][exp_avg_sq] for n in names],
                [treatment(n, self._masters[n].dim(), config) for n in names],
                self._numbers,
                factor,
                config.betas,
                config.eps,
            )
        return norm


def adamw_(
    masters: list[Tensor],
    parameters: list[Tensor],
    gradients: list[Tensor],
    firsts: list[Tensor],
    seconds: list[Tensor],
    treatments: list[tuple[float, float]],
    numbers: Tensor,
    factor: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """A step of AdamW (arXiv 1711.05101, algorithm 2) in place, on gradients times `factor`.

    `numbers` are the learning rate, the same over the first moment's bias correction, and one over the root of the
    second's; `treatments` are each parameter's factor on the rate, and its weight decay.
    """
    beta1, beta2 = betas
    for master, parameter, gradient, first, second, (rate, decay) in zip(
        masters, parameters, gradients, firsts, seconds, treatments, strict=True
    ):
        g = gradient.to(master.dtype) * factor
        m = first + (1 - beta1) * (g - first)
        v = beta2 * second + (1 - beta2) * (g * g)
        x = master * (1 - numbers[0] * (rate * decay)) - (numbers[1] * rate) * m / (v.sqrt() * numbers[2] + eps)
        first.copy_(m)
        second.copy_(v)
        master.copy_(x)
        parameter.copy_(x)
