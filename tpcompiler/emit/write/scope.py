"""How one function writes its values: variables, parameters, sizes and calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from tpcompiler.emit.layers.frames import Frame
from tpcompiler.emit.layers.loop_proof import Loop
from tpcompiler.emit.layers.loops import BodyPart
from tpcompiler.emit.layers.members import ParameterNames
from tpcompiler.emit.layers.tidy import is_neutral
from tpcompiler.emit.names.attributes import Fields
from tpcompiler.emit.ops.arguments import Arguments, arguments_of
from tpcompiler.emit.ops.exact import spell
from tpcompiler.emit.ops.nodes import NodeResult, aten_name, is_size, key, result_of, runtime_name, val_of
from tpcompiler.emit.text.expr import TERNARY, Expr, call, constant, list_of, tuple_of
from tpcompiler.errors import TpcError
from tpcompiler.layout import LocalRuns, LocalSize
from tpcompiler.program import Collective, Training
from tpcompiler.runtime.mesh import Mesh

_LONG = 40  # A table of rows of more characters becomes an attribute.


@dataclass(frozen=True)
class File:
    """What the functions of one emitted file share."""

    mesh: Mesh
    names: ParameterNames
    letters: Mapping[str, str]  # symbol → variable
    hints: Mapping[NodeResult, str]
    collectives: Mapping[str, list[Collective]]  # by node


@dataclass(frozen=True)
class Scope:
    """Writes the values of the module `frame` as its forward says them.

    Two members collect what turns out to be needed: `fields` the attributes, `needed` the symbols whose size is used.
    """

    file: File
    fields: Fields
    frame: Frame
    replaced: Mapping[fx.Node, Arguments]  # nodes with numbers that differ by instance, call or iteration
    callees: Mapping[Frame, Expr]  # layers that a loop calls
    reference: NodeResult | None  # a tensor on the device where the function works
    say: Callable[[NodeResult], Expr]  # how a variable is written
    loop: Loop | None = None  # the loop that is being written
    nested: Mapping[fx.Node, Expr] = field(
        default_factory=dict
    )  # calls that are written inside the call that uses them
    needed: dict[str, None] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        file: File,
        fields: Fields,
        frame: Frame,
        parts: Sequence[BodyPart],
        arguments: Sequence[NodeResult],
        numbers: Mapping[fx.Node, Arguments],
    ) -> Scope:
        """The scope of a function whose variables have no names yet. They are written by their likely names."""
        loops = [p for p in parts if isinstance(p, Loop)]
        changed = {**numbers, **{n: a for loop in loops for n, a in loop.numbers.items()}}
        callees = {k: e for loop in loops for k, e in loop.callees.items()}
        tensor = (v for v in arguments if isinstance(v, tuple) or isinstance(val_of(v), torch.Tensor))
        likely = file.hints
        return cls(file, fields, frame, changed, callees, next(tensor, None), lambda v: Expr(likely.get(v, "y")))

    def inside(self, loop: Loop | None) -> Scope:
        return replace(self, loop=loop)

    def nesting(self, nested: Mapping[fx.Node, Expr]) -> Scope:
        """The scope where the calls `nested` are written in place of a variable."""
        return replace(self, nested=nested)

    # --- values -------------------------------------------------------------------------------------------------------

    def expr(self, v: Any) -> Expr:
        """Any argument of a graph node."""
        if isinstance(v, fx.Node):
            if v in self.nested:
                return self.nested[v]
            return self._size(v) if is_size(v) else self.value(result_of(v))
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
            return Expr(list_of(self.expr(i).text for i in v))
        if isinstance(v, tuple):
            return Expr(tuple_of(self.expr(i).text for i in v))
        return constant(v)

    def value(self, v: NodeResult) -> Expr:
        """A parameter as an attribute, anything else as a variable."""
        return self.parameter(v) or self.say(v)

    def parameter(self, v: NodeResult) -> Expr | None:
        """`self.attn.weight` if the value is a parameter of this module."""
        if not isinstance(v, fx.Node):
            return None
        if self.loop is not None and v in self.loop.indexed:
            return self.loop.indexed[v]
        name = self.file.names.inside(v, self.frame.name)
        return None if name is None else self.file.names.attribute(self.frame.name, name)

    def module(self, name: str) -> str:
        """`self.h[0]`: a module inside of this one, or this one, by its qualified name."""
        own = self.frame
        return "self" if name == own.name else self.file.names.attribute(own.name, own.relative(name)).text

    def positive(self, v: Any) -> bool:
        """Is the size above zero on every rank?"""
        if isinstance(v, LocalSize):
            return all(leaf.n >= self.file.mesh.degree(leaf.split) for leaf in v.dim.leaves)
        return isinstance(v, int) and v > 0

    def device(self) -> str:
        """The device of a tensor that the function is given, or else of a parameter."""
        if self.reference is not None:
            return f"{self.say(self.reference)}.device"
        return f"next(self.{'parameters' if any(not p.buffer for p in self.file.names.all) else 'buffers'}()).device"

    def _size(self, node: fx.Node) -> Expr:
        val = val_of(node)
        if not isinstance(val, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return constant(val)
        if aten_name(node) != "sym_size":
            return spell(node, arguments_of(node), self)
        symbol = key(val)
        if symbol not in self.file.letters:
            raise TpcError(f"{node.name}: no input has the size {symbol}")
        self.needed[symbol] = None
        return Expr(self.file.letters[symbol])

    # --- calls --------------------------------------------------------------------------------------------------------

    def reads(self, node: fx.Node) -> list[NodeResult]:
        """The tensors that a node reads, in order."""
        out: list[NodeResult] = []
        fx.map_arg(self._arguments(node), lambda n: None if is_size(n) else out.append(result_of(n)))
        return out

    def spell(self, node: fx.Node) -> Expr:
        """The call as source."""
        if runtime_name(node) in ("cut_batch", "join_batch"):  # The call between them says it.
            return self.expr(node.args[0])
        if is_neutral(node) and node not in self.replaced:  # No loop has put its counter in place of the number.
            return self.expr(node.args[0])
        arguments = self._arguments(node)
        return self._runtime_call(node, arguments) if runtime_name(node) else spell(node, arguments, self)

    def _arguments(self, node: fx.Node) -> Arguments:
        return self.replaced.get(node) or arguments_of(node)

    def _runtime_call(self, node: fx.Node, arguments: Arguments) -> Expr:
        """`reduce(y, self.tensor)`: a call of the run-time library, arguments with a default by keyword."""
        name = runtime_name(node)
        signature = inspect.signature(node.target).parameters  # type: ignore[arg-type]
        given = dict(zip(signature, arguments[0], strict=False)) | arguments[1]
        out, keyword = [], False
        for parameter in signature.values():
            said = self._given(name, parameter, given)
            keyword = keyword or said is None or parameter.name == "dim" or parameter.default is not parameter.empty
            if said is not None:
                out.append(f"{parameter.name}={said}" if keyword else said)
        return call(name, out)

    def _given(self, operator: str, parameter: inspect.Parameter, given: Mapping[str, Any]) -> str | None:
        """What a run-time operator is given for a parameter, None if it is the default."""
        if parameter.name == "rng":
            return self.fields.rng()
        if parameter.name not in given:
            return None
        argument = given[parameter.name]
        if parameter.name == "group":
            return self.fields.group(tuple(argument))
        if parameter.default is not parameter.empty and repr(argument) == repr(parameter.default):
            return None
        if operator == "gather" and isinstance(argument, LocalRuns):
            return self.fields.all_rows(argument.dim, tuple(given["group"])).text
        if isinstance(argument, tuple) and argument and _all_ints(argument) and len(repr(argument)) > _LONG:
            return self.fields.table(argument).text
        return self.expr(argument).text


def _all_ints(v: Any) -> bool:
    return isinstance(v, int) or isinstance(v, tuple) and all(map(_all_ints, v))
