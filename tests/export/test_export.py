"""`tpc export`: what others can say of a plan runs there with the plain model's loss; the rest has its reason."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.runtime.test_runtime_processes import in_processes
from tpcompiler.api import Sharded, shard
from tpcompiler.cli import main
from tpcompiler.emit import load_source
from tpcompiler.errors import PlanError
from tpcompiler.export.plan_texts import exported
from tpcompiler.load.model import load_model
from tpcompiler.spec.schema import Spec

ROOT = Path(__file__).parents[2]
GPT2, TWO = str(ROOT / "models/gpt2.py"), str(ROOT / "specs/2way.yaml")


@cache
def llama(**spec: Any) -> Sharded:
    """A small Llama of Hugging Face's own code, whose views ask for the number of heads by -1."""
    read = Spec.load({"mesh": {"tensor": 2}, "inputs": {"labels": True, "batch": 2, "sequence": 6}, **spec})
    loaded = load_model("hf:llama", read, SMALL)
    with loaded.environment:
        return shard(loaded.build, loaded.inputs(), read, source=loaded.source)


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "tie_word_embeddings": False,
}


def test_a_llama_is_what_transformers_itself_would_plan() -> None:
    text, unsaid = exported(llama(), "hf-tp-plan")
    assert not unsaid
    plan = json.loads(text)
    layer = "model.layers.*."
    columns = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"]
    assert plan == {
        **{layer + name: "colwise" for name in columns},
        **{layer + name: "rowwise" for name in ("self_attn.o_proj", "mlp.down_proj")},
        "model.embed_tokens": "embedding_rowwise",
        "lm_head": "colwise_gather_output",
    }


def test_the_source_for_dtensor_is_python_and_says_the_same() -> None:
    text, unsaid = exported(llama(), "dtensor")
    assert not unsaid
    plan = load_source(text, "exported_llama").PLAN
    assert {type(style).__name__ for style in plan.values()} == {"ColwiseParallel", "RowwiseParallel"}
    assert plan.keys() == json.loads(exported(llama(), "hf-tp-plan")[0]).keys()


def test_arguments_of_megatron_say_degree_batch_and_recomputation() -> None:
    train = {"micro_batch": 4, "batch": 64, "sequence": 128, "activation_checkpointing": "layer", "precision": "bf16"}
    text, unsaid = exported(llama(train=_Frozen(train)), "megatron-args")
    assert not unsaid
    assert (
        text.split()
        == (
            "--tensor-model-parallel-size 2 --micro-batch-size 4 --global-batch-size 64 --seq-length 128 "
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 --bf16 "
            "--make-vocab-size-divisible-by 1"
        ).split()
    )


class _Frozen(dict[str, Any]):
    """A dictionary that the cache can hash."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self.items())))


def test_exceptions_by_name_are_names_for_dtensor_and_refused_where_layers_have_no_names() -> None:
    mixed = _overridden()
    plan = load_source(exported(mixed, "dtensor")[0], "exported_mixed").PLAN
    assert "model.layers.1.mlp.up_proj" in plan
    assert "model.layers.0.mlp.up_proj" not in plan
    with pytest.raises(PlanError, match="names all layers at once"):
        exported(mixed, "hf-tp-plan")
    with pytest.raises(PlanError, match="exceptions"):
        exported(mixed, "megatron-args")


@cache
def _overridden() -> Sharded:
    spec = {"mesh": {"tensor": 2}, "override": [{"match": "*layers.0.mlp*", "as": "replicate"}]}
    read = Spec.load(spec)
    loaded = load_model("hf:llama", read, SMALL)
    with loaded.environment:
        return shard(loaded.build, loaded.inputs(), read, source=loaded.source)


@pytest.mark.parametrize("form", ["hf-tp-plan", "dtensor"])
def test_what_has_no_words_is_named_with_its_reason(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    """GPT-2 has one fused weight for q, k and v, writes its heads into its views, and ties its embedding."""
    sizes = ("--set", "layers=2", "--set", "hidden=32", "--set", "heads=4", "--set", "vocab=64")
    assert main.main(["export", GPT2, "--spec", TWO, *sizes, "--format", form, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    said = [u["said"] for u in found["unsaid"]]
    assert any("heads" in line and "h.*.attn" in line for line in said), said
    assert any("one weight" in line or "also" in line for line in said), said
    assert "h.*.mlp.c_fc" in found["text"]
    assert "attn" not in found["text"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--format", "keras"), "--format keras: there is none of this name"),
        ((), "Missing option '--format'"),
        (("--format", "dtensor", "-o", "nowhere/plan.py"), "there is no directory nowhere"),
        (("--format", "megatron-args", "--set", "heads=3", "--set", "hidden=24"), "heads 3 does not divide by 2 ranks"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["export", GPT2, "--spec", TWO, "--set", "layers=1", "--set", "vocab=64", *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.strip().splitlines()) == 1


def in_other_libraries() -> dict[str, list[float]]:
    """The loss and a gradient of the plan as transformers and as DTensor run it."""
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    dist.init_process_group("gloo")
    directory, batch = Path(os.environ["MODEL"]), torch.load(os.environ["BATCH"])
    plan = json.loads((directory / "tp_plan.json").read_text())
    theirs = LlamaForCausalLM.from_pretrained(directory, distributed_config=DistributedConfig(tp_size=2, tp_plan=plan))
    module = LlamaForCausalLM.from_pretrained(directory)
    mesh = dist.init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
    parallel = load_source((directory / "tensor_parallel.py").read_text(), "exported").parallelize(module, mesh)
    return {"transformers": _step(theirs, batch), "DTensor": _step(parallel, batch)}


def _step(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[float]:
    model.train()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    gradient = model.get_parameter("model.norm.weight").grad
    whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return [loss.item(), whole.norm().item()]


@pytest.mark.nightly
def test_an_exported_plan_has_the_plain_models_loss_in_transformers_and_dtensor(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(**SMALL))
    plain.save_pretrained(tmp_path)
    (tmp_path / "tp_plan.json").write_text(exported(llama(), "hf-tp-plan")[0])
    (tmp_path / "tensor_parallel.py").write_text(exported(llama(), "dtensor")[0])
    ids = torch.randint(64, (2, 6))
    torch.save({"input_ids": ids, "labels": ids}, tmp_path / "batch.pt")
    expected = _step(plain, {"input_ids": ids, "labels": ids})
    env = {"MODEL": str(tmp_path), "BATCH": str(tmp_path / "batch.pt")}
    for found in in_processes(in_other_libraries, 2, tmp_path, env):
        for name, numbers in found.items():
            assert numbers == pytest.approx(expected, rel=1e-4), name
