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
_MARK = "\x01"  # a word that follows a line break: it has no space before it
_RUN = "\x02"  # what is encoded as one: words, and white space between them
_LONGEST = 48  # characters of a word that is remembered
_MOST = 1 << 20  # words that are remembered

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

    A tokenizer that splits text at words first, whatever surrounds them, is asked for each word once. That is known
    from its file: byte-level BPE after one of the splitting expressions above, no normaliser, and no special token
    with a space in it. A word begins with a space that no white space follows, or after a line break that stands
    between two characters that are no white space. No alternative of these expressions matches across such a place,
    and none looks over it: `\\s+(?!\\S)` leaves the last space of several to the word behind them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.dtype = dtype_for(tokenizer)
        self._code = CODES[self.dtype]
        self._words: dict[str, bytes] = {}
        self.largest = 0  # id since it was last set
        self.by_words = isinstance(tokenizer, FileTokenizer) and splits_at_words(tokenizer.text)
        marks = [_MARK, _RUN]
        if isinstance(tokenizer, FileTokenizer):  # special tokens are cut out of a text before it is split
            marks += [t["content"] for t in json.loads(tokenizer.text).get("added_tokens") or []]
        self._special = re.compile("|".join(map(re.escape, filter(None, marks))))

    def __call__(self, text: str) -> bytes:
        packed = self._ids(text)
        self._notice(packed)
        return packed

    def _ids(self, text: str) -> bytes:
        if type(self._tokenizer) is ByteTokenizer:
            return self._bytes(text)
        if not self.by_words or self._special.search(text):
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
        if len(self._words) > _MOST:
            self._words.clear()
        words = (_MARK + text).replace("\n", f"\n {_MARK}").split(" ")
        self._learn(set(words) - self._words.keys())
        found: list[bytes | None] = list(map(self._words.get, words))
        done = 0  # words that are encoded, those before `done`
        for i in [i for i, packed in enumerate(found) if packed is None]:
            if i < done:
                continue
            first = i if _begins(words[i]) else max(i - 1, 0)
            done = i + 1
            while done < len(words) and not (_begins(words[done]) and _ends(words[done - 1], words[done])):
                done += 1
            if done == first + 1 and _begins(words[first]):
                found[first] = self._word(words[first], keep=_ends(words[first], _MARK))
            else:
                found[first:done] = [self._word(_RUN + _joined(words[first:done])), *[b""] * (done - first - 1)]
        return b"".join(found)  # type: ignore[arg-type]

    def _learn(self, words: set[str]) -> None:
        """Encodes words that are new, all at once: that costs a third of one by one."""
        wanted = [w for w in words if len(w) <= _LONGEST and _begins(w) and _ends(w, _MARK)]
        encoded = self._tokenizer.encode_all([_joined([w]) for w in wanted])
        for word, ids in zip(wanted, encoded, strict=True):
            self._words[word] = self._pack(ids)

    def _word(self, word: str, keep: bool = True) -> bytes:
        known = self._words.get(word)
        if known is not None:
            return known
        text = word[1:] if word[0] in (_MARK, _RUN) else " " + word
        packed = self._pack(self._tokenizer.encode(text))
        if keep and len(word) <= _LONGEST:
            self._words[word] = packed
        return packed


def _begins(word: str) -> bool:
    """Whether a token begins where this word does."""
    core = word[1:] if word[:1] == _MARK else word
    return bool(core) and not core[0].isspace()


def _ends(word: str, following: str) -> bool:
    """Whether a token ends between two words of which the second `_begins`: not in white space of several lines."""
    if following[:1] != _MARK:
        return True
    text = "\n" + word[1:] if word[:1] == _MARK else " " + word
    return text[-1:] != "\n" or not text[-2].isspace()


def _joined(words: Sequence[str]) -> str:
    """The text of words that stand one after the other."""
    return "".join(word[1:] if word[:1] == _MARK else " " + word for word in words)


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
