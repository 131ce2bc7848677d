"""Samples kept apart: where no operation of f lets two samples meet, cat(f(x[:n]), f(x[n:])) is f(x).

Between `cut_batch` and `join_batch` a program may be computed in halves. Each value there has one dimension that counts
samples: n · batch · m rows, of which each sample has those with its number in the middle. What is known of an
operation, from a closed list, must say that a row of its result depends on the same sample's rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any, NoReturn

import torch
from torch import fx, nn

from tpcompiler import runtime
from tpcompiler.check.calls import runtime_signature
from tpcompiler.check.forward import Refused, line_of, live_nodes
from tpcompiler.check.meanings import bound, packet
from tpcompiler.check.report import Refusal
from tpcompiler.check.sizes import Sizes
from tpcompiler.check.terms import Term
from tpcompiler.program import Program

_CLAIM = "samples of a batch that are computed apart"
_ALIKE = set("to _to_copy type_as float double half bfloat16 clone contiguous detach alias masked_fill where".split())
_RESHAPES = set("view reshape _unsafe_view flatten unflatten view_as reshape_as".split())
_MOVES = set("transpose permute movedim expand expand_as unsqueeze".split())
_ONE_DIM = set(
    """split chunk slice select narrow unbind split_with_sizes cat softmax _softmax log_softmax _log_softmax cumsum
    squeeze sum mean amax amin var std flip roll glu""".split()
)
_SAMPLES_FIRST = set("scaled_dot_product_attention conv1d conv2d conv3d".split())
_PRODUCTS = set("linear matmul mm bmm addmm baddbmm".split())


def refuse_mixing(program: Program, env: Mapping[fx.Node, Any], sizes: Sizes) -> None:
    """Raises `Refused` at the first operation between the marks that may not be computed in halves.

    `env` has the terms of the program's values on one rank alone, at `sizes`: primes beyond the model's constants.
    """
    cuts = [n for n in program.graph.nodes if n.target is runtime.cut_batch]
    if not cuts:
        return
    batch = env[cuts[0]].shape[0]
    if sizes.of_example or batch not in sizes.numbers.values():
        _refuse(cuts[0], "the first dimension is not a batch of any size")
    apart: dict[fx.Node, int] = {}  # values between the marks, with the n of their rows
    counted: set[fx.Node] = set()  # values elsewhere that depend on the number of samples
    for node in live_nodes(program.graph):
        halved = {o: apart[o] for o in _read(node) if o in apart}
        if node.op == "output" and halved:
            _refuse(node, "an output that is not joined")
        if node.op != "call_function":
            continue
        if node.target is runtime.cut_batch:
            if halved or env[node].shape[0] != batch:
                _refuse(node, f"a value of shape {list(env[node].shape)} whose first dimension is not the batch")
            apart[node] = 1
        elif node.target is runtime.join_batch:
            if list(halved.values()) != [1] or env[node].shape[0] != batch:
                _refuse(node, "a value that is not halves of a batch")
        elif halved and isinstance(env[node], (Term, tuple)):
            try:
                apart[node] = _Operation(node, env, halved, counted, batch).major()
            except _MixesError as e:
                _refuse(node, str(e))
        elif any(o in counted for o in _read(node)) or _is_count(env[node], batch):
            counted.add(node)


def _read(node: fx.Node) -> list[fx.Node]:
    """The operands of which more than the dtype is read."""
    named = isinstance(node.target, torch._ops.OpOverload) and packet(node.target) == "type_as"
    return node.all_input_nodes[:1] if named else node.all_input_nodes


def _is_count(value: Any, batch: int) -> bool:
    return type(value) is int and value != 0 and value % batch == 0


class _Operation:
    """One operation between the marks."""

    def __init__(
        self, node: fx.Node, env: Mapping[fx.Node, Any], halved: dict[fx.Node, int], counted: set[fx.Node], batch: int
    ) -> None:
        self.node, self.env, self.halved, self.counted, self.batch = node, env, halved, counted, batch

    def major(self) -> int:
        """The n of its result's n · batch · m rows. Raises `_MixesError` if a sample may depend on another."""
        made = self.env[self.node]
        for term in made if isinstance(made, tuple) else (made,):
            self.place(term)
        for o in _read(self.node):
            if o not in self.halved and isinstance(self.env[o], Term) and self.counts(self.env[o].shape):
                raise _MixesError(f"{o.name} counts samples and is not cut")
            shaped = not isinstance(self.env[o], Term) and (self.shapes() or self.expands())
            if o in self.counted and not shaped:
                raise _MixesError("it computes with the number of samples")
        n = self.one(self.halved.values())
        self.apart(made, n)
        if self.shapes():  # the rows before a sample's are as many as they were
            t = self.env[self.node.all_input_nodes[0]]
            before, place = prod(t.shape[: self.place(t)]) * n, self.place(made)
            n, rest = divmod(before, prod(made.shape[:place]))
            if rest or made.shape[place] % (n * self.batch):
                raise _MixesError("it takes rows of several samples together")
        return n

    def one(self, found: Iterable[int]) -> int:
        """The one number among those found."""
        numbers = set(found)
        if len(numbers) != 1:
            raise _MixesError("samples of its operands stand in different orders")
        return numbers.pop()

    def shapes(self) -> bool:
        """Whether it gives the same elements in the same order another shape."""
        target = self.node.target
        return isinstance(target, torch._ops.OpOverload) and packet(target) in _RESHAPES

    def expands(self) -> bool:
        target = self.node.target
        return isinstance(target, torch._ops.OpOverload) and packet(target) == "expand"

    def counts(self, shape: Sequence[int]) -> list[int]:
        """The dimensions that count samples."""
        return [d for d, n in enumerate(shape) if n and n % self.batch == 0]

    def place(self, term: Term) -> int:
        """The dimension that counts samples."""
        found = self.counts(term.shape)
        if len(found) != 1:
            raise _MixesError(f"{len(found)} dimensions of {list(term.shape)} count samples")
        return found[0]

    def from_right(self, term: Term) -> int:
        return len(term.shape) - self.place(term)

    def apart(self, made: Any, n: int) -> None:
        """Raises `_MixesError` if samples are not kept apart."""
        target = self.node.target
        if getattr(target, "__name__", "") == "getitem" and not isinstance(target, torch._ops.OpOverload):
            return
        if isinstance(target, torch._ops.OpOverload):
            given = {k: self.read(v) for k, v in bound(target, self.node.args, dict(self.node.kwargs)).items()}
            self.aten(packet(target), target, given, made, n)
            return
        signature = runtime_signature(target)
        if signature is None:
            raise _MixesError("it is no known operation")
        given = dict(signature.bind(*self.node.args, **self.node.kwargs).arguments)
        self.runtime(target, {k: self.read(v) for k, v in given.items()}, n)

    def read(self, a: Any) -> Any:
        if isinstance(a, fx.Node):
            return self.env[a]
        return tuple(map(self.read, a)) if isinstance(a, (tuple, list)) else a

    def operands(self) -> list[Term]:
        """Those that are halved."""
        found = [self.env[o] for o in self.halved]
        if not all(isinstance(t, Term) for t in found):
            raise _MixesError("it takes several results at once")
        return found

    # -- ATen's operations ------------------------------------------------------------------------------------------

    def aten(self, name: str, target: Any, given: dict[str, Any], made: Any, n: int) -> None:
        if torch.Tag.nondeterministic_seeded in target.tags and name != "scaled_dot_product_attention":
            raise _MixesError("it draws from torch's generator")
        if torch.Tag.pointwise in target.tags or name in _ALIKE:
            self.aligned(made)
        elif name in _RESHAPES:
            return  # see `major`
        elif name in _MOVES:
            self.operands()
            if name.startswith("expand"):
                self.aligned(made)
        elif name in _ONE_DIM:
            self.other_dim(given, made)
        elif name in _PRODUCTS:
            self.product(name, given, made)
        elif name in ("layer_norm", "rms_norm", "native_layer_norm"):
            self.whole_rows(given["input"], len(given["normalized_shape"]))
        elif name in _SAMPLES_FIRST:
            if n != 1 or any(self.place(t) != 0 for t in self.operands()):
                raise _MixesError("its first dimension is not that of samples")
            if name.startswith("conv") and not all(t is given["input"] for t in self.operands()):
                raise _MixesError("its weight depends on samples")
            self.aligned(made)
        elif name == "embedding":
            if _has(self.operands(), given["weight"]):
                raise _MixesError("it looks up in what depends on samples")
        elif name == "index" and len(given["indices"]) == 1:
            if _has(self.operands(), given["self"]):
                raise _MixesError("it picks rows of what depends on samples")
        else:
            raise _MixesError(f"{name} is not known to treat samples apart")

    def aligned(self, made: Any) -> None:
        """Elementwise, with dimensions counted from the last."""
        if isinstance(made, tuple) or any(self.from_right(t) != self.from_right(made) for t in self.operands()):
            raise _MixesError("samples of its operands stand in different dimensions")

    def other_dim(self, given: dict[str, Any], made: Any) -> None:
        """Along dimensions that are not that of samples."""
        said = next((given[k] for k in ("dim", "dims") if k in given), None)
        if said is None or said == ():
            raise _MixesError("it works along all dimensions")
        dims = said if isinstance(said, tuple) else (said,)
        for t in self.operands():
            if any(d % len(t.shape) == self.place(t) for d in dims):
                raise _MixesError("it works along the dimension of samples")
        tensors = given.get("tensors")
        if tensors is not None and any(not self.counts(t.shape) for t in tensors):
            raise _MixesError("it joins samples with something else")

    def product(self, name: str, given: dict[str, Any], made: Any) -> None:
        """Of rows of samples with one matrix, or sample by sample."""
        halved = self.operands()
        left, right = (given.get(k) for k in {"linear": ("input", "weight")}.get(name, _FACTORS[name]))
        assert isinstance(left, Term)
        assert isinstance(right, Term)
        if name == "linear":
            if not all(t is left for t in halved) or self.place(left) == len(left.shape) - 1:
                raise _MixesError("it contracts samples, or its weight depends on them")
            return
        for t, contracted in ((left, 1), (right, min(2, len(right.shape)))):
            if _has(halved, t) and self.from_right(t) == contracted:
                raise _MixesError("it contracts samples")
        both = _has(halved, left) and _has(halved, right)
        if both and not (self.from_right(left) == self.from_right(right) == self.from_right(made) >= 3):
            raise _MixesError("it multiplies samples with each other")
        if not both and _has(halved, right) and self.from_right(right) < 3 and len(left.shape) > 2:
            raise _MixesError("it multiplies matrices of samples in a way that is not known")
        added = given.get("self") if name in ("addmm", "baddbmm") else None
        if isinstance(added, Term) and _has(halved, added) and self.from_right(added) != self.from_right(made):
            raise _MixesError("it adds other samples")

    def whole_rows(self, x: Any, last: int) -> None:
        """Over the last dimensions alone, with parameters that do not depend on samples."""
        if not all(t is x for t in self.operands()) or self.from_right(x) <= last:
            raise _MixesError("it takes samples together")

    # -- the runtime's operators ------------------------------------------------------------------------------------

    def runtime(self, target: Any, given: dict[str, Any], n: int) -> None:
        x = given.get("x")
        halved = self.operands()
        if target in (runtime.enter, runtime.reduce):
            return
        if target in (runtime.rms_norm, runtime.layer_norm):
            self.whole_rows(x, 1)
        elif target is runtime.entered_linear:
            if not all(t is x for t in halved) or self.from_right(halved[0]) == 1:
                raise _MixesError("it contracts samples, or its weights depend on them")
        elif target in (runtime.take, runtime.gather):
            if given["dim"] % len(halved[0].shape) == self.place(halved[0]):
                raise _MixesError("it works along the dimension of samples")
        elif target is runtime.lookup:
            if not all(t is given["ids"] for t in halved):
                raise _MixesError("it looks up in what depends on samples")
        elif target is runtime.dropout:
            dim = given.get("batch_dim", 0)
            if n != 1 or dim is None or dim % len(halved[0].shape) != self.place(halved[0]):
                raise _MixesError("its mask is not counted by samples")
        else:
            raise _MixesError(f"{target.__name__} is not known to treat samples apart")


_FACTORS = {
    "matmul": ("self", "other"),
    "mm": ("self", "mat2"),
    "bmm": ("self", "mat2"),
    "addmm": ("mat1", "mat2"),
    "baddbmm": ("batch1", "batch2"),
    "linear": ("input", "weight"),
}


class _MixesError(Exception):
    """Why an operation is not computed in halves."""


def _has(terms: Sequence[Term], t: Any) -> bool:
    return any(t is o for o in terms)


class InHalves:
    """Stands for `runtime.Halves` when a source is read: the layers, one after the other, between the marks."""

    def __init__(self, operator: Callable[[Any], Callable[..., Any]], layers: nn.ModuleList, cut: tuple[int, ...]):
        self.operator = operator
        self.members = tuple(layers)
        self.cut = cut

    def __call__(self, *given: Any) -> Any:
        marks = (self.operator(runtime.cut_batch)(t) if i in self.cut else t for i, t in enumerate(given))
        x, *rest = marks
        for layer in self.members:
            x = layer(x, *rest)
        return self.operator(runtime.join_batch)(x)


def in_halves(operator: Callable[[Any], Callable[..., Any]]) -> Callable[..., Any]:
    """What a source finds under the name `Halves`."""

    def halves(layers: nn.ModuleList, ranks: runtime.Ranks, cut: tuple[int, ...] = (0,)) -> Callable[..., Any]:
        return InHalves(operator, layers, cut)

    return halves


def _refuse(node: fx.Node, true: str) -> NoReturn:
    raise Refused(Refusal(node.name, line_of(node), _CLAIM, true))


__all__ = ["InHalves", "in_halves", "refuse_mixing"]
