"""The gradient of a floating-point input is the plain model's on every rank, wherever the input is used."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tpcompiler.verification.verify import verify


class Block(nn.Module):
    """Attention over given values, under a given mask, with a given scale of the feed-forward; `kv` heads."""

    def __init__(self, kv: int = 4) -> None:
        super().__init__()
        self.kv = kv
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 16 + 8 * kv)
        self.out = nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
        b, s, _ = x.shape
        parts = self.qkv(x).split([16, 4 * self.kv, 4 * self.kv], -1)
        q, k, v = (t.view(b, s, -1, 4).transpose(1, 2) for t in parts)
        grouped = self.kv < 4
        y = scaled_dot_product_attention(q, k, v, attn_mask=mask * 2, enable_gqa=grouped)
        x = x + self.out(y.transpose(1, 2).reshape(b, s, -1))
        return x + self.down(torch.relu(self.up(self.norm(x))) * scale.square())


def inputs(asked: bool) -> tuple[Tensor, ...]:
    shapes = ((2, 5, 16), (2, 1, 5, 5), (24,))
    return tuple(torch.randn(shape, requires_grad=asked) for shape in shapes)


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize(("kv", "degree"), [(4, 2), (1, 2), (2, 4), (4, 3)])
def test_inputs_get_the_plain_gradient_on_all_ranks(kv: int, degree: int, asked: bool) -> None:
    report = verify(Block(kv), inputs(asked), {"mesh": {"tensor": degree}})
    assert report.passed, str(report)
    case = next(c for c in report.cases if c.what == "gradients of the inputs")
    assert len(case.errors) == 3


def test_collectives_of_inputs_are_listed_where_the_example_asks_for_gradients() -> None:
    plain, asked = (verify(Block(), inputs(a), {"mesh": {"tensor": 2}}).collectives for a in (False, True))
    assert asked["all_reduce backward"] > plain["all_reduce backward"]
