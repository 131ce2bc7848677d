"""Searches the layouts of a model over a number of GPUs: tensor × data ranks, micro-batch, recomputation, overlap.

Every layout is priced. The axes are chosen once for all degrees that do not exceed an axis. Equal layers are priced
once, so that the search takes no longer for a deep model than for a shallow one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, get_args

from tpcompiler.api import Progress, compile_capture
from tpcompiler.cost.predict import CostModel, ParallelLayout, Prediction
from tpcompiler.cost.rates import Recompute
from tpcompiler.errors import PlanError, TpcError
from tpcompiler.program import Capture
from tpcompiler.spec.machine import Hardware
from tpcompiler.spec.schema import Spec

LARGEST_TENSOR = 64  # larger tensor groups are not tried, because they would reach over too many hosts
GIB = 2**30


@dataclass(frozen=True)
class Question:
    """What the search is asked: a number of GPUs, a batch and a machine."""

    gpus: int
    batch: int  # sequences a step, over all GPUs
    sequence: int
    hardware: Hardware
    whole: bool = False  # data ranks hold whole copies (DDP), instead of FSDP2's shards
    width: int = 2  # bytes of a number in the computation

    @property
    def memory(self) -> float:
        """Bytes that a rank may use."""
        return self.hardware.memory_gib * self.hardware.usable * GIB


@dataclass(frozen=True)
class Answer:
    """The best layout, and by what the others lose against it."""

    question: Question
    best: Prediction
    degrees: tuple[tuple[Prediction, str], ...]  # the best layout of each tensor degree, with what it loses by
    choices: tuple[tuple[Prediction, str], ...]  # the best layout with one choice changed, with what that loses by
    refused: tuple[str, ...]  # tensor degrees that the model cannot be split by, with the reason
    layouts: int  # how many were priced
    seconds: float  # how long the search took

    def as_dict(self) -> dict[str, Any]:
        return {
            "gpus": self.question.gpus,
            "batch": self.question.batch,
            "sequence": self.question.sequence,
            "hardware": self.question.hardware.model_dump(mode="json"),
            "best": self.best.as_dict(),
            "degrees": [{**p.as_dict(), "lost_by": why} for p, why in self.degrees],
            "choices": [{**p.as_dict(), "lost_by": why} for p, why in self.choices],
            "refused": list(self.refused),
            "layouts": self.layouts,
            "seconds": round(self.seconds, 3),
        }


def search(capture: Capture, spec: Spec, question: Question, progress: Progress = lambda stage: None) -> Answer:
    """The fastest layout that fits in memory. Raises `PlanError`, one line with the least memory, if none fits."""
    start = time.perf_counter()
    programs = _Programs(capture, spec, progress)
    priced: list[Prediction] = []
    refused: list[str] = []
    for tensor in _divisors(question.gpus):
        try:
            model = programs.of(tensor)
        except TpcError as e:
            refused.append(f"tensor {tensor}: {e}")
            continue
        layouts = _layouts(question, tensor)
        priced += [
            model.predict(layout, question.hardware, question.batch, question.sequence, question.width)
            for layout in layouts
        ]
    if not priced:
        raise PlanError(refused[0] if refused else f"a batch of {question.batch} is too small for {question.gpus} GPUs")
    fit = [p for p in priced if p.memory.total <= question.memory]
    if not fit:
        raise PlanError(_too_large(min(priced, key=lambda p: p.memory.total), question))
    best = min(fit, key=_rank)
    return Answer(
        question,
        best,
        tuple((p, _lost(p, best, question)) for p in _by_degree(priced, fit, best)),
        tuple((p, _lost(p, best, question)) for p in _changed(priced, best)),
        tuple(refused),
        len(priced),
        time.perf_counter() - start,
    )


@dataclass(frozen=True)
class _Programs:
    """The compiled programs. One for two ranks serves every degree at which no axis has fewer elements than ranks."""

    capture: Capture
    spec: Spec
    progress: Progress

    def of(self, tensor: int) -> CostModel:
        if tensor == 1 and self.spec.mesh.tensor == 1:  # one GPU
            return self._compiled(1)
        smallest = min((b.size for b in self._two.plan.blocks), default=0)
        grouped = len(self._two.program.mesh.names) > 2
        if tensor <= 2 or (tensor <= smallest and not grouped):
            return self._two
        return self._compiled(tensor)

    @cached_property
    def _two(self) -> CostModel:
        return self._compiled(2)

    def _compiled(self, tensor: int) -> CostModel:
        spec = self.spec.with_(mesh={"tensor": tensor}, overlap=True)
        sharded = compile_capture(self.capture, spec, progress=self.progress)
        return CostModel(sharded.program, sharded.plan)


def _divisors(gpus: int) -> list[int]:
    return [d for d in range(1, min(gpus, LARGEST_TENSOR) + 1) if gpus % d == 0]


def _layouts(question: Question, tensor: int) -> Iterator[ParallelLayout]:
    data = question.gpus // tensor
    share = -(-question.batch // data)
    if data > question.batch:
        return
    micros = sorted({share, *(2**i for i in range(share.bit_length()) if 2**i <= share)})
    for micro in micros:
        for recompute in get_args(Recompute):
            for overlap in (True, False) if tensor > 1 else (False,):
                yield ParallelLayout(tensor, data, micro, recompute, overlap, question.whole and data > 1)


def _rank(p: Prediction) -> tuple[float, int, int]:
    """The order of layouts: the faster first, of equally fast ones that with less memory, then the smaller degree."""
    return (round(p.seconds, 6), p.memory.total, p.layout.tensor)


def _by_degree(priced: Sequence[Prediction], fit: Sequence[Prediction], best: Prediction) -> list[Prediction]:
    """The best layout of each tensor degree, the fastest first. Degrees of which no layout fits come last, with the
    layout that needs least memory."""
    found = {best.layout.tensor: best}
    for p in sorted(fit, key=_rank):
        found.setdefault(p.layout.tensor, p)
    for p in sorted(priced, key=lambda p: p.memory.total):
        found.setdefault(p.layout.tensor, p)
    fits = {id(p) for p in fit}
    return sorted(found.values(), key=lambda p: (id(p) not in fits, _rank(p)))


def _changed(priced: Sequence[Prediction], best: Prediction) -> list[Prediction]:
    """The best layout with one choice changed: recomputation, overlap, or the micro-batch halved or doubled."""
    same = {p.layout: p for p in priced}
    here = best.layout
    others = [replace(here, recompute=r) for r in get_args(Recompute)]
    others += [replace(here, overlap=not here.overlap)]
    others += [replace(here, micro=m) for m in (here.micro // 2, here.micro * 2)]
    return [same[layout] for layout in others if layout in same and layout != here]


def _lost(p: Prediction, best: Prediction, question: Question) -> str:
    """Says by what a layout is worse than the best: memory, or time with the part of the step that takes most of it."""
    if p is best:
        return ""
    over = p.memory.total - question.memory
    if over > 0:
        return f"needs {over / GIB:.1f} GiB more than the {question.memory / GIB:.1f} GiB there are"
    name, more = max(((name, p.parts[name] - best.parts[name]) for name in p.parts), key=lambda pair: pair[1])
    slower = (p.seconds / best.seconds - 1) * 100
    if slower < 0.005:
        return f"as fast, {(p.memory.total - best.memory.total) / GIB:+.1f} GiB"
    return f"{slower:.1f} % slower: {more * 1e3:.1f} ms more for {_PARTS[name]}"


_PARTS = {
    "forward": "forward products (narrower, or in more kernels)",
    "backward": "backward",
    "again": "recomputing activations",
    "exposed": "tensor collectives that nothing hides",
    "update": "the optimizer's update",
    "data": "communication between data ranks",
}


def _too_large(p: Prediction, question: Question) -> str:
    layout = p.layout
    return (
        f"no layout over {question.gpus} GPUs fits: the smallest, tensor {layout.tensor} × data {layout.data} with "
        f"micro-batch {layout.micro} and recomputation {layout.recompute}, needs {p.memory.total / GIB:.1f} GiB of "
        f"{question.memory / GIB:.1f} GiB ({question.hardware.memory_gib:g} GiB · {question.hardware.usable:g}); "
        f"more GPUs or a larger --memory would work"
    )
