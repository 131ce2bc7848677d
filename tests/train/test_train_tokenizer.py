"""Tokenizers: bytes go round, files by path, faults in one line."""

from __future__ import annotations

import builtins
import json
from array import array
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpcompiler.cli.main import main
from tpcompiler.errors import TpcError
from tpcompiler.spec.schema import Spec
from tpcompiler.train.data.batches import open_corpus
from tpcompiler.train.data.packing import _GPT4, Packer, splits_at_words
from tpcompiler.train.data.tokenizer import ByteTokenizer, Specials, Tokenizer, load_tokenizer
from tpcompiler.train.settings import Train


@given(st.text())
def test_bytes_go_round(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert all(0 <= i < 256 for i in ids)
    assert tokenizer.decode([tokenizer.vocab - 1, *ids]) == text


def test_specials_of_bytes_are_distinct_and_end_the_vocabulary() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.specials == Specials(end=256, pad=257, cls=258, sep=259, mask=260)
    assert tokenizer.vocab == 261


@pytest.fixture
def wordpiece(tmp_path: Path) -> Path:
    backend = pytest.importorskip("tokenizers")
    vocab = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "the": 5, "sea": 6, "##s": 7}
    tokenizer = backend.Tokenizer(backend.models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = backend.pre_tokenizers.Whitespace()
    tokenizer.decoder = backend.decoders.WordPiece()
    tokenizer.post_processor = backend.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_a_tokenizer_file_gives_the_texts_tokens_and_no_others(wordpiece: Path) -> None:
    for path in (wordpiece, wordpiece / "tokenizer.json"):
        tokenizer = load_tokenizer(str(path))
        assert tokenizer.encode("the seas the sea") == [5, 6, 7, 5, 6]
        assert tokenizer.decode([5, 6, 7]) == "the seas"
        assert tokenizer.vocab == 8
        assert tokenizer.specials == Specials(end=3, pad=0, cls=2, sep=3, mask=4)


def test_the_config_beside_a_tokenizer_names_its_specials(wordpiece: Path) -> None:
    before = load_tokenizer(str(wordpiece)).digest
    config = {"eos_token": {"content": "sea"}, "pad_token": None}
    (wordpiece / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(wordpiece))
    assert tokenizer.specials.end == 6
    assert tokenizer.specials.pad == 0
    assert tokenizer.digest != before


def test_what_is_no_tokenizer_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    with pytest.raises(TpcError, match="no such file"):
        load_tokenizer(str(tmp_path / "none.json"))
    path = tmp_path / "tokenizer.json"
    path.write_text('{"model": 3}')
    with pytest.raises(TpcError, match=r"not a tokenizer\.json") as e:
        load_tokenizer(str(path))
    assert "\n" not in str(e.value)


def test_without_the_package_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(TpcError, match="pip install tokenizers"):
        load_tokenizer(str(tmp_path))


SPLITS = {
    "gpt2": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "gpt4": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": _GPT4}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    },
}


@pytest.fixture(scope="module", params=SPLITS)
def byte_pairs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    backend = pytest.importorskip("tokenizers")
    alphabet = sorted(backend.pre_tokenizers.ByteLevel.alphabet())
    merges = [
        ("Ġ", "t"),
        ("Ġt", "he"),
        ("h", "e"),
        ("Ċ", "Ċ"),
        ("!", "Ċ"),
        ("Ġ", "Ġ"),
        ("ĠĠ", "Ġ"),
        ("ĉ", "a"),
        ("a", "b"),
    ]
    vocab = {c: i for i, c in enumerate([*alphabet, *dict.fromkeys(a + b for a, b in merges)])}
    merges = [(a, b) for a, b in merges if a in vocab and b in vocab]
    file = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": len(vocab), "content": "<|endoftext|>", "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True}],
        "pre_tokenizer": SPLITS[request.param], "decoder": {"type": "ByteLevel", "add_prefix_space": False,
        "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocab,
                  "merges": [list(m) for m in merges]},
    }  # fmt: skip
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    path.write_text(json.dumps(file))
    return load_tokenizer(str(path))


TEXTS = st.lists(
    st.sampled_from(["the", "a", "ab", " ", " ", "  ", "\n", "\n\n", "\t", "\r\n", "!", "it's", "12", "é", "\u00a0",
                     "\u2028", "\x01", "\x02", "<|endoftext|>", "中", "x" * 60]) | st.text(max_size=3), max_size=30,
).map("".join)  # fmt: skip


@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
def test_packed_ids_are_the_tokenizers_whatever_stands_between_words(byte_pairs: Tokenizer, texts: list[str]) -> None:
    packer = Packer(byte_pairs)
    assert packer.by_words
    for text in [*texts, *texts]:  # the second time, words are known
        ids = byte_pairs.encode(text)
        assert list(array("H", packer(text))) == ids
        assert packer.largest >= max(ids, default=0)


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"added_tokens": [{"content": "  "}]},
        {"added_tokens": [{"content": "x", "lstrip": True}]},
        {"model": {"type": "Unigram"}},
    ],
)
def test_tokenizers_that_may_look_over_a_space_are_not_asked_word_by_word(change: dict[str, Any]) -> None:
    known = {"model": {"type": "BPE"}, "pre_tokenizer": SPLITS["gpt2"]}
    assert splits_at_words(json.dumps(known))
    assert not splits_at_words(json.dumps({**known, **change}))


def test_the_command_fills_the_cache_that_a_run_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("some text\n" * 50)
    command = ["tokenize", str(tmp_path), "--cache", str(tmp_path / "cache"), "--json"]
    for _ in range(2):
        assert main(command) == 0
        assert json.loads(capsys.readouterr().out)["texts"] == [
            {"text": str(tmp_path / "a.txt"), "tokens": 501, "parts": 1}
        ]
    (made,) = (tmp_path / "cache").rglob("*.bin")
    before = made.stat().st_mtime_ns
    train = Spec.load({"mesh": {"tensor": 1}, "train": {"sequence": 16, "data": {
        "path": str(tmp_path / "a.txt"), "cache": str(tmp_path / "cache")}}}).section(Train)  # fmt: skip
    assert len(open_corpus(train).train.samples) > 10
    assert [p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.bin")] == [before]
