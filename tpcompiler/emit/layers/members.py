"""The model's parameters, by placeholder and by module, and how members of modules are written."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from tpcompiler.emit.text.expr import Expr, member
from tpcompiler.program import Parameter


class ParameterNames:
    """Finds a parameter's name within a module and a module's parameters, and tells lists from other modules.

    `called` are the qualified names of the modules that the program calls.
    """

    def __init__(self, parameters: tuple[Parameter, ...], called: Iterable[str]) -> None:
        self.all = parameters
        self.by_node = {p.node: p for p in parameters}
        self._called = set(called)
        self._under: dict[str, list[tuple[str, Parameter]]] = {}
        self._members: dict[str, dict[str, bool]] = {}  # module → member → is the member a parameter?
        for p in parameters:
            for name in p.names:
                parts = name.split(".")
                for i in range(len(parts)):
                    self._under.setdefault(".".join(parts[:i]), []).append((".".join(parts[i:]), p))
                    self._members.setdefault(".".join(parts[:i]), {})[parts[i]] = i == len(parts) - 1
        for name in self._called - {""}:
            container, _, member = name.rpartition(".")
            self._members.setdefault(container, {}).setdefault(member, False)

    def of(self, node: fx.Node) -> Parameter | None:
        """The parameter that the node is the placeholder of."""
        return self.by_node.get(node.name) if node.op == "placeholder" else None

    def inside(self, node: fx.Node, module: str) -> str | None:
        """The parameter's name relative to `module`; None if the node is no parameter of that module."""
        parameter = self.of(node)
        lead = module + "." if module else ""
        names = () if parameter is None else parameter.names
        return next((n[len(lead) :] for n in names if n.startswith(lead)), None)

    def under(self, module: str) -> list[tuple[str, Parameter]]:
        """All parameters of the module by relative name, in the model's order."""
        return self._under.get(module, [])

    def is_list(self, module: str) -> bool:
        """Is the module written as a list: of modules with few gaps, or of parameters without code and gaps?"""
        members = self._members.get(module, {})
        if not members or not all(m.isdigit() and m == str(int(m)) for m in members):
            return False
        last = max(map(int, members))
        if any(members.values()):
            return all(members.values()) and module not in self._called and last == len(members) - 1
        return last < 4 * len(members) + 16

    def attribute(self, module: str, path: str, shown: list[str] | None = None) -> Expr:
        """`self.h[0].attn.weight` for "h.0.attn.weight", relative to `module`.

        `shown` are the parts of the path as a loop writes them: `{2 * i}` in place of a number.
        """
        found = Expr("self")
        for part, said in zip(path.split("."), shown or path.split("."), strict=True):
            if self.is_list(module):
                found = Expr(f"{found}[{said.strip('{}')}]")
            else:
                found = Expr(f'getattr({found}, f"{said}")') if "{" in said else member(found.text, part)
            module = f"{module}.{part}" if module else part
        return found
