"""Verdicts kept on disk: a program that was proven once is not proven again, by no other rank and by no resumed run.

A verdict's name is a digest of everything that it depends on: both graphs, layouts and parameters, the mesh, the
emitted source, the versions of torch and Python, and the text of the checker, of the runtime and of what both rest on.
Only proofs are kept. A refusal is worked out again.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from tpcompiler.check.report import CheckReport
from tpcompiler.check.sizes import hints
from tpcompiler.program import Capture, Program

_ROOT = Path(__file__).resolve().parent.parent
_JUDGES = ("check", "runtime", "execute", "layout.py", "program.py", "graphs.py", "errors.py")


def digest(program: Program, source: str | None) -> str:
    """Names what is proven and by what."""
    made = sha256(_judges().encode())
    for part in _parts(program, source):
        made.update(part.encode("utf-8", "surrogatepass"))
        made.update(b"\0")
    return made.hexdigest()


def recall(name: str) -> CheckReport | None:
    """The proof of that name, if there is one; what cannot be read is none."""
    try:
        kept = json.loads(_path(name).read_text())
        return CheckReport(int(kept["nodes"]), int(kept["distinct_steps"]), 0.0, (), tuple(map(str, kept["ran"])))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(name: str, report: CheckReport) -> None:
    """Writes a proof down, whole or not at all. A refusal is not kept, and a full or closed disk is no error."""
    if not report.passed:
        return
    path = _path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, new = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w") as f:
            json.dump({"nodes": report.nodes, "distinct_steps": report.distinct_steps, "ran": report.ran}, f)
        os.replace(new, path)
    except OSError:
        return


def _path(name: str) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "tpcompiler" / "proven" / f"{name}.json"


@cache
def _judges() -> str:
    """A digest of everything that has a say in a verdict."""
    made = sha256(f"{torch.__version__} {torch.version.git_version} {platform.python_version()}".encode())
    for name in _JUDGES:
        path = _ROOT / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            made.update(file.relative_to(_ROOT).as_posix().encode())
            made.update(file.read_bytes())
    return made.hexdigest()


def _parts(program: Program, source: str | None) -> Iterator[str]:
    yield f"{source is None}{source}"
    yield f"{program.mesh!r}{sorted(program.left_sharded)}{sorted(program.taught)}"
    for name, dims in sorted(program.dims.items()):
        yield f"{name}{dims!r}"
    yield from _of_capture(program.capture)
    yield from _of_graph(program.graph)


def _of_capture(capture: Capture) -> Iterator[str]:
    for p in capture.parameters:
        kind = (p.trainable, p.buffer, p.persistent)
        yield f"{p.name} {p.node} {p.shape} {p.dtype} {p.aliases} {kind}"
    yield f"{capture.inputs}{capture.in_spec}{capture.out_spec}{capture.input_leaves!r}{capture.model}"
    yield repr(sorted((str(symbol), hint) for symbol, hint in hints(capture).items()))
    yield from _of_graph(capture.graph)


def _of_graph(graph: fx.Graph) -> Iterator[str]:
    for node in graph.nodes:
        target = node.target
        named = target if isinstance(target, str) else f"{getattr(target, '__module__', '')}.{target!s}"
        if callable(target) and not isinstance(target, torch._ops.OpOverload):
            named = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', target)}"
        yield f"{node.op} {node.name} {named} {_said(node.args)} {_said(node.kwargs)} {_said(node.meta.get('val'))}"
        yield repr(getattr(node.meta.get("placed"), "layouts", ()))


def _said(a: Any) -> str:
    """An argument or a value in words that are the same in every process."""
    if isinstance(a, Tensor):
        return f"<{a.dtype} {[str(n) for n in a.shape]}>"
    if isinstance(a, fx.Node):
        return f"%{a.name}"
    if isinstance(a, dict):
        return "{" + ",".join(f"{k}:{_said(v)}" for k, v in a.items()) + "}"
    if isinstance(a, (tuple, list)):
        return f"{type(a).__name__}(" + ",".join(map(_said, a)) + ")"
    if isinstance(a, slice):
        return f"slice({_said(a.start)},{_said(a.stop)},{_said(a.step)})"
    return str(a) if isinstance(a, (torch.SymInt, torch.SymFloat, torch.SymBool)) else f"{type(a).__name__}:{a!r}"
