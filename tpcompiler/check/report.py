"""What the checker hands back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Refusal:
    """One step that does not hold."""

    node: str  # of the program, or a parameter's name
    line: str  # of the model's source, "file:number: text", or ""
    claimed: str
    true: str
    example: str = ""  # the smallest differing numbers

    def __str__(self) -> str:
        where = f" ({self.line})" if self.line else ""
        shown = f"; {self.example}" if self.example else ""
        return f"{self.node}{where}: claimed: {self.claimed}; true: {self.true}{shown}"


@dataclass(frozen=True)
class CheckReport:
    """The verdict on a program, and what it took."""

    nodes: int  # of the program's graph, those its outputs need
    distinct_steps: int  # established by running; the others are equal to one of them
    seconds: float
    refused: tuple[Refusal, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.refused

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "nodes": self.nodes,
            "distinct_steps": self.distinct_steps,
            "seconds": round(self.seconds, 3),
            "refused": [vars(r) for r in self.refused],
        }

    def __str__(self) -> str:
        took = f"{self.nodes} nodes, {self.distinct_steps} distinct steps, {self.seconds:.1f} s"
        if self.passed:
            return f"proven equal to the model, forward and backward: {took}"
        return "\n".join([f"refused: {took}", *(f"  {r}" for r in self.refused)])
