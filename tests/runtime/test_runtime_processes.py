"""Process groups do what groups of threads do: the same program in real processes (gloo), eager and compiled."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from tpcompiler.errors import TpcError
from tpcompiler.execute.simulate import run_ranks
from tpcompiler.runtime import (
    Mesh,
    Parameters,
    Ranks,
    Rng,
    cross_entropy,
    dropout,
    enter,
    gather,
    gather_sequence,
    lookup,
    reduce,
    scatter_sequence,
)

Result = dict[str, list[Tensor]]


def in_processes(fn: Callable[[], Any], size: int, directory: Path, env: dict[str, str] | None = None) -> list[Any]:
    """What `fn()` returns in each of `size` new processes, which have torchrun's environment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "GLOO_SOCKET_IFNAME": "lo"}
    torch.multiprocessing.spawn(_process, (fn, directory, shared | (env or {})), nprocs=size)
    return [torch.load(directory / f"{rank}.pt") for rank in range(size)]


def _process(rank: int, fn: Callable[[], Any], directory: Path, env: dict[str, str]) -> None:
    os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    result = fn()
    torch.save(result, directory / f"{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


class Tiny(nn.Module):
    """A transformer's parallel parts: embedding, column and row, dropout, gather, sequence, loss. Nothing divides."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self.tensor = ranks.group("tensor")
        draw = torch.Generator().manual_seed(1)
        vocab, ff = (torch.randn(n, 5, dtype=torch.double, generator=draw) for n in (9, 7))
        self.wte, self.up, self.down = Parameters(), Parameters(), Parameters()
        self.rows = (self.tensor.part(9),)
        self.ff = tuple((part,) for part in ((0, 4), (4, 7)))[self.tensor.index]
        self.all_ff = (((0, 4),), ((4, 7),))
        self.wte.weight = nn.Parameter(vocab[slice(*self.rows[0])].clone())
        self.up.weight = nn.Parameter(ff[slice(*self.ff[0])].clone())
        self.down.weight = nn.Parameter(ff.T[:, slice(*self.ff[0])].clone())
        self.rng = Rng(3)

    def forward(self, ids: Tensor, target: Tensor, site: Tensor) -> Tensor:
        x = reduce(lookup(self.wte.weight, ids, self.rows), self.tensor)
        h = F.gelu(F.linear(enter(x, self.tensor), self.up.weight))
        h = dropout(h, 0.2, self.training, self.rng, site, ((2, 7, self.ff),))
        whole = gather(h, self.tensor, 2, self.all_ff)
        part = F.linear(h, self.down.weight)
        x = x + reduce(part, self.tensor)
        s = scatter_sequence(part, self.tensor, 1)
        s = F.linear(gather_sequence(s, self.tensor, 1, part.shape[1]), self.up.weight)
        y = F.linear(enter(x, self.tensor), self.wte.weight).flatten(0, 1)
        loss = cross_entropy(y, target.flatten(), self.tensor, self.rows, label_smoothing=0.1)
        return loss + whole.square().sum() + reduce(s.square().sum(), self.tensor)


def step(forward: Callable[..., Tensor], model: Tiny, length: int = 3) -> list[Tensor]:
    """Loss and gradients."""
    draw = torch.Generator().manual_seed(2)
    ids, target = (torch.randint(9, (2, length), generator=draw) for _ in range(2))
    model.zero_grad()
    loss = forward(ids, target, torch.tensor(4))
    loss.backward()
    return [loss.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None]


def eager(ranks: Ranks) -> Result:
    model = Tiny(ranks)
    return {
        "eager": step(model, model),
        "5 long": step(model, model, 5),
        "recomputed": step(lambda *a: checkpoint(model, *a, use_reentrant=False), model),
    }


LENGTHS = {"one": (), "some": (5,)}  # after 3


def compiled(ranks: Ranks, backend: str) -> Result:
    model = Tiny(ranks)
    fast = torch.compile(model, backend=backend, fullgraph=True)
    out = {"eager": step(fast, model)}
    for length in LENGTHS[os.environ["LENGTHS"]]:
        out[f"{length} long"] = step(fast, model, length)
    return {f"compiled {name}": values for name, values in out.items()}


def pair() -> Result:
    ranks = Ranks.from_env(Mesh.of({"tensor": 2}), backend="gloo")
    return eager(ranks) | compiled(ranks, os.environ["BACKEND"])


def check(results: list[Result]) -> None:
    expected = run_ranks(Mesh.of({"tensor": 2}), eager)
    for rank, got in enumerate(results):
        for name, values in got.items():
            for ours, theirs in zip(values, expected[rank][name.removeprefix("compiled ")], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a[0], results[1][name][0]) for name, a in results[0].items())


@pytest.mark.parametrize(
    ("backend", "lengths"), [("aot_eager", "one"), pytest.param("inductor", "some", marks=pytest.mark.nightly)]
)
@pytest.mark.nightly
def test_two_processes_are_two_threads(backend: str, lengths: str, tmp_path: Path) -> None:
    check(in_processes(pair, 2, tmp_path, {"BACKEND": backend, "LENGTHS": lengths}))


def collectives(ranks: Ranks) -> list[Tensor]:
    """Every collective, uneven, not contiguous, over groups in and out of the order of the ranks."""
    draw = torch.Generator().manual_seed(1)
    out = []
    for over in [("a",), ("b",), ("a", "b"), ("b", "a")]:
        g = ranks.group(over)
        sizes = g.sizes(7)
        x = torch.randn(ranks.mesh.size, 3, 7, generator=draw)[ranks.rank].T
        mine = x[: sizes[g.index]]
        out += [
            torch.tensor([g.size, g.index]),
            g.all_reduce(x),
            g.all_reduce(x, "max"),
            g.all_gather(mine, 0, sizes),
            g.all_gather(mine.T, 1, sizes),
            g.all_gather(x, 0),
            g.all_gather(x, 1),
            g.reduce_scatter(x, 0, sizes),
            g.reduce_scatter(x.T, -1, sizes),
            g.reduce_scatter(torch.cat([x] * g.size), 0),
            g.all_gather(x[:0], 0),
        ]
    return out


def four() -> list[Any]:
    mesh = Mesh.of({"a": 2, "b": 2})
    first = collectives(Ranks.from_env(mesh, backend="gloo"))
    device_mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    second = collectives(Ranks.from_device_mesh(device_mesh))
    part = Ranks.from_device_mesh(device_mesh["b"])
    return [first, second, part.group("b").all_gather(torch.tensor([dist.get_rank()]), 0)]


@pytest.mark.nightly
def test_four_processes_are_four_threads(tmp_path: Path) -> None:
    expected = run_ranks(Mesh.of({"a": 2, "b": 2}), collectives)
    for rank, (first, second, part) in enumerate(in_processes(four, 4, tmp_path)):
        for got in (first, second):
            for ours, theirs in zip(got, expected[rank], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        assert part.tolist() == [rank // 2 * 2, rank // 2 * 2 + 1]


@pytest.fixture
def fake() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("fake")
def test_one_rank_of_many_runs_alone() -> None:
    """For measurements: shapes and time are those of one rank, values are not."""
    ranks = Ranks.from_env(Mesh.of({"data": 2, "tensor": 4}))
    group = ranks.group("tensor")
    assert (group.size, group.index) == (4, 1)
    x = torch.ones(2, 6, requires_grad=True)
    gather_sequence(scatter_sequence(reduce(enter(x, group), group), group, 1), group, 1, 6).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert ranks.group("data", "tensor").all_gather(x.detach(), 0).shape == (16, 6)


@pytest.mark.usefixtures("fake")
def test_sequences_that_do_not_divide_compile_as_a_whole() -> None:
    group = Ranks.from_env(Mesh.of({"tensor": 8})).group("tensor")

    def fn(x: Tensor) -> Tensor:
        return gather_sequence(scatter_sequence(x, group, 1), group, 1, x.shape[1])

    fast = torch.compile(fn, backend="eager", fullgraph=True, dynamic=True)
    for length in (9, 11, 16, 21):
        assert fast(torch.ones(2, length, 3)).shape == (2, length, 3)


@pytest.mark.usefixtures("fake")
def test_a_mesh_of_another_size_is_told() -> None:
    with pytest.raises(TpcError, match=r"tensor 4 has 4 ranks but 8 processes"):
        Ranks.from_env(Mesh.of({"tensor": 4}))


def test_alone_there_is_only_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert Ranks.from_env(Mesh.of({"data": 1, "tensor": 1})).group("tensor").size == 1
    with pytest.raises(TpcError, match="torchrun"):
        Ranks.from_env(Mesh.of({"tensor": 2}))
