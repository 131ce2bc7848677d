"""A run that is left alone: what does not fit is refused, what is asked to stop keeps its state, none hangs."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.train.test_train_checkpoint import snapshot
from tests.train.test_train_engine_runs import failing, newest, same
from tests.train.train_runs import CASES, Case, Processes, compile_once, in_processes, losses, train_command
from tpcompiler.errors import RankEnded, TpcError, WeightsError
from tpcompiler.execute.simulate import run_ranks
from tpcompiler.load.model import load_model
from tpcompiler.program import Parameter
from tpcompiler.runtime import Ranks
from tpcompiler.spec.schema import Spec
from tpcompiler.train.data.batches import open_corpus
from tpcompiler.train.hold.mapping import Renaming, map_names
from tpcompiler.train.hold.owned import from_constructor
from tpcompiler.train.optim.schedule import learning_rate
from tpcompiler.train.optim.spikes import Spikes
from tpcompiler.train.run.board import Board, connect
from tpcompiler.train.run.checkpoint import Writer, checkpoints, leave, name_of
from tpcompiler.train.run.launch import Place
from tpcompiler.train.run.stop import REASONS, StopRequest, parse_duration
from tpcompiler.train.run.together import Alarm, _tell, together
from tpcompiler.train.run.training_run import check_changes, check_shared, compare_ranks, locked
from tpcompiler.train.settings import Train
from tpcompiler.train.step.compiled import loss_output, training_inputs
from tpcompiler.train.step.engine import Engine
from tpcompiler.weights import open_source

GPT2 = CASES["gpt2"]
SHAPES = {"h.0.w": (4, 6), "h.1.w": (4, 6), "head": (5, 4)}
PARAMETERS = [Parameter(n, n, s, torch.float32) for n, s in SHAPES.items()]


def named(stored: dict[str, tuple[int, ...]], **renaming: Any) -> dict[str, str]:
    with open_source({n: torch.zeros(s) for n, s in stored.items()}) as source:
        return dict(map_names(source, PARAMETERS, Renaming(**renaming)).stored)


def test_weights_are_mapped_where_the_mapping_is_certain() -> None:
    prefixed = {f"transformer.{n}": s for n, s in SHAPES.items()}
    assert named(prefixed) == {n: f"transformer.{n}" for n in SHAPES}
    assert named(prefixed, strip="transformer.") == {n: f"transformer.{n}" for n in SHAPES}
    layers = {n.replace("h.", "layers."): s for n, s in SHAPES.items()}
    assert named(layers, rename=("layers.=h.",))["h.1.w"] == "layers.1.w"
    turned = {n: s[::-1] if n.startswith("h.") else s for n, s in SHAPES.items()}
    assert named(turned, transpose=("h.*",)) == {n: n for n in SHAPES}


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({**SHAPES, "head": (7, 4)}, r"head is \[7, 4\], the model's head is \[5, 4\]"),
        ({**SHAPES, "h.2.w": (4, 6)}, r"holds h\.2\.w, which the model does not have.* fewer layers"),
        ({n: s for n, s in SHAPES.items() if n != "h.1.w"}, r"no h\.1\.w"),
        ({**SHAPES, "h.0.w": (6, 4)}, "stored transposed"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_is_read(
    stored: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(WeightsError, match=message):
        named(stored)


def test_another_vocabulary_is_refused_by_train_resume_and_eval(tmp_path: Path) -> None:
    in_processes(GPT2, 1, 1, tmp_path, steps=2, schedule={"warmup": 1})
    run = tmp_path / "run"
    other = [*train_command(GPT2, GPT2.spec(1), tmp_path / "other"), "--set", "vocab=300", "-w", str(newest(tmp_path))]
    assert "[261, 16]" in failing(other, 1, tmp_path / "other")
    resumed = [*train_command(GPT2, GPT2.spec(1), tmp_path), "--set", "vocab=300", "--allow-changed", "*"]
    assert "[261, 16]" in failing(resumed, 1, tmp_path)
    (tmp_path / "text").write_text("a text of some words")
    evaluated = ["eval", GPT2.path, "-s", str(tmp_path / "spec.yaml"), "-w", str(run), "--device", "cpu"]
    evaluated += ["--perplexity", str(tmp_path / "text"), "--set", "vocab=300"]
    assert "[261, 16]" in failing(evaluated, 1, tmp_path)


MODEL = """
import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    def __init__(self, vocab=261, hidden=8):
        super().__init__()
        self.table = nn.Embedding(vocab, hidden)
        self.head = nn.Linear(hidden, vocab)

    def forward(self, input_ids, labels):
        logits = self.head(self.table(input_ids))
        {loss}


def example_inputs():
    return {{"input_ids": torch.zeros(2, 8, dtype=torch.int64), "labels": torch.zeros(2, 8, dtype=torch.int64)}}
"""
SHIFTS = "return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())"
PADS = "return F.cross_entropy(logits.flatten(0, 1), F.pad(labels, (0, 1), value=-100)[:, 1:].flatten())"
PLAIN = "return F.cross_entropy(logits.flatten(0, 1), labels.flatten())"
BREAKS = PLAIN + " / (1 - (input_ids == 7).float().amax())"  # infinite when a token 7 is in the batch


def case(here: Path, loss: str) -> Case:
    here.mkdir(parents=True, exist_ok=True)
    (here / "net.py").write_text(MODEL.format(loss=loss))
    return Case(str(here / "net.py"), {}, CASES["gpt2"].train)


@pytest.mark.parametrize(("loss", "labels"), [(SHIFTS, "next"), (PADS, "next"), (PLAIN, "same")])
def test_labels_that_would_be_shifted_twice_or_never_are_refused(loss: str, labels: str, tmp_path: Path) -> None:
    model = case(tmp_path, loss)
    once = {"steps": 1, "schedule": {"warmup": 0}}
    command = [*train_command(model, model.spec(1, **once), tmp_path), "--train", f"data.labels={labels}"]
    other = {"next": "same", "same": "next"}[labels]
    assert f"data.labels: {other} would work" in failing(command, 1, tmp_path)
    in_processes(model, 1, 1, tmp_path / "right", "--train", f"data.labels={other}", **once)


def test_a_resumed_run_says_what_changed_and_refuses_another_run(tmp_path: Path) -> None:
    schedule = {"warmup": 1, "until": 9}
    in_processes(GPT2, 1, 1, tmp_path, steps=2, schedule=schedule)
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["train.optimizer.lr"] == 1e-2
    command = train_command(GPT2, GPT2.spec(1, steps=4, schedule=schedule), tmp_path)
    said = failing([*command, "--train", "optimizer.lr=0.1"], 1, tmp_path)
    assert "train.optimizer.lr: the run began with 0.01, now it is 0.1" in said
    more = ["--train", "optimizer.lr=0.1", "--allow-changed", "train.optimizer.*"]
    in_processes(GPT2, 1, 1, tmp_path, *more, steps=4, schedule=schedule)
    assert "changed since the run began: train.optimizer.lr: 0.01 → 0.1" in (tmp_path / "output").read_text()
    assert len(losses(tmp_path / "run")) == 4


def test_free_settings_may_change_and_unknown_beginnings_are_not_compared() -> None:
    said: list[str] = []
    check_changes({"train.steps": 1, "mesh.tensor": 2}, {"train.steps": 2, "mesh.tensor": 1}, (), said.append)
    assert len(said) == 2
    check_changes({}, {"train.seed": 2}, (), said.append)
    with pytest.raises(TpcError, match=r"--allow-changed train\.seed"):
        check_changes({"train.seed": 1}, {"train.seed": 2}, (), said.append)


def test_more_steps_do_not_raise_the_learning_rate_again(tmp_path: Path) -> None:
    schedule = {"warmup": 1, "min_lr": 1e-4}
    in_processes(GPT2, 1, 1, tmp_path, steps=4, schedule=schedule)
    in_processes(GPT2, 1, 1, tmp_path, steps=6, schedule=schedule)
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    rates = [r["lr"] for r in records if "lr" in r]
    assert len(rates) == 6
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(1e-4)


def test_damaged_checkpoints_do_not_push_out_whole_ones(tmp_path: Path) -> None:
    kept = {"checkpoints": {"every": 1, "keep": 2}, "schedule": {"warmup": 2, "until": 8}}
    in_processes(GPT2, 1, 1, tmp_path, steps=4, **kept)
    folder = tmp_path / "run" / "checkpoints"
    file = folder / name_of(4) / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # the same size
    file.write_bytes(content)
    (folder / name_of(9)).mkdir()  # a damaged one of a step that the run has not reached
    in_processes(GPT2, 1, 1, tmp_path, steps=5, **kept)
    assert [p.name for p in checkpoints(folder)] == [name_of(5), name_of(4)]
    assert {p.name for p in folder.glob("damaged-*")} == {f"damaged-{name_of(n)}" for n in (4, 9)}


def in_ranks(body: Callable[[Place], None]) -> list[str]:
    """What goes wrong on each of two ranks, which are threads with a store."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    errors = ["", ""]

    def rank(r: int) -> None:
        try:
            body(Place(r, 2, r, torch.device("cpu"), Board(r, 2, store, 20).clone()))
        except TpcError as e:
            errors[r] = str(e)

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return errors


def test_ranks_that_run_different_things_are_named() -> None:
    assert in_ranks(lambda place: compare_ranks(place, {"train.seed": 1}, "source")) == ["", ""]
    errors = in_ranks(lambda place: compare_ranks(place, {"train.seed": place.rank}, "source"))
    assert errors == ["rank 1 does not run what rank 0 runs: train.seed is 1 there and 0 on rank 0"] * 2
    errors = in_ranks(lambda place: compare_ranks(place, {}, f"source {place.rank}"))
    assert all("the emitted program is" in e for e in errors)


def test_a_directory_that_is_not_shared_is_found_out_at_the_start(tmp_path: Path) -> None:
    for name in ("0", "1"):
        (tmp_path / name).mkdir()
    assert in_ranks(lambda place: check_shared(tmp_path, place)) == ["", ""]
    errors = in_ranks(lambda place: check_shared(tmp_path / str(place.rank), place))
    assert all("rank 1" in e and "not shared" in e for e in errors)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_what_an_earlier_start_has_posted_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    Board(0, 2, store).post("failed", "2 something")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert Board(0, 2, store).read("failed") is None


def stepping(ranks: Processes, here: Path, count: int) -> None:
    """Waits until a run has done some steps."""
    end = time.monotonic() + 120
    log = here / "run" / "log.jsonl"
    while not log.exists() or len(losses(here / "run")) < count:
        assert all(p.exitcode is None for p in ranks.ranks), ranks.said
        assert time.monotonic() < end
        time.sleep(0.02)


NIGHTLY = [pytest.param(*p, marks=pytest.mark.nightly) for p in ((signal.SIGINT, 130), (signal.SIGUSR1, 0))]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), *NIGHTLY])
def test_a_run_that_is_asked_to_stop_writes_a_checkpoint(number: int, code: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"schedule": {"warmup": 2, "until": 60}}
    command = train_command(GPT2, GPT2.spec(2, steps=100_000, **settings), tmp_path)
    ranks = Processes(command, 2, tmp_path / "output")
    stepping(ranks, tmp_path, 3)
    pid = ranks.ranks[1].pid  # one rank alone
    assert pid is not None
    os.kill(pid, number)
    assert ranks.wait(60) == [code, code], ranks.said
    done = len(losses(tmp_path / "run"))
    assert newest(tmp_path).name == name_of(done)
    settings["steps"] = done + 2
    in_processes(GPT2, 2, 1, tmp_path, **settings)
    in_processes(GPT2, 2, 1, tmp_path / "whole", **settings)
    same(newest(tmp_path), newest(tmp_path / "whole"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 0)])
def test_signals_are_heard_and_a_second_one_ends_at_once(number: signal.Signals, code: int) -> None:
    stop = StopRequest(Place(0, 1, 0, torch.device("cpu"), Board()))
    before = signal.getsignal(number)
    with stop.listening():
        assert stop.agreed() == 0
        signal.raise_signal(number)
        assert REASONS[stop.agreed()][1] == code
        if code:
            with pytest.raises(SystemExit, match=str(code)):
                signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_a_time_limit_writes_a_checkpoint_and_ends_well(tmp_path: Path) -> None:
    in_processes(GPT2, 1, 1, tmp_path, "--stop-after", "1s", steps=100_000)
    assert newest(tmp_path).name == name_of(len(losses(tmp_path / "run")))
    assert (parse_duration("3h50m"), parse_duration("90s"), parse_duration("1d"), parse_duration("7")) == (
        13800, 90, 86400, 7,
    )  # fmt: skip
    with pytest.raises(TpcError, match="not a duration"):
        parse_duration("soon")


@pytest.mark.parametrize(
    ("stopped", "tensor", "data"),
    [(1, 2, 1), *(pytest.param(*p, marks=pytest.mark.nightly) for p in ((0, 1, 2), (0, 2, 1), (1, 1, 2)))],
)
def test_a_rank_that_does_not_answer_is_named_within_the_timeout(
    stopped: int, tensor: int, data: int, tmp_path: Path
) -> None:
    command = [*train_command(GPT2, GPT2.spec(tensor, data, steps=100_000), tmp_path), "--timeout", "5"]
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun serves it
    ranks = Processes(command, 2, tmp_path / "output", port=store.port)
    stepping(ranks, tmp_path, 3)
    time.sleep(1.5)  # what a rank does is posted every half second
    pid = ranks.ranks[stopped].pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    ranks.ranks[1 - stopped].join(60)
    assert time.monotonic() - began < 25
    assert ranks.ranks[1 - stopped].exitcode == 2
    ranks.wait(0)
    assert f"rank {stopped} (host {os.uname().nodename}) has not answered" in ranks.said, ranks.said
    assert "step" in ranks.said.split("the last it did was")[1]


def test_a_bad_batch_is_skipped_or_left_behind(tmp_path: Path) -> None:
    text = "".join(chr(97 + i * 7 % 26) for i in range(640))
    (tmp_path / "text.txt").write_text(text[:300] + "\x07" + text[301:])
    model = case(tmp_path, BREAKS)
    settings: dict[str, Any] = {
        "steps": 8,
        "batch": 4,
        "micro_batch": 4,
        "checkpoints": {"every": 1},
        "precision": "fp32",
    }
    text_only = ["--data", str(tmp_path / "text.txt"), "--train", "data.held_out=0", "--train", "seed=3"]
    command = [*train_command(model, model.spec(1, **settings), tmp_path / "stop"), *text_only]
    assert "the run stops" in failing(command, 1, tmp_path / "stop")
    in_processes(model, 1, 1, tmp_path / "skip", *text_only, on_bad_batch="skip", **settings)
    assert "the weights were left as they are" in (tmp_path / "skip" / "output").read_text()
    with open_source(newest(tmp_path / "skip")) as weights:
        assert all(bool(weights.read(n).isfinite().all()) for n in weights.tensors)
    in_processes(model, 1, 1, tmp_path / "rewind", *text_only, on_bad_batch="rewind", **settings)
    assert "continues with the data behind that batch" in (tmp_path / "rewind" / "output").read_text()
    assert len(losses(tmp_path / "rewind" / "run")) == 8


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant", "inverse_sqrt", "stable"])
def test_schedules_rise_to_the_peak_and_never_rise_again(decay: str) -> None:
    schedule = {"decay": decay, "warmup": 5}
    train = Train.model_validate({"steps": 50, "optimizer": {"lr": 1e-2}, "schedule": schedule})
    rates = [learning_rate(train, step) for step in range(60)]
    assert max(rates) == pytest.approx(1e-2)
    assert rates[:5] == sorted(rates[:5])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    if decay == "stable":
        assert rates[39] == pytest.approx(1e-2)
        assert rates[50] == pytest.approx(1e-5)


def test_what_eval_cannot_measure_is_one_line(tmp_path: Path) -> None:
    in_processes(GPT2, 1, 1, tmp_path, steps=1, schedule={"warmup": 0})
    (tmp_path / "text").write_text("a text of some words")
    command = ["eval", GPT2.path, "-s", str(tmp_path / "spec.yaml"), "-w", str(tmp_path / "run"), "--device", "cpu"]
    command += ["--perplexity", str(tmp_path / "text")]
    assert "sequence 16 or less would work" in failing([*command, "-t", "sequence=32"], 1, tmp_path)
    assert "token id 260" in failing([*command, "--set", "vocab=200"], 1, tmp_path)
    file = newest(tmp_path) / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # the same size
    file.write_bytes(content)
    assert f"{file}: altered" in failing(command, 1, tmp_path)


def test_a_masked_model_has_no_perplexity(tmp_path: Path) -> None:
    bert = CASES["bert"]
    in_processes(bert, 1, 1, tmp_path, steps=1, schedule={"warmup": 0})
    (tmp_path / "text").write_text("a text of some words")
    command = ["eval", bert.path, "-s", str(tmp_path / "spec.yaml"), "-w", str(tmp_path / "run"), "--device", "cpu"]
    assert "no causal model" in failing([*command, "--perplexity", str(tmp_path / "text")], 1, tmp_path)


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_every_finally_is_run_on_all_ranks_when_one_fails(failing_rank: int, tmp_path: Path) -> None:
    """The other rank is at work, in no collective: it leaves its work all the same."""
    context: Any = multiprocessing.get_context("fork")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [context.Process(target=_works, args=(r, failing_rank, store.port, tmp_path)) for r in range(2)]
    for p in ranks:
        p.start()
    for p in ranks:
        p.join(30)
    assert [p.exitcode for p in ranks] == [2, 2]
    assert {p.name for p in tmp_path.iterdir()} == {"left-0", "left-1", "said"}
    assert (tmp_path / "said").read_text() == "0: this rank fails"


def _works(rank: int, failing_rank: int, port: int, here: Path) -> None:
    board = Board(rank, 2, connect("127.0.0.1", port), 20)
    try:
        with together(
            Place(rank, 2, rank, torch.device("cpu"), board),
            lambda line: (here / "said").write_text(f"{rank}: {line}") and None,
        ):
            (here / f"part-{rank}").write_text("")
            try:
                board.gather("started")
                if rank == failing_rank:
                    raise TpcError("this rank fails")
                while True:
                    time.sleep(0.01)
            finally:
                (here / f"part-{rank}").rename(here / f"left-{rank}")
    except RankEnded as e:
        os._exit(int(str(e.code)))


def test_a_rank_that_finds_nobody_left_says_so_and_reports_no_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its collective has failed, and whoever served the store is gone as well."""

    class Gone(Board):
        def read(self, key: str) -> str | None:
            raise dist.DistNetworkError("Failed to recv, got 0 bytes")

        def post_first(self, key: str, text: str) -> str:
            raise dist.DistNetworkError("Failed to recv, got 0 bytes")

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr("tpcompiler.train.run.together._GRACE", 0.0)
    said: list[str] = []
    for rank in (0, 1):
        alarm = Alarm(Gone(rank, 2, store), said.append)
        _tell(Place(rank, 2, rank, torch.device("cpu"), alarm.board), alarm, RuntimeError("gloo: reset by peer"))
        assert alarm.heard() == 2
    assert said == ["rank 0 lost the other ranks in starting: gloo: reset by peer"]


def test_a_checkpoint_that_not_all_ranks_wrote_to_one_place_is_not_announced(tmp_path: Path) -> None:
    """As on hosts without a shared file system."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    errors = []
    writers = [Writer(tmp_path / str(r), Board(r, 2, store, 20)) for r in range(2)]

    def write(rank: int) -> None:
        try:
            writers[rank].write(snapshot(1, rank))
        except WeightsError as e:
            errors.append(str(e))

    threads = [threading.Thread(target=write, args=(r,)) for r in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(errors) == 1 and "is not on this host" in errors[0]
    assert not checkpoints(tmp_path / "0")
    assert writers[0].done() == []


def test_a_parameter_that_differs_between_ranks_is_named_with_the_rank() -> None:
    spec = Spec.load(GPT2.spec(2))
    settings = spec.section(Train)
    loaded = load_model(GPT2.path, spec)
    inputs = training_inputs(loaded, open_corpus(settings).train.batch_at(0, 0).tensors)
    compiled = compile_once(loaded, spec, inputs, loss_output, double=True)

    def body(ranks: Ranks) -> str:
        engine = Engine(compiled, ranks, settings, spec.seed, torch.device("cpu"))
        engine.fill(from_constructor(lambda name: compiled.recorded.replay(name, spec.seed)))
        engine.compare_replicas(3)
        if ranks.coords["tensor"] == 1:  # one bit, as a broken memory would
            engine.storage.masters["ln_f.weight"].data.view(torch.int64)[3] ^= 1
        try:
            engine.compare_replicas(4)
        except TpcError as e:
            return str(e)
        return ""

    for said in run_ranks(compiled.sharded.program.mesh, body):
        assert said.startswith("step 4: ln_f.weight should be the same")
        assert "rank 1 of the group has another" in said


def test_a_failed_start_leaves_no_directory_and_no_lock(tmp_path: Path) -> None:
    with pytest.raises(TpcError, match="no good"), locked(tmp_path / "run"):
        raise TpcError("no good")
    assert not (tmp_path / "run").exists()
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "kept").write_text("")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["kept"]


def test_spikes_stand_out_from_the_last_steps_and_are_not_remembered() -> None:
    draw = random.Random(0)
    spikes = Spikes(6.0)
    assert not any(spikes.fault(2 + draw.gauss(0, 0.1), 1 + draw.gauss(0, 0.1)) for _ in range(150))
    assert "loss is 9, " in spikes.fault(9.0, 1.0)
    assert "gradient's norm is 5, " in spikes.fault(2.0, 5.0)
    assert spikes.fault(2.3, 1.2) == ""
    assert "norm is inf" in Spikes(None).fault(1.0, float("inf"))
    again = Spikes(6.0, json.loads(json.dumps(spikes.state())))
    assert "loss is 9, " in again.fault(9.0, 1.0)
    few = Spikes(2.0)
    assert [few.fault(x, 1.0) for x in (1.0, 50.0, 1.0)] == ["", "", ""]  # nothing to compare with yet


def test_going_back_two_checkpoints_leaves_the_newer_one_behind(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        threads = [
            threading.Thread(target=Writer(tmp_path, Board(r, 2, store, 20), keep=3).write, args=(snapshot(step, r),))
            for r in range(2)
        ]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    newest_, board = tmp_path / name_of(3), Board()
    assert leave(tmp_path, newest_, board, "a") == tmp_path / name_of(2)
    assert [p.name for p in checkpoints(tmp_path)] == [name_of(2), name_of(1)]
    assert (tmp_path / f"left-{name_of(3)}").is_dir()
    assert leave(tmp_path, tmp_path / name_of(1), board, "b") == tmp_path / name_of(1)  # the oldest stays
