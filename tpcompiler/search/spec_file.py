"""Writes the spec that a search found as a YAML file, for `tpc shard`, `verify` and `train`."""

from __future__ import annotations

from typing import Any

import yaml

from tpcompiler.search.planner import GIB, Answer
from tpcompiler.spec.schema import Spec


def as_spec(answer: Answer, base: Spec, inputs: dict[str, Any]) -> Spec:
    """The spec `base` with the choices of the search. `inputs` are arguments of the model's example inputs."""
    layout, question = answer.best.layout, answer.question
    train = {
        "batch": question.batch,
        "micro_batch": layout.micro,
        "sequence": question.sequence,
        "precision": "bf16" if question.width == 2 else "fp32",
        "activation_checkpointing": layout.recompute,
    }
    mesh = {"tensor": layout.tensor, **({"data": layout.data} if layout.data > 1 else {})}
    changes: dict[str, Any] = {"mesh": mesh, "train": {**base.train, **train}}
    if inputs:
        changes["inputs"] = {**base.inputs, **inputs}
    if layout.overlap:
        changes["overlap"] = True
    return base.with_(**changes)


def written(answer: Answer, spec: Spec, model: str, hardware: str) -> str:
    """The text of the file, with the prediction in its comments."""
    p, question = answer.best, answer.question
    values = spec.dump()
    values.pop("hardware", None)
    lines = [
        f"# tpc plan {model} --gpus {question.gpus} --batch {question.batch} --sequence {question.sequence}",
        f"# Predicted on {hardware}: {p.seconds * 1e3:.1f} ms a step, {p.tflops:.0f} TFLOP/s a GPU "
        f"({p.mfu * 100:.0f} % of the peak), {p.memory.total / GIB:.1f} GiB a GPU.",
    ]
    for name, value in values.items():
        flow = None if isinstance(value, dict | list) else False
        lines.append(yaml.safe_dump({name: value}, default_flow_style=flow, sort_keys=False, width=110).rstrip())
    lines.append(f"hardware: {{base: {hardware}, memory_gib: {question.hardware.memory_gib:g}}}")
    return "\n".join(lines) + "\n"
