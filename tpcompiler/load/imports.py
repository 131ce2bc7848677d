"""Imports a user's file with its siblings and its package, and leaves nothing of them in `sys` afterwards."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType

from tpcompiler.errors import ModelError
from tpcompiler.spec.located import one_line

_ALONE = "tpc_model_"  # prefix of the module name of a file outside of packages, so that `random.py` is not `random`


class Importer:
    """A context manager in which the imports of a user's file work. After it, `sys` is as before.

    It can be nested and entered again, and then gives the same modules. Two files that import siblings of one name,
    such as `layers.py`, never get each other's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.root = _root(path)
        self._modules: dict[str, ModuleType] = {}
        self._open: list[tuple[set[str], bool]] = []

    def __enter__(self) -> Importer:
        self._open.append((set(sys.modules), sys.dont_write_bytecode))
        sys.dont_write_bytecode = True
        sys.path.insert(0, str(self.root))
        importlib.invalidate_caches()
        for name, module in self._modules.items():
            sys.modules.setdefault(name, module)
        return self

    def __exit__(self, *_: object) -> None:
        before, sys.dont_write_bytecode = self._open.pop()
        if str(self.root) in sys.path:
            sys.path.remove(str(self.root))
        for name, module in list(sys.modules.items()):
            if name not in before and _lies_in(module, name, self.root):
                self._modules[name] = sys.modules.pop(name)

    def load(self) -> ModuleType:
        """The file's module, under its full name if it lies in a package. Raises `ModelError` when its import fails."""
        whole = self.path.resolve()
        parts = whole.relative_to(self.root).with_suffix("").parts
        try:
            if len(parts) > 1:
                return self._in_package(".".join(parts).removesuffix(".__init__"), whole)
            spec = importlib.util.spec_from_file_location(_ALONE + parts[0], whole)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
            return module
        except (KeyboardInterrupt, ModelError):
            raise
        except BaseException as e:  # SystemExit too, which a script raises that was meant to be run
            raise failure(e, self.path, "cannot be imported: ") from e

    def _in_package(self, name: str, whole: Path) -> ModuleType:
        module = importlib.import_module(name)
        if Path(module.__file__ or "").resolve() != whole:
            raise ModelError(f"{self.path}: another module is already called {name}; rename the package")
        return module


def failure(error: BaseException, path: Path, doing: str = "") -> ModelError:
    """The error for an exception in the user's code, in one line: its file, its line, and what it says."""
    if isinstance(error, SyntaxError) and error.filename:
        return ModelError(f"{_shown(error.filename)}:{error.lineno}: not Python: {one_line(error.msg)}")
    root = str(_root(path)) + os.sep
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(root)]
    own = [f for f in frames if "site-packages" not in f.filename[len(root) :]]
    place = f"{_shown(own[-1].filename)}:{own[-1].lineno}" if own else str(path)
    if isinstance(error, SystemExit):
        said = "it ends the program (sys.exit); put what is meant to be run under `if __name__ == '__main__':`"
    else:
        said = f"{type(error).__name__}: {one_line(str(error))}".removesuffix(": ")
    return ModelError(f"{place}: {doing}{said}")


def _root(path: Path) -> Path:
    """The directory that the file's imports start from: its own, or the one around the package that it lies in."""
    root = path.resolve().parent
    while (root / "__init__.py").exists() and root.parent != root:
        root = root.parent
    return root


def _lies_in(module: ModuleType, name: str, root: Path) -> bool:
    """Whether the module was found in `root` itself, and not in a virtual environment below it, for example."""
    file = getattr(module, "__file__", None)
    if file is None:  # a namespace package: a directory without __init__.py
        return any(Path(p) == root / Path(*name.split(".")) for p in getattr(module, "__path__", ()))
    base = root / Path(*name.removeprefix(_ALONE).split("."))
    return Path(file) in (base.with_name(base.name + ".py"), base / "__init__.py")


def _shown(file: str) -> str:
    """A path as the user would write it: relative if it lies below the current directory."""
    try:
        return str(Path(file).relative_to(Path.cwd()))
    except ValueError:
        return file
