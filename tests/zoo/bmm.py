"""Sequence first, [s, b, hidden], heads folded into the batch, torch.bmm on [b·heads, s, d]: the way of fairseq."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads, self.d = heads, hidden // heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden, hidden))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * hidden))
        self.out_proj = nn.Linear(hidden, hidden)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def fold(self, x: Tensor) -> Tensor:
        s, b, _ = x.shape
        return x.contiguous().view(s, b * self.heads, self.d).transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        s, b, hidden = x.shape
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        scores = torch.bmm(self.fold(q * self.d**-0.5), self.fold(k).transpose(1, 2))
        scores = scores + torch.triu(torch.full_like(scores[0], float("-inf")), 1).unsqueeze(0)
        y = torch.bmm(F.softmax(scores, dim=-1), self.fold(v))
        return self.out_proj(y.transpose(0, 1).contiguous().view(s, b, hidden))


class Layer(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.self_attn = Attention(hidden, heads)
        self.fc1, self.fc2 = nn.Linear(hidden, 64), nn.Linear(64, hidden)
        self.layer_norms = nn.ModuleList([nn.LayerNorm(hidden), nn.LayerNorm(hidden)])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norms[0](x))
        return x + self.fc2(F.relu(self.fc1(self.layer_norms[1](x))))


class Bmm(nn.Module):
    def __init__(self, vocab: int = 45, hidden: int = 36, heads: int = 4) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList([Layer(hidden, heads) for _ in range(2)])
        self.output = nn.Linear(hidden, vocab, bias=False)

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        x = self.embed_tokens(tokens).transpose(0, 1)
        for layer in self.layers:
            x = layer(x)
        logits = self.output(x).transpose(0, 1)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)), target.reshape(-1))


Model = Bmm


def example_inputs(batch: int = 2, sequence: int = 12, vocab: int = 45) -> dict[str, Tensor]:
    return {"tokens": torch.randint(vocab, (batch, sequence)), "target": torch.randint(vocab, (batch, sequence))}
