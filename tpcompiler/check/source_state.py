"""Compares an emitted module's parameters and buffers with the program's: names, ties, shapes, dtypes, trainability."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from tpcompiler.check.claims import Geometry
from tpcompiler.check.forward import Refused
from tpcompiler.check.one_rank import RankRows
from tpcompiler.check.report import Refusal
from tpcompiler.check.samples_apart import InHalves
from tpcompiler.program import Parameter, Program
from tpcompiler.runtime import Group, Rng
from tpcompiler.runtime.private_apis import memory_of


def compare_state(program: Program, geometry: Geometry, rank: int, model: nn.Module) -> list[tuple[Tensor, str]]:
    """Every tensor of the module with the name of its placeholder. Raises `Refused` for the first that differs from the
    program's."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    seen: dict[int, str] = {}
    out: list[tuple[Tensor, str]] = []
    known: set[str] = set()
    stored: dict[int, str] = {}
    saved = model.state_dict(keep_vars=True)
    for p in program.capture.parameters:
        held = buffers if p.buffer else parameters
        found = [held[n] for n in p.names if n in held]
        known.update(n for n in p.names if n in held)
        if not found:
            continue
        mine = found[0]
        if len(found) != len(p.names) or any(t is not mine for t in found):
            _refuse(p, f"one tensor under {', '.join(p.names)}", "they are not tied")
        if id(mine) in seen:
            _refuse(p, "a tensor of its own", f"it is tied to {seen[id(mine)]}")
        seen[id(mine)] = p.name
        memory = memory_of(mine)
        if memory in stored:
            _refuse(p, "memory of its own", f"it lies in the memory of {stored[memory]}")
        stored[memory] = p.name
        for claimed, true in _differences(program, geometry, rank, p, mine):
            _refuse(p, claimed, true)
        if p.buffer and (p.name in saved) != p.persistent:
            claimed, true = ("it is saved", "it is not") if p.persistent else ("it is not saved", "it is")
            _refuse(p, claimed, true)
        out.append((mine, p.node))
    used = {n.name for n in program.graph.nodes if n.op == "placeholder" and n.users}
    there = {node for _, node in out}
    for p in program.capture.parameters:
        if p.node in used and p.node not in there:
            _refuse(p, "a parameter or buffer of the source", "it has none of that name")
    for extra in sorted((set(parameters) | set(buffers)) - known):
        raise Refused(Refusal(extra, "", "a parameter or buffer of the model", "the model has none of that name"))
    return out


_FIXED = (int, float, complex, str, bool, type(None), torch.dtype, Group, RankRows)
_OWN = frozenset(vars(nn.Module()))


def without_state(model: nn.Module, rng: Rng) -> None:
    """Raises `Refused` where a module keeps what a forward could change, or what draws other numbers than the rest."""
    modules = set(model.modules())
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in _OWN and not _fixed(value, rng, modules):
                where = f"{name}.{key}".strip(".")
                raise Refused(Refusal("the source", where, "numbers, sizes, rows and groups", f"{value!r:.80}"))
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            raise Refused(Refusal("the source", name, "modules without hooks", "a hook"))


def _fixed(value: Any, rng: Rng, modules: set[nn.Module]) -> bool:
    if isinstance(value, tuple):
        return all(_fixed(v, rng, modules) for v in value)
    if isinstance(value, InHalves):
        return modules.issuperset(value.members)
    return value is rng or isinstance(value, _FIXED)


def _differences(
    program: Program, geometry: Geometry, rank: int, p: Parameter, mine: Tensor
) -> Iterator[tuple[str, str]]:
    dims = program.dims.get(p.name)
    shape = p.shape if dims is None else tuple(d.local_size(geometry.mesh, geometry.coords[rank]) for d in dims)
    if tuple(mine.shape) != shape:
        yield f"the source gives rank {rank} the shape {list(shape)}", f"{list(mine.shape)}"
    if mine.dtype != p.dtype:
        yield f"the dtype {p.dtype}", f"{mine.dtype}"
    if p.buffer and mine.requires_grad and not p.trainable:
        yield "a buffer without a gradient", "it has one"
    if not p.buffer and mine.requires_grad != p.trainable:
        yield ("it is trained", "it is not") if p.trainable else ("it is not trained", "it is")
    if mine._backward_hooks:
        yield "a parameter without hooks", "it has one"


def _refuse(p: Parameter, claimed: str, true: str) -> NoReturn:
    raise Refused(Refusal(p.name, "", claimed, true))


__all__ = ["compare_state", "without_state"]
