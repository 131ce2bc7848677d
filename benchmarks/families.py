"""Every family of transformers, tiny, compiled and verified: what is split, what is not and why, what is refused.

    python -m benchmarks.families [NAME ...] [--task TASK] [--out FILE] [--timeout SECONDS] [--again STATUS ...]
    python -m benchmarks.families --table FILE      the result as the table of docs/families.md

One process a family, one after the other. The result file is JSON, written after every family: a sweep that was
stopped goes on where it was. Takes about ten seconds a family: nightly, not a test.

A family's status is one of
    full       the matrices of its layers are split (95 % of their bytes or more); outputs and gradients are the plain
               model's, and the checker has proved the program
    partial    the same, but more stays whole (`whole` says what, and why)
    refused    nothing can be split
    untraced   transformers cannot build it this small, or torch.export cannot trace it
    crashed    the compiler itself failed: a bug
    unproved   all numbers are right, but the checker refuses the program: a bug, most likely the checker's
    wrong      a number differs: a bug
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

DEGREES = (2, 4)
WHOLE = 0.95  # of the layers' bytes, to be called fully split: a router or a gate of a few rows stays whole on purpose
LARGEST = 10_000_000  # parameters
Result = dict[str, Any]


def measured(name: str) -> Result:
    """One family at every degree, in this process."""
    import torch
    import transformers

    from tests.hf import FAMILIES, inputs
    from tpcompiler.capture import capture
    from tpcompiler.errors import TpcError

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    family = FAMILIES[name]
    out: Result = {"architecture": family.architecture, "degrees": {}}
    start = time.monotonic()
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in family.build().parameters())
        example = inputs(family)
    except Exception as e:
        return out | {"status": "untraced", "why": f"cannot be built: {_said(e)}"}
    if size > LARGEST:
        return out | {"status": "untraced", "why": f"has {size:,} parameters at its smallest"}
    try:
        captured = capture(family.build, example)
    except Exception as e:
        return out | {"status": "untraced", "why": _said(e)}
    for degree in DEGREES:
        try:
            found = _at(family.build, example, captured, degree)
        except TpcError as e:
            found = {"status": "refused", "why": _said(e)}
        except Exception as e:
            found = {"status": "crashed", "why": _said(e)}
        out["degrees"][str(degree)] = found
    worst = ("wrong", "unproved", "crashed", "refused", "partial", "full")
    status = min((d["status"] for d in out["degrees"].values()), key=worst.index)
    return out | {"status": status, "seconds": round(time.monotonic() - start, 1)}


def _at(build: Any, example: Any, captured: Any, degree: int) -> Result:
    from tpcompiler.api import compile_capture
    from tpcompiler.spec.schema import Spec
    from tpcompiler.verification.verify import verify

    spec = Spec.load({"mesh": {"tensor": degree}})
    sharded = compile_capture(captured, spec)
    report = verify(build, example, spec)
    whole = {r.name: r.reason for r in sharded.plan.replicated if _matrix(sharded, r.name)}
    used = {n.name for n in sharded.capture.graph.nodes if n.op == "placeholder" and n.users}
    parameters = [p for p in sharded.capture.parameters if not p.buffer and p.node in used]
    layers = [p for p in parameters if len(p.shape) > 1 and _layer(p.name)]
    size = sum(p.bytes for p in layers)
    split = sum(p.bytes for p in layers if p.name not in whole)
    status = "full" if split >= WHOLE * size else "partial"
    if not report.passed:
        status = "unproved" if all(c.passed for c in report.cases) else "wrong"
    return {
        "status": status,
        "error": report.max_rel_error,
        "fraction": round(sharded.sharded_fraction, 4),
        "layers": round(split / size, 4) if size else 1.0,
        "reductions": _reductions(sharded),
        "whole": whole,
        "marks": _ops(sharded),
        **({} if report.passed else {"why": f"{report} {report.check.get('refused', '')}"}),
    }


def _matrix(sharded: Any, name: str) -> bool:
    return any(p.name == name and len(p.shape) > 1 for p in sharded.capture.parameters)


def _layer(name: str) -> bool:
    """Whether a parameter stands in a layer: one of a numbered list of modules."""
    return any(part.isdigit() for part in name.split("."))


def _reductions(sharded: Any) -> dict[str, dict[str, int]]:
    """All-reduces of activations by direction, a layer: the layer's name is what stands up to its first number."""
    nodes = {n.name: n for n in sharded.program.graph.nodes}
    parameters = {p.node for p in sharded.capture.parameters}
    out: dict[str, Counter[str]] = {}
    for c in sharded.program.collectives:
        node = nodes[c.node]
        source = node.args[0] if node.args else None
        if c.kind != "all_reduce" or getattr(source, "name", None) in parameters:
            continue
        parts = node.meta.get("module", "").split(".")
        at = next((i for i, p in enumerate(parts) if p.isdigit()), None)
        out.setdefault(c.direction, Counter())["model" if at is None else ".".join(parts[: at + 1])] += c.count
    return {k: dict(v) for k, v in out.items()}


def _ops(sharded: Any) -> dict[str, int]:
    """What keeps axes of matrices whole that are not split: the op's words, how often."""
    whole = {r.name for r in sharded.plan.replicated if _matrix(sharded, r.name)}
    counts = Counter(m.why for f in sharded.plan.facts.axes.values() if whole & {*f.parameters} for m in f.marks)
    return dict(counts.most_common())


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:600]


def sweep(names: Iterable[str], out: Path, timeout: float) -> None:
    results: dict[str, Result] = json.loads(out.read_text()) if out.exists() else {}
    for name in names:
        results[name] = _in_process(name, timeout)
        _write(out, results)
        r = results[name]
        fractions = " ".join(f"{d.get('layers', 0):.2f}" for d in r.get("degrees", {}).values())
        print(f"{r['status']:9} {fractions:10} {name}  {r.get('why', '')}", flush=True)


def _in_process(name: str, timeout: float) -> Result:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.families", "--one", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_OFFLINE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return {"status": "untraced", "why": f"took longer than {timeout:.0f} s", "degrees": {}}
    lines = [x for x in done.stdout.splitlines() if x.startswith("{")]
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {"status": "crashed", "why": last[:600], "degrees": {}}
    return json.loads(lines[-1])


def _write(path: Path, results: Mapping[str, Result]) -> None:
    """One JSON object, a family a line, so that a diff shows which families have changed."""
    lines = (f"{json.dumps(name)}: {json.dumps(result, sort_keys=True)}" for name, result in sorted(results.items()))
    new = path.with_suffix(".new")
    new.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    new.replace(path)


def table(results: Mapping[str, Result]) -> str:
    """Markdown: a row a family, and the counts."""
    rows = [
        "| family | status | layers split, 2 / 4 ranks | all-reduces a layer, forward + backward | stays whole |",
        "|---|---|---|---|---|",
    ]
    for name, r in sorted(results.items()):
        degrees = [r["degrees"].get(str(d), {}) for d in DEGREES] if r.get("degrees") else []
        fractions = " / ".join(f"{100 * d['layers']:.0f} %" if "layers" in d else "–" for d in degrees)
        first = degrees[0] if degrees else {}
        rows.append(f"| {name} | {r['status']} | {fractions} | {_per_layer(first)} | {_told(r, first)} |")
    counts = Counter(r["status"] for r in results.values())
    head = ", ".join(f"{n} {status}" for status, n in counts.most_common())
    return f"{len(results)} families: {head}.\n\n" + "\n".join(rows) + "\n"


def _per_layer(found: Result) -> str:
    def most(direction: str) -> str:
        counts = {n for layer, n in found["reductions"].get(direction, {}).items() if layer != "model"}
        return "–".join(str(n) for n in sorted({min(counts), max(counts)})) if counts else "0"

    return f"{most('forward')} + {most('backward')}" if "reductions" in found else ""


def _told(result: Result, found: Result) -> str:
    if "why" in result or "why" in found:
        lines = str(result.get("why", found.get("why", ""))).splitlines() or [""]
        return lines[0].replace("|", "\\|")[:160]
    names = [n for n in found.get("whole", {}) if _layer(n)]
    reason = found["whole"][names[0]].split(";")[-1].strip() if names else ""
    return f"{names[0]} …: {reason}".replace("|", "\\|")[:160] if names else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="families as KIND or KIND:TASK; left out: all")
    parser.add_argument("--task", help="only families of this task")
    parser.add_argument("--out", type=Path, default=Path("out/families.json"))
    parser.add_argument("--timeout", type=float, default=240.0)
    parser.add_argument("--again", nargs="*", default=[], help="measure anew what has one of these statuses")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--table", type=Path, help="print the table of a result file")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measured(args.one)))
        return
    if args.table:
        print(table(json.loads(args.table.read_text())), end="")
        return
    from tests.hf import FAMILIES

    chosen = [
        n
        for n, f in FAMILIES.items()
        if args.task in (None, f.task) and (not args.names or {n, f.kind} & {*args.names})
    ]
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if not args.names:
        chosen = [n for n in chosen if n not in known or known[n]["status"] in args.again]
    sweep(chosen, args.out, args.timeout)


if __name__ == "__main__":
    main()
