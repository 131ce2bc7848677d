"""Safetensors files read and written piece by piece.

Own code, not the safetensors library's: that one writes from a whole dictionary in memory, and by default reads through
a memory map, whose pages count as the process's own and whose I/O errors are signals. Here a read touches the bytes of
the slice alone, and a short or failing disk is an error with a name. The files are the library's, both ways.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from tpcompiler.errors import WeightsError
from tpcompiler.runtime.runs import Slice, bits, intersect, positions, put, shape_of, slice_of, whole

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}

BLOCK = 32 << 20  # bytes of a tensor in memory at once
_SCATTERED = 4096  # bytes: shorter pieces are cheaper cut from whole rows than read one by one
_LONGEST_HEADER = 100_000_000  # bytes, the format's own limit


def blocks(shape: Sequence[int], itemsize: int) -> Iterator[Slice]:
    """A tensor as slices of whole rows, of at most `BLOCK` bytes where a row is not longer than that."""
    if not shape or 0 in shape:
        yield whole(shape)
        return
    rows = max(1, BLOCK // (prod(shape[1:]) * itemsize))
    for a in range(0, shape[0], rows):
        yield (((a, min(a + rows, shape[0])),), *whole(shape[1:]))


@contextmanager
def disk(path: Path | str, doing: str) -> Iterator[None]:
    """Failures of the disk as one line."""
    try:
        yield
    except OSError as e:
        raise WeightsError(f"{path}: cannot {doing}: {(e.strerror or str(e)).lower()}") from None


def memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable, valid while the tensor lives."""
    assert tensor.is_contiguous()
    assert tensor.is_cpu
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr()))


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: the bytes `start` … `stop - 1` of it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class FileInfo:
    """A finished file: size in bytes and SHA-256 of its content, in hexadecimal."""

    name: str
    bytes: int
    sha256: str


class Reader:
    """A safetensors file, open. Reads slices; safe to use from several threads.

    Errors: `WeightsError` when the file is missing, is not a safetensors file, or ends too early.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with disk(path, "read"):
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.tensors: Mapping[str, Stored] = self._header()
        except BaseException:
            self.close()
            raise

    def read(self, name: str, runs: Slice | None = None) -> torch.Tensor:
        """A slice of a tensor (default: all of it), in the file's dtype."""
        t = self.tensors[name]
        every = whole(t.shape)
        runs = every if runs is None else runs
        out = torch.empty(shape_of(runs), dtype=t.dtype)
        if out.numel() == 0:
            return out
        split = [d for d, (mine, all_) in enumerate(zip(runs, every, strict=True)) if mine != all_]
        if not split:
            self._fill(memory(out), t.start)
        elif out.nbytes // self._pieces(runs, split[-1]) >= _SCATTERED:
            self._read_pieces(t, runs, split[-1], memory(out))
        else:
            self._read_rows(t, runs, out)
        return out

    @staticmethod
    def _pieces(runs: Slice, last: int) -> int:
        """How many contiguous pieces a slice has, `last` being the last dimension that is not whole."""
        return prod(shape_of(runs[:last])) * len(runs[last])

    def _read_pieces(self, t: Stored, runs: Slice, last: int, out: memoryview) -> None:
        strides = [prod(t.shape[d + 1 :]) * t.dtype.itemsize for d in range(last + 1)]
        at = 0
        for index in product(*([i for a, b in r for i in range(a, b)] for r in runs[:last])):
            base = t.start + sum(i * s for i, s in zip(index, strides, strict=False))
            for a, b in runs[last]:
                n = (b - a) * strides[last]
                self._fill(out[at : at + n], base + a * strides[last])
                at += n

    def _read_rows(self, t: Stored, runs: Slice, out: torch.Tensor) -> None:
        row = prod(t.shape[1:]) * t.dtype.itemsize
        for block in blocks(t.shape, t.dtype.itemsize):
            mine = intersect(runs[0], block[0])
            if not mine:
                continue
            lo, hi = mine[0][0], mine[-1][1]
            rows = torch.empty((hi - lo, *t.shape[1:]), dtype=t.dtype)
            self._fill(memory(rows), t.start + lo * row)
            value = slice_of(rows, (positions(mine, ((lo, hi),)), *runs[1:]))
            put(out, (positions(mine, runs[0]), *whole(out.shape[1:])), value)

    def _fill(self, buffer: memoryview, offset: int) -> None:
        at = 0
        while at < len(buffer):
            with disk(self.path, "read"):
                n = os.preadv(self._fd, [buffer[at:]], offset + at)
            if n == 0:
                raise WeightsError(f"{self.path}: truncated: ends before byte {offset + len(buffer)}")
            at += n

    def _header(self) -> dict[str, Stored]:
        size = os.fstat(self._fd).st_size
        prefix = os.pread(self._fd, 8, 0)
        n = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or n > _LONGEST_HEADER:
            raise WeightsError(f"{self.path}: not a safetensors file")
        if 8 + n > size:
            raise WeightsError(f"{self.path}: truncated: the header is {n} bytes long, the file {size}")
        header = torch.empty(n, dtype=torch.uint8)
        self._fill(memory(header), 8)
        try:
            entries = json.loads(bytes(memory(header)), object_pairs_hook=_no_duplicates)
            entries.pop("__metadata__", None)
            out = {name: _stored(name, e, 8 + n) for name, e in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            what = " ".join(str(e).split()) or type(e).__name__
            raise WeightsError(f"{self.path}: the header is corrupt: {what}") from None
        at = 8 + n
        for name, t in sorted(out.items(), key=lambda item: (item[1].start, item[1].stop)):
            if t.start != at:
                raise WeightsError(f"{self.path}: the header is corrupt: {name!r} begins at byte {t.start}, not {at}")
            at = t.stop
        if at != size:
            what = "truncated" if at > size else "altered"
            raise WeightsError(f"{self.path}: {what}: {size} bytes long, its header says {at}")
        return out

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    out = dict(pairs)
    if len(out) < len(pairs):
        raise ValueError("a name stands twice")
    return out


def _stored(name: str, entry: dict[str, Any], base: int) -> Stored:
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if code not in DTYPES:
        raise ValueError(f"{name} has the unknown dtype {code!r}")
    sizes_fit = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
    offsets_fit = isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int and n >= 0 for n in offsets)
    if not (sizes_fit and offsets_fit):
        raise ValueError(f"{name} has no proper shape and offsets")
    dtype, (start, stop) = DTYPES[code], offsets
    if stop - start != prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} {code} {shape} has {stop - start} bytes")
    return Stored(dtype, tuple(shape), base + start, base + stop)


@dataclass(frozen=True)
class Spot:
    """A tensor that a file is going to hold."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Writer:
    """A safetensors file being written: the header first, then the tensors' bytes, in the order of `spots`.

    The order must put wider dtypes first (`in_order`), so that every tensor is aligned. `close` syncs the file and
    returns its digest. Errors: `WeightsError` when the disk is full or fails.
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
        """Append a tensor, or the next rows of one."""
        if tensor.numel():
            value = bits(tensor.detach()).cpu().contiguous()  # a name of its own: `memory` does not keep it alive
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
        """Close without a word. Whoever made the temporary place removes the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.abort()


def in_order(spots: Iterable[Spot]) -> list[Spot]:
    """Wider dtypes first, otherwise as given."""
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
    """One safetensors file from tensors in memory, synced: what one rank contributes to a checkpoint."""
    spots = in_order(Spot(name, t.dtype, tuple(t.shape)) for name, t in tensors.items())
    with Writer(path, spots) as writer:
        for spot in spots:
            writer.write(tensors[spot.name])
        return writer.close()


def digest(path: Path) -> FileInfo:
    """Size and SHA-256 of a file as it lies on the disk."""
    sha, n = hashlib.sha256(), 0
    with disk(path, "read"), open(path, "rb", buffering=0) as file:
        buffer = memoryview(bytearray(1 << 20))
        while got := file.readinto(buffer):
            sha.update(buffer[:got])
            n += got
    return FileInfo(path.name, n, sha.hexdigest())


def write_text(path: Path, text: str) -> FileInfo:
    """A small text file (`state.json`, `model.py`), new and synced."""
    data = text.encode()
    with disk(path, f"write {len(data)} bytes"), open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileInfo(path.name, len(data), hashlib.sha256(data).hexdigest())
