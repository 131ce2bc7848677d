"""Other people's modules (`other_modules.txt`), compiled and verified: what is split, what is not and why, what fails.

    python -m benchmarks.compatibility --environment DIR     makes the environment: a venv with torch and the packages
    python -m benchmarks.compatibility [NAME ...] [--out FILE] [--again STATUS ...] [--environment DIR]
    python -m benchmarks.compatibility --table FILE          the result as docs/compatibility.md

The environment is one of its own, so that no package changes the versions that the tests run with; this script starts
its Python for each module, one process after the other. The result file is JSON, a line for each module, written after
every one: a sweep that was stopped goes on where it was.

A module's status is one of
    full       95 % of the bytes of its layers' matrices are split; outputs and gradients are the plain module's, and
               the checker has proved the program
    partial    the same, but more stays whole
    refused    nothing can be split
    untraced   torch.export cannot trace it, or capture refuses it
    slow       compiling takes more than 60 seconds
    crashed    the compiler itself failed: a bug
    unproved   all numbers are right, but the checker refuses the program: a bug
    wrong      a number differs: a bug
    unbuilt    the package's own constructor or forward fails: the line in `other_modules.txt` is wrong
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.families import _reductions, _said, _write

ROOT = Path(__file__).parent.parent
DEGREE = 2
WHOLE = 0.95
COMPILE = 60.0  # seconds of the processor, so that a busy machine does not count
LIMIT = 900.0  # seconds, with the verification
Result = dict[str, Any]

# Without their dependencies, which would replace torch; those that are needed come after, by name.
PACKAGES = """x-transformers==2.31.10 litgpt==0.5.13 timm==1.0.31 torchvision==0.28.0 vit-pytorch==1.26.11
open_clip_torch==3.3.0 fair-esm==2.0.0 diffusers==0.42.1 peft==0.21.2 curated-transformers==2.0.1 torchaudio==2.11.0
speechbrain==1.1.2 local-attention==1.11.2 performer-pytorch==1.1.4 linformer==0.2.3 perceiver-pytorch==0.11.0
mambapy==1.2.0 llms-from-scratch==1.0.19 torchtune==0.6.1 torchao==0.16.0 accelerate lightning torchmetrics
axial-positional-embedding hyper-connections torch-einops-utils curated-tokenizers datasets pandas pyarrow
pytorch-lightning""".split()
NEEDED = """einops einx loguru requests importlib_metadata pillow psutil ftfy hyperpyyaml scipy sentencepiece joblib
catalogue lightning-utilities tiktoken omegaconf soundfile kagglehub blobfile jsonargparse multiprocess dill xxhash
aiohttp python-dateutil pytz transformers pydantic pyyaml networkx typer rich safetensors""".split()


def environment(where: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(where)], check=True)
    pip = [str(where / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    pinned = ["-c", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, *pinned, "torch==2.13.0"], check=True)
    subprocess.run([*pip, "--no-deps", *PACKAGES], check=True)
    subprocess.run([*pip, *pinned, *NEEDED], check=True)


def _without_compiled_parts() -> None:
    """torchvision and torchaudio are built for another torch than the CPU's: their models do without those parts."""
    import importlib.util

    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    globals()["_LIBRARY"] = library
    found = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *a: None if name.startswith("torchaudio.lib") else found(name, *a)


def measured(name: str, quick: bool = False) -> Result:
    """One module, in this process."""
    import torch

    from benchmarks.other_modules import configurations
    from tpcompiler.api import compile_capture
    from tpcompiler.capture import capture
    from tpcompiler.errors import TpcError
    from tpcompiler.spec.schema import Spec

    torch.set_num_threads(1)
    _without_compiled_parts()
    one = configurations()[name]
    try:
        torch.manual_seed(0)
        module, example = one.build(), one.inputs()
    except Exception as e:
        return {"status": "unbuilt", "why": _said(e)}
    start = time.process_time()
    try:
        captured = capture(one.build, example)
    except TpcError as e:
        runs = _runs(module, one.inputs())
        return {"status": "untraced" if runs is None else "unbuilt", "why": runs or _said(e)}
    except Exception as e:
        return {"status": "crashed", "why": _said(e), "at": _ours(e)}
    traced = time.process_time()
    found: Result = {"nodes": len(captured.graph.nodes), "capture": round(traced - start, 1)}
    try:
        spec = Spec.load({"mesh": {"tensor": DEGREE}})
        sharded = compile_capture(captured, spec)
        checked = sharded.check
        found |= _split(sharded) | {"seconds": round(time.process_time() - start, 1)}
        if not checked.passed:
            found["why"] = str(checked.refused[0])
        found["status"] = "" if checked.passed else "unproved"
        if not quick:
            found |= _verified(captured, module, example, spec)
    except TpcError as e:
        return found | {"status": "refused", "why": _said(e)}
    except Exception as e:
        return found | {"status": "crashed", "why": _said(e), "at": _ours(e)}
    if found["seconds"] > COMPILE and found["status"] in ("full", "partial"):
        found["status"] = "slow"
    return found


def _runs(module: Any, example: Any) -> str | None:
    from tpcompiler.capture import split_example

    args, kwargs = split_example(example)
    try:
        module(*args, **kwargs)
    except Exception as e:
        return _said(e)
    return None


def _ours(error: BaseException) -> str:
    """Where the compiler failed: the innermost line of its own."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(str(ROOT / "tpcompiler"))]
    return f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}" if frames else ""


def _split(sharded: Any) -> Result:
    used = {n.name for n in sharded.capture.graph.nodes if n.op == "placeholder" and n.users}
    whole = {r.name: r.reason for r in sharded.plan.replicated}
    matrices = [p for p in sharded.capture.parameters if not p.buffer and len(p.shape) > 1 and p.node in used]
    alike = Counter((re.sub(r"\d+", "*", p.name), p.shape) for p in matrices)  # the same in several layers
    layers = [p for p in matrices if alike[re.sub(r"\d+", "*", p.name), p.shape] > 1] or matrices
    size = sum(p.bytes for p in layers)
    split = sum(p.bytes for p in layers if p.name not in whole) / size if size else 1.0
    reasons = Counter(whole[p.name].split(";")[-1].strip() for p in layers if p.name in whole)
    return {
        "layers": round(split, 4),
        "fraction": round(sharded.sharded_fraction, 4),
        "reductions": _reductions(sharded),
        "whole": {p.name: whole[p.name] for p in layers if p.name in whole},
        "reasons": dict(reasons.most_common()),
    }


def _verified(captured: Any, module: Any, example: Any, spec: Any) -> Result:
    """Every rank and the emitted source in float64, and the graph against the module: outputs and gradients."""
    import torch

    from tpcompiler.api import compile_capture
    from tpcompiler.capture import float64
    from tpcompiler.verification.against_model import Comparison
    from tpcompiler.verification.emitted import emitted_case
    from tpcompiler.verification.source_model import same_as_module
    from tpcompiler.verification.verify import initial_state, inputs_of

    state = initial_state(captured, module, torch.float64, 0)
    run = Comparison(compile_capture(float64(captured), spec), state, torch.float64, True)
    batch = inputs_of(captured, example, torch.float64)
    cases = same_as_module(captured, module, example, True)
    cases += [run.case("outputs and gradients", [batch]), emitted_case(run, [batch])]
    error = max(c.max_rel_error for c in cases[2:])
    wrong = [c for c in cases if not c.passed]
    if not wrong:
        return {"error": error}
    said = "; ".join([f"{wrong[0].worst} {wrong[0].max_rel_error:.1e}", *wrong[0].notes])
    return {"status": "wrong", "why": f"{wrong[0].what}: {said}", "error": error}


def _classified(found: Result) -> Result:
    if found.get("status") == "":
        return found | {"status": "full" if found["layers"] >= WHOLE else "partial"}
    return found


def sweep(names: Iterable[str], out: Path, quick: bool) -> None:
    results: dict[str, Result] = json.loads(out.read_text()) if out.exists() else {}
    for name in names:
        results[name] = _in_process(name, quick)
        _write(out, results)
        r = results[name]
        said = r.get("why", "") or next(iter(r.get("reasons", {})), "")
        print(f"{r['status']:9} {r.get('layers', 0):5.2f} {r.get('seconds', 0):5.1f} s  {name}  {said}", flush=True)


def _in_process(name: str, quick: bool) -> Result:
    """In a process that is a copy of this one, so that torch is imported once."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(send, name, quick))
    child.start()
    send.close()
    try:
        if not receive.poll(LIMIT):
            return {"status": "slow", "why": f"took longer than {LIMIT:.0f} s"}
        return dict(receive.recv())
    except EOFError:
        child.join()
        return {"status": "crashed", "why": f"the process ended with exit status {child.exitcode}"}
    finally:
        child.kill()
        child.join()


def _send(connection: Any, name: str, quick: bool) -> None:
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    connection.send(_classified(measured(name, quick)))


HEAD = """# Other people's modules

{counts}

Made by `make compatibility`: the modules of `benchmarks/other_modules.txt`, tiny, from the packages' releases named in
`benchmarks/compatibility.py`, compiled for {degree} ranks and proven by the checker. Of {compiled} that compile, the
numbers of {compared} were compared in float64, gradients included (all are without `--quick`). "Layers split"
is the part of the bytes of the layers' matrices that is split. "Reductions" are the all-reduces of activations in a
layer, forward + backward (Megatron's layer has 2 + 2). "Seconds" are those of capturing, compiling and checking.
`benchmarks/compatibility.py` says what the statuses mean. The last column names the first weight that stays whole, or
what fails.
"""


def table(results: Mapping[str, Result]) -> str:
    """Markdown: a table for each package, and the counts."""
    known = Counter(r["status"] for r in results.values())
    compiled = [r for r in results.values() if "layers" in r]
    compared = sum("error" in r for r in compiled)
    counts = f"{len(results)} modules: {_counted(known)}."
    out = [HEAD.format(counts=counts, degree=DEGREE, compiled=len(compiled), compared=compared)]
    for package in dict.fromkeys(name.split("/")[0] for name in results):
        here = {n.split("/", 1)[1]: r for n, r in results.items() if n.split("/")[0] == package}
        out.append(f"## {package}\n\n{_counted(Counter(r['status'] for r in here.values()))}\n")
        out.append("| module | status | layers split | reductions | seconds | what stays whole, or fails |")
        out.append("|---|---|---|---|---|---|")
        out += [_row(n, r) for n, r in here.items()]
        out.append("")
    return "\n".join(out)


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {status}" for status, n in sorted(counts.items(), key=lambda c: -c[1]))


def _row(name: str, r: Result) -> str:
    split = f"{100 * r['layers']:.0f} %" if "layers" in r else "–"
    names = list(r.get("whole", {}))
    said = r.get("why") or (f"`{names[0]}`: {r['whole'][names[0]]}" if names and r["status"] == "partial" else "")
    said = " ".join(said.replace("|", "\\|").split())[:200]
    return f"| {name} | {r['status']} | {split} | {_per_layer(r)} | {r.get('seconds', '–')} | {said} |"


def _per_layer(r: Result) -> str:
    def most(direction: str) -> str:
        counts = [n for layer, n in r["reductions"].get(direction, {}).items() if layer != "model"]
        return str(max(counts, default=0))

    return f"{most('forward')} + {most('backward')}" if "reductions" in r else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="modules, or packages; left out: all")
    parser.add_argument("--out", type=Path, default=Path("out/compatibility.json"))
    parser.add_argument("--environment", type=Path, default=Path("out/compatibility-venv"))
    parser.add_argument("--again", nargs="*", default=[], help="measure anew what has one of these statuses")
    parser.add_argument("--quick", action="store_true", help="compile and check, but do not compare numbers")
    parser.add_argument("--table", type=Path, help="print the page of a result file")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())), end="")
        return
    python = args.environment / "bin" / "python"
    if not python.exists():
        environment(args.environment)
    if Path(sys.prefix).resolve() != args.environment.resolve():
        given = {"OMP_NUM_THREADS": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        os.execve(python, [str(python), "-W", "ignore", "-m", __spec__.name, *sys.argv[1:]], os.environ | given)
    import torch

    import tpcompiler.api
    import tpcompiler.verification.verify  # imported before the processes are copied
    from benchmarks.other_modules import configurations

    assert tpcompiler.api is not None
    torch.set_num_threads(1)
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    chosen = [n for n in configurations() if not args.names or {n, n.split("/")[0]} & {*args.names}]
    if not args.names:
        chosen = [n for n in chosen if n not in known or known[n]["status"] in args.again]
    sweep(chosen, args.out, args.quick)


if __name__ == "__main__":
    main()
