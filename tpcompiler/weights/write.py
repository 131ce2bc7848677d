"""Writes directories of weights: shard, merge, reshard. Weights are copied in blocks; no whole model is in memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from tpcompiler.errors import WeightsError
from tpcompiler.layout import Dim
from tpcompiler.program import Parameter
from tpcompiler.runtime.mesh import Mesh
from tpcompiler.runtime.runs import bits, intersect, positions, slice_of
from tpcompiler.runtime.stored import MANIFEST, blocks, check_size, disk
from tpcompiler.weights.atomic import replacing, replacing_file
from tpcompiler.weights.layouts import Layout
from tpcompiler.weights.manifest import BUFFER_FILE, EXTRA_FILE, RANK_FILE, Entry, Manifest, weight_mesh
from tpcompiler.weights.match import Job, entries_of, match, whole_layout
from tpcompiler.weights.sources import StateSource, Weights, open_source
from tpcompiler.weights.tensor_files import FileInfo, Spot, TensorFileWriter, digest, in_order, write_text
from tpcompiler.weights.wire import load_manifest, save_manifest

ByteProgress = Callable[[int, int], None]  # called with (bytes done, bytes in all)
Named = tuple[str, Entry]
Readable = StateSource | Mapping[str, torch.Tensor] | Path | str
MAX_FILE = 5 * 10**9  # bytes of a merged file, Hugging Face's limit


def shard(
    source: Readable | None,
    parameters: Sequence[Parameter],
    dims: Mapping[str, Sequence[Dim]],
    mesh: Mesh,
    directory: Path | str,
    *,
    spec: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    strip: str = "",
    progress: ByteProgress | None = None,
) -> Manifest:
    """Writes a model's weights for the ranks of `mesh` (without its `data` dimension) into `directory`, all or nothing.

    `dims` maps each parameter's name to its layout. `source` is anything that `open_source` takes; with None, only
    buffers and the manifest are written. `dtype` converts floating-point parameters; without it, every bit stays. The
    prefix `strip` is removed from the source's names. Tensors that the model does not have are kept for `merge`. An
    earlier output in `directory` is replaced; other files in it stay. Raises `WeightsError`, and then leaves the
    directory as it was.
    """
    with output(directory) as new:
        return write_shards(source, parameters, dims, mesh, new, spec=spec, dtype=dtype, strip=strip, progress=progress)


def write_shards(
    source: Readable | None,
    parameters: Sequence[Parameter],
    dims: Mapping[str, Sequence[Dim]],
    mesh: Mesh,
    into: Path,
    *,
    spec: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    strip: str = "",
    progress: ByteProgress | None = None,
) -> Manifest:
    """`shard` into a directory that exists, such as the temporary one of `output`. A failure may leave files there."""
    entries = entries_of(parameters, dims, mesh)
    with ExitStack() as stack:
        opened = None if source is None else stack.enter_context(open_source(source, strip))
        jobs = match(opened, parameters, entries, mesh, dtype)
        known = {job.entry.name for job in jobs}
        described = [replace(e, file="") for e in entries if e.name not in known]
        files = write_jobs(jobs, into, progress)
    manifest = Manifest(weight_mesh(mesh), (*described, *(job.entry for job in jobs)), spec=dict(spec or {}))
    manifest = manifest.with_files(files)
    save_manifest(manifest, into)
    return manifest


def reshard(
    directory: Path | str,
    dims: Mapping[str, Sequence[Dim]],
    mesh: Mesh,
    out: Path | str,
    *,
    spec: Mapping[str, Any],
    progress: ByteProgress | None = None,
) -> Manifest:
    """Writes the weights of `directory` for another mesh into `out`, all or nothing, bit for bit.

    `dims` maps each parameter's name to its layout on the new mesh. `spec` is recorded in the manifest. Optimizer state
    follows the parameter that it belongs to. Tensors that are whole and not in `dims` stay whole. Files without
    tensors, such as `state.json`, are copied. Raises `WeightsError` for a damaged directory, for copies that differ, or
    for a split tensor without a new layout.
    """
    verify(directory)
    with Weights(directory, compare_copies=True) as weights, output(out) as new:
        old = weights.manifest
        jobs = [_moved(weights, e, dims, weight_mesh(mesh)) for e in old.entries]
        files = list(write_jobs(jobs, new, progress))
        for info in old.files:
            if info.name not in old.tensor_files:
                with disk(info.name, f"write {info.bytes} bytes"):
                    shutil.copyfile(weights.directory / info.name, new / info.name)
                files.append(info)
        entries = tuple(job.entry for job in jobs)
        manifest = Manifest(weight_mesh(mesh), entries, spec=dict(spec)).with_files(files)
        save_manifest(manifest, new)
        return manifest


def _moved(weights: Weights, old: Entry, dims: Mapping[str, Sequence[Dim]], mesh: Mesh) -> Job:
    weights.entry(old.name)  # raises when it lies in no file
    tree = dims.get(old.name, dims.get(old.like) if old.like else None)
    if tree is not None:
        layout = Layout.of(tuple(tree), mesh)
    elif old.layout.is_whole:
        layout = whole_layout(old.shape, mesh.size)
    else:
        raise WeightsError(f"{weights.where}: {old.name} is split there, but has no layout on the new mesh ({mesh})")
    if layout.shape != old.shape:
        raise WeightsError(f"{weights.where}: {old.name} is {list(old.shape)}, its new layout {list(layout.shape)}")
    file = (BUFFER_FILE if layout.is_whole else RANK_FILE) if old.kind == "buffer" else old.file
    entry = replace(old, layout=layout, file=file)
    entry.check()
    return Job(entry, lambda runs: weights.read(old.name, runs))


def merge(
    directory: Path | str,
    out: Path | str,
    *,
    max_file: int = MAX_FILE,
    dtype: torch.dtype | None = None,
    beside: Callable[[Path], None] = lambda new: None,
    instead: Callable[[str], str] = lambda name: name,
    progress: ByteProgress | None = None,
) -> tuple[Path, ...]:
    """Merges a model's tensors under the names that they came with, bit for bit. Returns the paths of the files.

    If `out` ends in `.safetensors`, it becomes one file; else a directory as Hugging Face writes it, with
    `model.safetensors`, or parts of at most `max_file` bytes and an index. `dtype` converts floating-point tensors.
    `beside(new)` may add files to the new directory before it is put in place. `instead(name)` is the tensor whose
    values are written for `name`. Digests are checked, and copies on several ranks are compared. Raises `WeightsError`,
    and then leaves `out` as it was.
    """
    verify(directory)
    with Weights(directory, compare_copies=True) as weights:
        chosen = [
            (name, _converted(weights.entry(instead(e.name)), dtype))
            for e in weights.manifest.entries
            for name in e.stored
        ]
        total = _Count(sum(Spot(n, e.dtype, e.shape).bytes for n, e in chosen), progress)
        if Path(out).suffix == ".safetensors":
            with replacing_file(out) as new:
                _write_plain(weights, chosen, new, total)
            return (Path(out),)
        with replacing(out, _is_merged) as new:
            names = _write_parts(weights, chosen, new, max_file, total)
            beside(new)
        return tuple(Path(out) / name for name in names)


def _converted(entry: Entry, dtype: torch.dtype | None) -> Entry:
    return entry if dtype is None or not entry.dtype.is_floating_point else replace(entry, dtype=dtype)


def _write_parts(weights: Weights, chosen: Sequence[Named], new: Path, max_file: int, total: _Count) -> list[str]:
    parts: list[list[Named]] = [[]]
    size = 0
    for name, entry in chosen:
        n = Spot(name, entry.dtype, entry.shape).bytes
        if parts[-1] and size + n > max_file:
            parts.append([])
            size = 0
        parts[-1].append((name, entry))
        size += n
    if len(parts) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    for file, part in zip(names, parts, strict=True):
        _write_plain(weights, part, new / file, total)
    if len(parts) > 1:
        home = {name: file for file, part in zip(names, parts, strict=True) for name, _ in part}
        index = {"metadata": {"total_size": total.whole}, "weight_map": home}
        text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
        write_text(new / "model.safetensors.index.json", text)
        names.append("model.safetensors.index.json")
    return names


def _write_plain(weights: Weights, chosen: Sequence[Named], path: Path, total: _Count) -> None:
    entries = dict(chosen)
    spots = in_order(Spot(name, e.dtype, e.shape) for name, e in entries.items())
    with TensorFileWriter(path, spots) as writer:
        for spot in spots:
            for block in blocks(spot.shape, spot.dtype.itemsize):
                value = weights.read(entries[spot.name].name, block).to(spot.dtype)
                writer.write(value)
                total.add(value.nbytes)
        writer.close()


def write_jobs(jobs: Sequence[Job], into: Path, progress: ByteProgress | None = None) -> tuple[FileInfo, ...]:
    """Writes and syncs the files of all jobs, and reads each tensor once. The caller writes the manifest."""
    manifest = Manifest(_ranks_of(jobs), tuple(job.entry for job in jobs))
    total = _Count(sum(Spot(j.entry.name, j.entry.dtype, j.entry.shape).bytes for j in jobs), progress)
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.entry.file, []).append(job)
    done: list[FileInfo] = []
    for group in groups.values():
        files = dict.fromkeys(group[0].entry.file_of(r) for r in range(manifest.mesh.size))
        with ExitStack() as stack:
            writers = [stack.enter_context(TensorFileWriter(into / f, manifest.contents(f))) for f in files]
            pool = stack.enter_context(ThreadPoolExecutor(min(len(writers), os.cpu_count() or 1)))
            for job in sorted(group, key=lambda j: -j.entry.dtype.itemsize):
                _write_tensor(job, writers, pool, total)
            done += pool.map(TensorFileWriter.close, writers)
    return tuple(done)


def _ranks_of(jobs: Sequence[Job]) -> Mesh:
    return Mesh((("rank", jobs[0].entry.layout.ranks if jobs else 1),))


def _write_tensor(job: Job, writers: Sequence[TensorFileWriter], pool: ThreadPoolExecutor, total: _Count) -> None:
    """Writes one tensor to all ranks' files, in blocks along dimension 0, so that every rank's slice grows in order."""
    layout = job.entry.layout
    for block in blocks(job.entry.shape, job.entry.dtype.itemsize):
        value = job.read(block)
        assert value.dtype == job.entry.dtype, (job.entry.name, value.dtype)
        pieces: dict[Any, torch.Tensor] = {}
        work: list[tuple[TensorFileWriter, torch.Tensor]] = []
        for rank, writer in enumerate(writers):
            mine = tuple(intersect(h, b) for h, b in zip(layout.runs(rank), block, strict=True))
            if not all(mine):
                continue
            if mine not in pieces:
                local = tuple(positions(m, b) for m, b in zip(mine, block, strict=True))
                pieces[mine] = bits(slice_of(value, local)).contiguous()
            work.append((writer, pieces[mine]))
        for _ in pool.map(lambda pair: pair[0].write(pair[1]), work):
            pass
        total.add(value.nbytes)


class _Count:
    """Counts the bytes done and reports them."""

    def __init__(self, whole: int, progress: ByteProgress | None) -> None:
        self.whole, self._done, self._progress = whole, 0, progress

    def add(self, n: int) -> None:
        self._done += n
        if self._progress is not None:
            self._progress(self._done, self.whole)


def verify(directory: Path | str, files: Iterable[str] | None = None) -> Manifest:
    """Compares the sizes and SHA-256 digests of the files (by default all) with the manifest. Raises `WeightsError`."""
    manifest = load_manifest(directory)
    chosen = [f for f in manifest.files if files is None or f.name in set(files)]
    for f in chosen:
        check_size(Path(directory) / f.name, f.bytes)
    with ThreadPoolExecutor(max(1, min(len(chosen), os.cpu_count() or 1))) as pool:
        for expected, found in zip(chosen, pool.map(digest, (Path(directory) / f.name for f in chosen)), strict=True):
            if found != expected:
                raise WeightsError(f"{Path(directory) / expected.name}: altered: SHA-256 is not what the manifest says")
    return manifest


def output(directory: Path | str) -> AbstractContextManager[Path]:
    """Yields a temporary directory that becomes `directory` as a whole when the block succeeds.

    It may replace an earlier output of tpcompiler. Other files that lie there are carried over.
    """
    return replacing(directory, lambda old: (old / MANIFEST).is_file(), _foreign)


def refuse_to_replace(directory: Path | str) -> None:
    """Raises `WeightsError` when a directory holds weights or a checkpoint. Only `--force` may overwrite them."""
    files = [p.name for p in Path(directory).iterdir()] if (Path(directory) / MANIFEST).is_file() else []
    if not any(fnmatch(name, "rank-*.safetensors") for name in files):
        return
    what = "a checkpoint of a training run" if "state.json" in files else "weights"
    raise WeightsError(f"{directory}: holds {what}; name another directory, or add --force to replace it")


def _foreign(old: Path) -> list[Path]:
    """The entries of an earlier output that are not files of weights, such as a program or notes."""
    ours: set[str] = {MANIFEST}
    try:
        ours |= {f.name for f in load_manifest(old).files}
    except WeightsError:
        globs = ("rank-*.safetensors", BUFFER_FILE, EXTRA_FILE)
        ours |= {p.name for p in old.iterdir() if any(fnmatch(p.name, g) for g in globs)}
    return [p for p in old.iterdir() if p.name not in ours]


def _is_merged(old: Path) -> bool:
    return all(fnmatch(p.name, "model*.safetensors") or p.name == "model.safetensors.index.json" for p in old.iterdir())
