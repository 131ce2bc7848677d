"""The one exception hierarchy, in which each error is one line for the user, and how messages write sizes.

A `TpcError` is for the user: it names the file, the key or the line of the model, the numbers, and what would work.
Broken invariants of the compiler itself stay `AssertionError`s.
"""

from __future__ import annotations


class TpcError(Exception):
    """One fact, in one line. The command line prints it and exits with 2."""


class TpcWarning(UserWarning):
    """Something that the user asked to be warned of, in one line. The command line prints it and continues."""


class SpecError(TpcError):
    """The YAML spec is wrong: `file:line: key: what, and what would work`."""


class ModelError(TpcError):
    """The model cannot be loaded or traced: names the model's own line."""


class PlanError(TpcError):
    """What the spec asks for cannot be done to this model, with the reason and the nearest choice that works."""


class CheckError(TpcError):
    """The static checker refuses a program: names the node, what was claimed and what is true."""


class WeightsError(TpcError):
    """A weight file or checkpoint is missing, truncated, altered, or does not fit the model."""


class RuleError(TpcError):
    """A rule cannot be read, or does not fit the call that it is applied to: names the rule, shapes and node."""


class DecodeError(TpcError):
    """A model cannot be run token by token: names the op that needs later tokens, and the model's own line."""


class RankEnded(SystemExit):
    """Ends this rank because another rank ends. The reason is already printed; `finally` blocks run as it is raised."""

    def __init__(self, code: int = 2) -> None:
        super().__init__(code)


def format_bytes(n: float) -> str:
    """A number of bytes for a reader: `48.0 MiB`."""
    if n < 1024:
        return f"{n:.0f} B"
    units = ["KiB", "MiB", "GiB", "TiB"]
    while len(units) > 1 and n >= 1024 * 1024:
        n, units = n / 1024, units[1:]
    return f"{n / 1024:.1f} {units[0]}"
