"""A run's logs: `log.jsonl`, with one record per line, and those of TensorBoard and of Weights & Biases."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from tpcompiler.errors import TpcError
from tpcompiler.runtime.stored import disk
from tpcompiler.weights.atomic import replacing_file

NAME = "log.jsonl"


@dataclass(frozen=True)
class StepRecord:
    """The numbers of one step. None stands for a number that was not measured."""

    step: int  # how many optimizer steps are done
    loss: float | None = None  # mean of the step's global batch, nats
    lr: float | None = None
    grad_norm: float | None = None  # before the clip
    tokens: int | None = None  # since the run began
    seconds: float | None = None  # that this step took
    data_seconds: float | None = None  # the part of `seconds` that the step waited for data
    tokens_per_second: float | None = None  # of all ranks together
    tflops: float | None = None  # model TFLOP/s a GPU
    peak_fraction: float | None = None
    memory: int | None = None  # bytes, the most that rank 0 has held
    loss_scale: float | None = None
    skipped: int | None = None  # steps left out so far, by the loss scale or because of bad batches
    evaluation: float | None = None  # mean loss on held-out text, nats

    def values(self) -> dict[str, float]:
        return {k: v for k, v in asdict(self).items() if v is not None}


class LogSink(Protocol):
    """A destination of records. Its methods raise `OSError` when a record is lost; the run continues."""

    def write(self, record: StepRecord) -> None: ...

    def close(self) -> None: ...


class Lines:
    """`log.jsonl`, with one record per line. Records after step `resumed` are removed, and so are broken lines."""

    def __init__(self, directory: Path, resumed: int = 0) -> None:
        path = directory / NAME
        kept = read_log(path, strict=False) if path.exists() else []
        with disk(path, "write"), replacing_file(path) as new, new.open("wb") as out:
            out.writelines(_line(r) for r in kept if r.step <= resumed)
        self._file = path.open("ab")

    def write(self, record: StepRecord) -> None:
        self._file.write(_line(record))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardLog:
    """A TensorBoard log."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    @classmethod
    def of(cls, directory: Path, resumed: int) -> TensorBoardLog:
        from torch.utils.tensorboard import SummaryWriter

        return cls(SummaryWriter(str(directory / "tensorboard"), purge_step=resumed + 1 if resumed else None))

    def write(self, record: StepRecord) -> None:
        for name, value in record.values().items():
            if name != "step":
                self._writer.add_scalar(name, value, record.step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases. It is continued when this run is. Its settings come from its environment variables."""

    def __init__(self, directory: Path, project: str) -> None:
        try:
            import wandb
        except ImportError:
            raise TpcError("train.logging.wandb: needs the package: pip install wandb, or leave it out") from None
        name = directory.resolve().name
        self._run = wandb.init(project=project, name=name, id=name, resume="allow", dir=str(directory))

    def write(self, record: StepRecord) -> None:
        self._run.log({k: v for k, v in record.values().items() if k != "step"}, step=record.step)

    def close(self) -> None:
        self._run.finish()


class RunLog:
    """All logs of a run, on rank 0. A run that continues from step `resumed` removes the records after it. A full disk
    loses records and does not end the run; `lost` is then called once with a line that says so.

    With `tensorboard` None, there is a TensorBoard log if the package is installed. `wandb` names a project of
    Weights & Biases.
    """

    def __init__(
        self,
        directory: Path,
        resumed: int = 0,
        tensorboard: bool | None = None,
        lost: Callable[[str], None] = lambda line: None,
        wandb: str | None = None,
    ) -> None:
        self._lost, self._failed = lost, False
        self._writers: list[LogSink] = [Lines(directory, resumed)]
        there = find_spec("tensorboard") is not None
        if tensorboard and not there:
            raise TpcError("train.logging.tensorboard: needs the package: pip install 'tpcompiler[train]', or false")
        if there and tensorboard is not False:
            self._writers.append(TensorBoardLog.of(directory, resumed))
        if wandb is not None:
            self._writers.append(Wandb(directory, wandb))

    def write(self, record: StepRecord) -> None:
        for writer in self._writers:
            self._try(partial(writer.write, record))

    def close(self) -> None:
        for writer in self._writers:
            self._try(writer.close)

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except OSError as e:
            if not self._failed:
                self._failed = True
                self._lost(
                    f"the log cannot be written, and training continues: {e.filename or 'its file'}: {e.strerror}"
                )

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _line(record: StepRecord) -> bytes:
    values = {k: v if isfinite(v) else str(v) for k, v in record.values().items()}
    return json.dumps(values, allow_nan=False).encode() + b"\n"


def read_log(run: Path, strict: bool = True) -> list[StepRecord]:
    """The records of a run's directory, or of a log file. A last line that a crash has cut off is left out.

    For any other line that is not a record it raises `TpcError`, or leaves it out if `strict` is false.
    """
    path = run / NAME if run.is_dir() else run
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as e:
        raise TpcError(f"{path}: {e.strerror}; give a run's directory or its {NAME}") from None
    known = {f.name for f in fields(StepRecord)}
    records = []
    numbers: dict[str, Any]
    for number, line in enumerate(lines[:-1], 1):
        try:
            value = json.loads(line)
            if not isinstance(value, Mapping) or not isinstance(value.get("step"), int):
                raise ValueError
            numbers = {k: float(v) if isinstance(v, str) else v for k, v in value.items() if k in known}
        except (ValueError, RecursionError):
            if strict:
                raise TpcError(f"{path}:{number}: not a record of a run") from None
            continue
        records.append(StepRecord(**numbers))
    return records
