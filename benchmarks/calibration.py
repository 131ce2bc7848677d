"""The cost model beside measurements, and beside the paper.

    python benchmarks/calibration.py            # every recorded figure of benchmarks/results
    python benchmarks/calibration.py calibration.json
    python benchmarks/calibration.py --paper    # weak scaling of the paper's four sizes on DGX-2H

One JSON object a line: predicted and measured milliseconds and GiB, and the paper's efficiencies in per cent. No GPU is
needed; a model is captured once for each spec. A figure recorded on a wire is predicted with that wire's α and β; the
share that overlap hides is the one measured at 16 occupied multiprocessors, or `HIDDEN_FREE` where none was occupied.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tpcompiler.api import shard
from tpcompiler.capture import capture
from tpcompiler.cost.predict import CostModel, ParallelLayout, Prediction
from tpcompiler.load.model import load_model
from tpcompiler.search.planner import Question, search
from tpcompiler.spec.schema import Spec

RESULTS = Path(__file__).with_name("results")
HIDDEN_FREE = 0.86  # of the backward collectives, on a wire that occupies no multiprocessor (overlap.json)
SIZES = {"1.2b": (1, 1), "2.5b": (2, 2), "4.2b": (4, 4), "8.3b": (8, 8)}  # spec → the paper's tensor degree
PAPER = {"1.2b": (100, 96), "2.5b": (95, 83), "4.2b": (82, 79), "8.3b": (77, 74)}  # figure 5: model, model + data


def recorded(files: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of `train_gpu.py` whose steps the device bounds, and not the host that issues them."""
    for path in sorted(RESULTS.rglob("*.json*")):
        if files and path.name not in files:
            continue
        text = path.read_text()
        lines = [line for line in text.splitlines() if line.startswith('{"device"')]
        rows = [json.loads(line) for line in lines]
        if not rows and path.suffix == ".json":
            rows = found.get("rows", []) if isinstance(found := json.loads(text), dict) else []
        for row in rows:
            if "ms_step" not in row or "spec" not in row:
                continue
            host = row.get("ms_host") or (0.0 if row["tensor"] == 1 else row["ms_step"])  # early rows do not say it
            if host < 0.9 * row["ms_step"]:
                yield {**row, "file": str(path.relative_to(RESULTS))}


@cache
def compiled(spec: str, tensor: int, dropout: float) -> CostModel:
    read = Spec.load(spec).with_(overlap=True, mesh={"tensor": tensor})
    loaded = load_model("models/gpt2.py", read, {"dropout": dropout})
    with loaded.environment:
        made = shard(loaded.build, loaded.inputs(batch=2), read)
    return CostModel(made.program, made.plan)


def predicted(row: dict[str, Any]) -> Prediction:
    name = "h200" if "H200" in row["device"] else "h100"
    machine = Spec.load({"mesh": {"tensor": 1}, "hardware": name}).hardware
    alpha, beta = row.get("wire") or ((0.0, 1e9) if row.get("alone") else (machine.alpha_us, machine.beta_gbps))
    degree = row["tensor"]
    rate = beta * 2 * (degree - 1) / degree if degree > 1 else beta  # the wire's rate is of the value's bytes
    hidden = machine.hidden if row.get("occupy") else HIDDEN_FREE
    machine = machine.model_copy(update={"alpha_us": alpha, "beta_gbps": rate, "hidden": hidden})
    micro = row["batch"] // row.get("micro_batches", 1)
    layout = ParallelLayout(degree, 1, micro, row.get("recompute", "none"), bool(row.get("overlap")))
    model = compiled(row["spec"], degree, row.get("dropout", 0.0))
    return model.predict(layout, machine, row["batch"], row["sequence"])


def against_results(files: list[str]) -> None:
    for row in recorded(files):
        p = predicted(row)
        shown = {k: row.get(k) for k in ("file", "device", "spec", "tensor", "recompute", "overlap", "wire", "dropout")}
        gib = p.memory.total / 2**30
        shown |= {"ms": row["ms_step"], "ms_predicted": round(p.seconds * 1e3, 1)}
        shown |= {"ms_off": round(p.seconds * 1e3 / row["ms_step"] - 1, 3)}
        shown |= {"gib": row["memory_gib"], "gib_predicted": round(gib, 2)}
        shown |= {"gib_off": round(gib / row["memory_gib"] - 1, 3)}
        print(json.dumps(shown), flush=True)


def against_paper() -> None:
    """Batch 8 on one group; 64 such groups of whole copies with 512 sequences (§5.1), with recomputation as there."""
    machine = Spec.load({"mesh": {"tensor": 1}, "hardware": "dgx-2h"}).hardware
    base: dict[int, float] = {}
    for size, (degree, gpus) in SIZES.items():
        spec = Spec.load(f"specs/gpt2-{size}.yaml").with_(mesh={"tensor": min(degree, 2)})
        loaded = load_model("models/gpt2.py", spec, {})
        with loaded.environment:
            captured = capture(loaded.build, loaded.inputs(batch=2), source=loaded.source)
        for groups in (1, 64):
            question = Question(gpus * groups, 8 * groups, 1024, machine, whole=True)
            answer = search(captured, spec, question)
            best = answer.best
            base.setdefault(1, best.tflops)
            row = {"size": size, "gpus": question.gpus, "chosen_tensor": best.layout.tensor, "paper_tensor": degree}
            row |= {"micro": best.layout.micro, "recompute": best.layout.recompute, "tflops": round(best.tflops, 1)}
            row |= {"scaling": round(100 * best.tflops / base[1]), "paper": PAPER[size][groups > 1]}
            row |= {"gib": round(best.memory.total / 2**30, 1), "search_seconds": round(answer.seconds, 1)}
            print(json.dumps({**row, "lost": [why for _, why in answer.degrees if why][:3]}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="of benchmarks/results; all if none is named")
    parser.add_argument("--paper", action="store_true")
    given = parser.parse_args()
    against_paper() if given.paper else against_results(given.files)
