"""Your own loop over tensor-parallel ranks: any optimizer, clipping, a checkpoint, and a resume from it.

    torchrun --nproc-per-node 2 examples/plain_loop.py

Every rank runs the same lines on the same batch. What differs from a loop for one device: `tpc.parallelize` for the
model, `tpc.clip_grad_norm_` for torch's, and `tpc.state_dict` for what is saved.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

import tpcompiler as tpc

sys.path.insert(0, str(Path(__file__).parents[1]))
from models.gpt2 import GPT2, example_inputs

STEPS, HALF = 6, 3


def model() -> nn.Module:
    torch.manual_seed(0)  # every rank draws the same values, of which it keeps its part
    return GPT2(vocab=61, positions=16, hidden=24, heads=3, layers=2, dropout=0.0)


def batches() -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    return [example_inputs(batch=4, sequence=8, vocab=61) for _ in range(STEPS)]


def parallel() -> tuple[nn.Module, torch.optim.Optimizer]:
    module = tpc.parallelize(model(), batches()[0], {"mesh": {"tensor": 2}})
    return module, torch.optim.AdamW(module.parameters(), lr=1e-2)


def train(module: Any, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        module.rng.at(step)  # dropout's masks: the same at every degree
        loss = module(**batches()[step])
        optimizer.zero_grad()
        loss.backward()
        tpc.clip_grad_norm_(module, 0.5)
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(directory: str = "out/plain-loop") -> list[float]:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    module, optimizer = parallel()
    losses = train(module, optimizer, range(HALF))
    dcp.save(tpc.state_dict(module, optimizer), checkpoint_id=directory)

    module, optimizer = parallel()  # another job, perhaps of another degree
    state = tpc.state_dict(module, optimizer)
    dcp.load(state, checkpoint_id=directory)
    tpc.load_state_dict(module, state, optimizer)
    return losses + train(module, optimizer, range(HALF, STEPS))


if __name__ == "__main__":
    found = main()
    if dist.get_rank() == 0:
        sys.stdout.write(" ".join(f"{loss:.4f}" for loss in found) + "\n")
    dist.destroy_process_group()
