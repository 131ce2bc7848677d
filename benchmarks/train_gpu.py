"""Speed of the trainer: the paper's GPT-2 sizes through the very engine of `tpc train`.

    python benchmarks/train_gpu.py --spec specs/gpt2-1.2b.yaml --dropout 0 0.1 --compile whole --steps 30
    torchrun --nproc-per-node 2 benchmarks/train_gpu.py --spec specs/gpt2-2.5b.yaml --dropout 0

Under torchrun the processes are the ranks of the spec's mesh (`--tensor N` for another degree). Each variant
(dropout × compile) trains on the embedded text and prints one JSON object a line: milliseconds a step (median), model
TFLOP/s a device, share of the device's peak, memory, losses, seconds of set-up and of the first step. Small sizes run
anywhere: --device cpu --set layers=2 --set hidden=64 --set heads=4 --batch 2 --sequence 64.

--alone N plays the first of N ranks by itself: its arithmetic and its host's work are a rank's, its collectives are
real calls over a group of one, and take no time on the wire. Losses mean nothing then; what a step takes is the bound
that communication is added to. With --wire ALPHA,BETA (microseconds, GB/s) collectives take that time (wire.py); each
variant is also measured without, and `hidden` is the share of the collectives' time that the step is not longer by.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.wire import Wire
from tpcompiler.load.model import load_model, parse_settings
from tpcompiler.runtime import Mesh, Ranks
from tpcompiler.runtime.groups import ProcessGroup
from tpcompiler.spec.schema import Spec
from tpcompiler.train.hold.owned import from_constructor
from tpcompiler.train.optim.clip import local
from tpcompiler.train.run.board import Board
from tpcompiler.train.run.launch import Place, join
from tpcompiler.train.run.reporter import peak_memory
from tpcompiler.train.run.training_run import TrainingRun, set_up
from tpcompiler.train.settings import Train
from tpcompiler.train.step.flops import flops_per_token, peak_tflops
from tpcompiler.train.step.traced import traced

OVERLAP: dict[str, bool | str] = {"false": False, "true": True, "halves": "halves"}


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="models/gpt2.py")
    p.add_argument("--tensor", type=int, default=None, help="over the spec's tensor degree")
    p.add_argument("--alone", type=int, default=None, metavar="N", help="the first of N ranks, without the others")
    p.add_argument("--wire", type=wire_times, nargs="+", default=[], metavar="ALPHA,BETA", help="with --alone")
    p.add_argument("--occupy", type=int, default=0, metavar="N", help="multiprocessors that a collective takes")
    p.add_argument("--overlap", nargs="+", default=["false"], choices=list(OVERLAP), help="the spec's overlap")
    p.add_argument("--spec", default="specs/gpt2-1.2b.yaml")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="the model's constructor")
    p.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1])
    p.add_argument("--compile", nargs="+", default=["layers"], choices=["none", "layers", "whole"])
    p.add_argument("--graphs", default=True, action=argparse.BooleanOptionalAction, help="a step as CUDA graphs")
    p.add_argument("--recompute", default="none", choices=["none", "layer", "attention"])
    p.add_argument("--precision", default="bf16", choices=["bf16", "fp16", "fp32"])
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--micro-batch", type=int, default=None)
    p.add_argument("--sequence", type=int, default=1024)
    p.add_argument("--steps", type=int, default=20, help="timed ones")
    p.add_argument("--warm-up", type=int, default=5)
    p.add_argument("--device", default=None, choices=["cuda", "cpu"])
    p.add_argument(
        "--initial", default="device", choices=["device", "constructor"], help="N(0, 0.02) at once, or the model's own"
    )
    p.add_argument("--profile", action="store_true", help="what takes longest over 3 steps, host and device, on stderr")
    return p.parse_args()


def wire_times(text: str) -> tuple[float, float]:
    """`50,300`"""
    alpha, beta = map(float, text.split(","))
    return alpha, beta


def alone(size: int, device: str | None, wired: bool) -> tuple[Place, Wire | None]:
    """The first of `size` ranks of one tensor group, whose collectives reach nobody."""
    cuda = device == "cuda" or (device is None and torch.cuda.is_available())
    wire = Wire.install(size) if wired else None
    if wire is None:
        dist.init_process_group("nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    world = dist.group.WORLD.group_name
    beside = world if wire is None else wire.another("beside").group_name

    def from_env(mesh: Mesh, *_: Any, **__: Any) -> Ranks:
        asked: set[tuple[str, ...]] = set()

        def connect(over: tuple[str, ...]) -> ProcessGroup:
            name = beside if over in asked else world  # `Ranks.beside` asks again
            asked.add(over)
            return ProcessGroup(name, mesh.degree(over), 0, over, tuple(range(mesh.degree(over))))

        return Ranks(mesh, 0, connect)

    Ranks.from_env = from_env  # type: ignore[method-assign, assignment]
    return Place(0, size, 0, torch.device("cuda", 0) if cuda else torch.device("cpu"), Board()), wire


def build(a: argparse.Namespace, place: Place, dropout: float | None, compile: str, overlap: bool | str) -> TrainingRun:
    """A run, set up. `dropout` None: the model has no setting of that name."""
    spec = Spec.load(a.spec).with_(overlap=overlap)
    if a.tensor is not None:
        spec = spec.with_(mesh={"tensor": a.tensor})
    total = a.warm_up + a.steps + 4
    spec = spec.with_(
        model={**spec.model, **({} if dropout is None else {"dropout": dropout})},
        train={
            "steps": total,
            "batch": a.batch,
            "micro_batch": a.micro_batch or a.batch,
            "sequence": a.sequence,
            "precision": a.precision,
            "compile": compile,
            "cuda_graphs": a.graphs,
            "activation_checkpointing": a.recompute,
            "schedule": {"warmup": 2},
            "evaluation": {"every": 0},
            "data": {"labels": "same" if a.model.startswith("hf:") else "next"},
        },
    )
    loaded = load_model(a.model, spec, parse_settings(a.set))
    run = set_up(loaded, spec, spec.section(Train), place, None, lambda line: print(line, file=sys.stderr, flush=True))
    engine = run.engine
    if a.initial == "constructor":
        engine.fill(from_constructor(lambda name: engine.compiled.recorded.replay(name, spec.seed)))
    else:
        torch.manual_seed(0)
        with torch.no_grad():
            for name, master in engine.storage.masters.items():
                values = local(master)
                values.fill_(1.0 if "weight" in name else 0.0) if values.dim() < 2 else values.normal_(std=0.02)
            engine.storage.publish()
    return run


def measure(
    a: argparse.Namespace, place: Place, dropout: float, compile: str, overlap: bool | str, wire: Wire | None
) -> dict[str, Any]:
    start = time.perf_counter()
    run = build(a, place, dropout, compile, overlap)
    engine, device = run.engine, run.place.device
    cuda = device.type == "cuda"
    set_up_seconds = time.perf_counter() - start

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()

    batches = [[run.batches.batch_at(s, m).to(device) for m in range(run.batches.micro_batches(1))] for s in range(8)]
    losses, times, host, first, on_wire = [], [], [], 0.0, 0.0
    for step in range(a.warm_up + a.steps):
        wait()
        before = wire.total if wire else 0.0
        begin = time.perf_counter()
        outcome = engine.step(step, batches[step % len(batches)])
        issued = time.perf_counter() - begin
        wait()
        seconds = time.perf_counter() - begin
        losses.append(float(outcome.loss))
        if step == 0:
            first, on_wire = seconds, (wire.total if wire else 0.0) - before
        if step >= a.warm_up:
            times.append(seconds)
            host.append(issued)
    begin = time.perf_counter()  # without waiting between steps, as in a run
    for step in range(a.warm_up + a.steps, a.warm_up + a.steps + 4):
        engine.step(step, batches[step % len(batches)])
    wait()
    together = (time.perf_counter() - begin) / 4
    if a.profile:
        profile(run, batches, a.warm_up + a.steps)
    seconds = statistics.median(times)
    flops = flops_of(run, batches[0][0])
    seen = traced(lambda: engine.step(a.warm_up + a.steps, batches[0]))[0] if cuda and run.place.world > 1 else None
    peak = peak_tflops(torch.cuda.get_device_name() if cuda else "", a.precision)
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "spec": a.spec,
        "settings": a.set,
        "tensor": run.place.world,
        "alone": a.alone is not None,
        "parameters_a_rank": sum(p.numel() for p in engine.storage.masters.values()),
        "overlap": overlap,
        "traced": None if seen is None else seen.as_dict(),  # communication beside computation, by the profiler
        "ms_on_wire": round(on_wire * 1e3, 3),  # what the step's collectives take together
        "dropout": dropout,
        "compile": compile,
        "graphs": engine.recorded,
        "recompute": a.recompute,
        "precision": a.precision,
        "batch": a.batch,
        "micro_batches": len(batches[0]),
        "sequence": a.sequence,
        "ms_step": round(seconds * 1e3, 3),
        "ms_step_unwaited": round(together * 1e3, 3),
        "ms_host": round(statistics.median(host) * 1e3, 3),  # until all of a step was issued
        "ms_step_min_max": [round(min(times) * 1e3, 3), round(max(times) * 1e3, 3)],
        "tflops": round(flops / seconds / place.world / 1e12, 2),
        "tflops_unwaited": round(flops / together / place.world / 1e12, 2),
        "peak_fraction": None if peak is None else round(flops / seconds / place.world / 1e12 / peak, 4),
        "flops_a_step": flops,
        "memory_gib": round(peak_memory(device) / 2**30, 2),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "set_up_s": round(set_up_seconds, 1),
        "first_step_s": round(first, 1),
    }


def flops_of(run: TrainingRun, batch: Any) -> float:
    """Model FLOPs of a step of all ranks."""
    compiled, train = run.engine.compiled, run.train
    names = zip(compiled.capture.inputs, compiled.takes, strict=True)
    shapes = {placeholder: tuple(batch.tensors[name].shape) for placeholder, name in names}
    tokens = batch.rows * train.sequence
    return flops_per_token(compiled.capture.graph, shapes, tokens) * train.batch * train.sequence


def profile(run: TrainingRun, batches: list[Any], step: int) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profiler(activities=kinds) as p:
        for i in range(3):
            run.engine.step(step + i, batches[i % len(batches)])
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    keys = ["self_cpu_time_total", *(["self_device_time_total"] if torch.cuda.is_available() else [])]
    for key in keys:
        print(p.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=70), file=sys.stderr, flush=True)


def main() -> None:
    a = arguments()
    wire = None
    if a.alone is not None:
        a.tensor = a.alone
        place, wire = alone(a.alone, a.device, bool(a.wire))
    else:
        place = join(a.tensor or Spec.load(a.spec).ranks.size, a.device)
    for compile in a.compile:
        for dropout in a.dropout:
            for overlap in a.overlap:
                variant(a, place, wire, dropout, compile, OVERLAP[overlap])
    if dist.is_initialized():
        dist.destroy_process_group()


def variant(
    a: argparse.Namespace, place: Place, wire: Wire | None, dropout: float, compile: str, overlap: bool | str
) -> None:
    """Prints a variant's lines: without a wire, then with each."""
    free = 0.0
    for times in [None, *a.wire]:
        if wire is not None:
            wire.set(*(times or ()), multiprocessors=a.occupy)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        found = measure(a, place, dropout, compile, overlap, wire)
        found |= {"wire": times, "occupy": a.occupy}
        if times is None or place.device.type != "cuda":
            free = found["ms_step"]
        else:
            found["hidden"] = round(1 - (found["ms_step"] - free) / found["ms_on_wire"], 3)
        if place.rank == 0:
            print(json.dumps(found), flush=True)
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
