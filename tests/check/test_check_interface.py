"""How the source is called, and how what it returns is nested, must be the model's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tpcompiler.api import Sharded, compile_capture
from tpcompiler.capture import capture
from tpcompiler.check.claims import Geometry
from tpcompiler.check.forward import Refused
from tpcompiler.check.source import compare_source
from tpcompiler.spec.schema import Spec


class Nested(nn.Module):
    """Gives a dictionary of a value, a tuple and a list; `scale` is a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor, scale: int = 2) -> dict[str, object]:
        y = self.proj(x)
        return {"y": y, "pair": (y * scale, y + mask), "rest": [y * 3]}


@pytest.fixture(scope="module")
def nested() -> Sharded:
    inputs = {"x": torch.randn(2, 6, 8), "mask": torch.randn(2, 6, 8), "scale": 2}
    return compile_capture(capture(Nested, inputs), Spec.load({"mesh": {"tensor": 1}}))


def accept(sharded: Sharded, source: str) -> None:
    compare_source(sharded.program, source, Geometry(sharded.program.mesh), set())


def test_the_models_own_structure_is_accepted(nested: Sharded) -> None:
    accept(nested, nested.source)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"y": ', '"z": ', "the keys"),
        ("def forward(self, x: Tensor, mask: Tensor", "def forward(self, mask: Tensor, x: Tensor", "the arguments"),
        ("scale=2", "scale=3", "as the model was traced"),
        ("x: Tensor, mask", "x: Tensor = None, mask", "as the model was traced|non-default argument"),
    ],
)
def test_another_interface_is_refused(nested: Sharded, old: str, new: str, said: str) -> None:
    assert old in nested.source, nested.source
    with pytest.raises(Refused, match=said):
        accept(nested, nested.source.replace(old, new, 1))


@pytest.mark.parametrize(
    ("ours", "others", "said"),
    [
        (lambda pair, rest: f'"pair": {pair}', lambda pair, rest: f'"pair": [{pair[1:-1]}]', "a tuple of 2"),
        (lambda pair, rest: f'"rest": {rest}', lambda pair, rest: f'"rest": {rest[1:-1]}', "a list of 1"),
        (lambda pair, rest: f'"rest": {rest}', lambda pair, rest: f'"rest": ({rest[1:-1]},)', "a list of 1"),
    ],
)
def test_another_nesting_is_refused(nested: Sharded, ours, others, said: str) -> None:  # type: ignore[no-untyped-def]
    line = next(text for text in nested.source.splitlines() if text.strip().startswith("return {"))
    pair = line[line.index('"pair": ') + 8 : line.index(', "rest"')]
    rest = line[line.index('"rest": ') + 8 : line.rindex("}")]
    edited = line.replace(ours(pair, rest), others(pair, rest))
    assert edited != line
    with pytest.raises(Refused, match=said):
        accept(nested, nested.source.replace(line, edited))
