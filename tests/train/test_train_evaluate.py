"""Perplexity and cloze accuracy against the definitions, taken token by token."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.gpt2 import GPT2
from tpcompiler.errors import TpcError
from tpcompiler.train.data.tokenizer import ByteTokenizer
from tpcompiler.train.data.wikitext import join_words
from tpcompiler.train.evaluate.scores import (
    Score,
    cloze,
    cloze_hits,
    original_tokens,
    read_texts,
    score_tokens,
)


@pytest.fixture(scope="module")
def model() -> GPT2:
    torch.manual_seed(5)
    return GPT2(vocab=40, positions=16, hidden=16, heads=2, layers=2).double().eval()


@torch.no_grad()
def one_by_one(model: GPT2, tokens: Tensor, length: int, stride: int) -> float:
    """Each token by itself, in the first window that predicts it, with that window's context."""
    total = 0.0
    for j in range(1, len(tokens)):
        window = max(0, -(-(j - length) // stride))
        logits = model(tokens[None, window * stride : j])[0, -1]
        total -= float(logits.log_softmax(-1)[tokens[j]])
    return total


@given(n=st.integers(2, 45), length=st.integers(1, 16), data=st.data(), batch=st.integers(1, 4))
@settings(max_examples=25)
def test_perplexity_over_windows_is_that_of_the_tokens_one_by_one(
    model: GPT2, n: int, length: int, data: st.DataObject, batch: int
) -> None:
    stride = data.draw(st.integers(1, length))
    degree = data.draw(st.integers(1, 3))
    tokens = torch.randint(40, (n,), generator=torch.Generator().manual_seed(n))
    parts = [score_tokens(model, tokens, length, stride, batch, (i, degree)) for i in range(degree)]
    total = sum(parts, Score(0.0, 0))
    expected = one_by_one(model, tokens, length, stride)
    assert total.tokens == n - 1
    assert total.nll == pytest.approx(expected, rel=1e-10)
    assert total.perplexity() == pytest.approx(math.exp(expected / (n - 1)), rel=1e-9)
    assert total.perplexity(7) == pytest.approx(math.exp(expected / 7), rel=1e-9)


def test_all_ranks_call_the_model_equally_often(model: GPT2) -> None:
    calls = [0, 0, 0]

    def counted(rank: int) -> None:
        def call(ids: Tensor) -> Tensor:
            calls[rank] += 1
            return model(ids)

        score_tokens(call, torch.arange(30) % 40, 8, 4, 2, (rank, 3))

    for rank in range(3):
        counted(rank)
    assert calls == [calls[0]] * 3


def test_a_certain_model_has_perplexity_one_and_a_clueless_one_the_vocabulary() -> None:
    tokens = torch.arange(50) % 40

    def certain(ids: Tensor) -> Tensor:
        return 1000.0 * torch.nn.functional.one_hot((ids + 1) % 40, 40).double()

    def clueless(ids: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, 40)

    assert score_tokens(certain, tokens, 8, 4).perplexity() == 1.0
    assert score_tokens(clueless, tokens, 8, 4).perplexity() == pytest.approx(40)


def test_original_tokens_are_words_and_line_breaks() -> None:
    assert original_tokens(" the cat \n sat \n") == 4
    text = "= Title = \n \n Two , words @-@ joined . \n"
    assert original_tokens(text) == len(text.strip().split(" "))


def test_windows_that_cannot_be_are_one_line(model: GPT2) -> None:
    with pytest.raises(TpcError, match="stride 9 must be from 1 to the sequence length 8"):
        score_tokens(model, torch.arange(20), 8, 9)
    with pytest.raises(TpcError, match="1 tokens are too few"):
        score_tokens(model, torch.arange(1), 8, 4)


class Parrot:
    """Continues `the text it knows` right, and every other text wrong."""

    def __init__(self, text: str) -> None:
        self.known = text.encode()

    def __call__(self, ids: Tensor) -> Tensor:
        logits = torch.zeros(*ids.shape, 261)
        for row, line in enumerate(ids.tolist()):
            for at in range(len(line)):
                seen = bytes(i for i in line[: at + 1] if i < 256)
                found = self.known.find(seen)
                follows = found >= 0 and found + len(seen) < len(self.known)
                logits[row, at, self.known[found + len(seen)] if follows else 0] = 1.0
        return logits


def test_cloze_counts_a_word_when_all_its_tokens_are_right() -> None:
    tokenizer, length = ByteTokenizer(), 40
    texts = ["she went back to the sea", "she went back to the sex", "she went back to the seas", "she went back"]
    items = [cloze(text, tokenizer, length) for text in texts]
    hits = [cloze_hits(Parrot("she went back to the sea"), [item], length, 2) for item in items]
    assert hits == [1, 0, 0, 1]
    shares = [cloze_hits(Parrot("she went back to the sea"), items, length, 2, (i, 3)) for i in range(3)]
    assert sum(shares) == 2


def test_cloze_takes_the_last_word_with_its_space_and_the_end_of_the_context() -> None:
    tokenizer = ByteTokenizer()
    item = cloze("one two three\n", tokenizer, 100)
    assert bytes(item.context) == b"one two"
    assert bytes(item.answer) == b" three"
    short = cloze("one two three", tokenizer, 8)
    assert bytes(short.context) == b"two"
    for text, length in (("word", 10), ("", 10), ("a longword", 3)):
        with pytest.raises(TpcError, match="cloze: "):
            cloze(text, tokenizer, length)


def test_cloze_files_are_jsonl_or_lines(tmp_path: Path) -> None:
    lines, records = tmp_path / "a.txt", tmp_path / "a.jsonl"
    lines.write_text("one two\n\nthree four\n")
    records.write_text('{"text": "one two"}\n{"text": "three four"}\n')
    assert read_texts(lines) == read_texts(records) == ["one two", "three four"]
    records.write_text('{"text": "one"}\n[]\n')
    with pytest.raises(TpcError, match=r"a\.jsonl:2: not a JSON object"):
        read_texts(records)
    lines.write_text("\n")
    with pytest.raises(TpcError, match="is empty"):
        read_texts(lines)
    with pytest.raises(TpcError, match="No such file"):
        read_texts(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("apart", "joined"),
    [
        ("It cost $ 3 @,@ 000 ( in 1 @.@ 5 years ) .", "It cost $3,000 (in 1.5 years)."),
        (' He said : " no , don \'t ! " and left ;', ' He said: "no, don\'t!" and left;'),
        ("the cat 's well @-@ known hat", "the cat's well-known hat"),
        (" \n = = Early life = = \n \n Born", "\n== Early life ==\n\nBorn"),
        ("the boys ' hats at 20 ° C", "the boys' hats at 20° C"),
        ("nothing to do here", "nothing to do here"),
    ],
)
def test_wikitext_is_joined_as_people_write(apart: str, joined: str) -> None:
    assert join_words(apart) == joined
    assert join_words(joined) == joined
