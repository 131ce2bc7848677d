"""With dropout on, a program computes the same at every degree: masks are those of the unsharded model."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from tests.test_compile import small
from tpcompiler.api import compile_capture
from tpcompiler.capture import capture
from tpcompiler.capture.promote import float64
from tpcompiler.execute.interpret import interpret
from tpcompiler.execute.simulate import run_ranks
from tpcompiler.runtime import Ranks, Rng
from tpcompiler.spec.schema import Spec
from tpcompiler.verification.against_model import local_slice, merged, probe, relative
from tpcompiler.verification.verify import initial_state, inputs_of


def outputs_and_gradients(sharded: Any, state: Any, batch: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    program = sharded.program

    def rank(ranks: Ranks) -> Any:
        mine = {}
        for p in program.capture.parameters:
            value = local_slice(state[p.name], program.dims[p.name], ranks.mesh, ranks.coords)
            mine[p.name] = value.clone().requires_grad_(p.trainable and not p.buffer)
        out = interpret(program, ranks, mine, batch, training=True, rng=Rng(7).at(3, 0))
        loss = probe(out)
        assert loss is not None
        loss.backward()
        return loss.detach(), {k: v.grad for k, v in mine.items()}

    found = run_ranks(program.mesh, rank)
    gradients = {}
    for p in program.capture.parameters:
        whole, same = merged([g[p.name] for _, g in found], p, program)
        if whole is not None:
            assert same, p.name
            gradients[p.name] = whole
    assert all(torch.equal(loss, found[0][0]) for loss, _ in found)
    return found[0][0], gradients


@pytest.mark.parametrize("name", ["gpt2", "bert", "zoo.bmm", "zoo.parallel_block"])
def test_masks_are_the_same_at_every_degree(name: str) -> None:
    if name.startswith("zoo."):
        module = importlib.import_module(f"tests.{name}")
        build, inputs = module.Model, module.example_inputs()
    else:
        build, inputs = small(name)
    captured = float64(capture(build, inputs))
    torch.manual_seed(0)
    state = initial_state(captured, build(), torch.float64, 0)
    batch = inputs_of(captured, inputs, torch.float64)
    spec = {"attention_dropout": "exact"}
    plain = compile_capture(captured, Spec.load({"mesh": {"tensor": 1}, **spec}))
    loss, gradients = outputs_and_gradients(plain, state, batch)
    again, _ = outputs_and_gradients(plain, state, batch)
    assert torch.equal(loss, again)
    scale = max(float(g.abs().max()) for g in gradients.values())
    for degree in (2, 3):
        sharded = compile_capture(captured, Spec.load({"mesh": {"tensor": degree}, **spec}))
        other, found = outputs_and_gradients(sharded, state, batch)
        assert relative(other, loss) < 1e-12
        assert max(relative(found[k], g, scale) for k, g in gradients.items()) < 1e-10


def test_dropout_changes_the_result() -> None:
    build, inputs = small("gpt2")
    captured = float64(capture(build, inputs))
    state = initial_state(captured, build(), torch.float64, 0)
    batch = inputs_of(captured, inputs, torch.float64)
    sharded = compile_capture(captured, Spec.load({"mesh": {"tensor": 1}, "attention_dropout": "exact"}))
    values = [
        interpret(sharded.program, Ranks.single(), state, batch, training=t, rng=Rng(s).at(0, 0))[0]
        for t, s in ((True, 0), (True, 1), (False, 0))
    ]
    assert len({float(v) for v in values}) == 3
