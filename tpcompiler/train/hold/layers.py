"""The layers of an emitted program."""

from __future__ import annotations

from torch import nn


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The layers of an emitted program: the outermost modules, below the root, of classes that it defines itself."""
    emitted = type(module).__module__
    found: list[nn.Module] = []

    def visit(m: nn.Module) -> None:
        for child in m.children():
            if type(child).__module__ == emitted:
                found.append(child)
            else:
                visit(child)

    visit(module)
    return list(dict.fromkeys(found))
