"""Faults of emitted sources, planted by kind at every place where they can stand, and what the check says of them.

    python -m benchmarks.source_faults [--sites 2] [--only NAME …] [-o out/source_faults.json]

The kinds are of the classes that random draws at small sizes in evaluation mode do not reach: limits, lengths, training
alone, other ranks, the order of collectives, gradients, parameters, state, precision. A fault that is accepted is run,
beside the source without it, on all ranks, in both modes, at two lengths, in double precision and in bfloat16: one that
changes an output or a gradient was missed. Models at real widths are not run; what is accepted there is listed.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import random
import re
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
from torch.utils import _pytree as pytree

from tpcompiler.api import Sharded, compile_capture
from tpcompiler.capture import capture
from tpcompiler.check import CheckReport
from tpcompiler.check.claims import Geometry
from tpcompiler.check.forward import Refused
from tpcompiler.check.source import compare_source
from tpcompiler.emit import load_source
from tpcompiler.execute.simulate import run_ranks
from tpcompiler.program import InputLeaf
from tpcompiler.runtime import Ranks, Rng
from tpcompiler.runtime.precision import cast
from tpcompiler.spec.schema import Spec
from tpcompiler.weights.fill import fill_from

Plant = Callable[[ast.expr], ast.expr]

# class of faults → expressions that stand for the value E of an assignment or of a return in a forward
VALUES: dict[str, tuple[str, ...]] = {
    "limits": (
        "E.clamp(-8.0, 8.0)", "torch.where(E > 30.0, 30.0, E)", "torch.nan_to_num(E)", "F.threshold(E, -50.0, 0.0)",
        "E.clamp(max=1e4)", "F.hardtanh(E, -20.0, 20.0)",
    ),
    "lengths": (
        "E[:, :12]", "E if E.shape[1] < 12 else E * 1.1", "E * (1 + E.shape[1] // 16)", "E[:, -16:]",
        "E * (1.0 if E.shape[1] % 2 else 1.1)", "E + (E.shape[1] > 12)",
    ),
    "training": (
        "E * 1.1 if self.training else E", "E if self.training else E * 0.9", "F.dropout(E, 0.1, self.training)",
        "E + 0.1 * self.training",
    ),
    "ranks": (
        "E * (1 + self.tensor.index)", "E if self.tensor.index < 1 else E * 1.5", "E * self.tensor.index",
        "E if self.tensor.size < 3 else E * 1.5",
    ),
    "collectives": (
        "reduce(E, self.tensor)", "enter(E, self.tensor)", "enter(enter(E, self.tensor), self.tensor)",
        "reduce(E, self.tensor) / self.tensor.size", "self.tensor.all_reduce(E)",
    ),
    "gradients": (
        "E.detach()", "E.detach() + 0 * E", "2 * E - E.detach()", "E + (E - E.detach())",
        "E.clone().requires_grad_(False)",
    ),
    "state": (
        "E.mul_(1.1)", "E.add_(1)", "setattr(self, 'kept', E) or E", "vars(self).setdefault('kept', E)",
    ),
    "precision": (
        "E.bfloat16().type_as(E)", "E.float()", "E.half().to(E.dtype)", "E.double()", "E.to(torch.bfloat16)",
    ),
    "values": (
        "E.roll(1, -1)", "E.flip(-1)", "E * 1.0001", "-E", "E + 1e-3", "E[..., :1] + 0 * E",
        "torch.cat([E[:1], E[1:] * 2])",
        "E.sort(-1)[0]", "E.transpose(0, 1)", "F.relu(E)", "E.mean(-1, keepdim=True) + E",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One fault in a source."""

    kind: str
    what: str
    tree: ast.Module
    node: ast.AST
    change: Callable[[Any], None]

    @property
    def line(self) -> int:
        return getattr(self.node, "lineno", 0)

    @property
    def text(self) -> str:
        """The source with the fault."""
        place = next(i for i, n in enumerate(ast.walk(self.tree)) if n is self.node)
        made = copy.deepcopy(self.tree)
        self.change(next(n for i, n in enumerate(ast.walk(made)) if i == place))
        return ast.unparse(ast.fix_missing_locations(made))


def mutants(source: str) -> Iterator[Mutant]:
    """Every fault of every kind at every place."""
    tree = ast.parse(source)
    yield from _values(tree)
    yield from _constants(tree)
    yield from _calls(tree)
    yield from _statements(tree)
    yield from _constructors(tree)


def _forwards(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    for cls in tree.body:
        if isinstance(cls, ast.ClassDef):
            yield from (f for f in cls.body if isinstance(f, ast.FunctionDef) and f.name == "forward")


def _edited(tree: ast.Module, node: ast.AST, change: Callable[[Any], None], kind: str, what: str) -> Mutant:
    return Mutant(kind, what, tree, node, change)


def _values(tree: ast.Module) -> Iterator[Mutant]:
    for f in _forwards(tree):
        for s in f.body:
            if not isinstance(s, (ast.Assign, ast.Return)) or s.value is None:
                continue
            if isinstance(s, ast.Assign) and not isinstance(s.targets[0], ast.Name):
                continue
            for kind, texts in VALUES.items():
                for text in texts:
                    yield _edited(tree, s, lambda n, text=text: _wrap(n, text), kind, text)


def _wrap(statement: Any, text: str) -> None:
    value = statement.value

    class Put(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.AST:
            return copy.deepcopy(value) if node.id == "E" else node

    statement.value = Put().visit(ast.parse(text, mode="eval").body)


def _constants(tree: ast.Module) -> Iterator[Mutant]:
    for n in ast.walk(tree):
        if isinstance(n, ast.Constant) and type(n.value) in (int, float, bool):
            value: Any = n.value
            others = (
                [not value]
                if type(value) is bool
                else [value + 1, value * 2 or 3]
                if type(value) is int
                else [value * 1.01]
            )
            for other in others:
                yield _edited(
                    tree, n, lambda m, other=other: setattr(m, "value", other), "constants", f"{value} → {other}"
                )


def _calls(tree: ast.Module) -> Iterator[Mutant]:
    for f in _forwards(tree):
        for n in ast.walk(f):
            if not isinstance(n, ast.Call):
                continue
            name = ast.unparse(n.func)
            if name in ("enter", "reduce", "dropout", "F.dropout") or (
                len(n.args) == 1 and isinstance(n.func, ast.Attribute)
            ):
                yield _edited(tree, n, _first_alone, "calls", f"{name} left out")
            for k in n.keywords:
                yield _edited(tree, n, lambda m, k=k: _without(m, k.arg), "calls", f"{name} without {k.arg}")
            if len(n.args) > 1:
                yield _edited(tree, n, lambda m: m.args.reverse(), "calls", f"{name}: arguments in reverse")
                yield _edited(tree, n, lambda m: m.args.pop(), "calls", f"{name}: one argument less")


def _first_alone(call: Any) -> None:
    first = call.args[0]
    call.func, call.args, call.keywords = ast.Name("_same", ast.Load()), [first], []


def _without(call: Any, name: str | None) -> None:
    call.keywords = [k for k in call.keywords if k.arg != name]


def _statements(tree: ast.Module) -> Iterator[Mutant]:
    for f in _forwards(tree):
        for i, s in enumerate(f.body[:-1]):
            yield _edited(tree, f, lambda g, i=i: g.body.pop(i), "statements", f"line {s.lineno} left out")
            yield _edited(
                tree,
                f,
                lambda g, i=i: g.body.insert(i, copy.deepcopy(g.body[i])),
                "statements",
                f"line {s.lineno} twice",
            )
            yield _edited(
                tree,
                f,
                lambda g, i=i: g.body.insert(i, g.body.pop(i + 1)),
                "statements",
                f"line {s.lineno} after the next",
            )
        for n in ast.walk(f):
            if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Tuple):
                yield _edited(tree, n, lambda m: m.targets[0].elts.reverse(), "statements", "names in reverse")


ENDS = (
    "self.apply(lambda m: [p.requires_grad_(False) for p in m.parameters(recurse=False)])",
    "next(self.parameters()).requires_grad_(False)",
    "next(self.parameters()).register_hook(lambda g: 2 * g)",
    "self.register_forward_hook(lambda m, a, out: None)",
    "self.to(torch.float64)",
    "self.eval()",
    "self.step = 0",
    "torch.manual_seed(0)",
)


def _constructors(tree: ast.Module) -> Iterator[Mutant]:
    for cls in tree.body:
        for f in cls.body if isinstance(cls, ast.ClassDef) else ():
            if not isinstance(f, ast.FunctionDef) or f.name != "__init__":
                continue
            for text in ENDS:
                added = ast.parse(text).body
                yield _edited(tree, f, lambda g, added=added: g.body.extend(added), "parameters", text)
            for i, s in enumerate(f.body):
                if isinstance(s, ast.Assign) and "Parameters(" in ast.unparse(s.value):
                    yield _edited(tree, f, lambda g, i=i: g.body.pop(i), "parameters", f"line {s.lineno} left out")


# -- whether a fault changes anything ----------------------------------------------------------------------------------


class Runs:
    """The source on all ranks: outputs and gradients in both modes, at two lengths, in two dtypes."""

    def __init__(self, sharded: Sharded, inputs: dict[str, Tensor]) -> None:
        self.sharded = sharded
        self.batches = [inputs, {k: torch.cat([v, v.flip(1)], 1) if v.dim() > 1 else v for k, v in inputs.items()}]
        generator = torch.Generator().manual_seed(0)
        self.state = {
            p.name: (torch.randn(p.shape, generator=generator) * 0.3 if not p.buffer else p.value)
            for p in sharded.capture.parameters
        }
        self.right = self.results(sharded.source)

    def results(self, source: str) -> list[list[Tensor]]:
        source = re.sub(r"dropout_p=[^,)]*", "dropout_p=0.0", source)  # no two runs of a kernel draw alike
        made = load_source(
            "_same = lambda x: x\n" + source if "_same(" in source else source, f"mutant_{abs(hash(source))}"
        )
        program = self.sharded.program
        out: list[list[Tensor]] = []
        for dtype in (torch.float64, torch.bfloat16):
            for training in (False, True):

                def rank(ranks: Ranks, dtype: Any = dtype, training: bool = training) -> list[Tensor]:
                    model: nn.Module = cast(made.Model(ranks, Rng(7)), dtype)
                    fill_from(
                        model,
                        program,
                        ranks.coords,
                        {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.state.items()},
                    )
                    model.train(training)
                    found: list[Tensor] = []
                    for batch in self.batches:
                        leaves = [
                            batch[leaf.node] if isinstance(leaf, InputLeaf) else leaf
                            for leaf in program.capture.input_leaves
                        ]
                        args, kwargs = pytree.tree_unflatten(leaves, program.capture.in_spec)
                        outs = [x for x in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(x, Tensor)]
                        sum(x.double().square().sum() for x in outs).backward()  # type: ignore[union-attr]
                        found += [x.detach() for x in outs]
                    return found + [torch.zeros(()) if p.grad is None else p.grad for p in model.parameters()]

                out += run_ranks(program.mesh, rank)
        return out

    def changes(self, source: str) -> bool:
        try:
            found = self.results(source)
        except Exception:  # it does not run
            return True
        return any(len(a) != len(b) or not all(map(_near, a, b)) for a, b in zip(found, self.right, strict=True))


def _near(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    tolerance = 1e-6 if a.dtype == torch.float64 else 2e-2
    scale = float(b.double().abs().max()) if b.numel() else 0.0
    return bool(
        torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance * max(scale, 1e-6), equal_nan=True)
    )


# -- counting ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model, its inputs and a degree; `runs` where it is small enough to be run."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    degree: int
    runs: bool


def cases() -> Iterator[Case]:
    gpt2, llama = (import_module(f"models.{n}") for n in ("gpt2", "llama"))
    small = {"vocab": 101, "hidden": 48, "heads": 8, "layers": 2, "positions": 64}
    yield Case("gpt2", lambda: gpt2.Model(**small), lambda: gpt2.example_inputs(vocab=101), 3, True)
    of = {"vocab": 97, "hidden": 48, "heads": 6, "kv_heads": 2, "layers": 2, "intermediate": 50}
    yield Case("llama", lambda: llama.Model(**of), lambda: llama.example_inputs(vocab=97), 4, True)
    wide = {"vocab": 128256, "hidden": 8192, "heads": 64, "kv_heads": 8, "layers": 2, "intermediate": 28672}
    yield Case("llama, hidden 8192", lambda: llama.Model(**wide), lambda: llama.example_inputs(vocab=128256), 8, False)
    broad = {"vocab": 51200, "hidden": 3072, "heads": 32, "layers": 2, "positions": 1024}
    yield Case("gpt2, hidden 3072", lambda: gpt2.Model(**broad), lambda: gpt2.example_inputs(vocab=51200), 8, False)


def verdict(sharded: Sharded, geometry: Geometry, text: str) -> tuple[str, float]:
    """Why the check refuses a source, "" where it does not; and the seconds of a processor that it took."""
    start = time.process_time()
    try:
        compare_source(sharded.program, text, geometry, set())
        why = ""
    except Refused as e:
        why = str(e.refusal)
    return why, time.process_time() - start


def measured(case: Case, sites: int, seed: int) -> dict[str, Any]:
    """What the check says of faults in one program: `sites` of each kind and form, chosen at random."""
    inputs = case.inputs()
    sharded = compile_capture(capture(case.build, inputs), Spec.load({"mesh": {"tensor": case.degree}}))
    report: CheckReport = sharded.check
    assert report.passed, report
    geometry = Geometry(sharded.program.mesh)
    forms: dict[tuple[str, str], list[Mutant]] = defaultdict(list)
    for m in mutants(sharded.source):
        forms[m.kind, m.what if m.kind in VALUES else m.kind].append(m)
    rng = random.Random(f"{case.name} {seed}")
    chosen = [
        m
        for (kind, _), ms in forms.items()
        for m in rng.sample(ms, min(len(ms), sites if kind in VALUES else 12 * sites))
    ]
    runs = Runs(sharded, inputs if isinstance(inputs, dict) else _by_name(sharded, inputs)) if case.runs else None
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    missed, accepted, slowest = [], [], 0.0
    for m in chosen:
        text = m.text
        why, seconds = verdict(sharded, geometry, text)
        slowest = max(slowest, seconds)
        outcome = "refused"
        if not why:
            outcome = "accepted" if runs is None else "missed" if runs.changes(text) else "changes nothing"
            (missed if outcome == "missed" else accepted).append(f"{m.kind}, line {m.line}: {m.what}")
        counts[m.kind][outcome] += 1
    return {
        "case": case.name,
        "degree": case.degree,
        "faults": len(chosen),
        "refused": sum(c["refused"] for c in counts.values()),
        "by_class": {k: dict(c) for k, c in sorted(counts.items())},
        "missed": missed,
        "accepted": accepted,
        "slowest_refusal": round(slowest, 2),
    }


def _by_name(sharded: Sharded, inputs: Any) -> dict[str, Tensor]:
    leaves = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)]
    return dict(zip(sharded.capture.inputs, leaves, strict=True))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--sites", type=int, default=2, help="places for each form of a fault, a program")
    options.add_argument("--only", nargs="*", default=[])
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("-o", "--output", type=Path)
    given = options.parse_args()
    torch.set_num_threads(1)
    found = []
    for case in cases():
        if given.only and case.name not in given.only:
            continue
        found.append(measured(case, given.sites, given.seed))
        print(json.dumps(found[-1], indent=1), flush=True)
        if given.output:
            given.output.parent.mkdir(parents=True, exist_ok=True)
            given.output.write_text(json.dumps({"torch": torch.__version__, "programs": found}, indent=1))
    if any(f["missed"] for f in found):
        sys.exit("the check accepted faults that change a value or a gradient")


if __name__ == "__main__":
    main()
