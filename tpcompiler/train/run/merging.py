"""`tpc merge`: a checkpoint as the plain model's weights; of an `hf:` model, with all that `from_pretrained` reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from tpcompiler import weights
from tpcompiler.errors import TpcError
from tpcompiler.load.huggingface import save_beside
from tpcompiler.load.model import parse_settings
from tpcompiler.load.target import Arguments
from tpcompiler.spec.schema import Spec
from tpcompiler.train.hold.owned import state_name
from tpcompiler.train.optim.average import AVERAGE
from tpcompiler.train.run.checkpoint import STATE, State

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def merge(
    directory: Path,
    out: Path,
    dtype: str | None = None,
    model: str | None = None,
    settings: Sequence[str] | None = None,
    average: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Path, ...]:
    """`weights.merge`, as `dtype`. Into a directory, an `hf:` model's configuration and tokenizer are written as well.

    `average` takes the averaged weights. `model` and its `--set` `settings` are those that the checkpoint names, unless
    given. Raises `TpcError`.
    """
    if dtype is not None and dtype not in DTYPES:
        raise TpcError(f"--dtype {dtype}: is none of {', '.join(DTYPES)}")
    if model is not None and not model.startswith("hf:"):
        raise TpcError(
            f"--model {model}: only hf: models have files beside their weights; hf:DIR or hf:TYPE would work"
        )
    known = State.load(directory).model if (directory / STATE).is_file() else {}
    reference = model or str(known.get("source", ""))
    kind = DTYPES[dtype] if dtype is not None else None
    manifest = weights.load_manifest(directory)
    if average and not any(e.name.startswith(state_name("", AVERAGE)) for e in manifest.entries):
        raise TpcError(f"{directory}: holds no average of the weights; train with train.optimizer.average")

    def instead(name: str) -> str:
        averaged = state_name(name, AVERAGE)
        return averaged if average and averaged in manifest.by_name else name

    if not reference.startswith("hf:") or out.suffix == ".safetensors":
        return weights.merge(directory, out, dtype=kind, instead=instead, progress=progress)
    overrides = known.get("overrides", {}) if settings is None else parse_settings(list(settings))
    spec = Spec.load(dict(manifest.spec))
    written = kind or next(e.dtype for e in manifest.entries if e.dtype.is_floating_point)
    beside = partial(save_beside, reference, spec, Arguments(spec, dict(overrides)), written)
    return weights.merge(directory, out, dtype=kind, beside=beside, instead=instead, progress=progress)
