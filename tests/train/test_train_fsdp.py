"""Norm, clip and finiteness under FSDP2, in real processes: 2 data × 2 tensor ranks over gloo."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tpcompiler.layout import Concat, Dim, Factor
from tpcompiler.runtime.groups import Ranks
from tpcompiler.runtime.mesh import Mesh
from tpcompiler.train.optim.clip import clip_, grad_norm, local, share
from tpcompiler.train.optim.optimizer import make_optimizer
from tpcompiler.train.optim.scaler import all_finite
from tpcompiler.train.settings import Optimizer

MESH = Mesh.of({"data": 2, "tensor": 2})
# An odd number of rows, split unevenly; query rows split and key rows replicated; a replicated bias.
LAYOUTS: dict[str, tuple[Dim, ...]] = {
    "up": (Factor(5, "n", ("tensor",)), Factor(4)),
    "qk": (Concat((Factor(6, "q", ("tensor",)), Factor(2))), Factor(4)),
    "bias": (Factor(3),),
}


class Held(nn.Module):
    """One rank's slices; the gradient of each parameter is itself."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        for name, whole in wholes().items():
            for i, dim in enumerate(LAYOUTS[name]):
                rows = [r for a, b in dim.runs(MESH, MESH.coords(rank)) for r in range(a, b)]
                whole = whole.index_select(i, torch.tensor(rows))
            setattr(self, name, nn.Parameter(whole))

    def forward(self, x: Tensor) -> Tensor:
        return x * sum((p.square().sum() / 2 for p in self.parameters()), torch.zeros(()))


def wholes() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    return {n: torch.randn([d.size for d in dims], generator=g) for n, dims in LAYOUTS.items()}


def work(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4)
    try:
        devices = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        ranks = Ranks.from_device_mesh(devices)
        model = Held(rank)
        fully_shard(model, mesh=devices["data"], mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
        model(torch.ones(())).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert gradients.keys() == LAYOUTS.keys()
        shares = {n: share(dims, MESH, ranks.coords) for n, dims in LAYOUTS.items()}
        expected = torch.cat([w.flatten() for w in wholes().values()]).norm()
        norm = grad_norm(gradients, shares, ranks, torch.float64)
        torch.testing.assert_close(norm.float(), expected)
        assert bool(all_finite(gradients.values(), ranks))
        clip_(gradients.values(), norm, 0.5)
        torch.testing.assert_close(float(grad_norm(gradients, shares, ranks)), 0.5, rtol=1e-5, atol=0)
        make_optimizer(model.named_parameters(), Optimizer(lr=0.1)).step()
        if rank == 2:
            local(gradients["up"]).fill_(float("inf"))
        assert not bool(all_finite(gradients.values(), ranks))
    finally:
        dist.destroy_process_group()


def test_norm_and_clip_under_fsdp2(tmp_path: Path) -> None:
    multiprocessing.set_forkserver_preload([__name__])  # torch is imported once, not by every rank
    mp.start_processes(work, (str(tmp_path / "store"),), nprocs=4, start_method="forkserver")
