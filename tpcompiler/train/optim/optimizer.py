"""AdamW over a rank's own parameters."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from tpcompiler.train.settings import Optimizer

FUSED_ON = frozenset({"cpu", "cuda", "mps", "xpu"})


def parameter_groups(named: Iterable[tuple[str, Tensor]], weight_decay: float) -> list[dict[str, Any]]:
    """Parameters with weight decay, and those without: norms and biases, which are those of one dimension at most.

    A local slice has as many dimensions as the whole parameter, so this is the same at every degree. Frozen parameters
    are left out. A fused optimizer step takes either DTensors or plain tensors: these stand in groups of their own.
    """
    trainable = [(name, p) for name, p in named if p.requires_grad]

    def kind(item: tuple[str, Tensor]) -> tuple[bool, str, str]:
        _, p = item
        return p.dim() < 2, type(p.data).__name__, str(p.dtype)

    return [
        {
            "params": [p for _, p in members],
            "names": [name for name, _ in members],
            "weight_decay": 0.0 if flat else weight_decay,
        }
        for (flat, _, _), members in ((k, list(g)) for k, g in groupby(sorted(trainable, key=kind), kind))
    ]


def make_optimizer(named: Iterable[tuple[str, Tensor]], config: Optimizer) -> torch.optim.AdamW:
    """Decoupled AdamW, fused where torch has a fused step. Each group also holds its parameters' "names"."""
    groups = parameter_groups(named, config.weight_decay)
    assert groups, "no parameter is trained"
    devices = {p.device.type for g in groups for p in g["params"]}
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=devices <= FUSED_ON)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """In every group; in place where the rate is a tensor, which a compiled or captured step reads."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
