"""The gradient norm of slices is that of the whole, and clipping, scaling and skipping happen on all ranks alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from tpcompiler.errors import TpcError
from tpcompiler.execute.simulate import run_ranks
from tpcompiler.layout import Concat, Dim, Factor, Product
from tpcompiler.runtime.groups import Ranks
from tpcompiler.runtime.mesh import Mesh
from tpcompiler.train.optim.clip import Share, clip_, grad_norm, share
from tpcompiler.train.optim.scaler import Scale, all_finite
from tpcompiler.train.settings import LossScale

Layout = tuple[Dim, ...]


def slice_of(x: Tensor, dims: Layout, mesh: Mesh, rank: int) -> Tensor:
    for i, dim in enumerate(dims):
        rows = [r for a, b in dim.runs(mesh, mesh.coords(rank)) for r in range(a, b)]
        x = x.index_select(i, torch.tensor(rows, dtype=torch.int64))
    return x


def splits(names: tuple[str, ...]) -> st.SearchStrategy[tuple[str, ...]]:
    """Any mesh dimensions, in any order, each at most once."""
    return st.lists(st.sampled_from(names), unique=True, max_size=len(names)).map(tuple) if names else st.just(())


@st.composite
def dimension(draw: st.DrawFn, names: tuple[str, ...]) -> Dim:
    """A dimension whose leaves are split over some of `names`, with segments that are split differently."""

    def leaf() -> Factor:
        return Factor(draw(st.integers(1, 7)), "", draw(splits(names)))

    def segment() -> Dim:
        parts: list[Dim] = [Factor(draw(st.integers(1, 3))), leaf(), Factor(draw(st.integers(1, 3)))]
        return Product(tuple(parts[draw(st.integers(0, 1)) : draw(st.integers(2, 3))]))

    return draw(st.sampled_from([leaf, segment, lambda: Concat((segment(), leaf(), segment()))]))()


@st.composite
def parameters(draw: st.DrawFn) -> tuple[Mesh, list[Layout]]:
    mesh = Mesh.of({"data": draw(st.integers(1, 2)), "kv": draw(st.integers(1, 3)), "heads": draw(st.integers(1, 2))})
    layouts: list[Layout] = []
    for _ in range(draw(st.integers(1, 4))):
        # Each mesh dimension splits at most one dimension of a tensor.
        first = draw(st.sampled_from([(), ("kv",), ("heads",), ("kv", "heads")]))
        second = tuple(n for n in ("kv", "heads") if n not in first)
        shape = [draw(dimension(first)), draw(dimension(second))]
        layouts.append(tuple(shape[: draw(st.integers(1, 2))]))
    return mesh, layouts


@given(parameters())
@settings(max_examples=60)
def test_norm_of_slices_is_the_norm_of_the_whole(case: tuple[Mesh, list[Layout]]) -> None:
    mesh, layouts = case
    generator = torch.Generator().manual_seed(1)
    whole = [
        torch.randn([d.size for d in dims], generator=generator, dtype=torch.float64) * 3**i
        for i, dims in enumerate(layouts)
    ]
    expected = torch.cat([w.flatten() for w in whole]).norm()

    def norm(ranks: Ranks) -> Tensor:
        gradients = {str(i): slice_of(w, layouts[i], mesh, ranks.rank) for i, w in enumerate(whole)}
        shares = {str(i): share(dims, mesh, ranks.coords) for i, dims in enumerate(layouts)}
        return grad_norm(gradients, shares, ranks, torch.float64)

    for got in run_ranks(mesh, norm):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_fused_qkv_with_one_kv_head_counts_replicated_rows_once() -> None:
    mesh = Mesh.of({"tensor": 4})
    qkv = (Concat((Product((Factor(4, "heads", ("tensor",)), Factor(2))), Factor(2), Factor(2))), Factor(3))
    got = share(qkv, mesh, {"tensor": 1})
    assert got == Share(("tensor",), ((((0, 2), (0, 3)), 1.0), (((2, 6), (0, 3)), 0.25)))
    even = share((Factor(25, "n", ("tensor",)), Factor(3)), mesh, {"tensor": 1})
    assert even == Share(("tensor",))
    assert share((Factor(25), Factor(3)), mesh, {"tensor": 1}) == Share()


def test_a_rank_that_holds_nothing_takes_part() -> None:
    mesh, dims = Mesh.of({"tensor": 4}), (Factor(2, "heads", ("tensor",)),)
    whole = torch.tensor([3.0, 4.0])

    def norm(ranks: Ranks) -> Tensor:
        return grad_norm({"w": slice_of(whole, dims, mesh, ranks.rank)}, {"w": share(dims, mesh, ranks.coords)}, ranks)

    assert [float(x) for x in run_ranks(mesh, norm)] == [5.0] * 4


@pytest.fixture
def data_mesh(tmp_path: Any) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("data",))
    dist.destroy_process_group()


def test_dtensors_of_fsdp_count_like_plain_tensors(data_mesh: Any) -> None:
    mesh = Mesh.of({"data": 1, "tensor": 2})
    dims = (Concat((Factor(4, "q", ("tensor",)), Factor(3))), Factor(5))
    whole = torch.randn(7, 5, dtype=torch.float64)
    locals_ = [distribute_tensor(slice_of(whole, dims, mesh, r), data_mesh, [Shard(0)]) for r in range(2)]

    def norm(ranks: Ranks) -> Tensor:
        g = {"w": locals_[ranks.rank]}
        true = grad_norm(g, {"w": share(dims, mesh, ranks.coords)}, ranks)
        return clip_(g.values(), true, 1.0)

    for got in run_ranks(mesh, norm):
        torch.testing.assert_close(got, whole.norm(), rtol=1e-12, atol=0)
    clipped = torch.cat([locals_[0].to_local(), locals_[1].to_local()[:2]])
    torch.testing.assert_close(clipped.norm(), torch.ones((), dtype=torch.float64), rtol=1e-5, atol=0)


def test_shards_over_the_data_mesh_count_the_boxes_they_cut() -> None:
    """Each of three data ranks in turn, the others played by nobody: their parts of the sum add up to it."""
    whole = torch.randn(7, 5, dtype=torch.float64)
    cut = Share(("tensor",), ((((0, 4), (0, 5)), 1.0), (((4, 7), (0, 5)), 0.5)))
    total = 0.0
    for rank, rows in enumerate(torch.chunk(whole, 3)):
        dist.init_process_group("fake", rank=rank, world_size=3, store=FakeStore())
        try:
            mesh = init_device_mesh("cpu", (3,), mesh_dim_names=("data",))
            g = DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())
            alone = Ranks(Mesh.of({"data": 1, "tensor": 1}), 0)
            total += float(grad_norm({"w": g}, {"w": cut}, alone)) ** 2
        finally:
            dist.destroy_process_group()
    assert total == pytest.approx(float(whole[:4].square().sum() + 0.5 * whole[4:].square().sum()), rel=1e-12)


@given(norm=st.floats(0.1, 10), largest=st.floats(0.1, 10), scale=st.sampled_from([1.0, 1024.0]))
@settings(max_examples=30)
def test_clip_limits_the_norm_and_removes_the_scale(norm: float, largest: float, scale: float) -> None:
    true = torch.randn(50, dtype=torch.float64)
    true *= norm / true.norm()
    gradients = [(true[:20] * scale).clone(), (true[20:] * scale).clone()]
    before = torch.cat(gradients).norm()
    reported = clip_(gradients, before, largest, scale)
    after = torch.cat(gradients)
    torch.testing.assert_close(reported, true.norm())
    assert float(after.norm()) <= largest
    if norm < largest * 0.999:
        torch.testing.assert_close(after, true, rtol=1e-12, atol=0)
    else:
        torch.testing.assert_close(after / after.norm(), true / true.norm())
        assert float(after.norm()) == pytest.approx(min(norm, largest), rel=1e-4)


def test_no_clip_and_no_scale_leave_every_bit() -> None:
    g = torch.randn(9)
    kept = g.clone()
    clip_([g], g.norm(), None)
    assert torch.equal(g, kept)
    clip_([g], g.norm(), None, 4.0)
    assert torch.equal(g, kept / 4)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("where", [0, 3])
def test_a_fault_on_one_rank_is_seen_by_all(bad: float, where: int) -> None:
    def finite(ranks: Ranks) -> tuple[bool, bool]:
        g = [torch.ones(3, 2), torch.ones(5, dtype=torch.float64), torch.ones(0)]
        good = bool(all_finite(g, ranks))
        if ranks.rank == where:
            g[1][4] = bad
        return good, bool(all_finite(g, ranks))

    assert run_ranks(Mesh.of({"data": 2, "tensor": 2}), finite) == [(True, False)] * 4


def test_the_norm_is_not_finite_when_a_gradient_is_not() -> None:
    mesh, dims = Mesh.of({"tensor": 2}), (Factor(4, "n", ("tensor",)),)

    def norm(ranks: Ranks) -> float:
        g = torch.ones(2)
        if ranks.rank == 1:
            g[0] = float("nan")
        return float(grad_norm({"w": g}, {"w": share(dims, mesh, ranks.coords)}, ranks))

    assert all(n != n for n in run_ranks(mesh, norm))


def test_scale_grows_after_good_steps_and_backs_off_after_bad_ones() -> None:
    config = LossScale(start=1024.0, growth=2.0, backoff=0.5, interval=3)
    scale = Scale.start(config)
    values = []
    for finite in (True, True, True, True, False, True, True, True, False, False):
        scale = scale.after(finite, config)
        values.append(scale.value)
    assert values == [1024, 1024, 2048, 2048, 1024, 1024, 1024, 2048, 1024, 512]
    assert scale.skipped == 3
    assert Scale.from_state_dict(scale.state_dict()) == scale


def test_scale_is_what_torchs_own_scaler_has() -> None:
    """The same sequence as `torch.amp.GradScaler`, on random faults."""
    config = LossScale(start=2.0**10, interval=4)
    mine = Scale.start(config)
    theirs = torch.amp.GradScaler("cpu", config.start, config.growth, config.backoff, config.interval)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], 0.0)
    for fault in (torch.rand(40) < 0.2).tolist():
        theirs.scale(weight.sum()).backward()
        assert weight.grad is not None
        if fault:
            weight.grad[0] = float("inf")
        finite = bool(all_finite([weight.grad], Ranks.single()))
        theirs.step(optimizer)
        theirs.update()
        weight.grad = None
        mine = mine.after(finite, config)
        assert mine.value == theirs.get_scale()


def test_a_scale_that_cannot_fall_stops_the_run() -> None:
    with pytest.raises(TpcError, match=r"loss scale 1 cannot fall further"):
        Scale(1.0).after(False, LossScale())
