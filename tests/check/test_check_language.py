"""Faults of emitted sources that an outsider would plant: each is refused, whatever the graph says.

They read what only one rank has, keep state, count lengths, write in place, or call what is no operation on tensors.
"""

# ruff: noqa: E501
from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import gpt2
from tpcompiler.api import Sharded, compile_capture
from tpcompiler.capture import capture
from tpcompiler.check.claims import Geometry
from tpcompiler.check.forward import Refused
from tpcompiler.check.source import compare_source
from tpcompiler.spec.schema import Spec

SIZES = {"vocab": 101, "hidden": 48, "heads": 8, "layers": 2, "positions": 32}
FAULTS: dict[str, list[tuple[str, str]]] = {
    "group all_reduce": [
        (
            "    def forward(self, x: Tensor) -> Tensor:\n",
            "    def forward(self, x: Tensor) -> Tensor:\n        x = self.tensor.all_reduce(x)\n",
        )
    ],
    "group gather": [
        (
            "    def forward(self, x: Tensor) -> Tensor:\n",
            "    def forward(self, x: Tensor) -> Tensor:\n        x = self.tensor.all_gather(x, 0)\n",
        )
    ],
    "begin/finish": [
        (
            "    def forward(self, x: Tensor) -> Tensor:\n",
            "    def forward(self, x: Tensor) -> Tensor:\n        x = self.tensor.finish(self.tensor.begin_all_reduce(x))\n",
        )
    ],
    "rng.at": [
        (
            "    def forward(self, x: Tensor) -> Tensor:\n",
            "    def forward(self, x: Tensor) -> Tensor:\n        _ = self.rng.at(0)\n",
        )
    ],
    "rng other seed": [("Block(ranks, self.rng, site", "Block(ranks, Rng(seed=1), site")],
    "rng seed+rank": [("self.rng = rng or Rng(seed=0)", "self.rng = Rng(seed=0)")],
    "rows looked at": [
        (
            "lookup(self.wte.weight, input_ids, self.vocab_rows)",
            "lookup(self.wte.weight * self.vocab_rows[0][1], input_ids, self.vocab_rows)",
        )
    ],
    "rows whole": [("(self.tensor.part(101),)", "((0, 101),)")],
    "float field": [
        (
            "        self.heads = self.tensor.local(8)  # 3 or 2\n",
            "        self.heads = self.tensor.local(8)  # 3 or 2\n        self.scale = (1.0, 1.0, 2.0)[self.tensor.index]\n",
        ),
        (
            "        return x + dropout(y, 0.1, self.training, self.rng, self.site + 1)",
            "        return x * self.scale + dropout(y, 0.1, self.training, self.rng, self.site + 1)",
        ),
    ],
    "local var index": [
        (
            "        self.heads = self.tensor.local(8)  # 3 or 2\n",
            "        self.heads = self.tensor.local(8)  # 3 or 2\n        i = self.tensor.index\n        self.scale = (1.0, 1.0, 2.0)[i]\n",
        ),
        (
            "        return x + dropout(y, 0.1, self.training, self.rng, self.site + 1)",
            "        return x * self.scale + dropout(y, 0.1, self.training, self.rng, self.site + 1)",
        ),
    ],
    "index int field": [
        (
            "        self.heads = self.tensor.local(8)  # 3 or 2\n",
            "        self.heads = self.tensor.local(8)  # 3 or 2\n        self.i = (1, 1, 2)[self.tensor.index]\n",
        ),
        (
            "        return x + dropout(y, 0.1, self.training, self.rng, self.site + 1)",
            "        return x * self.i + dropout(y, 0.1, self.training, self.rng, self.site + 1)",
        ),
    ],
    "share divided": [
        (
            "        self.heads = self.tensor.local(8)  # 3 or 2\n",
            "        self.heads = self.tensor.local(8)  # 3 or 2\n        self.scale = self.tensor.local(7) / 2\n",
        ),
        (
            "        return x + dropout(y, 0.1, self.training, self.rng, self.site + 1)",
            "        return x * self.scale + dropout(y, 0.1, self.training, self.rng, self.site + 1)",
        ),
    ],
    "size via getattr": [
        (
            "        self.heads = self.tensor.local(8)  # 3 or 2\n",
            "        self.heads = self.tensor.local(8)  # 3 or 2\n        self.i = getattr(self.tensor, 'index')\n",
        ),
        (
            "        return x + dropout(y, 0.1, self.training, self.rng, self.site + 1)",
            "        return x * (1 + self.i // 2) + dropout(y, 0.1, self.training, self.rng, self.site + 1)",
        ),
    ],
    "order by rank": [
        (
            "        self.heads = self.tensor.local(8)  # 3 or 2\n",
            "        self.heads = self.tensor.local(8)  # 3 or 2\n        self.i = (1, 1, -1)[self.tensor.index]\n",
        ),
        (
            "        y = enter(F.layer_norm(x, (48,), self.ln_1.weight, self.ln_1.bias), self.tensor)",
            "        y, w = [enter(t, self.tensor) for t in (F.layer_norm(x, (48,), self.ln_1.weight, self.ln_1.bias), x)[::self.i]][::self.i]",
        ),
    ],
    "site by rank": [("self.site + 1)", "self.site + self.heads - 1)")],
    "list state": [
        (
            "        self.heads = self.tensor.local(8)  # 3 or 2\n",
            "        self.heads = self.tensor.local(8)  # 3 or 2\n        self.kept = []\n",
        ),
        (
            "    def forward(self, x: Tensor) -> Tensor:\n",
            "    def forward(self, x: Tensor) -> Tensor:\n        _ = self.kept.append(x)\n        x = self.kept[0]\n",
        ),
    ],
    "dict state": [
        (
            "        self.heads = self.tensor.local(8)  # 3 or 2\n",
            "        self.heads = self.tensor.local(8)  # 3 or 2\n        self.kept = {}\n",
        ),
        (
            "    def forward(self, x: Tensor) -> Tensor:\n",
            "    def forward(self, x: Tensor) -> Tensor:\n        x = self.kept.setdefault(0, x)\n",
        ),
    ],
    "global list": [
        ("class Block(", "KEPT = []\n\n\nclass Block("),
        (
            "    def forward(self, x: Tensor) -> Tensor:\n",
            "    def forward(self, x: Tensor) -> Tensor:\n        _ = KEPT.append(x)\n        x = KEPT[0]\n",
        ),
    ],
    "generator state": [
        (
            "        self.heads = self.tensor.local(8)  # 3 or 2\n",
            "        self.heads = self.tensor.local(8)  # 3 or 2\n        self.kept = (t for t in (1, 2))\n",
        ),
        (
            "    def forward(self, x: Tensor) -> Tensor:\n",
            "    def forward(self, x: Tensor) -> Tensor:\n        x = x * [t for t in self.kept][0]\n",
        ),
    ],
    "default argument": [
        (
            "    def forward(self, x: Tensor) -> Tensor:\n",
            "    def forward(self, x: Tensor, kept=[]) -> Tensor:\n        _ = kept.append(x)\n        x = kept[0]\n",
        )
    ],
    "in place method": [
        (
            "    def forward(self, x: Tensor) -> Tensor:\n",
            "    def forward(self, x: Tensor) -> Tensor:\n        f = x.add_\n        _ = f(1)\n",
        )
    ],
    "in place F": [
        (
            "    def forward(self, x: Tensor) -> Tensor:\n",
            "    def forward(self, x: Tensor) -> Tensor:\n        _ = F.relu(x, inplace=True)\n",
        )
    ],
    "out=": [
        (
            "    def forward(self, x: Tensor) -> Tensor:\n",
            "    def forward(self, x: Tensor) -> Tensor:\n        _ = torch.add(x, 1, out=x)\n",
        )
    ],
    "ops out": [
        (
            "    def forward(self, x: Tensor) -> Tensor:\n",
            "    def forward(self, x: Tensor) -> Tensor:\n        _ = torch.ops.aten.add.out(x, x, out=x)\n",
        )
    ],
    "getattr in place": [
        (
            "    def forward(self, x: Tensor) -> Tensor:\n",
            "    def forward(self, x: Tensor) -> Tensor:\n        f = getattr(x, 'mul_')\n        _ = f(2)\n",
        )
    ],
    "requires_grad_ in init": [
        (
            "        self.heads = self.tensor.local(8)  # 3 or 2\n",
            "        self.heads = self.tensor.local(8)  # 3 or 2\n",
        ),
        (
            "        self.mlp.c_fc = Parameters(weight=(self.ff, 48), bias=(self.ff,))\n",
            "        self.mlp.c_fc = Parameters(weight=(self.ff, 48), bias=(self.ff,))\n        self.mlp.c_fc.weight.requires_grad_(False)\n",
        ),
    ],
    "bool length": [
        (
            "    def forward(self, x: Tensor) -> Tensor:\n",
            "    def forward(self, x: Tensor) -> Tensor:\n        x = x * (1 + (x.shape[1] > 12))\n",
        )
    ],
    "min length": [
        (
            "    def forward(self, x: Tensor) -> Tensor:\n",
            "    def forward(self, x: Tensor) -> Tensor:\n        x = x * min(x.shape[1], 1)\n",
        )
    ],
    "index by length": [
        (
            "    def forward(self, x: Tensor) -> Tensor:\n",
            "    def forward(self, x: Tensor) -> Tensor:\n        x = (x, x * 2)[x.shape[1] // 64]\n",
        )
    ],
    "range length": [
        (
            "    def forward(self, x: Tensor) -> Tensor:\n",
            "    def forward(self, x: Tensor) -> Tensor:\n        for _ in range(x.shape[1] - 64):\n            x = x * 2\n",
        )
    ],
    "shift": [
        (
            "    def forward(self, x: Tensor) -> Tensor:\n",
            "    def forward(self, x: Tensor) -> Tensor:\n        x = x * (1 + (x.shape[1] >> 20))\n",
        )
    ],
    "chained": [
        (
            "    def forward(self, x: Tensor) -> Tensor:\n",
            "    def forward(self, x: Tensor) -> Tensor:\n        x = x * (1 + (5 < x.shape[1] < 9))\n",
        )
    ],
    "not": [
        (
            "    def forward(self, x: Tensor) -> Tensor:\n",
            "    def forward(self, x: Tensor) -> Tensor:\n        x = x * (1 + (not x.shape[1]))\n",
        )
    ],
    "scale in training": [
        (
            "        return x + dropout(y, 0.1, self.training, self.rng, self.site + 1)",
            "        x = x * (2.0 if self.training else 1.0)\n        return x + dropout(y, 0.1, self.training, self.rng, self.site + 1)",
        )
    ],
    "through bf16": [
        (
            "        return x + dropout(y, 0.1, self.training, self.rng, self.site + 1)",
            "        x = x.to(torch.bfloat16).float()\n        return x + dropout(y, 0.1, self.training, self.rng, self.site + 1)",
        )
    ],
    "twice enter": [
        (
            "        y = enter(F.layer_norm(x, (48,), self.ln_1.weight, self.ln_1.bias), self.tensor)",
            "        y = enter(enter(F.layer_norm(x, (48,), self.ln_1.weight, self.ln_1.bias), self.tensor), self.tensor)",
        )
    ],
    "unused reduce": [
        (
            "        y = reduce(y, self.tensor) + self.attn.c_proj.bias                   # all-reduce 6.0 KiB\n",
            "        y = reduce(y, self.tensor) + self.attn.c_proj.bias                   # all-reduce 6.0 KiB\n        _ = reduce(x, self.tensor)\n",
        )
    ],
    "max_norm": [("F.embedding(positions, self.wpe.weight)", "F.embedding(positions, self.wpe.weight, max_norm=1.0)")],
    "by freq": [
        ("F.embedding(positions, self.wpe.weight)", "F.embedding(positions, self.wpe.weight, scale_grad_by_freq=True)")
    ],
    "shared layer": [
        (
            "self.h = nn.ModuleList(Block(ranks, self.rng, site=2 * i + 1) for i in range(2))",
            "b = Block(ranks, self.rng, site=1)\n        self.h = nn.ModuleList((b, b))",
        )
    ],
    "alias torch": [("class Block(", "T = torch\n\n\nclass Block(")],
    "seed": [
        (
            "    def forward(self, x: Tensor) -> Tensor:\n",
            "    def forward(self, x: Tensor) -> Tensor:\n        _ = torch.manual_seed(0)\n",
        )
    ],
    "rand_like": [
        (
            "    def forward(self, x: Tensor) -> Tensor:\n",
            "    def forward(self, x: Tensor) -> Tensor:\n        x = x + 1e-9 * torch.rand_like(x)\n",
        )
    ],
    "call override": [
        (
            "        return x + dropout(y, 0.1, self.training, self.rng, self.site + 1)",
            "        return x + dropout(y, 0.1, self.training, self.rng, self.site + 1)\n\n    def __call__(self, x):\n        return x\n",
        )
    ],
    "a tuple for a tensor": [
        (
            "return linear_cross_entropy(x, self.wte.weight, y, group=self.tensor, rows=self.vocab_rows)",
            "return (linear_cross_entropy(x, self.wte.weight, y, group=self.tensor, rows=self.vocab_rows),)",
        )
    ],
    "arguments exchanged": [
        ("def forward(self, input_ids: Tensor, labels: Tensor)", "def forward(self, labels: Tensor, input_ids: Tensor)")
    ],
    "arguments by name alone": [
        (
            "def forward(self, input_ids: Tensor, labels: Tensor)",
            "def forward(self, *, input_ids: Tensor, labels: Tensor)",
        )
    ],
    "an argument with a default": [("labels: Tensor):", "labels: Tensor = None):")],
    "an unused draw": [
        (
            "        s = input_ids.shape[1]\n",
            "        s = input_ids.shape[1]\n        z = torch.rand(1, device=input_ids.device)\n",
        )
    ],
    "an unused mask": [
        (
            "        s = input_ids.shape[1]\n",
            "        s = input_ids.shape[1]\n        z = F.dropout(self.wpe.weight, 0.1, self.training)\n",
        )
    ],
    "no device": [("torch.arange(s, device=input_ids.device)", "torch.arange(s)")],
    "slices that are whole at long lengths": [
        (
            "        for block in self.h:\n",
            "        x = torch.cat([x[:, :20], x[:, 20:-20], x[:, -20:]], dim=1)[:, :s]\n        for block in self.h:\n",
        )
    ],
    "a slice that is empty at short lengths": [
        ("        for block in self.h:\n", "        x = torch.cat([x, x[60:]])\n        for block in self.h:\n")
    ],
    "dimensions of one element": [
        ("        for block in self.h:\n", "        x = x.squeeze(0)\n        for block in self.h:\n")
    ],
    "any dimension of one element": [
        ("        for block in self.h:\n", "        x = x.squeeze()\n        for block in self.h:\n")
    ],
    "made on a device by name": [
        ("        for block in self.h:\n", '        z = torch.ones(3, device="cpu")\n        for block in self.h:\n')
    ],
    "two parameters in one memory": [
        (
            "        self.ln_f = Parameters(weight=(48,), bias=(48,))\n",
            "        self.ln_f = Parameters(weight=(48,), bias=(48,))\n        self.ln_f.bias = nn.Parameter(self.ln_f.weight)\n",
        )
    ],
    "another seed": [("rng or Rng(seed=0)", "rng or Rng(seed=1)")],
}


@pytest.fixture(scope="module")
def sharded() -> Sharded:
    captured = capture(lambda: gpt2.Model(**SIZES), gpt2.example_inputs(vocab=101))
    return compile_capture(captured, Spec.load({"mesh": {"tensor": 3}}))


def test_the_source_as_it_is_is_accepted(sharded: Sharded) -> None:
    compare_source(sharded.program, sharded.source, Geometry(sharded.program.mesh), set())


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_refused(sharded: Sharded, name: str) -> None:
    source = sharded.source
    for old, new in FAULTS[name]:
        assert old in source
        source = source.replace(old, new, 1)
    with pytest.raises(Refused):
        compare_source(sharded.program, source, Geometry(sharded.program.mesh), set())


class Twin(nn.Module):
    """Two attentions with dropout on the same operands, and a table that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.register_buffer("table", torch.arange(8.0), persistent=False)
        self.table: Tensor

    def forward(self, x: Tensor) -> Tensor:
        q = (x + self.table).unflatten(-1, (2, 4)).transpose(1, 2)
        p = 0.1 if self.training else 0.0
        a = F.scaled_dot_product_attention(q, q, q, dropout_p=p)
        b = F.scaled_dot_product_attention(q, q, q, dropout_p=p)
        return self.proj((a - 2 * b).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("pattern", "new"),
    [
        (r"(\w+) = F\.scaled_dot_product_attention\((.*)\n( +)(\w+) = F\.scaled_dot.*\n", r"\1 = F.scaled_dot_product_attention(\2\n\3\4 = \1\n"),
        (r"(\w+) = F\.scaled_dot_product_attention\((.*)\n( +)(\w+) = F", r"\4 = F.scaled_dot_product_attention(\2\n\3\1 = F"),
        (r"persistent=False", "persistent=True"),
    ],
    ids=["one draw for two", "draws exchanged", "a table that is saved"],
)  # fmt: skip
def test_two_draws_are_two_and_what_is_saved_is_the_models(pattern: str, new: str) -> None:
    captured = capture(Twin, {"x": torch.randn(2, 6, 8)})
    sharded = compile_capture(captured, Spec.load({"mesh": {"tensor": 1}}))
    geometry = Geometry(sharded.program.mesh)
    compare_source(sharded.program, sharded.source, geometry, set())
    source, count = re.subn(pattern, new, sharded.source)
    assert count == 1, sharded.source
    with pytest.raises(Refused):
        compare_source(sharded.program, source, geometry, set())
