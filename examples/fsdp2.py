"""FSDP2 over data ranks, tensor-parallel ranks inside: `fully_shard` on what `tpc.parallelize` returned.

    torchrun --nproc-per-node 4 examples/fsdp2.py      # 2 data ranks × 2 tensor ranks

Each data rank has a batch of its own; the tensor ranks beside it have the same one. `fully_shard` gets the data
dimension of the mesh, never the tensor ranks, which hold different parts.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import tpcompiler as tpc

sys.path.insert(0, str(Path(__file__).parents[1]))
from examples.plain_loop import STEPS, batches, model


def parallel() -> tuple[nn.Module, torch.optim.Optimizer, int, int]:
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))
    module: Any = tpc.parallelize(model(), batches()[0], {"mesh": {"tensor": 2}}, mesh)
    for block in module.h:
        fully_shard(block, mesh=mesh["data"])
    fully_shard(module, mesh=mesh["data"])
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)  # after fully_shard, which makes new parameters
    return module, optimizer, mesh["data"].size(), mesh.get_local_rank("data")


def main() -> list[float]:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    module, optimizer, copies, mine = parallel()
    losses = []
    for batch in batches()[:STEPS]:
        loss = module(**{name: x.chunk(copies)[mine] for name, x in batch.items()})
        optimizer.zero_grad()
        loss.backward()
        tpc.clip_grad_norm_(module, 0.5)
        optimizer.step()
        losses.append(loss.detach())
    whole = torch.stack(losses)  # of this data rank's part of each batch; a mean over all ranks is one over the batch
    dist.all_reduce(whole)
    return (whole / dist.get_world_size()).tolist()


if __name__ == "__main__":
    found = main()
    if dist.get_rank() == 0:
        sys.stdout.write(" ".join(f"{loss:.4f}" for loss in found) + "\n")
    dist.destroy_process_group()
