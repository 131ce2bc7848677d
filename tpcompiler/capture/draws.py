"""Random numbers that a forward draws for other uses than dropout.

Models skip layers by `torch.rand([]) < p`, even where p is 0. A number from [0, 1) is never below 0, so that such a
comparison is settled while tracing. Every other use is refused, because ranks would draw different numbers.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NoReturn, Self
from unittest import mock

import numpy
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tpcompiler.capture.refusals import CannotTrace

_LESS = (Tensor.__lt__, Tensor.lt, torch.lt, Tensor.__le__, Tensor.le, torch.le)
_GREATER = (Tensor.__gt__, Tensor.gt, torch.gt, Tensor.__ge__, Tensor.ge, torch.ge)
_PYTHONS = ("random", "uniform", "randint", "randrange", "choice", "choices", "sample", "shuffle", "gauss")
_NUMPYS = ("rand", "random", "uniform", "randint", "choice", "randn", "normal", "permutation", "shuffle", "binomial")


class Drawn:
    """Stands for a number from [0, 1) that Python drew. All that is known is that it is not below 0."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __lt__(self, other: object) -> bool:
        return self._below(other)

    def __ge__(self, other: object) -> bool:
        return not self._below(other)

    def __getattr__(self, name: str) -> NoReturn:
        self.refuse()

    def __float__(self) -> float:
        self.refuse()

    def __bool__(self) -> bool:
        self.refuse()

    def __add__(self, other: object) -> NoReturn:
        self.refuse()

    __sub__ = __mul__ = __truediv__ = __radd__ = __rsub__ = __rmul__ = __le__ = __gt__ = __add__

    def _below(self, other: object) -> bool:
        if not isinstance(other, int | float) or 0 < other < 1:
            self.refuse()
        return other >= 1

    def refuse(self) -> NoReturn:
        raise CannotTrace(
            f"it depends on {self.name}, and every rank would draw another number; set the probability to 0, or use "
            "torch.nn.functional.dropout"
        )


class Draws(TorchFunctionMode):
    """Settles comparisons whose result no draw changes, and refuses draws by Python's and numpy's generators."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.uniform: dict[int, Tensor] = {}  # tensors drawn from [0, 1), kept alive so that ids stay unique

    def __enter__(self) -> Self:
        for owner, names, shown in ((random, _PYTHONS, "random"), (numpy.random, _NUMPYS, "numpy.random")):
            for name in names:
                self.stack.enter_context(mock.patch.object(owner, name, _python(f"{shown}.{name}")))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.stack.close()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (*_LESS, *_GREATER) and len(args) == 2 and id(args[0]) in self.uniform and args[0].numel() == 1:
            bound, known = args[1], func in _LESS
            if isinstance(bound, int | float) and bound >= 1:
                return known
            if isinstance(bound, int | float) and bound <= 0:  # one number in 2²⁴ is 0, which is taken for above it
                return not known
            Drawn("torch.rand").refuse()
        out = func(*args, **(kwargs or {}))
        if func in (torch.rand, torch.rand_like):
            self.uniform[id(out)] = out
        return out


def _python(name: str) -> Callable[..., Drawn]:
    def draw(*args: Any, **kwargs: Any) -> Drawn:
        drawn = Drawn(name)
        if not name.endswith(("random", "rand")) and not (name.endswith("uniform") and args in ((), (0, 1))):
            drawn.refuse()
        if name.endswith("rand") and args or name == "numpy.random.random" and args:
            drawn.refuse()
        return drawn

    return draw
