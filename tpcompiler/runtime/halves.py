"""Runs layers on two halves of a batch in turn: one half computes while the other waits for other ranks.

In a program's graph, `cut_batch` and `join_batch` mark where that begins and ends. The emitted source writes it as
`Halves`. Nothing is computed twice, and no value changes, because every operation between the marks computes each
sample by itself. The checker proves this.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from tpcompiler.runtime.groups import Group, Ranks
from tpcompiler.runtime.random import Rng


def cut_batch(x: Tensor) -> Tensor:
    """Marks `x`, whose first dimension is the batch: the layers that follow compute its halves in turn. Returns `x`."""
    return x.view_as(x)


def join_batch(x: Tensor) -> Tensor:
    """Marks `x`, whose halves were computed in turn: what follows computes the whole batch. Returns `x`."""
    return x.view_as(x)


class Halves:
    """Runs `for layer in layers: x = layer(x, *rest)` on two halves of the batch, each on a CUDA stream of its own.

    Each half communicates in groups of its own, so that neither waits for the other's collectives. While one half
    waits, the device computes for the other, forward and backward. `cut` lists the positions of the arguments with one
    row per sample; both halves get all other arguments. Masks of dropout are those of the whole batch.

    The batch is not halved if it is odd, if the layers have hooks (as FSDP2's do), or if torch.compile traces the
    program as one graph. The constructor is collective, because every rank makes its groups in it.
    """

    def __init__(self, layers: Iterable[nn.Module], ranks: Ranks, cut: Sequence[int] = (0,)) -> None:
        self.layers = list(layers)
        self.cut = tuple(cut)
        self._draws: dict[Rng, Rng] = {}
        self._alike: list[tuple[nn.Module, nn.Module]] = []
        self._stream: torch.cuda.Stream | None = None
        second = ranks.beside()
        self.twins = [self._twin(layer, second) for layer in self.layers]

    def __call__(self, x: Tensor, *rest: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or x.shape[0] % 2 or x.shape[0] == 0 or any(map(_hooked, self.layers)):
            for layer in self.layers:
                x = layer(x, *rest)
            return x
        half = x.shape[0] // 2
        first, second = (x[:half], *self._rows(rest, 0, half)), (x[half:], *self._rows(rest, half, 2 * half))
        for rng, shifted in self._draws.items():
            shifted.follow(rng, half)
        for module, twin in self._alike:
            if twin.training != module.training:
                twin.training = module.training
        return torch.cat(self._in_turn(first, second))

    def _rows(self, rest: Sequence[Tensor], start: int, stop: int) -> Iterator[Tensor]:
        for i, t in enumerate(rest, start=1):
            yield t[start:stop] if i in self.cut else t

    def _in_turn(self, first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        (x, *beside_x), (y, *beside_y) = first, second
        if not x.is_cuda:
            for layer, twin in zip(self.layers, self.twins, strict=True):
                x, y = layer(x, *beside_x), twin(y, *beside_y)
            return x, y
        main = torch.cuda.current_stream(x.device)
        side = self._beside(x.device)
        side.wait_stream(main)
        for t in second:  # their memory must not be used again before `side` has read them, in backward as well
            t.record_stream(side)
        for layer, twin in zip(self.layers, self.twins, strict=True):
            x = layer(x, *beside_x)
            with torch.cuda.stream(side):
                y = twin(y, *beside_y)
        main.wait_stream(side)
        y.record_stream(main)
        return x, y

    def _beside(self, device: torch.device) -> torch.cuda.Stream:
        if self._stream is None or self._stream.device != device:
            self._stream = torch.cuda.Stream(device)
            # Autograd adds both halves' gradients of a parameter on the stream of the first half, and warns of that.
            getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", _nothing)(False)
        return self._stream

    def _twin(self, module: nn.Module, ranks: Ranks) -> nn.Module:
        """A copy of a module for the second half. It shares parameters and buffers, but not groups and `Rng`."""
        twin = copy.copy(module)  # shares the dictionaries of parameters and buffers
        own = vars(twin)
        own["_modules"] = {name: self._twin(m, ranks) for name, m in module.named_children()}
        for name, value in vars(module).items():
            if isinstance(value, Group):
                own[name] = ranks.group(value.over)
            elif isinstance(value, Rng):
                own[name] = self._draws.setdefault(value, Rng(value.seed, value.state.device))
        self._alike.append((module, twin))
        return twin


def twins_of(module: nn.Module) -> list[nn.Module]:
    """The copies of layers that compute second halves in a module. They are not among its submodules."""
    return [t for m in module.modules() for v in vars(m).values() if isinstance(v, Halves) for t in v.twins]


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _nothing(_: bool) -> None:
    """Stands in for the switch of a warning that this torch does not have."""


__all__ = ["Halves", "cut_batch", "join_batch", "twins_of"]
