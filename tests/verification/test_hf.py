"""Hugging Face's families, unedited and tiny: split in every layer, equal to the plain model, two sums a layer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import tpcompiler as tpc
from tests.hf import FAMILIES, inputs
from tpcompiler.errors import TpcError
from tpcompiler.load.model import load_model, parse_settings
from tpcompiler.spec.schema import Spec


@dataclass(frozen=True)
class Case:
    name: str
    degree: int
    forward: int  # all-reduces of one forward: those of the layers, 1 of the embedding, 2 of the loss
    backward: int  # those of the layers, 1 of the head
    split: float = 1.0  # of all matrices, at least


# One a way of building attention or feed-forward blocks, two layers each; all others are the sweep's
# (benchmarks/families.py).
CASES = (
    Case("gpt2:causal-lm", 4, 2 * 2 + 3, 2 * 2 + 1),  # weights [in, out], queries, keys and values fused
    Case("gptj:causal-lm", 2, 2 * 1 + 3, 2 * 1 + 1),  # attention and feed-forward side by side
    Case("bloom:causal-lm", 4, 2 * 2 + 3, 2 * 2 + 1),  # heads folded into the batch, ALiBi, baddbmm
    Case("falcon:causal-lm", 2, 2 * 1 + 3, 2 * 3 + 1),  # one key and value head, a constant index; two enter apart
    Case("gemma2:causal-lm", 2, 2 * 2 + 3, 2 * 2 + 1),  # soft-capped scores, norms on both sides
    Case("mixtral:causal-lm", 2, 2 * 2 + 3, 2 * 3 + 1, 0.99),  # experts; what the router weighs by enters too
    Case("deberta-v2:masked-lm", 4, 2 * 2 + 3, 2 * 2 + 1, 0.94),  # disentangled attention; the head's own layer
    Case("t5:seq2seq", 2, 2 * (2 + 3) + 4, 2 * (2 + 3) + 2),  # relative bias; both ends embed, keys of the encoder
    Case("vit:image", 2, 2 * 2, 2 * 2, 0.9),  # a fixed number of patches instead of a sequence
)


EVERY_RUN = ("gpt2", "falcon")  # the rest waits for the nightly run


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.name, marks=() if c.name.startswith(EVERY_RUN) else pytest.mark.nightly) for c in CASES],
)
def test_a_family_is_equal_and_split_with_the_least_reductions(case: Case) -> None:
    family = FAMILIES[case.name]
    report = tpc.verify(family.build, inputs(family), {"mesh": {"tensor": case.degree}})
    assert report.passed, str(report)
    assert report.sharded_fraction >= case.split
    assert report.collectives["all_reduce forward"] == case.forward
    assert report.collectives["all_reduce backward"] == case.backward


@pytest.mark.nightly
def test_a_directory_and_a_type_give_the_same_plan(tmp_path: Path) -> None:
    """`hf:DIR` and `hf:TYPE --set …` are two ways to say one model."""
    settings = (
        "hidden_size=48 num_attention_heads=6 num_key_value_heads=2 head_dim=8 intermediate_size=80 vocab_size=130"
    )
    values = parse_settings([*settings.split(), "num_hidden_layers=2"])
    spec = Spec.load({"mesh": {"tensor": 2}})
    written: dict[str, Any] = {
        "model_type": "qwen3",
        **values,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
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
