"""Everything that a run's loop needs, set up: data, the compiled model, and an engine without values yet."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

from tpcompiler.errors import TpcError
from tpcompiler.execute.interpret import bind_inputs
from tpcompiler.load.target import Loaded
from tpcompiler.program import Capture
from tpcompiler.runtime import Ranks
from tpcompiler.spec.schema import Spec
from tpcompiler.train.data.batches import Batches, Corpus, open_corpus
from tpcompiler.train.run.checkpoint import Host, Writer
from tpcompiler.train.run.launch import Place
from tpcompiler.train.settings import Train
from tpcompiler.train.step.compiled import compile_model, loss_output, select, training_inputs
from tpcompiler.train.step.engine import Engine
from tpcompiler.train.step.labels import check_labels
from tpcompiler.train.step.limits import check_inputs
from tpcompiler.weights.manifest import DATA

CHECKPOINTS = "checkpoints"
SETTINGS = "settings.json"
_LOCK_WAIT = 15.0  # seconds: a killed run's processes may need some to end

Tell = Callable[[str], None]
Flat = dict[str, Any]

# Settings that may change without making a run another one: they say where it runs, how fast, and what it shows.
FREE = (
    "mesh.*", "shard.*", "override*", "axes*", "uneven", "allow_empty", "hardware.*", "inputs*", "outputs*",
    "train.steps", "train.micro_batch", "train.activation_checkpointing", "train.compile", "train.cuda_graphs",
    "train.evaluation.*", "train.checkpoints.*", "train.logging.*", "train.data.cache", "train.data.path",
    "train.data.validation", "train.on_bad_batch", "train.spike", "train.compare_ranks",
)  # fmt: skip


@dataclass
class TrainingRun:
    """A run, on every rank."""

    train: Train
    spec: Spec
    place: Place
    corpus: Corpus
    engine: Engine
    directory: Path | None
    settings: Flat  # all that the run is made of, by key
    model: dict[str, Any] = field(default_factory=dict)  # where it came from, for whoever reads a checkpoint
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


def set_up(loaded: Loaded, spec: Spec, train: Train, place: Place, directory: Path | None, tell: Tell) -> TrainingRun:
    """Data, the compiled model, and an engine whose parameters have memory but no values."""
    place.activity.now = "reading the data"
    corpus = place.in_turn("data", lambda: open_corpus(train))
    place.activity.now = "compiling"
    example = corpus.train.batch_at(0, 0).tensors
    compiled = compile_model(
        loaded, spec, training_inputs(loaded, example), loss_output, double=train.precision == "fp64"
    )
    inputs = bind_inputs(compiled.capture, **select(example, compiled.takes))
    check_inputs(compiled.capture, inputs, corpus.largest_id, train.data.names.get("input_ids", "input_ids"))
    if not any(p.trainable for p in compiled.capture.parameters if not p.buffer):
        raise TpcError(f"{loaded.source}: has no parameter to train: all are frozen, or there is none")
    apart = [train.data.names.get(n, n) for n in ("position_ids", "document_ids")]
    if train.data.documents == "restart" and not {*apart} & {*compiled.takes}:
        raise TpcError(
            f"data.documents: restart, but {compiled.capture.model} takes neither {apart[0]} nor {apart[1]}; let its "
            f"example inputs hold one of them (hf: models: inputs: {{position_ids: true}})"
        )
    if train.data.task == "causal":
        check_labels(compiled.capture, inputs, train.data)
    mesh = compiled.sharded.program.mesh
    corpus.train.micro_batches(mesh[DATA])  # raises when they cannot be dealt
    settings = all_settings(spec, train, compiled.capture, corpus)
    compare_ranks(place, settings, compiled.sharded.source)
    engine = Engine(compiled, Ranks.from_env(mesh, timeout=place.timeout), train, spec.seed, place.device)
    model = {"source": loaded.source, "overrides": dict(loaded.overrides)}
    out = TrainingRun(train, spec, place, corpus, engine, directory, settings, model)
    tell(_summary(out, example))
    if directory is not None:
        kept = train.checkpoints
        out.writer = Writer(directory / CHECKPOINTS, place.board, kept.keep, kept.keep_best)
    return out


def _summary(run: TrainingRun, example: dict[str, Any]) -> str:
    capture, train, batches = run.engine.compiled.capture, run.train, run.corpus.train
    mesh = run.engine.ranks.mesh
    unused = [name for name in example if name not in run.engine.compiled.takes]
    count = sum(prod(p.shape) for p in capture.parameters if not p.buffer)
    return (
        f"{capture.model}: {count / 1e6:,.1f} M parameters, {mesh}, {train.precision}, {run.place.device.type}, "
        f"batch {train.batch} = {mesh[DATA]} × {batches.micro_batches(mesh[DATA])} × "
        f"{batches.rows(0, 0, mesh[DATA])[1]} sequences of {train.sequence} tokens"
        + (f"; the model takes no {', '.join(unused)}" if unused else "")
    )


def all_settings(spec: Spec, train: Train, capture: Capture, corpus: Corpus) -> Flat:
    """Everything that a run is made of, by dotted key: the spec with all defaults, the model, the data."""
    shapes = sorted((p.name, p.shape, str(p.dtype)) for p in capture.parameters)
    whole = {**spec.dump(), "train": train.model_dump(mode="json", by_alias=True)}
    whole["model_parameters"] = _digest(shapes)
    whole["train"]["schedule"]["until"] = train.schedule.until or train.steps
    whole["train"]["data"]["samples"] = len(corpus.train.samples)
    whole["train"]["data"]["tokens"] = _digest(corpus.identity)
    flat: Flat = json.loads(json.dumps(_flat(whole)))
    return flat


def _flat(value: Any, prefix: str = "") -> Flat:
    out: Flat = {}
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            out |= _flat(inner, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = inner
    return out


def changed(before: Flat, now: Flat) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ, with both values."""
    keys = [k for k in dict.fromkeys([*before, *now]) if before.get(k) != now.get(k)]
    return {k: (before.get(k), now.get(k)) for k in keys}


def check_changes(before: Flat, now: Flat, allowed: Sequence[str], tell: Tell) -> None:
    """Tells what a resumed run does differently. Raises `TpcError` when that makes it another run.

    `allowed` are globs of keys that may differ. What the run began with before it kept its settings is unknown.
    """
    if not before:
        return
    defaults = _flat({"train": Train().model_dump(mode="json", by_alias=True)})  # of keys younger than the run
    found = changed({**{k: defaults[k] for k in now if k in defaults}, **before}, now)
    for key, (old, new) in found.items():
        tell(f"changed since the run began: {key}: {_shown(old)} → {_shown(new)}")
    refused = [k for k in found if not any(fnmatchcase(k, g) for g in (*FREE, *allowed))]
    if refused:
        old, new = found[refused[0]]
        more = f" (and {', '.join(refused[1:6])})" if len(refused) > 1 else ""
        options = " ".join(f"--allow-changed {k}" for k in refused[:6])
        raise TpcError(
            f"{refused[0]}: the run began with {_shown(old)}, now it is {_shown(new)}{more}; "
            f"this would be another run. {options} would continue all the same"
        )


def _shown(value: Any) -> str:
    return "nothing" if value is None else str(value)[:80]


def compare_ranks(place: Place, settings: Flat, source: str) -> None:
    """Raises `TpcError` when a rank runs other settings, other data or another program than rank 0. Collective."""
    if place.world == 1:
        return
    mine = {**settings, "the emitted program": sha256(source.encode()).hexdigest()[:16]}
    digests = place.board.gather("settings/digest", _digest(mine))
    other = next((r for r, d in enumerate(digests) if d != digests[0]), None)
    if other is None:
        return
    if place.rank in (0, other):
        place.board.post(f"settings/of/{place.rank}", json.dumps(mine))
    first, second = (json.loads(place.board.wait(f"settings/of/{r}") or "{}") for r in (0, other))
    key, (a, b) = next(iter(changed(first, second).items()))
    raise TpcError(f"rank {other} does not run what rank 0 runs: {key} is {_shown(b)} there and {_shown(a)} on rank 0")


def _digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """The run's directory for this process alone; nothing is left of a directory in which nothing was written.

    Raises `TpcError` when another run has it.
    """
    lock = directory / ".lock"
    end = time.monotonic() + _LOCK_WAIT
    while (fd := _lock(lock)) is None:
        if time.monotonic() > end:
            raise TpcError(f"{directory}: another run is writing there; give -o another directory")
        time.sleep(0.1)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(fd)
        with suppress(OSError):  # it holds something
            directory.rmdir()


def _lock(path: Path) -> int | None:
    """Takes a file of that name for this process; None while another has it, or is just removing it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as e:
        raise TpcError(f"{path.parent}: cannot write: {(e.strerror or str(e)).lower()}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_nlink:
            return fd
    except OSError:
        pass
    os.close(fd)
    return None


def check_shared(directory: Path, place: Place) -> None:
    """Raises `TpcError` unless all ranks see one directory: each looks for a file that rank 0 wrote. Collective."""
    if place.world == 1:
        return
    probe = directory / f".shared-{place.board.gather('shared/name', str(os.getpid()))[0]}"
    error = ""
    if place.rank == 0:
        probe.write_text("")
    place.board.gather("shared/written")
    try:
        os.listdir(directory)  # a network file system may have cached that there is no such file
        error = "" if probe.is_file() else "does not hold what rank 0 wrote there: it is not shared"
        own = probe.with_name(f"{probe.name}-{place.rank}")
        own.write_text("")
        own.unlink()
    except OSError as e:
        error = f"cannot be written: {(e.strerror or str(e)).lower()}"
    found = place.board.gather("shared/found", error and f"{os.uname().nodename}): {directory} {error}")
    if place.rank == 0:
        probe.unlink(missing_ok=True)
    for rank, text in enumerate(found):
        if text:
            raise TpcError(f"rank {rank} (host {text}; -o needs a directory that all hosts see")
