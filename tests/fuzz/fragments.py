"""Random legal modules, as data: a fragment is a name, numbers and inner fragments. It builds a module from `[b, s, D]`
to the same, and prints itself as the Python that makes it, so that a failure can be kept as it is printed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, TOKENS, BATCH, WORDS = 12, 6, 2, 14
ACTIVATIONS = (F.relu, F.gelu, F.silu, torch.tanh, torch.sigmoid)


@dataclass(frozen=True)
class Fragment:
    """`Fragment("mlp", (24, 0))`."""

    kind: str
    numbers: tuple[int, ...] = ()
    inner: tuple[Fragment, ...] = ()

    def __str__(self) -> str:
        inner = ", ".join(map(str, self.inner))
        comma = "," if len(self.inner) == 1 else ""
        tail = f", ({inner}{comma})" if self.inner else ""
        return f"Fragment({self.kind!r}, {self.numbers}{tail})"

    @property
    def size(self) -> int:
        return 1 + sum(f.size for f in self.inner)

    def smaller(self) -> Iterator[Fragment]:
        """Simpler fragments, the simplest first."""
        yield from sorted(self.inner, key=lambda f: f.size)
        if self.kind in ("sequence", "added"):
            for i in range(len(self.inner)):
                if len(self.inner) > 1:
                    yield replace(self, inner=self.inner[:i] + self.inner[i + 1 :])
        for i, f in enumerate(self.inner):
            for less in f.smaller():
                yield replace(self, inner=self.inner[:i] + (less,) + self.inner[i + 1 :])


class Whole(nn.Module):
    """An embedding, a fragment and a head, or a fragment alone."""

    def __init__(self, fragment: Fragment) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(WORDS, WIDTH) * 0.1) if fragment.kind == "words" else None
        self.body = Node(fragment.inner[0] if self.table is not None else fragment)
        self.tied = bool(fragment.numbers and fragment.numbers[0])

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            return self.body(x)
        x = self.body(self.table[x] if self.tied else F.embedding(x, self.table))
        return F.linear(x, self.table) if self.tied else x


class Node(nn.Module):
    """One fragment. Its parameters are made by name when its constructor asks for them."""

    def __init__(self, fragment: Fragment) -> None:
        super().__init__()
        self.fragment = fragment
        self.inner = nn.ModuleList(map(Node, fragment.inner))
        self.weights = nn.ParameterList()
        for shape in SHAPES.get(fragment.kind, lambda n: ())(fragment.numbers):
            self.weights.append(nn.Parameter(torch.randn(shape) * 0.2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = FORWARD[self.fragment.kind](x, self.fragment.numbers, list(self.weights), list(self.inner))
        return out


FORWARD: dict[str, Callable[..., Tensor]] = {}
SHAPES: dict[str, Callable[[Any], Any]] = {}
DRAWS: dict[str, tuple[Callable[[random.Random], tuple[int, ...]], int]] = {}  # numbers, inner fragments (-1: some)


def kind(draw: Callable[[random.Random], tuple[int, ...]], shapes: Callable[[Any], Any], inner: int = 0) -> Any:
    """Registers a fragment: how its numbers are drawn, its parameters' shapes, how many fragments stand in it."""

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name = function.__name__
        FORWARD[name], SHAPES[name], DRAWS[name] = function, shapes, (draw, inner)
        return function

    return register


def drawn(r: random.Random, depth: int = 3) -> Fragment:
    """A fragment with something to split in it, at most `depth` deep."""
    body = Fragment("sequence", (), tuple(_drawn(r, depth) for _ in range(r.randint(1, 3))))
    return Fragment("words", (r.randint(0, 1),), (body,)) if r.random() < 0.3 else body


def _drawn(r: random.Random, depth: int) -> Fragment:
    names = [n for n, (_, inner) in DRAWS.items() if not inner or depth > 0]
    name = r.choice(names)
    numbers, inner = DRAWS[name]
    count = r.randint(1, 2) if inner < 0 else inner
    return Fragment(name, numbers(r), tuple(_drawn(r, depth - 1) for _ in range(count)))


def none(r: random.Random) -> tuple[int, ...]:
    return ()


def no_weights(n: Any) -> tuple[()]:
    return ()


# -- structure -------------------------------------------------------------------------------------------------------


@kind(none, no_weights, -1)
def sequence(x: Tensor, n: Any, w: Any, inner: Any) -> Tensor:
    for f in inner:
        x = f(x)
    return x


@kind(none, no_weights, -1)
def added(x: Tensor, n: Any, w: Any, inner: Any) -> Tensor:
    out = inner[0](x)
    for f in inner[1:]:
        out = out + f(x)
    return out


@kind(none, no_weights, 1)
def residual(x: Tensor, n: Any, w: Any, inner: Any) -> Tensor:
    return x + inner[0](x)


@kind(none, lambda n: [(WIDTH, WIDTH)], 1)
def gated(x: Tensor, n: Any, w: Any, inner: Any) -> Tensor:
    return inner[0](x) * torch.sigmoid(F.linear(x, w[0]))


# -- products --------------------------------------------------------------------------------------------------------


@kind(
    lambda r: (r.choice((8, 12, 18, 24)), r.randrange(5), r.randint(0, 1)),
    lambda n: [(n[0], WIDTH), (WIDTH, n[0]), (n[0],), (WIDTH,)],
)
def mlp(x: Tensor, n: Any, w: Any, inner: Any) -> Tensor:
    up, down, a, b = w
    return F.linear(ACTIVATIONS[n[1]](F.linear(x, up, a if n[2] else None)), down, b if n[2] else None)


@kind(lambda r: (r.choice((8, 12, 18)), r.randrange(5), r.randrange(3)), lambda n: [(2 * n[0], WIDTH), (WIDTH, n[0])])
def glu(x: Tensor, n: Any, w: Any, inner: Any) -> Tensor:
    h = F.linear(x, w[0])
    a, b = (
        h.chunk(2, -1)
        if n[2] == 0
        else h.unflatten(-1, (-1, 2)).unbind(-1)
        if n[2] == 1
        else (h[..., : n[0]], h[..., n[0] :])
    )
    return F.linear(ACTIVATIONS[n[1]](a) * b, w[1])


@kind(
    lambda r: (r.choice((8, 12)), r.choice((2, 4))),
    lambda n: [(WIDTH, n[0]), (n[0], WIDTH), (WIDTH, n[1]), (n[1], WIDTH)],
)
def low_rank(x: Tensor, n: Any, w: Any, inner: Any) -> Tensor:
    return torch.relu(x @ w[0]) @ w[1] + (x @ w[2]) @ w[3] * 0.5


@kind(
    lambda r: (r.choice((2, 4)), r.choice((6, 8))), lambda n: [(n[0], WIDTH), (n[0], WIDTH, n[1]), (n[0], n[1], WIDTH)]
)
def experts(x: Tensor, n: Any, w: Any, inner: Any) -> Tensor:
    h = torch.einsum("bsd,edf->bsef", x, w[1]).relu()
    return torch.einsum("bsef,efd,bse->bsd", h, w[2], F.linear(x, w[0]).softmax(-1))


def _heads(r: random.Random) -> tuple[int, ...]:
    kv = r.choice((1, 2, 3))
    return kv, r.choice((1, 2)), r.choice((4, 6)), r.randrange(4), r.randrange(3)


def _attention_shapes(n: Any) -> list[tuple[int, ...]]:
    kv, group, size = n[:3]
    return [((kv * group + 2 * kv) * size, WIDTH), (WIDTH, kv * group * size), (size,)]


@kind(_heads, _attention_shapes)
def attention(x: Tensor, n: Any, w: Any, inner: Any) -> Tensor:
    kv, group, size, mask, style = n
    heads = kv * group
    b, s, _ = x.shape
    q, k, v = F.linear(x, w[0]).split([heads * size, kv * size, kv * size], -1)
    q = q.view(b, s, heads, size).transpose(1, 2)
    k, v = (t.unflatten(-1, (kv, size)).permute(0, 2, 1, 3) for t in (k, v))
    if style == 2:
        q, k = (F.normalize(t, dim=-1) * w[2] for t in (q, k))
    if group > 1:
        k, v = (t[:, :, None].expand(b, kv, group, s, size).reshape(b, heads, s, size) for t in (k, v))
    ahead = torch.ones(s, s, dtype=torch.bool, device=x.device).triu(1)
    if style == 0:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=mask == 1)
    else:
        scores = q @ k.transpose(-1, -2) / size**0.5
        if mask == 1:
            scores = scores.masked_fill(ahead, -1e9)
        elif mask == 2:
            scores = torch.where(ahead & (scores > 3), scores * 0.5, scores)
        y = scores.softmax(-1) @ v
    return F.linear(
        y.transpose(1, 2).flatten(2) if style != 1 else torch.einsum("bhsd->bshd", y).reshape(b, s, -1), w[1]
    )


@kind(lambda r: (r.choice((8, 12)), r.choice((2, 3))), lambda n: [(n[0], WIDTH), (n[0], 1, n[1]), (WIDTH, n[0])])
def convolution(x: Tensor, n: Any, w: Any, inner: Any) -> Tensor:
    h = F.linear(x, w[0]).transpose(1, 2)
    h = F.conv1d(F.pad(h, (n[1] - 1, 0)), w[1], groups=n[0])
    return F.linear(F.silu(h).transpose(1, 2), w[2])


# -- norms -----------------------------------------------------------------------------------------------------------


@kind(lambda r: (r.randrange(3),), lambda n: [(WIDTH,), (WIDTH,)])
def norm(x: Tensor, n: Any, w: Any, inner: Any) -> Tensor:
    if n[0] == 0:
        return F.layer_norm(x, (WIDTH,), w[0] + 1, w[1])
    if n[0] == 1:
        return F.rms_norm(x, (WIDTH,), w[0] + 1, 1e-5)
    return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(x.dtype) * w[0]


# -- glue ------------------------------------------------------------------------------------------------------------


@kind(lambda r: (r.choice((2, 4)),), no_weights, 1)
def windows(x: Tensor, n: Any, w: Any, inner: Any) -> Tensor:
    b, s, d = x.shape
    y = F.pad(x, (0, 0, 0, -s % n[0]))
    y = inner[0](y.reshape(-1, n[0], d))
    return y.reshape(b, -1, d)[:, :s]


@kind(none, no_weights, 1)
def sequence_first(x: Tensor, n: Any, w: Any, inner: Any) -> Tensor:
    return inner[0](x.permute(1, 0, 2)).transpose(0, 1)


@kind(none, no_weights)
def shifted(x: Tensor, n: Any, w: Any, inner: Any) -> Tensor:
    return F.pad(x, (0, 0, 1, -1))


@kind(lambda r: (r.randrange(3),), no_weights)
def turned(x: Tensor, n: Any, w: Any, inner: Any) -> Tensor:
    if n[0] == 0:
        a, b = x.chunk(2, -1)
        return torch.cat([-b, a], -1)
    if n[0] == 1:
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x.roll(1, 1)


@kind(lambda r: (r.randrange(3),), no_weights)
def picked(x: Tensor, n: Any, w: Any, inner: Any) -> Tensor:
    order = torch.arange(x.shape[1] - 1, -1, -1, device=x.device)
    if n[0] == 0:
        return x[:, order]
    if n[0] == 1:
        return x.index_select(1, order)
    return x.gather(1, order[None, :, None].expand(x.shape))


@kind(lambda r: (r.choice((4, 6, 8)),), no_weights, 1)
def part(x: Tensor, n: Any, w: Any, inner: Any) -> Tensor:
    return torch.cat([x[..., : n[0]], inner[0](x)[..., n[0] :]], -1)


@kind(none, no_weights, 1)
def pooled(x: Tensor, n: Any, w: Any, inner: Any) -> Tensor:
    return x + inner[0](x.mean(1, keepdim=True).expand_as(x))


@kind(none, no_weights)
def summed(x: Tensor, n: Any, w: Any, inner: Any) -> Tensor:
    return x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]


@kind(lambda r: (r.choice((2, 3)),), no_weights, 1)
def detached(x: Tensor, n: Any, w: Any, inner: Any) -> Tensor:
    return x + inner[0](x.detach())
