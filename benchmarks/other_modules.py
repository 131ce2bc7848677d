"""The modules of `other_modules.txt`, built when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

WORDS, WIDTH, TOKENS, BATCH = 128, 48, 16, 2
LINES = Path(__file__).with_suffix(".txt")


@dataclass(frozen=True)
class Configuration:
    """One module. Nothing of its package is imported before it is built."""

    name: str  # package/line
    imports: str
    module: str
    arguments: str

    def _run(self, expression: str) -> Any:
        space: dict[str, Any] = dict(_HELPERS)
        exec(self.imports, space)
        space.update(_HELPERS)  # over what a star import may have brought
        return eval(expression, space)

    def build(self) -> nn.Module:
        module: nn.Module = self._run(self.module)
        return module

    def inputs(self) -> Any:
        """The same values at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self._run(self.arguments)


def configurations(text: str | None = None) -> dict[str, Configuration]:
    package, imports = "", ""
    out = {}
    for line in (LINES.read_text() if text is None else text).splitlines():
        if line.startswith("[") and line.endswith("]"):
            package, imports = line[1:-1], ""
        elif line.startswith("> "):
            imports += line[2:] + "\n"
        elif line and not line.startswith("#"):
            name, module, arguments = line.split(" | ", 2) if line.count(" | ") == 2 else _parts(line)
            out[f"{package}/{name}"] = Configuration(f"{package}/{name}", imports, module, arguments)
    return out


def _parts(line: str) -> tuple[str, str, str]:
    """A line whose module or arguments join dictionaries by ` | ` themselves: where both sides are expressions."""
    name, *rest = line.split(" | ")
    for i in range(1, len(rest)):
        module, arguments = " | ".join(rest[:i]), " | ".join(rest[i:])
        try:
            compile(module, name, "eval")
            compile(arguments, name, "eval")
        except SyntaxError:
            continue
        return name, module, arguments
    raise ValueError(f"{LINES.name}: {line}: want name | module | inputs")


def ids(tokens: int = TOKENS, words: int = WORDS, batch: int = BATCH) -> Tensor:
    return torch.randint(4, words, (batch, tokens))


def hidden(tokens: int = TOKENS, width: int = WIDTH, batch: int = BATCH) -> Tensor:
    return torch.randn(batch, tokens, width)


def image(size: int = 32, channels: int = 3, batch: int = BATCH) -> Tensor:
    return torch.randn(batch, channels, size, size)


def keep(tokens: int = TOKENS, batch: int = BATCH) -> Tensor:
    """A padding mask: True is a token, and the last three of the second sample are none."""
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    mask[1, -3:] = False
    return mask


class With(nn.Module):
    """A module called as a user's training step would call it."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self.call = call

    def forward(self, *inputs: Any) -> Any:
        return self.call(self.module, *inputs)


_HELPERS: dict[str, Any] = {
    **{f.__name__: f for f in (ids, hidden, image, keep, With)},
    "torch": torch,
    "nn": nn,
    "config": SimpleNamespace,
    "V": WORDS,
    "D": WIDTH,
    "T": TOKENS,
    "B": BATCH,
}
