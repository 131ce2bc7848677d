"""Text to token ids: bytes, built in, or any tokenizer.json of the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from tpcompiler.errors import TpcError


@dataclass(frozen=True)
class Specials:
    """Ids of the tokens that stand for no text, where the tokenizer has them."""

    end: int | None = None  # of a document
    pad: int | None = None
    cls: int | None = None  # before a sequence
    sep: int | None = None  # after each of its parts
    mask: int | None = None

    @property
    def ids(self) -> frozenset[int]:
        return frozenset(i for i in (self.end, self.pad, self.cls, self.sep, self.mask) if i is not None)


class Tokenizer(Protocol):
    """What the data pipeline needs of a tokenizer. `digest` differs between tokenizers that give different ids."""

    @property
    def vocab(self) -> int:
        """One more than the largest id."""

    @property
    def specials(self) -> Specials: ...

    @property
    def sentinels(self) -> tuple[int, ...]:
        """The ids that stand for a gap in a text, T5's `<extra_id_0>` and on; most tokenizers have none."""

    @property
    def digest(self) -> str: ...

    @property
    def name(self) -> str | None:
        """What `load_tokenizer` makes another one of, in another process; None: nothing does."""

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: nothing is put before or after it."""

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each."""

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes are tokens 0 … 255; after them the special ones. 261 ids."""

    vocab: int = 261
    specials: Specials = field(default=Specials(end=256, pad=257, cls=258, sep=259, mask=260))
    digest: str = "bytes-1"
    sentinels: tuple[int, ...] = ()

    @property
    def name(self) -> str | None:
        return "bytes" if type(self) is ByteTokenizer else None

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "surrogatepass"))

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


# What the special tokens are called by the families that have them. A tokenizer_config.json beside the file wins.
_SPELLINGS = {
    "end": ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[SEP]"),
    "pad": ("[PAD]", "<pad>", "<|pad|>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}
_CONFIG_KEYS = {"end": "eos_token", "pad": "pad_token", "cls": "cls_token", "sep": "sep_token", "mask": "mask_token"}


class FileTokenizer:
    """A tokenizer.json, through the `tokenizers` library."""

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError:
            raise TpcError(
                f"{path}: needs the tokenizers package: pip install tokenizers, or tokenizer: bytes"
            ) from None
        self.name: str | None = str(path)
        self.text = text = _read(path)
        try:
            self._backend = Backend.from_str(text)
        except Exception as e:  # the library raises bare Exceptions
            raise TpcError(f"{path}: not a tokenizer.json: {' '.join(str(e).split())}") from None
        self._backend.no_truncation()
        self._backend.no_padding()
        ids = self._backend.get_vocab(with_added_tokens=True).values()
        self.vocab: int = 1 + max(ids, default=-1)
        self.specials = self._find_specials(_config_beside(path))
        self.sentinels = self._find_sentinels()
        self.digest = sha256(f"{text}{self.specials}".encode("utf-8", "surrogatepass")).hexdigest()

    def _find_specials(self, config: dict[str, Any]) -> Specials:
        found: dict[str, int | None] = {}
        for role, spellings in _SPELLINGS.items():
            named = config.get(_CONFIG_KEYS[role])
            named = named.get("content") if isinstance(named, dict) else named
            candidates = [named] if isinstance(named, str) else spellings
            ids = (self._backend.token_to_id(spelling) for spelling in candidates)
            found[role] = next((i for i in ids if i is not None), None)
        return Specials(**found)

    def _find_sentinels(self) -> tuple[int, ...]:
        found: list[int] = []
        while (id := self._backend.token_to_id(f"<extra_id_{len(found)}>")) is not None:
            found.append(id)
        return tuple(found)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._backend.decode(list(ids))
        return text


def _config_beside(path: Path) -> dict[str, Any]:
    beside = path.with_name("tokenizer_config.json")
    if not beside.is_file():
        return {}
    try:
        config = json.loads(_read(beside))
    except json.JSONDecodeError as e:
        raise TpcError(f"{beside}: not JSON: {e}") from None
    return config if isinstance(config, dict) else {}


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise TpcError(
            f"{path}: cannot be read as a tokenizer: {e.strerror if isinstance(e, OSError) else e}"
        ) from None


def load_tokenizer(name: str) -> Tokenizer:
    """`bytes`, or the path of a tokenizer.json or of a directory that holds one."""
    if name == "bytes":
        return ByteTokenizer()
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise TpcError(f"tokenizer {name}: no such file; give the path of a tokenizer.json, or `bytes`")
    return FileTokenizer(path)
