"""One call of `torch.export`: a model on meta and example inputs in, an ATen graph out, batch and sequence symbolic."""

from __future__ import annotations

import gc
import inspect
import linecache
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from tpcompiler.capture.init import Literals, Recorded
from tpcompiler.capture.whole import whole_operators
from tpcompiler.errors import ModelError

Shapes = tuple[tuple[int, ...], ...]
_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(os.path.dirname(__file__)) + os.sep


@dataclass(frozen=True)
class Traced:
    """What came out, and with which inputs."""

    exported: ExportedProgram
    leaves: tuple[Any, ...]  # the example, flattened
    in_spec: pytree.TreeSpec
    arg_names: tuple[str, ...]  # of the leaves
    held: tuple[str, ...]  # modules traced in eval mode, since they branch on random numbers in training


def trace(recorded: Recorded, example: Any, source: str = "") -> Traced:
    """Export `model` (parameters and buffers on meta) in training mode.

    Sizes of 1, and batch and sequence of one size, would be taken for constants or for each other; so the example is
    traced at other sizes first where it has such, and as it is when the model refuses those.
    """
    model = recorded.model
    args, kwargs = split_example(example)
    leaves, in_spec = pytree.tree_flatten((args, kwargs))
    names = arg_names(model, args, kwargs)
    model.train()
    held: list[str] = []
    error: Exception | None = None
    for shapes in candidate_shapes([tuple(x.shape) for x in leaves if isinstance(x, Tensor)]):
        while True:
            try:
                with Literals(recorded.tape):
                    exported = _export(model, leaves, in_spec, shapes)
                return Traced(exported, tuple(leaves), in_spec, names, tuple(held))
            except Exception as e:  # whatever the model's own code raises
                name = _drawing_module(model, e)
                if name is None or name in held:
                    error = e
                    break
                held.append(name)
                model.get_submodule(name).training = False
    assert error is not None
    raise _explain(error, source) from error


def split_example(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of an example: a tensor, a tuple, a dictionary, or (tuple, dictionary)."""
    if isinstance(example, dict):
        return (), dict(example)
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, (tuple, list)):
        if len(example) == 2 and isinstance(example[0], tuple) and isinstance(example[1], dict):
            return tuple(example[0]), dict(example[1])
        return tuple(example), {}
    raise ModelError(
        f"example inputs are a {type(example).__name__}; give a tuple of positional arguments, a dictionary of "
        "keyword arguments, or (tuple, dictionary)"
    )


def arg_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    """The forward's own names of the flattened inputs: `ids`, or `state.0` inside of a container."""
    parameters = inspect.signature(model.forward).parameters.values()
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    out = []
    for path, _ in pytree.tree_flatten_with_path((args, kwargs))[0]:
        first, *rest = [getattr(k, "idx", getattr(k, "key", getattr(k, "name", None))) for k in path[1:]]
        if path[0] == pytree.SequenceKey(0):
            first = positional[first] if first < len(positional) else f"args.{first}"
        out.append(".".join(map(str, (first, *rest))))
    return tuple(out)


def candidate_shapes(shapes: list[tuple[int, ...]]) -> Iterator[Shapes]:
    """Shapes to trace with, best first; the example's own last.

    Dimensions of one size at one position are taken for one thing (the batch of all inputs); at different positions for
    different things, so all but the last position get another size. Then without that, then as it is.
    """
    seen: set[Shapes] = set()
    for apart in (True, False):
        taken = {n for s in shapes for n in s}
        new: dict[tuple[int, int], int] = {}
        last: dict[int, int] = {}
        for s in shapes:
            for i, n in enumerate(s):
                last[n] = max(last.get(n, 0), i)
        for s in shapes:
            for i, n in enumerate(s):
                key = (n, i) if apart else (n, 0)
                if key not in new and (n == 1 or (apart and i != last[n])):
                    size = n + 1
                    while size in taken:
                        size += 1
                    taken.add(size)
                    new[key] = size
        out = tuple(tuple(new.get((n, i) if apart else (n, 0), n) for i, n in enumerate(s)) for s in shapes)
        if out not in seen:
            seen.add(out)
            yield out
    if tuple(shapes) not in seen:
        yield tuple(shapes)


def _export(model: nn.Module, leaves: list[Any], spec: pytree.TreeSpec, shapes: Shapes) -> ExportedProgram:
    dynamic = ShapesCollection()
    sizes = iter(shapes)
    inputs = []
    for x in leaves:
        if isinstance(x, Tensor):  # each a tensor of its own: export merges two inputs that are one object
            x = torch.empty(next(sizes), dtype=x.dtype, device="meta", requires_grad=x.requires_grad)
            dynamic[x] = {i: Dim.AUTO for i in range(x.ndim)}
        inputs.append(x)
    args, kwargs = pytree.tree_unflatten(inputs, spec)
    with _no_collection(), whole_operators():
        dynamic_shapes = dynamic.dynamic_shapes(model, args, kwargs)
        return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Tracing makes millions of small objects that all live on: collecting garbage meanwhile costs a fifth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _drawing_module(model: nn.Module, error: Exception) -> str | None:
    """The module, in training mode, whose own forward branches on the values of a tensor (layerdrop)."""
    names = {id(m.__dict__): name for name, m in model.named_modules()}
    for e in _chain(error):
        if isinstance(e, GuardOnDataDependentSymNode):
            for frame, _ in reversed(list(traceback.walk_tb(e.__traceback__))):
                module = frame.f_locals.get("self")
                if frame.f_code.co_filename.startswith(_TORCH) or not isinstance(module, nn.Module):
                    continue
                name = names.get(id(module.__dict__))
                return name if name is not None and module.training else None
    return None


def _explain(error: Exception, source: str) -> ModelError:
    """One line: the user's own line where tracing stopped, and why."""
    where = source or "the model"
    for e in _chain(error):
        frames = [f for f in traceback.extract_tb(e.__traceback__) if not f.filename.startswith((_TORCH, _HERE))]
        if frames:
            f = frames[-1]
            where = f"{f.filename}:{f.lineno}: {linecache.getline(f.filename, f.lineno or 0).strip()}"
            break
    data_dependent = any(isinstance(e, GuardOnDataDependentSymNode) for e in _chain(error))
    why = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if data_dependent or "item()" in why:
        why = "the model's path depends on the values of a tensor; use torch.where, or an argument that is a Python number"
    return ModelError(f"{where}: cannot be traced: {why}")
