"""Token ids on disk: memory-mapped, read by position, tokenised at most once.

A token file is an array of little-endian uint16 or uint32 and nothing else. Its sidecar `FILE.json` says
`{"dtype": …}`; sidecars written here also say how many ids there are and the largest of them.
"""

from __future__ import annotations

import json
import os
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from itertools import accumulate
from mmap import ACCESS_READ, mmap
from pathlib import Path

import torch
from torch import Tensor

from tpcompiler.errors import TpcError
from tpcompiler.runtime.stored import disk
from tpcompiler.train.data import parts
from tpcompiler.train.data.corpus import Source, builtin, fingerprint
from tpcompiler.train.data.packing import Packer
from tpcompiler.train.data.tokenizer import Tokenizer
from tpcompiler.train.settings import Data
from tpcompiler.weights.atomic import replacing_file

_DTYPES = {"uint16": torch.uint16, "uint32": torch.uint32}
_SCAN = 1 << 24  # tokens looked at in one go


@dataclass(frozen=True)
class TokenFile:
    """A memory-mapped file of token ids."""

    path: Path
    dtype: str
    count: int
    largest: int  # id
    documents: int = 0  # of those whose ends lie in a file beside

    @property
    def bytes(self) -> int:
        return self.count * _DTYPES[self.dtype].itemsize

    @cached_property
    def ids(self) -> Tensor:
        return _map(self.path, _DTYPES[self.dtype], self.count)

    @cached_property
    def ends(self) -> Tensor:
        """How many ids there are up to the end of each document, int64."""
        return _map(parts.ends_of(self.path), torch.int64, self.documents)


@dataclass(frozen=True)
class Tokens:
    """Several token files, one after the other."""

    files: tuple[TokenFile, ...]

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(f.count for f in self.files))

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def largest(self) -> int:
        return max(f.largest for f in self.files)

    def read(self, start: int, stop: int) -> Tensor:
        """Ids start … stop − 1, int64."""
        assert 0 <= start <= stop <= len(self), f"tokens {start} … {stop} of {len(self)}"
        pieces = []
        for i in range(bisect_right(self._ends, start), len(self.files)):
            offset = self._ends[i] - self.files[i].count
            if offset >= stop:
                break
            pieces.append(self.files[i].ids[max(start - offset, 0) : stop - offset].to(torch.int64))
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)

    @cached_property
    def _last(self) -> list[int]:
        return list(accumulate(f.documents for f in self.files))

    @property
    def documents(self) -> int:
        """How many documents lie apart: those of `task: pairs`."""
        return self._last[-1]

    def document(self, number: int) -> Tensor:
        """The ids of one document, int64."""
        i = bisect_right(self._last, number)
        file = self.files[i]
        at = number - self._last[i] + file.documents
        start = int(file.ends[at - 1]) if at else 0
        return file.ids[start : int(file.ends[at])].to(torch.int64)

    def __str__(self) -> str:
        names = [str(f.path) for f in self.files]
        return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def open_tokens(found: Iterable[Source], data: Data, tokenizer: Tokenizer) -> Tokens:
    """The token files of some sources; text is tokenised into the cache unless it lies there already.

    Any number of processes may do this at once: files appear whole or not at all. Raises `TpcError` for an empty
    file, a token file of unknown or broken type, text that cannot be read, a full disk.
    """
    cache = cache_directory(data)
    files: list[TokenFile] = []
    for source in found:
        ready = source.format == "tokens"
        if ready and data.task == "pairs":
            raise TpcError(f"data {source}: task: pairs reads .jsonl files; a file of token ids has no pairs")
        files += [_ready(source, data, cache)] if ready else tokenised(source, data, tokenizer, cache)
    return Tokens(tuple(files))


def cache_directory(data: Data) -> Path:
    if data.cache is not None:
        return Path(data.cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tpcompiler"


def tokenised(
    source: Source,
    data: Data,
    tokenizer: Tokenizer,
    cache: Path,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, whole: None,
) -> list[TokenFile]:
    """A text's ids, in files of the cache: those that are missing are made. See `parts.tokenise`."""
    pairs = data.task == "pairs"
    if pairs and source.format != "jsonl":
        raise TpcError(f"data {source}: task: pairs reads .jsonl files, whose lines hold a source and a target")
    fields = (data.field, data.target_field) if pairs else (data.field,)
    key = f"{fingerprint(source)} {source.format} {' '.join(fields)} {tokenizer.digest} {parts.PART} {parts.PIECE}"
    folder = cache / sha256(key.encode()).hexdigest()[:32]
    with disk(folder, "write"):
        folder.mkdir(parents=True, exist_ok=True)
    if source.path is None:
        texts, out = builtin(), folder / "part-00000.bin"
        size = sum(map(len, texts))
        packed = [parts.known(out, size) or parts.pack(((t, True) for t in texts), Packer(tokenizer), out, size)]
    else:
        packed = parts.tokenise(source.path, source.format, fields, tokenizer, folder, workers, progress)
    if not any(p.count for p in packed):
        raise TpcError(f"data {source}: the file is empty")
    return [TokenFile(folder / p.name, p.dtype, p.count, p.largest, p.documents) for p in packed if p.count]


def _ready(source: Source, data: Data, cache: Path) -> TokenFile:
    """The user's own token file. It is scanned once for its largest id; the cache remembers that."""
    assert source.path is not None
    path = source.path
    dtype = data.token_type or _declared_type(path)
    try:
        state = path.stat()
    except OSError as e:
        raise TpcError(f"data {path}: {e.strerror}") from None
    width = _DTYPES[dtype].itemsize
    if state.st_size == 0:
        raise TpcError(f"data {path}: the file is empty")
    if state.st_size % width:
        raise TpcError(f"data {path}: {state.st_size} bytes are not a whole number of {dtype} ids of {width} bytes")
    key = f"{path.resolve()} {state.st_size} {state.st_mtime_ns} {dtype}"
    note = cache / f"{sha256(key.encode()).hexdigest()[:32]}.scan"
    known = _read_sidecar(note)
    count = state.st_size // width
    if known is not None:
        return TokenFile(path, dtype, count, known.largest)
    ids = _map(path, _DTYPES[dtype], count)
    largest = max(int(ids[i : i + _SCAN].to(torch.int64).max()) for i in range(0, count, _SCAN))
    _write_sidecar(TokenFile(note, dtype, count, largest))
    return TokenFile(path, dtype, count, largest)


def _declared_type(path: Path) -> str:
    beside = _beside(path)
    try:
        value = json.loads(beside.read_text("utf-8"))
    except FileNotFoundError:
        raise TpcError(
            f'data {path}: is it uint16 or uint32? Set data.token_type, or write {{"dtype": "uint16"}} to {beside}'
        ) from None
    except (OSError, ValueError) as e:
        raise TpcError(f"data {beside}: cannot be read: {e}") from None
    dtype = value.get("dtype") if isinstance(value, dict) else None
    if dtype not in _DTYPES:
        raise TpcError(f"data {beside}: dtype is {dtype!r}; it must be uint16 or uint32")
    return str(dtype)


def _map(path: Path, dtype: torch.dtype, count: int) -> Tensor:
    """The numbers in a file. Nothing is read until it is looked at, and the file may be larger than the memory.

    `torch.from_file` maps for writing, which Linux refuses for a file that is larger than the memory.
    """
    try:
        with path.open("rb") as file:
            mapped = mmap(file.fileno(), count * dtype.itemsize, access=ACCESS_READ)
    except (OSError, ValueError) as e:
        raise TpcError(f"data {path}: cannot be memory-mapped: {e}") from None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # and nobody writes
        return torch.frombuffer(mapped, dtype=dtype, count=count)


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _read_sidecar(path: Path) -> TokenFile | None:
    try:
        value = json.loads(_beside(path).read_text("utf-8"))
        return TokenFile(path, str(value["dtype"]), int(value["count"]), int(value["largest"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_sidecar(file: TokenFile) -> TokenFile:
    with disk(file.path, "write"), replacing_file(_beside(file.path)) as new, new.open("wb") as out:
        out.write(json.dumps({**asdict(file), "path": file.path.name}).encode())
    return file
