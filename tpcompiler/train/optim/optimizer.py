"""AdamW over a rank's own parameters."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from tpcompiler.train.settings import Optimizer

FUSED_ON = frozenset({"cpu", "cuda", "mps", "xpu"})


def treatment(name: str, dims: int, config: Optimizer) -> tuple[float, float]:
    """The factor on a parameter's learning rate, and its weight decay.

    Norms and biases, which are those of one dimension at most, do not decay unless a group says so.
    """
    decay = config.weight_decay if dims > 1 else 0.0
    for group in config.groups:
        if fnmatchcase(name, group.match):
            return group.lr, decay if group.weight_decay is None else group.weight_decay
    return 1.0, decay


def parameter_groups(named: Iterable[tuple[str, Tensor]], config: Optimizer) -> list[dict[str, Any]]:
    """Parameters by their `treatment`; each group's "rate" is the factor on its learning rate.

    A local slice has as many dimensions as the whole parameter, so this is the same at every degree. Frozen parameters
    are left out. A fused optimizer step takes either DTensors or plain tensors: these stand in groups of their own.
    """
    trainable = [(name, p) for name, p in named if p.requires_grad]

    def kind(item: tuple[str, Tensor]) -> tuple[float, float, str, str]:
        name, p = item
        return *treatment(name, p.dim(), config), type(p.data).__name__, str(p.dtype)

    return [
        {
            "params": [p for _, p in members],
            "names": [name for name, _ in members],
            "weight_decay": decay,
            "rate": rate,
        }
        for (rate, decay, _, _), members in ((k, list(g)) for k, g in groupby(sorted(trainable, key=kind), kind))
    ]


def make_optimizer(named: Iterable[tuple[str, Tensor]], config: Optimizer) -> torch.optim.AdamW:
    """Decoupled AdamW, fused where torch has a fused step. Each group also holds its parameters' "names"."""
    groups = parameter_groups(named, config)
    assert groups, "no parameter is trained"
    devices = {p.device.type for g in groups for p in g["params"]}
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=devices <= FUSED_ON)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """In every group, times its "rate"; in place where it is a tensor, which a compiled or captured step reads."""
    for group in optimizer.param_groups:
        own = lr * group.get("rate", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(own)
        else:
            group["lr"] = own
