"""What starting one rank of the paper's 8.3 B at 8-way needs of the host's memory, on CPU, nobody else being there.

    python benchmarks/start_memory.py [--spec specs/gpt2-8.3b.yaml] [--rank 0] [--precision fp32]

Everything a rank of `tpc train` does until its first step: capture, compile, emit, allocate, initial values by the
model's own constructor. The shard is what the rank keeps: its slices of the parameters, in training precision (16-bit
and master copies both), and AdamW's moments; with `--keep parameters` there is no optimizer, and the shard is the
parameters alone. Prints one JSON object; exit code 1 when the peak is over the limit.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tpcompiler.load.model import load_model, parse_settings
from tpcompiler.runtime import Ranks, Rng
from tpcompiler.runtime.groups import Group
from tpcompiler.spec.schema import Spec
from tpcompiler.train.hold.owned import allocate, fill, from_constructor
from tpcompiler.train.hold.storage import by_name
from tpcompiler.train.settings import Train
from tpcompiler.train.step.compiled import Compiled, compile_model, loss_output
from tpcompiler.train.step.engine import Engine


def peak() -> int:
    """Bytes: the most that this process had in memory at once so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def parameters_alone(compiled: Compiled, ranks: Ranks, seed: int) -> list[torch.Tensor]:
    program = compiled.sharded.program
    module = compiled.module(ranks, Rng(seed))
    allocate(module, "cpu")
    found = by_name(module, {q.name: q.aliases for q in program.capture.parameters if not q.buffer})
    slices = {n: tuple(d.runs(program.mesh, ranks.coords) for d in program.dims[n]) for n in found}
    fill(found, slices, from_constructor(lambda name: compiled.recorded.replay(name, seed)))
    return list(found.values())


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="models/gpt2.py")
    p.add_argument("--spec", default="specs/gpt2-8.3b.yaml")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    p.add_argument("--rank", type=int, default=0)
    p.add_argument("--precision", default="fp32", choices=["bf16", "fp32"])
    p.add_argument("--keep", default="all", choices=["all", "parameters"])
    p.add_argument("--limit", type=float, default=1.3, help="of the shard")
    a = p.parse_args()
    start = time.perf_counter()
    imported = peak()
    spec = Spec.load(a.spec).with_(train={"precision": a.precision, "compile": False})
    loaded = load_model(a.model, spec, parse_settings(a.set))
    compiled = compile_model(loaded, spec, loaded.inputs(), loss_output)
    captured = peak()
    mesh = compiled.sharded.program.mesh
    # A rank whose fellows never come: nothing communicates before the first step.
    ranks = Ranks(mesh, a.rank, lambda over: Group(mesh.degree(over), mesh.index(over, mesh.coords(a.rank)), over))
    if a.keep == "all":
        engine = Engine(compiled, ranks, spec.section(Train), spec.seed, torch.device("cpu"))
        engine.fill(from_constructor(lambda name: compiled.recorded.replay(name, spec.seed)))
        held = [*engine.tensors().values(), *engine.module.parameters()]
    else:
        held = parameters_alone(compiled, ranks, spec.seed)
    kept = {t.data_ptr(): t.nbytes for t in held}
    shard = sum(kept.values())
    most = peak()
    result = {
        "model": compiled.capture.model,
        "parameters": sum(torch.Size(q.shape).numel() for q in compiled.capture.parameters if not q.buffer),
        "mesh": dict(mesh.dims),
        "rank": a.rank,
        "precision": a.precision,
        "keep": a.keep,
        "shard_gib": round(shard / 2**30, 3),
        "peak_gib": round(most / 2**30, 3),
        "ratio": round(most / shard, 3),
        "imports_gib": round(imported / 2**30, 3),
        "captured_gib": round(captured / 2**30, 3),
        "largest_parameter_gib": round(max(q.bytes for q in compiled.capture.parameters) / 2**30, 3),
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(result))
    return 0 if most <= a.limit * shard else 1


if __name__ == "__main__":
    sys.exit(main())
