"""Tokenizers: bytes go round, files by path, faults in one line."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpcompiler.errors import TpcError
from tpcompiler.train.data.tokenizer import ByteTokenizer, Specials, load_tokenizer


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
