"""Lookups however they are spelled, convolutions by channels, stochastic depth: split, proven, and equal on ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpcompiler.api import Sharded, compile_capture
from tpcompiler.capture import capture, float64
from tpcompiler.errors import ModelError
from tpcompiler.spec.schema import Spec
from tpcompiler.verification.against_model import Comparison
from tpcompiler.verification.source_model import same_as_module
from tpcompiler.verification.verify import initial_state, inputs_of

ROWS, WIDTH = 23, 12


def held(model: Callable[[], nn.Module], x: Tensor, degree: int) -> tuple[Sharded, set[str]]:
    """The model compiled, proven and compared; and the parameters that stay whole."""
    captured = capture(model, x)
    sharded = compile_capture(float64(captured), Spec.load({"mesh": {"tensor": degree}}))
    assert sharded.check.passed, str(sharded.check.refused[0])
    module = model()
    run = Comparison(sharded, initial_state(captured, module, torch.float64, 0), torch.float64, True)
    for case in (run.case("all", [inputs_of(captured, x, torch.float64)]), *same_as_module(captured, module, x, True)):
        assert case.passed, f"{case.what}: {case.worst} {case.notes}"
    return sharded, {r.name for r in sharded.plan.replicated}


class Table(nn.Module):
    """A table of words, looked up and used as the head."""

    def __init__(self, look_up: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.words = nn.Parameter(torch.randn(ROWS, WIDTH))
        self.look_up = look_up

    def forward(self, x: Tensor) -> Tensor:
        return self.look_up(self.words, x).tanh() @ self.words.T


LOOKUPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "by index": lambda w, x: w[x],
    "by index from the end": lambda w, x: w[x - ROWS],
    "of rows with two dimensions": lambda w, x: w.view(ROWS, 3, 4)[x].flatten(-2),
    "by selection": lambda w, x: w.index_select(0, x.flatten()).view(*x.shape, -1),
    "by one-hot product": lambda w, x: F.one_hot(x, ROWS).to(w.dtype) @ w,
}


@pytest.mark.parametrize("how", LOOKUPS)
def test_a_lookup_is_a_lookup_however_it_is_spelled(how: str) -> None:
    _, whole = held(lambda: Table(LOOKUPS[how]), torch.randint(ROWS, (2, 5)), 3)
    assert not whole


class Picks(nn.Module):
    """Rows of a value picked by a mask and by several indices are no lookups."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 5, WIDTH))
        self.register_buffer("rows", torch.tensor([1, 4]))
        self.a, self.b = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x + self.table[self.rows, self.rows]).relu())


def test_several_indices_leave_the_rows_whole() -> None:
    assert held(Picks, torch.randn(3, 2, WIDTH), 2)[1] == {"table", "b.bias"}


class Channels(nn.Module):
    """A block of convolutions between two pointwise ops, in space and along a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(3, WIDTH)
        self.i, self.o = nn.Conv2d(WIDTH, 40, 1), nn.Conv2d(40, WIDTH, 3, padding=1)
        self.depth = nn.Conv2d(40, 40, 3, padding=1, groups=40, bias=False)
        self.p, self.q = nn.Conv1d(WIDTH, 30, 1), nn.Conv1d(30, WIDTH, 3, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(F.gelu(self.depth(self.i(self.norm(x)))))
        y = x.flatten(2)
        return y + self.q(F.silu(self.p(y)))


@pytest.mark.parametrize("degree", [2, 3])
def test_channels_are_contracted_by_the_second_convolution(degree: int) -> None:
    sharded, whole = held(Channels, torch.randn(2, WIDTH, 4, 5), degree)
    assert whole == {"norm.weight", "norm.bias", "o.bias", "q.bias"}
    assert len(sharded.program.collectives) == 4, "Megatron's two a block, forward and backward"


class Residual(nn.Module):
    """A feed-forward block that is left out for some samples in training."""

    def __init__(self, path: Callable[[Tensor, float], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.path = path

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu())
        return x + (self.path(y, 0.75) if self.training else y)


def shape(x: Tensor) -> tuple[int, ...]:
    return (x.shape[0], *[1] * (x.dim() - 1))


PATHS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "bernoulli": lambda x, k: x * x.new_empty(shape(x)).bernoulli_(k).div_(k),
    "floor": lambda x, k: x.div(k) * (k + torch.rand(shape(x), dtype=x.dtype, device=x.device)).floor_(),
    "chosen": lambda x, k: torch.where(torch.rand(shape(x), device=x.device) < 1 - k, torch.zeros_like(x), x),
    "less": lambda x, k: x.div(k) * (torch.zeros(shape(x), device=x.device).uniform_(0, 1) < k).float(),
}


@pytest.mark.parametrize("how", PATHS)
def test_stochastic_depth_is_dropout_of_ones(how: str) -> None:
    sharded, whole = held(lambda: Residual(PATHS[how]), torch.randn(2, 5, WIDTH), 2)
    assert whole == {"b.bias"} and "dropout(" in sharded.source


def test_a_mask_that_is_not_scaled_is_refused_with_its_line() -> None:
    with pytest.raises(ModelError, match=r"test_tables.*, a mask of zeros .* 0\.75"):
        capture(lambda: Residual(lambda x, k: x * x.new_empty(shape(x)).bernoulli_(k)), torch.randn(2, 5, WIDTH))
