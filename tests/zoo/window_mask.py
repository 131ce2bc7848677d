"""Layers that see a window of the past take turns with layers that see all of it; padding joins in one boolean mask."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    def __init__(self, hidden: int, heads: int, window: int | None) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.norm1, self.norm2 = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden) for _ in range(4))
        self.sink = nn.Parameter(torch.zeros(heads))  # a score that takes weight and gives nothing
        self.up, self.down = nn.Linear(hidden, 96), nn.Linear(48, hidden)

    def mask(self, padding: Tensor) -> Tensor:  # [b, 1, s, s], true where seen
        place = torch.arange(padding.shape[1], device=padding.device)
        back = place[:, None] - place[None, :]
        seen = back >= 0 if self.window is None else (back >= 0) & (back < self.window)
        return seen[None, None] & ~padding[:, None, None, :]

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        b, s, hidden = x.shape
        y = self.norm1(x)
        q, k, v = (f(y).view(b, s, self.heads, hidden // self.heads).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = (q @ k.transpose(2, 3)) * (hidden // self.heads) ** -0.5
        scores = scores.masked_fill(self.mask(padding).logical_not(), -1e9)
        sink = self.sink.view(1, -1, 1, 1).expand(b, -1, s, 1)
        p = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
        x = x + self.o((p @ v).transpose(1, 2).reshape(b, s, hidden))
        return x + self.down(F.glu(self.up(self.norm2(x)), dim=-1))


class WindowMask(nn.Module):
    def __init__(self, vocab: int = 49, hidden: int = 32, heads: int = 4, window: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList([Layer(hidden, heads, window), Layer(hidden, heads, None)])
        self.norm = nn.RMSNorm(hidden)
        self.head = nn.Linear(hidden, vocab, bias=False)

    def forward(self, ids: Tensor, padding: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, padding)
        losses = F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten(), reduction="none")
        return losses.mean()


Model = WindowMask


def example_inputs(batch: int = 2, sequence: int = 12, vocab: int = 49) -> dict[str, Tensor]:
    lengths = torch.randint(sequence // 2 + 1, sequence + 1, (batch, 1))
    padding = torch.arange(sequence) >= lengths
    targets = torch.randint(vocab, (batch, sequence))
    return {
        "ids": torch.randint(vocab, (batch, sequence)),
        "padding": padding,
        "targets": targets.masked_fill(padding, -100),
    }
