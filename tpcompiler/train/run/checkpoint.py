"""Checkpoints: written while the run goes on, whole or not at all, the newest and the best kept.

A checkpoint is a directory in the manifest format (docs/format.md): files of each rank, `state.json`, the manifest.

    RUN/checkpoints/step-00000100/            complete: it has its name
    RUN/checkpoints/.step-00000200.tmp/       being written, or left by a crash

How it is committed: (1) every rank copies its tensors to memory of its own and goes on training; (2) a thread writes
them to the temporary directory, syncs, and posts size and digest of its file on the board; (3) rank 0's thread, having
seen all ranks' files, writes `state.json` and the manifest, syncs the directory, and renames it. Until the rename the
checkpoint does not exist; after it, it is complete. A kill at any moment leaves at most a temporary directory, which
the next start removes.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpcompiler.errors import TpcError, WeightsError
from tpcompiler.runtime.stored import disk
from tpcompiler.train.run.board import Board
from tpcompiler.weights import FileInfo, Manifest, load_manifest, save_manifest, write_file, write_text
from tpcompiler.weights.atomic import put_in_place

STATE = "state.json"
_PREFIX = "step-"
_PATIENCE = 10.0  # seconds for the others to end their part of a checkpoint that has failed


@dataclass(frozen=True)
class State:
    """What a checkpoint knows besides tensors. All randomness is counter-based: seed and step are its whole state."""

    step: int  # optimizer steps done, skipped ones among them
    position: int  # samples seen
    tokens: int  # seen
    seed: int  # of weights and dropout
    data_seed: int  # of the data's order and of the masking
    updates: int  # steps that changed the weights: all but those that were left out
    scale: Mapping[str, float | int] | None = None  # fp16's loss scale
    evaluation: float | None = None  # the loss on held-out text at this step, if it was taken
    layouts: Mapping[str, Any] = field(default_factory=dict)  # parameter → its layout, before data ranks share it
    settings: Mapping[str, Any] = field(default_factory=dict)  # all that the run is made of, by dotted key
    model: Mapping[str, Any] = field(default_factory=dict)  # its source, and the overrides of its arguments
    recent: Sequence[Sequence[float]] = ()  # loss and norm of the last steps, to know a spike by
    skipped: int = 0  # steps left out because a batch was bad; those that the loss scale left out are in `scale`

    def dump(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def load(cls, directory: Path) -> State:
        path = directory / STATE
        try:
            return cls(**json.loads(path.read_bytes()))
        except OSError as e:
            raise WeightsError(f"{path}: cannot read: {(e.strerror or str(e)).lower()}") from None
        except (ValueError, TypeError) as e:
            raise WeightsError(f"{path}: not the state of a run: {' '.join(str(e).split())}") from None


@dataclass(frozen=True)
class Snapshot:
    """A rank's part of a checkpoint, in memory of its own: file → its tensors. Rank 0's has the manifest as well."""

    state: State
    files: Mapping[str, Mapping[str, Tensor]]
    manifest: Manifest | None = None  # rank 0: it lists no files yet


class Host:
    """Memory that snapshots are taken to, the same for each: pinned where the tensors are on a GPU."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Waits until everything is copied. The copies hold until the next call for these names."""
        for name, t in tensors.items():
            if name not in self._held:
                self._held[name] = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
            self._held[name].copy_(t, non_blocking=True)
        if any(t.is_cuda for t in tensors.values()):
            torch.cuda.synchronize()
        return {name: self._held[name] for name in tensors}


class Writer:
    """Writes a run's checkpoints, one at a time, in a thread. Every rank has one and calls it at the same steps."""

    def __init__(self, directory: Path, board: Board, keep: int = 2, keep_best: bool = True) -> None:
        self.directory, self.keep, self.keep_best = directory, keep, keep_best
        self._board = board.clone()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._done: list[Path] = []

    def start(self, snapshot: Snapshot) -> None:
        """Begins to write, after the one before is done. Raises what went wrong with that."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(snapshot,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written. Raises `TpcError` when a checkpoint could not be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._check()

    def done(self) -> list[Path]:
        """The checkpoints that were completed since the last call (rank 0). Raises what went wrong."""
        self._check()
        done, self._done = self._done, []
        return done

    def _check(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, snapshot: Snapshot) -> None:
        try:
            self.write(snapshot)
        except BaseException as e:
            self._error = e

    def write(self, snapshot: Snapshot) -> None:
        """Writes and commits, in this thread."""
        step = snapshot.state.step
        temporary = self.directory / f".{name_of(step)}.tmp"
        key = f"checkpoint/{step}"
        try:
            infos = self._own_files(temporary, snapshot)
        except WeightsError as e:
            self._board.post(f"{key}/{self._board.rank}", json.dumps({"error": str(e)}))
            if self._board.rank:
                return  # rank 0 says it
            for rank in range(1, self._board.world):  # or they would write into what is being removed
                self._board.wait(f"{key}/{rank}", min(_PATIENCE, self._board.timeout))
            self._discard(temporary)
            raise
        self._board.post(f"{key}/{self._board.rank}", json.dumps({"files": [asdict(info) for info in infos]}))
        if self._board.rank:
            return
        try:
            self._commit(temporary, snapshot, self._collect(key, temporary))
        except TpcError:
            self._discard(temporary)
            raise
        self._done.append(self.directory / name_of(step))
        self._prune()

    def _own_files(self, temporary: Path, snapshot: Snapshot) -> list[FileInfo]:
        with disk(temporary, "write"):
            temporary.mkdir(parents=True, exist_ok=True)
        return [write_file(temporary / name, tensors) for name, tensors in snapshot.files.items() if tensors]

    def _collect(self, key: str, temporary: Path) -> list[FileInfo]:
        files = []
        for rank in range(self._board.world):
            text = self._board.wait(f"{key}/{rank}")
            if text is None:
                raise TpcError(f"checkpoint: rank {rank} has not written its part within {self._board.timeout:g} s")
            value = json.loads(text)
            if "error" in value:
                raise WeightsError(f"checkpoint: {value['error']}")
            files += [FileInfo(**info) for info in value["files"]]
        for rank in range(self._board.world):
            self._board.delete(f"{key}/{rank}")
        for info in files:  # what other hosts wrote must be here, or the checkpoint would not be whole
            try:
                there = (temporary / info.name).stat().st_size
            except OSError:
                there = -1
            if there != info.bytes:
                raise WeightsError(
                    f"checkpoint: {temporary / info.name} is not on this host; is {self.directory} shared?"
                )
        return files

    def _commit(self, temporary: Path, snapshot: Snapshot, files: list[FileInfo]) -> None:
        assert snapshot.manifest is not None
        files.append(write_text(temporary / STATE, snapshot.state.dump()))
        save_manifest(snapshot.manifest.with_files(files), temporary)
        target = self.directory / name_of(snapshot.state.step)
        with disk(target, "write"):
            put_in_place(temporary, target)  # for a damaged one that the run went back behind, if there is one

    def _discard(self, temporary: Path) -> None:
        shutil.rmtree(temporary, ignore_errors=True)

    def _prune(self) -> None:
        """Keeps the newest and the best. A damaged one is set aside: it must not take the place of a whole one."""
        complete = []
        for path in checkpoints(self.directory):
            if _resized(path):
                set_aside(path)
            else:
                complete.append(path)
        kept = set(complete[: self.keep])
        if self.keep_best:
            losses = {path: _evaluation(path) for path in complete}
            kept |= set(sorted((p for p, e in losses.items() if e is not None), key=lambda p: losses[p] or 0.0)[:1])
        for path in complete:
            if path not in kept:
                remove(path)
        sweep(self.directory, keep_temporary=True)


def name_of(step: int) -> str:
    return f"{_PREFIX}{step:08d}"


def checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints of a run, newest first."""
    found = directory.glob(f"{_PREFIX}*") if directory.is_dir() else ()
    steps = [(p.name.removeprefix(_PREFIX), p) for p in found if p.is_dir()]
    return [p for _, p in sorted(((int(s), p) for s, p in steps if s.isdecimal()), reverse=True)]


def remove(path: Path) -> None:
    """Takes a checkpoint away: first its name, so that half of one is never found."""
    aside = path.with_name(f".{path.name}.old")
    try:
        if aside.exists():
            shutil.rmtree(aside)
        os.rename(path, aside)
    except OSError:
        return  # it stays; the next one tries again
    shutil.rmtree(aside, ignore_errors=True)


def set_aside(path: Path, why: str = "damaged") -> Path | None:
    """Renames a checkpoint, so that it is never counted, nor deleted. Returns its new path."""
    there = path.with_name(f"{why}-{path.name}")
    shutil.rmtree(there, ignore_errors=True)
    try:
        os.rename(path, there)
    except OSError:
        return None
    return there


def _resized(path: Path) -> bool:
    """Whether a file of a checkpoint is missing or has another size than its manifest says. Reads no tensor."""
    try:
        return any((path / f.name).stat().st_size != f.bytes for f in load_manifest(path).files)
    except (WeightsError, OSError):
        return True


def sweep(directory: Path, keep_temporary: bool = False) -> None:
    """Removes what a crash left. Only the owner of a run may: see `locked`."""
    for pattern in ("old",) if keep_temporary else ("old", "tmp"):
        for path in directory.glob(f".{_PREFIX}*.{pattern}"):
            shutil.rmtree(path, ignore_errors=True)


def _evaluation(path: Path) -> float | None:
    try:
        return State.load(path).evaluation
    except WeightsError:
        return None


def find(directory: Path, board: Board, key: str = "resume") -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and why newer ones are not. Collective: ranks share the reading.

    Sizes and digests of all files are compared with the manifest. Changes nothing on the disk.
    """
    refused: list[str] = []
    candidates = json.loads(board.gather(f"{key}/list", json.dumps([p.name for p in checkpoints(directory)]))[0])
    for name in candidates:
        path = directory / name
        found = [e for e in board.gather(f"{key}/{name}", _damage(path, board.rank, board.world)) if e]
        if not found:
            return path, refused
        refused.append(found[0])
    return None, refused


def set_aside_newer(directory: Path, found: Path | None, board: Board) -> None:
    """Sets aside what `find` refused: the checkpoints newer than `found`. Rank 0 does it. Collective."""
    if board.rank == 0 and found is not None:
        for path in checkpoints(directory):
            if path == found:
                break
            set_aside(path)


def leave(directory: Path, newest: Path, board: Board, key: str) -> Path:
    """Goes back behind the newest checkpoint, to the one before if that is whole. Collective.

    The one that is left gets another name, or a run that is killed now would continue from it.
    """
    before = [p.name for p in checkpoints(directory) if p.name < newest.name]
    name = board.gather(f"{key}/before", before[0] if before else "")[0]
    if not name or any(board.gather(f"{key}/whole", _damage(directory / name, board.rank, board.world))):
        return newest
    if board.rank == 0:
        set_aside(newest, "left")
    return directory / name


def _damage(path: Path, part: int, parts: int) -> str:
    from tpcompiler.weights import verify

    try:
        names = [f.name for f in load_manifest(path).files]
        if STATE not in names:
            raise WeightsError(f"{path}: holds no {STATE}: not a checkpoint of the trainer")
        verify(path, names[part::parts])
        State.load(path)
    except WeightsError as e:
        return str(e)
    return ""
