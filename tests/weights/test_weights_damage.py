"""What can go wrong with weights on a disk: damage is refused by name, and a failure leaves what was there before."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tpcompiler import weights
from tpcompiler.errors import WeightsError
from tpcompiler.layout import Factor
from tpcompiler.program import Parameter
from tpcompiler.runtime.mesh import Mesh
from tpcompiler.runtime.stored import Reader, seal
from tpcompiler.weights import Weights, tensor_files
from tpcompiler.weights.match import match

TWO = Mesh.of({"t": 2})
SHAPES = {"split": (6, 4), "whole": (5,)}
DIMS = {"split": (Factor(6, "h", ("t",)), Factor(4)), "whole": (Factor(5),), "freq": (Factor(3),)}
PARAMETERS = [
    *(Parameter(n, n, shape, torch.float32) for n, shape in SHAPES.items()),
    Parameter("freq", "freq", (3,), torch.float32, buffer=True, persistent=False, value=torch.ones(3)),
]


def write(directory: Path, fill: float, progress: Callable[[int, int], None] | None = None) -> None:
    tensors = {n: torch.full(shape, fill) for n, shape in SHAPES.items()} | {"extra": torch.full((2,), fill)}
    weights.shard(tensors, PARAMETERS, DIMS, TWO, directory, progress=progress)


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    with TemporaryDirectory() as name:
        yield Path(name)


def says(error: pytest.ExceptionInfo[WeightsError], *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text


# --- damage ---


@given(st.data())
@settings(max_examples=60)
def test_any_damaged_file_is_refused_by_name_and_nothing_is_written(scratch: Path, data: st.DataObject) -> None:
    here = scratch / "damaged"
    shutil.rmtree(here, ignore_errors=True)
    write(here / "d", 1.0)
    victim = data.draw(st.sampled_from(sorted((here / "d").iterdir())))
    raw = bytearray(victim.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    match data.draw(st.sampled_from(["flip", "truncate", "append", "delete"])):
        case "flip":
            raw[at] ^= 1
            victim.write_bytes(raw)
        case "truncate":
            victim.write_bytes(raw[:at])
        case "append":
            victim.write_bytes(raw + b"x")
        case "delete":
            victim.unlink()
    works: list[Callable[[], object]] = [
        lambda: weights.verify(here / "d"),
        lambda: weights.merge(here / "d", here / "m.safetensors"),
        lambda: weights.merge(here / "d", here / "m"),
        lambda: weights.reshard(here / "d", DIMS, TWO, here / "r", spec={}),
    ]
    for work in works:
        with pytest.raises(WeightsError) as error:
            work()
        says(error, victim.name)
    assert [p.name for p in here.iterdir()] == ["d"]


@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-1])])
def test_reading_without_digests_still_refuses_missing_and_truncated_files(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    write(tmp_path / "d", 1.0)
    damage(tmp_path / "d/rank-00001.safetensors")
    with Weights(tmp_path / "d") as source, pytest.raises(WeightsError) as error:
        source.read("split")
    says(error, "rank-00001.safetensors")


def test_copies_that_differ_are_refused_though_every_digest_is_right(tmp_path: Path) -> None:
    write(tmp_path / "d", 1.0)
    victim = tmp_path / "d/rank-00001.safetensors"
    tensors = load_file(victim)
    tensors["whole"] = tensors["whole"] + 1
    victim.unlink()
    info = weights.write_file(victim, tensors)
    manifest = weights.load_manifest(tmp_path / "d")
    (tmp_path / "d/manifest.json").unlink()
    kept = [f for f in manifest.files if f.name != info.name]
    weights.save_manifest(manifest.with_files([*kept, info]), tmp_path / "d")
    weights.verify(tmp_path / "d")
    for out in ("m", "m.safetensors"):
        with pytest.raises(WeightsError) as error:
            weights.merge(tmp_path / "d", tmp_path / out)
        says(error, "whole: rank-00000.safetensors and rank-00001.safetensors hold different copies")


def read_or_refuse(path: Path) -> tuple[Reader | None, str]:
    try:
        return Reader(path), ""
    except WeightsError as e:
        return None, str(e)


@pytest.mark.parametrize(
    ("offsets", "size", "word"),
    [
        ([[0, 4], [4, 8]], 7, "truncated"),
        ([[0, 4], [4, 8]], 9, "altered"),
        ([[0, 4], [8, 12]], 12, "'b' begins at byte"),  # a hole
        ([[0, 4], [0, 4]], 4, "'b' begins at byte"),  # one over the other
        ([[0, 4], [4, 12]], 12, "b F32 [1] has 8 bytes"),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(
    tmp_path: Path, offsets: list[list[int]], size: int, word: str
) -> None:
    header = {n: {"dtype": "F32", "shape": [1], "data_offsets": o} for n, o in zip("ab", offsets, strict=True)}
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    with pytest.raises(WeightsError) as error, weights.open_source(path):
        pass
    says(error, "x.safetensors", word)


@given(st.data())
@settings(max_examples=200)
def test_a_corrupt_safetensors_file_is_one_line(scratch: Path, data: st.DataObject) -> None:
    """Read or refused, in one line, and never read in another way than the safetensors library does."""
    path = scratch / "corrupt.safetensors"
    save_file({"a": torch.ones(3), "b": torch.zeros(2, 2, dtype=torch.int64)}, path)
    raw = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, header - 1))] = data.draw(st.sampled_from(list(b'0123456789[]{},:"\n\x00\xff FI')))
    path.write_bytes(raw)
    reader, refusal = read_or_refuse(path)
    if reader is None:
        assert "\n" not in refusal
        assert path.name in refusal
        return
    found = {name: reader.read(name) for name in reader.tensors}
    reader.close()
    expected = load_file(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n].view(torch.uint8), expected[n].view(torch.uint8)) for n in found)


def test_what_is_no_source_of_weights_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("a", "b"):
        save_file({name: torch.ones(1)}, tmp_path / f"two/{name}.safetensors")
    (tmp_path / "x.txt").write_text("no")
    (tmp_path / "x.safetensors").write_text("no")
    (tmp_path / "x.bin").write_text("no")
    torch.save({"model": object()}, tmp_path / "object.pt")
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    (tmp_path / "part.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    (tmp_path / "odd.index.json").write_text("[1]")
    for name in ("absent", "empty", "two", "x.txt", "x.safetensors", "x.bin", "object.pt", "list.pt", "odd.index.json"):
        with pytest.raises(WeightsError) as error, weights.open_source(tmp_path / name):
            pass
        says(error, name)
    with pytest.raises(WeightsError) as error, weights.open_source(tmp_path / "part.index.json"):
        pass
    says(error, "gone.safetensors", "missing")
    with pytest.raises(WeightsError) as error:
        weights.merge(tmp_path / "two", tmp_path / "out")
    says(error, "no manifest.json here")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"version": 2}, "format version 2"),
        ({"format": "other"}, "not a manifest of tpcompiler"),
        ({"unknown": 1}, "unknown"),
        ({"mesh": [["t", 3]]}, "dims.0"),
        ({"mesh": [["u", 2]]}, "split over t"),
    ],
)
def test_a_manifest_that_is_none_of_ours_is_refused(tmp_path: Path, change: dict[str, object], word: str) -> None:
    """Also when its own digest is right."""
    write(tmp_path / "d", 1.0)
    path = tmp_path / "d/manifest.json"
    data = json.loads(path.read_text()) | change
    del data["sha256"]
    text = json.dumps(data)[:-1].encode() + b","
    path.write_bytes(text + seal(text).encode())
    with pytest.raises(WeightsError) as error:
        weights.load_manifest(tmp_path / "d")
    says(error, "manifest.json", word)


# --- failures ---


@contextmanager
def file_size_limit(n: int) -> Iterator[None]:
    """Files cannot grow past n bytes: a write fails as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("before", [False, True])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path: Path, before: bool) -> None:
    write(tmp_path / "whole", 2.0)
    largest = max(p.stat().st_size for p in (tmp_path / "whole").iterdir())
    if before:
        write(tmp_path / "d", 1.0)
    there = sorted(p.name for p in tmp_path.iterdir())
    old = contents(tmp_path / "d") if before else None
    for limit in (0, 100, 300, largest - 1):
        works: list[Callable[[], object]] = [
            lambda: write(tmp_path / "d", 2.0),
            lambda: weights.reshard(tmp_path / "whole", DIMS, TWO, tmp_path / "d", spec={}),
            lambda: weights.merge(tmp_path / "whole", tmp_path / "m.safetensors"),
        ]
        for work in works[: 2 if limit > 300 else 3]:  # only the manifest is longer than that
            with pytest.raises(WeightsError) as error, file_size_limit(limit):
                work()
            says(error, "file too large", "cannot write")
            assert sorted(p.name for p in tmp_path.iterdir()) == there
            assert not before or contents(tmp_path / "d") == old


def test_a_killed_writer_leaves_the_old_output_whole_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    here = tmp_path / "d"
    write(here, 1.0)
    old = contents(here)
    calls: list[int] = []
    write(tmp_path / "count", 2.0, lambda done, _: calls.append(done))
    context = multiprocessing.get_context("fork")
    for k in range(len(calls)):

        def die(done: int, _: int, when: int = calls[k]) -> None:
            if done >= when:
                os.kill(os.getpid(), signal.SIGKILL)

        process = context.Process(target=write, args=(here, 2.0, die))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert contents(here) == old
        assert len(list(tmp_path.glob(".d.tmp-*"))) == 1  # the one before it was swept
    write(here, 2.0)
    assert contents(here) == contents(tmp_path / "count")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["count", "d"]


def test_a_killed_merge_leaves_the_old_file_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    write(tmp_path / "d", 1.0)
    out = tmp_path / "m.safetensors"
    out.write_bytes(b"old")

    def die(done: int, _: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(
        target=weights.merge, args=(tmp_path / "d", out), kwargs={"progress": die}
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert out.read_bytes() == b"old"
    weights.merge(tmp_path / "d", out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "m.safetensors"]
    assert set(load_file(out)) == {*SHAPES, "extra"}


def test_a_writer_that_lives_is_not_swept(tmp_path: Path) -> None:
    with weights.output(tmp_path / "d") as first:
        (first / "manifest.json").write_text("{}")
        write(tmp_path / "d", 1.0)
        assert first.is_dir()
    assert contents(tmp_path / "d") == {"manifest.json": b"{}"}


def test_a_directory_of_other_files_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/thesis.txt").write_text("years")
    (tmp_path / "file").write_text("a")
    works: dict[str, Callable[[], object]] = {
        "d: holds other files": lambda: write(tmp_path / "d", 1.0),
        "file: a file of that name": lambda: write(tmp_path / "file", 1.0),
    }
    for message, work in works.items():
        with pytest.raises(WeightsError) as error:
            work()
        says(error, message)
    assert contents(tmp_path / "d") == {"thesis.txt": b"years"}


def test_other_files_in_an_earlier_output_stay(tmp_path: Path) -> None:
    write(tmp_path / "d", 1.0)
    (tmp_path / "d/notes.txt").write_text("mine")
    (tmp_path / "d/sub").mkdir()
    (tmp_path / "d/sub/x").write_text("too")
    (tmp_path / "link").symlink_to(tmp_path / "d")
    weights.shard(None, PARAMETERS, DIMS, TWO, tmp_path / "link")
    names = sorted(p.name for p in (tmp_path / "d").iterdir())
    assert names == ["buffers.safetensors", "manifest.json", "notes.txt", "sub"]  # no rank's old weights among them
    assert (tmp_path / "d/sub/x").read_text() == "too"
    assert (tmp_path / "link").is_symlink()


def test_without_an_atomic_exchange_the_result_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpcompiler.weights.atomic._exchange", lambda a, b: False)
    write(tmp_path / "d", 1.0)
    write(tmp_path / "d", 2.0)
    write(tmp_path / "e", 2.0)
    assert contents(tmp_path / "d") == contents(tmp_path / "e")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "e"]


def test_merging_again_replaces_the_merged_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "d", 1.0)
    parts = weights.merge(tmp_path / "d", tmp_path / "hf", max_file=60)
    assert [p.name for p in parts][-1] == "model.safetensors.index.json"
    assert weights.merge(tmp_path / "d", tmp_path / "hf") == (tmp_path / "hf/model.safetensors",)
    assert [p.name for p in (tmp_path / "hf").iterdir()] == ["model.safetensors"]
    (tmp_path / "hf/config.json").write_text("{}")
    with pytest.raises(WeightsError) as error:
        weights.merge(tmp_path / "d", tmp_path / "hf")
    says(error, "holds other files")


def test_a_buffer_without_values_is_refused() -> None:
    buffer = Parameter("freq", "freq", (3,), torch.float32, buffer=True)
    with pytest.raises(WeightsError, match="buffer freq has no values"):
        match(None, [buffer], weights.entries_of([buffer], {"freq": (Factor(3),)}, TWO), TWO)


def test_digest_is_what_the_writer_said(tmp_path: Path) -> None:
    info = weights.write_text(tmp_path / "state.json", "{}\n")
    assert tensor_files.digest(tmp_path / "state.json") == info
