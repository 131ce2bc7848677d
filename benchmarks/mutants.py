"""Plants faults in correct programs and counts what the checker lets through.

Every program is checked as it is (a refusal is a false alarm), then with each kind of fault planted at a few places.
Whether a fault changes anything is decided by running: all ranks in one process, in double precision, outputs and every
gradient against the program for one rank, in evaluation and in training. Faults that change something must be refused.

    python benchmarks/mutants.py --sites 2 -o mutants.json
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.node import map_aggregate

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.faults import FAULTS, Fault, copied
from tests.hf import FAMILIES, inputs
from tpcompiler.api import compile_capture
from tpcompiler.capture import capture
from tpcompiler.check import check
from tpcompiler.errors import TpcError
from tpcompiler.execute.interpret import interpret
from tpcompiler.execute.simulate import run_ranks
from tpcompiler.program import Program, Training
from tpcompiler.runtime import Ranks, Rng
from tpcompiler.runtime.runs import take_rows
from tpcompiler.spec.schema import Spec

HUGGING_FACE = tuple(
    f"{name}:{task}"
    for task, names in {
        "causal-lm": "llama qwen3 gpt2 gpt_neox falcon phi3 gemma2 olmo2 mixtral bloom gptj",
        "masked-lm": "bert",
        "seq2seq": "t5",
        "image": "vit",
    }.items()
    for name in names.split()
)
Build = Callable[[], nn.Module]
TOLERANCE = 1e-6  # of the largest value or gradient


@dataclass(frozen=True)
class Case:
    """A model, small, and example inputs."""

    name: str
    build: Build
    inputs: Callable[[], Any]
    degrees: tuple[int, ...] = (2, 3)


def cases() -> Iterator[Case]:
    """The bundled models, odd shapes of them, and the zoo."""
    gpt2, bert, llama = (import_module(f"models.{n}") for n in ("gpt2", "bert", "llama"))
    encoder, seq2seq = (import_module(f"models.{n}") for n in ("encoder", "seq2seq"))
    yield Case(
        "gpt2",
        lambda: gpt2.Model(vocab=101, hidden=32, layers=2, positions=32),
        lambda: gpt2.example_inputs(vocab=101),
        (2, 4),
    )
    yield Case(
        "gpt2, 5 heads",
        lambda: gpt2.Model(vocab=97, hidden=40, heads=5, layers=2, positions=32),
        lambda: gpt2.example_inputs(vocab=97),
        (2, 3),
    )
    yield Case("bert", lambda: bert.Model(vocab=101, hidden=32, layers=2), lambda: bert.example_inputs(vocab=101))
    yield Case(
        "llama",
        lambda: llama.Model(vocab=101, hidden=32, layers=2, intermediate=48),
        lambda: llama.example_inputs(vocab=101),
        (2, 4),
    )
    yield Case(
        "llama, 2 kv heads",
        lambda: llama.Model(vocab=97, hidden=48, heads=6, kv_heads=2, layers=2, intermediate=50),
        lambda: llama.example_inputs(vocab=97),
        (2, 3, 4),
    )
    yield Case(
        "llama, 1 kv head",
        lambda: llama.Model(vocab=90, hidden=40, heads=5, kv_heads=1, layers=2, intermediate=33),
        lambda: llama.example_inputs(vocab=90),
        (2, 3),
    )
    yield Case("encoder", encoder.Model, encoder.example_inputs)
    yield Case("seq2seq", seq2seq.Model, seq2seq.example_inputs)
    for path in sorted((Path(__file__).parent.parent / "tests" / "zoo").glob("[!_]*.py")):
        module = import_module(f"tests.zoo.{path.stem}")
        yield Case(f"zoo/{path.stem}", module.Model, module.example_inputs)
    for name in HUGGING_FACE:
        family = FAMILIES[name]
        yield Case(f"hf/{name}", family.build, lambda family=family: inputs(family), (2,))


def programs(case: Case) -> Iterator[tuple[int, Program, Program]]:
    """(degree, the program, the program for one rank), for each degree that the model can be split over."""
    captured = capture(case.build, case.inputs())

    def at(degree: int) -> Program:
        return compile_capture(captured, Spec.load({"mesh": {"tensor": degree}})).program

    for degree in case.degrees:
        try:
            yield degree, at(degree), at(1)
        except TpcError as e:
            print(f"{case.name} over {degree}: {e}", file=sys.stderr)


# -- whether a fault changes anything ----------------------------------------------------------------------------------


class Reference:
    """Outputs and gradients of the program for one rank, on random weights."""

    def __init__(self, program: Program, inputs: Any, seed: int = 0) -> None:
        program = _calm(program)
        self.capture = program.capture
        generator = torch.Generator().manual_seed(seed)
        self.state = {p.name: _weight(p, generator) for p in program.capture.parameters}
        leaves = [x for x in torch.utils._pytree.tree_leaves(inputs) if isinstance(x, Tensor)]
        self.inputs = [_input(x) for x in leaves]
        self.results = {
            t: run_ranks(program.mesh, lambda ranks, t=t: self._run(program, ranks, t))[0] for t in (False, True)
        }

    def changes(self, mutant: Program) -> bool:
        """Whether any rank's outputs or gradients are others than they should be, or it does not run."""
        try:
            mutant = _calm(mutant)
            for training, (outputs, grads) in self.results.items():
                for r, (mine, local) in enumerate(
                    run_ranks(mutant.mesh, lambda ranks, training=training: self._run(mutant, ranks, training))
                ):
                    if not all(_close(a, b, outputs) for a, b in zip(mine, outputs, strict=True)):
                        return True
                    largest = list(grads.values())
                    for name, grad in grads.items():
                        expected = self._slice(mutant, name, grad, r)
                        if expected.numel() and not _close(local[name], expected, largest):
                            return True
        except Exception:  # it does not run
            return True
        return False

    def _slice(self, program: Program, name: str, value: Tensor, rank: int) -> Tensor:
        for i, dim in enumerate(program.dims.get(name, ())):
            if dim.over:
                value = take_rows(value, i, dim.runs(program.mesh, program.mesh.coords(rank)))
        return value

    def _run(self, program: Program, ranks: Ranks, training: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
        trainable = {p.name for p in self.capture.parameters if not p.buffer and p.trainable}
        state = {}
        for name, value in self.state.items():
            mine = self._slice(program, name, value, ranks.rank).detach().clone()
            state[name] = mine.requires_grad_(name in trainable)
        found = interpret(program, ranks, state, self.inputs, training=training, rng=Rng(7))
        outputs = [x for x in found if isinstance(x, Tensor) and x.is_floating_point()]
        generator = torch.Generator().manual_seed(1)
        loss = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in outputs)
        assert isinstance(loss, Tensor)
        loss.backward()
        zero = {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in state.items() if n in trainable}
        return [x.detach() for x in outputs], zero


def _input(x: Tensor) -> Tensor:
    """In double precision; token 3 stands somewhere among tokens."""
    if x.is_floating_point():
        return x.double()
    if x.dtype == torch.int64 and x.dim() > 1 and int(x.max()) > 3:
        x = x.clone()
        x[-1, -1] = 3
    return x


def _weight(p: Any, generator: torch.Generator) -> Tensor:
    if p.buffer:
        value = p.value
        return value.double() if value.is_floating_point() else value
    noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return noise * 0.3 if len(p.shape) > 1 else noise * 0.1 + 1


def _calm(program: Program) -> Program:
    """In double precision throughout, and without the dropout of attention kernels, which no two runs draw alike."""
    calm = copied(program)
    for n in calm.graph.nodes:
        fused = n.target is torch.ops.aten.scaled_dot_product_attention.default

        def change(a: Any, fused: bool = fused) -> Any:
            if isinstance(a, torch.dtype) and a.is_floating_point:
                return torch.float64
            return 0.0 if fused and isinstance(a, Training) else a

        n.args, n.kwargs = map_aggregate(n.args, change), map_aggregate(n.kwargs, change)
    return calm


def _close(a: Tensor, b: Tensor, among: list[Tensor]) -> bool:
    if a.shape != b.shape:
        return False
    largest = max(float(t.abs().max()) for t in among if t.numel())
    return bool(torch.allclose(a, b, rtol=1e-6, atol=TOLERANCE * largest, equal_nan=True))


# -- counting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """One mutant."""

    case: str
    degree: int
    fault: str
    site: str
    changes: bool
    refused: bool
    why: str
    seconds: float


def judge(case: str, degree: int, program: Program, reference: Reference, fault: Fault, site: Any) -> Verdict:
    """Plant a fault, run it, check it."""
    mutant = fault.plant(program, site)
    changes = reference.changes(mutant)
    start = time.perf_counter()
    report = check(mutant)
    why = str(report.refused[0]) if report.refused else ""
    return Verdict(case, degree, fault.name, str(site), changes, not report.passed, why, time.perf_counter() - start)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--sites", type=int, default=2, help="places a kind of fault is planted at, a program")
    options.add_argument("--only", default="", help="names of cases to take, separated by commas")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("-o", "--output", type=Path)
    given = options.parse_args()
    torch.set_num_threads(1)
    wanted = [w for w in given.only.split(",") if w]
    verdicts: list[Verdict] = []
    alarms: list[str] = []
    checked = 0
    for case in cases():
        if wanted and not any(case.name.startswith(w) for w in wanted):
            continue
        torch.manual_seed(0)
        inputs = case.inputs()
        for degree, program, single in programs(case):
            checked += 1
            report = check(program)
            if not report.passed:
                alarms.append(f"{case.name} over {degree}: {report}")
                print("FALSE ALARM", alarms[-1], flush=True)
                continue
            reference = Reference(single, inputs)
            if reference.changes(program):
                print("NOT EQUAL BY RUNNING", case.name, degree, flush=True)
            rng = random.Random(f"{case.name} {degree} {given.seed}")
            for fault in FAULTS:
                sites = list(fault.sites(program))
                for site in rng.sample(sites, min(given.sites, len(sites))):
                    v = judge(case.name, degree, program, reference, fault, site)
                    verdicts.append(v)
                    if v.changes and not v.refused:
                        print("MISSED", v, flush=True)
            print(
                f"{case.name} over {degree}: {len(verdicts)} mutants so far, {report.seconds:.1f} s to check",
                flush=True,
            )
            if given.output:
                given.output.write_text(json.dumps(summary(verdicts, alarms, checked), indent=1))
    print(json.dumps({k: v for k, v in summary(verdicts, alarms, checked).items() if k != "missed"}, indent=1))


def summary(verdicts: list[Verdict], alarms: list[str], checked: int) -> dict[str, Any]:
    """Counts, by kind of fault."""
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for v in verdicts:
        kinds[v.fault][("changing" if v.changes else "equivalent") + (" refused" if v.refused else " accepted")] += 1
    changing = [v for v in verdicts if v.changes]
    return {
        "programs": checked,
        "false_alarms": alarms,
        "kinds": len(kinds),
        "mutants": len(verdicts),
        "changing": len(changing),
        "changing_refused": sum(v.refused for v in changing),
        "equivalent": len(verdicts) - len(changing),
        "equivalent_refused": sum(v.refused for v in verdicts if not v.changes),
        "check_seconds": round(sum(v.seconds for v in verdicts), 1),
        "missed": [vars(v) for v in changing if not v.refused],
        "by_kind": {k: dict(c) for k, c in sorted(kinds.items())},
    }


if __name__ == "__main__":
    main()
