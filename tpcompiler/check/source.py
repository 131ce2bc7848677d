"""Reads the emitted source again: for every rank and in both modes it must do what the proven graph does.

The text is first read as a language of its own (`grammar.py`), in which only the sizes and rows that constructors keep
depend on the rank. It is then run on tensors without values, once for each class of ranks with equal sizes, and every
call becomes a term. Its outputs and its collectives must be the graph's terms.
"""

from __future__ import annotations

import ast
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily
from torch.utils import _pytree as pytree

from tpcompiler.check.calls import runtime_signature
from tpcompiler.check.claims import Geometry
from tpcompiler.check.decompose import Decomposer, TensorSlot
from tpcompiler.check.fields import Fields, fields_of
from tpcompiler.check.forward import Refused, line_of
from tpcompiler.check.grammar import Guarded, read_source
from tpcompiler.check.interface import compare_signature, compare_structure
from tpcompiler.check.normal_form import OPEN, Forms
from tpcompiler.check.one_rank import OneGraph, OneRank, RankClass, RankRows, rank_classes
from tpcompiler.check.report import Refusal
from tpcompiler.check.samples_apart import in_halves
from tpcompiler.check.sizes import Sizes, choices, made_of, short
from tpcompiler.check.source_state import compare_state, without_state
from tpcompiler.check.terms import Term, children, described
from tpcompiler.check.translate import all_nonzero
from tpcompiler.program import InputLeaf, Program, Training
from tpcompiler.runtime import Group, Ranks, Rng

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "Eq": operator.eq, "NotEq": operator.ne, "Lt": operator.lt, "LtE": operator.le, "Gt": operator.gt,
    "GtE": operator.ge, "Mod": operator.mod, "FloorDiv": operator.floordiv,
    "LShift": operator.lshift, "RShift": operator.rshift,
    "BitAnd": operator.and_, "BitOr": operator.or_, "BitXor": operator.xor, "In": lambda a, b: a in b,
    "Is": operator.is_, "IsNot": operator.is_not,
}  # fmt: skip
_ASKING = {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__, Tensor.ndimension}


def compare_source(program: Program, text: str, geometry: Geometry, taken: set[int]) -> None:
    """Raises `Refused` for the first difference between the source and the graph."""
    try:
        with all_nonzero():
            _compare(program, text, geometry, taken)
    except Refused:
        raise
    except Exception as e:  # such as a constructor that fails
        raise Refused(Refusal("the source", "", "a module that can be built", f"{type(e).__name__}: {e}")) from None


def _compare(program: Program, text: str, geometry: Geometry, taken: set[int]) -> None:
    tree = read_source(text)
    fields = fields_of(tree, geometry)
    kept = [
        tuple(v[r] for of in fields.values() for v in of.values() if isinstance(v[r], int))
        for r in range(geometry.size)
    ]
    names: dict[str, Any] = {"__name__": "emitted", "_compared": _comparison(program)}
    guarded = ast.fix_missing_locations(Guarded().visit(tree))
    try:
        exec(compile(guarded, "<emitted>", "exec"), names)
    except Exception as e:
        raise Refused(Refusal("the source", "", "a module", f"{type(e).__name__}: {e}")) from None
    modal = "training" in text or _has_modes(program.graph)
    sizes = tuple(choices(program.capture, taken, geometry.size, made_of(_integers(tree, kept))))
    order: dict[bool, list[str]] = {}
    cuts: set[int] = set()
    for i, ranks in enumerate(rank_classes(program, geometry, kept)):
        for graph in _graphs(program, geometry, ranks, sizes, 2 if modal or not i else 1):
            run = _Run(program, names, fields, graph)
            run.compare(order)
            cuts |= run.cuts
        if not i:
            for graph in _short_graphs(program, geometry, ranks, cuts, ".squeeze(" in text):
                _Run(program, names, fields, graph).compare({})


def _graphs(
    program: Program, geometry: Geometry, ranks: RankClass, lengths: Sequence[Sizes], most: int
) -> Iterator[OneGraph]:
    """The graph in evaluation, at the first lengths at which it can be read, then in training, at the next lengths.

    A length is preferred that is no number of the source, and no sum or difference of two of them.
    """
    found = 0
    failure = ""
    for sizes in (*lengths, *lengths):
        try:
            graph = OneGraph(program, OneRank(Forms(), geometry, ranks), sizes, training=bool(found))
        except Exception as e:
            failure = f"{type(e).__name__}: {e}"
            continue
        yield graph
        found += 1
        if found == most:
            return
    raise Refused(Refusal("the program", "", "a graph that can be read", failure))


def _short_graphs(
    program: Program, geometry: Geometry, ranks: RankClass, cuts: set[int], squeezes: bool
) -> Iterator[OneGraph]:
    """The graph in evaluation at short lengths, where it can be read: slices may be empty or whole there. A single
    element is what only a squeeze takes for something else."""
    for sizes in short(program.capture, cuts, ones=squeezes):
        try:
            yield OneGraph(program, OneRank(Forms(), geometry, ranks), sizes, training=False)
        except Exception:  # the model itself does not take this length
            continue


def _integers(tree: ast.Module, kept: Sequence[tuple[int, ...]]) -> set[int]:
    """Every integer that the source contains or that a constructor keeps on some rank."""
    written = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and type(n.value) is int}
    return written.union(*kept)


def _has_modes(graph: fx.Graph) -> bool:
    """Whether the graph does different things in training and in evaluation."""
    found: list[Any] = []
    for node in graph.nodes:
        fx.node.map_aggregate((node.args, node.kwargs), lambda a: found.append(a) if isinstance(a, Training) else a)
    return bool(found)


def _comparison(program: Program) -> Callable[[str, Any, Any], Any]:
    divides = {getattr(n.target, "__name__", "") for n in program.graph.nodes if n.op == "call_function"}

    def compared(name: str, a: Any, b: Any) -> Any:
        allowed = {"FloorDiv": "floordiv", "Mod": "mod"}.get(name, "") in divides
        if not isinstance(a, Tensor) and not isinstance(b, Tensor) and not allowed:
            what = f"{name} of sizes"
            raise Refused(Refusal("the source", "", "no comparison or division of sizes", what))
        return _OPERATORS[name](a, b)

    return compared


class _Run:
    """Runs the source on one rank and compares it with the graph."""

    def __init__(self, program: Program, names: dict[str, Any], fields: Fields, graph: OneGraph) -> None:
        self.program = program
        self.names = names
        self.fields = fields
        self.graph = graph
        self.translator = graph.translator
        self.known: set[Term] = set()
        self.cuts: set[int] = set()  # the numbers at which the source slices, and the graph does not
        self.where = f"rank {self.translator.ranks.first}, {'training' if graph.training else 'evaluation'}"

    def compare(self, order: dict[bool, list[str]]) -> None:
        """`order`: what the ranks before this one sent, one thing after the other, in each mode."""
        translator = self.translator
        recorder = _Recorder(translator)
        self.names["Halves"] = in_halves(recorder.operator)
        with torch.device("meta"):
            model: nn.Module = self.names["Model"](_alone(translator.geometry, translator.ranks.first), _RNG)
        without_state(model, _RNG)
        compare_signature(self.program.capture, model)
        model.train(self.graph.training)
        parameters = compare_state(self.program, translator.geometry, translator.ranks.first, model)
        self._rows(model)
        for t, node in parameters:
            recorder.learn(t, self.graph.leaves[node])
        args, kwargs = self._arguments(recorder)
        translator.restart()
        hidden = {k: v for k, v in self.names.items() if callable(v) and runtime_signature(v) is not None}
        try:
            self.names.update({k: recorder.operator(v) for k, v in hidden.items()})
            with recorder:
                result = model(*args, **kwargs)
        except Refused:
            raise
        except Exception as e:
            raise Refused(Refusal("the source", "", "a forward that runs", f"{type(e).__name__}: {e}")) from None
        finally:
            self.names.update(hidden)
        compare_structure(self.program.capture, result)
        found = [recorder.known(t) if isinstance(t, Tensor) else t for t in pytree.tree_leaves(result)]
        self.known = {term for _, term in recorder.seen.values()}
        self._finish(found, translator.sent)
        self._drawn(translator.drawn)
        self.cuts = translator.cuts - self.graph.cuts - set(self.graph.sizes.numbers.values())
        mine = [str(term) for term in translator.sent]
        first = order.setdefault(self.graph.training, mine)
        if mine != first:
            a, b = next((a, b) for a, b in zip(mine, first, strict=True) if a != b)
            raise Refused(Refusal("the source", "", "all ranks communicate in one order", f"{a} where others do {b}"))

    def _rows(self, model: nn.Module) -> None:
        """Replaces the rows that modules keep by `RankRows`, which know the rows of all ranks of the class."""
        ranks = self.translator.ranks
        for module in model.modules():
            for name, values in self.fields.get(type(module).__name__, {}).items():
                if isinstance(values[ranks.first], tuple):
                    setattr(module, name, RankRows(tuple(values[r] for r in ranks.ranks)))

    def _arguments(self, recorder: _Recorder) -> tuple[Any, Any]:
        leaves: list[Any] = []
        for leaf in self.program.capture.input_leaves:
            if isinstance(leaf, InputLeaf):
                node: fx.Node = next(n for n in self.program.graph.nodes if n.name == leaf.node)
                val = node.meta["val"]
                t = torch.empty(self.graph.sizes.shape(val.shape), dtype=val.dtype, device="meta")
                recorder.learn(t, self.graph.leaves[leaf.node])
                leaves.append(t)
            else:
                leaves.append(leaf)
        return pytree.tree_unflatten(leaves, self.program.capture.in_spec)

    def _finish(self, got: list[Any], sent: list[Term]) -> None:
        expected = self.graph.outputs
        if len(got) != len(expected):
            raise Refused(Refusal("the source", "", f"{len(expected)} outputs", f"{len(got)}", self.where))
        graph, source = Counter(self.graph.sent), Counter(sent)
        if graph != source:  # the order need not be compared: it is the text's, and so the same on all ranks
            odd = next(iter((graph - source) + (source - graph)))
            claimed = f"the source communicates {odd} of {_operands(odd)}, {graph[odd]} times"
            self._refuse(odd, claimed, f"{source[odd]} times")
        for i, (x, y) in enumerate(zip(got, expected, strict=True)):
            if x is not y and (isinstance(x, Term) or isinstance(y, Term) or x != y):
                self._refuse(y, f"output {i} is {y} of the graph", f"it is {x}")

    def _drawn(self, drawn: list[Term]) -> None:
        """Refuses draws from torch's generator that the graph does not make, since they change all later ones."""
        graph = self.graph.drawn
        if graph != drawn:
            pairs = zip_longest(graph, drawn)
            a, b = next((a, b) for a, b in pairs if a is not b)
            said = [f"a draw of random numbers by {described(t)}" if t is not None else "no draw" for t in (a, b)]
            raise Refused(Refusal("the source", "", said[0], said[1], self.where))

    def _refuse(self, term: Any, claimed: str, true: str) -> NoReturn:
        """Refuses for the first value that the source does not compute, of those that `term` is made of."""
        cause = self._missing(term)
        if cause is None:
            raise Refused(Refusal("the source", "", claimed, true, self.where))
        node = next((n for n in self.program.graph.nodes if n.name == cause.name), None)
        name, line = (cause.name, line_of(node)) if node is not None else ("the source", "")
        said = f"{claimed}, so {true}" if cause is term else f"{claimed}, which is made of it: {true}"
        missing = f"the source does not compute {described(cause)}"
        raise Refused(Refusal(name, line, f"the source computes {cause.op}", missing, f"{self.where}; {said}"))

    def _missing(self, term: Any) -> Term | None:
        """The first value that this one is computed from, itself included, that the source does not compute."""
        found: Term | None = None
        seen: set[Term] = set()
        while isinstance(term, Term) and term not in seen and term not in self.known and term.op != "leaf":
            seen.add(term)
            found = term
            term = next((t for t in children(term.args) if t not in self.known and t.op != "leaf"), None)
        return found


def _operands(t: Term) -> str:
    return ", ".join(str(v) for v in children(t.args))


class _Recorder(TorchFunctionMode):
    """Records the source's calls, and knows the term of every tensor."""

    def __init__(self, translator: OneRank) -> None:
        super().__init__()
        self.translator = translator
        self.decomposer = translator.__dict__.setdefault("decomposer", Decomposer(translator))
        self.seen: dict[int, tuple[Any, Term]] = {}

    def learn(self, t: Any, term: Term) -> None:
        self.seen[id(t)] = t, term

    def known(self, t: Any) -> Term | None:
        return self.seen[id(t)][1] if id(t) in self.seen else None

    def term(self, t: Tensor) -> Term:
        found = self.known(t)
        if found is None:
            what = f"a tensor of shape {list(t.shape)} from nowhere"
            raise Refused(Refusal("the source", "", "only inputs, parameters and results", what))
        return found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__" or func in _ASKING:
            asked = func(*args, **kwargs)
            if not isinstance(asked, Tensor):  # such as x.shape; x.T is a tensor, and so a call
                return asked
        if func is Tensor.__getitem__:
            args = self.sliced(*args)
        terms: list[Term] = []

        def read(a: Any) -> Any:
            if isinstance(a, Tensor):
                terms.append(self.term(a))
                return TensorSlot(len(terms) - 1)
            if isinstance(a, list):
                return list(map(read, a))
            if isinstance(a, tuple):
                return tuple(map(read, a))
            return slice(read(a.start), read(a.stop), read(a.step)) if isinstance(a, slice) else a

        given = read(tuple(args)), tuple((k, read(v)) for k, v in sorted(kwargs.items()) if k != "device")
        out = self.made(self.decomposer.call(func, *given, terms))
        if not terms and isinstance(out, Tensor) and out.dim() and kwargs.get("device") is None:
            what = f"{getattr(func, '__name__', func)} without a device"
            raise Refused(Refusal("the source", "", "values made on the device of an input or a parameter", what))
        return out

    def sliced(self, x: Tensor, index: Any) -> tuple[Tensor, Any]:
        """Takes the slices in `x[index]` with the ends as written, which Python would cut off at this run's lengths."""
        items = list(index) if isinstance(index, tuple) else [index]
        if any(isinstance(i, Tensor) and i.dtype == torch.bool or i is True or i is False for i in items):
            return x, index
        if not any(i is Ellipsis for i in items):
            items.append(Ellipsis)
        at = next(n for n, i in enumerate(items) if i is Ellipsis)
        items[at : at + 1] = [slice(None)] * (x.dim() - sum(i is not None and i is not Ellipsis for i in items))
        d = 0
        for n, i in enumerate(items):
            if isinstance(i, slice) and i != slice(None) and i.step in (None, 1):
                call = (self.term(x), d, i.start, i.stop if i.stop is not None else OPEN)
                x, items[n] = self.made(self.translator.call(torch.ops.aten.slice.Tensor, call, {})), slice(None)
            d += i is not None
        return x, tuple(items)

    def made(self, value: Any) -> Any:
        if isinstance(value, Term):
            t = torch.empty(value.shape, dtype=value.dtype, device="meta")
            self.learn(t, value)
            return t
        return tuple(map(self.made, value)) if isinstance(value, tuple) else value

    def operator(self, target: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps an operator of the runtime so that it is recorded as one call."""

        def read(a: Any) -> Any:
            if isinstance(a, Tensor):
                return self.term(a)
            return tuple(map(read, a)) if type(a) in (tuple, list) else a

        def call(*args: Any, **kwargs: Any) -> Any:
            with _pop_mode_temporarily():
                found = self.translator.call(target, read(args), {k: read(v) for k, v in kwargs.items()})
                return self.made(found)

        return call


class _Still(Group):
    """A group that does not communicate: a source that calls it itself, and not through an operator, is refused."""

    def _no(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise Refused(Refusal("the source", "", "communication by the runtime's operators", "a group that is called"))

    all_reduce = begin_all_reduce = begin_all_gather = finish = all_gather = reduce_scatter = _no


_RNG = Rng(0)


def _alone(geometry: Geometry, rank: int) -> Ranks:
    mesh = geometry.mesh
    return Ranks(mesh, rank, lambda over: _Still(mesh.degree(over), mesh.index(over, geometry.coords[rank]), over))
