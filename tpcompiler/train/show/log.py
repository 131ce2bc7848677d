"""What a run writes down: `log.jsonl`, one record a line, and a TensorBoard log beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from tpcompiler.errors import TpcError
from tpcompiler.train.data.tokens import replacing

NAME = "log.jsonl"


@dataclass(frozen=True)
class Record:
    """A step, after it was done. None: not measured."""

    step: int  # optimizer steps done
    loss: float | None = None  # mean of the step's global batch, nats
    lr: float | None = None
    grad_norm: float | None = None  # before the clip
    tokens: int | None = None  # seen since the run began
    seconds: float | None = None  # a step
    tokens_per_second: float | None = None  # of all ranks together
    tflops: float | None = None  # model TFLOP/s a GPU
    peak_fraction: float | None = None
    memory: int | None = None  # bytes, the most that rank 0 held
    loss_scale: float | None = None
    skipped: int | None = None  # steps left out by the loss scale
    evaluation: float | None = None  # mean loss on held-out text, nats

    def values(self) -> dict[str, float]:
        return {k: v for k, v in asdict(self).items() if v is not None}


class RunLog:
    """Appends records; only rank 0 has one. A run that goes on from step `resumed` forgets what lay after it.

    `tensorboard` None means: when the package is there.
    """

    def __init__(self, directory: Path, resumed: int = 0, tensorboard: bool | None = None) -> None:
        path = directory / NAME
        kept = read_log(path) if path.exists() else []
        with replacing(path) as out:
            out.writelines(_line(r) for r in kept if r.step <= resumed)
        self._file = path.open("ab")
        self._board = _board(directory, resumed, tensorboard)

    def write(self, record: Record) -> None:
        try:
            self._file.write(_line(record))
            self._file.flush()
        except OSError as e:
            raise TpcError(f"cannot write {self._file.name}: {e.strerror}") from None
        if self._board is not None:
            for name, value in record.values().items():
                if name != "step":
                    self._board.add_scalar(name, value, record.step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _line(record: Record) -> bytes:
    return json.dumps(record.values()).encode() + b"\n"


def _board(directory: Path, resumed: int, wanted: bool | None) -> Any:
    there = find_spec("tensorboard") is not None
    if wanted and not there:
        raise TpcError("train.logging.tensorboard: needs the package: pip install 'tpcompiler[train]', or false")
    if wanted is False or not there:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory / "tensorboard"), purge_step=resumed + 1 if resumed else None)


def read_log(run: Path) -> list[Record]:
    """The records of a run's directory, or of a log file. A last line that was torn by a crash is left out."""
    path = run / NAME if run.is_dir() else run
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as e:
        raise TpcError(f"{path}: {e.strerror}; give a run's directory or its {NAME}") from None
    known = {f.name for f in fields(Record)}
    records = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            value = json.loads(line)
            if not isinstance(value, Mapping) or "step" not in value:
                raise ValueError
        except ValueError:
            raise TpcError(f"{path}:{number}: not a record of a run") from None
        records.append(Record(**{k: v for k, v in value.items() if k in known}))
    return records
