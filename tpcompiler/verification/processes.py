"""Runs what `tpc shard -o` writes: the emitted source with the written weights, each rank in a process of its own.

The processes import nothing of the compiler (`tpcompiler.runtime.worker`). The parent compares their results.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tpcompiler.errors import TpcError
from tpcompiler.runtime.mesh import Mesh
from tpcompiler.runtime.worker import CALL, ERRORS, LONGEST, RESULT
from tpcompiler.spec.located import one_line
from tpcompiler.verification.against_model import Batch, Case, Comparison, Results, cotangent, local_slice
from tpcompiler.verification.emitted import ForwardArguments, call_of

LIMIT = 900.0  # seconds that the processes may take
WAIT = 300.0  # seconds that a rank waits for the others in a collective
ALLOWED = ("tpcompiler", "tpcompiler.errors", "tpcompiler.runtime")  # what a program may import


def processes_case(run: Comparison, batches: Sequence[Batch], state: Mapping[str, Tensor] | None = None) -> Case:
    """Compares outputs, and gradients accumulated over the batches, of the emitted program in processes.

    `state` has the whole model's values that are written, by default those of `run`. Raises `TpcError` when a rank
    fails or does not end in time. Then all ranks are ended, and nothing is left on disk.
    """
    sharded, state = run.sharded, run.state if state is None else state
    capture, mesh = sharded.capture, sharded.program.mesh
    plain = run.plain(batches)
    with tempfile.TemporaryDirectory(prefix="tpc-verify-") as directory:
        program = Path(directory, "program")
        sharded.write(program, {p.name: state[p.name] for p in capture.parameters if p.persistent})
        cotangents = _cotangents(run, plain, len(batches)) if run.backward else None
        found = run_processes(program, mesh, [call_of(capture, b) for b in batches], cotangents, dtype=run.dtype)
    errors, notes = run.compare(plain, [Results(r.outputs, r.gradients) for r in found])
    foreign = {m for r in found for m in r.imported if not (m in ALLOWED or m.startswith("tpcompiler.runtime."))}
    notes += [f"the program imported {m}" for m in sorted(foreign)]
    tolerance = run.tolerance
    return Case(f"the emitted program in {mesh.size} processes ({backend_for(mesh)})", errors, tolerance, tuple(notes))


def _cotangents(run: Comparison, plain: Results, batches: int) -> list[list[list[Tensor | None]]]:
    """For each rank and batch, the gradient of `probe` with respect to each output. Where an output stays sharded, it
    is the rank's part."""
    mesh = run.sharded.program.mesh
    n = len(plain.outputs) // batches
    out = []
    for rank in range(mesh.size):
        coords = mesh.coords(rank)
        mine: list[Tensor | None] = []
        for i, x in enumerate(plain.outputs):
            whole = cotangent(i % n, x.shape, x.dtype) if isinstance(x, Tensor) and x.is_floating_point() else None
            mine.append(None if whole is None else local_slice(whole, run.output_dims(i), mesh, coords).contiguous())
        out.append([mine[i : i + n] for i in range(0, len(mine), n)])
    return out


@dataclass(frozen=True)
class Found:
    """The results of one rank: the outputs of all calls in one list, and gradients under every name of a parameter."""

    outputs: list[Any]
    gradients: dict[str, Tensor | None]
    imported: list[str]


def backend_for(mesh: Mesh) -> str:
    """`nccl` if every rank can have a GPU of its own, else `gloo`."""
    return "nccl" if torch.cuda.is_available() and torch.cuda.device_count() >= mesh.size else "gloo"


def run_processes(
    program: Path | str,
    mesh: Mesh,
    calls: Sequence[ForwardArguments],
    cotangents: Sequence[Sequence[Sequence[Tensor | None]]] | None = None,
    *,
    dtype: torch.dtype | None = None,
    limit: float = LIMIT,
) -> list[Found]:
    """Runs a written program in evaluation mode, each rank in a process of its own.

    `program` is a directory with `model.py`, manifest and weights. `cotangents` has a gradient for each rank, call and
    output; with None, there is no backward. `dtype` converts floating-point parameters. The run may take `limit`
    seconds. Raises `TpcError`, which names the first rank that failed and the last line that it wrote. No process
    outlives the call.
    """
    with tempfile.TemporaryDirectory(prefix="tpc-ranks-") as directory:
        work = Path(directory)
        for rank in range(mesh.size):
            given = {
                "mesh": list(mesh.dims),
                "backend": backend_for(mesh),
                "timeout": min(WAIT, limit),
                "dtype": dtype,
                "batches": list(calls),
                "cotangents": None if cotangents is None else [list(c) for c in cotangents[rank]],
            }
            torch.save(given, work / CALL.format(rank=rank))
        # The parent holds the store, so that no other process can take the port between its choice and its use.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(mesh.size):
                processes.append(_start(Path(program).resolve(), work, rank, mesh.size, store.port))
            _wait(processes, work, mesh, limit)
        finally:
            for p in processes:
                p.kill()
            for p in processes:
                p.wait()
        results = [torch.load(work / RESULT.format(rank=r), weights_only=True) for r in range(mesh.size)]
    return [Found(**r) for r in results]


def _start(program: Path, work: Path, rank: int, size: int, port: int) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).parents[2])
    env = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // size)),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), root))),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # as under torchrun: ranks use the parent's store
    }
    if "lo" in [name for _, name in _interfaces()]:
        env["GLOO_SOCKET_IFNAME"] = "lo"  # so that it works on a host whose own name does not resolve
    command = [sys.executable, "-P", "-m", "tpcompiler.runtime.worker", str(program), str(work)]
    with open(work / ERRORS.format(rank=rank), "wb") as errors:
        return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors)


def _interfaces() -> list[tuple[int, str]]:
    import socket

    return socket.if_nameindex() if hasattr(socket, "if_nameindex") else []


def _wait(processes: Sequence[subprocess.Popen[bytes]], work: Path, mesh: Mesh, limit: float) -> None:
    """Waits until all ranks have ended. Raises `TpcError` for the first that fails, since others then fail as well."""
    stop = time.monotonic() + limit
    while True:
        codes = [p.poll() for p in processes]
        failed = [r for r, code in enumerate(codes) if code]
        if failed:
            time.sleep(0.05)  # the ranks' last lines reach their files
            first = min(failed, key=lambda r: (work / ERRORS.format(rank=r)).stat().st_mtime_ns)
            raise TpcError(f"rank {first} of {mesh} ended with status {codes[first]}: {_last_line(work, first)}")
        if all(code == 0 for code in codes):
            return
        if time.monotonic() > stop:
            running = [r for r, code in enumerate(codes) if code is None]
            many = f"ranks {', '.join(map(str, running))}" if len(running) > 1 else f"rank {running[0]}"
            raise TpcError(f"{many} of {mesh} did not end in {limit:.0f} s: {_last_line(work, running[0])}")
        time.sleep(0.02)


def _last_line(work: Path, rank: int) -> str:
    text = (work / ERRORS.format(rank=rank)).read_text(errors="replace").strip()
    return one_line(text.splitlines()[-1], LONGEST) if text else "it wrote nothing"
