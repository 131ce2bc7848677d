"""What a run's steps gave: checked on every rank, shown and written down by rank 0."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from tpcompiler.errors import TpcError
from tpcompiler.train.run.stop import REASONS
from tpcompiler.train.run.training_run import TrainingRun
from tpcompiler.train.show.display import Display, Meter
from tpcompiler.train.show.log import RunLog, StepRecord
from tpcompiler.train.step.engine import Outcome
from tpcompiler.train.step.flops import flops_per_token, peak_tflops
from tpcompiler.train.step.traced import traced

Returned = TypeVar("Returned")


class BadStep(TpcError):
    """A step's loss or gradient is not finite; the same on all ranks."""

    def __init__(self, step: int, what: str) -> None:
        self.step = step
        super().__init__(
            f"step {step}: the {what}; the run stops. A lower learning rate, or train.on_bad_batch: skip, would work"
        )


@dataclass(frozen=True)
class RunReport:
    """How a run ended."""

    steps: int
    resumed: int
    loss: float | None = None
    evaluation: float | None = None
    tokens_per_second: float | None = None
    tflops: float | None = None
    memory: int | None = None
    hidden: float | None = None  # share of a traced step's communication that ran beside computation
    checkpoint: str | None = None
    stopped: str | None = None  # what asked for the end: Ctrl-C, SIGTERM, the time limit

    @property
    def exit_code(self) -> int:
        """Of `tpc train`: 0, 130 after Ctrl-C, 143 after SIGTERM."""
        return next((code for reason, code in REASONS.values() if reason == self.stopped), 0)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Pending:
    """A step's numbers on their way from the device."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        values = torch.stack([outcome.loss.double(), outcome.norm.double(), outcome.alike.double()])
        self._event: torch.cuda.Event | None = None
        self._host = values
        if values.is_cuda:
            self._host = torch.empty(3, dtype=torch.float64, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> tuple[float, float, bool]:
        if self._event is not None:
            self._event.synchronize()
        loss, norm, alike = self._host.tolist()
        return loss, norm, bool(alike)


class Reporter:
    """What a run's steps gave: checked on every rank, shown and written by rank 0. On GPUs one step behind."""

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        self._lag = 1 if run.place.device.type == "cuda" else 0
        self._pending: list[Pending] = []
        self._display: Display | None = None
        self._log: RunLog | None = None
        train, engine = run.train, run.engine
        compiled = engine.compiled
        batch = run.batches.batch_at(run.first, 0)
        names = zip(compiled.capture.inputs, compiled.takes, strict=True)
        shapes = {placeholder: tuple(batch.tensors[name].shape) for placeholder, name in names}
        flops = flops_per_token(compiled.capture.graph, shapes, batch.rows * train.sequence)
        name = torch.cuda.get_device_name() if run.place.device.type == "cuda" else ""
        self._meter = Meter(
            train.batch * train.sequence, flops, engine.ranks.mesh.size, peak_tflops(name, train.precision)
        )
        self._last = StepRecord(run.first)
        self._evaluation: float | None = None
        self._checkpoint: Path | None = None
        self._hidden: float | None = None
        self._waited = 0.0  # for data, in the step that runs
        self._clock = time.perf_counter()

    def open(self, stack: ExitStack) -> None:
        """Rank 0's screen and log."""
        run = self._run
        self._display = stack.enter_context(Display(run.engine.compiled.capture.model, run.train.steps))
        if run.directory is not None:
            wanted = run.train.logging
            log = RunLog(run.directory, run.first, wanted.tensorboard, self._display.message, wanted.wandb)
            self._log = stack.enter_context(log)
        self._clock = time.perf_counter()

    def timed(self, read: Callable[[], Returned]) -> Returned:
        """`read()`, whose time is the step's wait for data."""
        before = time.perf_counter()
        out = read()
        self._waited = time.perf_counter() - before
        return out

    def take(self, step: int, work: Callable[[], Outcome]) -> None:
        """Adds what a step's `work` gives. The step that is to be traced is traced."""
        if self._run.train.logging.trace != step:
            self.add(work())
            return
        if self._run.place.device.type != "cuda":
            self.message(f"step {step}: not traced, since only what GPUs do is traced")
            self.add(work())
            return
        done: list[Outcome] = []
        found, _ = traced(lambda: done.append(work()))
        self._hidden = found.share
        self.message(f"step {step}: {found}")
        self.add(done[0])

    def add(self, outcome: Outcome) -> None:
        self._pending.append(Pending(outcome))
        while len(self._pending) > self._lag:
            self._take(self._pending.pop(0))

    def flush(self) -> None:
        while self._pending:
            self._take(self._pending.pop(0))

    def _take(self, pending: Pending) -> None:
        loss, norm, alike = pending.read()
        outcome, train = pending.outcome, self._run.train
        if not alike:
            raise TpcError(
                f"step {outcome.step}: the ranks of a tensor group read different batches; is the data the same on all?"
            )
        if outcome.fault:
            self.message(f"step {outcome.step}: the {outcome.fault}; the weights were left as they are")
        elif outcome.applied and (fault := self._fault(loss, norm)):
            raise BadStep(outcome.step, fault)
        now = time.perf_counter()
        speeds: dict[str, Any] = {**self._meter.step(now - self._clock), "data_seconds": self._waited}
        self._clock = now
        tokens = self._run.batches.position(outcome.step) * train.sequence
        if outcome.scale is not None:
            speeds |= {"loss_scale": outcome.scale.value}
        if outcome.skipped:
            speeds |= {"skipped": outcome.skipped}
        memory = peak_memory(self._run.place.device)
        self._last = StepRecord(outcome.step, loss, outcome.lr, norm, tokens, memory=memory, **speeds)
        if outcome.step % train.logging.every == 0 or outcome.step == train.steps:
            self._show(self._last)

    def _fault(self, loss: float, norm: float) -> str:
        """What is wrong with a step that the engine has not judged."""
        skips = self._run.train.on_bad_batch == "skip" and self._run.engine.scale is None
        return "" if skips else self._run.engine.spikes.fault(loss, norm)

    def _show(self, record: StepRecord) -> None:
        if self._log is not None:
            self._log.write(record)
        if self._display is not None:
            self._display.show(record)

    def evaluated(self, step: int, loss: float) -> None:
        self._evaluation = loss
        if self._log is not None:
            self._log.write(StepRecord(step, evaluation=loss))
        self.message(f"step {step}: evaluation {loss:.4f}")
        self._clock = time.perf_counter()

    def saved(self, paths: Sequence[Path]) -> None:
        for path in paths:
            self._checkpoint = path
            self.message(f"checkpoint {path}")

    def message(self, text: str) -> None:
        if self._display is not None:
            self._display.message(text)

    def report(self, stopped: str | None = None) -> RunReport:
        r = self._last
        hidden = None if self._hidden is None else round(self._hidden, 3)
        return RunReport(
            r.step, self._run.first, r.loss, self._evaluation, r.tokens_per_second, r.tflops, r.memory,
            hidden, None if self._checkpoint is None else str(self._checkpoint), stopped,
        )  # fmt: skip


def peak_memory(device: torch.device) -> int:
    """The most that this process has held so far: on the GPU, or in the host's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
