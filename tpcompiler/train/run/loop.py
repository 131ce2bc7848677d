"""A training run, as every rank runs it: the steps, and what is evaluated, shown and kept between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from tpcompiler.load.target import Loaded
from tpcompiler.spec.schema import Spec
from tpcompiler.train.data.batches import Batch
from tpcompiler.train.run.checkpoint import State, leave, sweep
from tpcompiler.train.run.launch import Place
from tpcompiler.train.run.reporter import BadStep, Reporter, RunReport
from tpcompiler.train.run.saving import Start, newest_whole, restore, resume, save
from tpcompiler.train.run.stop import REASONS, StopRequest
from tpcompiler.train.run.training_run import CHECKPOINTS, Tell, TrainingRun, check_shared, locked, set_up
from tpcompiler.train.settings import Train
from tpcompiler.weights.manifest import DATA

REWINDS = 10  # how often a run goes back to a checkpoint before a bad batch ends it all the same


def run(
    loaded: Loaded,
    spec: Spec,
    train: Train,
    place: Place,
    directory: Path | None,
    *,
    start: Start | None = None,
    stop_after: float | None = None,
    tell: Tell = lambda line: None,
) -> RunReport:
    """Trains `loaded` on the ranks of `spec`; collective over them. `directory` keeps checkpoints and the log.

    Continues from the newest whole checkpoint in `directory`; without one, `start` or the model's own constructor
    gives the initial values. `stop_after` are seconds until the run writes a checkpoint and ends. `tell` shows a
    line. Raises `TpcError`.
    """
    stop = StopRequest(place, stop_after)
    with ExitStack() as stack:
        if directory is not None and place.rank == 0:
            stack.enter_context(locked(directory))
            sweep(directory / CHECKPOINTS)
        if directory is not None:
            check_shared(directory, place)
        state = set_up(loaded, spec, train, place, directory, tell)
        place.activity.now = "reading the weights"
        resume(state, start or Start(), tell)
        return loop(state, stop, tell)


def loop(run: TrainingRun, stop: StopRequest, tell: Tell) -> RunReport:
    """All steps. A bad batch may put the run back to a checkpoint, from where it leaves out the batches up to it."""
    if run.first >= run.train.steps:
        done = f"{run.first} of {run.train.steps} steps are done"
        tell(f"nothing to do: {done}; --steps {2 * run.first} would continue")
        return Reporter(run).report()
    rewinds = 0
    while True:
        try:
            return _steps(run, stop)
        except BadStep as bad:
            rewinds += 1
            if not run.train.on_bad_batch.startswith("rewind") or rewinds > REWINDS:
                raise
            _rewind(run, bad, rewinds, tell)


def _rewind(run: TrainingRun, bad: BadStep, count: int, tell: Tell) -> None:
    after = run.batches.position(bad.step)  # the first sample behind the bad batch
    stopped_at = bad.step
    if run.writer is not None:
        run.writer.wait()
    found = newest_whole(run, tell, f"rewind-{count}")
    if found is None or run.directory is None:
        raise bad
    back = int(run.train.on_bad_batch.removeprefix("rewind") or 1)
    for i in range(1, back):  # the one before each; the oldest, when there are not as many
        found = leave(run.directory / CHECKPOINTS, found, run.place.board, f"rewind-{count}-{i}")
    restore(run, found, State.load(found))
    run.batches = replace(run.batches, first_position=after)
    tell(f"step {stopped_at} had a bad batch: goes back to {found} and continues with the data behind that batch")


def _steps(run: TrainingRun, stop: StopRequest) -> RunReport:
    train, engine, place = run.train, run.engine, run.place
    reporter = Reporter(run)
    reason = 0
    with ExitStack() as stack:
        stack.enter_context(stop.listening())
        feed = stack.enter_context(feeding(run))
        if run.speaks:
            reporter.open(stack)
        for step in range(run.first, train.steps):
            done = step + 1
            place.activity.now = f"step {done}, waiting for its data"
            batches = reporter.timed(partial(feed, step))
            place.activity.now = f"step {done}"
            reporter.take(done, partial(engine.step, step, batches))
            reason = stop.agreed()
            _between(run, reporter, done, stopping=reason > 0)
            if reason:
                break
        reason = max(reason, stop.settle())
        reporter.flush()
        if run.writer is not None:
            place.activity.now = "writing the last checkpoint"
            run.writer.wait()
            reporter.saved(run.writer.done())
        return reporter.report(REASONS[reason][0] if reason else None)


def _between(run: TrainingRun, reporter: Reporter, done: int, stopping: bool) -> None:
    """What is to happen after step `done`: a comparison of the ranks, an evaluation, a checkpoint."""
    train, last = run.train, done == run.train.steps
    evaluates = run.corpus.validation is not None and not stopping and due(done, train.evaluation.every, last)
    saves = run.writer is not None and due(done, train.checkpoints.every, last or stopping, always=True)
    if due(done, train.compare_ranks, last):
        run.engine.compare_replicas(done)
    if evaluates or saves:
        reporter.flush()
    if evaluates:
        run.place.activity.now = f"the evaluation after step {done}"
        run.evaluation = _evaluate(run)
        reporter.evaluated(done, run.evaluation)
    if saves:
        save(run, done, run.evaluation if evaluates else None)
    if run.writer is not None:
        reporter.saved(run.writer.done())


def due(done: int, every: int, last: bool, always: bool = False) -> bool:
    """Whether something is to happen after step `done`: at its multiples, and at the end."""
    return bool(every and (done % every == 0 or last)) or (always and last)


def _evaluate(run: TrainingRun) -> float:
    batches = run.corpus.validation
    assert batches is not None
    return run.engine.evaluate(batches, min(run.train.evaluation.batches, batches.epoch_steps))


Feed = Callable[[int], list[Batch]]


@contextmanager
def feeding(run: TrainingRun) -> Iterator[Feed]:
    """A step's micro-batches on this rank, read while the step before runs."""
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
