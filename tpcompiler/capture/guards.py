"""Branches on whether any element of a mask is set: `if padding.any():`.

Models skip work that would change nothing where no element is set. The branch for masks with such an element holds for
all masks then, and is the one that is traced. Nothing here proves that the skipped work changes nothing: a warning with
the line says which branch was taken, and `tpc verify` runs the module itself, which takes its own branch.
"""

from __future__ import annotations

import linecache
import sys
import warnings
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tpcompiler.capture.refusals import TORCH_AND_OURS as LIBRARIES
from tpcompiler.errors import TpcWarning

_ANY = {Tensor.any: True, torch.any: True, Tensor.all: False, torch.all: False}
_NOT = (torch.logical_not, Tensor.logical_not, Tensor.__invert__, torch.bitwise_not)


class Guards(TorchFunctionMode):
    """While it lasts, `bool(mask.any())` is True and `bool(mask.all())` is False, except where a loop goes on by it."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, tuple[Tensor, bool]] = {}  # alive, so that ids stay unique

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.__bool__, Tensor.item) and id(args[0]) in self.known:
            file, number = _asking()
            line = linecache.getline(file, number).strip()
            if line.startswith(("if ", "elif ")):
                said = f"{line} one branch is traced, the one for masks with some elements set and others not"
                warnings.warn_explicit(said, TpcWarning, file, number)
                return self.known[id(args[0])][1]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dim() == 0:
            if func in _ANY:
                self.known[id(out)] = out, _ANY[func]
            elif func in _NOT and id(args[0]) in self.known:
                self.known[id(out)] = out, not self.known[id(args[0])][1]
        return out


def _asking() -> tuple[str, int]:
    """The file and line of the model's own code that asks."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(LIBRARIES):
        frame = frame.f_back
    return ("", 0) if frame is None else (frame.f_code.co_filename, frame.f_lineno)
