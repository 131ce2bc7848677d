"""The model's parameters, by placeholder and by module."""

from __future__ import annotations

from torch import fx

from tpcompiler.program import Parameter


class ParameterNames:
    """Finds a parameter's name within a module, and a module's parameters."""

    def __init__(self, parameters: tuple[Parameter, ...]) -> None:
        self.all = parameters
        self.by_node = {p.node: p for p in parameters}
        self._under: dict[str, list[tuple[str, Parameter]]] = {}
        for p in parameters:
            for name in p.names:
                parts = name.split(".")
                for i in range(len(parts)):
                    self._under.setdefault(".".join(parts[:i]), []).append((".".join(parts[i:]), p))

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
