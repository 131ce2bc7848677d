"""How one function says its values: variables, parameters, sizes, calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tpcompiler.emit.layers.frames import Frame, Names
from tpcompiler.emit.layers.roll import AnyStep, Arguments, Repeat
from tpcompiler.emit.layers.tidy import aten_name
from tpcompiler.emit.names import symbols
from tpcompiler.emit.names.fields import Fields, attribute
from tpcompiler.emit.names.names import Value, value
from tpcompiler.emit.ops.exact import spell
from tpcompiler.emit.text.expr import TERNARY, Expr, call, constant, tuple_of
from tpcompiler.errors import TpcError
from tpcompiler.layout import LocalRuns, LocalSize
from tpcompiler.program import Collective, Training
from tpcompiler.runtime.mesh import Mesh

_LONG = 40  # a table of rows of more characters is an attribute


@dataclass
class File:
    """What the functions of one emitted file share."""

    mesh: Mesh
    names: Names
    letters: dict[str, str]  # symbol → variable
    hints: dict[Value, str]
    collectives: dict[str, list[Collective]]  # by node
    imports: set[str] = field(default_factory=set)

    def shape(self, node: fx.Node) -> str | None:
        """`[b, s, heads/8·96]`"""
        return symbols.shape(node, self.letters, self.mesh.degree)


def runtime_name(node: fx.Node) -> str:
    """`reduce` of a call of `tpcompiler.runtime.reduce`; "" for anything else."""
    if not str(getattr(node.target, "__module__", "")).startswith("tpcompiler.runtime"):
        return ""
    return str(getattr(node.target, "__name__", ""))


class Scope:
    """The values of the module `frame` as its forward says them; `fields` gets the attributes that are needed for it.

    `say` tells variables: before they have names, by what they might be called; afterwards, by their names.
    """

    def __init__(
        self, file: File, fields: Fields, frame: Frame, steps: list[AnyStep], replaced: Mapping[fx.Node, Arguments]
    ) -> None:
        self.file, self.fields, self.frame = file, fields, frame
        loops = [s for s in steps if isinstance(s, Repeat)]
        self.replaced = {**replaced, **{n: a for loop in loops for n, a in loop.numbers.items()}}
        self.callees = {k: e for loop in loops for k, e in loop.callees.items()}
        self.loop: Repeat | None = None  # the one being written
        self.needed: dict[str, None] = {}  # symbols whose size the function uses
        self.nested: dict[fx.Node, Expr] = {}  # calls that are written inside of the call that uses them
        self.reference: Value | None = None  # a tensor on the device where the function works
        self.say: Callable[[Value], Expr] = lambda v: Expr(file.hints.get(v, "y"))

    def expr(self, v: Any) -> Expr:
        """Any argument of a graph node."""
        if isinstance(v, fx.Node):
            if v in self.nested:
                return self.nested[v]
            return self._size(v) if symbols.is_size(v) else self.value(value(v))
        if isinstance(v, LocalSize):
            return self.fields.size(v.dim)
        if isinstance(v, LocalRuns):
            return self.fields.rows(v.dim)
        if isinstance(v, Training):
            if (v.on, v.off) == (True, False):
                return Expr("self.training")
            return Expr(f"{self.expr(v.on)} if self.training else {self.expr(v.off)}", TERNARY)
        if isinstance(v, slice):
            return call("slice", (self.expr(p).text for p in (v.start, v.stop, v.step)))
        if isinstance(v, list):
            return Expr(f"[{', '.join(self.expr(i).text for i in v)}]")
        if isinstance(v, tuple):
            return Expr(tuple_of(self.expr(i).text for i in v))
        return constant(v)

    def value(self, v: Value) -> Expr:
        """A parameter as an attribute, anything else as a variable."""
        return self.parameter(v) or self.say(v)

    def parameter(self, v: Value) -> Expr | None:
        """`self.attn.weight`, if the value is a parameter of this module."""
        if not isinstance(v, fx.Node):
            return None
        if self.loop is not None and v in self.loop.indexed:
            return self.loop.indexed[v]
        name = self.file.names.inside(v, self.frame.name)
        return None if name is None else attribute("self", name)

    def relative(self, frame: Frame) -> str:
        """The name of a module inside of this one."""
        return frame.name[len(self.frame.name) + 1 :] if self.frame.name else frame.name

    def positive(self, v: Any) -> bool:
        """Is the size above zero on every rank?"""
        if isinstance(v, LocalSize):
            return all(leaf.n >= self.file.mesh.degree(leaf.split) for leaf in v.dim.leaves)
        return isinstance(v, int) and v > 0

    def device(self) -> str:
        """A tensor that comes in lies on the right device; without one, a parameter does."""
        if self.reference is not None:
            return f"{self.say(self.reference)}.device"
        return f"next(self.{'parameters' if any(not p.buffer for p in self.file.names.all) else 'buffers'}()).device"

    def _size(self, node: fx.Node) -> Expr:
        val = node.meta["val"]
        if not isinstance(val, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return constant(val)
        if aten_name(node) != "sym_size":
            return spell(node, node.args, dict(node.kwargs), self)
        symbol = symbols.key(val)
        if symbol not in self.file.letters:
            raise TpcError(f"{node.name}: no input has the size {symbol}")
        self.needed[symbol] = None
        return Expr(self.file.letters[symbol])

    # --- calls --------------------------------------------------------------------------------------------------------

    def arguments(self, node: fx.Node) -> Arguments:
        """The node's, with the numbers that differ by instance or iteration as text."""
        return self.replaced.get(node) or (tuple(node.args), dict(node.kwargs))

    def reads(self, node: fx.Node) -> list[Value]:
        """The tensors that a node reads, in order."""
        out: list[Value] = []
        fx.map_arg(self.arguments(node), lambda n: out.append(value(n)) if not symbols.is_size(n) else None)
        return out

    def spell(self, node: fx.Node) -> Expr:
        """The call as source."""
        args, kwargs = self.arguments(node)
        return self._operator(node, args, kwargs) if runtime_name(node) else spell(node, args, kwargs, self)

    def _operator(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Expr:
        """`reduce(y, self.tensor)`: a call of the run-time library; what has a default is said by keyword."""
        name = runtime_name(node)
        signature = inspect.signature(node.target).parameters  # type: ignore[arg-type]
        given = dict(zip(signature, args, strict=False)) | kwargs
        out, keyword = [], False
        for parameter in signature.values():
            said = self._given(name, parameter, given)
            keyword = keyword or said is None or parameter.name == "dim" or parameter.default is not parameter.empty
            if said is not None:
                out.append(f"{parameter.name}={said}" if keyword else said)
        self.file.imports.add(name)
        return call(name, out)

    def _given(self, operator: str, parameter: inspect.Parameter, given: Mapping[str, Any]) -> str | None:
        if parameter.name == "rng":
            return self.fields.rng()
        if parameter.name not in given:
            return None
        value_ = given[parameter.name]
        if parameter.name == "group":
            return self.fields.group(tuple(value_))
        if parameter.default is not parameter.empty and repr(value_) == repr(parameter.default):
            return None
        if operator == "gather" and isinstance(value_, LocalRuns):
            return self.fields.all_rows(value_.dim, tuple(given["group"])).text
        if isinstance(value_, tuple) and value_ and _all_ints(value_) and len(repr(value_)) > _LONG:
            return self.fields.table(value_).text
        return self.expr(value_).text


def _all_ints(v: Any) -> bool:
    return isinstance(v, int) or isinstance(v, tuple) and all(map(_all_ints, v))
