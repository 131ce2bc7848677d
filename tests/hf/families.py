"""The families of transformers, by task, and what the tiny ones among them need beside small sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from tests.hf.shrink import shrunk

# Task → the table of transformers that names its architectures. A family that has several tasks is taken for the first.
TASKS = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}

# Sizes of one family that do not follow from their names.
CHANGES: Mapping[str, Mapping[str, Any]] = {}


@dataclass(frozen=True)
class Family:
    """A model type of transformers in one of its architectures, tiny."""

    kind: str
    task: str
    architecture: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.task}"

    def config(self) -> Any:
        config = shrunk(self.kind, {**CHANGES.get(self.kind, {}), **self.changes})
        for part in (config, *(getattr(config, n, None) for n in getattr(config, "sub_configs", {}))):
            if part is not None and hasattr(part, "use_cache"):
                part.use_cache = False
        return config

    def build(self) -> nn.Module:
        cls = getattr(transformers, self.architecture)
        try:
            return cls._from_config(self.config(), attn_implementation="sdpa").train()
        except ValueError as e:
            if "attention" not in str(e):
                raise
            return cls._from_config(self.config(), attn_implementation="eager").train()


def families() -> dict[str, Family]:
    """All families by name, those that have several tasks several times."""
    out: dict[str, Family] = {}
    for task, table in TASKS.items():
        for kind, names in getattr(modeling_auto, table).items():
            for architecture in (names,) if isinstance(names, str) else names[:1]:
                family = Family(kind, task, architecture)
                out[family.name] = family
    return out


FAMILIES = families()
