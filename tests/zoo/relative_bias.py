"""A learned bias for each head and clipped distance, and learned relative keys (Shaw et al., arXiv 1803.02155)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int, reach: int) -> None:
        super().__init__()
        self.heads, self.d, self.reach = heads, hidden // heads, reach
        self.to_qkv = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(3))
        self.to_out = nn.Linear(hidden, hidden)
        self.bias = nn.Embedding(2 * reach + 1, heads)
        self.relative_keys = nn.Embedding(2 * reach + 1, self.d)  # shared by the heads

    def forward(self, x: Tensor) -> Tensor:
        s = x.shape[1]
        q, k, v = (f(x).unflatten(-1, (self.heads, self.d)) for f in self.to_qkv)  # [b, s, heads, d]
        place = torch.arange(s, device=x.device)
        distance = (place[None, :] - place[:, None]).clamp(-self.reach, self.reach) + self.reach  # [s, t]
        scores = torch.einsum("bshd,bthd->bhst", q, k)
        scores = scores + torch.einsum("bshd,std->bhst", q, self.relative_keys(distance))
        scores = scores * self.d**-0.5 + self.bias(distance).permute(2, 0, 1)
        y = torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v)
        return self.to_out(y.flatten(2))


class RelativeBias(nn.Module):
    """An encoder that tags every token."""

    def __init__(self, vocab: int = 40, hidden: int = 24, heads: int = 4, tags: int = 7, reach: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        self.attentions = nn.ModuleList(Attention(hidden, heads, reach) for _ in range(2))
        self.feed_forwards = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, 64), nn.ELU(), nn.Linear(64, hidden))
            for _ in range(2)
        )
        self.tag = nn.Linear(hidden, tags)

    def forward(self, ids: Tensor, tags: Tensor) -> Tensor:
        x = self.embed(ids)
        for attention, feed_forward in zip(self.attentions, self.feed_forwards, strict=True):
            x = x + attention(F.layer_norm(x, (x.shape[-1],)))
            x = x + feed_forward(x)
        return F.cross_entropy(self.tag(x).flatten(0, 1), tags.flatten())


Model = RelativeBias


def example_inputs(batch: int = 2, sequence: int = 12, vocab: int = 40) -> dict[str, Tensor]:
    return {"ids": torch.randint(vocab, (batch, sequence)), "tags": torch.randint(7, (batch, sequence))}
