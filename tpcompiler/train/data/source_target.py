"""Samples for encoder-decoders: a source that the encoder reads, and a target that the decoder guesses.

`input_ids` and `attention_mask` [sequence] are the source's, `labels` [target] the target's tokens, and `target_ids`
the tokens before each of them, a start token first. Models that shift their labels themselves take no `target_ids`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tpcompiler.errors import TpcError
from tpcompiler.train.data.order import hashes, mix
from tpcompiler.train.data.samples import IGNORED
from tpcompiler.train.data.tokenizer import Tokenizer
from tpcompiler.train.data.tokens import Tokens


@dataclass(frozen=True)
class Spans:
    """T5's task (Raffel et al., arXiv 1910.10683, §3.1.4): spans of the text are cut out, and are to be guessed.

    15 % of the tokens go, in spans of three tokens on average. Each span leaves one sentinel token in the source, and
    follows the same sentinel in the target; both end with the end token. The text is as long as fills `sequence`, so
    that every sample has the same sizes, and no padding.
    """

    tokens: Tokens
    sequence: int
    tokenizer: Tokenizer
    rate: float = 0.15
    mean: float = 3.0  # tokens in a span

    def __post_init__(self) -> None:
        if self.sequence < 4:
            raise TpcError(f"sequence {self.sequence} leaves no room for spans; at least 4 would work")
        _needed(self.tokenizer, "end")
        found = self.tokenizer.sentinels
        if found and len(found) < self.spans:
            raise TpcError(
                f"train.sequence: {self.sequence} tokens have {self.spans} spans, but the tokenizer has sentinels for "
                f"{len(found)}; a shorter sequence would work"
            )

    @cached_property
    def sizes(self) -> tuple[int, int, int]:
        """(tokens of text, of these cut out, spans) of a sample."""
        text = self.sequence
        while self._source(text + 1) <= self.sequence:
            text += 1
        while self._source(text) > self.sequence:
            text -= 1
        return text, *self._cut(text)

    def _cut(self, text: int) -> tuple[int, int]:
        gone = min(max(round(text * self.rate), 1), text - 1)
        return gone, min(max(round(gone / self.mean), 1), gone, text - gone)

    def _source(self, text: int) -> int:
        gone, spans = self._cut(text)
        return text - gone + spans + 1

    @property
    def spans(self) -> int:
        return self.sizes[2]

    @property
    def target(self) -> int:
        """Tokens in the target."""
        _, gone, spans = self.sizes
        return gone + spans + 1

    @property
    def largest(self) -> int:
        """The largest id of a sentinel. A tokenizer that has none gets ids behind its vocabulary for them."""
        return int(self._sentinels.max())

    def __len__(self) -> int:
        return len(self.tokens) // self.sizes[0]

    def sample(self, index: int, key: int) -> dict[str, Tensor]:
        length, gone, spans = self.sizes
        text = self.tokens.read(index * length, (index + 1) * length)
        kept = _parts(length - gone, spans, mix(key, 5))
        cut = _parts(gone, spans, mix(key, 6))
        pieces = text.split([n for pair in zip(kept, cut, strict=True) for n in pair])
        marks = self._sentinels.split(1)
        source = [x for i in range(spans) for x in (pieces[2 * i], marks[i])]
        target = [x for i in range(spans) for x in (marks[i], pieces[2 * i + 1])]
        return _row(torch.cat(source), torch.cat(target), self.sequence, self.target, self.tokenizer)

    @cached_property
    def _sentinels(self) -> Tensor:
        own = self.tokenizer.sentinels or range(self.tokenizer.vocab, self.tokenizer.vocab + self.spans)
        return torch.tensor(list(own)[: self.spans])


@dataclass(frozen=True)
class Pairs:
    """Texts and what each is to become: translations, summaries, answers. `tokens` holds them in turn.

    A source or target that is too long loses its end; a shorter one is padded. Padding is neither attended to nor
    guessed.
    """

    tokens: Tokens
    sequence: int
    target: int
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        if min(self.sequence, self.target) < 2:
            raise TpcError("train.sequence and data.target_sequence: at least 2 would work, a token and the end")
        for role in ("end", "pad"):
            _needed(self.tokenizer, role)

    @property
    def largest(self) -> int:
        """The largest id of the tokens that stand for no text."""
        return max(_needed(self.tokenizer, role) for role in ("end", "pad"))

    def __len__(self) -> int:
        return self.tokens.documents // 2

    def sample(self, index: int, key: int) -> dict[str, Tensor]:
        source, target = self.tokens.document(2 * index), self.tokens.document(2 * index + 1)
        return _row(source, target, self.sequence, self.target, self.tokenizer)


def _row(source: Tensor, target: Tensor, sequence: int, length: int, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """A sample of a text and what it is to become, each with the end token, cut or padded to its size."""
    end = torch.tensor([_needed(tokenizer, "end")])
    pad = tokenizer.specials.pad if tokenizer.specials.pad is not None else int(end)
    source, target = torch.cat((source[: sequence - 1], end)), torch.cat((target[: length - 1], end))
    ids = torch.full((sequence,), pad)
    labels = torch.full((length,), IGNORED)
    before = torch.full((length,), pad)  # T5 starts with the padding token
    ids[: len(source)], labels[: len(target)], before[1 : len(target)] = source, target, target[:-1]
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(sequence) < len(source)).long(),
        "target_ids": before,
        "labels": labels,
    }


def _parts(whole: int, count: int, key: int) -> list[int]:
    """`whole` as a sum of `count` positive numbers; every such sum is equally likely."""
    cuts = hashes(key, whole - 1).argsort(stable=True)[: count - 1].sort().values.add(1).tolist() if count > 1 else []
    return [b - a for a, b in zip([0, *cuts], [*cuts, whole], strict=True)]


def _needed(tokenizer: Tokenizer, role: str) -> int:
    found = getattr(tokenizer.specials, role)
    if found is None:
        raise TpcError(f"tokenizer: has no {role} token, which an encoder-decoder's batches need; `bytes` has one")
    return int(found)
