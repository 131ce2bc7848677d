"""An encoder-decoder with cross-attention, after T5 (Raffel et al., arXiv 1910.10683).

RMS norm before each part, no biases, learned relative position biases shared by the layers of a stack, one embedding
for source, target and output.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Attends from `x` to `memory`. Scores are not divided by √head_dim: the initial weights of `q` are."""

    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.head_dim, self.dropout = heads, hidden // heads, dropout
        self.q = nn.Linear(hidden, hidden, bias=False)
        self.k = nn.Linear(hidden, hidden, bias=False)
        self.v = nn.Linear(hidden, hidden, bias=False)
        self.o = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor, memory: Tensor, bias: Tensor) -> Tensor:
        """`x` [b, s, hidden], `memory` [b, t, hidden], `bias` broadcasts to [b, heads, s, t] and is added to scores."""
        q = self.q(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)  # [b, heads, s, d]
        k = self.k(memory).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)  # [b, heads, t, d]
        v = self.v(memory).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p, scale=1.0)
        return self.o(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, hidden: int, intermediate: int, dropout: float) -> None:
        super().__init__()
        self.wi = nn.Linear(hidden, intermediate, bias=False)
        self.wo = nn.Linear(intermediate, hidden, bias=False)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(self.drop(F.relu(self.wi(x))))


class RelativeBias(nn.Module):
    """A learned bias for each head and each distance, distances in buckets: exact when short, logarithmic beyond."""

    def __init__(self, heads: int, causal: bool, buckets: int = 32, longest: int = 128) -> None:
        super().__init__()
        self.causal, self.buckets, self.longest = causal, buckets, longest
        self.weight = nn.Parameter(torch.empty(buckets, heads))

    def forward(self, length: int, device: torch.device) -> Tensor:  # [1, heads, length, length]
        place = torch.arange(length, device=device)
        bias = F.embedding(self.bucket(place[:, None] - place[None, :]), self.weight)
        return bias.permute(2, 0, 1).unsqueeze(0)

    def bucket(self, distance: Tensor) -> Tensor:
        """Bucket of query place minus key place, both [length, length]."""
        buckets = self.buckets if self.causal else self.buckets // 2
        side = torch.zeros_like(distance) if self.causal else (distance < 0).long() * buckets
        distance = distance.clamp(min=0) if self.causal else distance.abs()
        exact = buckets // 2
        octaves = (distance.clamp(min=1) / exact).log() / math.log(self.longest / exact)
        far = (exact + octaves * (buckets - exact)).long().clamp(max=buckets - 1)
        return side + torch.where(distance < exact, distance, far)


class EncoderLayer(nn.Module):
    def __init__(self, hidden: int, heads: int, intermediate: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(hidden, eps=1e-6)
        self.attention = Attention(hidden, heads, dropout)
        self.mlp_norm = nn.RMSNorm(hidden, eps=1e-6)
        self.mlp = MLP(hidden, intermediate, dropout)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        y = self.attention_norm(x)
        x = x + self.drop(self.attention(y, y, bias))
        return x + self.drop(self.mlp(self.mlp_norm(x)))


class DecoderLayer(EncoderLayer):
    def __init__(self, hidden: int, heads: int, intermediate: int, dropout: float) -> None:
        super().__init__(hidden, heads, intermediate, dropout)
        self.cross_norm = nn.RMSNorm(hidden, eps=1e-6)
        self.cross = Attention(hidden, heads, dropout)

    def forward(self, x: Tensor, bias: Tensor, memory: Tensor, memory_bias: Tensor) -> Tensor:  # type: ignore[override]
        y = self.attention_norm(x)
        x = x + self.drop(self.attention(y, y, bias))
        x = x + self.drop(self.cross(self.cross_norm(x), memory, memory_bias))
        return x + self.drop(self.mlp(self.mlp_norm(x)))


class Seq2Seq(nn.Module):
    """Maps a source to a target: the target's logits, or the mean loss when `labels` are given.

    `hidden` must be a multiple of `heads`.
    """

    def __init__(
        self,
        vocab: int = 32128,
        hidden: int = 128,
        heads: int = 8,
        layers: int = 3,
        intermediate: int = 512,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if hidden % heads:
            raise ValueError(f"hidden {hidden} is not a multiple of heads {heads}")
        self.shared = nn.Embedding(vocab, hidden)
        self.encoder_bias = RelativeBias(heads, causal=False)
        self.encoder = nn.ModuleList(EncoderLayer(hidden, heads, intermediate, dropout) for _ in range(layers))
        self.encoder_norm = nn.RMSNorm(hidden, eps=1e-6)
        self.decoder_bias = RelativeBias(heads, causal=True)
        self.decoder = nn.ModuleList(DecoderLayer(hidden, heads, intermediate, dropout) for _ in range(layers))
        self.decoder_norm = nn.RMSNorm(hidden, eps=1e-6)
        self.drop = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """T5's: embeddings N(0, 1), every product keeps the variance, queries also undo the missing √head_dim."""
        nn.init.normal_(self.shared.weight)
        for name, parameter in self.named_parameters():
            if name.endswith(".q.weight"):
                head_dim = parameter.shape[0] // self.encoder_bias.weight.shape[1]
                nn.init.normal_(parameter, std=(parameter.shape[1] * head_dim) ** -0.5)
            elif parameter.dim() == 2 and name != "shared.weight":
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    def encode(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        x = self.drop(self.shared(input_ids))
        bias = self.encoder_bias(input_ids.shape[1], input_ids.device) + mask
        for layer in self.encoder:
            x = layer(x, bias)
        return self.drop(self.encoder_norm(x))

    def decode(self, target_ids: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        x = self.drop(self.shared(target_ids))
        place = torch.arange(target_ids.shape[1], device=target_ids.device)
        bias = self.decoder_bias(target_ids.shape[1], target_ids.device)
        bias = bias.masked_fill(place[:, None] < place[None, :], -torch.inf)
        for layer in self.decoder:
            x = layer(x, bias, memory, mask)
        return self.drop(self.decoder_norm(x))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, target_ids: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """`input_ids`, `attention_mask` (0 on padding) [b, s]; `target_ids` [b, t]; `labels` [b, t] hold the next."""
        mask = torch.zeros_like(attention_mask, dtype=self.shared.weight.dtype)
        mask = mask.masked_fill(attention_mask == 0, -torch.inf)[:, None, None, :]  # [b, 1, 1, s]
        x = self.decode(target_ids, self.encode(input_ids, mask), mask)
        logits = F.linear(x * x.shape[-1] ** -0.5, self.shared.weight)  # [b, t, vocab]
        if labels is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


Model = Seq2Seq


def example_inputs(
    batch: int = 2, sequence: int = 16, target: int | None = None, vocab: int = 32128
) -> dict[str, Tensor]:
    """Random pairs of a padded source of `sequence` tokens and a `target`, three quarters as long by default."""
    target = target or max(sequence * 3 // 4, 1)
    tokens = torch.randint(vocab, (batch, target + 1))
    lengths = torch.randint(sequence // 2 + 1, sequence + 1, (batch, 1))
    return {
        "input_ids": torch.randint(vocab, (batch, sequence)),
        "attention_mask": (torch.arange(sequence) < lengths).long(),
        "target_ids": tokens[:, :-1].clone(),
        "labels": tokens[:, 1:].clone(),
    }
