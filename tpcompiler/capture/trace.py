"""One call of `torch.export`: a model on meta and example inputs in, an ATen graph out, batch and sequence symbolic."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import InputKind

from tpcompiler.capture.caches import without_caches
from tpcompiler.capture.draws import Draws
from tpcompiler.capture.guards import Guards
from tpcompiler.capture.image_sizes import Places, image_sizes
from tpcompiler.capture.init import Recorded
from tpcompiler.capture.kept import as_it_was
from tpcompiler.capture.lean import lean_tracing, whole_operators
from tpcompiler.capture.own_backward import own_backwards
from tpcompiler.capture.own_dtype import OWN, SHOWN, can_follow, lowered
from tpcompiler.capture.private_tracing import pytree
from tpcompiler.capture.recording import Literals
from tpcompiler.capture.refusals import CannotTrace, chain, explain
from tpcompiler.capture.stand_ins import answers
from tpcompiler.capture.two_runs import Results, alike, alike_but_casts
from tpcompiler.errors import ModelError

Shapes = tuple[tuple[int, ...], ...]
LONGER = (1, 8209, 4)  # times the example: as it is, beyond a model's constants, and what fails there


@dataclass(frozen=True)
class Traced:
    """The result of tracing, and the inputs that it was traced with."""

    exported: ExportedProgram  # in training mode
    evaluated: ExportedProgram | None  # in evaluation mode; None if only dropout differs
    leaves: tuple[Any, ...]  # the example, flattened
    in_spec: pytree.TreeSpec
    arg_names: tuple[str, ...]  # of the leaves
    low: bool  # traced in bfloat16, in float32's place


def trace(recorded: Recorded, example: Any, source: str = "", own: bool = True) -> Traced:
    """Export a model in training mode, and in evaluation mode unless that is known to give the same.

    Sizes of 1, and batch and sequence of one size, would be taken for constants or for each other; so the example is
    traced at other sizes first where it has such, and as it is when the model refuses those. `own`: a float32 model is
    traced in bfloat16 where that shows which casts are its own (`own_dtype.py`).
    """
    model = without_caches(recorded.model)
    args, kwargs = split_example(example)
    names = arg_names(model, args, kwargs, source)
    leaves, in_spec = pytree.tree_flatten((args, kwargs))
    example_shapes = tuple(tuple(x.shape) for x in leaves if isinstance(x, Tensor))
    error: Exception | None = None
    images = image_sizes([x for x in leaves if isinstance(x, Tensor)])
    for shapes in candidate_shapes(example_shapes, images):
        known: Results = {}
        ways = (True, False) if own and _follows(recorded, leaves, in_spec, shapes, known) else (False,)
        for way in ways:
            try:
                with _named_keywords(model, kwargs), lowered(model) if way else nullcontext():
                    exported, evaluated = _both(recorded, leaves, in_spec, shapes, images, way, known)
                if _fits(exported, example_shapes):
                    return Traced(exported, evaluated, tuple(leaves), in_spec, names, way)
                break
            except Exception as e:  # whatever the model's own code raises
                error = e
        if error is not None and any(isinstance(cause, CannotTrace) for cause in chain(error)):
            break
    assert error is not None
    raise explain(error, source, "cannot be traced", _files(model)) from error


def _both(
    recorded: Recorded,
    leaves: list[Any],
    spec: pytree.TreeSpec,
    shapes: Shapes,
    fixed: Places,
    low: bool,
    known: Results,
) -> tuple[ExportedProgram, ExportedProgram | None]:
    """The model in training, and in evaluation where that may differ."""
    exported = _in_mode(recorded, True, leaves, spec, shapes, fixed, low)
    if also := _fixed_elsewhere(exported, fixed):
        fixed |= also
        exported = _in_mode(recorded, True, leaves, spec, shapes, fixed, low)
    with _written_down(recorded, spec) as run:

        def at(sizes: Shapes) -> Callable[[], Any]:
            return lambda: run(_stand_ins(leaves, sizes, low))

        same = alike(recorded.model, recorded.tape, [at(_longer(exported, times)) for times in LONGER], known)
    return exported, None if same else _in_mode(recorded, False, leaves, spec, shapes, fixed, low)


def _follows(recorded: Recorded, leaves: list[Any], spec: pytree.TreeSpec, shapes: Shapes, known: Results) -> bool:
    """Whether a trace in bfloat16 says what the model does in float32 as well."""
    if not can_follow(recorded.model):
        return False
    plain, low = (_stand_ins(leaves, shapes, way) for way in (False, True))
    with _written_down(recorded, spec) as run:
        return alike_but_casts(recorded.model, recorded.tape, run, plain, low, known)


@contextmanager
def _written_down(recorded: Recorded, spec: pytree.TreeSpec) -> Iterator[Callable[[list[Any]], Any]]:
    def run(inputs: list[Any]) -> Any:
        args, kwargs = pytree.tree_unflatten(inputs, spec)
        return recorded.model(*args, **kwargs)

    with Literals(recorded.tape), Draws(), Guards(), torch.device("meta"), own_backwards(), answers():
        yield run


def _longer(exported: ExportedProgram, times: int) -> Shapes:
    """The traced shapes with every size that the model leaves free `times` as large. Different sizes stay different."""
    shapes: list[Any] = [val.shape for val in _inputs(exported)]
    free = [n.node for shape in shapes for n in shape if not _fixed(n) and n.node.expr.is_symbol]
    new = {node.expr: node.hint * times + (times > 1) for node in free}

    def size(n: Any) -> int:
        if _fixed(n):
            return int(n)
        known = n.node.expr.free_symbols <= new.keys()
        return int(n.node.expr.subs(new) if known else n.node.hint)

    return tuple(tuple(map(size, shape)) for shape in shapes)


def _in_mode(recorded: Recorded, training: bool, *how: Any) -> ExportedProgram:
    recorded.model.train(training)
    with Literals(recorded.tape), Draws(), Guards(), as_it_was(recorded.model):
        return _export(recorded.model, *how)


def split_example(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments of an example: a tensor, a tuple, a dictionary, or (tuple, dictionary)."""
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


def arg_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], source: str = "") -> tuple[str, ...]:
    """The forward's own names of the flattened inputs: `ids`, or `state.0` inside of a container.

    Errors: `ModelError` when the forward does not take these arguments.
    """
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ModelError(
            f"{source or type(model).__name__}: the example inputs do not fit forward{signature}: {error}"
        ) from None
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [p.name for p in signature.parameters.values() if p.kind in kinds]
    others = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_POSITIONAL), "args")
    out = []
    for path, _ in pytree.tree_flatten_with_path((args, kwargs))[0]:
        parts: list[Any] = [getattr(k, "idx", getattr(k, "key", getattr(k, "name", ""))) for k in path]
        if parts[0] == 0:
            i = parts[1]
            parts[1] = positional[i] if i < len(positional) else f"{others}_{i - len(positional)}"
        out.append(".".join(map(str, parts[1:])))
    return tuple(out)


def candidate_shapes(shapes: Shapes, fixed: Places = frozenset()) -> Iterator[Shapes]:
    """Shapes to trace with, best first; the example's own last. `fixed` dimensions keep their sizes.

    Dimensions of one size at one position are taken for one thing (the batch of all inputs); at different positions for
    different things, so all but the last position get another size. Then without that, then as it is.
    """
    seen: set[Shapes] = set()
    last: dict[int, int] = {}
    for s in shapes:
        for i, n in enumerate(s):
            last[n] = max(last.get(n, 0), i)
    for apart in (True, False):
        taken = {n for s in shapes for n in s}
        new: dict[tuple[int, int], int] = {}
        for n, i in sorted({(n, i if apart else 0) for s in shapes for i, n in enumerate(s)}):
            if n == 1 or (apart and n > 1 and i != last[n]):
                size = next(m for m in range(n + 1, n + len(taken) + 2) if m not in taken)
                taken.add(size)
                new[n, i] = size
        candidate = tuple(
            tuple(n if (k, i) in fixed else new.get((n, i if apart else 0), n) for i, n in enumerate(s))
            for k, s in enumerate(shapes)
        )
        if candidate not in seen:
            seen.add(candidate)
            yield candidate
    if shapes not in seen:
        yield shapes


def _export(
    model: nn.Module, leaves: list[Any], spec: pytree.TreeSpec, shapes: Shapes, fixed: Places, low: bool
) -> ExportedProgram:
    dynamic = ShapesCollection()
    inputs = _stand_ins(leaves, shapes, low)
    for k, x in enumerate(x for x in inputs if isinstance(x, Tensor)):
        dynamic[x] = {i: Dim.STATIC if (k, i) in fixed else Dim.AUTO for i in range(x.ndim)}
    args, kwargs = pytree.tree_unflatten(inputs, spec)
    with (
        torch.device("meta"),  # `torch.arange(n)` without a device goes along
        lean_tracing(),
        whole_operators(),
        own_backwards(),
        answers(),
    ):
        dynamic_shapes = dynamic.dynamic_shapes(model, args, kwargs)
        return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)


def _stand_ins(leaves: list[Any], shapes: Shapes, low: bool) -> list[Any]:
    """The inputs on meta. Each is a tensor of its own, because export merges two inputs that are one object."""
    sizes = iter(shapes)

    def stand_in(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        dtype = OWN if low and x.dtype == SHOWN else x.dtype
        return torch.empty(next(sizes), dtype=dtype, device="meta", requires_grad=x.requires_grad)

    return list(map(stand_in, leaves))


@contextmanager
def _named_keywords(model: nn.Module, kwargs: dict[str, Any]) -> Iterator[None]:
    """While it lasts, the forward names the keywords that it takes by `**`: export loses count of them otherwise."""
    forward = model.forward
    signature = inspect.signature(forward)
    extra = [k for k in kwargs if k not in signature.parameters]
    if not extra or "forward" in vars(model):
        yield
        return

    @wraps(forward)
    def named(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    added = [inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY) for k in extra]
    named.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
    model.forward = named
    try:
        yield
    finally:
        del model.forward


def _fits(exported: ExportedProgram, shapes: Shapes) -> bool:
    """Whether the sizes that the model fixes are the example's."""
    return all(
        isinstance(n, torch.SymInt) or n == wanted
        for val, shape in zip(_inputs(exported), shapes, strict=True)
        for n, wanted in zip(val.shape, shape, strict=True)
    )


def _fixed_elsewhere(exported: ExportedProgram, fixed: Places) -> Places:
    """Dimensions left open although another input has one of that size at that position, which the model fixed: a loop
    over the tokens fixes the sequence, and the labels have the same."""
    shapes = [val.shape for val in _inputs(exported)]
    places = ((k, i, n) for k, shape in enumerate(shapes) for i, n in enumerate(shape) if (k, i) not in fixed)
    known = {(i, int(n)) for _, i, n in places if _fixed(n)}
    opened = ((k, i, n) for k, shape in enumerate(shapes) for i, n in enumerate(shape) if not _fixed(n))
    return frozenset((k, i) for k, i, n in opened if (i, n.node.hint) in known)  # type: ignore[attr-defined]


def _fixed(n: int | torch.SymInt) -> bool:
    return isinstance(n, int) or bool(n.node.expr.is_number)


def _inputs(exported: ExportedProgram) -> list[Tensor]:
    nodes = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
    specs = (s for s in exported.graph_signature.input_specs if s.kind is InputKind.USER_INPUT)
    return [v for s in specs if isinstance(v := nodes[s.arg.name].meta.get("val"), Tensor)]


def _files(model: nn.Module) -> frozenset[str]:
    """The files that define the model's own modules."""
    own = {type(m) for m in model.modules() if not type(m).__module__.startswith("torch.")}
    return frozenset(f for c in own for k in c.__mro__ if (f := _file_of(k)) is not None)


def _file_of(cls: type) -> str | None:
    forward = vars(cls).get("forward")
    code = getattr(inspect.unwrap(forward), "__code__", None) if callable(forward) else None
    return code.co_filename if code is not None and not cls.__module__.startswith("torch.") else None
