"""Hugging Face's families, unedited and tiny: split in every layer, equal to the plain model, two reductions a layer."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import tpcompiler as tpc
from tests.hf import FAMILIES, Family, inputs
from tpcompiler.api import Sharded
from tpcompiler.errors import TpcError
from tpcompiler.load import load_model, parse_settings
from tpcompiler.spec import Spec


@dataclass(frozen=True)
class Case:
    name: str
    degree: int
    forward: int  # all-reduces of activations a layer, forward
    backward: int  # the same backward
    split: float = 1.0  # of the layers' matrices, at least


# One a way of building attention or feed-forward blocks; all the others are the sweep's (benchmarks/families.py).
CASES = (
    Case("gpt2:causal-lm", 4, 2, 2),  # weights [in, out], queries, keys and values fused
    Case("gptj:causal-lm", 2, 1, 1),  # attention and feed-forward side by side
    Case("bloom:causal-lm", 4, 2, 2),  # heads folded into the batch, ALiBi, baddbmm
    Case("falcon:causal-lm", 2, 1, 3),  # one head of keys and values, picked by a constant index
    Case("llama:causal-lm", 2, 2, 2),  # grouped queries, gated feed-forward
    Case("gemma2:causal-lm", 2, 2, 2),  # soft-capped scores, norms on both sides
    Case("mixtral:causal-lm", 2, 2, 2, 0.99),  # experts; the router stays whole
    Case("deberta-v2:masked-lm", 4, 2, 2),  # disentangled attention, heads folded into the batch
    Case("t5:seq2seq", 2, 2, 2),  # relative bias; a decoder's layer has one more of each
    Case("vit:image", 2, 2, 2),  # a fixed number of patches instead of a sequence
)


def shard(family: Family, degree: int) -> Sharded:
    return tpc.shard(family.build, inputs(family), {"mesh": {"tensor": degree}})


def layer_of(module: str) -> str | None:
    """`model.layers.1.mlp` → `model.layers.1`; None outside of numbered layers."""
    parts = module.split(".")
    at = next((i for i, p in enumerate(parts) if p.isdigit()), None)
    return None if at is None else ".".join(parts[: at + 1])


def reductions(sharded: Sharded) -> dict[str, Counter[str]]:
    """All-reduces of activations, by direction and layer."""
    nodes = {n.name: n for n in sharded.program.graph.nodes}
    out: dict[str, Counter[str]] = {"forward": Counter(), "backward": Counter()}
    for c in sharded.program.collectives:
        layer = layer_of(nodes[c.node].meta.get("module", ""))
        if c.kind == "all_reduce" and layer is not None and len(c.shape) > 2:
            out[c.direction][layer] += 1
    return out


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_family_is_split_and_equal(case: Case) -> None:
    family = FAMILIES[case.name]
    report = tpc.verify(family.build, inputs(family), {"mesh": {"tensor": case.degree}})
    assert report.passed, str(report)
    sharded = shard(family, case.degree)
    whole = {r.name for r in sharded.plan.replicated}
    matrices = [p for p in sharded.capture.parameters if not p.buffer and len(p.shape) > 1 and layer_of(p.name)]
    split = sum(p.bytes for p in matrices if p.name not in whole)
    assert split >= case.split * sum(p.bytes for p in matrices), sorted(whole & {p.name for p in matrices})
    found = reductions(sharded)
    assert min(found["forward"].values()) == case.forward
    assert min(found["backward"].values()) <= case.backward
    assert max(found["backward"].values()) <= case.backward + (family.task == "seq2seq") * 2


def test_a_directory_and_a_type_give_the_same_plan(tmp_path: Path) -> None:
    """`hf:DIR` and `hf:TYPE --set …` are two ways to say one model."""
    settings = "hidden_size=48 num_attention_heads=6 num_key_value_heads=2 head_dim=8 intermediate_size=80 vocab_size=130"
    values = parse_settings([*settings.split(), "num_hidden_layers=2"])
    spec = Spec.load({"mesh": {"tensor": 2}})
    written: dict[str, Any] = {"model_type": "qwen3", **values, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(written))
    plans = []
    for ref, given in (("hf:qwen3", values), (f"hf:{tmp_path}", {})):
        loaded = load_model(ref, spec, given)
        plans.append(str(tpc.shard(loaded.build, loaded.inputs(), spec).plan))
    assert plans[0] == plans[1]
    assert "heads" in plans[0] and "ff" in plans[0]


def test_every_kind_has_a_small_configuration() -> None:
    """The sweep measures many models: none of the named ones may be large by accident."""
    for case in CASES:
        with torch.device("meta"):
            size = sum(p.numel() for p in FAMILIES[case.name].build().parameters())
        assert size < 200_000, f"{case.name} has {size} parameters"


def test_a_family_that_is_too_short_says_how_far_it_goes() -> None:
    family = FAMILIES["gpt2:causal-lm"]
    with pytest.raises(TpcError, match="-way"):
        tpc.shard(family.build, inputs(family), {"mesh": {"tensor": 256}, "shard": {"attention": "shard"}})
