"""Ops beyond the plain transformer's, in models split along the axes that those ops meet: equal on all ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tpcompiler as tpc
from tpcompiler.errors import TpcError

HIDDEN = 12


def whole_head(degree: int, *parameters: str) -> dict[str, Any]:
    """A spec that splits the output dimension of these parameters, and no output layer."""
    axes = [{"parameter": p, "dimension": 0} for p in parameters]
    return {"mesh": {"tensor": degree}, "shard": {"head": "replicate"}, "axes": axes}


def assert_equal_on_ranks(model: type[nn.Module], spec: dict[str, Any], **inputs: Tensor) -> None:
    report = tpc.verify(model, inputs or {"x": torch.randn(2, 7, HIDDEN)}, spec)
    assert report.passed, str(report)


class Writes(nn.Module):
    """Values written into parts of others: slices, single places, scattered and indexed ones."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.a, self.b, self.gate = nn.Linear(HIDDEN, 24), nn.Linear(HIDDEN, 8), nn.Linear(HIDDEN, 8)
        self.c, self.d = nn.Linear(32, HIDDEN), nn.Linear(24, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        q, k = self.a(x), self.b(x)
        y = x.new_empty(*x.shape[:-1], 32)
        y[..., :24] = F.gelu(q)
        y[..., 24:] = k.tanh()
        z = torch.zeros_like(q)
        z[:, 0] = q[:, 1]
        gate = self.gate(x).softmax(-1)
        best, which = gate.topk(2, dim=-1)
        weight = torch.zeros_like(gate).scatter(-1, which, best).sum(-1, keepdim=True)
        rows = torch.tensor([0, 1, 0], device=x.device)
        t = torch.zeros(x.shape[0], x.shape[1], 24, dtype=x.dtype, device=x.device).index_add(1, rows, q[:, :3])
        u = q.index_put((rows[:2], rows[1:]), q[:2, 0])
        return self.c(y) + self.d(F.silu(z + q)) * weight + self.d(t + u)


class Windows(nn.Module):
    """Convolutions over the sequence: one a channel, in groups, and plain; pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.i, self.depthwise = nn.Linear(HIDDEN, 30), nn.Conv1d(30, 30, 4, groups=30, padding=3)
        self.grouped, self.plain = nn.Conv1d(30, 60, 3, groups=15, padding=1), nn.Conv1d(HIDDEN, 20, 3, padding=1)
        self.o, self.p, self.g = nn.Linear(30, HIDDEN), nn.Linear(20, HIDDEN), nn.Linear(60, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        y = self.i(x).transpose(1, 2)
        z = F.silu(self.depthwise(y)[..., : y.shape[-1]]).transpose(1, 2)
        w = F.gelu(self.plain(x.transpose(1, 2)).transpose(1, 2))
        h = F.gelu(self.grouped(F.max_pool1d(y, 3, 1, 1)).transpose(1, 2))
        return self.o(z) + self.p(w) + self.g(h)


@pytest.mark.parametrize("degree", [2, 3])
def test_writes(degree: int) -> None:
    assert_equal_on_ranks(Writes, whole_head(degree, "a.weight", "b.weight"))


@pytest.mark.parametrize("degree", [2, 4])
def test_windows(degree: int) -> None:
    assert_equal_on_ranks(Windows, whole_head(degree, "i.weight", "plain.weight"))


class Mixer(nn.Module):
    """One product makes heads and what all heads share, in segments of segments, and a convolution goes over both."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.d, self.state = 4, 6, 5
        inner = self.heads * self.d
        self.norm = nn.LayerNorm(HIDDEN)
        self.i = nn.Linear(HIDDEN, 2 * inner + 2 * self.state + self.heads)
        self.conv = nn.Conv1d(
            inner + 2 * self.state, inner + 2 * self.state, 3, groups=inner + 2 * self.state, padding=1
        )
        self.o = nn.Linear(inner, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.heads * self.d
        gate, mixed, step = self.i(self.norm(x)).split([inner, inner + 2 * self.state, self.heads], -1)
        mixed = F.silu(self.conv(mixed.transpose(1, 2)).transpose(1, 2))
        h, b, c = mixed.split([inner, self.state, self.state], -1)
        h = h.unflatten(-1, (self.heads, self.d)) * F.softplus(step)[..., None]
        scores = torch.einsum("bsn,btn->bst", c, b)
        y = torch.einsum("bst,bthd->bshd", scores, h).flatten(-2)
        return self.o(y * F.silu(gate))


@pytest.mark.parametrize("degree", [2, 3])
def test_segments_of_segments_of_which_some_are_split(degree: int) -> None:
    heads = {"parameter": "o.weight", "dimension": 1, "factor": 0}
    assert_equal_on_ranks(Mixer, whole_head(degree) | {"axes": [heads]})


class Rotary(nn.Module):
    """Rotations as complex numbers: a gradient flows through them too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.q, self.kv, self.o = nn.Linear(HIDDEN, 24), nn.Linear(HIDDEN, 16), nn.Linear(24, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        x = self.norm(x)
        turn = torch.polar(torch.ones(s, 2, device=x.device), torch.arange(s, device=x.device)[:, None] * torch.ones(2))
        k, v = self.kv(x).view(b, s, 2, 2, 4).unbind(2)

        def turned(y: Tensor) -> Tensor:
            z = torch.view_as_complex(y.float().reshape(b, s, -1, 2, 2))
            return torch.view_as_real(z * turn[:, None]).flatten(-2).to(y.dtype).transpose(1, 2)

        q, k, v = turned(self.q(x)), turned(k).repeat_interleave(3, 1), v.transpose(1, 2).repeat_interleave(3, 1)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, 24))


@pytest.mark.parametrize("degree", [2, 4])
def test_complex_rotations_carry_gradients(degree: int) -> None:
    assert_equal_on_ranks(Rotary, {"mesh": {"tensor": degree}, "shard": {"head": "replicate", "attention": "shard"}})


class Constant(nn.Module):
    """Features that every rank has whole, beside split ones, in one product."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.c = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 24), nn.Linear(30, HIDDEN)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        return self.c(torch.cat([F.gelu(self.a(self.norm(x))), features], -1))


def test_a_sum_over_split_and_whole_segments_is_refused() -> None:
    """Summed over ranks, the whole segments would count once a rank."""
    inputs = {"x": torch.randn(2, 7, HIDDEN), "features": torch.randn(2, 7, 6)}
    with pytest.raises(TpcError, match="segments of which some are split"):
        tpc.shard(Constant, inputs, whole_head(2, "a.weight"))
    assert tpc.verify(Constant, inputs, {"mesh": {"tensor": 2}}).passed


class Cycles(nn.Module):
    """The same layers several times, only the last one with gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 24), nn.Linear(24, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for _ in range(2):
                x = x + self.b(F.gelu(self.a(self.norm(x))))
        return x + self.b(F.gelu(self.a(self.norm(x))))


def test_what_no_gradient_reaches_has_no_all_reduce_backward() -> None:
    inputs = {"x": torch.randn(2, 7, HIDDEN)}
    spec = {"mesh": {"tensor": 2}, "shard": {"head": "replicate"}}
    report = tpc.verify(Cycles, inputs, spec)
    assert report.passed, str(report)
    assert report.collectives == {"all_reduce backward": 1, "all_reduce forward": 3}


class Picked(nn.Module):
    """Queries, one key and one value, taken from one product by constant indices; a rotation of the whole head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.o = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 32), nn.Linear(24, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        fused = self.qkv(self.norm(x)).view(b, s, 8, 4)
        q, k, v = (t.transpose(1, 2) for t in (fused[..., :-2, :], fused[..., [-2], :], fused[..., [-1], :]))
        turned, rest = q.split([4, 0], dim=-1)
        q = torch.cat([turned * 2, rest], -1)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, 24))


def test_constant_indices_and_empty_rests_hide_no_heads() -> None:
    inputs = {"x": torch.randn(2, 7, HIDDEN)}
    spec = {"mesh": {"tensor": 2}, "shard": {"head": "replicate", "attention": "shard"}}
    assert not {"qkv.weight", "o.weight"} & {r.name for r in tpc.shard(Picked, inputs, spec).plan.replicated}
    assert_equal_on_ranks(Picked, spec)
