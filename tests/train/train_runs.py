"""What the trainer's tests share: tiny runs, with ranks as threads or as processes on this host."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tpcompiler.cli.main import main
from tpcompiler.cli.ranks import RankOptions, train_section
from tpcompiler.errors import TpcError
from tpcompiler.execute.simulate import run_ranks
from tpcompiler.load.model import load_model
from tpcompiler.load.target import Inputs, Loaded
from tpcompiler.program import Capture
from tpcompiler.runtime import Ranks
from tpcompiler.spec.schema import Spec
from tpcompiler.train.data.batches import open_corpus
from tpcompiler.train.evaluate import measure
from tpcompiler.train.hold.owned import from_constructor
from tpcompiler.train.run import (
    loop,  # noqa: F401  imported once, before ranks are forked
    training_run,
)
from tpcompiler.train.settings import Train
from tpcompiler.train.show.log import read_log
from tpcompiler.train.step.compiled import Compiled, compile_model, logits_output, loss_output, training_inputs
from tpcompiler.train.step.engine import Engine, Outcome
from tpcompiler.weights.manifest import DATA

ROOT = Path(__file__).parents[2]
GPT2: dict[str, Any] = {
    "model": {"vocab": 261, "positions": 16, "hidden": 16, "heads": 4, "layers": 2, "dropout": 0.0},
    "inputs": {"batch": 2, "sequence": 8, "vocab": 261},
}
BERT: dict[str, Any] = {
    "model": {**GPT2["model"], "intermediate": 32},
    "inputs": {"batch": 2, "sequence": 8, "vocab": 261},
}
TRAIN: dict[str, Any] = {
    "steps": 10,
    "batch": 8,
    "micro_batch": 2,
    "sequence": 16,
    "precision": "fp64",
    "compile": False,
    "optimizer": {"lr": 1e-2, "clip": 0.5, "weight_decay": 0.1},
    "schedule": {"warmup": 2},
    "evaluation": {"every": 0},
    "checkpoints": {"every": 0},
    "logging": {"tensorboard": False},
}


@dataclass(frozen=True)
class Case:
    """A model (of `models/`, or a file) and its spec, but for the mesh."""

    model: str
    sizes: Mapping[str, Any]
    train: Mapping[str, Any]

    def spec(self, tensor: int = 1, data: int = 1, **train: Any) -> dict[str, Any]:
        return {"mesh": {"tensor": tensor, "data": data}, **self.sizes, "train": {**self.train, **train}}

    @property
    def path(self) -> str:
        return (
            self.model
            if self.model.endswith(".py") or self.model.startswith("hf:")
            else str(ROOT / "models" / f"{self.model}.py")
        )


CASES = {
    "gpt2": Case("gpt2", GPT2, TRAIN),
    "bert": Case("bert", BERT, {**TRAIN, "data": {"task": "mlm+sop"}}),
}


def dropping(case: Case) -> Case:
    """The same with dropout everywhere, in attention too."""
    model = {**case.sizes["model"], "dropout": 0.1}
    return Case(case.model, {**case.sizes, "model": model, "attention_dropout": "exact"}, case.train)


def shallow(case: Case) -> Case:
    """The same with one layer, for runs whose ranks all compile."""
    return Case(case.model, {**case.sizes, "model": {**case.sizes["model"], "layers": 1}}, case.train)


DROPPING = dropping(CASES["gpt2"])


_compiled: dict[str, Compiled] = {}


def compile_once(
    loaded: Loaded, spec: Spec, inputs: Inputs, output: Callable[[Capture], int], *, double: bool = False
) -> Compiled:
    """`compile_model`, once for the same model and mesh: training changes nothing of what it gives.

    Runs of this process share it, and so do ranks that are forked after it was made.
    """
    with torch.device("meta"):
        module = loaded.build()
    sizes = {k: v for k, v in spec.dump().items() if k != "train"}
    file = Path(loaded.source).stat().st_mtime_ns if Path(loaded.source).exists() else 0
    shapes = [(n, tuple(p.shape)) for n, p in module.named_parameters()]
    key = str((loaded.source, file, str(module), shapes, sizes, sorted(inputs[1]), output.__name__, double))
    if key not in _compiled:
        _compiled[key] = compile_model(loaded, spec, inputs, output, double=double)
    return _compiled[key]


# A compilation takes longer than all steps of a test's run. `Processes(fresh=True)` compiles on every rank.
for module in (training_run, measure):
    vars(module)["compile_model"] = compile_once


def in_threads(
    case: Case, tensor: int, steps: int, watch: Callable[[Outcome], None] = lambda outcome: None, **train: Any
) -> list[float]:
    """The losses of a run whose tensor ranks are threads of this process; rank 0's, all others' must be the same."""
    spec = Spec.load(case.spec(tensor, 1, **train))
    settings = spec.section(Train)
    corpus, loaded = open_corpus(settings), load_model(case.path, spec)
    inputs = training_inputs(loaded, corpus.train.batch_at(0, 0).tensors)
    compiled = compile_once(loaded, spec, inputs, loss_output, double=settings.precision == "fp64")

    def body(ranks: Ranks) -> list[float]:
        engine = Engine(compiled, ranks, settings, spec.seed, torch.device("cpu"))
        engine.fill(from_constructor(lambda name: compiled.recorded.replay(name, spec.seed)))
        losses = []
        for step in range(steps):
            batches = [
                corpus.train.batch_at(step, m, ranks.coords[DATA], 1) for m in range(corpus.train.micro_batches(1))
            ]
            outcome = engine.step(step, batches)
            assert bool(outcome.alike)
            watch(outcome)
            losses.append(float(outcome.loss))
        return losses

    results = run_ranks(compiled.sharded.program.mesh, body)
    assert all(r == results[0] for r in results)
    return results[0]


def _rank(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    output: str,
    largest_file: int | None,
    inside: Callable[[int], None] | None,
) -> None:
    os.setsid()
    if largest_file is not None:  # the kernel's own way to refuse a write
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115  for good
    os.environ.update(environment)
    torch.set_num_threads(1)
    if inside is not None:
        inside(int(environment["RANK"]))
    os._exit(main(list(arguments)))


class _Reached(BaseException):
    """A command has come to the point where it joins its ranks."""

    def __init__(self, spec: Spec, options: RankOptions) -> None:
        self.spec, self.options = spec, options


def _prepare(arguments: Sequence[str], world: int) -> None:
    """Compiles what the ranks of a command are going to run, so that they need not. They say what is wrong."""

    @contextmanager
    def reached(screen: object, spec: Spec, options: RankOptions) -> Iterator[None]:
        raise _Reached(spec, options)
        yield

    as_rank = {"RANK": "1", "WORLD_SIZE": str(world)}
    try:
        with mock.patch.dict(os.environ, as_rank), mock.patch("tpcompiler.cli.train.joined", reached):
            with mock.patch("tpcompiler.cli.eval.joined", reached):
                main(list(arguments))
    except _Reached as found:
        spec, options, train = found.spec, found.options, train_section(found.spec)
        try:
            loaded = options.load(spec)
            if arguments[0] == "train":
                inputs = training_inputs(loaded, open_corpus(train).train.batch_at(0, 0).tensors)
                output = loss_output
            else:
                inputs = measure.ids_alone(loaded, train.data.names.get("input_ids", "input_ids"))
                output = logits_output
            compile_once(loaded, spec, inputs, output, double=train.precision == "fp64")
        except TpcError:
            pass


class Processes:
    """Ranks of one `tpc` command, as processes of this host; the last `absent` ones never come."""

    def __init__(
        self,
        arguments: Sequence[str],
        world: int,
        output: Path,
        absent: int = 0,
        largest_file: int | None = None,
        port: int | None = None,
        fresh: bool = False,
        inside: Callable[[int], None] | None = None,
    ) -> None:
        """`port`: of a store that serves the ranks, as torchrun's does; without it rank 0 serves one.

        `inside(rank)` is called in each process first, to do to it what a test needs.

        `fresh`: every rank compiles for itself; else they are forked from this process, which has compiled. A process
        that knows a GPU cannot be forked.
        """
        fresh = fresh or torch.cuda.is_available()
        if fresh:
            multiprocessing.set_forkserver_preload([__name__])  # torch is imported once, not by every rank
        else:
            _prepare(arguments, world)
        context: Any = multiprocessing.get_context("forkserver" if fresh else "fork")
        served = port is not None
        if port is None:
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                port = s.getsockname()[1]
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(world),
            "GLOO_SOCKET_IFNAME": "lo",
            "TORCHELASTIC_USE_AGENT_STORE": str(served),
        }
        self.output = output
        environments = [{**shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(world - absent)]
        self.ranks = [
            context.Process(target=_rank, args=(list(arguments), e, str(output), largest_file, inside))
            for e in environments
        ]
        for p in self.ranks:
            p.start()

    def kill(self, rank: int) -> None:
        """SIGKILL."""
        pid = self.ranks[rank].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    def wait(self, timeout: float = 120) -> list[int | None]:
        """The exit codes; whoever is not done by then is killed."""
        end = time.monotonic() + timeout
        for p in self.ranks:
            p.join(max(0.1, end - time.monotonic()))
        codes = [p.exitcode for p in self.ranks]
        for p in self.ranks:
            if p.exitcode is None:
                p.kill()
                p.join()
        return codes

    @property
    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""


def train_command(case: Case, spec: Mapping[str, Any], directory: Path, *more: str) -> list[str]:
    """`tpc train` of a case into `directory/run`, with a spec written beside it."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "spec.yaml"
    file.write_text(json.dumps(spec))
    return [
        "train",
        case.path,
        "--spec",
        str(file),
        "-o",
        str(directory / "run"),
        "--device",
        "cpu",
        "--timeout",
        "300",
        *more,
    ]


def in_processes(
    case: Case, tensor: int, data: int, directory: Path, *more: str, patience: float = 120, fresh: bool = False,
    **train: Any,
) -> list[float]:  # fmt: skip
    """The losses of a run whose ranks are processes."""
    command = train_command(case, case.spec(tensor, data, **train), directory, *more)
    ranks = Processes(command, tensor * data, directory / "output", fresh=fresh)
    codes = ranks.wait(patience)
    assert codes == [0] * len(codes), ranks.said
    return losses(directory / "run")


def losses(directory: Path) -> list[float]:
    return [r.loss for r in read_log(directory) if r.loss is not None]
