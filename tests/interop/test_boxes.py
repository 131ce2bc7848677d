"""What ranks save of a parameter, for any layout: boxes that cover it once, and placements only where they are true."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import Shard

from tests.train.test_train_clip import parameters, slice_of
from tpcompiler.errors import TpcError
from tpcompiler.interop.data_shards import Cuts
from tpcompiler.interop.sharded_state import _boxes, _by_placements, _layout, _placements
from tpcompiler.interop.slices import Box, Slices
from tpcompiler.layout import Dim
from tpcompiler.runtime import Mesh
from tpcompiler.runtime.mesh import chunk


class Devices:
    """What is asked of a DeviceMesh."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.mesh_dim_names = names


def parts(whole: Tensor, dims: tuple[Dim, ...], mesh: Mesh, copies: int) -> list[tuple[Mesh, Cuts, Tensor, int]]:
    """Each rank's part of a tensor, cut once more over `copies` data ranks along dimension 0, as FSDP2 cuts it."""
    out = []
    for rank in range(mesh.size):
        held = slice_of(whole, dims, mesh, rank)
        for place in range(copies):
            cuts = Cuts((("copies", copies, place, 0),)) if copies > 1 else Cuts()
            a, b = chunk(held.shape[0], copies, place)
            wide = cuts.widened(mesh)
            out.append((wide, cuts, held[a:b], wide.rank(cuts.coords(mesh.coords(rank)))))
    return out


@given(parameters(), st.integers(1, 3))
@settings(max_examples=60)
def test_boxes_of_all_ranks_are_the_tensor_and_those_of_two_are_equal_or_apart(
    case: tuple[Mesh, list[tuple[Dim, ...]]], copies: int
) -> None:
    mesh, layouts = case
    for dims in layouts:
        whole = torch.randn([d.size for d in dims])
        found = torch.full_like(whole, float("nan"))
        seen: set[tuple[tuple[int, int], ...]] = set()
        covered = 0
        for wide, cuts, held, rank in parts(whole, dims, mesh, copies):
            layout = _layout(dims, wide, cuts)
            saved = Slices(held.clone(), _boxes(layout, rank), layout.shape, "")
            assert saved.shape == whole.shape
            for item, box in zip(saved.__create_write_items__("w", saved), saved.boxes, strict=True):
                shard = saved.__get_tensor_shard__(MetadataIndex("w", item.index.offset))
                target = found
                for dim, (start, stop) in enumerate(box.whole):
                    target = target.narrow(dim, start, stop - start)
                assert shard.shape == target.shape
                target.copy_(shard)
                covered += shard.numel() if box.whole not in seen else 0
                seen.add(box.whole)
        assert torch.equal(found, whole)
        assert covered == whole.numel(), "boxes overlap"


@given(parameters(), st.integers(1, 2))
@settings(max_examples=60)
def test_placements_are_given_only_where_they_say_what_every_rank_holds(
    case: tuple[Mesh, list[tuple[Dim, ...]]], copies: int
) -> None:
    mesh, layouts = case
    for dims in layouts:
        whole = torch.arange(torch.Size([d.size for d in dims]).numel()).reshape([d.size for d in dims])
        for wide, cuts, held, rank in parts(whole, dims, mesh, copies):
            layout = _layout(dims, wide, cuts)
            said, why = _placements(layout, dims, wide, cuts, Devices(wide.names))
            assert (said is None) == bool(why)
            if said is None:
                continue
            mine = whole  # as torch.chunk deals it, one mesh dimension after the other
            for name, placement in zip(wide.names, said, strict=True):
                if isinstance(placement, Shard):
                    a, b = chunk(mine.shape[placement.dim], wide[name], wide.coords(rank)[name])
                    mine = mine.narrow(placement.dim, a, b - a)
            assert torch.equal(mine, held)
            assert _by_placements(layout.shape, said, wide, wide.coords(rank)) == layout.runs(rank)


def test_a_copy_is_a_copy_and_everything_else_is_refused() -> None:
    part = torch.arange(6.0)
    saved = Slices(part, [Box(((2, 8),), ((0, 6),))], [10], "why")
    copied = saved.clone()
    assert isinstance(copied, Slices)
    assert copied.local.data_ptr() != part.data_ptr()
    assert saved.local.data_ptr() == part.data_ptr()
    copied.local.zero_()
    saved.copy_(copied)
    assert not part.any()
    with pytest.raises(TpcError, match="it is for checkpoints"):
        saved + 1
