"""The global gradient norm over tensor-parallel slices, each element of the model counted once, and clipping by it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from tpcompiler.layout import Dim
from tpcompiler.runtime import private_apis
from tpcompiler.runtime.groups import Ranks
from tpcompiler.runtime.mesh import Coords, Mesh, chunk
from tpcompiler.runtime.runs import Run, positions
from tpcompiler.weights.layouts import Layout

Box = tuple[Run, ...]  # local indices [start, stop) of each dimension


@dataclass(frozen=True)
class Share:
    """How a rank's slice of a parameter counts in a sum over the whole parameter.

    The squares of each box, times its weight, summed over the ranks that differ on `over`, are those of the whole:
    a weight is one over the number of these ranks that hold the box. A slice that nobody else holds is one box.
    """

    over: tuple[str, ...] = ()  # mesh dimensions that the parameter is split over
    boxes: tuple[tuple[Box, float], ...] | None = None  # None: the whole slice, with weight 1


def share(dims: Sequence[Dim], mesh: Mesh, coords: Coords) -> Share:
    """The share of the rank at `coords` in a parameter that lies on the mesh as `dims`.

    Counts the ranks that hold each element rather than reading it off the layout, so overlaps of any kind are right:
    K/V rows held by a subgroup next to query rows held once, in one fused weight.
    """
    over = tuple(name for name in mesh.names if any(name in d.over for d in dims))
    if not over:
        return Share()
    part = Mesh(tuple((name, mesh[name]) for name in over))
    rank = part.rank(coords)
    layout = Layout.of(dims, part)
    mine = layout.runs(rank)
    boxes = [
        (box, 1 / len(cell.ranks))
        for cell in layout.cells
        if rank in cell.ranks
        for box in product(*map(positions, cell.runs, mine))
    ]
    return Share(over, None if all(weight == 1 for _, weight in boxes) else tuple(boxes))


def grad_norm(
    gradients: Mapping[str, Tensor], shares: Mapping[str, Share], ranks: Ranks, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The 2-norm of all gradients of the whole model: a scalar, the same on all ranks of the mesh.

    Gradients are local slices, plain or as FSDP2's DTensors, whose mesh dimensions are those of the ranks' mesh with
    their names, or others; they are whole sums, not partial. Squares are accumulated in `dtype`, or in
    float64 where gradients are float64. One small all-reduce for each mesh dimension that anything is split over; not
    finite when any gradient is not.
    """
    for g in gradients.values():
        dtype = torch.promote_types(dtype, g.dtype)
    sums: dict[tuple[str, ...], list[Tensor]] = {}
    for (over, weight), pieces in _pieces(gradients, shares).items():
        norms = torch._foreach_norm(pieces, 2.0, dtype=dtype)
        sums.setdefault(over, []).append(weight * torch.stack(list(norms)).square().sum())
    device = next((local(g).device for g in gradients.values()), None)
    zero = torch.zeros((), dtype=dtype, device=device)
    # A rank may hold nothing of a parameter that others hold a part of; it still takes part in their all-reduce.
    kinds = sorted({_over(g, shares[name]) for name, g in gradients.items()})
    totals = [torch.stack(sums[over]).sum() if over in sums else zero for over in kinds]
    for name, all_reduce in _sums_over(gradients.values(), ranks).items():
        split = [i for i, over in enumerate(kinds) if name in over]
        if split:
            whole = all_reduce(torch.stack([totals[i] for i in split]))
            for i, total in zip(split, whole, strict=True):
                totals[i] = total
    return torch.stack(totals).sum().sqrt() if totals else zero


def clip_factor(norm: Tensor, largest: float | None, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """What gradients are to be multiplied by, so that `scale` leaves them and their norm is at most `largest`.

    `norm` is `grad_norm` of the gradients as they are, that is times `scale`. Returns (the norm without the scale and
    before the clip, the factor). Nothing waits for the device.
    """
    true = norm / scale
    factor = torch.full_like(true, 1 / scale)
    if largest is not None:
        factor = factor * (largest / (true + 1e-6)).clamp(max=1.0)
    return true, factor


def clip_(gradients: Iterable[Tensor], norm: Tensor, largest: float | None, scale: float = 1.0) -> Tensor:
    """Multiplies gradients by `clip_factor` in place. Returns the norm without the scale and before the clip."""
    true, factor = clip_factor(norm, largest, scale)
    held = [local(g) for g in gradients]
    if held and not (largest is None and scale == 1.0):
        torch._foreach_mul_(held, factor)
    return true


def local(x: Tensor) -> Tensor:
    """A DTensor's own part; a plain tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def _sums_over(gradients: Iterable[Tensor], ranks: Ranks) -> dict[str, Callable[[Tensor], Tensor]]:
    """How a small tensor is summed over each mesh dimension: those of the ranks, then those that FSDP2 has beside."""
    sums: dict[str, Callable[[Tensor], Tensor]] = {
        name: (lambda x, name=name: ranks.group(name).all_reduce(x))  # type: ignore[misc]
        for name in ranks.mesh.names
    }
    for g in gradients:
        if isinstance(g, DTensor):
            for i, name in enumerate(data_names(g)):
                group = g.device_mesh.get_group(i).group_name
                sums.setdefault(name, lambda x, group=group: private_apis.all_reduce(x, "sum", group))  # type: ignore[misc]
    return sums


def _over(g: Tensor, s: Share) -> tuple[str, ...]:
    return s.over + _data_dims(g)


def _data_dims(g: Tensor) -> tuple[str, ...]:
    """The mesh dimensions that a DTensor is sharded over."""
    if not isinstance(g, DTensor):
        return ()
    assert not any(p.is_partial() for p in g.placements), "a partial gradient has no norm yet"
    return tuple(name for name, p in zip(data_names(g), g.placements, strict=True) if p.is_shard())


def data_names(x: DTensor) -> tuple[str, ...]:
    """The names of the dimensions of a DTensor's mesh; `data0`, … where it has none."""
    return x.device_mesh.mesh_dim_names or tuple(f"data{i}" for i in range(x.device_mesh.ndim))


def _pieces(
    gradients: Mapping[str, Tensor], shares: Mapping[str, Share]
) -> dict[tuple[tuple[str, ...], float], list[Tensor]]:
    """Local boxes that are not empty, by what they are summed over and by weight."""
    out: dict[tuple[tuple[str, ...], float], list[Tensor]] = {}
    for name, g in gradients.items():
        s = shares[name]
        held, window = local(g).detach(), _window(g)
        for box, weight in s.boxes if s.boxes is not None else ((window, 1.0),):
            piece = held
            for dim, ((a, b), (start, stop)) in enumerate(zip(box, window, strict=True)):
                a, b = max(a, start), min(b, stop)
                piece = piece.narrow(dim, min(a - start, stop - start), max(b - a, 0))
            if piece.numel():
                out.setdefault((_over(g, s), weight), []).append(piece)
    return out


def _window(g: Tensor) -> Box:
    """Which indices of the tensor-parallel slice this rank holds: all, or its shard over the data mesh."""
    window = [(0, n) for n in g.shape]
    if isinstance(g, DTensor):
        for i, placement in enumerate(g.placements):
            if not isinstance(placement, Shard):
                continue
            dim, (start, stop) = placement.dim % g.dim(), window[placement.dim]
            a, b = chunk(stop - start, g.device_mesh.size(i), g.device_mesh.get_local_rank(i))
            window[dim] = (start + a, start + b)
        assert prod(b - a for a, b in window) == g.to_local().numel(), "a shard that is not torch.chunk's"
    return tuple(window)
