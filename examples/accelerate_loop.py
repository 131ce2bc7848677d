"""Hugging Face Accelerate over tensor-parallel ranks.

    torchrun --nproc-per-node 2 examples/accelerate_loop.py

Accelerate prepares the optimizer alone. Given the module, it would wrap it in DDP, which averages gradients of
different slices; given the loader, it would deal every rank other samples. (Its `ParallelismConfig(tp_size=2)` would
say so, but takes GPUs only.)
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator

import tpcompiler as tpc

sys.path.insert(0, str(Path(__file__).parents[1]))
from examples.plain_loop import batches, parallel


def main() -> list[float]:
    accelerator = Accelerator(cpu=True)
    module, optimizer = parallel()
    optimizer = accelerator.prepare(optimizer)
    losses = []
    for batch in batches():
        with accelerator.accumulate(module):
            loss = module(**batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                tpc.clip_grad_norm_(module, 0.5)  # not accelerator.clip_grad_norm_, which is torch's
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = main()
    if dist.get_rank() == 0:
        sys.stdout.write(" ".join(f"{loss:.4f}" for loss in found) + "\n")
    dist.destroy_process_group()
