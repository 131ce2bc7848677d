"""The first transformer (Vaswani et al., arXiv 1706.03762): post-norm, sinusoids in a buffer, a sum over nll_loss."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiHeadedAttention(nn.Module):
    def __init__(self, h: int, d_model: int, dropout: float) -> None:
        super().__init__()
        self.h, self.d_k = h, d_model // h
        self.linears = nn.ModuleList([nn.Linear(d_model, d_model) for _ in range(4)])
        self.dropout = nn.Dropout(dropout)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        batches = query.size(0)
        query, key, value = (
            lin(x).view(batches, -1, self.h, self.d_k).transpose(1, 2)
            for lin, x in zip(self.linears, (query, key, value), strict=False)
        )
        scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(self.d_k)
        p = self.dropout(F.softmax(scores.masked_fill(mask == 0, -1e9), dim=-1))
        x = torch.matmul(p, value).transpose(1, 2).contiguous().view(batches, -1, self.h * self.d_k)
        return self.linears[-1](x)


class Layer(nn.Module):
    def __init__(self, h: int, d_model: int, d_ff: int, dropout: float) -> None:
        super().__init__()
        self.attn = MultiHeadedAttention(h, d_model, dropout)
        self.w_1, self.w_2 = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)
        self.norms = nn.ModuleList([nn.LayerNorm(d_model) for _ in range(2)])
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.norms[0](x + self.dropout(self.attn(x, x, x, mask)))
        return self.norms[1](x + self.dropout(self.w_2(self.dropout(self.w_1(x).relu()))))


class PostNorm(nn.Module):
    pe: Tensor

    def __init__(
        self, vocab: int = 55, d_model: int = 30, h: int = 5, d_ff: int = 60, longest: int = 64, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.lut = nn.Embedding(vocab, d_model)
        self.layers = nn.ModuleList([Layer(h, d_model, d_ff, dropout) for _ in range(2)])
        self.generator = nn.Linear(d_model, vocab)
        pe = torch.zeros(longest, d_model)
        position = torch.arange(0, longest).unsqueeze(1)
        div_term = torch.exp(torch.arange(0, d_model, 2) * -(math.log(10000.0) / d_model))
        pe[:, 0::2] = torch.sin(position * div_term)
        pe[:, 1::2] = torch.cos(position * div_term)
        self.register_buffer("pe", pe.unsqueeze(0))

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        x = self.lut(src) * math.sqrt(self.d_model) + self.pe[:, : src.size(1)].requires_grad_(False)
        mask = (torch.triu(torch.ones(1, src.size(1), src.size(1), device=src.device), diagonal=1) == 0).unsqueeze(1)
        for layer in self.layers:
            x = layer(x, mask)
        log_p = F.log_softmax(self.generator(x), dim=-1).view(-1, self.generator.out_features)
        return F.nll_loss(log_p, tgt.view(-1), ignore_index=0, reduction="sum") / (tgt != 0).sum()


Model = PostNorm


def example_inputs(batch: int = 2, sequence: int = 12, vocab: int = 55) -> dict[str, Tensor]:
    tgt = torch.randint(1, vocab, (batch, sequence))
    return {
        "src": torch.randint(1, vocab, (batch, sequence)),
        "tgt": tgt.masked_fill(torch.arange(sequence) >= torch.randint(sequence // 2 + 1, sequence + 1, (batch, 1)), 0),
    }
