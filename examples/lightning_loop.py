"""Lightning's ModelParallelStrategy over tensor-parallel ranks.

    torchrun --nproc-per-node 2 examples/lightning_loop.py

The strategy makes the mesh and deals batches by its data dimension. `configure_model` is where the model is made, and
`configure_gradient_clipping` is where the norm of slices is counted rightly.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

import tpcompiler as tpc

sys.path.insert(0, str(Path(__file__).parents[1]))
from examples.plain_loop import STEPS, batches, model


class Parallel(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.module: torch.nn.Module | None = None

    def configure_model(self) -> None:
        if self.module is not None:
            return
        tensor, data = self.device_mesh["tensor_parallel"].size(), self.device_mesh["data_parallel"].size()
        # the same ranks, under the names of the spec
        mesh = dist.init_device_mesh("cpu", (data, tensor), mesh_dim_names=("data", "tensor"))
        self.module = tpc.parallelize(model(), batches()[0], {"mesh": {"tensor": tensor}}, mesh)

    def training_step(self, batch: dict[str, Tensor], step: int) -> Tensor:
        loss = self.module(**batch)
        self.losses.append(loss.item())
        return loss

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, **kwargs: Any) -> None:
        tpc.clip_grad_norm_(self.module, 0.5)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.module.parameters(), lr=1e-2)


def main() -> list[float]:
    parallel = Parallel()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2, process_group_backend="gloo"),
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(parallel, torch.utils.data.DataLoader(batches(), batch_size=None))
    return parallel.losses


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = main()
    if dist.get_rank() == 0:
        sys.stdout.write(" ".join(f"{loss:.4f}" for loss in found) + "\n")
    dist.destroy_process_group()
