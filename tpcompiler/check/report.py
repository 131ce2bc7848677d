"""The checker's verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Refusal:
    """What is wrong with a program: what it claims at one place, and what is true there."""

    node: str  # a node of the program, or a parameter
    line: str  # the line of the model's source as "file:number: text", or ""
    claimed: str
    true: str
    example: str = ""  # operands and numbers that show the difference

    def __str__(self) -> str:
        where = f" ({self.line})" if self.line else ""
        shown = f"; {self.example}" if self.example else ""
        return f"{self.node}{where}: claimed: {self.claimed}; true: {self.true}{shown}"


@dataclass(frozen=True)
class CheckReport:
    """The verdict on a program, and what the check took."""

    nodes: int  # how many nodes of the program its outputs need
    distinct_steps: int  # how many different steps those nodes make
    seconds: float
    refused: tuple[Refusal, ...] = ()
    ran: tuple[str, ...] = ()  # operations of a user's rule, whose steps were run and not proven

    @property
    def passed(self) -> bool:
        return not self.refused

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values, for `--json`."""
        return {
            "nodes": self.nodes,
            "distinct_steps": self.distinct_steps,
            "seconds": round(self.seconds, 3),
            "ran": list(self.ran),
            "refused": [vars(r) | {"said": str(r)} for r in self.refused],
        }

    def __str__(self) -> str:
        took = f"{self.nodes} nodes, {self.distinct_steps} distinct steps, {self.seconds:.1f} s"
        if self.passed:
            but = f", but for {', '.join(self.ran)}, which were run on random operands" if self.ran else ""
            return f"proven equal to the model, forward and backward{but}: {took}"
        return "\n".join([f"refused: {took}", *(f"  {r}" for r in self.refused)])
