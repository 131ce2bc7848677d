"""Flat torch.addmm with weights [in, out], as the first GPT codes have it, and GELU and layer norm by hand."""

import math

import torch
from torch import Tensor, nn
from torch.nn import CrossEntropyLoss


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


class Conv1D(nn.Module):
    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=nx**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.size()[:-1], self.nf)


class Norm(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.g, self.b = nn.Parameter(torch.ones(n)), nn.Parameter(torch.zeros(n))

    def forward(self, x: Tensor) -> Tensor:
        u = x.mean(-1, keepdim=True)
        s = (x - u).pow(2).mean(-1, keepdim=True)
        return self.g * (x - u) / torch.sqrt(s + 1e-5) + self.b


class Block(nn.Module):
    def __init__(self, nx: int, n_head: int) -> None:
        super().__init__()
        self.n_head, self.split_size = n_head, nx
        self.ln_1, self.ln_2 = Norm(nx), Norm(nx)
        self.c_attn, self.c_proj = Conv1D(3 * nx, nx), Conv1D(nx, nx)
        self.c_fc, self.c_out = Conv1D(4 * nx, nx), Conv1D(nx, 4 * nx)

    def split_heads(self, x: Tensor, k: bool = False) -> Tensor:
        x = x.view(*x.size()[:-1], self.n_head, x.size(-1) // self.n_head)
        return x.permute(0, 2, 3, 1) if k else x.permute(0, 2, 1, 3)

    def attention(self, x: Tensor) -> Tensor:
        query, key, value = self.c_attn(x).split(self.split_size, dim=2)
        w = torch.matmul(self.split_heads(query), self.split_heads(key, k=True))
        w = w / math.sqrt(query.size(-1) / self.n_head)
        ns = w.size(-1)
        b = torch.tril(torch.ones(ns, ns, device=x.device, dtype=x.dtype)).view(1, 1, ns, ns)
        w = w * b - 1e4 * (1 - b)
        a = torch.matmul(nn.Softmax(dim=-1)(w), self.split_heads(value)).permute(0, 2, 1, 3).contiguous()
        return self.c_proj(a.view(*a.size()[:-2], a.size(-2) * a.size(-1)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln_1(x))
        return x + self.c_out(gelu(self.c_fc(self.ln_2(x))))


class Addmm(nn.Module):
    def __init__(self, vocab: int = 62, nx: int = 32, n_head: int = 4, n_positions: int = 40) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, nx), nn.Embedding(n_positions, nx)
        self.h = nn.ModuleList([Block(nx, n_head) for _ in range(2)])
        self.ln_f = Norm(nx)
        self.decoder = nn.Linear(nx, vocab, bias=False)
        self.decoder.weight = self.wte.weight

    def forward(self, input_ids: Tensor, lm_labels: Tensor) -> Tensor:
        position_ids = torch.arange(0, input_ids.size(-1), dtype=torch.long, device=input_ids.device)
        x = self.wte(input_ids) + self.wpe(position_ids.unsqueeze(0).expand_as(input_ids))
        for block in self.h:
            x = block(x)
        lm_logits = self.decoder(self.ln_f(x)) * 0.2
        return CrossEntropyLoss(ignore_index=-1)(lm_logits.view(-1, lm_logits.size(-1)), lm_labels.view(-1))


Model = Addmm


def example_inputs(batch: int = 2, sequence: int = 12, vocab: int = 62) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(vocab, (batch, sequence)), "lm_labels": torch.randint(vocab, (batch, sequence))}
