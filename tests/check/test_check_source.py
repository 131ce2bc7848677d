"""The emitted source against the graph: what is written in two ways is one, what is not one is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpcompiler.api import Sharded, compile_capture
from tpcompiler.capture import capture
from tpcompiler.check import check
from tpcompiler.spec.schema import Spec
from tpcompiler.verification.verify import verify

WIDTH, VOCAB = 12, 40


def sharded(build: Callable[[], nn.Module], *inputs: Tensor) -> Sharded:
    return compile_capture(capture(build, inputs), Spec.load({"mesh": {"tensor": 2}}))


class Shifted(nn.Module):
    """A decoder's inputs are its labels, one later, written into place (BART, Whisper)."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCAB, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, labels: Tensor) -> Tensor:
        ids = labels.new_zeros(labels.shape)
        ids[:, 1:] = labels[:, :-1].clone()
        ids[:, 0] = 2
        x = self.wte(ids.masked_fill(ids == -100, 1))
        return x + self.down(F.relu(self.up(x)))


class Buckets(nn.Module):
    """Attention with a bias looked up by the distance of two positions, in buckets (T5)."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.bias = nn.Embedding(8, heads)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * heads * WIDTH), nn.Linear(heads * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        s = x.shape[1]
        places = torch.arange(s)
        distance = -torch.min(places[None, :] - places[:, None], torch.zeros(s, s, dtype=torch.int64))
        far = 4 + (torch.log(distance.float() / 4) / math.log(8) * 4).long()
        bucket = torch.where(distance < 4, distance, torch.min(far, torch.full_like(far, 7)))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mask = self.bias(bucket).permute(2, 0, 1).unsqueeze(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


class Held(nn.Module):
    """A frozen parameter and a buffer of numbers, which have no gradient."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.up.bias.requires_grad_(False)
        self.register_buffer("scale", torch.full((WIDTH,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x))) * self.scale


def test_labels_shifted_into_place_are_read() -> None:
    program = sharded(Shifted, torch.randint(0, VOCAB, (2, 6)))
    assert check(program.program, source=program.source).passed
    edited = program.source.replace("labels[:, :-1]", "labels[:, 1:]")
    assert edited != program.source
    assert not check(program.program, source=edited).passed


def test_positions_are_what_they_are() -> None:
    program = sharded(Buckets, torch.randn(2, 24, WIDTH))
    assert check(program.program, source=program.source).passed
    node = next(n for n in program.program.graph.nodes if n.target is torch.ops.aten.sub.Tensor)
    node.args = (node.args[1], node.args[0], *node.args[2:])
    assert not check(program.program).passed, "positions exchanged"


def test_what_has_no_gradient_is_read() -> None:
    program = sharded(Held, torch.randn(2, 6, WIDTH))
    assert check(program.program, source=program.source).passed
    assert not check(program.program, source=program.source.replace("relu", "gelu")).passed


class Patches(nn.Module):
    """Has a place for each patch of an image: another size of image is none of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, 2, 2)
        self.place = nn.Parameter(torch.zeros(1, 16, WIDTH))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(self.embed(x).flatten(2).transpose(1, 2) + self.place)))


def test_other_sizes_are_those_that_the_model_takes() -> None:
    report = verify(Patches, (torch.randn(3, 3, 8, 8),), {"mesh": {"tensor": 2}})
    assert report.passed, str(report)
    assert any("another batch" in case.what for case in report.cases)
