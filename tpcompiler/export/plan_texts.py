"""The styles of modules as files: transformers' `tp_plan`, a call of `parallelize_module`, arguments of Megatron-LM."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from tpcompiler.api import Sharded
from tpcompiler.errors import PlanError
from tpcompiler.export.module_styles import ModuleStyles, Style, Unsaid, module_styles

_HF: dict[Style, str] = {
    "column": "colwise",
    "row": "rowwise",
    "table": "embedding_rowwise",
    "head": "colwise_gather_output",
    "shared": "replicated_with_grad_allreduce",
}
_DTENSOR: dict[Style, str] = {
    "column": "ColwiseParallel()",
    "row": "RowwiseParallel()",
    "table": "RowwiseParallel(input_layouts=Replicate())",
    "head": "ColwiseParallel(output_layouts=Replicate())",
}


def exported(sharded: Sharded, form: str) -> tuple[str, tuple[Unsaid, ...]]:
    """The file's text, and what it cannot say. Raises `PlanError` when it could say nothing."""
    found = module_styles(sharded, shared=form == "hf-tp-plan")
    if not found.styles:
        reasons = "; ".join(map(str, found.unsaid)) or "nothing is split"
        raise PlanError(f"--format {form} cannot express any of this plan: {reasons}")
    return FORMATS[form](found, sharded)


def _hf(found: ModuleStyles, sharded: Sharded) -> tuple[str, tuple[Unsaid, ...]]:
    names, mixed = _folded(found, sharded)
    if mixed:
        pattern, why = next(iter(mixed.items()))
        raise PlanError(f"--format hf-tp-plan names all layers at once, but {pattern} is {why} in some of them only")
    return json.dumps({name: _HF[style] for name, style in names.items()}, indent=2) + "\n", found.unsaid


def _dtensor(found: ModuleStyles, sharded: Sharded) -> tuple[str, tuple[Unsaid, ...]]:
    names, mixed = _folded(found, sharded)
    if mixed:
        names = dict(found.styles)
    rows = "".join(f'    "{name}": {_DTENSOR[style]},\n' for name, style in names.items())
    replicate = "from torch.distributed.tensor import Replicate\n" if "Replicate()" in rows else ""
    made = {"model": sharded.capture.model, "degree": found.degree, "rows": rows, "replicate": replicate}
    return _DTENSOR_FILE.format(**made), found.unsaid


def _folded(found: ModuleStyles, sharded: Sharded) -> tuple[dict[str, Style], dict[str, str]]:
    """Styles by names with `*` for layers' numbers, and the patterns that hold for some of their layers only."""
    modules = {p.name.rpartition(".")[0] for p in sharded.capture.parameters}
    names: dict[str, Style] = {}
    mixed: dict[str, str] = {}
    for module, style in found.styles.items():
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module)
        like = [m for m in modules if re.sub(r"(?<=\.)\d+(?=\.|$)", "*", m) == pattern]
        if any(found.styles.get(m) != style for m in like):
            mixed[pattern] = style
        names[pattern] = style
    return names, mixed


_DTENSOR_FILE = '''"""{model} over {degree} tensor-parallel ranks, by parallelize_module; written by `tpc export`."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
{replicate}from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

PLAN = {{
{rows}}}


def parallelize(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """`model` over the ranks of a mesh of one dimension. Outputs and losses are whole on every rank."""
    return parallelize_module(model, mesh, PLAN)
'''


def _megatron(found: ModuleStyles, sharded: Sharded) -> tuple[str, tuple[Unsaid, ...]]:
    """Megatron-LM has models of its own: its arguments say degrees, recomputation and batches, and split all blocks."""
    spec, plan = sharded.spec, sharded.plan
    unsaid = list(_megatrons(sharded))
    if any(u.axis == "every block" for u in unsaid):
        raise PlanError(f"--format megatron-args cannot express this plan: {unsaid[0].why}")
    lines = [f"--tensor-model-parallel-size {spec.mesh.tensor}"]
    train: Mapping[str, Any] = spec.train
    settings = {"micro_batch": "--micro-batch-size", "batch": "--global-batch-size", "sequence": "--seq-length"}
    lines += [f"{option} {train[key]}" for key, option in settings.items() if key in train]
    lines += _RECOMPUTE.get(str(train.get("activation_checkpointing", "none")), [])
    lines += {"bf16": ["--bf16"], "fp16": ["--fp16"]}.get(str(train.get("precision", "")), [])
    if vocabulary := [b.size for b in plan.blocks if b.kind in ("embedding", "head")]:
        lines.append(f"--make-vocab-size-divisible-by {_divisor(vocabulary[0], spec.mesh.tensor)}")
    return "\n".join(lines) + "\n", tuple(unsaid)


_RECOMPUTE = {
    "attention": ["--recompute-granularity selective"],
    "layer": ["--recompute-granularity full", "--recompute-method uniform", "--recompute-num-layers 1"],
}


def _megatrons(sharded: Sharded) -> list[Unsaid]:
    """What Megatron-LM does otherwise: it splits every block of every layer, in even parts."""
    plan, out = sharded.plan, []
    kinds = {b.kind for b in plan.blocks}
    for kind in ("attention", "mlp"):
        if kind not in kinds:
            out.append(Unsaid("every block", kind, f"Megatron-LM splits {kind}, which this plan leaves whole"))
    for b in plan.blocks:
        if b.kind == "other":
            out.append(Unsaid(b.axis, b.name, "Megatron-LM has no block of this kind, or splits it otherwise"))
        elif len(set(b.local)) > 1 and b.kind in ("attention", "mlp"):
            out.append(Unsaid("every block", b.name, f"{b.axis} {b.size} does not divide by {len(b.local)} ranks"))
    if sharded.spec.override or sharded.spec.axes:
        out.append(Unsaid("every block", "the spec", "it has exceptions, and Megatron-LM splits all layers alike"))
    return out


def _divisor(vocabulary: int, degree: int) -> int:
    """Megatron-LM pads the vocabulary to a multiple of this times the degree: 1 where it is even, else its default."""
    return 1 if vocabulary % degree == 0 else 128


Writer = Callable[[ModuleStyles, Sharded], tuple[str, tuple[Unsaid, ...]]]
FORMATS: dict[str, Writer] = {"hf-tp-plan": _hf, "dtensor": _dtensor, "megatron-args": _megatron}
