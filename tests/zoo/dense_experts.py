"""Feed-forward experts that all run, weighted by a softmax gate: two as modules, then four as stacked parameters."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mixture(nn.Module):
    """Experts as modules."""

    def __init__(self, hidden: int, wide: int, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, wide), nn.GELU(), nn.Linear(wide, hidden)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gate(x).softmax(-1)
        return sum(gates[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


class Stacked(nn.Module):
    """Experts as one parameter each for all first and all second layers."""

    def __init__(self, hidden: int, wide: int, experts: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(hidden, experts) * hidden**-0.5)
        self.up = nn.Parameter(torch.randn(experts, hidden, wide) * hidden**-0.5)
        self.down = nn.Parameter(torch.randn(experts, wide, hidden) * wide**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        gates = (x @ self.gate).softmax(-1)
        y = F.gelu(torch.einsum("bsm,emf->bsef", x, self.up))
        return torch.einsum("bsef,efm,bse->bsm", y, self.down, gates)


class Layer(nn.Module):
    def __init__(self, hidden: int, heads: int, mlp: nn.Module) -> None:
        super().__init__()
        self.heads, self.mlp = heads, mlp
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class DenseExperts(nn.Module):
    def __init__(self, vocab: int = 47, hidden: int = 32, heads: int = 4, wide: int = 40) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        self.first = Layer(hidden, heads, Mixture(hidden, wide, 2))
        self.second = Layer(hidden, heads, Stacked(hidden, wide, 4))
        self.head = nn.Linear(hidden, vocab)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.second(self.first(self.embed(ids)))).flatten(0, 1), targets.flatten())


Model = DenseExperts


def example_inputs(batch: int = 2, sequence: int = 12, vocab: int = 47) -> dict[str, Tensor]:
    return {"ids": torch.randint(vocab, (batch, sequence)), "targets": torch.randint(vocab, (batch, sequence))}
