"""Masked-LM batches: rates, determinism, sentence pairs."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest
import torch

from tpcompiler.errors import TpcError
from tpcompiler.train.data.order import mix
from tpcompiler.train.data.samples import IGNORED, Masked
from tpcompiler.train.data.tokenizer import ByteTokenizer, Specials
from tpcompiler.train.data.tokens import TokenFile, Tokens

TOKENIZER = ByteTokenizer()
END, PAD, CLS, SEP, MASK = 256, 257, 258, 259, 260  # `test_train_tokenizer.py` says so


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    """Token t of the stream is t mod 251, so a token and its neighbours tell where they came from."""
    with (tmp_path / "t.bin").open("wb") as f:
        array("H", [i % 251 for i in range(20000)]).tofile(f)
    return Tokens((TokenFile(tmp_path / "t.bin", "uint16", 20000, 250),))


def originals(sample: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.where(sample["labels"] == IGNORED, sample["input_ids"], sample["labels"])


@pytest.mark.parametrize("pair", ["", "sop", "nsp"])
def test_masking_hides_15_percent_80_10_10(tokens: Tokens, pair: str) -> None:
    masked = Masked(tokens, 128, TOKENIZER, pair)
    hidden = swapped = kept = 0
    for i in range(len(masked)):
        got = masked.sample(i, mix(7, i))
        chosen = got["labels"] != IGNORED
        assert int(chosen.sum()) == masked.guessed == round(0.15 * masked.room)
        seen, true = got["input_ids"][chosen], got["labels"][chosen]
        assert ((true < 251) & (true >= 0)).all()
        hidden += int((seen == MASK).sum())
        kept += int((seen == true).sum())
        swapped += int(((seen != true) & (seen != MASK)).sum())
        assert not torch.isin(seen, torch.tensor([CLS, SEP, PAD, END])).any()
    total = hidden + swapped + kept  # about 3,000: a standard deviation is 0.7 % for 80 %, 0.5 % for 10 %
    assert abs(hidden / total - 0.8) < 0.03
    assert abs(swapped / total - 0.1) < 0.025
    assert abs(kept / total - 0.1) < 0.025


def test_every_position_is_masked_equally_often(tokens: Tokens) -> None:
    masked = Masked(tokens, 32, TOKENIZER)
    counts = sum(
        ((masked.sample(i, mix(i))["labels"] != IGNORED).double() for i in range(len(masked))), torch.zeros(32)
    )
    assert counts[0] == counts[-1] == 0  # [CLS] and [SEP]
    rate = counts[1:-1] / len(masked)
    expected = masked.guessed / masked.room
    assert (rate - expected).abs().max() < 5 * (expected * (1 - expected) / len(masked)) ** 0.5


def test_a_sample_depends_on_its_index_and_key_alone(tokens: Tokens) -> None:
    masked = Masked(tokens, 64, TOKENIZER, "sop")
    once, again, other = masked.sample(3, 5), masked.sample(3, 5), masked.sample(3, 6)
    assert all(torch.equal(once[k], again[k]) for k in once)
    assert not torch.equal(once["labels"], other["labels"])


def test_without_pairs_a_sample_is_its_text_between_marks(tokens: Tokens) -> None:
    masked = Masked(tokens, 64, TOKENIZER)
    got = masked.sample(4, 9)
    true = originals(got).tolist()
    assert true == [CLS, *((4 * 62 + i) % 251 for i in range(62)), SEP]
    assert got["token_type_ids"].tolist() == [0] * 64
    assert got["attention_mask"].tolist() == [1] * 64
    assert "pair_labels" not in got


@pytest.mark.parametrize("pair", ["sop", "nsp"])
def test_pairs_are_neighbours_exchanged_or_foreign(tokens: Tokens, pair: str) -> None:
    masked = Masked(tokens, 64, TOKENIZER, pair)
    labels = []
    for i in range(len(masked)):
        got = masked.sample(i, mix(11, i))
        ids, kinds = originals(got), got["token_type_ids"]
        seps = (ids == SEP).nonzero().flatten().tolist()
        assert ids[0] == CLS
        assert len(seps) == 2
        assert seps[1] == 63
        assert kinds.tolist() == [0] * (seps[0] + 1) + [1] * (63 - seps[0])
        first, second = ids[1 : seps[0]], ids[seps[0] + 1 : seps[1]]
        assert len(first) > 0
        assert len(second) > 0
        follows = int(second[0]) == (int(first[-1]) + 1) % 251
        exchanged = int(first[0]) == (int(second[-1]) + 1) % 251
        label = int(got["pair_labels"])
        labels.append(label)
        if label == 0:
            assert follows
        elif pair == "sop":
            assert exchanged
        else:
            assert int(first[0]) == (i * 61) % 251
            assert not follows
    share = sum(labels) / len(labels)
    assert 0.38 < share < 0.62  # 327 samples: 4 standard deviations are 11 %


def test_what_masking_needs_and_lacks_is_one_line(tokens: Tokens) -> None:
    class Plain(ByteTokenizer):
        pass

    with pytest.raises(TpcError, match="has no mask token"):
        Masked(tokens, 64, Plain(specials=Specials(cls=1, sep=2)))
    with pytest.raises(TpcError, match="sequence 4 leaves no room"):
        Masked(tokens, 4, TOKENIZER, "sop")
    with pytest.raises(TpcError, match="next-sentence pairs need 3 samples of 9997 tokens, there are 2"):
        Masked(tokens, 10000, TOKENIZER, "nsp")
