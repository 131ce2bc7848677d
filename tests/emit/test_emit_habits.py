"""Modules off the beaten path: their source equals the model and is what a person could have written."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tpcompiler as tpc
from tests.emit.test_emit import assert_readable, built, plain_program, same
from tpcompiler.emit import emit


def feed_forward() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.LayerNorm(8))


class Attention(nn.Module):
    """Attention, with its scores capped or not."""

    def __init__(self, cap: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.cap = cap

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) * 0.5
        if self.cap:
            scores = (scores / self.cap).tanh() * self.cap
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Beside(nn.Module):
    """Attention of two kinds in turn, and equal `nn.Sequential`s beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([Attention(i % 2 * 3), feed_forward()]) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleList)
            attention, ff = layer
            x = x + attention(x)
            x = x + ff(x)
        return x


class Kind(nn.Module):
    """A feed-forward of one of two kinds."""

    def __init__(self, gelu: bool) -> None:
        super().__init__()
        self.norm, self.up, self.gate, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        z, gate = self.up(y), self.gate(y)
        return x + self.down(F.gelu(z) * gate if self.gelu else F.silu(z).pow(2) * gate.sigmoid())


class OddNames(nn.Module):
    """Names that are no identifiers, keywords, and numbers that are no places in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"a-b": nn.Linear(8, 8), "in": nn.Linear(8, 8), "3": nn.Linear(8, 8)})
        self.parts["slice(None, 3, None)"] = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.parts["tied-one"] = nn.Linear(8, 8)
        self.parts["tied-one"].weight = self.parts["a-b"].weight
        self.scales = nn.ParameterDict({n: nn.Parameter(torch.randn(8)) for n in ("a-b", "class", "7")})
        self.register_buffer("slice(None, 2, None)", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts.values():
            x = part(x)
        for scale in self.scales.values():
            x = x * scale
        return x + getattr(self, "slice(None, 2, None)")


class Sizes(nn.Module):
    """Returns an integer that no statement of the forward needs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return self.fc(x), x.shape[0] * x.shape[1] + 1


class Shifted(nn.Module):
    """A table read at positions that the number of a round shifts, by nothing in the first."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(64, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        i = torch.arange(x.shape[1])
        for k in range(3):
            x = x + self.table(i % 8 * 4 + k + torch.where(i > 2, 1, 0))
        return self.fc(x)


class Neutral(nn.Module):
    """The same line with another number, where no loop can be made."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Embedding(32, 8), nn.Embedding(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        i = torch.arange(x.shape[1])
        for k, table in ((0, self.a), (5, self.b)):
            x = x + table(i % 8 * 2 + k + 1)
        return x


class Patches(nn.Module):
    """A sequence of patches of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.cls, self.fc = nn.Conv2d(3, 16, 8, 8), nn.Parameter(torch.randn(1, 1, 16)), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).transpose(1, 2)
        return self.fc(torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1).cos())


LONG = "a_feed_forward_network_with_a_rather_long_name_that_goes_on_and_on"


class LongNames(nn.Module):
    """Qualified names that are longer than a line."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Module()
        self.tower.language = nn.ModuleList(nn.ModuleDict({LONG: Kind(False)}) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.tower.language:
            x = layer[LONG](x)
        return x


class VeryLongNames(LongNames):
    def __init__(self) -> None:
        super().__init__()
        self.tower.language = nn.ModuleList()
        setattr(self.tower, LONG, nn.ModuleList(nn.ModuleDict({LONG: Kind(True)}) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        for layer in getattr(self.tower, LONG):
            x = layer[LONG](x)
        return x


X = {"x": torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))}


class One(nn.Module):
    """Runs its modules one after the other."""

    def __init__(self, modules: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.net = modules()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


HABITS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "equal sequentials": (lambda: One(lambda: nn.Sequential(*(feed_forward() for _ in range(3)))), X),
    "a sequential is the model": (lambda: nn.Sequential(*(feed_forward() for _ in range(3))), {"input": X["x"]}),
    "beside": (Beside, X),
    "odd names": (OddNames, X),
    "sizes": (Sizes, X),
    "shifted": (Shifted, X),
    "neutral": (Neutral, X),
    "patches": (Patches, {"x": torch.randn(2, 3, 32, 24)}),
    "kinds in turn": (lambda: One(lambda: nn.Sequential(*(Kind(i % 2 == 0) for i in range(8)))), X),
    "long names": (LongNames, X),
    "very long names": (VeryLongNames, X),
}


def source(name: str, degree: int) -> str:
    make, example = HABITS[name]
    return tpc.shard(make(), example, {"mesh": {"tensor": degree}}).source


@pytest.mark.parametrize("name", HABITS)
def test_the_source_is_the_plain_model(name: str) -> None:
    make, example = HABITS[name]
    model = make()
    program = plain_program(model, example)
    assert_readable(emit(program))
    emitted = built(program, model)
    assert emitted.state_dict().keys() == model.state_dict().keys()
    same(emitted, model, example, training=True)


@pytest.mark.parametrize("name", HABITS)
def test_every_rank_is_right(name: str) -> None:
    make, example = HABITS[name]
    report = tpc.verify(make, example, {"mesh": {"tensor": 2}})
    assert report.passed, str(report)
    assert_readable(source(name, 2))


def tokens(text: str) -> tuple[str, ...]:
    found = tokenize.generate_tokens(io.StringIO(text).readline)
    return tuple(t.string for t in found if t.type not in (tokenize.COMMENT, tokenize.NL))


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("name", HABITS)
def test_no_two_classes_are_the_same(name: str, degree: int) -> None:
    text = source(name, degree)
    lines = text.splitlines()
    found = [n for n in ast.parse(text).body if isinstance(n, ast.ClassDef)]
    bodies = [tokens("class _:\n" + "\n".join(lines[n.body[1].lineno - 1 : n.end_lineno]) + "\n") for n in found]
    assert len(set(bodies)) == len(bodies)


def test_two_kinds_of_layer_in_turn_are_two_classes_and_a_loop() -> None:
    text = source("kinds in turn", 2)
    assert len([n for n in ast.parse(text).body if isinstance(n, ast.ClassDef)]) == 3
    assert "for i in range(4):" in text


def test_the_integer_that_is_returned_is_that_of_the_model() -> None:
    model = Sizes()
    emitted = built(plain_program(model, X), model)
    assert emitted(torch.randn(3, 5, 8))[1] == 16


@pytest.mark.parametrize("name", ["shifted", "neutral"])
def test_nothing_is_added_that_is_zero(name: str) -> None:
    for degree in (1, 2):
        assert not re.search(r"[+-] 0\b(?!\.)", source(name, degree))


def test_computed_sizes_are_shown_without_needless_parentheses() -> None:
    assert "((" not in "".join(re.findall(r"# \[.*?\]", source("patches", 2)))


@pytest.mark.parametrize("name", ["long names", "very long names"])
def test_the_table_of_collectives_stays_a_table(name: str) -> None:
    text = ast.get_docstring(ast.parse(source(name, 2))) or ""
    rows = text.partition("example:")[2].partition("To run")[0].strip().splitlines()
    assert 0 < len(rows) <= 3 * text.count(" ×  ")


class OneForAll(nn.Module):
    """Queries beside one key and one value, fused in one product."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.out = nn.Embedding(16, 24), nn.Linear(24, 5 * 8), nn.Linear(24, 24)

    def forward(self, ids: Tensor) -> Tensor:
        b, s = ids.shape
        q, k, v = (y.transpose(1, 2) for y in self.qkv(self.embed(ids)).view(b, s, -1, 8).split([3, 1, 1], 2))
        y = F.scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q))
        return self.out(y.transpose(1, 2).flatten(2))


def test_a_product_of_one_segment_has_the_shape_of_that_segment() -> None:
    text = tpc.shard(OneForAll(), {"ids": torch.randint(16, (2, 5))}, {"mesh": {"tensor": 2}}).source
    shapes = [line.rpartition("# ")[2] for line in text.splitlines() if "= F.linear(" in line and "# [" in line]
    assert "[b, s, 8]" in shapes and "[b, s, 40]" not in shapes, text
