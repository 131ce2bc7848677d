"""A source that reading alone does not settle is run: every rank's module against the graph, on random numbers.

Constants that two texts compute in different ways (T5's relative positions) are such a case. It takes the parameters'
memory once a rank, so it is for models that are small enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tpcompiler.check.sizes import Sizes
from tpcompiler.execute.interpret import interpret
from tpcompiler.execute.simulate import run_ranks
from tpcompiler.program import InputLeaf, Program
from tpcompiler.runtime import Ranks
from tpcompiler.runtime.runs import take_rows

LARGEST = 1 << 28  # elements of parameters, over all ranks
_RELATIVE = 1e-4  # float32, the sums of a graph and of a module that are one


def runs_alike(program: Program, text: str, sizes: Sizes) -> bool:
    """Whether outputs and gradients of the emitted module are the graph's on all ranks; False when too large to run."""
    held = sum(prod(p.shape) for p in program.capture.parameters) * program.mesh.size
    if held > LARGEST:
        return False
    names: dict[str, Any] = {"__name__": "emitted"}
    exec(compile(text, "<emitted>", "exec"), names)
    generator = torch.Generator().manual_seed(0)
    state = {p.name: _value(p, generator) for p in program.capture.parameters}
    inputs = {n: _input(program, n, sizes, generator) for n in program.capture.inputs}
    trained = {p.name for p in program.capture.parameters if p.trainable and not p.buffer}

    def rank(ranks: Ranks) -> bool:
        mine = {p.name: _slice(program, p.name, state[p.name], ranks) for p in program.capture.parameters}
        graph = _gradients(lambda s: interpret(program, ranks, s, inputs), mine, trained)
        module = names["Model"](ranks).eval()
        known = {n: p for p in program.capture.parameters for n in p.names}
        tensors = dict(module.named_parameters()) | dict(module.named_buffers())
        with torch.no_grad():
            for name, t in tensors.items():
                t.copy_(mine[known[name].name])
        args, kwargs = _call(program, inputs)
        found = [x for x in pytree.tree_leaves(module(*args, **kwargs)) if isinstance(x, Tensor)]
        _weighed(found).backward()
        named = {known[n].name: t.grad for n, t in module.named_parameters()}
        return _same(found, graph[0]) and _same([named.get(n) for n in graph[1]], list(graph[1].values()))

    return all(run_ranks(program.mesh, rank))


def _value(p: Any, generator: torch.Generator) -> Tensor:
    if p.buffer:
        return p.value
    return torch.randn(p.shape, generator=generator).to(p.dtype) * (0.1 if len(p.shape) > 1 else 0.5)


def _input(program: Program, name: str, sizes: Sizes, generator: torch.Generator) -> Tensor:
    val = next(n for n in program.graph.nodes if n.name == name).meta["val"]
    shape = sizes.shape(val.shape)
    if val.is_floating_point():
        return torch.randn(shape, generator=generator).to(val.dtype)
    return torch.randint(0, 2, shape, generator=generator).to(val.dtype)


def _slice(program: Program, name: str, value: Tensor, ranks: Ranks) -> Tensor:
    for i, dim in enumerate(program.dims[name]):
        if dim.over:
            value = take_rows(value, i, dim.runs(ranks.mesh, ranks.coords))
    return value


def _gradients(run: Any, state: dict[str, Tensor], trained: set[str]) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    own = {n: t.detach().clone().requires_grad_(n in trained) for n, t in state.items()}
    found = [x for x in run(own) if isinstance(x, Tensor)]
    _weighed(found).backward()
    return found, {n: t.grad for n, t in own.items() if t.grad is not None}


def _weighed(outputs: list[Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    parts = [(x * torch.randn(x.shape, generator=generator)).sum() for x in outputs if x.requires_grad]
    return torch.stack(parts).sum()


def _call(program: Program, inputs: dict[str, Tensor]) -> tuple[Any, Any]:
    leaves = [inputs[x.node] if isinstance(x, InputLeaf) else x for x in program.capture.input_leaves]
    return pytree.tree_unflatten(leaves, program.capture.in_spec)


def _same(found: Sequence[Tensor | None], expected: Sequence[Any]) -> bool:
    if len(found) != len(expected):
        return False
    largest = max((float(b.detach().abs().max()) for b in expected if b is not None and b.numel()), default=1.0)
    return all(
        a is not None
        and a.shape == b.shape
        and torch.allclose(a, b, rtol=_RELATIVE, atol=_RELATIVE * largest, equal_nan=True)
        for a, b in zip(found, expected, strict=True)
        if b is not None and b.is_floating_point()
    )
