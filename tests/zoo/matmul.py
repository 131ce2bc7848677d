"""`x @ w + b` with weights [in, out] in a ParameterDict, one flat class, no submodules."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Matmul(nn.Module):
    def __init__(self, vocab: int = 50, width: int = 32, heads: int = 4, wide: int = 96, depth: int = 2) -> None:
        super().__init__()
        self.heads, self.depth = heads, depth
        self.emb = nn.Parameter(torch.randn(vocab, width) * 0.1)
        self.head = nn.Parameter(torch.randn(width, vocab) * width**-0.5)
        self.p = nn.ParameterDict()
        for i in range(depth):
            for name in "qkvo":
                self.p[f"w{name}{i}"] = nn.Parameter(torch.randn(width, width) * width**-0.5)
                self.p[f"b{name}{i}"] = nn.Parameter(torch.zeros(width))
            self.p[f"up{i}"] = nn.Parameter(torch.randn(width, wide) * width**-0.5)
            self.p[f"up_bias{i}"] = nn.Parameter(torch.zeros(wide))
            self.p[f"down{i}"] = nn.Parameter(torch.randn(wide, width) * wide**-0.5)
            self.p[f"down_bias{i}"] = nn.Parameter(torch.zeros(width))

    def attend(self, x: Tensor, i: int) -> Tensor:
        b, s, width = x.shape
        p, d = self.p, width // self.heads
        q = (x @ p[f"wq{i}"] + p[f"bq{i}"]).view(b, s, self.heads, d).permute(0, 2, 1, 3)
        k = (x @ p[f"wk{i}"] + p[f"bk{i}"]).view(b, s, self.heads, d).permute(0, 2, 3, 1)
        v = (x @ p[f"wv{i}"] + p[f"bv{i}"]).view(b, s, self.heads, d).permute(0, 2, 1, 3)
        p_attn = torch.softmax(q @ k / math.sqrt(d), dim=-1)
        y = (p_attn @ v).permute(0, 2, 1, 3).contiguous().view(b, s, width)
        return y @ p[f"wo{i}"] + p[f"bo{i}"]

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = F.embedding(ids, self.emb)
        for i in range(self.depth):
            x = x + self.attend(F.layer_norm(x, x.shape[-1:]), i)
            y = F.layer_norm(x, x.shape[-1:]) @ self.p[f"up{i}"] + self.p[f"up_bias{i}"]
            x = x + torch.relu(y) @ self.p[f"down{i}"] + self.p[f"down_bias{i}"]
        return F.cross_entropy((x @ self.head).view(-1, self.head.shape[1]), targets.view(-1))


Model = Matmul


def example_inputs(batch: int = 2, sequence: int = 12, vocab: int = 50) -> dict[str, Tensor]:
    return {"ids": torch.randint(vocab, (batch, sequence)), "targets": torch.randint(vocab, (batch, sequence))}
