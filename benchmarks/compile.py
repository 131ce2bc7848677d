"""Time and memory of a compilation: by size of the model, by number of layers, by degree. No GPU, no weights.

    python benchmarks/compile.py [--out out/compile.json] [--only NAME …]

Every case runs in a process of its own, so that its peak memory is its own. Seconds are wall clock.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GPT3 = {"vocab": 51200, "positions": 2048, "hidden": 12288, "heads": 96, "layers": 96}
GPT2 = {"vocab": 51200, "positions": 1024, "hidden": 3072, "heads": 32}
LLAMA_405B = {"vocab": 128256, "positions": 8192, "hidden": 16384, "heads": 128, "kv_heads": 8, "layers": 126}

CASES: dict[str, tuple[str, dict[str, int], int]] = {
    "GPT-2 8.3B, 8-way": ("gpt2", {**GPT2, "layers": 72}, 8),
    "GPT-3 175B, 8-way": ("gpt2", GPT3, 8),
    "Llama-3.1 405B, 8-way": ("llama", {**LLAMA_405B, "intermediate": 53248}, 8),
    "Llama-3.1 405B, 16-way": ("llama", {**LLAMA_405B, "intermediate": 53248}, 16),
    **{f"GPT-2, {n} layers, 8-way": ("gpt2", {**GPT2, "layers": n}, 8) for n in (6, 12, 24, 48)},
    **{f"GPT-2, 12 layers, {d}-way": ("gpt2", {**GPT2, "heads": 512, "layers": 12}, d) for d in (2, 32, 128, 512)},
}


def measure(name: str) -> dict[str, Any]:
    """One case, in this process."""
    sys.path.insert(0, str(ROOT))
    from importlib import import_module

    model, sizes, degree = CASES[name]
    module = import_module(f"models.{model}")
    started = time.perf_counter()
    import tpcompiler as tpc
    from tpcompiler.check import check

    imported = time.perf_counter()
    sharded = tpc.shard(
        lambda: module.Model(**sizes), module.example_inputs(vocab=sizes["vocab"]), {"mesh": {"tensor": degree}}
    )
    source = sharded.source
    report = check(sharded.program, source=source)
    ended = time.perf_counter()
    return {
        "case": name,
        "parameters": sum(p.bytes // p.dtype.itemsize for p in sharded.capture.parameters if not p.buffer),
        "degree": degree,
        "nodes": len(sharded.program.graph.nodes),
        "lines": source.count("\n"),
        "import_seconds": round(imported - started, 2),
        "seconds": {**{k: round(v, 2) for k, v in sharded.seconds.items()}, "check": round(report.seconds, 2)},
        "total_seconds": round(ended - imported, 2),
        "distinct_steps": report.distinct_steps,
        "passed": report.passed,
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/compile.json"))
    parser.add_argument("--only", nargs="*", default=list(CASES))
    parser.add_argument("--one", choices=list(CASES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    import torch

    rows = []
    for name in arguments.only:
        done = subprocess.run([sys.executable, __file__, "--one", name], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
        rows.append(json.loads(done.stdout))
        row = rows[-1]
        check = row["seconds"]["check"]
        print(f"{name:28} {row['total_seconds']:7.1f} s  check {check:5.1f} s  {row['peak_mib']:6} MiB")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    about = {"torch": torch.__version__, "python": platform.python_version(), "cpu": platform.machine()}
    arguments.out.write_text(json.dumps({**about, "cases": rows}, indent=1))


if __name__ == "__main__":
    main()
