"""Decides by structure whether a program computes the model's values: whether its outputs are the model's terms.

The program is read as a single rank would run it, with all rows. How the ranks hold these values is for `forward.py` to
establish. Batch and sequence are primes beyond every constant, so that no length is mistaken for a number of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, fx

from tpcompiler.check.forward import Refused, line_of, live_nodes
from tpcompiler.check.normal_form import Forms
from tpcompiler.check.report import Refusal
from tpcompiler.check.samples_apart import refuse_mixing
from tpcompiler.check.sizes import Sizes
from tpcompiler.check.terms import Term, children
from tpcompiler.check.translate import Translator, mode_of, whole_argument
from tpcompiler.program import Program

aten = torch.ops.aten


class Model:
    """A capture's values as terms."""

    def __init__(self, program: Program, sizes: Sizes) -> None:
        self.forms = Forms()
        self.translator = Translator(self.forms)
        self.sizes = sizes
        self.env: dict[fx.Node, Any] = {}
        self.leaves: dict[str, Any] = {}
        self.terms: set[Term] = set()
        self.outputs: tuple[Any, ...] = ()
        self.sites = 0
        live = set(live_nodes(program.capture.graph))
        for node in program.capture.graph.nodes:
            if node.op == "call_function" and node not in live:
                continue
            if node.op == "output":
                self.outputs = tuple(self.env[a] if isinstance(a, fx.Node) else a for a in node.args[0])
                continue
            value = self.read(node)
            self.env[node] = value
            for term in value if isinstance(value, tuple) else (value,):
                if isinstance(term, Term):
                    term.name = term.name or node.name
                    self.terms.add(term)

    def read(self, node: fx.Node) -> Any:
        val = node.meta.get("val")
        if node.op in ("placeholder", "get_attr"):
            if not isinstance(val, Tensor):
                return None
            made = self.forms.make("leaf", (node.name,), self.sizes.shape(val.shape), val.dtype)
            self.leaves[node.name] = made
            return made
        if isinstance(val, (torch.SymInt, int)) and not isinstance(val, bool):
            return self.sizes(val)
        args, kwargs = arguments(node, self.env)
        if node.target is aten.dropout.default:
            x, p, mode = args
            site, self.sites = self.sites, self.sites + 1
            return self.forms.dropout(x, p, mode_of(mode), site)
        return self.translator.call(node.target, args, kwargs, self.described(val))

    def described(self, val: Any) -> Any:
        """Tensors on meta with a value's shape and dtype, at these sizes; None for what is no tensor."""
        if isinstance(val, Tensor):
            return torch.empty(self.sizes.shape(val.shape), dtype=val.dtype, device="meta")
        if isinstance(val, (tuple, list)):
            return [self.described(v) for v in val]
        return None


def arguments(node: fx.Node, env: Mapping[fx.Node, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A node's arguments as a single rank would have them, with values instead of nodes."""

    def read(a: Any) -> Any:
        if isinstance(a, fx.Node):
            return env[a]
        if isinstance(a, (tuple, list)):
            return tuple(map(read, a))
        if isinstance(a, slice):
            return slice(read(a.start), read(a.stop), read(a.step))
        return whole_argument(a)

    return read(tuple(node.args)), {k: read(v) for k, v in node.kwargs.items()}


def compare_structure(program: Program, model: Model) -> None:
    """Raises `Refused` when an output of the program is not the model's."""
    env: dict[fx.Node, Any] = {}
    model.translator.restart()
    for node in live_nodes(program.graph):
        if node.op == "output":
            _outputs(node, model, env)
        elif node.op == "placeholder":
            if node.name not in model.leaves:
                _refuse(node, "a parameter, buffer or input of the model", "the model has none of that name")
            env[node] = model.leaves[node.name]
        elif node.op != "call_function":
            _refuse(node, "a call of a function", f"a node of the kind {node.op}")
        else:
            try:
                args, kwargs = arguments(node, env)
                env[node] = model.translator.call(node.target, args, kwargs)
            except Exception as e:
                _refuse(node, "an operation on the model's values", f"{_one_line(e)}")
    refuse_mixing(program, env, model.sizes)


def _outputs(node: fx.Node, model: Model, env: Mapping[fx.Node, Any]) -> None:
    mine: Any = node.args[0]
    if len(mine) != len(model.outputs):
        _refuse(node, f"{len(model.outputs)} outputs", f"{len(mine)}")
    for i, (got, expected) in enumerate(zip(mine, model.outputs, strict=True)):
        value = env[got] if isinstance(got, fx.Node) else got
        if isinstance(expected, Term) or isinstance(value, Term):
            if value is not expected:
                at = _stranger(got, model, env) if isinstance(got, fx.Node) else node
                made = getattr(at.target, "__name__", at.target) if at.op == "call_function" else at.op
                _refuse(at, "a value of the model", f"{made} makes no value of the model", f"output {i} is made of it")
        elif value != expected:
            _refuse(node, f"output {i} is {expected}", f"{value}")


def _stranger(node: fx.Node, model: Model, env: Mapping[fx.Node, Any]) -> fx.Node:
    """The node where the computation of a wrong output leaves the model: its operands are the model's, it is not."""
    seen = {node}
    todo, found = [node], node
    while todo:
        at = todo.pop()
        found = at
        for operand in at.all_input_nodes:
            value = env.get(operand)
            mine = value if isinstance(value, tuple) else (value,)
            if any(isinstance(t, Term) and t not in model.terms for t in mine) and operand not in seen:
                seen.add(operand)
                todo.append(operand)
                break
    return found


def _refuse(node: fx.Node, claimed: str, true: str, example: str = "") -> NoReturn:
    raise Refused(Refusal(node.name, line_of(node), claimed, true, example))


def _one_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0]


__all__ = ["Model", "children", "compare_structure"]
