"""Reads and checks files: a directory's sealed manifest, and safetensors files slice by slice.

This is not the safetensors library, which by default reads through a memory map: its pages count as the process's
memory, and its I/O errors are signals. Here, a read touches only the bytes of the slice, and a short file or a failing
disk is an error that names the file. This file needs only torch, because emitted programs use it.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch

from tpcompiler.errors import WeightsError
from tpcompiler.runtime.runs import Slice, intersect, positions, put, shape_of, slice_of, whole

MANIFEST = "manifest.json"
FORMAT = "tpcompiler"
VERSION = 1  # of the manifest
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip

BLOCK = 32 << 20  # bytes of a tensor in memory at once
_SCATTERED = 4096  # bytes: shorter pieces are cheaper cut from whole rows than read one by one
_LONGEST_HEADER = 100_000_000  # bytes, the format's own limit


@contextmanager
def disk(path: Path | str, doing: str) -> Iterator[None]:
    """Turns an `OSError` in the block into a `WeightsError`: `path: cannot write: no space left on device`."""
    try:
        yield
    except OSError as e:
        raise WeightsError(f"{path}: cannot {doing}: {(e.strerror or str(e)).lower()}") from None


def read_manifest(directory: Path | str) -> bytes:
    """The bytes of a directory's manifest. Raises `WeightsError` when there is none."""
    path = Path(directory) / MANIFEST
    if not Path(directory).is_dir():
        raise WeightsError(f"{directory}: no such directory")
    if not path.is_file():
        raise WeightsError(f"{directory}: no {MANIFEST} here: not a directory that `tpc shard` or the trainer wrote")
    with disk(path, "read"):
        return path.read_bytes()


def parse_manifest(raw: bytes, path: Path) -> dict[str, Any]:
    """The content of a manifest, whose format, version and digest are checked.

    Raises `WeightsError`, which names `path`. The caller must check the values of the keys.
    """
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as e:
        raise WeightsError(f"{path}: truncated or not JSON: {e}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise WeightsError(f"{path}: not a manifest of tpcompiler")
    if data.get("version") != VERSION:
        raise WeightsError(f"{path}: format version {data.get('version')}; this tpcompiler reads version {VERSION}")
    text = raw[: -len(seal(b""))]
    if raw != text + seal(text).encode():
        raise WeightsError(f"{path}: altered: its content does not have the digest that it names")
    return data


def seal(text: bytes) -> str:
    """The end of a manifest: the digest of all the bytes before it."""
    return f'"sha256": "{hashlib.sha256(text).hexdigest()}"\n}}\n'


def check_file_name(name: str) -> None:
    """Raises `ValueError` for a name in a manifest that leads out of its directory. A file per rank has {rank:05d}."""
    rest = name.replace("{rank:05d}", "0")
    if any(c in rest for c in "{}/\\\0") or rest in (".", ".."):
        raise ValueError(f"not a file name: {name!r}")


def check_size(path: Path, expected: int) -> None:
    """Raises `WeightsError` when a file is missing or has another size than its manifest says."""
    if not path.is_file():
        raise WeightsError(f"{path}: missing, although the manifest lists it")
    with disk(path, "read"):
        size = path.stat().st_size
    if size != expected:
        what = "truncated" if size < expected else "altered"
        raise WeightsError(f"{path}: {what}: {size} bytes, the manifest says {expected}")


def blocks(shape: Sequence[int], itemsize: int) -> Iterator[Slice]:
    """Divides a tensor into slices of whole rows, of at most `BLOCK` bytes or of one row."""
    if not shape or 0 in shape:
        yield whole(shape)
        return
    rows = max(1, BLOCK // (prod(shape[1:]) * itemsize))
    for a in range(0, shape[0], rows):
        yield (((a, min(a + rows, shape[0])),), *whole(shape[1:]))


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


class Reader:
    """An open safetensors file, which several threads may read.

    Raises `WeightsError` when the file is missing, is not a safetensors file, or ends too early.
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
        """A slice of a tensor, by default all of it, in the file's dtype."""
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
        """How many contiguous pieces of the file a slice has. `last` is the last dimension that is not whole."""
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
