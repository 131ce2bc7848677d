"""GPT-J's block: attention and feed-forward side by side on one norm; rotary on the first part of each head alone."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotate_every_two(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int, rotary: int) -> None:
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.ln = nn.LayerNorm(hidden)
        self.q = nn.Linear(hidden, hidden, bias=False)
        self.k = nn.Linear(hidden, hidden, bias=False)
        self.v = nn.Linear(hidden, hidden, bias=False)
        self.o = nn.Linear(hidden, hidden, bias=False)
        self.fc_in = nn.Linear(hidden, 4 * hidden)
        self.fc_out = nn.Linear(4 * hidden, hidden)

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [b, s, heads, d]
        turned, kept = x[..., : self.rotary], x[..., self.rotary :]
        return torch.cat([turned * cos + rotate_every_two(turned) * sin, kept], dim=-1)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, s, hidden = x.shape
        y = self.ln(x)
        q = self.turn(self.q(y).view(b, s, self.heads, -1), cos, sin).transpose(1, 2)
        k = self.turn(self.k(y).view(b, s, self.heads, -1), cos, sin).transpose(1, 2)
        v = self.v(y).view(b, s, self.heads, -1).transpose(1, 2)
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        attention = self.o(attention.transpose(1, 2).reshape(b, s, hidden))
        return x + attention + self.fc_out(F.gelu(self.fc_in(y), approximate="tanh"))


class ParallelBlock(nn.Module):
    def __init__(self, vocab: int = 56, hidden: int = 32, heads: int = 4, rotary: int = 4) -> None:
        super().__init__()
        self.rotary = rotary
        self.wte = nn.Embedding(vocab, hidden)
        self.h = nn.ModuleList(Block(hidden, heads, rotary) for _ in range(2))
        self.ln_f = nn.LayerNorm(hidden)
        self.lm_head = nn.Linear(hidden, vocab)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.wte(input_ids)
        inverse = 10000.0 ** (-torch.arange(0, self.rotary, 2, device=x.device) / self.rotary)
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * inverse
        angles = angles.repeat_interleave(2, dim=-1)[:, None, :]  # [s, 1, rotary]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for block in self.h:
            x = block(x, cos, sin)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


Model = ParallelBlock


def example_inputs(batch: int = 2, sequence: int = 12, vocab: int = 56) -> dict[str, Tensor]:
    ids = torch.randint(vocab, (batch, sequence))
    return {"input_ids": ids, "labels": ids.clone()}
