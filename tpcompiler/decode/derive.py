"""Derives a program for new tokens from a program for whole sequences.

Every value is asked for with an extent along the sequence: the new rows, or all positions so far. An operation along
whose sequence a rank could work on a part works on a part of the positions too: what is asked of its result is asked of
its operands. A mixer of rows asks for all positions of what it mixes, if later ones provably give nothing (`Future`).
Where all positions of a value that depends on tokens are asked for, the value is kept.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from tpcompiler import runtime
from tpcompiler.axes.primes import Primes
from tpcompiler.decode.decoder import ALL, NEW, Cache, Decoder, Want
from tpcompiler.decode.dtype_references import refer_to_parameters
from tpcompiler.decode.future import Future, carries
from tpcompiler.decode.once import Tables
from tpcompiler.decode.positional import Positional
from tpcompiler.decode.proof import NEARLY, Proof
from tpcompiler.decode.relate import Related, relate, slots
from tpcompiler.errors import DecodeError
from tpcompiler.graphs import call, layout_of, tensors
from tpcompiler.ops.notation import letters_of as names
from tpcompiler.ops.operands import bind, op_name
from tpcompiler.program import Program, Training
from tpcompiler.runtime import cache

aten = torch.ops.aten


def derive(program: Program) -> Decoder:
    """Derives the decoder of a program whose only output is logits [batch, sequence, vocabulary].

    Raises `DecodeError`, one line, with the op that needs later tokens and the line of the model where it stands.
    """
    return _Derivation(refer_to_parameters(program)).decoder()


class _Derivation:
    def __init__(self, program: Program) -> None:
        self.program = program
        (self.logits,) = next(n for n in program.graph.nodes if n.op == "output").args[0]
        rows = _rows(program, self.logits)
        self.positional = Positional(program, rows)
        self.sizes = Primes(apart=2 * NEARLY)
        self.long = self.sizes(rows[0].meta["val"].shape[1])
        self.related: dict[fx.Node, Related | str] = {}
        self.future = Future(self.positional, self.relation)
        self.proof = Proof(self.positional, self.future, self.long, self.refuse)
        self.graph = fx.Graph()
        self.built: dict[Any, fx.Node] = {}
        self.caches: dict[fx.Node, Cache] = {}
        self.uniform = ""
        self.rows = rows
        for node in program.graph.nodes:
            if node.op == "placeholder" and (node in rows or node.name not in program.capture.inputs):
                self.built[node, self.new_rows(node)] = self.copied(node, self.graph.placeholder(node.name))
        self.tables = Tables(self.positional, self.graph, self.relation, self.refuse)
        self.session = self.tables.session

    def decoder(self) -> Decoder:
        out = self.build(self.logits, self.new_rows(self.logits))
        self.graph.output((out,))
        self.graph.lint()
        once = self.tables.program()
        layout = layout_of(self.logits)
        return Decoder(
            self.program,
            replace(self.program, graph=self.graph, collectives=()),
            once,
            tuple(n.name for n in self.rows),
            tuple(self.tables.tables),
            tuple(self.caches.values()),
            layout[-1] if layout else None,
            self.uniform or self.tables.uniform,
        )

    # -- asking -----------------------------------------------------------------------------------------------------

    def new_rows(self, node: fx.Node) -> Want:
        """The new rows of a value; of scores, their pairs with all positions."""
        along = self.positional.along(node)
        return tuple((ALL if any(along[:i]) else NEW) if seq else None for i, seq in enumerate(along))

    def relation(self, node: fx.Node) -> Related | str:
        if node not in self.related:
            self.related[node] = relate(node, self.sizes)
        return self.related[node]

    def build(self, node: fx.Node, want: Want) -> fx.Node:
        """Returns the node of the step's graph that computes a value at these extents."""
        key = (node, want)
        if key not in self.built:
            self.built[key] = self.make(node, want)
        return self.built[key]

    def make(self, node: fx.Node, want: Want) -> fx.Node:
        if node not in self.positional.live:
            return self.tables.value(node, want, self.length())
        if want.count(NEW) > 1 or want.count(ALL) > 1:
            raise self.refuse(node, "pairs positions in more than one way")
        if ALL in want and NEW not in want:
            best = self.worth_keeping(node, want.index(ALL))
            if best is node:
                return self.kept(node, want.index(ALL))
        if (same := self.passed_on(node)) is not None:
            return self.build(same, want)
        if node.target is operator.getitem:
            source, i = node.args
            assert isinstance(source, fx.Node) and isinstance(i, int)
            return self.copied(node, self.graph.call_function(operator.getitem, (self.call(source, i, want), i)))
        return self.call(node, 0, want)

    def passed_on(self, node: fx.Node) -> fx.Node | None:
        """The operand of a call that does nothing to it in evaluation: `enter`, dropout, a slice of everything."""
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node):
            return None
        if node.target is runtime.enter or op_name(node) in ("alias", "detach"):
            return first
        if op_name(node) == "dropout" and not _off(node.args[2]):
            return first
        if node.target is aten.slice.Tensor and first.meta["val"].shape == node.meta["val"].shape:
            return first if bind(node)["step"] == 1 else None
        return None

    def call(self, node: fx.Node, k: int, want: Want) -> fx.Node:
        """A call whose `k`-th result is asked for, to these extents."""
        related = self.relation(node)
        if isinstance(related, str):
            raise self.refuse(node, related)
        if node.target is aten.scaled_dot_product_attention.default and self.attends_to_past(node):
            return self.attention(node, want)
        extents = self.extents(related, k, want)
        if related.rule.scan and NEW in [extents.get(x) for x in related.whole]:
            return self.scan(node, want)
        operands = [self.asked(node, related, i, extents) for i in range(len(related.nodes))]
        self.proof.prove(node, related, operands, extents)
        key = (node, tuple(operands), want)
        if key not in self.built:
            values = [self.operand(node, related, i, w, want) for i, w in enumerate(operands)]
            self.built[key] = self.emit(node, related, k, want, values)
        return self.built[key]

    def extents(self, related: Related, k: int, want: Want) -> dict[str, str]:
        """Returns the extent that is asked of each letter."""
        out: dict[str, str] = {}
        for (item, _), w in zip(related.results[k], want, strict=True):
            if w is not None:
                out |= {x.name: w for x in names(item) if self.proof.is_long(related.sizes.get(x.name, 1))}
        return out

    def asked(self, node: fx.Node, related: Related, i: int, extents: dict[str, str]) -> Want:
        """What a call asks of its `i`-th operand: all positions of what its result does not have."""
        operand = related.nodes[i]
        side, along = related.operands[i], self.positional.along(operand)
        if side is None or operand in self.rows and node.target is runtime.lookup:
            return self.new_rows(operand)
        out: list[str | None] = []
        for (item, n), seq in zip(side, along, strict=True):
            letters = [x.name for x in names(item) if self.proof.is_long(related.sizes.get(x.name, 1))]
            found = [extents[x] for x in letters if x in extents]
            out.append(None if not seq or n == 1 else found[0] if found else ALL)
        return tuple(out)

    # -- emitting ---------------------------------------------------------------------------------------------------

    def operand(self, node: fx.Node, related: Related, i: int, want: Want, result: Want) -> fx.Node:
        operand = related.nodes[i]
        if operand in self.positional.live:
            return self.build(operand, want)
        return self.tables.value(operand, want, self.length(), node, result)

    def emit(self, node: fx.Node, related: Related, k: int, want: Want, values: list[fx.Node]) -> fx.Node:
        rest = iter(values)

        def replaced(a: Any) -> Any:
            if isinstance(a, fx.Node):
                if tensors(a.meta.get("val")):
                    return next(rest)
                return a
            if isinstance(a, Training):
                return a.off
            if isinstance(a, list | tuple):
                return type(a)(replaced(b) for b in a) if type(a) in (list, tuple) else [replaced(b) for b in a]
            if isinstance(a, slice):
                return slice(replaced(a.start), replaced(a.stop), replaced(a.step))
            return a

        args = [replaced(a) for a in node.args]
        kwargs = {key: self.checked(node, replaced(a)) for key, a in node.kwargs.items()}
        assert next(rest, None) is None, f"{node.format_node()} has tensors out of order"
        args = self.sized(node, related, k, want, args)
        return self.copied(node, call(self.graph, node.target, tuple(args), kwargs))

    def sized(self, node: fx.Node, related: Related, k: int, want: Want, args: list[Any]) -> list[Any]:
        """The arguments with sizes as the step has them. Raises when another argument depends on the length."""
        if not isinstance(node.target, torch._ops.OpOverload):
            return args
        names = [a.name for a in node.target._schema.arguments]
        shape = related.rule.shape
        start = bind(node).get("dim") if shape and "dim" in names[: len(args)] else 0
        rank = len(want)
        for i, (name, a) in enumerate(zip(names, args, strict=False)):
            if name == shape and isinstance(a, list | tuple):
                first = start % slots(node)[0].meta["val"].dim() if isinstance(start, int) else 0
                first = rank - len(a) if name == "size" else first
                args[i] = [self.size(node, b, want[first + j]) for j, b in enumerate(a)]
            elif name in ("split_size", "split_sizes", "start", "end", "step"):
                args[i] = self.size(node, a, ALL if ALL in want else NEW)
            else:
                args[i] = self.checked(node, a)
        return args

    def checked(self, node: fx.Node, a: Any) -> Any:
        if isinstance(a, list | tuple):
            return [self.checked(node, b) for b in a]
        if isinstance(a, fx.Node) and a.graph is self.program.graph:
            if self.positional.has_length(a.meta.get("val")):
                raise self.refuse(node, "computes with the length of the sequence, which changes with every token")
            return self.size(node, a, None)
        return a

    def size(self, node: fx.Node, a: Any, extent: str | None) -> Any:
        """A size of the program as the step has it."""
        if not isinstance(a, fx.Node) or a.graph is not self.program.graph:
            return a
        val = a.meta.get("val")
        if extent == ALL and self.positional.has_length(val):
            if val is None or val.node.expr != self.positional.length:
                raise self.refuse(node, f"has a dimension of {val} elements")
            return self.total()
        key = (a, "size")
        if key not in self.built:
            self.built[key] = self.copied(a, self.graph.node_copy(a, lambda n: self.size_operand(node, n)))
        return self.built[key]

    def size_operand(self, node: fx.Node, n: fx.Node) -> fx.Node:
        if n.op == "placeholder":
            if n not in self.rows:
                raise self.refuse(node, f"reads a size of {n.name}")
            return self.built[n, self.new_rows(n)]
        found: fx.Node = self.size(node, n, None)
        return found

    def length(self) -> fx.Node:
        """Returns the number of new rows."""
        ids = self.built[self.rows[0], self.new_rows(self.rows[0])]
        if "length" not in self.built:
            self.built["length"] = self.graph.call_function(aten.sym_size.int, (ids, 1))
        return self.built["length"]

    def total(self) -> fx.Node:
        if "total" not in self.built:
            self.built["total"] = self.graph.call_function(cache.total, (self.session,))
        return self.built["total"]

    # -- what is kept -----------------------------------------------------------------------------------------------

    def kept(self, node: fx.Node, dim: int) -> fx.Node:
        """Keeps all positions of a value: the earlier ones are in the cache, and the new rows are appended."""
        shape = node.meta["val"].shape
        if shape[dim].node.expr != self.positional.length:
            raise self.refuse(node, f"keeps a dimension of {shape[dim]} elements")
        fresh = self.build(node, self.new_rows(node))
        same = [i for i, n in enumerate(shape) if isinstance(n, torch.SymInt) and n.node.expr == self.positional.batch]
        batch = same[0] if len(same) == 1 else None
        if batch is None:
            self.uniform = self.uniform or f"{node.name} has no dimension for the sequences of a batch alone"
        name = f"kept_{len(self.caches)}"
        self.caches[node] = Cache(name, node.name, tuple(shape), dim, batch, node.meta["val"].dtype, layout_of(node))
        new = call(self.graph, cache.keep, (fresh, self.session, name, dim, batch))
        return self.copied(node, new)

    def worth_keeping(self, node: fx.Node, dim: int) -> fx.Node:
        """The value itself, or the smaller one that only moves and copies made it of, such as keys before heads are
        repeated."""
        best, best_n, current, at = node, _elements(self.sizes, node), node, dim
        while True:
            related = None if current.op != "call_function" else self.relation(current)
            if not isinstance(related, Related) or not carries(related) or current.target is aten.select.int:
                return best
            source = related.nodes[0]
            along = self.positional.along(source)
            if sum(along) != 1 or source not in self.positional.live:
                return best
            current, at = source, along.index(True)
            n = _elements(self.sizes, current)
            if n < best_n and current.meta["val"].shape[at].node.expr == self.positional.length:
                best, best_n = current, n

    def scan(self, node: fx.Node, want: Want) -> fx.Node:
        """Computes a scan, such as a running sum, over all positions and takes the new rows of the result."""
        dim = want.index(NEW)
        whole = self.build_all(node, dim)
        self.uniform = self.uniform or f"{op_name(node)} runs along the sequence"
        new = call(self.graph, cache.rows_of, (whole, self.session, self.length(), dim))
        return self.copied(node, new)

    def build_all(self, node: fx.Node, dim: int) -> fx.Node:
        want = tuple(ALL if i == dim else None for i in range(node.meta["val"].dim()))
        related = self.relation(node)
        assert isinstance(related, Related)
        source = self.build(related.nodes[0], want)
        return self.emit(node, related, 0, want, [source])

    # -- attention --------------------------------------------------------------------------------------------------

    def attends_to_past(self, node: fx.Node) -> bool:
        keys = bind(node)["key"]
        return self.positional.along(keys)[-2]

    def attention(self, node: fx.Node, want: Want) -> fx.Node:
        given = bind(node)
        q, k, v, mask = (given[x] for x in ("query", "key", "value", "attn_mask"))
        if want[-2] != NEW or not self.positional.along(q)[-2]:
            raise self.refuse(node, "attends from all positions to all")
        if _off(given["dropout_p"]):
            raise self.refuse(node, "drops at random in evaluation")
        if not given["is_causal"] and not self.proof.masked(mask):
            raise self.refuse(node, "attends to later positions: no mask hides them")
        rows, all_ = (
            tuple(x if i == r - 2 else None for i in range(r)) for x, r in ((NEW, len(want)), (ALL, len(want)))
        )
        asked = None
        if isinstance(mask, fx.Node):
            related = self.relation(node)
            assert isinstance(related, Related)
            extents = tuple(None if not s else x for s, x in zip(self.positional.along(mask), _ends(mask), strict=True))
            asked = self.operand(node, related, 3, extents, want)
        values = (self.build(q, rows), self.build(k, all_), self.build(v, all_))
        more = {x: given[x] for x in ("scale", "enable_gqa") if given[x]}
        new = call(self.graph, cache.attend, (*values, self.session, asked, bool(given["is_causal"])), more)
        return self.copied(node, new)

    # -- words ------------------------------------------------------------------------------------------------------

    def refuse(self, node: fx.Node, why: str) -> DecodeError:
        line = node.meta.get("line")
        where = f"{line[0]}:{line[1]}: " if line else ""
        text = f" (`{line[2].strip()}`)" if line and line[2] else ""
        model = self.program.capture.model
        return DecodeError(f"{where}{model} cannot generate token by token: {op_name(node)}{text} {why}")

    @staticmethod
    def copied(node: fx.Node, new: fx.Node) -> fx.Node:
        new.meta = dict(node.meta)
        return new


def _rows(program: Program, logits: fx.Node) -> tuple[fx.Node, ...]:
    """The inputs along the sequence of the logits, the token ids first."""
    shape = logits.meta["val"].shape
    if len(shape) != 3 or not isinstance(shape[1], torch.SymInt):
        raise DecodeError(
            f"{program.capture.model} cannot generate: its output is {list(map(str, shape))}, not logits "
            f"[batch, sequence, vocabulary] for a sequence of any length"
        )
    length = shape[1].node.expr
    inputs = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in program.capture.inputs and n.users]
    along = [
        n
        for n in inputs
        if n.meta["val"].dim() > 1
        and isinstance(n.meta["val"].shape[1], torch.SymInt)
        and n.meta["val"].shape[1].node.expr == length
    ]
    ids = [n for n in along if n.meta["val"].dim() == 2 and n.meta["val"].dtype in (torch.int64, torch.int32)]
    if not ids:
        raise DecodeError(f"{program.capture.model} cannot generate: no input of token ids has the logits' length")
    return (ids[0], *(n for n in along if n is not ids[0]))


def _elements(sizes: Primes, node: fx.Node) -> int:
    n = 1
    for size in sizes.shape(node.meta["val"]):
        n *= size
    return n


def _off(value: Any) -> Any:
    return value.off if isinstance(value, Training) else value


def _ends(mask: fx.Node) -> list[str | None]:
    return [*[None] * (mask.meta["val"].dim() - 2), NEW, ALL]
