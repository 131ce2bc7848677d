"""A run that is disturbed again and again, and must end as one that was left alone.

2 tensor × 2 data ranks on this host, a fault every so many seconds, each followed by a new start: a rank killed,
stopped or asked to end; a checkpoint truncated or altered; a disk that is full; a setting that makes it another run. In
the end weights, optimizer state and losses are compared bit for bit with those of an undisturbed run.

    python -m benchmarks.soak --minutes 120 -o out/soak
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from tests.train.train_runs import DROPPING, Processes, losses, train_command
from tpcompiler.train.run.checkpoint import State, checkpoints
from tpcompiler.weights import Weights

TENSOR, DATA = 2, 2
TIMEOUT = 15.0  # seconds: the run's own, after which a stopped rank is named
EVERY = 5  # steps between checkpoints
SETTINGS = {
    "checkpoints": {"every": EVERY, "keep": 3},
    "schedule": {"warmup": 5, "until": 1_000_000},
    "optimizer": {"lr": 1e-3},
}
ALL_ENDED = 3 * TIMEOUT  # seconds after a fault


class Soak:
    """The run, its faults, and what each was answered with."""

    def __init__(self, out: Path, seed: int, between: float) -> None:
        self.out, self.draw, self.between = out, random.Random(seed), between
        self.faults: Counter[str] = Counter()
        self.lost: list[int] = []  # steps done again after each fault
        self.starts = 0

    @property
    def folder(self) -> Path:
        return self.out / "run" / "checkpoints"

    def start(self, *more: str, steps: int = 1_000_000, largest_file: int | None = None) -> Processes:
        self.starts += 1
        spec = DROPPING.spec(TENSOR, DATA, steps=steps, **SETTINGS)
        command = [*train_command(DROPPING, spec, self.out), "--timeout", str(TIMEOUT), *more]
        return Processes(command, TENSOR * DATA, self.out / f"output-{self.starts:04d}", largest_file=largest_file)

    def steps(self) -> int:
        log = self.out / "run" / "log.jsonl"
        return len(losses(self.out / "run")) if log.exists() else 0

    def progressed(self, ranks: Processes) -> None:
        """Waits until a start has done steps of its own, and then until the next fault is due."""
        before, end = self.newest(), time.monotonic() + 300
        while self.newest() == before:
            if time.monotonic() > end or any(p.exitcode is not None for p in ranks.ranks):
                raise SystemExit(f"no progress after start {self.starts}:\n{ranks.said}")
            time.sleep(0.1)
        time.sleep(self.draw.uniform(0, 2 * self.between))

    def newest(self) -> int:
        found = checkpoints(self.folder)
        return State.load(found[0]).step if found else 0

    def ended(self, ranks: Processes, codes: set[int], patience: float = ALL_ENDED) -> None:
        """All ranks must end by themselves, with one of these codes."""
        found = ranks.wait(patience)
        if not set(found) <= codes:
            raise SystemExit(f"exit codes {found} after start {self.starts}:\n{ranks.said}")
        if "bug of tpcompiler" in ranks.said or "Traceback" in ranks.said:
            raise SystemExit(f"a bug after start {self.starts}:\n{ranks.said}")

    def kill(self, ranks: Processes) -> None:
        rank = self.draw.randrange(4)
        ranks.kill(rank)
        self.ended(ranks, {-signal.SIGKILL, 1, 2})

    def stop(self, ranks: Processes) -> None:
        rank = self.draw.randrange(1, 4)  # rank 0 serves the store
        pid = ranks.ranks[rank].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        for i, p in enumerate(ranks.ranks):
            if i != rank:
                p.join(ALL_ENDED)
        ranks.kill(rank)
        self.ended(ranks, {-signal.SIGKILL, 1, 2})
        if f"rank {rank} (host" not in ranks.said:
            raise SystemExit(f"the stopped rank {rank} was not named:\n{ranks.said}")

    def ask(self, ranks: Processes) -> None:
        number = self.draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
        pid = ranks.ranks[self.draw.randrange(4)].pid
        assert pid is not None
        os.kill(pid, number)
        self.ended(ranks, {{signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 0}[number]})

    def damage(self, ranks: Processes) -> None:
        """The newest checkpoint is truncated or altered while nothing runs."""
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
        """The next start cannot write a checkpoint."""
        self.kill(ranks)
        full = self.start(largest_file=2_000)
        self.ended(full, {1, 2})

    def change(self, ranks: Processes) -> None:
        """The next start is another run, and is refused."""
        self.kill(ranks)
        other = self.start("--train", f"optimizer.lr={self.draw.uniform(1e-4, 9e-4):.6f}")
        self.ended(other, {1, 2})
        if "this would be another run" not in other.said:
            raise SystemExit(f"a changed setting was not refused:\n{other.said}")

    def disturb(self, ranks: Processes) -> None:
        kinds: list[Callable[[Processes], None]] = [
            self.kill, self.kill, self.ask, self.stop, self.damage, self.fill_disk, self.change,
        ]  # fmt: skip
        act = self.draw.choice(kinds)
        done = self.steps()
        act(ranks)
        self.faults[act.__name__] += 1
        self.lost.append(max(0, done - self.newest()))
        print(f"{sum(self.faults.values()):4d}  {act.__name__:10s} at step {done}, kept {self.newest()}", flush=True)


def compare(a: Path, b: Path) -> None:
    with Weights(a) as mine, Weights(b) as other:
        assert mine.tensors.keys() == other.tensors.keys()
        for name in mine.tensors:
            assert torch.equal(mine.read(name), other.read(name)), f"{name} differs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--between", type=float, default=10, help="seconds from a checkpoint to a fault, on average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path, default=Path("out/soak"))
    arguments = parser.parse_args()
    shutil.rmtree(arguments.out, ignore_errors=True)
    soak = Soak(arguments.out, arguments.seed, arguments.between)
    began = time.monotonic()
    while time.monotonic() - began < 60 * arguments.minutes:
        ranks = soak.start()
        soak.progressed(ranks)
        soak.disturb(ranks)
    last = soak.newest() + EVERY
    soak.ended(soak.start(steps=last), {0})
    alone = Soak(arguments.out / "alone", 0, 0)
    undisturbed = alone.start("--train", "checkpoints.every=0", steps=last)
    alone.ended(undisturbed, {0}, 60 * arguments.minutes + 600)
    compare(checkpoints(soak.folder)[0], checkpoints(alone.folder)[0])
    assert losses(soak.out / "run") == losses(alone.out / "run"), "the losses differ"
    summary = {
        "minutes": round((time.monotonic() - began) / 60, 1),
        "steps": last,
        "faults": sum(soak.faults.values()),
        "kinds": dict(soak.faults),
        "starts": soak.starts,
        "most steps done again": max(soak.lost, default=0),
        "bit-equal": True,
    }
    (arguments.out / "summary.json").write_text(json.dumps(summary, indent=1))
    sys.stdout.write(json.dumps(summary) + "\n")


if __name__ == "__main__":
    main()
