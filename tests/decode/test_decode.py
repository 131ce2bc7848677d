"""The law of the decoder: a sequence that grows has, at every position, the logits of the whole sequence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.decode.growing import build, growing
from tests.sample import sampled
from tests.zoo import ZOO
from tpcompiler.errors import DecodeError

ENCODERS = {"factorised_embedding", "head_temperature", "matmul", "qkv_thirds", "relative_bias"}
CAUSAL = sorted({"gpt2", "llama", *ZOO} - ENCODERS)
ALL_TOGETHER = {"bmm", "window_mask"}  # their sequences must be of one length


@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.nightly) for n in CAUSAL])
def test_every_model_at_every_degree(name: str, degree: int) -> None:
    check(name, degree)


@pytest.mark.parametrize("name", ["gpt2", "llama", "window_mask"])
def test_steps_give_the_logits_of_the_whole_sequence(name: str) -> None:
    check(name, 3 if name in ("gpt2", "llama") else 2)


def check(name: str, degree: int) -> None:
    it = growing(*build(name), degree)
    assert it.run([0, 5, 6, 7, 8, 13]) < 1e-10
    assert bool(it.decoder.uniform) == (name in ALL_TOGETHER)
    if not it.decoder.uniform:
        assert it.run([0], counts=[5, 2, 4]) < 1e-10


@pytest.mark.parametrize("name", sampled(ENCODERS, 5))
def test_an_encoder_is_refused_at_the_line_that_looks_ahead(name: str) -> None:
    with pytest.raises(DecodeError, match="cannot generate") as e:
        growing(*build(name), 1)
    assert "\n" not in str(e.value)


Mixer = Callable[[Tensor], Tensor]  # [b, s, 8] → the same


class Mixed(nn.Module):
    def __init__(self, mix: Mixer) -> None:
        super().__init__()
        self.embed, self.head, self.mix = nn.Embedding(20, 8), nn.Linear(8, 20), mix

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.mix(self.embed(ids)))
        return logits


def scores(x: Tensor) -> Tensor:
    return x @ x.transpose(1, 2)


def before(x: Tensor, off: int = 0) -> Tensor:
    """True where a column is at most `off` positions after its row."""
    place = torch.arange(x.shape[1], device=x.device)
    return place[None, :] <= place[:, None] + off


CAUSAL_MIXERS: dict[str, Mixer] = {
    "running sum": lambda x: x.cumsum(1),
    "running mean as a product": lambda x: (before(x).to(x.dtype) / (1 + torch.arange(x.shape[1]))[:, None]) @ x,
    "linear attention": lambda x: (scores(x) * before(x)) @ x,
    "transposed scores": lambda x: F.softmax(scores(x).transpose(1, 2).masked_fill(~before(x), -torch.inf), -1) @ x,
    "window": lambda x: F.softmax(scores(x).masked_fill(~(before(x) & ~before(x, -4)), -1e9), -1) @ x,
    "softmax in float32": lambda x: (
        F.softmax(scores(x).masked_fill(~before(x), -torch.inf).float(), -1).to(x.dtype) @ x
    ),
    "stick of later weights": lambda x: F.softmax(scores(x).cumsum(-1).masked_fill(~before(x), -torch.inf), -1) @ x,
}
LOOKING_AHEAD: dict[str, Mixer] = {
    "no mask": lambda x: F.softmax(scores(x), -1) @ x,
    "no mask, in float32": lambda x: F.softmax(scores(x).float(), -1).to(x.dtype) @ x,
    "one too far": lambda x: F.softmax(scores(x).masked_fill(~before(x, 1), -torch.inf), -1) @ x,
    "a mild mask": lambda x: F.softmax(scores(x) - 5.0 * ~before(x), -1) @ x,
    "masked after the softmax": lambda x: (F.softmax(scores(x), -1) * before(x)) @ x,
    "softmax over rows": lambda x: F.softmax(scores(x).masked_fill(~before(x), -torch.inf), 1) @ x,
    "shifted to the left in the scores": lambda x: (
        F.softmax(scores(x)[..., 1:].masked_fill(~before(x)[:, :-1], -torch.inf), -1) @ x[:, :-1]
    ),
    "the token before": lambda x: x + F.pad(x, (0, 0, 1, 0))[:, :-1],
    "the first row": lambda x: x + x[:, :1],
    "mean": lambda x: x - x.mean(1, keepdim=True),
    "norm over positions": lambda x: x / x.norm(dim=1, keepdim=True),
    "reversed": lambda x: x + x.flip(1),
    "shifted from the right": lambda x: x + F.pad(x[:, 1:], (0, 0, 0, 1)),
    "the last row": lambda x: x + x[:, -1:],
    "positions from the end": lambda x: x + (torch.arange(x.shape[1]) - x.shape[1])[:, None],
    "positions as a share": lambda x: x * (torch.arange(x.shape[1]) / x.shape[1])[:, None],
    "as many as there are": lambda x: x * x.shape[1],
    "sdpa without a mask": lambda x: F.scaled_dot_product_attention(x, x, x),
    "prefix": lambda x: (
        F.softmax(scores(x).masked_fill(~(before(x) | (torch.arange(x.shape[1]) < 3)[None]), -torch.inf), -1) @ x
    ),
}


@pytest.mark.parametrize("mix", CAUSAL_MIXERS)
def test_a_causal_mixer_is_followed(mix: str) -> None:
    it = growing(Mixed(CAUSAL_MIXERS[mix]), {"ids": torch.randint(20, (2, 9))}, 1)
    assert it.run([0, 4, 5, 6, 11]) < 1e-10


@pytest.mark.parametrize("mix", LOOKING_AHEAD)
def test_what_looks_ahead_is_refused_with_its_line(mix: str) -> None:
    with pytest.raises(DecodeError, match=r"test_decode\.py:\d+: Mixed cannot generate token by token: ") as e:
        growing(Mixed(LOOKING_AHEAD[mix]), {"ids": torch.randint(20, (2, 9))}, 1)
    assert "\n" not in str(e.value)
