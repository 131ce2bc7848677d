"""Multi-query attention: one key and one value head for all, never repeated, only broadcast; fused with the queries."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads, self.d = heads, hidden // heads
        self.ln_1, self.ln_2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.c_attn = nn.Linear(hidden, hidden + 2 * self.d)
        self.c_proj = nn.Linear(hidden, hidden)
        self.c_fc = nn.Linear(hidden, 4 * hidden)
        self.c_out = nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        b, s, hidden = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).split((hidden, self.d, self.d), dim=-1)
        # the heads stand in the sequence: [b, s·heads, d] against [b, s, d]
        scores = torch.matmul(q.reshape(b, s * self.heads, self.d), k.transpose(1, 2)).view(b, s, self.heads, s)
        seen = torch.ones(s, s, dtype=torch.bool, device=x.device).tril()[None, :, None, :]
        scores = torch.where(seen, scores * self.d**-0.5, torch.finfo(x.dtype).min)
        p = F.softmax(scores, dim=-1)
        y = torch.matmul(p.view(b, s * self.heads, s), v).view(b, s, hidden)
        x = x + self.c_proj(y)
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x))))


class MultiQuery(nn.Module):
    def __init__(self, vocab: int = 44, hidden: int = 24, heads: int = 4, longest: int = 64) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, hidden), nn.Embedding(longest, hidden)
        self.h = nn.ModuleList(Layer(hidden, heads) for _ in range(2))
        self.ln_f = nn.LayerNorm(hidden)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device)[None])
        for layer in self.h:
            x = layer(x)
        logits = torch.matmul(self.ln_f(x), self.wte.weight.transpose(0, 1)) * 0.3
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


Model = MultiQuery


def example_inputs(batch: int = 2, sequence: int = 12, vocab: int = 44) -> dict[str, Tensor]:
    return {"ids": torch.randint(vocab, (batch, sequence)), "targets": torch.randint(vocab, (batch, sequence))}
