"""Where weights come from, read slice by slice: safetensors, torch checkpoints, dictionaries, our own directories."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from tpcompiler.errors import WeightsError
from tpcompiler.runtime.runs import Slice, intersect, positions, put, same_bits, shape_of, slice_of, whole
from tpcompiler.runtime.stored import MANIFEST, Reader, check_size, disk
from tpcompiler.weights.manifest import Entry, Manifest
from tpcompiler.weights.wire import load_manifest


@dataclass(frozen=True)
class Info:
    """What a source knows about a tensor before it is read. `stored` lists the names that its origin had for it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stored: tuple[str, ...]


class StateSource(Protocol):
    """Named tensors that can be read in part."""

    where: str  # what messages call the source

    @property
    def tensors(self) -> Mapping[str, Info]: ...

    def read(self, name: str, runs: Slice | None = None) -> torch.Tensor:
        """A slice of a tensor (by default all of it) on the CPU, in its own dtype. It may share the source's memory."""
        ...

    def close(self) -> None: ...


class TensorSource:
    """Tensors in memory, or memory-mapped: a `state_dict`."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], where: str = "the dictionary of tensors") -> None:
        self.where = where
        self._tensors = tensors
        for name, t in tensors.items():
            if not isinstance(t, torch.Tensor):
                raise WeightsError(f"{where}: {name} is a {type(t).__name__}, not a tensor")
            if t.is_meta:
                raise WeightsError(f"{where}: {name} has no values (device meta)")
        self.tensors: Mapping[str, Info] = {n: Info(t.dtype, tuple(t.shape), (n,)) for n, t in tensors.items()}

    def read(self, name: str, runs: Slice | None = None) -> torch.Tensor:
        t = self._tensors[name].detach().resolve_conj().resolve_neg()
        return (t if runs is None else slice_of(t, runs)).cpu()

    def close(self) -> None:
        self._tensors = {}


class FileSource:
    """One safetensors file, or the parts of a sharded model. `index` maps names to files, if there is an index."""

    def __init__(self, where: str, paths: Sequence[Path], index: Mapping[str, str] | None = None) -> None:
        self.where = where
        self._home: dict[str, Reader] = {}
        with ExitStack() as stack:
            for path in paths:
                reader = Reader(path)
                stack.callback(reader.close)
                for name in reader.tensors:
                    if index is None or index.get(name) == path.name:
                        self._home[name] = reader
            missing = [name for name in index or () if name not in self._home]
            if missing:
                raise WeightsError(f"{where}: {missing[0]} is not in {(index or {})[missing[0]]}, as the index says")
            self._stack = stack.pop_all()
        self.tensors: Mapping[str, Info] = {
            name: Info(stored.dtype, stored.shape, (name,))
            for name, reader in self._home.items()
            for stored in (reader.tensors[name],)
        }

    def read(self, name: str, runs: Slice | None = None) -> torch.Tensor:
        return self._home[name].read(name, runs)

    def close(self) -> None:
        self._stack.close()


class Weights:
    """An open directory with a manifest. It reads whole tensors from the ranks' files.

    Files are opened at first use. Sizes, names and shapes are compared with the manifest; only `verify` compares
    digests. With `compare_copies`, elements that several ranks hold are read from all of them and must agree bit for
    bit.
    """

    def __init__(self, directory: Path | str, compare_copies: bool = False) -> None:
        self.directory = Path(directory)
        self.where = str(directory)
        self.manifest: Manifest = load_manifest(directory)
        self._compare = compare_copies
        self._readers: dict[str, Reader] = {}
        self._sizes = {f.name: f.bytes for f in self.manifest.files}
        present = [e for e in self.manifest.entries if e.file]
        self.tensors: Mapping[str, Info] = {e.name: Info(e.dtype, e.shape, e.stored) for e in present}

    def read(self, name: str, runs: Slice | None = None) -> torch.Tensor:
        """Reads a slice by its global indices, from whichever ranks hold it. Raises `WeightsError`."""
        entry = self.entry(name)
        runs = whole(entry.shape) if runs is None else runs
        out: torch.Tensor | None = None
        for cell in entry.layout.cells:
            part = tuple(intersect(mine, wanted) for mine, wanted in zip(cell.runs, runs, strict=True))
            if not all(part):
                continue
            value = self._read_cell(entry, cell.ranks, part)
            if part == runs:
                return value
            out = torch.empty(shape_of(runs), dtype=entry.dtype) if out is None else out
            put(out, tuple(positions(p, r) for p, r in zip(part, runs, strict=True)), value)
        return torch.empty(shape_of(runs), dtype=entry.dtype) if out is None else out

    def entry(self, name: str) -> Entry:
        if name not in self.tensors:
            why = "holds no weights, only the program" if name in self.manifest.by_name else f"has no {name}"
            raise WeightsError(f"{self.where}: {why}")
        return self.manifest.by_name[name]

    def _read_cell(self, entry: Entry, ranks: tuple[int, ...], part: Slice) -> torch.Tensor:
        first = self._read_rank(entry, ranks[0], part)
        if self._compare and entry.per_rank:
            for rank in ranks[1:]:
                if not same_bits(first, self._read_rank(entry, rank, part)):
                    files = f"{entry.file_of(ranks[0])} and {entry.file_of(rank)}"
                    raise WeightsError(f"{self.where}: {entry.name}: {files} hold different copies")
        return first

    def _read_rank(self, entry: Entry, rank: int, part: Slice) -> torch.Tensor:
        """Reads the global indices `part` from the file of `rank`, which holds all of them."""
        held = entry.layout.runs(rank)
        local = tuple(positions(p, h) for p, h in zip(part, held, strict=True))
        return self._reader(entry.file_of(rank)).read(entry.name, local)

    def _reader(self, file: str) -> Reader:
        if file not in self._readers:
            path = self.directory / file
            if file not in self._sizes:
                raise WeightsError(f"{path}: the manifest does not list it")
            check_size(path, self._sizes[file])
            reader = Reader(path)
            found = {name: (t.dtype, t.shape) for name, t in reader.tensors.items()}
            for spot in self.manifest.contents(file):
                if found.get(spot.name) != (spot.dtype, spot.shape):
                    reader.close()
                    wanted = f"{spot.dtype} {list(spot.shape)}"
                    raise WeightsError(f"{path}: altered: {spot.name} is missing or is not {wanted}")
            self._readers[file] = reader
        return self._readers[file]

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Stripped:
    """A source without a prefix of its names, as when a base model is read from the file of a model built on it."""

    def __init__(self, source: StateSource, prefix: str) -> None:
        self.where = source.where
        self._source = source
        self._names = {n.removeprefix(prefix): n for n in source.tensors}
        if len(self._names) < len(source.tensors):
            raise WeightsError(f"{source.where}: without the prefix {prefix!r} two names are one")
        self.tensors: Mapping[str, Info] = {new: source.tensors[old] for new, old in self._names.items()}

    def read(self, name: str, runs: Slice | None = None) -> torch.Tensor:
        return self._source.read(self._names[name], runs)

    def close(self) -> None:
        self._source.close()


@contextmanager
def open_source(what: StateSource | Mapping[str, torch.Tensor] | Path | str, strip: str = "") -> Iterator[StateSource]:
    """Opens weights of any supported form as a `StateSource`, and closes what it has opened.

    A path is a safetensors file; a `.pt`, `.pth` or `.bin` file of `torch.save` (tensors only, memory-mapped); an index
    of such files; a Hugging Face directory; or a directory with a manifest. The prefix `strip` is removed from names.
    Raises `WeightsError`, one line that names the file.
    """
    with disk(what if isinstance(what, str | Path) else "weights", "read"):
        source = _open(what)
    try:
        yield Stripped(source, strip) if strip else source
    finally:
        if source is not what:
            source.close()


def _open(what: StateSource | Mapping[str, torch.Tensor] | Path | str) -> StateSource:
    if isinstance(what, Mapping):
        return TensorSource(what)
    if not isinstance(what, str | Path):
        return what
    path = Path(what)
    if path.is_dir():
        return _open_directory(path)
    if not path.exists():
        raise WeightsError(f"{path}: no such file")
    if path.name.endswith(".index.json"):
        return _open_index(path)
    if path.suffix == ".safetensors":
        return FileSource(str(path), [path])
    if path.suffix in (".pt", ".pth", ".bin"):
        return TensorSource(_load_torch(path), str(path))
    raise WeightsError(f"{path}: weights are .safetensors, .pt, .pth or .bin files, an .index.json, or a directory")


def _open_directory(path: Path) -> StateSource:
    if (path / MANIFEST).is_file():
        return Weights(path)
    for name in ("model.safetensors", "pytorch_model.bin"):
        for candidate in (path / name, path / f"{name}.index.json"):
            if candidate.is_file():
                return _open(candidate)
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return FileSource(str(files[0]), files)
    if files:
        raise WeightsError(f"{path}: {len(files)} safetensors files and no index of them: name one of them")
    raise WeightsError(f"{path}: no weights here: no {MANIFEST}, model.safetensors, pytorch_model.bin or index")


def _open_index(path: Path) -> StateSource:
    try:
        index = json.loads(path.read_bytes())["weight_map"]
        names = sorted(set(index.values()))
        assert all(isinstance(n, str) and n and "/" not in n for n in names)
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise WeightsError(f"{path}: not an index of weight files: no weight_map from names to files") from None
    paths = [path.parent / n for n in names]
    for p in paths:
        if not p.is_file():
            raise WeightsError(f"{p}: missing, although {path.name} lists it")
    if all(p.suffix == ".safetensors" for p in paths):
        return FileSource(str(path), paths, index)
    parts = {p.name: _load_torch(p) for p in paths}
    missing = [name for name, file in index.items() if name not in parts[file]]
    if missing:
        raise WeightsError(f"{path}: {missing[0]} is not in {index[missing[0]]}, as the index says")
    return TensorSource({name: parts[file][name] for name, file in index.items()}, str(path))


def _load_torch(path: Path) -> Mapping[str, torch.Tensor]:
    """The tensors of a `torch.save` file, memory-mapped. The file holds a dictionary of tensors, or a dictionary that
    contains one dictionary of tensors."""
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as e:
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise WeightsError(f"{path}: not a checkpoint of tensors alone, or truncated: {first[:160]}") from None
    found = [d for d in (loaded, *loaded.values()) if _is_tensors(d)] if isinstance(loaded, dict) else []
    if len(found) != 1:
        what = f"{len(found) or 'no'} dictionaries of tensors, not one"
        raise WeightsError(f"{path}: holds {what}: save model.state_dict() alone")
    return dict(found[0])


def _is_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(t, torch.Tensor) for t in value.values())
