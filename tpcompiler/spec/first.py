"""The text of a first spec for a model, with comments that say what can be changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import yaml

_TRAIN = """\
# The trainer's settings, for `tpc train` (docs/training.md):
# train: {steps: 1000, batch: 8, micro_batch: 8, sequence: 1024, precision: bf16, activation_checkpointing: none}
"""


def first_spec(
    model: str, tensor: int, given: Mapping[str, Any], accepts: Mapping[str, Any], blocks: Iterable[tuple[str, str]]
) -> str:
    """The text of a spec. `accepts` maps the constructor's arguments to their defaults; `blocks` has the kind of each
    split block and a line about it."""
    lines = [f"# A first spec for {model}. docs/spec.md lists all keys."]
    lines += [f"#   tpc shard {model} --spec THIS", f"#   tpc verify {model} --spec THIS", ""]
    lines += ["# Ranks that share one copy of the model; `data: N` for N copies, each on its own batch.", ""]
    lines.insert(-1, f"mesh: {{tensor: {tensor}}}")
    rest = {k: v for k, v in accepts.items() if k not in given}
    if given or rest:
        lines.append("# Arguments of the model's constructor. Its defaults:")
        lines.append("#   " + (_flow(rest) if rest else "none besides these"))
        lines += [f"model: {_flow(given)}" if given else "# model: {}", ""]
    kinds: dict[str, list[str]] = {}
    for kind, line in blocks:
        kinds.setdefault(kind, []).append(line)
    if kinds:
        lines.append("# What is split. `replicate` leaves a kind whole. A kind named `shard` here must be splittable.")
        lines.append("shard:")
        for kind, said in kinds.items():
            lines += [f"  # {line}" for line in said]
            lines.append(f"  {kind}: shard")
    else:
        lines.append("# Nothing of this model is split: `tpc explain MODEL --spec THIS NAME` says why.")
    return "\n".join(lines) + "\n\n" + _TRAIN


def _flow(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), default_flow_style=True, sort_keys=False, width=10_000).strip()
