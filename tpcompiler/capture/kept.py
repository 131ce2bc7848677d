"""What a forward keeps in its modules for the next call (a mask, a table of positions): gone when the trace ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_REGISTERED = ("_parameters", "_buffers", "_modules")


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """While it lasts, a forward may keep values in its modules; at the end they hold what they held before."""
    held = {m: (dict(vars(m)), {k: dict(vars(m)[k]) for k in _REGISTERED}) for m in model.modules()}
    try:
        yield
    finally:
        for module, (own, registered) in held.items():
            vars(module).clear()
            vars(module).update(own)
            for k, items in registered.items():
                vars(module)[k].clear()
                vars(module)[k].update(items)
