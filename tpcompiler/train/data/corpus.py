"""The files that a run's data comes from: plain text, .jsonl, token ids, and the text that every CPython carries."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from tpcompiler.errors import TpcError
from tpcompiler.train.settings import BUILTIN, Data

_SAMPLE, _SAMPLES = 1 << 12, 64  # bytes of a file that are looked at in one place, and places


@dataclass(frozen=True)
class Source:
    """One file of text or tokens, or the built-in text (`path` None)."""

    path: Path | None
    format: str  # text | jsonl | tokens

    def __str__(self) -> str:
        return BUILTIN if self.path is None else str(self.path)


def sources(paths: tuple[str, ...], data: Data) -> tuple[Source, ...]:
    """The files that paths, directories and globs name, in order; a directory's and a glob's sorted by name."""
    return tuple(source for path in paths for source in _expand(path, data))


def _expand(name: str, data: Data) -> Iterator[Source]:
    if name == BUILTIN:
        yield Source(None, "text")
        return
    path = Path(name).expanduser()
    if path.is_dir():
        found = [p for p in sorted(path.iterdir()) if p.suffix in _SUFFIXES]
    elif path.exists():
        found = [path]
    else:
        parent = Path(path.anchor) if path.is_absolute() else Path()
        pattern = str(path.relative_to(path.anchor)) if path.is_absolute() else str(path)
        found = sorted(p for p in parent.glob(pattern) if p.is_file()) if any(c in name for c in "*?[") else []
    if not found:
        raise TpcError(f"data {name}: no such file; give files, directories or globs of {', '.join(_SUFFIXES)}")
    for file in found:
        yield Source(file, _SUFFIXES.get(file.suffix, "text") if data.format == "auto" else data.format)


_SUFFIXES = {".txt": "text", ".md": "text", ".jsonl": "jsonl", ".bin": "tokens", ".tokens": "tokens"}


def fingerprint(source: Source) -> str:
    """Tells a text from others, and from itself when it has changed: its size, its time, and samples of its bytes."""
    if source.path is None:
        return sha256("\0".join(builtin()).encode("utf-8", "surrogatepass")).hexdigest()
    h = sha256()
    try:
        with source.path.open("rb") as f:
            state = os.fstat(f.fileno())
            h.update(f"{state.st_size} {state.st_mtime_ns}".encode())
            for i in range(_SAMPLES):
                f.seek(i * max(0, state.st_size - _SAMPLE) // (_SAMPLES - 1))
                h.update(f.read(_SAMPLE))
    except OSError as e:
        raise TpcError(f"data {source}: {e.strerror}") from None
    return h.hexdigest()


def builtin() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]
