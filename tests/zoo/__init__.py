"""Plain transformers of many habits that stand in no example: what the compiler must take unedited.

One file a model, each with `Model` and `example_inputs` as in models/, so that
`tpc verify tests/zoo/NAME.py` works too.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from torch import Tensor, nn

Made = tuple[nn.Module, dict[str, Tensor]]


def _factory(name: str) -> Callable[..., Made]:
    def make(**sizes: int) -> Made:
        """The model, and example inputs of the given `batch` and `sequence`."""
        module = import_module(f"{__name__}.{name}")
        return module.Model(), module.example_inputs(**sizes)

    return make


ZOO: dict[str, Callable[..., Made]] = {
    path.stem: _factory(path.stem) for path in sorted(Path(__file__).parent.glob("[!_]*.py"))
}
