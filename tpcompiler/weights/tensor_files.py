"""Writes safetensors files piece by piece.

The safetensors library can only write whole dictionaries from memory, so that this is a writer of our own. Any reader
of safetensors reads its files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

import torch

from tpcompiler.runtime.runs import bits
from tpcompiler.runtime.stored import DTYPES, disk, memory

CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class FileInfo:
    """A finished file: its name, its size in bytes, and the SHA-256 of its content in hexadecimal."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Spot:
    """A tensor's place in a file: its name, dtype and shape there."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class TensorFileWriter:
    """Writes a safetensors file: first the header, then the tensors' bytes in the order of `spots`.

    The order must put wider dtypes first (`in_order`), so that every tensor is aligned. `close` syncs the file and
    returns its digest. Raises `WeightsError` when the disk is full or fails.
    """

    def __init__(self, path: Path, spots: Sequence[Spot]) -> None:
        self.path = path
        self._sha = hashlib.sha256()
        self._written = 0
        header = _make_header(spots)
        self._size = len(header) + sum(s.bytes for s in spots)
        with disk(path, "write"):
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._append(memoryview(header))

    def write(self, tensor: torch.Tensor) -> None:
        """Appends a tensor, or the next rows of one."""
        if tensor.numel():
            value = bits(tensor.detach()).cpu().contiguous()  # the name keeps it alive, as `memory` alone would not
            self._append(memory(value))

    def _append(self, data: memoryview) -> None:
        self._sha.update(data)
        self._written += len(data)
        with disk(self.path, f"write {self._size} bytes"):
            while len(data):
                data = data[os.write(self._fd, data) :]

    def close(self) -> FileInfo:
        assert self._written == self._size, f"{self.path}: {self._written} bytes of {self._size}"
        try:
            with disk(self.path, "sync"):
                os.fsync(self._fd)
        finally:
            self.abort()
        return FileInfo(self.path.name, self._written, self._sha.hexdigest())

    def abort(self) -> None:
        """Closes an unfinished file and reports no error. Whoever made the temporary directory removes it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.abort()


def in_order(spots: Iterable[Spot]) -> list[Spot]:
    """The tensors with wider dtypes first, otherwise in the given order."""
    return sorted(spots, key=lambda s: -s.dtype.itemsize)


def _make_header(spots: Sequence[Spot]) -> bytes:
    assert list(spots) == in_order(spots)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for s in spots:
        assert s.name not in entries, s
        entries[s.name] = {"dtype": CODES[s.dtype], "shape": list(s.shape), "data_offsets": [at, at + s.bytes]}
        at += s.bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_file(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileInfo:
    """Writes and syncs a safetensors file from tensors in memory, such as one rank's part of a checkpoint."""
    spots = in_order(Spot(name, t.dtype, tuple(t.shape)) for name, t in tensors.items())
    with TensorFileWriter(path, spots) as writer:
        for spot in spots:
            writer.write(tensors[spot.name])
        return writer.close()


def digest(path: Path) -> FileInfo:
    """The size and SHA-256 of a file, read from the disk."""
    sha, n = hashlib.sha256(), 0
    with disk(path, "read"), open(path, "rb", buffering=0) as file:
        buffer = memoryview(bytearray(1 << 20))
        while got := file.readinto(buffer):
            sha.update(buffer[:got])
            n += got
    return FileInfo(path.name, n, sha.hexdigest())


def write_text(path: Path, text: str) -> FileInfo:
    """Writes and syncs a new, small text file, such as `state.json` or `model.py`."""
    data = text.encode()
    with disk(path, f"write {len(data)} bytes"), open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileInfo(path.name, len(data), hashlib.sha256(data).hexdigest())
