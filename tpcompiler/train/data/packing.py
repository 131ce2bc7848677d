"""Text to token ids as they lie on disk: little-endian, each word that was seen before at the cost of a look-up.

Imports no torch, so that processes that do nothing but this start quickly.
"""

from __future__ import annotations

import json
import re
import sys
from array import array
from collections.abc import Sequence
from typing import Any

from tpcompiler.train.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer

CODES = {"uint16": "H", "uint32": "I"}
_LONGEST = 48  # characters of a unit that is remembered
_MOST = 1 << 20  # units that are remembered

# A unit begins before a space that no white space follows, after a line break between two characters that are no white
# space, and after an English letter before a digit or an ASCII mark. It need not begin at all of these places.
_UNIT = re.compile(
    r"(?!\Z) ?[^\sA-Za-z]*+[A-Za-z]*+(?:(?<=[A-Za-z])(?=[!-@\[-`{-~])|(?= \S)|(?<=\S)\n(?=\S)|\Z)|"
    r".+?(?= \S|(?<=\S\n)(?=\S)|\Z)",
    re.DOTALL,
)

# What splits text in the tokenizers of GPT-2, of GPT-4 and Llama 3, and of Qwen. With each of them, a token never
# reaches over the places where `Packer` cuts.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_KNOWN = {_GPT2, _GPT4, _GPT4.replace("{1,3}", ""), _GPT4.replace(r"\p{N}{1,3}", r"\p{N}")}


def little_endian(numbers: array[int]) -> bytes:
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def dtype_for(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.vocab <= 1 << 16 else "uint32"


class Packer:
    """Text to ids, the same as `tokenizer.encode` gives, as bytes.

    A tokenizer that splits text at words first, whatever surrounds them, is asked for each unit once (`_UNIT`). That is
    known from its file: byte-level BPE after one of the splitting expressions above, no normaliser, and no special
    token with a space in it. No alternative of these expressions matches across the places where a unit begins, and
    none looks over them: `\\s+(?!\\S)` leaves the last space of several to the word behind them. Special tokens are cut
    out of a text before it is split; so what stands between two of them is a text of its own.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.dtype = dtype_for(tokenizer)
        self._code = CODES[self.dtype]
        self._known: dict[str, bytes] = {}
        self.largest = 0  # id since it was last set
        self.by_words = isinstance(tokenizer, FileTokenizer) and splits_at_words(tokenizer.text)
        special: list[str] = []
        if isinstance(tokenizer, FileTokenizer):
            special = [t["content"] for t in json.loads(tokenizer.text).get("added_tokens") or [] if t["content"]]
        special.sort(key=len, reverse=True)  # of those that begin alike, the longest is found
        self._special = re.compile(f"({'|'.join(map(re.escape, special))})") if special else None

    def __call__(self, text: str) -> bytes:
        packed = self._ids(text)
        self._notice(packed)
        return packed

    def _ids(self, text: str) -> bytes:
        if type(self._tokenizer) is ByteTokenizer:
            return self._bytes(text)
        if not self.by_words:
            return self._pack(self._tokenizer.encode(text))
        return self._text(text)

    def end(self) -> bytes:
        """The token after a document; nothing where the tokenizer has none."""
        end = self._tokenizer.specials.end
        packed = b"" if end is None else self._pack([end])
        self._notice(packed)
        return packed

    def _notice(self, packed: bytes) -> None:
        numbers = array(self._code, packed)
        if sys.byteorder == "big":
            numbers.byteswap()
        self.largest = max(self.largest, max(numbers, default=0))

    def _bytes(self, text: str) -> bytes:
        data = text.encode("utf-8", "surrogatepass")
        out = bytearray(2 * len(data))
        out[::2] = data
        return bytes(out)

    def _pack(self, ids: Sequence[int]) -> bytes:
        return little_endian(array(self._code, ids))

    def _text(self, text: str) -> bytes:
        units = _UNIT.findall(text) if self._special is None else self._between(text)
        new = set(units) - self._known.keys()
        if len(self._known) + len(new) > _MOST:
            self._known.clear()
            new = set(units)
        wanted = list(new)
        encoded = map(self._pack, self._tokenizer.encode_all(wanted))
        found = dict(zip(wanted, encoded, strict=True))
        self._known.update(found)
        packed = b"".join(map(self._known.__getitem__, units))
        for unit in found:
            if len(unit) > _LONGEST:
                del self._known[unit]
        return packed

    def _between(self, text: str) -> list[str]:
        """The units of a text, and the special tokens in it."""
        assert self._special is not None
        pieces = self._special.split(text)
        if len(pieces) == 1:
            return _UNIT.findall(text)
        return [unit for i, piece in enumerate(pieces) for unit in ([piece] if i % 2 else _UNIT.findall(piece))]


def splits_at_words(text: str) -> bool:
    """Whether a tokenizer.json is one that `Packer` may ask word by word."""
    spec: dict[str, Any] = json.loads(text)
    model = spec.get("model") or {}
    if model.get("type") != "BPE" or model.get("dropout") or spec.get("normalizer") is not None:
        return False
    for token in spec.get("added_tokens") or []:
        content = token.get("content", "")
        if any(c.isspace() for c in content) or any(token.get(k) for k in ("lstrip", "rstrip", "single_word")):
            return False
    return _splits(spec.get("pre_tokenizer") or {})


def _splits(before: dict[str, Any]) -> bool:
    if before.get("type") == "ByteLevel":
        return bool(before.get("use_regex", True)) and not before.get("add_prefix_space")
    if before.get("type") != "Sequence" or len(before.get("pretokenizers") or []) != 2:
        return False
    split, bytes_ = before["pretokenizers"]
    pattern = (split.get("pattern") or {}).get("Regex")
    known = split.get("type") == "Split" and pattern in _KNOWN
    isolated = split.get("behavior") == "Isolated" and not split.get("invert")
    plain = bytes_.get("type") == "ByteLevel" and not bytes_.get("use_regex", True)
    return bool(known and isolated and plain and not bytes_.get("add_prefix_space"))
