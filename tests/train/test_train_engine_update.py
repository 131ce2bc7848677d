"""Both ways of making AdamW's step are one, and what FSDP2 cannot cut is trained all the same."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest
import torch
from torch import Tensor

from tests.train.test_train_engine import close
from tests.train.train_runs import TRAIN, Case, in_processes
from tpcompiler.train.hold.storage import Numbers
from tpcompiler.train.optim.update import OnePass, Torch, Update
from tpcompiler.train.settings import Group, Optimizer

SHAPES = {"a.weight": (4, 3), "a.bias": (4,), "b.weight": (2, 5), "scale": ()}
UNITS = [["a.weight", "a.bias"], ["b.weight", "scale"]]


def tensors(dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, dtype=dtype, generator=draw) for n, shape in SHAPES.items()}


def stepped(
    update: Update, masters: dict[str, Tensor], gradients: list[dict[str, Tensor]], scale: float
) -> list[Tensor]:
    norms = []
    for i, found in enumerate(gradients):
        scaled = {n: g * scale for n, g in found.items()}
        norm = torch.stack([g.norm() for g in scaled.values()]).norm()
        for n, g in scaled.items():
            if isinstance(update, Torch):
                masters[n].grad = g
        update.prepare(0.1 / (i + 1))
        norms.append(update.step(scaled, norm, scale))
    return norms


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("largest", [None, 0.3])
def test_one_pass_is_torchs_step(largest: float | None, scale: float) -> None:
    groups = (Group(match="b.*", lr=0.5, weight_decay=0.3), Group(match="*.bias", lr=2.0))
    config = Optimizer(betas=(0.9, 0.95), weight_decay=0.1, clip=largest, groups=groups)
    gradients = [tensors(torch.float64, s) for s in range(4)]
    theirs = {n: t.requires_grad_() for n, t in tensors(torch.float64, 9).items()}
    ours = {n: t.requires_grad_() for n, t in tensors(torch.float64, 9).items()}
    computed = {n: t.detach().to(torch.bfloat16).requires_grad_() for n, t in ours.items()}
    reference = Torch(theirs, config, lambda: None)
    one_pass = OnePass(ours, computed, UNITS, config, compiled=False)
    for a, b in zip(
        stepped(reference, theirs, gradients, scale), stepped(one_pass, ours, gradients, scale), strict=True
    ):
        torch.testing.assert_close(a, b)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-12, atol=1e-14)
        assert torch.equal(computed[name], ours[name].to(torch.bfloat16))
        for m, value in reference.moments(name).items():
            torch.testing.assert_close(one_pass.moments(name)[m], value, rtol=1e-12, atol=1e-14)


def test_frozen_parameters_and_those_without_a_gradient_stay() -> None:
    masters = tensors(torch.float32, 0)
    parameters = {n: t.clone().requires_grad_(n != "b.weight") for n, t in masters.items()}
    before = {n: t.clone() for n, t in masters.items()}
    update = OnePass(masters, parameters, UNITS, Optimizer(), compiled=False)
    assert update.moments("b.weight") == {}
    update.prepare(0.1)
    update.step({"a.weight": torch.ones(4, 3)}, torch.ones(()), 1.0)
    assert {n for n in masters if not torch.equal(masters[n], before[n])} == {"a.weight"}


def test_sixteen_bits_have_masters_of_thirty_two() -> None:
    assert Numbers.of("bf16").mixed
    assert Numbers.of("fp16").master == torch.float32
    assert not Numbers.of("fp64").mixed


MODEL = '''
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
            self.gate = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gate * self.down(F.silu(self.up(x)))

    class Model(nn.Module):
        """A gate that is a single number, a table that is frozen, a weight that two layers share."""

        def __init__(self) -> None:
            super().__init__()
            self.wte, self.wpe = nn.Embedding(261, 8), nn.Embedding(16, 8)
            self.wpe.weight.requires_grad_(False)
            self.h = nn.ModuleList(Block() for _ in range(3))
            self.h[1].up.weight = self.h[0].up.weight
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
            x = self.wte(input_ids) + self.wpe(torch.arange(input_ids.shape[1], device=input_ids.device))
            for block in self.h:
                x = block(x)
            return F.cross_entropy(F.linear(x, self.wte.weight).flatten(0, 1) * self.scale, labels.flatten())

    def example_inputs() -> dict[str, Tensor]:
        return {"input_ids": torch.randint(261, (2, 9)), "labels": torch.randint(261, (2, 9))}
'''


def test_single_numbers_frozen_tables_and_shared_weights_train_alike_everywhere(tmp_path: Path) -> None:
    file = tmp_path / "odd.py"
    file.write_text(dedent(MODEL))
    case = Case(str(file), {}, TRAIN)
    curves = [in_processes(case, t, d, tmp_path / f"{t}x{d}", steps=4) for t, d in [(1, 1), (2, 1), (1, 2)]]
    close(curves[1], curves[0])
    close(curves[2], curves[0])
