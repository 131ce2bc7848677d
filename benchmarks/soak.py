"""A run that is disturbed again and again, and must end as one that was left alone.

2 tensor × 2 data ranks on this host. Every so many seconds there is a fault, and after it a new start: a rank is
killed, stopped or asked to end; a step's loss is made infinite on one rank; the disk is filled; a file of a checkpoint
is truncated or altered; a setting is changed. The data holds bad batches of its own besides, which both runs leave out.
In the end weights, optimizer state, averages and losses are compared bit for bit with those of an undisturbed run.

    python -m benchmarks.soak --minutes 120 -o out/soak --disk /mnt/small

`--disk` is a directory on a small file system of its own, such as a tmpfs of 64 MB: the run lives there, and the fault
"full disk" fills it up. Without it, a limit on the size of files takes its place.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.train.train_runs import DROPPING, ROOT, Case, Processes, losses, train_command
from tpcompiler.train.run.checkpoint import State, checkpoints
from tpcompiler.train.step.engine import Engine
from tpcompiler.weights import Weights

TENSOR, DATA = 2, 2
WORLD = TENSOR * DATA
EVERY = 5  # steps between checkpoints
ALL_ENDED = 3.0  # time-outs after a fault
BAD = ord("%")  # a token that makes a batch's loss infinite; the built-in text has one in about 10,000
SETTINGS: dict[str, Any] = {
    "checkpoints": {"every": EVERY, "keep": 3},
    "schedule": {"warmup": 5, "until": 1_000_000},
    "optimizer": {"lr": 1e-3, "average": 0.9},
    "on_bad_batch": "skip",
}
MODEL = """

class Breaking(GPT2):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        out = super().forward(input_ids, labels)
        return out if labels is None else out / (1 - (input_ids == {bad}).to(out.dtype).amax())


Model = Breaking
"""


def slow(pause: float, broken: int | None, rank: int) -> None:
    """On a rank: every step begins with a pause; the loss of step `broken` is infinite on rank 1."""
    step, loss = Engine.step, Engine._loss
    at = 0

    def paused(engine: Engine, number: int, batches: Any) -> Any:
        nonlocal at
        at = number
        time.sleep(pause)
        return step(engine, number, batches)

    def infinite(engine: Engine, inputs: Any) -> torch.Tensor:
        found = loss(engine, inputs)
        return found * torch.inf if at == broken and rank == 1 else found

    patched: Any = Engine
    patched.step, patched._loss = paused, infinite


class Soak:
    """The run, its faults, and what each was answered with."""

    def __init__(self, out: Path, home: Path, seed: int, timeout: float, pause: float) -> None:
        self.out, self.home, self.timeout, self.pause = out, home, timeout, pause
        self.draw = random.Random(seed)
        self.faults: Counter[str] = Counter()
        self.lost: dict[str, int] = {}  # the most steps done again after a fault of a kind
        self.slowest: dict[str, float] = {}  # the longest time in seconds from a fault to the end of all ranks
        self.starts = 0
        self._store: Any = None
        self._last: tuple[str, int] | None = None  # the last fault, and how many steps were done then
        self._due: list[Callable[[Processes], None]] = []
        out.mkdir(parents=True, exist_ok=True)
        file = out / "breaking.py"
        file.write_text((ROOT / "models" / "gpt2.py").read_text() + MODEL.format(bad=BAD))
        self.case = Case(str(file), DROPPING.sizes, DROPPING.train)

    @property
    def folder(self) -> Path:
        return self.home / "run" / "checkpoints"

    def start(
        self, *more: str, steps: int = 1_000_000, largest_file: int | None = None, broken: int | None = None
    ) -> Processes:
        """Starts the ranks; their store is served here, as torchrun's agent serves it."""
        self.starts += 1
        spec = self.case.spec(TENSOR, DATA, steps=steps, **SETTINGS)
        command = [*train_command(self.case, spec, self.home), "--timeout", str(self.timeout), *more]
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        output = self.out / f"output-{self.starts:04d}"
        inside = partial(slow, self.pause, broken)
        return Processes(command, WORLD, output, largest_file=largest_file, port=self._store.port, inside=inside)

    def steps(self) -> int:
        log = self.home / "run" / "log.jsonl"
        return len(losses(self.home / "run")) if log.exists() else 0

    def newest(self) -> int:
        """The step of the newest checkpoint, which may be damaged."""
        found = checkpoints(self.folder)
        return int(found[0].name.rpartition("-")[2]) if found else 0

    def progressed(self, ranks: Processes) -> None:
        """Waits until a start has written a checkpoint of its own. Notes how many steps it did again."""
        end = time.monotonic() + 20 * self.timeout
        while f"\ncheckpoint {self.folder}" not in ranks.said:
            if time.monotonic() > end or any(p.exitcode is not None for p in ranks.ranks):
                self.fail("no progress", ranks)
            time.sleep(0.2)
        if not self._last:
            return
        kind, done = self._last
        found = re.search(r"^continues from .*: step (\d+) of", ranks.said, re.MULTILINE)
        lost = done - int(found[1]) if found else done
        self.lost[kind] = max(lost, self.lost.get(kind, 0))
        # A checkpoint is begun when the one before is whole: less than two intervals, and one more where it is damaged.
        if lost >= EVERY * (3 if kind == "damage" else 2):
            self.fail(f"{lost} steps are lost", ranks)

    def fail(self, what: str, ranks: Processes) -> None:
        ranks.wait(0)
        raise SystemExit(f"{what} after start {self.starts}:\n{ranks.said}")

    def ended(self, ranks: Processes, codes: set[int], patience: float | None = None) -> None:
        """All ranks must end by themselves, with one of these codes."""
        found = ranks.wait(ALL_ENDED * self.timeout if patience is None else patience)
        if not set(found) <= codes:
            self.fail(f"exit codes {found}", ranks)
        if "bug of tpcompiler" in ranks.said or "Traceback" in ranks.said:
            self.fail("a bug", ranks)

    def kill(self, ranks: Processes) -> None:
        ranks.kill(self.draw.randrange(WORLD))
        self.ended(ranks, {-signal.SIGKILL, 1, 2})

    def stop(self, ranks: Processes) -> None:
        """A rank does not answer any more, but its process is there."""
        rank = self.draw.randrange(WORLD)
        pid = ranks.ranks[rank].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        end = time.monotonic() + ALL_ENDED * self.timeout
        for i, p in enumerate(ranks.ranks):
            if i != rank:
                p.join(max(0.1, end - time.monotonic()))
        hung = [i for i, p in enumerate(ranks.ranks) if i != rank and p.exitcode is None]
        ranks.kill(rank)
        if hung:
            self.fail(f"rank {rank} was stopped, ranks {hung} wait for it without end", ranks)
        self.ended(ranks, {-signal.SIGKILL, 1, 2})
        if f"rank {rank} (host" not in ranks.said:
            self.fail(f"the stopped rank {rank} was not named", ranks)

    def ask(self, ranks: Processes) -> None:
        number = self.draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
        pid = ranks.ranks[self.draw.randrange(WORLD)].pid
        assert pid is not None
        os.kill(pid, number)
        self.ended(ranks, {{signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 0}[number]})

    def damage(self, ranks: Processes) -> None:
        """A file of the newest checkpoint is truncated or altered while nothing runs."""
        self.kill(ranks)
        found = checkpoints(self.folder)
        if len(found) < 2:
            return
        file = self.draw.choice(sorted(found[0].iterdir()))
        content = bytearray(file.read_bytes())
        if self.draw.random() < 0.5:
            content[self.draw.randrange(len(content))] ^= 1 << self.draw.randrange(8)
        else:
            del content[self.draw.randrange(len(content)) :]
        file.write_bytes(content)

    def fill_disk(self, ranks: Processes) -> None:
        """There is no room for the next checkpoint."""
        if self.home == self.out:
            self.kill(ranks)
            ranks = self.start(largest_file=2_000)
            self.ended(ranks, {1, 2}, 20 * self.timeout)
        else:
            filler = self.home / "filler"
            with suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(bytes(1 << 12)):
                    pass
            self.ended(ranks, {1, 2})
            filler.unlink()
        if "no space" not in ranks.said.lower() and "file too large" not in ranks.said.lower():
            self.fail("the full disk was not named", ranks)

    def change(self, ranks: Processes) -> None:
        """The next start is another run, and is refused."""
        self.kill(ranks)
        other = self.start("--train", f"optimizer.lr={self.draw.uniform(1e-4, 9e-4):.6f}")
        self.ended(other, {1, 2}, 20 * self.timeout)
        if "this would be another run" not in other.said:
            self.fail("a changed setting was not refused", other)

    def break_batch(self, ranks: Processes) -> None:
        """A rank computes an infinite loss, in a start that stops at bad batches."""
        self.kill(ranks)
        broken = self.newest() + self.draw.randrange(1, 2 * EVERY)
        other = self.start("--train", "on_bad_batch=stop", broken=broken)
        self.ended(other, {1, 2}, 20 * self.timeout)
        if not re.search(r"^tpc: step \d+: the (loss|gradient's norm) is (inf|nan); the run stops", other.said, re.M):
            self.fail("a bad batch did not stop the run", other)

    def disturb(self, ranks: Processes) -> None:
        """One fault; every kind comes once in eight, in an order that is drawn anew."""
        if not self._due:
            self._due = [
                self.kill, self.kill, self.ask, self.stop, self.damage, self.fill_disk, self.change, self.break_batch,
            ]  # fmt: skip
            self.draw.shuffle(self._due)
        act = self._due.pop()
        name, before, done = act.__name__, time.monotonic(), self.steps()
        act(ranks)
        took = time.monotonic() - before
        self._last = name, done
        self.faults[name] += 1
        self.slowest[name] = max(took, self.slowest.get(name, 0.0))
        print(f"{sum(self.faults.values()):4d}  {name:11s} at step {done}, {took:.1f} s", flush=True)


def compare(a: Path, b: Path) -> None:
    with Weights(a) as mine, Weights(b) as other:
        assert mine.tensors.keys() == other.tensors.keys()
        for name in mine.tensors:
            assert torch.equal(mine.read(name), other.read(name)), f"{name} differs"
    assert State.load(a).skipped == State.load(b).skipped, "another number of bad batches was left out"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--every", type=float, default=30, help="seconds from one fault to the next, on average")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds before each step, in which the ranks sleep")
    parser.add_argument("--timeout", type=float, default=30, help="the run's own, in seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--disk", type=Path, help="a directory on a small file system, to be filled up")
    parser.add_argument("-o", "--out", type=Path, default=Path("out/soak"))
    given = parser.parse_args()
    home = given.disk or given.out
    for old in (given.out, home / "run"):
        shutil.rmtree(old, ignore_errors=True)
    soak = Soak(given.out, home, given.seed, given.timeout, given.pause)
    began = time.monotonic()
    due = began
    while time.monotonic() - began < 60 * given.minutes:
        due = max(due + soak.draw.uniform(0.5, 1.5) * given.every, time.monotonic() - given.every)
        ranks = soak.start()
        soak.progressed(ranks)
        time.sleep(max(0.0, due - time.monotonic()))
        soak.disturb(ranks)
    disturbed = time.monotonic() - began
    last = soak.newest() + EVERY
    soak.ended(soak.start(steps=last), {0}, 600)
    alone = Soak(given.out / "alone", given.out / "alone", 0, given.timeout, 0.0)
    undisturbed = alone.start("--train", "checkpoints.every=0", steps=last)
    alone.ended(undisturbed, {0}, 60 * given.minutes + 600)
    compare(checkpoints(soak.folder)[0], checkpoints(alone.folder)[0])
    assert losses(soak.home / "run") == losses(alone.home / "run"), "the losses differ"
    summary = {
        "minutes": round(disturbed / 60, 1),
        "steps": last,
        "faults": sum(soak.faults.values()),
        "kinds": dict(soak.faults.most_common()),
        "starts": soak.starts,
        "bad batches left out": State.load(checkpoints(soak.folder)[0]).skipped,
        "most steps done again": soak.lost,
        "slowest end in seconds": {name: round(s, 1) for name, s in soak.slowest.items()},
        "bit-equal": True,
    }
    (given.out / "summary.json").write_text(json.dumps(summary, indent=1))
    sys.stdout.write(json.dumps(summary) + "\n")


if __name__ == "__main__":
    main()
