"""Encoder-decoders: spans cut out of a text, and pairs of texts; both train at every degree."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.train.test_train_engine import close
from tests.train.test_train_engine_runs import failing
from tests.train.train_runs import TRAIN, Case, in_processes, in_threads, train_command
from tpcompiler.errors import TpcError
from tpcompiler.spec.schema import Spec
from tpcompiler.train.data.batches import open_corpus
from tpcompiler.train.data.samples import IGNORED
from tpcompiler.train.data.source_target import Spans
from tpcompiler.train.data.tokenizer import ByteTokenizer
from tpcompiler.train.data.tokens import TokenFile, Tokens
from tpcompiler.train.settings import Train

END, PAD = 256, 257
SIZES: dict[str, Any] = {
    "model": {"vocab": 300, "hidden": 16, "heads": 4, "layers": 1, "intermediate": 32, "dropout": 0.0},
    "inputs": {"batch": 2, "sequence": 16, "vocab": 300},
}
SPANS = Case("seq2seq", SIZES, {**TRAIN, "sequence": 24, "data": {"task": "spans"}})


def stream(tmp_path: Path, count: int = 5000) -> Tokens:
    with (tmp_path / "t.bin").open("wb") as f:
        array("H", [i % 251 for i in range(count)]).tofile(f)
    return Tokens((TokenFile(tmp_path / "t.bin", "uint16", count, 250),))


def put_together(sample: dict[str, Tensor], sentinels: int) -> list[int]:
    """The text that a sample was made of: each sentinel of the source gives way to what follows it in the target."""
    target, spans = sample["labels"].tolist(), {}
    for token in target:
        if token >= sentinels:
            spans[token] = found = []
        elif token != END:
            found.append(token)
    return [t for token in sample["input_ids"].tolist() if token != END for t in spans.get(token, [token])]


@pytest.mark.parametrize("sequence", [4, 5, 16, 31, 128, 512])
def test_source_and_target_hold_the_text_between_them(sequence: int, tmp_path: Path) -> None:
    samples = Spans(stream(tmp_path), sequence, ByteTokenizer())
    length, gone, spans = samples.sizes
    for index in range(0, len(samples), max(1, len(samples) // 5)):
        sample = samples.sample(index, key=index + 9)
        assert put_together(sample, 261) == [i % 251 for i in range(index * length, (index + 1) * length)]
        assert len(sample["input_ids"]) == sequence and bool(sample["attention_mask"].all())
        assert len(sample["labels"]) == samples.target == gone + spans + 1 == len(sample["target_ids"])
        assert sample["target_ids"].tolist() == [PAD, *sample["labels"][:-1].tolist()]
        assert sample["labels"].max() == samples.largest < 261 + spans
        again = samples.sample(index, key=index + 9)
        assert all(torch.equal(again[k], v) for k, v in sample.items())
    if sequence >= 31:
        assert samples.sample(0, 1)["input_ids"].tolist() != samples.sample(0, 2)["input_ids"].tolist()
        assert gone / length == pytest.approx(0.15, abs=0.02) and gone / spans == pytest.approx(3, abs=1.1)


def test_places_are_cut_out_equally_often(tmp_path: Path) -> None:
    """But for the ends: a text begins with tokens that stay, and ends with a span."""
    samples = Spans(stream(tmp_path), 200, ByteTokenizer())
    length, gone, _ = samples.sizes
    counts, draws = torch.zeros(length), 400
    for key in range(draws):
        kept = samples.sample(0, key)["input_ids"]
        counts += 1 - torch.isin(torch.arange(length), kept).float()
    inner = counts[40:-40] / draws
    assert float(inner.mean()) == pytest.approx(gone / length, abs=0.02)
    assert float(inner.std()) < 0.035  # 0.018 of it is the draw's own


def test_the_tokenizers_own_sentinels_are_used_and_must_suffice(tmp_path: Path) -> None:
    own = ByteTokenizer(sentinels=(280, 279, 278))
    assert Spans(stream(tmp_path), 16, own).sample(0, 0)["labels"][0] == 280
    with pytest.raises(TpcError, match="sentinels for 3; a shorter sequence would work"):
        Spans(stream(tmp_path), 512, own)


def pairs(tmp_path: Path, lines: list[tuple[str, str]], **data: Any) -> Train:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"text": a, "target": b}) + "\n" for a, b in lines))
    given = {"task": "pairs", "path": str(file), "cache": str(tmp_path / "cache"), "held_out": 0, **data}
    settings = {"sequence": 8, "batch": 2, "micro_batch": 2, "evaluation": {"every": 0}, "data": given}
    return Spec.load({"mesh": {"tensor": 1}, "train": settings}).section(Train)


def test_pairs_are_cut_or_padded_and_never_mixed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tpcompiler.train.data import parts

    monkeypatch.setattr(parts, "PART", 200)  # so that the lines lie in several parts
    lines = [(chr(97 + i % 26) * (i % 12), chr(65 + i % 26) * (i % 7)) for i in range(40)]
    corpus = open_corpus(pairs(tmp_path, lines, target_sequence=5))
    samples = corpus.train.samples
    assert len(samples) == 40 and corpus.largest_id == PAD
    for i, (source, target) in enumerate(lines):
        sample = samples.sample(i, 0)
        ids, goal = [*source.encode()[:7], END], [*target.encode()[:4], END]
        assert sample["input_ids"].tolist() == ids + [PAD] * (8 - len(ids))
        assert sample["attention_mask"].tolist() == [1] * len(ids) + [0] * (8 - len(ids))
        assert sample["labels"].tolist() == goal + [IGNORED] * (5 - len(goal))
        assert sample["target_ids"].tolist() == [PAD, *goal[:-1]] + [PAD] * (5 - len(goal))
    (next((tmp_path / "cache").rglob("*.ends"))).unlink()
    assert len(open_corpus(pairs(tmp_path, lines)).train.samples) == 40  # what is lost is made again


@pytest.mark.parametrize(
    ("content", "data", "message"),
    [
        ('{"text": "a"}\n', {}, "pairs.jsonl:1: no text under the key 'target' .*set data.target_field"),
        ('{"q": "a"}\n', {}, "pairs.jsonl:1: no text under the key 'text' .*set data.field"),
        ("a text", {"format": "text"}, "task: pairs reads .jsonl files"),
        ("12", {"format": "tokens", "token_type": "uint16"}, "a file of token ids has no pairs"),
        ('{"text": "", "target": ""}\n', {}, "the file is empty"),
    ],
)
def test_what_holds_no_pairs_is_one_line(content: str, data: dict[str, Any], message: str, tmp_path: Path) -> None:
    settings = pairs(tmp_path, [], **data)
    (tmp_path / "pairs.jsonl").write_text(content)
    with pytest.raises(TpcError, match=message):
        open_corpus(settings)


def test_an_encoder_decoder_trains_on_spans() -> None:
    losses = in_threads(SPANS, 2, 8)
    assert min(losses[4:]) < losses[0] - 0.1


@pytest.mark.nightly
def test_an_encoder_decoder_trains_alike_at_every_degree(tmp_path: Path) -> None:
    schedule = {"warmup": 1, "until": 6}
    alone = in_threads(SPANS, 1, 3, schedule=schedule)
    close(alone, in_threads(SPANS, 2, 3, schedule=schedule))
    for tensor, data in ((1, 2), (2, 2)):
        there = tmp_path / f"{tensor}-{data}"
        close(alone, in_processes(SPANS, tensor, data, there, steps=3, schedule=schedule))


@pytest.mark.nightly
def test_a_vocabulary_without_room_for_the_sentinels_is_refused(tmp_path: Path) -> None:
    command = train_command(SPANS, SPANS.spec(1), tmp_path)
    assert "a vocabulary of" in failing([*command, "--set", "vocab=261"], 1, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("start", [True, False])
def test_t5_of_hugging_face_trains_on_pairs(start: bool, tmp_path: Path) -> None:
    """With a start token in its configuration it shifts the labels itself; without, it takes what stands before."""
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=261, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4, dropout_rate=0.0, pad_token_id=PAD
    )
    if start:
        config.decoder_start_token_id = PAD
    config.architectures = ["T5ForConditionalGeneration"]
    config.save_pretrained(tmp_path / "t5")
    lines = [(f"question {i}", f"answer {i}") for i in range(64)]
    names = {} if start else {"target_ids": "decoder_input_ids"}
    settings = pairs(tmp_path, lines, target_sequence=12, names=names).data.model_dump(mode="json")
    run = Case(f"hf:{tmp_path / 't5'}", {"inputs": {"batch": 2, "sequence": 8}}, {**TRAIN, "data": settings})
    losses = in_threads(run, 2, 8)
    assert min(losses[4:]) < losses[0] - 0.1
    if not start:
        close(losses, in_threads(run, 1, 8))
