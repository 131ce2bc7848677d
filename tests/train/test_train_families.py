"""Families of Hugging Face there and back: trained, merged, read by `from_pretrained`, with equal logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.train_runs import TRAIN, Case, in_processes
from tpcompiler.cli.main import main
from tpcompiler.train.run.checkpoint import checkpoints

transformers = pytest.importorskip("transformers")
LAYERS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # Conv1D, whose weights are stored the other way round; tied embeddings
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}),
    # biases on queries alone, tied embeddings
    "qwen2": ("Qwen2ForCausalLM", {**LAYERS, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    # norms on queries and keys, a head of its own
    "qwen3": ("Qwen3ForCausalLM", {**LAYERS, "num_key_value_heads": 2, "head_dim": 4, "tie_word_embeddings": False}),
    # an encoder-decoder
    "t5": ("T5ForConditionalGeneration", {
        "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
        "decoder_start_token_id": 0, "dropout_rate": 0.0,
    }),
}  # fmt: skip


@pytest.mark.parametrize("family", [pytest.param(f, marks=pytest.mark.nightly) for f in FAMILIES])
def test_a_family_comes_back_with_equal_logits(family: str, tmp_path: Path) -> None:
    architecture, sizes = FAMILIES[family]
    config = transformers.CONFIG_MAPPING[family](vocab_size=300, **sizes)
    config.architectures = [architecture]
    there, out = tmp_path / "there", tmp_path / "out"
    model = getattr(transformers, architecture)(config)
    model.save_pretrained(there)
    (there / "tokenizer.json").write_text("{}")
    transformers.GenerationConfig(max_new_tokens=7).save_pretrained(there)
    data = {"task": "spans"} if family == "t5" else {"labels": "same"}
    settings = {**TRAIN, "steps": 2, "schedule": {"warmup": 1}, "precision": "fp32", "data": data}
    if family == "t5":
        settings["sequence"] = 24
    run = Case(f"hf:{there}", {"inputs": {"batch": 2, "sequence": 8}}, settings)
    in_processes(run, 2, 1, tmp_path)
    last = checkpoints(tmp_path / "run" / "checkpoints")[0]
    assert main(["merge", str(last), "-o", str(out)]) == 0
    assert main(["merge", str(last), "-o", str(tmp_path / "all.safetensors")]) == 0
    names = {p.name for p in out.iterdir()}
    assert {"config.json", "tokenizer.json", "generation_config.json", "model.safetensors"} <= names
    assert json.loads((out / "generation_config.json").read_text())["max_new_tokens"] == 7
    read, info = getattr(transformers, architecture).from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    from safetensors.torch import load_file

    merged = load_file(tmp_path / "all.safetensors")
    state = read.state_dict()
    for name, value in merged.items():
        assert torch.equal(state[name], value), name
    trained = [n for n, p in model.named_parameters() if not torch.equal(p, state[n])]
    assert len(trained) > len(list(model.parameters())) // 2
    plain = getattr(transformers, architecture)(config)
    plain.load_state_dict(merged, strict=False)
    plain.tie_weights()
    ids = torch.arange(24).view(2, 12)
    given = {"input_ids": ids, **({"decoder_input_ids": ids[:, :5]} if family == "t5" else {})}
    with torch.no_grad():
        assert torch.equal(read.eval()(**given).logits, plain.eval()(**given).logits)
    half = tmp_path / "half"
    assert main(["merge", str(last), "-o", str(half), "--dtype", "bf16"]) == 0
    assert getattr(transformers, architecture).from_pretrained(half).dtype == torch.bfloat16
