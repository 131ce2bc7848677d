"""Runs emitted source as a module, without a file."""

from __future__ import annotations

import linecache
import sys
from types import ModuleType


def load_source(text: str, name: str = "emitted") -> ModuleType:
    """Runs `text` as a new module in `sys.modules` whose lines inspect, tracebacks and torch.compile can see."""
    module = ModuleType(name)
    module.__file__ = f"<{name}>"
    linecache.cache[module.__file__] = (len(text), None, text.splitlines(keepends=True), module.__file__)
    sys.modules[name] = module
    exec(compile(text, module.__file__, "exec"), module.__dict__)
    return module
