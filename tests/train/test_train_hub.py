"""Hugging Face there and back: trained, merged, and read by `from_pretrained`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.train_runs import TRAIN, in_processes
from tests.train.train_runs import Case as Run
from tpcompiler.cli.main import main
from tpcompiler.train.run.checkpoint import checkpoints

transformers = pytest.importorskip("transformers")
SIZES: dict[str, Any] = {
    "model": {
        "vocab_size": 261, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
    },
    "inputs": {"batch": 2, "sequence": 8},
}  # fmt: skip


def test_a_trained_model_comes_back_with_equal_logits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {**TRAIN, "steps": 2, "schedule": {"warmup": 1}, "precision": "fp32", "data": {"labels": "same"}}
    run = Run("hf:llama", SIZES, settings)
    in_processes(run, 2, 1, tmp_path, "--set", "rms_norm_eps=1e-3")
    last = checkpoints(tmp_path / "run" / "checkpoints")[0]
    out = tmp_path / "hub"
    assert main(["merge", str(last), "-o", str(out)]) == 0
    assert main(["merge", str(last), "-o", str(out)]) == 2
    assert "add --force" in capsys.readouterr().err
    assert main(["merge", str(last), "-o", str(tmp_path / "all.safetensors")]) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["architectures"], config["rms_norm_eps"], config["num_key_value_heads"]) == (
        ["LlamaForCausalLM"], 1e-3, 2,
    )  # fmt: skip
    assert (out / "generation_config.json").exists()
    read = transformers.AutoModelForCausalLM.from_pretrained(out)
    plain = type(read)(read.config)
    from safetensors.torch import load_file

    plain.load_state_dict(load_file(tmp_path / "all.safetensors"), strict=True)
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        assert torch.equal(read(ids).logits, plain.eval()(ids).logits)
    assert read.dtype == torch.float32


def test_the_directory_keeps_its_tokenizer_and_takes_a_dtype(tmp_path: Path) -> None:
    """Sharded, not trained: the model is named."""
    there = tmp_path / "there"
    config = transformers.LlamaConfig(**SIZES["model"])
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(there)
    (there / "tokenizer.json").write_text("{}")
    (there / "tokenizer_config.json").write_text("{}")
    spec = tmp_path / "spec.yaml"
    spec.write_text(json.dumps({"mesh": {"tensor": 2}}))
    assert main(["shard", f"hf:{there}", "--spec", str(spec), "-o", str(tmp_path / "cut")]) == 0
    out = tmp_path / "hub"
    assert main(["merge", str(tmp_path / "cut"), "-o", str(out), "--model", f"hf:{there}", "--dtype", "bf16"]) == 0
    assert (out / "tokenizer.json").read_text() == (out / "tokenizer_config.json").read_text() == "{}"
    read = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert read.dtype == torch.bfloat16
    for name, value in model.to(torch.bfloat16).state_dict().items():
        assert torch.equal(read.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--dtype", "int8"], "is none of bf16"), (["--model", "models/gpt2.py"], "only hf: models")],
)
def test_what_cannot_be_merged_so_is_one_line(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", str(tmp_path), "-o", str(tmp_path / "out"), *more]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
