"""A text file tokenised part by part, by several processes: what is done stays done, and memory does not grow.

Imports no torch, so that the processes start quickly.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO

from tpcompiler.errors import TpcError
from tpcompiler.train.data.packing import Packer, little_endian
from tpcompiler.train.data.tokenizer import Tokenizer, load_tokenizer

PART = 16 << 20  # bytes of text in a part
PIECE = 1 << 20  # bytes that are tokenised at once
WIDTHS = {"uint16": 2, "uint32": 4}  # bytes of an id
_ALONE = 4 << 20  # bytes: less than this is done in this process


@dataclass(frozen=True)
class TextPart:
    """Bytes start … stop − 1 of a text, and the file that their ids go to."""

    text: str  # path
    format: str  # text | jsonl
    fields: tuple[str, ...]  # the keys of a .jsonl line whose texts are read, each a document of its own
    start: int
    stop: int
    last: bool  # whether the text ends with it
    out: str  # path


@dataclass(frozen=True)
class Packed:
    """The ids of a part, on disk."""

    name: str
    dtype: str
    count: int
    largest: int
    bytes: int  # of the text
    documents: int = 0  # of those whose ends are written down: see `pack`


def tokenise(
    text: Path,
    format: str,
    fields: tuple[str, ...],
    tokenizer: Tokenizer,
    folder: Path,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, whole: None,
) -> list[Packed]:
    """All parts of a text, in order; those that lie in `folder` already are not made again.

    `workers` are processes, by default one for each core that this process may
    use. `progress(bytes done, bytes in all)`. Raises `TpcError`; what was done until then is kept.
    """
    parts = list(cut(text, format, fields, folder))
    lying = {i: known(Path(p.out), p.stop - p.start) for i, p in enumerate(parts)}
    done = {i: packed for i, packed in lying.items() if packed is not None}
    todo = [i for i in range(len(parts)) if i not in done]
    whole = parts[-1].stop if parts else 0
    count = min(len(todo), workers or cores())

    def finished(i: int, packed: Packed) -> None:
        done[i] = packed
        progress(sum(p.bytes for p in done.values()), whole)

    name = tokenizer.name
    if count < 2 or name is None or whole < _ALONE:
        packer = Packer(tokenizer)
        for i in todo:
            finished(i, pack_part(parts[i], packer))
    else:
        _spread(parts, todo, name, count, finished)
    return [done[i] for i in range(len(parts))]


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _spread(
    parts: list[TextPart], todo: list[int], tokenizer: str, count: int, finished: Callable[[int, Packed], None]
) -> None:
    """Parts to processes of their own. One that cannot be read ends all; those under way are waited for."""
    with ProcessPoolExecutor(count, get_context("spawn"), initializer=_start, initargs=(tokenizer,)) as pool:
        running = {pool.submit(_pack, parts[i]): i for i in todo}
        try:
            while running:
                ended, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    finished(running.pop(future), future.result())
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


_packer: Packer | None = None  # of a process that does nothing but this: the words it knows serve all its parts


def _start(tokenizer: str) -> None:
    global _packer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are as many as there are cores
    _packer = Packer(load_tokenizer(tokenizer))


def _pack(part: TextPart) -> Packed:
    assert _packer is not None
    return pack_part(part, _packer)


def cut(text: Path, format: str, fields: tuple[str, ...], folder: Path) -> Iterator[TextPart]:
    """The parts of a text. They end where pieces may: see `_break_after`."""
    start, number = 0, 0
    try:
        with text.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            while start < size:
                stop = size if size - start <= PART else _break_after(file, start + PART, size, format)
                out = folder / f"part-{number:05d}.bin"
                yield TextPart(str(text), format, fields, start, stop, stop == size, str(out))
                start, number = stop, number + 1
    except OSError as e:
        raise TpcError(f"data {text}: {(e.strerror or str(e)).lower()}") from None


def _break_after(file: BinaryIO, at: int, size: int, format: str) -> int:
    """The first place from `at` where a line ends; of plain text, one that no white space follows, where tokenizers
    that split words cut as well."""
    file.seek(at)
    at += len(file.readline())
    while at < size and format == "text":
        line = file.readline()
        if not line[:1].isspace():
            break
        at += len(line)
    return at


def pack_part(part: TextPart, packer: Packer) -> Packed:
    """Writes the ids of a part, whole or not at all. Raises `TpcError`."""
    return pack(pieces(part), packer, Path(part.out), part.stop - part.start, len(part.fields) > 1)


def pack(texts: Iterable[tuple[str, bool]], packer: Packer, out: Path, size: int, apart: bool = False) -> Packed:
    """Writes the ids of texts, each with whether a document ends there, and a note of what was written beside them.

    The tokenizer's end token stands after each document. With `apart` none does: instead, a file beside says how many
    ids there are up to the end of each document, little-endian int64. `size` in bytes is what the note says of the
    texts, to be known again by.
    """
    packer.largest = 0
    dtype, written = packer.dtype, 0
    places = array("q")
    try:
        with _new(out) as file:
            for text, ends in texts:
                ids = packer(text)
                if ends and ids and not apart:
                    ids += packer.end()
                written += file.write(ids)
                if ends and apart:
                    places.append(written // WIDTHS[dtype])
        if apart:
            with _new(ends_of(out)) as file:
                file.write(little_endian(places))
        packed = Packed(out.name, dtype, written // WIDTHS[dtype], packer.largest, size, len(places))
        with _new(_note(out)) as file:
            file.write(json.dumps(asdict(packed)).encode())
    except OSError as e:
        raise TpcError(f"{out}: cannot write: {(e.strerror or str(e)).lower()}") from None
    return packed


@contextmanager
def _new(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name when the block ends well. What killed writers of it left is removed."""
    for old in path.parent.glob(f".{path.name}.*.tmp"):
        with suppress(OSError), old.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its writer is gone
            old.unlink()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _note(out: Path) -> Path:
    return out.with_name(out.name + ".json")


def ends_of(out: Path) -> Path:
    """The file that says where the documents of `out` end."""
    return out.with_suffix(".ends")


def known(out: Path, size: int) -> Packed | None:
    """What was written to `out` of texts of that size, if it lies there whole."""
    try:
        packed = Packed(**json.loads(_note(out).read_bytes()))
        whole = out.stat().st_size == packed.count * WIDTHS[packed.dtype]
        if packed.documents:
            whole = whole and ends_of(out).stat().st_size == 8 * packed.documents
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return packed if whole and packed.bytes == size else None


def pieces(part: TextPart) -> Iterator[tuple[str, bool]]:
    """The text of a part in pieces of about a megabyte, each with whether its document ends there.

    A document is a file of plain text, or a line of a .jsonl.
    """
    return _documents(part) if part.format == "jsonl" else _plain(part)


def _blocks(part: TextPart) -> Iterator[tuple[int, bytes]]:
    """Where each block begins, and its bytes: whole lines, and in plain text none after which white space follows."""
    at, held = part.start, b""
    try:
        with open(part.text, "rb") as file:
            file.seek(part.start)
            left = part.stop - part.start
            while left:
                data = file.read(min(PIECE, left))
                if not data:
                    raise TpcError(
                        f"data {part.text}: is shorter than when it was opened; let it rest, and start again"
                    )
                left -= len(data)
                held += data
                end = _last_break(held, part.format) if left else len(held)
                if end:
                    yield at, held[:end]
                    at, held = at + end, held[end:]
    except OSError as e:
        raise TpcError(f"data {part.text}: {(e.strerror or str(e)).lower()}") from None


def _last_break(data: bytes, format: str) -> int:
    """The end of the last line in `data` that may end a piece; 0: there is none."""
    at = data.rfind(b"\n", 0, len(data) - 1)
    while at >= 0 and format == "text" and data[at + 1 : at + 2].isspace():
        at = data.rfind(b"\n", 0, at)
    return at + 1


def _plain(part: TextPart) -> Iterator[tuple[str, bool]]:
    seen = part.start
    for at, block in _blocks(part):
        seen = at + len(block)
        yield _decoded(part, at, block), part.last and seen == part.stop


def _documents(part: TextPart) -> Iterator[tuple[str, bool]]:
    for at, block in _blocks(part):
        for line in block.split(b"\n"):
            if line.strip():
                for text in _texts_of(part, at, _decoded(part, at, line)):
                    yield text, True
            at += len(line) + 1


def _texts_of(part: TextPart, at: int, line: str) -> Iterator[str]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as e:
        raise TpcError(f"data {part.text}:{_line(part, at)}: not JSON: {e.msg} at column {e.colno}") from None
    except (ValueError, RecursionError) as e:
        what = "brackets stand too deep in each other" if isinstance(e, RecursionError) else "a number is too long"
        raise TpcError(f"data {part.text}:{_line(part, at)}: cannot be read as JSON: {what}") from None
    for field, setting in zip(part.fields, ("field", "target_field"), strict=False):
        text = value.get(field) if isinstance(value, dict) else None
        if not isinstance(text, str):
            keys = ", ".join(sorted(map(str, value))) if isinstance(value, dict) else "not an object"
            where = f"{part.text}:{_line(part, at)}"
            raise TpcError(f"data {where}: no text under the key {field!r} (has: {keys}); set data.{setting}")
        yield text


def _decoded(part: TextPart, at: int, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        where = f"{part.text}:{_line(part, at + e.start)}"
        raise TpcError(
            f"data {where}: not UTF-8 (byte 0x{data[e.start]:02x}); for a file of token ids say format: tokens"
        ) from None


def _line(part: TextPart, at: int) -> int:
    """The number of the line that byte `at` of the text is in."""
    number = 1
    with open(part.text, "rb") as file:
        while at > 0 and (data := file.read(min(PIECE, at))):
            number += data.count(b"\n")
            at -= len(data)
    return number
