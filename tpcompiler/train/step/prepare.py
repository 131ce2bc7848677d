"""What is done to the emitted program's layers before it runs: activations computed again, torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tpcompiler.ops.table import UNKNOWN, find
from tpcompiler.runtime.halves import twins_of
from tpcompiler.train.hold.layers import layers_of
from tpcompiler.train.settings import Train

Forward = Callable[..., Any]


def prepare(module: nn.Module, train: Train, hooked: bool) -> None:
    """Recomputation and compilation, as the run's settings say. In place; parameters keep their names.

    Each distinct layer is compiled once, and all layers that are equal share the result. Or the program is compiled as
    one graph; with `hooked` layers (FSDP2's hooks run between them) there is none, and layers are compiled instead.
    """
    layers = [*layers_of(module), *twins_of(module)]
    if train.activation_checkpointing != "none":
        for layer in layers:
            _replace(layer, partial(_recomputing, train.activation_checkpointing == "attention"))
    if train.compile == "none":
        return
    if train.compile == "whole" and not hooked:
        _replace(module, torch.compile)
    else:
        for layer in layers:
            _replace(layer, torch.compile)


def _replace(module: nn.Module, wrap: Callable[[Forward], Forward]) -> None:
    """Only the forward: hooks, among them FSDP2's, stay outside."""
    module.forward = wrap(module.forward)


def _recomputing(selective: bool, forward: Forward) -> Forward:
    """`forward`, whose activations are not kept but computed again in backward (Chen et al., arXiv 1604.06174).

    `selective` keeps the products of matrices and what other ranks sent, and computes again what lies between them:
    attention, norms, activations (Korthikanti et al., arXiv 2205.05198, §5).
    """
    how: dict[str, Any] = {"use_reentrant": False}
    if selective:
        how["context_fn"] = partial(create_selective_checkpoint_contexts, _kept)

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, **how, **kwargs)

    return run


def _kept(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if op.namespace == "_c10d_functional" or (find(op) or UNKNOWN).kept:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
