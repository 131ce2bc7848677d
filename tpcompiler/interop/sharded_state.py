"""`tpc.state_dict`: a parallelized module's values, and an optimizer's, for torch.distributed.checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import Any

from torch import Size, Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from tpcompiler.errors import TpcError
from tpcompiler.interop.data_shards import Cuts, check_data_mesh
from tpcompiler.interop.slices import Box, Slices
from tpcompiler.layout import Dim, slice_on
from tpcompiler.runtime import Mesh
from tpcompiler.runtime.mesh import Coords, chunk
from tpcompiler.runtime.runs import Slice, cut, length, positions, whole
from tpcompiler.train.optim.clip import local
from tpcompiler.weights import Layout, RankRuns
from tpcompiler.weights.on_mesh import OnMesh, located

State = dict[str, Any]


def state_dict(module: nn.Module, optimizer: Optimizer | None = None) -> State:
    """`{"model": …}`, and `"optimizer"` with one: what `torch.distributed.checkpoint` saves, and loads in place.

    `module` is what `tpc.parallelize` returned, or a module around it (DDP, torch.compile, FSDP2's `fully_shard`).
    The names are the plain model's, and so are the shapes of all tensors: a checkpoint is that of the plain model, and
    is loaded at any other degree or by the plain model itself. Tensors share the module's memory. A tensor is a DTensor
    where placements can say what a rank holds; else (uneven parts, fused weights) a `Slices`, which says why. Where one
    process is alone they are plain tensors. Every rank calls this. Call `tpc.load_state_dict` after a load.
    """
    module = _unwrapped(module)
    model = {name: _spread(name, value, m, dims) for name, value, m, dims in located(module, module.state_dict())}
    return {"model": model} | ({} if optimizer is None else {"optimizer": _optimizer_state(module, optimizer)})


def load_state_dict(module: nn.Module, state: Mapping[str, Any], optimizer: Optimizer | None = None) -> None:
    """Ends a load into what `tpc.state_dict` gave: takes over what is no tensor, such as an optimizer's learning rates.

    The tensors of `state` must be those that `tpc.state_dict` gave for this module: they were loaded in place.
    """
    module = _unwrapped(module)
    own = {name: local(value) for name, value, _, _ in located(module, module.state_dict()) if _is_tensor(value)}
    for name, value in state["model"].items():
        if _is_tensor(value) and (name not in own or _part(value).data_ptr() != own[name].data_ptr()):
            raise TpcError(f"{name} is not the module's own: load into what tpc.state_dict(module) gives")
    if optimizer is None:
        return
    if "optimizer" not in state:
        raise TpcError("the state has no optimizer: make it with tpc.state_dict(module, optimizer)")
    groups = state["optimizer"]["param_groups"]
    if len(groups) != len(optimizer.param_groups):
        raise TpcError(
            f"{len(groups)} groups of parameters were saved, the optimizer has {len(optimizer.param_groups)}"
        )
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})


def _unwrapped(module: nn.Module) -> nn.Module:
    while isinstance(module, DistributedDataParallel):
        module = module.module
    return module


def _optimizer_state(module: nn.Module, optimizer: Optimizer) -> State:
    """The optimizer's state by parameters' names; what has a parameter's shape lies as the parameter does."""
    state: Any = get_optimizer_state_dict(module, optimizer)
    held = {name: (p, m, dims) for name, p, m, dims in located(module, dict(module.named_parameters()))}
    out: dict[str, dict[str, Any]] = {}
    for name, values in state["state"].items():
        p, on_mesh, dims = held[name]
        out[name] = {
            key: _spread(name, value, on_mesh, dims) if _is_tensor(value) and value.shape == p.shape else value
            for key, value in values.items()
        }
    return {"state": out, "param_groups": state["param_groups"]}


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _part(value: Tensor) -> Tensor:
    return value.local if isinstance(value, Slices) else local(value)


def _spread(name: str, value: Any, on_mesh: OnMesh | None, dims: tuple[Dim, ...] | None) -> Any:
    """A rank's part as a tensor of the whole's shape."""
    if on_mesh is None or dims is None or on_mesh.mesh.size == 1:
        return value
    check_data_mesh(name, value, on_mesh)
    cuts = Cuts.of(value)
    mesh = cuts.widened(on_mesh.mesh)
    layout = _layout(dims, mesh, cuts)
    devices = on_mesh.device_mesh
    said, why = _placements(layout, dims, mesh, cuts, devices)
    mine = local(value).detach()
    if said is not None:
        return DTensor.from_local(
            mine, devices, said, run_check=False, shape=Size(layout.shape), stride=_strides(layout.shape)
        )
    rank = mesh.rank(cuts.coords(on_mesh.ranks.coords))
    return Slices(mine, _boxes(layout, rank), layout.shape, why)


@lru_cache(4096)
def _layout(dims: tuple[Dim, ...], mesh: Mesh, cuts: Cuts) -> Layout:
    """Which rank holds what, FSDP2's cuts included."""
    held = [cuts.apply(slice_on(dims, mesh, mesh.coords(r)), mesh.coords(r)) for r in range(mesh.size)]
    runs = (RankRuns.of_runs(d.size, [part[i] for part in held]) for i, d in enumerate(dims))
    return Layout(tuple(runs), mesh.size)


def _boxes(layout: Layout, rank: int) -> list[Box]:
    """The disjoint blocks that a rank holds. What several ranks hold is the same block on each of them."""
    mine = layout.runs(rank)
    return [
        Box(block, tuple(positions((run,), held)[0] for run, held in zip(block, mine, strict=True)))
        for cell in layout.cells
        if rank in cell.ranks
        for block in product(*cell.runs)
    ]


def _placements(
    layout: Layout, dims: Sequence[Dim], mesh: Mesh, cuts: Cuts, devices: Any
) -> tuple[list[Placement] | None, str]:
    """The placements on a device mesh that say what every rank holds, or None and the reason."""
    names = devices.mesh_dim_names
    if tuple(names) != mesh.names:
        return None, f"it lies on {mesh}, the device mesh is {' × '.join(names)}"
    cut_by = {name: dim for name, _, _, dim in cuts.cuts}
    over = {name: i for i, d in enumerate(dims) for name in d.over} | cut_by
    said: list[Placement] = [Shard(over[name]) if name in over else Replicate() for name in names]
    for rank in range(mesh.size):
        coords = mesh.coords(rank)
        if _by_placements(layout.shape, said, mesh, coords) != layout.runs(rank):
            uneven = any(leaf.split and leaf.n % mesh.degree(leaf.split) for d in dims for leaf in d.leaves)
            reason = "its parts are uneven" if uneven else "a rank holds several pieces of it"
            return None, f"no placement says what a rank holds of {' × '.join(map(str, dims))}: {reason}"
    return said, ""


def _by_placements(shape: Sequence[int], said: Sequence[Placement], mesh: Mesh, coords: Coords) -> Slice:
    held = list(whole(shape))
    for name, placement in zip(mesh.names, said, strict=True):
        if isinstance(placement, Shard):
            d = placement.dim
            held[d] = cut(held[d], *chunk(length(held[d]), mesh[name], coords[name]))
    return tuple(held)


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    out, step = [], 1
    for n in reversed(shape):
        out.append(step)
        step *= max(n, 1)
    return tuple(reversed(out))
