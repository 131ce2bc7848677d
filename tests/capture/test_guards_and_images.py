"""Branches on whether a mask has any element set, and the sizes of images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tpcompiler.capture import capture
from tpcompiler.capture.image_sizes import image_sizes
from tpcompiler.errors import ModelError, TpcWarning
from tpcompiler.verification.source_model import same_as_module


class Padded(nn.Module):
    """Padding that is left out of account where there is none."""

    def __init__(self, loop: bool = False) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.loop = loop

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        padding: Tensor | None = mask == 0
        y: Tensor = self.a(x)
        if not padding.any():  # type: ignore[union-attr]
            padding = None
        if padding is not None:
            y = y.masked_fill(padding[..., None], 0)
        while self.loop and (y > 0).any():
            y = y - 1
        return y


def test_a_guard_takes_the_branch_that_holds_for_all_masks_and_says_so() -> None:
    x, some, none = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1] * 5]), torch.ones(2, 5, dtype=torch.int64)
    with pytest.warns(TpcWarning, match=r"if not padding.any\(\):.* one branch is traced"):
        captured = capture(Padded, (x, none))
    for mask in (some, none):
        assert all(c.passed for c in same_as_module(captured, Padded(), (x, mask), True))


@pytest.mark.filterwarnings("ignore::tpcompiler.errors.TpcWarning")
def test_a_loop_that_goes_on_while_any_element_is_set_is_refused_with_its_line() -> None:
    with pytest.raises(ModelError, match=r"while self\.loop"):
        capture(lambda: Padded(True), (torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.int64)))


def test_height_and_width_are_those_of_real_inputs_that_no_sequence_has() -> None:
    image, ids, mask = torch.randn(2, 3, 32, 24), torch.zeros(2, 7, dtype=torch.int64), torch.zeros(2, 1, 7, 7)
    assert image_sizes([image, ids, mask]) == {(0, 2), (0, 3)}
    assert image_sizes([torch.randn(2, 7, 8)]) == frozenset()


class Windows(nn.Module):
    """Windows of an image folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.a = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x)
        b, c, h, w = x.shape
        x = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, c)
        y: Tensor = self.a(x)
        return y.view(b, -1, c).mean(1)


def test_images_keep_their_size_and_the_batch_stays_open() -> None:
    captured = capture(Windows, torch.randn(2, 3, 32, 32))
    (given,) = (n for n in captured.graph.nodes if n.op == "placeholder" and n.name in captured.inputs)
    batch, *rest = given.meta["val"].shape
    assert isinstance(batch, torch.SymInt) and rest == [3, 32, 32]
    for size in (2, 3):
        assert all(c.passed for c in same_as_module(captured, Windows(), torch.randn(size, 3, 32, 32), True))
