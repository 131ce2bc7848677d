"""From a stream of tokens to training samples: the sample at an index, as tensors.

Every sample is full: samples are cut from one stream of all documents, so none needs padding, all have the same number
of targets, and a mean over a step's samples does not depend on how they are dealt to micro-batches and ranks.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from tpcompiler.errors import TpcError
from tpcompiler.train.data.order import Permutation, hashes, mix, uniform
from tpcompiler.train.data.tokenizer import Tokenizer
from tpcompiler.train.data.tokens import Tokens

BLOCK = 1000  # samples of a mixture that hold its shares
IGNORED = -100  # the label of a position that is not guessed: `F.cross_entropy`'s default


class Samples(Protocol):
    """A finite sequence of samples. What is random in one depends on `key` alone."""

    def __len__(self) -> int: ...

    def sample(self, index: int, key: int) -> dict[str, Tensor]:
        """int64 tensors without a batch dimension, under the names that `models/` and Hugging Face use."""


@dataclass(frozen=True)
class Causal:
    """`sequence` tokens in, the token after each to guess. Neighbouring samples share one token."""

    tokens: Tokens
    sequence: int
    shifted: bool = True  # whether labels[t] is the token after input_ids[t], or the model shifts by itself
    end: int | None = None  # the token that ends a document, where documents are kept apart

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.sequence

    def sample(self, index: int, key: int) -> dict[str, Tensor]:
        ids = self.tokens.read(index * self.sequence, (index + 1) * self.sequence + 1)
        if self.end is None:
            return {"input_ids": ids[:-1], "labels": ids[1:] if self.shifted else ids[:-1]}
        return self._apart(ids, self.end)

    def _apart(self, ids: Tensor, end: int) -> dict[str, Tensor]:
        """With the place of each token in its document, from 0, and the number of the document in the sample.

        The first token of a document is not guessed: the tokens before it belong to another one.
        """
        ends = ids[:-1].eq(end)
        begins = torch.cat((torch.zeros_like(ends[:1]), ends))
        guessed = ids.masked_fill(begins, IGNORED)
        place = torch.arange(self.sequence)
        first = torch.where(begins[:-1], place, 0).cummax(0).values
        return {
            "input_ids": ids[:-1],
            "labels": guessed[1:] if self.shifted else guessed[:-1],
            "position_ids": place - first,
            "document_ids": begins[:-1].long().cumsum(0),
        }


@dataclass(frozen=True)
class Masked:
    """BERT's task (Devlin et al., arXiv 1810.04805, §3.1): [CLS] text [SEP], or [CLS] A [SEP] B [SEP], 15 % to guess.

    Of the guessed positions 80 % become [MASK], 10 % a random token, 10 % stay. With `pair` "sop" A and B are
    neighbouring parts of the text, exchanged in half of the samples (Lan et al., arXiv 1909.11942); with "nsp" B comes
    from elsewhere in half of them. `pair_labels` is 1 for exchanged or foreign parts. Attention masks are all 1.
    """

    tokens: Tokens
    sequence: int
    tokenizer: Tokenizer
    pair: str = ""  # "" | sop | nsp
    rate: float = 0.15

    def __post_init__(self) -> None:
        specials = self.tokenizer.specials
        missing = [n for n in ("cls", "sep", "mask") if getattr(specials, n) is None]
        if missing:
            raise TpcError(
                f"tokenizer: has no {missing[0]} token, which masked-LM batches need; `bytes` has all of them"
            )
        if self.room < 2:
            raise TpcError(
                f"sequence {self.sequence} leaves no room for text beside the special tokens; at least 5 would work"
            )
        if self.pair == "nsp" and len(self) < 3:
            raise TpcError(
                f"data {self.tokens}: next-sentence pairs need 3 samples of {self.room} tokens, there are {len(self)}"
            )

    @property
    def room(self) -> int:
        """Text tokens in a sample."""
        return self.sequence - (3 if self.pair else 2)

    @property
    def guessed(self) -> int:
        """Positions to guess in a sample: the same number in each."""
        return max(1, round(self.rate * self.room))

    def __len__(self) -> int:
        return len(self.tokens) // self.room

    def sample(self, index: int, key: int) -> dict[str, Tensor]:
        text = self._text(index)
        cls, sep = self._marks
        if not self.pair:
            ids, kinds = torch.cat((cls, text, sep)), torch.zeros(self.sequence, dtype=torch.int64)
            return self._mask(ids, kinds, key)
        first, second, label = self._pair(index, text, key)
        ids = torch.cat((cls, first, sep, second, sep))
        kinds = (torch.arange(self.sequence) >= len(first) + 2).to(torch.int64)
        return {**self._mask(ids, kinds, key), "pair_labels": torch.tensor(label)}

    def _text(self, index: int) -> Tensor:
        return self.tokens.read(index * self.room, (index + 1) * self.room)

    def _pair(self, index: int, text: Tensor, key: int) -> tuple[Tensor, Tensor, int]:
        cut = 1 + mix(key, 1) % (self.room - 1)
        first, second, changed = text[:cut], text[cut:], mix(key, 2) & 1
        if changed and self.pair == "sop":
            first, second = second, first
        elif changed:
            # Neither this sample nor the one after it, whose text continues this one.
            elsewhere = (index + 2 + mix(key, 3) % (len(self) - 2)) % len(self)
            second = self._text(elsewhere)[cut:]
        return first, second, changed

    def _mask(self, ids: Tensor, kinds: Tensor, key: int) -> dict[str, Tensor]:
        place, fate, word = hashes(mix(key, 4), 3 * self.sequence).view(3, self.sequence)
        structural = torch.isin(ids, self._structure)
        place = place.masked_fill(structural, 2**63 - 1)
        count = min(self.guessed, self.sequence - int(structural.sum()))
        chosen = torch.zeros(self.sequence, dtype=torch.bool)
        chosen[place.argsort(stable=True)[:count]] = True
        fate = uniform(fate)
        masked = torch.where(chosen & (fate < 0.8), self._mask_id, ids)
        swap = chosen & (fate >= 0.8) & (fate < 0.9)
        masked = torch.where(swap, self._words[word % len(self._words)], masked)
        return {
            "input_ids": masked,
            "labels": torch.where(chosen, ids, IGNORED),
            "attention_mask": torch.ones_like(ids),
            "token_type_ids": kinds,
        }

    @cached_property
    def _marks(self) -> tuple[Tensor, Tensor]:
        specials = self.tokenizer.specials
        return torch.tensor([specials.cls]), torch.tensor([specials.sep])

    @property
    def _mask_id(self) -> int:
        mask = self.tokenizer.specials.mask
        assert mask is not None
        return mask

    @cached_property
    def _structure(self) -> Tensor:
        """[CLS] and [SEP] are never guessed; the end of a document, which stands in the text, may be."""
        specials = self.tokenizer.specials
        return torch.tensor([specials.cls, specials.sep])

    @cached_property
    def _words(self) -> Tensor:
        specials = self.tokenizer.specials.ids
        return torch.tensor([i for i in range(self.tokenizer.vocab) if i not in specials])


@dataclass(frozen=True)
class Part:
    """Samples start … stop − 1 of others."""

    samples: Samples
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def sample(self, index: int, key: int) -> dict[str, Tensor]:
        return self.samples.sample(self.start + index, key)


@dataclass(frozen=True)
class Joined:
    """The samples of several, one after the other."""

    parts: tuple[Samples, ...]

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def sample(self, index: int, key: int) -> dict[str, Tensor]:
        i = bisect_right(self._ends, index)
        return self.parts[i].sample(index - self._ends[i] + len(self.parts[i]), key)


@dataclass(frozen=True)
class Mixture(Joined):
    """Several corpora, of each a share. Each has epochs of its own: a small one with a large share is repeated.

    Every 1,000 samples in a row hold the shares to the nearest sample, in an order of their own; so the place in each
    corpus follows from the position alone.
    """

    shares: tuple[float, ...]  # positive; they need not add up to 1

    @cached_property
    def _quotas(self) -> list[int]:
        """How many of a block's samples each corpus gives: the largest remainders are rounded up."""
        whole = sum(self.shares)
        exact = [BLOCK * share / whole for share in self.shares]
        quotas = [int(x) for x in exact]
        order = sorted(range(len(exact)), key=lambda i: quotas[i] - exact[i])
        for i in order[: BLOCK - sum(quotas)]:
            quotas[i] += 1
        return quotas

    def place(self, position: int, seed: int) -> tuple[int, int]:
        """(which corpus, how many of its samples came before) of the sample at a position."""
        block, at = divmod(position, BLOCK)
        slot = Permutation(BLOCK, mix(seed, block, 2))[at]
        before = list(accumulate(self._quotas, initial=0))
        which = bisect_right(before, slot) - 1
        return which, block * self._quotas[which] + slot - before[which]
