"""A checkpoint is whole or not there: whatever operation a crash comes at, on whatever rank."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tpcompiler.errors import WeightsError
from tpcompiler.layout import Factor
from tpcompiler.runtime.mesh import Mesh
from tpcompiler.train.run.board import Board
from tpcompiler.train.run.checkpoint import STATE, Snapshot, State, Writer, checkpoints, find, name_of, sweep
from tpcompiler.weights import Entry, Layout, Manifest, Weights
from tpcompiler.weights.manifest import BUFFER_FILE, RANK_FILE

MESH = Mesh((("tensor", 2),))
DIMS = (Factor(6, "n", ("tensor",)), Factor(3))


class Crash(BaseException):
    """The process is gone: nothing after this is done, no handler, no clean-up."""


def whole(step: int) -> Tensor:
    return torch.arange(18.0).view(6, 3) + 100 * step


def snapshot(step: int, rank: int, evaluation: float | None = None) -> Snapshot:
    state = State(step, 8 * step, 128 * step, 0, 0, step, evaluation=evaluation)
    files = {RANK_FILE.format(rank=rank): {"w": whole(step)[3 * rank : 3 * rank + 3]}}
    if rank:
        return Snapshot(state, files)
    entry = Entry("w", "parameter", torch.float32, Layout.of(DIMS, MESH), stored=("w",))
    buffer = Entry("b", "buffer", torch.float32, Layout.of((Factor(2),), MESH), BUFFER_FILE, stored=("b",))
    return Snapshot(state, {**files, BUFFER_FILE: {"b": torch.ones(2)}}, Manifest(MESH, (entry, buffer)))


@pytest.fixture(scope="module")
def server() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))


def write(
    directory: Path, step: int, store: dist.TCPStore, timeout: float = 20.0, **kwargs: Any
) -> list[BaseException]:
    """Both ranks write a checkpoint, at the same time. Gives what went wrong, rank 0's first."""
    errors: dict[int, BaseException] = {}

    def rank(r: int) -> None:
        writer = Writer(directory, Board(r, 2, store, timeout), **kwargs)
        try:
            writer.write(snapshot(step, r, evaluation=kwargs.get("evaluation")))
        except BaseException as e:
            errors[r] = e

    threads = [threading.Thread(target=rank, args=(r,), name=f"rank-{r}") for r in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for r in range(2):
        store.delete_key(f"checkpoint/{step}/{r}")
    return [errors[r] for r in sorted(errors)]


def assert_whole(path: Path) -> None:
    step = State.load(path).step
    with Weights(path) as weights:
        assert torch.equal(weights.read("w"), whole(step))
        assert torch.equal(weights.read("b"), torch.ones(2))
    assert path.name == name_of(step)


@contextmanager
def crashing(at: int, rank: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """The `at`-th file operation of a rank's thread is its last; half of a write is done. Gives how many there were."""
    count = 0
    dead: set[int] = set()

    def guarded(name: str) -> Callable[..., Any]:
        original = getattr(os, name)

        def operation(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            me = threading.get_ident()
            if me in dead:
                raise Crash
            if threading.current_thread().name != f"rank-{rank}":
                return original(*args, **kwargs)
            count += 1
            if count == at:
                dead.add(me)
                if name == "write" and len(args[1]) > 1:
                    original(args[0], args[1][: len(args[1]) // 2])
                raise Crash
            return original(*args, **kwargs)

        return operation

    with monkeypatch.context() as m:
        for name in ("write", "fsync", "rename", "mkdir", "open", "unlink", "rmdir"):
            m.setattr(os, name, guarded(name))
        yield lambda: count


def test_a_crash_at_any_file_operation_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: dist.TCPStore
) -> None:
    with crashing(0, 0, monkeypatch) as count:
        assert write(tmp_path / "all", 1, server) == []
    operations = count()
    assert operations > 10
    found = set()
    for rank in range(2):
        for at in range(1, operations + 1):
            here = shutil.copytree(tmp_path / "all", tmp_path / f"{rank}-{at}")
            with crashing(at, rank, monkeypatch) as count:
                errors = write(here, 2, server, timeout=0.1 if rank else 20.0, keep=1)
            if count() < at:
                break  # rank 1 does less
            assert any(isinstance(e, Crash) for e in errors)
            sweep(here)  # the next start
            path, refused = find(here, Board())
            assert path is not None
            assert refused == []
            assert_whole(path)
            found.add((rank, State.load(path).step))
            assert write(here, 3, server) == []
            assert_whole(checkpoints(here)[0])
            assert not [p for p in here.iterdir() if p.name.startswith(".")]
    assert found == {(0, 1), (0, 2), (1, 1)}


@pytest.mark.parametrize("file", [RANK_FILE.format(rank=1), BUFFER_FILE, STATE, "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_damaged_ones_are_refused_by_name_and_the_one_before_is_taken(
    file: str, damage: str, tmp_path: Path, server: dist.TCPStore
) -> None:
    for step in (1, 2):
        assert write(tmp_path, step, server) == []
    path = tmp_path / name_of(2) / file
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-3])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    found, refused = find(tmp_path, Board())
    assert found == tmp_path / name_of(1)
    assert len(refused) == 1
    assert name_of(2) in refused[0]
    assert write(tmp_path, 2, server) == []  # the run comes by there again
    assert_whole(tmp_path / name_of(2))


def test_the_newest_and_the_best_are_kept(tmp_path: Path, server: dist.TCPStore) -> None:
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 2.5, 6: None}
    for step, loss in losses.items():
        threads = []
        for r in range(2):
            writer = Writer(tmp_path, Board(r, 2, server, 20.0), keep=2)
            threads.append(threading.Thread(target=writer.write, args=(snapshot(step, r, loss),)))
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert [State.load(p).step for p in checkpoints(tmp_path)] == [6, 5, 2]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_is_one_error_on_rank_0_and_nothing_is_lost(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: dist.TCPStore
) -> None:
    assert write(tmp_path, 1, server) == []
    original = os.write

    def full(fd: int, data: Any) -> int:
        if threading.current_thread().name == f"rank-{rank}":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(fd, data)

    with monkeypatch.context() as m:
        m.setattr(os, "write", full)
        errors = write(tmp_path, 2, server)
    assert len(errors) == 1
    assert isinstance(errors[0], WeightsError)
    assert "no space left on device" in str(errors[0])
    assert RANK_FILE.format(rank=rank) in str(errors[0])
    assert [p.name for p in tmp_path.iterdir()] == [name_of(1)]


def test_a_rank_that_does_not_write_is_named(tmp_path: Path, server: dist.TCPStore) -> None:
    writer = Writer(tmp_path, Board(0, 2, server, 0.1))
    with pytest.raises(Exception, match="rank 1 has not written"):
        writer.write(snapshot(1, 0))
    assert checkpoints(tmp_path) == []
    assert not list(tmp_path.iterdir())


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    original = os.fsync

    def slow(fd: int) -> None:
        assert gate.wait(20)
        original(fd)

    monkeypatch.setattr(os, "fsync", slow)
    mesh = Mesh((("tensor", 1),))
    manifest = Manifest(mesh, (Entry("w", "parameter", torch.float32, Layout.of((Factor(3),), mesh)),))
    state, files = snapshot(1, 1).state, {RANK_FILE.format(rank=0): {"w": torch.ones(3)}}
    writer = Writer(tmp_path, Board())
    writer.start(Snapshot(state, files, manifest))
    assert writer.done() == []  # this thread is free, and the checkpoint not yet there
    assert checkpoints(tmp_path) == []
    gate.set()
    writer.start(Snapshot(replace(state, step=2), files, manifest))
    writer.wait()
    assert writer.done() == [tmp_path / name_of(1), tmp_path / name_of(2)]


def test_an_error_of_the_writing_thread_is_raised_by_the_training_one(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run", Board())
    (tmp_path / "run").write_text("in the way")
    mesh = Mesh((("tensor", 1),))
    writer.start(Snapshot(snapshot(1, 1).state, {}, Manifest(mesh, ())))
    with pytest.raises(WeightsError, match="cannot write"):
        writer.wait()
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
