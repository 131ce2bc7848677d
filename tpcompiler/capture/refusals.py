"""Says in one line why a model cannot be built or traced, with the line of the model's own code."""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Iterator

import torch
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from tpcompiler.errors import ModelError

_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep
TORCH_AND_OURS = (_TORCH, _OURS)
_LIBRARIES = tuple(sysconfig.get_path(p) + os.sep for p in ("stdlib", "purelib", "platlib"))


class CannotTrace(Exception):
    """Raised for something that a trace would not keep, with what to write instead. `explain` adds the model's line."""


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and the errors that caused it."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def explain(error: Exception, source: str, what: str, owners: frozenset[str] = frozenset()) -> ModelError:
    """The message `file:line: source: what: why`. `owners` are the files that define the model's modules.

    The line is the innermost one in these files, or else in any code that is not of torch or another library.
    """
    where = source or "the model"
    frames = [f for e in chain(error) for f in reversed(traceback.extract_tb(e.__traceback__))]
    frames = [f for f in frames if not f.filename.startswith((_TORCH, _OURS, "<"))]
    own = [f for f in frames if f.filename in owners] or [f for f in frames if not f.filename.startswith(_LIBRARIES)]
    if own or frames:
        frame = (own or frames)[0]
        where = f"{frame.filename}:{frame.lineno}: {(frame.line or '').strip()}"
    return ModelError(f"{where}: {what}: {_why(error)}")


def _why(error: Exception) -> str:
    if refused := next((e for e in chain(error) if isinstance(e, CannotTrace)), None):
        return str(refused)
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if any(isinstance(e, GuardOnDataDependentSymNode) for e in chain(error)) or "item() on meta" in text:
        return "what it does depends on the values of a tensor; use torch.where, or an argument that is a Python number"
    if "device meta" in text and "cpu" in text:
        return f"{text} (make tensors with device=x.device, or as buffers in the constructor)"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
