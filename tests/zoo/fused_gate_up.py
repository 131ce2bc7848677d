"""Gate and up projection in one weight, halved by slices; queries, keys and values in another, of unequal lengths."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    def __init__(self, hidden: int, heads: int, kv_heads: int, wide: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.d, self.wide = heads, kv_heads, hidden // heads, wide
        self.norm1, self.norm2 = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.qkv_proj = nn.Linear(hidden, (heads + 2 * kv_heads) * self.d, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)
        self.gate_up_proj = nn.Linear(hidden, 2 * wide, bias=False)
        self.down_proj = nn.Linear(wide, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        qkv = self.qkv_proj(self.norm1(x))
        end_q, end_k = self.heads * self.d, (self.heads + self.kv_heads) * self.d
        q = qkv[..., :end_q].view(b, s, self.heads, self.d).transpose(1, 2)
        k = qkv[..., end_q:end_k].view(b, s, self.kv_heads, self.d).transpose(1, 2)
        v = qkv[..., end_k:].view(b, s, self.kv_heads, self.d).transpose(1, 2)
        group = self.heads // self.kv_heads
        k = k[:, :, None].expand(b, self.kv_heads, group, s, self.d).reshape(b, self.heads, s, self.d)
        v = v[:, :, None].expand(b, self.kv_heads, group, s, self.d).reshape(b, self.heads, s, self.d)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(y.transpose(1, 2).reshape(b, s, -1))
        gate_up = self.gate_up_proj(self.norm2(x))
        return x + self.down_proj(gate_up[..., self.wide :] * F.silu(gate_up[..., : self.wide]))


class FusedGateUp(nn.Module):
    def __init__(
        self, vocab: int = 60, hidden: int = 48, heads: int = 6, kv_heads: int = 3, wide: int = 40, layers: int = 2
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList(Layer(hidden, heads, kv_heads, wide) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden)
        self.lm_head = nn.Linear(hidden, vocab, bias=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.lm_head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1)


Model = FusedGateUp


def example_inputs(batch: int = 2, sequence: int = 12, vocab: int = 60) -> dict[str, Tensor]:
    return {"ids": torch.randint(vocab, (batch, sequence)), "targets": torch.randint(vocab, (batch, sequence))}
