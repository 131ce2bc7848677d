"""A training run, as every rank runs it: set up, resume, the loop over steps, what is shown and kept."""

from __future__ import annotations

import fcntl
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpcompiler.errors import TpcError
from tpcompiler.execute.interpret import bind_inputs
from tpcompiler.load.target import Loaded
from tpcompiler.runtime import Ranks
from tpcompiler.spec.schema import Spec
from tpcompiler.train.data.batches import Batch, Batches, Corpus, open_corpus
from tpcompiler.train.hold.owned import checkpoint_mesh, entries, from_constructor, from_source
from tpcompiler.train.optim.scaler import Scale
from tpcompiler.train.run.checkpoint import Host, Snapshot, State, Writer, find, sweep
from tpcompiler.train.run.compiled import compile_model, largest_parameters, loss_output, select, training_inputs
from tpcompiler.train.run.config import Train
from tpcompiler.train.run.limits import check_inputs
from tpcompiler.train.run.start import Place
from tpcompiler.train.show.display import Display, Meter
from tpcompiler.train.show.log import Record, RunLog
from tpcompiler.train.step.engine import Engine, Outcome
from tpcompiler.train.step.flops import flops_per_token, peak_tflops
from tpcompiler.weights import Manifest, Weights, open_source
from tpcompiler.weights.manifest import DATA
from tpcompiler.weights.wire import to_tree

CHECKPOINTS = "checkpoints"
_LOCK_WAIT = 15.0  # seconds: a killed run's processes may need some to end


@dataclass(frozen=True)
class Report:
    """How a run ended."""

    steps: int
    resumed: int
    loss: float | None = None
    evaluation: float | None = None
    tokens_per_second: float | None = None
    tflops: float | None = None
    memory: int | None = None
    checkpoint: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Run:
    """Everything a run's loop needs. One on every rank."""

    train: Train
    spec: Spec
    place: Place
    corpus: Corpus
    engine: Engine
    directory: Path | None
    writer: Writer | None = None
    first: int = 0  # steps done before
    batches: Batches = field(init=False)
    evaluation: float | None = None
    host: Host = field(default_factory=Host)

    def __post_init__(self) -> None:
        self.batches = self.corpus.train

    @property
    def speaks(self) -> bool:
        return self.place.rank == 0


def run(
    loaded: Loaded,
    spec: Spec,
    train: Train,
    place: Place,
    directory: Path | None,
    *,
    weights: Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Report:
    """Trains `loaded` on the ranks of `spec`; collective over them. `directory` keeps checkpoints and the log.

    A directory with checkpoints is gone on with, from the newest whole one; else `weights`, or the model's own
    constructor, give the initial values. `tell` shows a line. Raises `TpcError`.
    """
    with ExitStack() as stack:
        if directory is not None and place.rank == 0:
            stack.enter_context(locked(directory))
            sweep(directory / CHECKPOINTS)
        state = set_up(loaded, spec, train, place, directory, tell)
        resume(state, weights, tell)
        return loop(state, tell)


def set_up(
    loaded: Loaded, spec: Spec, train: Train, place: Place, directory: Path | None, tell: Callable[[str], None]
) -> Run:
    """Data, the compiled model, and an engine whose parameters have memory but no values."""
    corpus = place.in_turn("data", lambda: open_corpus(train))
    example = corpus.train.batch_at(0, 0).tensors
    compiled = compile_model(
        loaded, spec, training_inputs(loaded, example), loss_output, double=train.precision == "fp64"
    )
    inputs = bind_inputs(compiled.capture, **select(example, compiled.takes))
    check_inputs(compiled.capture, inputs, corpus.largest_id, train.data.names.get("input_ids", "input_ids"))
    mesh = compiled.sharded.program.mesh
    corpus.train.micro_batches(mesh[DATA])  # raises when they cannot be dealt
    ranks = Ranks.from_env(mesh)
    engine = Engine(compiled, ranks, train, spec.seed, place.device)
    unused = [name for name in example if name not in compiled.takes]
    count = largest_parameters(compiled.capture)
    tell(
        f"{compiled.capture.model}: {count / 1e6:,.1f} M parameters, {mesh}, {train.precision}, {place.device.type}, "
        f"batch {train.batch} = {mesh[DATA]} × {corpus.train.micro_batches(mesh[DATA])} × "
        f"{corpus.train.rows(0, 0, mesh[DATA])[1]} sequences of {train.sequence} tokens"
        + (f"; the model takes no {', '.join(unused)}" if unused else "")
    )
    out = Run(train, spec, place, corpus, engine, directory)
    if directory is not None:
        kept = train.checkpoints
        out.writer = Writer(directory / CHECKPOINTS, place.board, kept.keep, kept.keep_best)
    return out


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """The run's directory, ours alone. Raises `TpcError` when another run has it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        fd = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as e:
        raise TpcError(f"{directory}: cannot write: {(e.strerror or str(e)).lower()}") from None
    try:
        end = time.monotonic() + _LOCK_WAIT
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > end:
                    raise TpcError(f"{directory}: another run is writing there; give -o another directory") from None
                time.sleep(0.1)
        yield
    finally:
        os.close(fd)


def resume(run: Run, weights: Path | None, tell: Callable[[str], None]) -> None:
    """Gives the engine its values: from the newest whole checkpoint, else from `weights`, else initial ones."""
    engine, capture = run.engine, run.engine.compiled.capture
    found: Path | None = None
    if run.directory is not None:
        found, refused = find(run.directory / CHECKPOINTS, run.place.board)
        for line in refused:
            tell(f"checkpoint refused: {line}")
        if found is None and refused:
            raise TpcError(f"{run.directory}: no checkpoint there is whole; {refused[0]}")
    if found is not None:
        state = State.load(found)
        with Weights(found) as source:
            engine.restore(source.read, state.updates)
        if engine.scale is not None and state.scale is not None:
            engine.scale = Scale.from_state_dict(state.scale)
        run.first = state.step
        run.batches = replace(run.batches, first_step=state.step, first_position=state.position)
        tell(f"going on from {found}: step {state.step} of {run.train.steps}")
        if (state.seed, state.data_seed) != (run.spec.seed, run.train.seed):
            tell(f"note: {found.name} was written with seed {state.seed} and train.seed {state.data_seed}")
    elif weights is not None:
        with open_source(weights) as source:
            engine.fill(from_source(source, capture))
        tell(f"weights from {weights}")
    else:
        recorded, seed = engine.compiled.recorded, run.spec.seed
        engine.fill(from_constructor(lambda name: recorded.replay(name, seed)))


def loop(run: Run, tell: Callable[[str], None]) -> Report:
    """The steps, and what happens between them."""
    train, engine = run.train, run.engine
    records = Records(run)
    if run.first >= train.steps:
        tell(f"nothing to do: {run.first} of {train.steps} steps are done; --steps {2 * run.first} would go on")
        return records.report()
    with ExitStack() as stack:
        feed = stack.enter_context(feeding(run))
        if run.speaks:
            records.open(stack)
        for step in range(run.first, train.steps):
            done = step + 1
            records.add(engine.step(step, feed(step)))
            last = done == train.steps
            evaluates = run.corpus.validation is not None and due(done, train.evaluation.every, last)
            saves = run.writer is not None and due(done, train.checkpoints.every, last, always=True)
            if evaluates or saves:
                records.flush()
            if evaluates:
                run.evaluation = evaluate(run)
                records.evaluated(done, run.evaluation)
            if saves:
                save(run, done, run.evaluation if evaluates else None)
            if run.writer is not None:
                records.saved(run.writer.done())
        records.flush()
        if run.writer is not None:
            run.writer.wait()
            records.saved(run.writer.done())
        return records.report()


def due(done: int, every: int, last: bool, always: bool = False) -> bool:
    """Whether something is to happen after step `done`: at its multiples, and at the end."""
    return bool(every and (done % every == 0 or last)) or (always and last)


def evaluate(run: Run) -> float:
    batches = run.corpus.validation
    assert batches is not None
    return run.engine.evaluate(batches, min(run.train.evaluation.batches, batches.epoch_steps))


def save(run: Run, step: int, evaluation: float | None) -> None:
    """Starts a checkpoint of this moment. Collective in that all ranks call it at the same step."""
    assert run.writer is not None
    run.writer.wait()  # before the copies are overwritten
    engine = run.engine
    program = engine.compiled.sharded.program
    scale = engine.scale
    parameters = [p.name for p in program.capture.parameters if not p.buffer]
    state = State(
        step=step,
        position=run.batches.position(step),
        tokens=run.batches.position(step) * run.train.sequence,
        seed=run.spec.seed,
        data_seed=run.train.seed,
        updates=step - (scale.skipped if scale is not None else 0),
        scale=scale.state_dict() if scale is not None else None,
        evaluation=evaluation,
        layouts={name: [to_tree(d) for d in program.dims[name]] for name in parameters},
    )
    listed = entries(program, engine.numbers.master)
    tensors = run.host.copy({**engine.tensors(), **buffers(engine)})
    mesh = checkpoint_mesh(program.mesh)
    rank = mesh.rank(engine.ranks.coords)
    files: dict[str, dict[str, Tensor]] = {}
    for entry in listed:
        if entry.per_rank or run.speaks:
            files.setdefault(entry.file_of(rank), {})[entry.name] = tensors[entry.name]
    manifest = Manifest(mesh, tuple(listed), spec=run.spec.dump()) if run.speaks else None
    run.writer.start(Snapshot(state, files, manifest))


def buffers(engine: Engine) -> dict[str, Tensor]:
    """This rank's slices of the buffers; those that are whole are whole."""
    there = dict(engine.module.named_buffers(remove_duplicate=False))
    out = {}
    for p in engine.compiled.capture.parameters:
        if p.buffer:
            found = [there[n] for n in p.names if n in there]
            value = found[0] if found else p.value  # the program may have folded it away
            assert value is not None, p.name
            out[p.name] = value
    return out


Feed = Callable[[int], list[Batch]]


@contextmanager
def feeding(run: Run) -> Iterator[Feed]:
    """A step's micro-batches on this rank, read while the step before is run."""
    group = run.engine.ranks.group(DATA)
    device, last = run.place.device, run.train.steps
    count = run.batches.micro_batches(group.size)

    def read(step: int) -> list[Batch]:
        batches = [run.batches.batch_at(step, m, group.index, group.size) for m in range(count)]
        return [b.pinned() for b in batches] if device.type == "cuda" else batches

    with ThreadPoolExecutor(1, "data") as pool:
        ahead: dict[int, Future[list[Batch]]] = {}

        def feed(step: int) -> list[Batch]:
            now = ahead.pop(step, None) or pool.submit(read, step)
            if step + 1 < last:
                ahead[step + 1] = pool.submit(read, step + 1)
            return [b.to(device) for b in now.result()]

        yield feed


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


class Records:
    """What a run's steps gave: checked on every rank, shown and written by rank 0. On GPUs one step behind."""

    def __init__(self, run: Run) -> None:
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
        self._last = Record(run.first)
        self._evaluation: float | None = None
        self._checkpoint: Path | None = None
        self._clock = time.perf_counter()

    def open(self, stack: ExitStack) -> None:
        """Rank 0's screen and log."""
        run = self._run
        self._display = stack.enter_context(Display(run.engine.compiled.capture.model, run.train.steps))
        if run.directory is not None:
            self._log = stack.enter_context(RunLog(run.directory, run.first, run.train.logging.tensorboard))
        self._clock = time.perf_counter()

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
        if outcome.applied and not (isfinite(loss) and isfinite(norm)):
            what = f"loss is {loss}" if not isfinite(loss) else f"gradient's norm is {norm}"
            raise TpcError(f"step {outcome.step}: the {what}; the run stops. A lower learning rate would work")
        now = time.perf_counter()
        speeds: dict[str, Any] = {**self._meter.step(now - self._clock)}
        self._clock = now
        tokens = self._run.batches.position(outcome.step) * train.sequence
        if outcome.scale is not None:
            speeds |= {"loss_scale": outcome.scale.value, "skipped": outcome.scale.skipped}
        memory = peak_memory(self._run.place.device)
        self._last = Record(outcome.step, loss, outcome.lr, norm, tokens, memory=memory, **speeds)
        if outcome.step % train.logging.every == 0 or outcome.step == train.steps:
            self._show(self._last)

    def _show(self, record: Record) -> None:
        if self._log is not None:
            self._log.write(record)
        if self._display is not None:
            self._display.show(record)

    def evaluated(self, step: int, loss: float) -> None:
        self._evaluation = loss
        if self._log is not None:
            self._log.write(Record(step, evaluation=loss))
        if self._display is not None:
            self._display.message(f"step {step}: evaluation {loss:.4f}")
        self._clock = time.perf_counter()

    def saved(self, paths: Sequence[Path]) -> None:
        for path in paths:
            self._checkpoint = path
            if self._display is not None:
                self._display.message(f"checkpoint {path}")

    def report(self) -> Report:
        r = self._last
        return Report(
            r.step, self._run.first, r.loss, self._evaluation, r.tokens_per_second, r.tflops, r.memory,
            None if self._checkpoint is None else str(self._checkpoint),
        )  # fmt: skip


def peak_memory(device: torch.device) -> int:
    """The most that this process has held so far: on the GPU, or in the host's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
