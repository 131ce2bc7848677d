"""Text files as a stream of pieces: plain text, .jsonl, and the text that every CPython carries."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from tpcompiler.errors import TpcError
from tpcompiler.train.settings import BUILTIN, Data

_PIECE = 1 << 20  # characters: what is tokenised at once


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


def content_digest(source: Source) -> str:
    """SHA-256 of the text's bytes."""
    h = sha256()
    if source.path is None:
        for text in _builtin():
            h.update(text.encode("utf-8", "surrogatepass") + b"\0")
        return h.hexdigest()
    try:
        with source.path.open("rb") as f:
            while block := f.read(1 << 20):
                h.update(block)
    except OSError as e:
        raise TpcError(f"data {source}: {e.strerror}") from None
    return h.hexdigest()


def pieces(source: Source, field: str) -> Iterator[tuple[str, bool]]:
    """The text in pieces of about a million characters, each with whether its document ends there.

    A document is a file of plain text, or a line of a .jsonl. Pieces end after a line break that no white space
    follows, where tokenizers that split words cut as well.
    """
    if source.path is None:
        for text in _builtin():
            yield text, True
    elif source.format == "jsonl":
        for text in _json_lines(source.path, field):
            yield text, True
    else:
        yield from _plain(source.path)


def _builtin() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file, each with its line break, as it is."""
    number = 0
    try:
        with path.open(encoding="utf-8", newline="\n") as f:
            for number, line in enumerate(f, 1):
                yield number, line
    except UnicodeDecodeError as e:
        bad = e.object[e.start]
        raise TpcError(
            f"data {path}:{number + 1}: not UTF-8 (byte 0x{bad:02x}); for a file of token ids say format: tokens"
        ) from None
    except OSError as e:
        raise TpcError(f"data {path}: {e.strerror}") from None


def _plain(path: Path) -> Iterator[tuple[str, bool]]:
    held: list[str] = []
    size = 0
    for _, line in _lines(path):
        if size >= _PIECE and not line[:1].isspace():
            yield "".join(held), False
            held, size = [], 0
        held.append(line)
        size += len(line)
    if held:
        yield "".join(held), True


def _json_lines(path: Path, field: str) -> Iterator[str]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as e:
            raise TpcError(f"data {path}:{number}: not JSON: {e.msg} at column {e.colno}") from None
        text = value.get(field) if isinstance(value, dict) else None
        if not isinstance(text, str):
            keys = ", ".join(sorted(map(str, value))) if isinstance(value, dict) else "not an object"
            raise TpcError(f"data {path}:{number}: no text under the key {field!r} (has: {keys}); set data.field")
        yield text
