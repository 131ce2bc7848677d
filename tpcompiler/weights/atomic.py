"""Directories that change all at once: written under a temporary name, synced, then renamed."""

from __future__ import annotations

import ctypes
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tpcompiler.errors import WeightsError
from tpcompiler.runtime.stored import disk

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def replacing(
    directory: Path | str, ours: Callable[[Path], bool], keep: Callable[[Path], list[Path]] = lambda old: []
) -> Iterator[Path]:
    """Yields a temporary directory, which becomes `directory` when the block succeeds and is removed when it fails.

    A crash at any moment leaves the old directory whole. The next writer removes what a killed one left behind.
    `ours(old)` says whether a non-empty directory may be replaced; raises `WeightsError` if not. `keep(old)` lists the
    entries of the old directory that are carried over, unless the new one has entries of the same name.
    """
    target = Path(os.path.realpath(directory))
    if target.exists() and not target.is_dir():
        raise WeightsError(f"{directory}: a file of that name is in the way")
    if target.is_dir() and any(target.iterdir()) and not ours(target):
        raise WeightsError(f"{directory}: holds other files; name a new or an empty directory")
    with _temporary(target, directory) as temporary:
        yield temporary
        with disk(directory, "write"):
            _carry(keep(target) if target.is_dir() else [], temporary)
            put_in_place(temporary, target)


@contextmanager
def replacing_file(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path, which becomes `path` when the block succeeds. The block writes and syncs the file.

    Raises `WeightsError` when a directory has that name or the disk fails.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise WeightsError(f"{path}: a directory of that name is in the way")
    with _temporary(target, path) as temporary:
        yield temporary / target.name
        with disk(path, "write"):
            os.replace(temporary / target.name, target)
            _sync(target.parent)


@contextmanager
def _temporary(target: Path, name: Path | str) -> Iterator[Path]:
    """Yields a locked directory beside the target. At the end it is removed, unless it was renamed."""
    with disk(name, "write"):
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        temporary, lock = _make(target)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def _carry(kept: list[Path], into: Path) -> None:
    for path in kept:
        if not os.path.lexists(into / path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.copytree(path, into / path.name, symlinks=True)
            else:
                shutil.copy2(path, into / path.name, follow_symlinks=False)


def put_in_place(new: Path, target: Path) -> None:
    """Renames a finished directory so that a crash cannot undo it. An old directory of that name is replaced."""
    _sync(new)
    _swap(new, target)
    _sync(target.parent)
    shutil.rmtree(new, ignore_errors=True)


def _sync(directory: Path) -> None:
    """Writes a directory's entries to the disk."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _make(target: Path) -> tuple[Path, int]:
    """Makes a temporary directory beside the target and locks it. The lock tells others that its writer is alive."""
    while True:
        path = target.with_name(f".{target.name}.tmp-{secrets.token_hex(4)}")
        path.mkdir()
        lock = _lock(path)
        if lock is not None and path.is_dir():
            return path, lock
        if lock is not None:  # another process swept it before it was locked
            os.close(lock)


def _sweep(target: Path) -> None:
    """Removes what killed writers of the same target left behind."""
    for path in target.parent.glob(f".{_escaped(target.name)}.tmp-*"):
        lock = _lock(path)
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _lock(path: Path) -> int | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


def _swap(temporary: Path, target: Path) -> None:
    """Exchanges the new directory with the old one, which ends up under the temporary name."""
    if not target.exists() or not any(target.iterdir()):
        os.rename(temporary, target)  # replaces an empty directory, atomically
        return
    if _exchange(temporary, target):
        return
    # There is no atomic exchange here (not Linux, or not on this file system). A crash between the two renames leaves
    # the old directory under the name `aside`.
    aside = target.with_name(f".{target.name}.old-{secrets.token_hex(4)}")
    os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except OSError:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    return renameat2 is not None and renameat2(_AT_FDCWD, bytes(a), _AT_FDCWD, bytes(b), _RENAME_EXCHANGE) == 0
