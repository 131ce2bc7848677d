"""A run's state to and from its checkpoints."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from tpcompiler.capture import capture_recorded, record
from tpcompiler.errors import TpcError
from tpcompiler.load.target import Loaded
from tpcompiler.runtime.stored import disk
from tpcompiler.train.hold.mapping import NameMap, Renaming, check_checkpoint, values_of
from tpcompiler.train.hold.owned import checkpoint_mesh, entries, from_constructor
from tpcompiler.train.optim.average import kept_state
from tpcompiler.train.optim.scaler import Scale
from tpcompiler.train.optim.spikes import Spikes
from tpcompiler.train.run.checkpoint import Snapshot, State, find, set_aside_newer
from tpcompiler.train.run.training_run import CHECKPOINTS, SETTINGS, Tell, TrainingRun, check_changes
from tpcompiler.train.settings import Train
from tpcompiler.train.step.engine import Engine
from tpcompiler.weights import Manifest, Weights, open_source
from tpcompiler.weights.atomic import replacing_file
from tpcompiler.weights.wire import to_tree


@dataclass(frozen=True)
class Start:
    """Where a run's values come from when it has no checkpoint, and what may differ when it has one."""

    weights: Path | None = None
    renaming: Renaming = field(default_factory=Renaming)
    allow_changed: tuple[str, ...] = ()


def names_in(loaded: Loaded, weights: Path, renaming: Renaming) -> NameMap:
    """Where each parameter of a model is in a file of weights. Nothing is compiled, and no value is read."""
    with loaded.environment:
        captured = capture_recorded(record(loaded.build), loaded.inputs(), source=loaded.source)
    with open_source(weights) as source:
        return values_of(source, captured, renaming)[0]


def resume(run: TrainingRun, start: Start, tell: Tell) -> None:
    """Gives the engine its values: from the newest whole checkpoint, else from `start.weights`, else initial ones."""
    engine = run.engine
    found = newest_whole(run, tell)
    if found is not None:
        state = State.load(found)
        keep_schedule(run, state)
        check_changes(dict(state.settings), run.settings, start.allow_changed, tell)
        restore(run, found, state)
        tell(f"continues from {found}: step {state.step} of {run.train.steps}")
    elif start.weights is not None:
        with open_source(start.weights) as source:
            mapping, read = values_of(source, engine.compiled.capture, start.renaming)
            engine.fill(read)
        tell(f"weights from {start.weights}{mapping.note}")
    else:
        recorded, seed = engine.compiled.recorded, run.spec.seed
        engine.fill(from_constructor(lambda name: recorded.replay(name, seed)))
    if run.directory is not None and run.speaks:
        _write_settings(run.directory, run.settings)


def newest_whole(run: TrainingRun, tell: Tell, key: str = "resume") -> Path | None:
    """The newest whole checkpoint of the run, if it has any. Damaged ones are set aside, so that none is counted."""
    if run.directory is None:
        return None
    found, refused = find(run.directory / CHECKPOINTS, run.place.board, key)
    for line in refused:
        tell(f"checkpoint refused: {line}")
    if found is None and refused:
        raise TpcError(f"{run.directory}: no checkpoint there is whole; {refused[0]}")
    set_aside_newer(run.directory / CHECKPOINTS, found, run.place.board)
    return found


def restore(run: TrainingRun, found: Path, state: State) -> None:
    """Puts the engine and the position in the data back to a checkpoint."""
    engine = run.engine
    with Weights(found) as source:
        check_checkpoint(source, engine.compiled.capture)
        engine.restore(source.read, state.updates)
    engine.skipped = state.skipped
    engine.spikes = Spikes(run.train.spike, state.recent)
    if engine.scale is not None and state.scale is not None:
        engine.scale = Scale.from_state_dict(state.scale)
    run.first = state.step
    run.batches = replace(run.batches, first_step=state.step, first_position=state.position)


def keep_schedule(run: TrainingRun, state: State) -> None:
    """More `steps` do not stretch the schedule: its end stays where it was when the run began, unless it is set."""
    until = state.settings.get("train.schedule.until")
    if until is not None and run.train.schedule.until is None:
        train = run.train
        kept: Train = train.model_copy(update={"schedule": train.schedule.model_copy(update={"until": until})})
        run.train = run.engine.train = kept
        run.settings["train.schedule.until"] = until


def save(run: TrainingRun, step: int, evaluation: float | None) -> None:
    """Starts a checkpoint of this moment. Collective in that all ranks call it at the same step."""
    assert run.writer is not None
    run.writer.wait()  # before the copies are overwritten
    engine = run.engine
    program, scale = engine.compiled.sharded.program, engine.scale
    parameters = [p.name for p in program.capture.parameters if not p.buffer]
    state = State(
        step=step,
        position=run.batches.position(step),
        tokens=run.batches.position(step) * run.train.sequence,
        seed=run.spec.seed,
        data_seed=run.train.seed,
        updates=step - engine.left_out,
        skipped=engine.skipped,
        scale=scale.state_dict() if scale is not None else None,
        evaluation=evaluation,
        layouts={name: [to_tree(d) for d in program.dims[name]] for name in parameters},
        settings=run.settings,
        model=run.model,
        recent=engine.spikes.state(),
    )
    listed = entries(program, engine.numbers.master, kept_state(run.train.optimizer))
    tensors = run.host.copy({**engine.tensors(), **_buffers(engine)})
    mesh = checkpoint_mesh(program.mesh)
    rank = mesh.rank(engine.ranks.coords)
    files: dict[str, dict[str, Tensor]] = {}
    for entry in listed:
        if entry.per_rank or run.speaks:
            files.setdefault(entry.file_of(rank), {})[entry.name] = tensors[entry.name]
    manifest = Manifest(mesh, tuple(listed), spec=run.spec.dump()) if run.speaks else None
    run.writer.start(Snapshot(state, files, manifest))


def _buffers(engine: Engine) -> dict[str, Tensor]:
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


def _write_settings(directory: Path, settings: dict[str, object]) -> None:
    path = directory / SETTINGS
    with disk(path, "write"), replacing_file(path) as new:
        new.write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")
