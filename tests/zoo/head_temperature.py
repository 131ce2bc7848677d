"""Cosine attention with a learned temperature for each head, and a learned gate on each head's output."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(hidden)), nn.Parameter(torch.zeros(hidden))
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones(heads, 1, 1)))
        self.gate = nn.Parameter(torch.ones(heads))
        self.proj = nn.Linear(hidden, hidden)
        self.fc1, self.fc2 = nn.Linear(hidden, 2 * hidden), nn.Linear(2 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        b, s, hidden = x.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv = F.linear(self.norm1(x), self.qkv.weight, bias)
        q, k, v = qkv.reshape(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scores = scores * self.logit_scale.clamp(max=4.6).exp()
        y = scores.softmax(dim=-1) @ v * self.gate.view(1, -1, 1, 1)
        x = x + self.proj(y.transpose(1, 2).reshape(b, s, hidden))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class HeadTemperature(nn.Module):
    """Reads a token sequence, regresses one number a token."""

    def __init__(self, vocab: int = 36, hidden: int = 36, heads: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        self.layers = nn.Sequential(*(Layer(hidden, heads) for _ in range(2)))
        self.value = nn.Linear(hidden, 1)

    def forward(self, ids: Tensor, values: Tensor) -> Tensor:
        return F.mse_loss(self.value(self.layers(self.embed(ids))).squeeze(-1), values.to(self.value.weight.dtype))


Model = HeadTemperature


def example_inputs(batch: int = 2, sequence: int = 12, vocab: int = 36) -> dict[str, Tensor]:
    return {"ids": torch.randint(vocab, (batch, sequence)), "values": torch.randn(batch, sequence)}
