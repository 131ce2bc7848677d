"""What is done to the emitted program's layers before it runs: activations computed again, torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tpcompiler.ops.table import UNKNOWN, find
from tpcompiler.runtime.halves import twins_of
from tpcompiler.runtime.head import chunk_losses, chunk_numbers
from tpcompiler.train.hold.layers import layers_of
from tpcompiler.train.settings import Train

Forward = Callable[..., Any]


def prepare(module: nn.Module, train: Train, hooked: bool, draws: bool = True) -> None:
    """Recomputation and compilation, as the run's settings say. In place; parameters keep their names.

    Each distinct layer is compiled once, and all layers that are equal share the result. Or the program is compiled as
    one graph; with `hooked` layers (FSDP2's hooks run between them) there is none, and layers are compiled instead.
    `draws`: the program draws from torch's own generator, whose state recomputation then puts back.
    """
    layers = [*layers_of(module), *twins_of(module)]
    if train.activation_checkpointing != "none":
        for layer in layers:
            _replace(layer, partial(_recomputing, train.activation_checkpointing == "attention", draws))
    if train.compile == "none":
        return
    if train.compile == "whole" and not hooked:
        _replace(module, torch.compile)
    else:
        for layer in layers:
            _replace(layer, torch.compile)
        _compile_loss(module)


def _replace(module: nn.Module, wrap: Callable[[Forward], Forward]) -> None:
    """Only the forward: hooks, among them FSDP2's, stay outside."""
    module.forward = wrap(module.forward)


def _compile_loss(module: nn.Module) -> None:
    """Compiles the loss outside of layers too: issued call by call, it reads and writes float32 logits many times.

    The program's own forward finds the compiled loss where the plain one was; the layers keep what they have.
    """
    plain: Any = module.forward
    own = plain.__func__
    there = own.__globals__
    names: dict[str, Any] = {"F": _Functional()}
    if "cross_entropy" in there:
        names["cross_entropy"] = torch.compile(there["cross_entropy"])
    if "linear_cross_entropy" in there:
        pieces = {f.__name__: torch.compile(f) for f in (chunk_numbers, chunk_losses)}
        names["linear_cross_entropy"] = _finding(there["linear_cross_entropy"], pieces)
    module.forward = MethodType(_finding(own, names), module)


def _finding(fn: FunctionType, names: dict[str, Any]) -> FunctionType:
    """The same function, which finds other things under these names."""
    changed = FunctionType(fn.__code__, fn.__globals__ | names, fn.__name__, fn.__defaults__, fn.__closure__)
    changed.__kwdefaults__ = fn.__kwdefaults__
    return changed


class _Functional:
    """`torch.nn.functional` with a compiled loss."""

    def __init__(self) -> None:
        self.cross_entropy = torch.compile(F.cross_entropy)

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)


def _recomputing(selective: bool, draws: bool, forward: Forward) -> Forward:
    """`forward`, whose activations are not kept but computed again in backward (Chen et al., arXiv 1604.06174).

    `selective` keeps the products of matrices and what other ranks sent, and computes again what lies between them:
    attention, norms, activations (Korthikanti et al., arXiv 2205.05198, §5).
    """
    how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": draws}
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
