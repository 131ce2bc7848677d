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
    """Sums over the evaluated tokens. The scores of two parts of a text can be added."""

    nll: float  # the negative log-likelihood, nats
    tokens: int  # how many were predicted

    def __add__(self, other: Score) -> Score:
        return Score(self.nll + other.nll, self.tokens + other.tokens)

    def perplexity(self, original_tokens: int | None = None) -> float:
        """exp(nll / count). The count is `original_tokens`, which does not depend on the tokenizer, or else that of the
        predicted tokens."""
        mean = self.nll / (original_tokens or self.tokens)
        return exp(mean) if mean < 700 else inf


@dataclass(frozen=True)
class Windows:
    """Overlapping windows over `n` tokens. Each window predicts at most `length` tokens. Of these, the last `stride`
    count, in the first window all. Every token but the first thus counts once, with the context that its window has."""

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
        """(start, stop, first): the inputs start … stop − 1 predict the tokens start + 1 … stop, which count from
        `first` on."""
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
    """The likelihood of `tokens` [n] (int64), in windows of `length` that advance by `stride`.

    `share` = (index, degree) takes one of `degree` parts of the windows, for the ranks of a data dimension. All parts
    run the same number of batches, some of which may count nothing, so that collectives inside the model match.
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
    """The number of words and line breaks. WikiText counts these (its `<eos>` is a line break) for any tokenizer."""
    text = text.strip()
    return len(text.split()) + text.count("\n")


@dataclass(frozen=True)
class Cloze:
    """A text without its last word, and that word, as tokens."""

    context: tuple[int, ...]
    answer: tuple[int, ...]


def cloze(text: str, tokenizer: Tokenizer, length: int) -> Cloze:
    """Splits off the last word of a text with the space before it (LAMBADA, Paperno et al., arXiv 1606.06031).

    A context that is too long for `length` inputs loses its beginning. Raises `TpcError` for a text of one word, or a
    last word that is too long.
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
    """How many last words the model predicts: each token of the word must be the most likely one after those before it.

    One forward is enough for each item, because greedy decoding then gives exactly the word. `share` is as in
    `score_tokens`.
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
    """The texts of a cloze file: the field of each line of a .jsonl, or the lines of any other file. Empty lines are
    left out. Raises `TpcError`, which names the line, for a file that cannot be read."""
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
