"""Questions that torch's own modules ask of a tensor's values only to find a faster way, answered so as to hold for all
values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch.nn.modules import transformer


@contextmanager
def no_questions() -> Iterator[None]:
    """While it lasts, `nn.Transformer` does not look whether a mask that it is given is the causal one."""
    with mock.patch.object(transformer, "_detect_is_causal_mask", _is_causal):
        yield


def _is_causal(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
    """What the caller says. A mask that was given is applied either way."""
    return is_causal is True
