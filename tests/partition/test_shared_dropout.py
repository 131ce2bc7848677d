"""Ranks that hold copies of an attention's weights draw one mask: after many steps their copies are the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.sample import sampled
from tpcompiler.api import shard
from tpcompiler.capture.unfused import dropping_attention
from tpcompiler.execute.interpret import interpret
from tpcompiler.execute.simulate import run_ranks
from tpcompiler.runtime import Ranks, Rng
from tpcompiler.verification.against_model import local_slice, merged


class Attention(nn.Module):
    """One layer of fused attention with dropout, with or without grouped keys and values."""

    def __init__(self, heads: int = 4, kv: int = 4) -> None:
        super().__init__()
        self.heads, self.kv = heads, kv
        self.qkv = nn.Linear(24, (heads + 2 * kv) * 6)
        self.out = nn.Linear(heads * 6, 24)
        self.up, self.down = nn.Linear(24, 48), nn.Linear(48, 24)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(x).view(b, s, -1, 6).transpose(1, 2).split([self.heads, self.kv, self.kv], 1)
        grouped = self.kv < self.heads
        y = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=0.5 if self.training else 0.0, enable_gqa=grouped
        )
        x = x + self.out(y.transpose(1, 2).reshape(b, s, -1))
        return x + self.down(torch.relu(self.up(x)))


CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "replicated": (4, 4, {"mesh": {"tensor": 2}, "shard": {"attention": "replicate"}}),
    "one head": (1, 1, {"mesh": {"tensor": 2}}),
    "two heads over four ranks": (2, 2, {"mesh": {"tensor": 4}}),
    "three heads over four ranks": (3, 3, {"mesh": {"tensor": 4}}),
    "grouped heads, replicated": (4, 2, {"mesh": {"tensor": 2}, "shard": {"attention": "replicate"}}),
}


@pytest.mark.parametrize("case", sampled(CASES, 2))
def test_copies_stay_the_same_bits_over_50_steps(case: str) -> None:
    heads, kv, spec = CASES[case]
    model = Attention(heads, kv)
    sharded = shard(model, (torch.randn(3, 5, 24),), spec)
    assert sharded.check.passed, sharded.check.refused
    program = sharded.program
    state = {p.name: model.get_parameter(p.name).detach() for p in program.capture.parameters}

    def train(ranks: Ranks) -> dict[str, Tensor]:
        mine = {}
        for p in program.capture.parameters:
            part = local_slice(state[p.name], program.dims[p.name], ranks.mesh, ranks.coords)
            mine[p.name] = part.clone().requires_grad_()
        rng = Rng(1)
        for step in range(50):
            x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(step))
            (y,) = interpret(program, ranks, mine, [x], training=True, rng=rng.at(step, 0))
            grads = torch.autograd.grad(y.square().mean(), list(mine.values()), allow_unused=True)
            with torch.no_grad():
                for value, grad in zip(mine.values(), grads, strict=True):
                    if grad is not None:
                        value -= 0.1 * grad
        return mine

    found = run_ranks(program.mesh, train)
    for p in program.capture.parameters:
        whole, same = merged([mine[p.name].detach() for mine in found], p, program)
        assert same, p.name
        assert whole is not None and not torch.equal(whole, state[p.name])


def test_attention_whose_heads_are_split_keeps_its_kernel() -> None:
    sharded = shard(Attention(), (torch.randn(3, 5, 24),), {"mesh": {"tensor": 2}})
    assert dropping_attention(sharded.capture)
