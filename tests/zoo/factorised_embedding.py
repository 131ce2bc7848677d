"""ALBERT's embedding in two factors, tied to an output in the same two factors; masked tokens are guessed."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        self.dense, self.norm = nn.Linear(hidden, hidden), nn.LayerNorm(hidden)
        self.ffn, self.ffn_output = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        self.full_norm = nn.LayerNorm(hidden)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        scores = q @ k.mT * q.shape[-1] ** -0.5 + mask
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = self.norm(x + self.dense(y))
        return self.full_norm(x + self.ffn_output(F.gelu(self.ffn(x), approximate="tanh")))


class FactorisedEmbedding(nn.Module):
    def __init__(self, vocab: int = 70, factor: int = 8, hidden: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.words = nn.Embedding(vocab, factor)
        self.expand = nn.Linear(factor, hidden, bias=False)
        self.layers = nn.ModuleList(Layer(hidden, heads) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(vocab))

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        x = self.expand(self.words(ids))
        additive = (1.0 - mask[:, None, None, :].to(x.dtype)) * -10000.0
        for layer in self.layers:
            x = layer(x, additive)
        logits = x @ self.expand.weight @ self.words.weight.t() + self.bias
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


Model = FactorisedEmbedding


def example_inputs(batch: int = 2, sequence: int = 12, vocab: int = 70) -> dict[str, Tensor]:
    lengths = torch.randint(sequence // 2 + 1, sequence + 1, (batch, 1))
    labels = torch.randint(vocab, (batch, sequence))
    return {
        "ids": torch.randint(vocab, (batch, sequence)),
        "mask": (torch.arange(sequence) < lengths).long(),
        "labels": labels.masked_fill(torch.arange(sequence) % 3 != 1, -100),
    }
