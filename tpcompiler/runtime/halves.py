"""Layers on two halves of a batch that take turns on the device: one computes while the other waits for other ranks.

In a program's graph `cut_batch` and `join_batch` mark where that begins and ends. The emitted source says it with
`Halves`. Nothing is computed twice, and no value changes: every operation between the marks treats the samples of a
batch apart from each other, which the checker proves.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from tpcompiler.runtime.groups import Group, Ranks
from tpcompiler.runtime.random import Rng


def cut_batch(x: Tensor) -> Tensor:
    """`x`, whose first dimension is the batch, on its way to layers that compute its halves in turn."""
    return x.view_as(x)


def join_batch(x: Tensor) -> Tensor:
    """`x`, whose halves layers have computed in turn, whole again."""
    return x.view_as(x)


class Halves:
    """`for layer in layers: x = layer(x, *rest)`, on two halves of the batch, each on a CUDA stream of its own.

    The halves communicate in groups of their own, so that neither waits for the other's messages: a device that has
    nothing to compute for one half computes for the other, forward and backward. `cut` are the places of the arguments
    that have a row a sample; all others go to both halves. Masks of dropout are those of the whole batch.

    The batch stays whole where there is nothing to halve or nothing would be gained: an odd batch, layers with hooks
    (FSDP2's), and a program that torch.compile traces as one graph. Collective: every rank makes its groups here.
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
        for t in second:  # their memory may be used again only after `side` has read them, in backward too
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
            # Autograd adds the halves' gradients of a parameter on the stream of the first half, and says so.
            getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", _nothing)(False)
        return self._stream

    def _twin(self, module: nn.Module, ranks: Ranks) -> nn.Module:
        """The same parameters and buffers in a module that communicates and draws for the second half."""
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
    """The layers that compute second halves anywhere in a module. They are not among its submodules."""
    return [t for m in module.modules() for v in vars(m).values() if isinstance(v, Halves) for t in v.twins]


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _nothing(_: bool) -> None:
    """Where torch does not know the warning."""


__all__ = ["Halves", "cut_batch", "join_batch", "twins_of"]
