"""The data: the same global batches at every degree and micro-batch, resumable, cached whole, faults in one line."""

from __future__ import annotations

import json
import os
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpcompiler.errors import TpcError
from tpcompiler.spec.schema import Spec
from tpcompiler.train.data import parts
from tpcompiler.train.data import tokens as tokens_module
from tpcompiler.train.data.batches import Batch, Batches, Corpus, open_corpus, split
from tpcompiler.train.data.packing import Packer
from tpcompiler.train.data.samples import BLOCK, Causal, Mixture
from tpcompiler.train.data.tokenizer import ByteTokenizer
from tpcompiler.train.data.tokens import TokenFile, Tokens
from tpcompiler.train.settings import Train


def settings_of(tmp_path: Path, **train: object) -> Train:
    data = {"cache": str(tmp_path / "cache"), **train.pop("data", {})}  # type: ignore[dict-item]
    spec = Spec.load({"mesh": {"tensor": 1}, "train": {"sequence": 16, "batch": 4, **train, "data": data}})
    return spec.section(Train)


def corpus(tmp_path: Path, text: str, **train: object) -> Corpus:
    path = tmp_path / "text.txt"
    path.write_text(text, "utf-8")
    data = {"path": str(path), **train.pop("data", {})}  # type: ignore[dict-item]
    return open_corpus(settings_of(tmp_path, **train, data=data))


class Numbers:
    """Samples that say their own number and key."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def sample(self, index: int, key: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([index, key >> 1])}


def whole_step(batches: Batches, step: int, degree: int) -> torch.Tensor:
    """The step's global batch, put together from all ranks' micro-batches by `first_sample`."""
    rows: dict[int, torch.Tensor] = {}
    weight = 0.0
    for rank in range(degree):
        for micro in range(batches.micro_batches(degree)):
            got = batches.batch_at(step, micro, rank, degree)
            assert 0 < got.rows <= batches.micro_batch
            weight += got.weight
            for i in range(got.rows):
                assert got.first_sample + i not in rows
                rows[got.first_sample + i] = got.tensors["input_ids"][i]
    assert sorted(rows) == list(range(batches.batch))
    assert weight == pytest.approx(1.0, abs=1e-12)
    return torch.stack([rows[i] for i in range(batches.batch)])


@given(
    n=st.integers(1, 50),
    batch=st.integers(1, 24),
    micro=st.integers(1, 24),
    degree=st.integers(1, 6),
    step=st.integers(0, 10),
)
@settings(max_examples=80)
def test_global_batch_is_the_same_at_every_degree_and_micro_batch(
    n: int, batch: int, micro: int, degree: int, step: int
) -> None:
    plain = whole_step(Batches(Numbers(n), batch, batch, seed=3), step, 1)
    dealt = Batches(Numbers(n), batch, micro, seed=3)
    try:
        dealt.micro_batches(degree)
    except TpcError as e:
        better = int(str(e).split("; batch ")[1].split()[0])
        assert whole_step(replace(dealt, batch=better), step, degree).shape[0] == better
    else:
        assert torch.equal(whole_step(dealt, step, degree), plain)


def test_an_epoch_sees_every_sample_once_and_the_next_in_another_order() -> None:
    n, batches = 35, Batches(Numbers(35), 5, 5, seed=1)
    epochs = [torch.cat([whole_step(batches, e * 7 + i, 1) for i in range(7)]) for e in range(2)]
    for rows in epochs:
        assert sorted(rows[:, 0].tolist()) == list(range(n))
    assert epochs[0][:, 0].tolist() != epochs[1][:, 0].tolist()
    keys = {tuple(row) for rows in epochs for row in rows.tolist()}
    assert len(keys) == 2 * n  # what is random in a sample differs between epochs


@given(
    sizes=st.lists(st.integers(1, 900), min_size=1, max_size=4),
    weights=st.data(),
    seed=st.integers(0, 3),
)
@settings(max_examples=20)
def test_a_mixture_holds_its_shares_and_sees_each_corpus_in_epochs(
    sizes: list[int], weights: st.DataObject, seed: int
) -> None:
    shares = weights.draw(st.lists(st.floats(0.01, 5), min_size=len(sizes), max_size=len(sizes)))
    mixture = Mixture(tuple(Numbers(n) for n in sizes), tuple(shares))
    places = [mixture.place(p, seed) for p in range(3 * BLOCK)]
    for which, n in enumerate(sizes):
        seen = [o for w, o in places if w == which]
        assert sorted(seen) == list(range(len(seen)))  # each of a corpus' samples in turn, none twice
        for block in range(3):
            count = sum(w == which for w, _ in places[block * BLOCK : (block + 1) * BLOCK])
            assert abs(count - BLOCK * shares[which] / sum(shares)) < 1
        assert n == len(mixture.parts[which])


def test_a_mixture_is_read_from_files_and_evaluated_on_the_ends_of_all(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 900)
    shares = {str(tmp_path / "a.txt"): 3.0, str(tmp_path / "b.txt"): 1.0}
    data = open_corpus(settings_of(tmp_path, batch=100, micro_batch=100, data={"mix": shares, "held_out": 0.1}))
    first = torch.cat([data.train.batch_at(step, 0).tensors["input_ids"][:, 0] for step in range(10)])
    assert (int((first == ord("a")).sum()), int((first == ord("b")).sum())) == (750, 250)
    assert data.validation is not None
    held = data.validation.samples
    assert {int(held.sample(i, 0)["input_ids"][0]) for i in range(len(held))} == {ord("a"), ord("b")}


def test_seeds_give_different_orders() -> None:
    first, second = (whole_step(Batches(Numbers(1000), 50, 50, seed=s), 0, 1) for s in (1, 2))
    assert first[:, 0].tolist() != second[:, 0].tolist()


def test_resumption_is_exact_also_at_another_batch_size() -> None:
    batches = Batches(Numbers(37), 6, 2, seed=9)
    stream = torch.cat([whole_step(batches, s, 1) for s in range(14)])
    at = batches.position(4)
    assert at == 24
    again = Batches(Numbers(37), 6, 2, seed=9)
    assert torch.equal(whole_step(again, 4, 1), stream[at : at + 6])
    wider = Batches(Numbers(37), 10, 5, seed=9, first_step=4, first_position=at)
    assert torch.equal(torch.cat([whole_step(wider, s, 2) for s in (4, 5)]), stream[at : at + 20])
    assert wider.position(6) == at + 20


def test_fingerprints_tell_batches_apart() -> None:
    batches = Batches(Numbers(1000), 8, 4, seed=1)
    a, b = batches.batch_at(0, 0), batches.batch_at(0, 0)
    assert a.fingerprint() == b.fingerprint()
    changed = a.tensors["input_ids"].clone()
    changed[1, 0] += 1
    others = [
        batches.batch_at(0, 1),
        batches.batch_at(1, 0),
        Batch({"input_ids": changed}, a.first_sample, a.weight),
        Batch({"input_ids": a.tensors["input_ids"].flip(0)}, a.first_sample, a.weight),
        Batch({"labels": a.tensors["input_ids"]}, a.first_sample, a.weight),
        Batch(a.tensors, a.first_sample + 1, a.weight),
    ]
    assert len({a.fingerprint(), *(o.fingerprint() for o in others)}) == 1 + len(others)


def test_causal_samples_tile_the_text_and_labels_are_the_next_tokens(tmp_path: Path) -> None:
    text = "".join(chr(97 + i % 26) for i in range(1000))
    data = corpus(tmp_path, text, data={"held_out": 0.0}, evaluation={"every": 0})
    stream = [*text.encode(), 256]
    samples = data.train.samples
    assert len(samples) == 1000 // 16
    for i in range(len(samples)):
        got = samples.sample(i, 0)
        assert got["input_ids"].tolist() == stream[i * 16 : i * 16 + 16]
        assert got["labels"].tolist() == stream[i * 16 + 1 : i * 16 + 17]


def test_labels_of_models_that_shift_inside_are_the_inputs(tmp_path: Path) -> None:
    data = corpus(tmp_path, "x" * 999, data={"labels": "same", "names": {"labels": "targets"}})
    got = data.train.batch_at(0, 0).tensors
    assert set(got) == {"input_ids", "targets"}
    assert torch.equal(got["input_ids"], got["targets"])


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), data=st.data())
@settings(max_examples=40)
def test_token_files_read_as_one_stream(
    sizes: list[int], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("tokens")
    stream, files = [], []
    for i, n in enumerate(sizes):
        ids = [100 * i + k for k in range(n)]
        kind = "uint16" if i % 2 else "uint32"
        with (folder / f"{i}.bin").open("wb") as f:
            array("H" if i % 2 else "I", ids).tofile(f)
        files.append(TokenFile(folder / f"{i}.bin", kind, n, ids[-1]))
        stream += ids
    tokens = Tokens(tuple(files))
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream)))
    assert tokens.read(start, stop).tolist() == stream[start:stop]
    assert tokens.read(start, stop).dtype == torch.int64
    assert len(tokens) == len(stream)


def test_large_ids_survive_uint32(tmp_path: Path) -> None:
    ids = [0, 70000, 2**32 - 1, 5, 6]
    with (tmp_path / "t.bin").open("wb") as f:
        array("I", ids).tofile(f)
    (tmp_path / "t.bin.json").write_text(json.dumps({"dtype": "uint32"}))
    train = settings_of(tmp_path, sequence=2, data={"path": str(tmp_path / "t.bin")})
    data = open_corpus(train)
    assert data.largest_id == 2**32 - 1
    assert data.train.samples.sample(0, 0)["input_ids"].tolist() == ids[:2]
    with pytest.raises(TpcError, match=r"token id 4294967295.*vocabulary is 50257"):
        data.fits(vocabulary=50257)


def test_text_is_tokenised_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    pack = parts.pack_part

    def counted(part: parts.TextPart, packer: Packer) -> parts.Packed:
        nonlocal calls
        calls += 1
        return pack(part, packer)

    monkeypatch.setattr(parts, "pack_part", counted)
    corpus(tmp_path, "a" * 999)
    assert calls == 1
    state = (tmp_path / "text.txt").stat()
    (tmp_path / "moved.txt").write_text("a" * 999)
    os.utime(tmp_path / "moved.txt", ns=(state.st_atime_ns, state.st_mtime_ns))  # found again by size, time and samples
    moved = open_corpus(settings_of(tmp_path, data={"path": str(tmp_path / "moved.txt")}))
    assert moved.train.samples.sample(0, 0)["input_ids"].tolist() == [97] * 16
    assert calls == 1
    assert corpus(tmp_path, "b" * 999).train.samples.sample(0, 0)["input_ids"].tolist() == [98] * 16
    assert calls == 2


def test_a_failed_tokenisation_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TpcError, match=r"cannot write: no space left on device"):
        corpus(tmp_path, "a" * 999)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_long_text_is_cut_without_losing_a_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PIECE", 50)
    monkeypatch.setattr(parts, "PART", 300)
    text = "".join(f"line {i}\r\n  indented {i}\n\n" for i in range(40)) + "no break at the end é"
    path = tmp_path / "t.txt"
    path.write_text(text, "utf-8", newline="")
    cut = list(parts.cut(path, "text", ("text",), tmp_path))
    assert len(cut) > 2
    got = [piece for part in cut for piece in parts.pieces(part)]
    assert "".join(piece for piece, _ in got) == text
    assert [ends for _, ends in got] == [False] * (len(got) - 1) + [True]
    assert len(got) > 10
    assert not any(piece[0].isspace() for piece, _ in got)


def test_what_was_tokenised_before_a_crash_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART", 200)
    monkeypatch.setattr(parts, "_ALONE", 0)
    path, folder, tokenizer = tmp_path / "t.txt", tmp_path / "ids", ByteTokenizer()
    folder.mkdir()
    path.write_text("".join(f"line {i}\n" for i in range(100)))
    (folder / ".part-00001.bin.dead.tmp").write_bytes(b"half")  # of a killed writer
    whole = parts.tokenise(path, "text", ("text",), tokenizer, folder, workers=2)  # processes
    assert len(whole) > 3
    assert not list(folder.glob(".*"))
    os.truncate(folder / whole[1].name, 10)
    made: list[str] = []

    def noted(part: parts.TextPart, packer: Packer) -> parts.Packed:
        made.append(part.out)
        return parts.pack(parts.pieces(part), packer, Path(part.out), part.stop - part.start)

    monkeypatch.setattr(parts, "pack_part", noted)
    assert parts.tokenise(path, "text", ("text",), tokenizer, folder, workers=1) == whole
    assert [Path(m).name for m in made] == [whole[1].name]
    ids = b"".join((folder / p.name).read_bytes() for p in whole)
    assert list(array("H", ids)) == [*path.read_bytes(), 256]


def test_documents_of_jsonl_end_with_the_end_token(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"body": "ab", "n": 1}\n\n{"body": "é"}\n', "utf-8")
    train = settings_of(
        tmp_path, sequence=2, evaluation={"every": 0}, data={"path": str(path), "field": "body", "held_out": 0.0}
    )
    samples = open_corpus(train).train.samples
    assert isinstance(samples, Causal)
    assert samples.tokens.read(0, len(samples.tokens)).tolist() == [97, 98, 256, *"é".encode(), 256]


def test_directories_and_globs_are_read_in_order_of_names(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for name in "bac":
        (folder / f"{name}.txt").write_text(name * 40)
    (folder / "other.pdf").write_text("z")
    for path in (str(folder), str(folder / "*.txt")):
        data = open_corpus(settings_of(tmp_path, data={"path": path}))
        first = data.train.samples.sample(0, 0)["input_ids"]
        assert first[0] == ord("a")
        assert data.largest_id == 256


def test_the_builtin_text_is_english_and_has_enough_for_a_demo(tmp_path: Path) -> None:
    data = open_corpus(settings_of(tmp_path, sequence=128))
    assert len(data.train.samples) > 2000
    assert data.validation is not None
    texts = [data.tokenizer.decode(data.train.samples.sample(i, 0)["input_ids"].tolist()) for i in range(100)]
    assert sum(text.count(" the ") for text in texts) > 50


def test_held_out_samples_are_not_trained_on() -> None:
    for n in (2, 3, 10, 1000):
        train, held = split(Numbers(n), 0.05)
        assert held is not None
        seen = [train.sample(i, 0)["input_ids"][0].item() for i in range(len(train))]
        kept = [held.sample(i, 0)["input_ids"][0].item() for i in range(len(held))]
        assert seen + kept == list(range(n))
        assert len(kept) == max(1, round(n * 0.05))
    assert split(Numbers(1), 0.5)[1] is None
    assert split(Numbers(9), 0.0)[1] is None


def test_evaluation_reads_in_order_and_always_the_same(tmp_path: Path) -> None:
    other = tmp_path / "v.txt"
    other.write_text("".join(chr(65 + i % 26) for i in range(300)))
    data = corpus(tmp_path, "x" * 900, data={"validation": str(other)})
    assert data.validation is not None
    assert len(data.train.samples) == 900 // 16
    ids = data.validation.batch_at(0, 0).tensors["input_ids"].flatten().tolist()
    assert ids == list(other.read_bytes()[:64])


@pytest.mark.parametrize(
    ("files", "train", "message"),
    [
        ({}, {"data": {"path": "nothing.txt"}}, r"data nothing\.txt: no such file"),
        ({"a.txt": b""}, {"data": {"path": "a.txt"}}, r"a\.txt: the file is empty"),
        ({"a.jsonl": b"\n"}, {"data": {"path": "a.jsonl"}}, r"a\.jsonl: the file is empty"),
        ({"a.txt": b"short"}, {"data": {"path": "a.txt"}}, r"6 tokens are less than one sample of 16"),
        (
            {"a.txt": b"x" * 20},
            {"data": {"path": "a.txt"}},
            r"1 sample of 16 tokens cannot be trained and evaluated on",
        ),
        ({"a.txt": b"ok\nbad \xff\n"}, {"data": {"path": "a.txt"}}, r"a\.txt:\d+: not UTF-8 \(byte 0xff\)"),
        ({"a.jsonl": b'{"text": 1}\n'}, {"data": {"path": "a.jsonl"}}, r"a\.jsonl:1: no text under the key 'text'"),
        ({"a.jsonl": b'{"text": "a"}\n{"te'}, {"data": {"path": "a.jsonl"}}, r"a\.jsonl:2: not JSON"),
        ({"a.jsonl": b"[" * 99999 + b"\n"}, {"data": {"path": "a.jsonl"}}, r"a\.jsonl:1: cannot be read as JSON"),
        ({"a.jsonl": b"9" * 5000 + b"\n"}, {"data": {"path": "a.jsonl"}}, r"a\.jsonl:1: cannot be read as JSON"),
        ({"a.bin": b"1234"}, {"data": {"path": "a.bin"}}, r"a\.bin: is it uint16 or uint32\?"),
        ({"a.bin": b""}, {"data": {"path": "a.bin", "token_type": "uint16"}}, r"a\.bin: the file is empty"),
        ({"a.bin": b"123"}, {"data": {"path": "a.bin", "token_type": "uint16"}}, r"3 bytes are not a whole number"),
        ({"a.bin": b"12", "a.bin.json": b'{"dtype": "float"}'}, {"data": {"path": "a.bin"}}, r"dtype is 'float'"),
        ({}, {"tokenizer": "missing.json"}, r"tokenizer missing\.json: no such file"),
    ],
)
def test_bad_data_is_one_line(
    files: dict[str, bytes],
    train: dict[str, object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TpcError, match=message) as e:
        open_corpus(settings_of(tmp_path, **train))
    assert "\n" not in str(e.value)


def test_a_sequence_longer_than_the_positions_is_an_error(tmp_path: Path) -> None:
    data = corpus(tmp_path, "x" * 900)
    data.fits(vocabulary=257, positions=16)
    with pytest.raises(TpcError, match=r"train\.sequence: 16 is longer than the model's 8 positions"):
        data.fits(positions=8)
    with pytest.raises(TpcError, match="vocab 257 or more would work"):
        data.fits(vocabulary=256)


def test_a_token_file_is_scanned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "t.bin").open("wb") as f:
        array("H", range(100)).tofile(f)
    train = settings_of(tmp_path, data={"path": str(tmp_path / "t.bin"), "token_type": "uint16"})
    assert open_corpus(train).largest_id == 99
    monkeypatch.setattr(tokens_module, "_SCAN", None)  # a second scan would fail
    assert open_corpus(train).largest_id == 99


def test_masked_batches_need_room_for_marks_and_random_words(tmp_path: Path) -> None:
    data = corpus(tmp_path, "x" * 900, data={"task": "mlm"})
    data.fits(vocabulary=261)
    with pytest.raises(TpcError, match="token id 260, but the model's vocabulary is 260"):
        data.fits(vocabulary=260)


def test_an_epoch_has_whole_steps() -> None:
    assert Batches(Numbers(35), 8, 4).epoch_steps == 4
    assert Batches(Numbers(3), 8, 4).epoch_steps == 1


def test_many_readers_may_tokenise_at_once(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("some words and more\n" * 500)
    train = settings_of(tmp_path, data={"path": str(path)})
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: open_corpus(train).train.batch_at(0, 0).fingerprint(), range(8)))
    assert len(set(found)) == 1
    assert sorted(p.suffix for p in (tmp_path / "cache").rglob("*") if p.is_file()) == [".bin", ".json"]


def test_a_cut_cache_is_made_again(tmp_path: Path) -> None:
    before = corpus(tmp_path, "abc" * 300).train.batch_at(0, 0).fingerprint()
    (cached,) = (tmp_path / "cache").rglob("*.bin")
    os.truncate(cached, 100)
    assert corpus(tmp_path, "abc" * 300).train.batch_at(0, 0).fingerprint() == before
