"""What modules ask of torch that it does not answer on meta, or only by a tensor's values, answered so as to hold for
any values on any device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from tpcompiler.capture.private_tracing import without_peeks_at_masks


@contextmanager
def answers() -> Iterator[None]:
    """While it lasts, autocast's switches take meta as they would take the CPU, and `nn.Transformer` does not look
    whether a mask that it is given is the causal one."""
    autocast = torch.amp.autocast_mode.autocast
    with (
        mock.patch.object(autocast, "__init__", _as_on_cpu(autocast.__init__, 1)),
        mock.patch.object(torch, "is_autocast_enabled", _as_on_cpu(torch.is_autocast_enabled, 0)),
        mock.patch.object(torch, "get_autocast_dtype", _as_on_cpu(torch.get_autocast_dtype, 0)),
        without_peeks_at_masks(),
    ):
        yield


def _as_on_cpu(function: Any, position: int) -> Any:
    """`function`, told "cpu" where its argument `device_type` at `position` says meta."""

    def asked(*args: Any, **kwargs: Any) -> Any:
        if args[position : position + 1] == ("meta",):
            args = (*args[:position], "cpu", *args[position + 1 :])
        if kwargs.get("device_type") == "meta":
            kwargs["device_type"] = "cpu"
        return function(*args, **kwargs)

    return asked
