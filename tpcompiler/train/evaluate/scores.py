"""Perplexity and cloze accuracy of a causal language model, as Megatron-LM measures them (arXiv 1909.08053, app. E).

The model is any callable from ids [b, s] (int64) to logits [b, s, vocabulary], padded on the right where texts end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, inf
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcompiler.errors import TpcError
from tpcompiler.runtime.mesh import part
from tpcompiler.train.data.tokenizer import Tokenizer

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Score:
    """Sums over what was evaluated; the scores of two parts add up."""

    nll: float  # minus the logarithm of the likelihood, nats
    tokens: int  # predicted

    def __add__(self, other: Score) -> Score:
        return Score(self.nll + other.nll, self.tokens + other.tokens)

    def perplexity(self, original_tokens: int | None = None) -> float:
        """exp(nll / count): the count of predicted tokens, or the original text's, which tokenizers cannot change."""
        mean = self.nll / (original_tokens or self.tokens)
        return exp(mean) if mean < 700 else inf


@dataclass(frozen=True)
class Windows:
    """Overlapping windows over `n` tokens. Each predicts `length` tokens at most, of which the last `stride` count,
    in the first window all: so every token but the first counts once, with as much context as its window gives."""

    n: int
    length: int
    stride: int

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.length:
            raise TpcError(f"stride {self.stride} must be from 1 to the sequence length {self.length}")
        if self.n < 2:
            raise TpcError(f"{self.n} tokens are too few for a perplexity: nothing is predicted; 2 would work")

    def __len__(self) -> int:
        return 1 + max(0, -(-(self.n - 1 - self.length) // self.stride))

    def __getitem__(self, i: int) -> tuple[int, int, int]:
        """(start, stop, first): inputs start … stop − 1 predict start + 1 … stop; those from `first` count."""
        start = i * self.stride
        stop = min(start + self.length, self.n - 1)
        return start, stop, start + 1 if i == 0 else start + self.length - self.stride + 1


@torch.no_grad()
def score_tokens(
    model: Model,
    tokens: Tensor,
    length: int,
    stride: int,
    batch: int = 8,
    share: tuple[int, int] = (0, 1),
    device: torch.device | str = "cpu",
) -> Score:
    """The likelihood of `tokens` [n], over windows of `length` that advance by `stride`.

    `share` = (index, degree) takes one of `degree` parts of the windows, for the ranks of a data dimension; all parts
    run the same number of batches (the last ones may be empty in value), so that collectives inside the model match.
    """
    windows = Windows(len(tokens), length, stride)
    start, stop = part(len(windows), share[1], share[0])
    longest = part(len(windows), share[1], 0)[1]
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    for at in range(0, longest, batch):
        ids, targets = torch.zeros(batch, length, dtype=torch.int64), torch.full((batch, length), -100)
        for row, i in enumerate(range(start + at, min(start + at + batch, stop))):
            a, b, first = windows[i]
            ids[row, : b - a] = tokens[a:b]
            targets[row, first - a - 1 : b - a] = tokens[first : b + 1]
        total += _nll(model(ids.to(device)), targets.to(device))
        count += int((targets != -100).sum())
    return Score(float(total), count)


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.double().sum()


def original_tokens(text: str) -> int:
    """Words and line breaks: what WikiText counts (its `<eos>` is a line break), whatever the tokenizer."""
    text = text.strip()
    return len(text.split()) + text.count("\n")


@dataclass(frozen=True)
class Cloze:
    """A text without its last word, and the word, as tokens."""

    context: tuple[int, ...]
    answer: tuple[int, ...]


def cloze(text: str, tokenizer: Tokenizer, length: int) -> Cloze:
    """Takes the last word off (LAMBADA, Paperno et al., arXiv 1606.06031); it keeps the space before it.

    A context too long for `length` inputs loses its beginning.
    """
    context, gap, word = text.strip().rpartition(" ")
    if not context or not word:
        raise TpcError(f"cloze: no last word to guess in {text.strip()[:40]!r}; a text has two words at least")
    answer = tuple(tokenizer.encode(gap + word))
    room = length + 1 - len(answer)
    if room < 1:
        raise TpcError(f"cloze: the last word {word[:40]!r} is {len(answer)} tokens; the model takes {length}")
    return Cloze(tuple(tokenizer.encode(context)[-room:]), answer)


@torch.no_grad()
def cloze_hits(
    model: Model,
    items: Sequence[Cloze],
    length: int,
    batch: int = 8,
    share: tuple[int, int] = (0, 1),
    device: torch.device | str = "cpu",
) -> int:
    """How many last words the model guesses: each token of the word must be its most likely one.

    One forward an item: greedy decoding equals the answer exactly when every token of it, given those before it,
    is the most likely one. `share` as in `score_tokens`.
    """
    start, stop = part(len(items), share[1], share[0])
    longest = part(len(items), share[1], 0)[1]
    hits = 0
    for at in range(0, longest, batch):
        ids, targets = torch.zeros(batch, length, dtype=torch.int64), torch.full((batch, length), -100)
        rows = items[start + at : min(start + at + batch, stop)]
        for row, item in enumerate(rows):
            whole = torch.tensor(item.context + item.answer)
            ids[row, : len(whole) - 1] = whole[:-1]
            targets[row, len(item.context) - 1 : len(whole) - 1] = whole[len(item.context) :]
        guesses = model(ids.to(device)).argmax(-1).cpu()
        right = ((guesses == targets) | (targets == -100)).all(-1)
        hits += int(right[: len(rows)].sum())
    return hits


def read_texts(path: str | Path, field: str = "text") -> list[str]:
    """The texts of a cloze file: a .jsonl's field, or the lines of any other file; empty lines are left out."""
    path = Path(path)
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as e:
        raise TpcError(f"{path}: {e.strerror}") from None
    except UnicodeDecodeError:
        raise TpcError(f"{path}: not UTF-8 text") from None
    texts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix == ".jsonl":
            try:
                line = json.loads(line)[field]
            except (json.JSONDecodeError, KeyError, TypeError):
                raise TpcError(f"{path}:{number}: not a JSON object with a text under {field!r}") from None
        texts.append(line)
    if not texts:
        raise TpcError(f"{path}: the file is empty")
    return texts
