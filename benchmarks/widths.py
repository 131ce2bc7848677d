"""Families of transformers at their published widths, two layers deep, over 8 ranks: is what is right accepted?

    python -m benchmarks.widths [NAME ...] [--out FILE] [--lengths N ...] [--timeout SECONDS]
    python -m benchmarks.widths --table FILE        the result as a table

No weights are made: hidden size, heads, key and value heads, feed-forward and vocabulary are as published, the depth is
two layers. Each family is captured at several lengths of the example, for what is right may not depend on it. One
process a family; the result file is written after each, and a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

Result = dict[str, Any]
DEGREE = 8
LENGTHS = (10, 37)
BATCH = 3


def _llama(hidden: int, ff: int, heads: int, kv: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ff,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "num_hidden_layers": 2,
        **more,
    }


def _gpt2(width: int, heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {"n_embd": width, "n_head": heads, "n_layer": 2, "vocab_size": vocab, **more}


# model type → (the published model, its sizes)
WIDTHS: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo2": ("32B", _llama(5120, 27648, 40, 8, 100352)),
    "olmo3": ("32B", _llama(5120, 27648, 40, 8, 100278)),
    "olmoe": ("1B-7B at hidden 4096", _llama(4096, 2048, 32, 32, 50304, num_experts=64, num_experts_per_tok=8)),
    "gpt_bigcode": ("StarCoder", _gpt2(6144, 48, 49152, n_inner=24576, multi_query=True)),
    "deepseek_v3": ("671B", {"num_hidden_layers": 2, "first_k_dense_replace": 1}),
    "llama": ("3.1 70B", _llama(8192, 28672, 64, 8, 128256)),
    "mistral": ("7B", _llama(4096, 14336, 32, 8, 32000, sliding_window=4096)),
    "mixtral": ("8x7B", _llama(4096, 14336, 32, 8, 32000)),
    "qwen2": ("72B", _llama(8192, 29568, 64, 8, 152064)),
    "qwen3": ("32B", _llama(5120, 25600, 64, 8, 151936, head_dim=128)),
    "qwen2_moe": (
        "57B-A14B",
        _llama(
            3584, 18944, 28, 4, 151936, num_experts=64, num_experts_per_tok=8, moe_intermediate_size=2560,
            shared_expert_intermediate_size=20480,
        ),
    ),
    "qwen3_moe": (
        "235B-A22B",
        _llama(
            4096, 12288, 64, 4, 151936, head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=1536
        ),
    ),
    "gemma": ("7B", _llama(3072, 24576, 16, 16, 256000, head_dim=256)),
    "gemma2": ("27B", _llama(4608, 36864, 32, 16, 256000, head_dim=128, query_pre_attn_scalar=144)),
    "gemma3_text": ("27B", _llama(5376, 21504, 32, 16, 262208, head_dim=128, query_pre_attn_scalar=168)),
    "phi": ("2", _llama(2560, 10240, 32, 32, 51200, partial_rotary_factor=0.4)),
    "phi3": ("medium", _llama(5120, 17920, 40, 10, 32064)),
    "phimoe": ("3.5", _llama(4096, 6400, 32, 8, 32064)),
    "gpt2": ("XL", _gpt2(1600, 25, 50257)),
    "gpt_neo": (
        "2.7B",
        {
            "hidden_size": 2560, "num_heads": 20, "num_layers": 2, "attention_types": [[["global", "local"], 1]],
            "vocab_size": 50257,
        },
    ),
    "gpt_neox": ("20B", _llama(6144, 24576, 64, 64, 50432)),
    "gptj": ("6B", _gpt2(4096, 16, 50400, rotary_dim=64)),
    "bloom": ("176B", {"hidden_size": 14336, "n_head": 112, "n_layer": 2, "vocab_size": 250880}),
    "falcon": (
        "40B",
        {
            "hidden_size": 8192, "num_attention_heads": 128, "num_kv_heads": 8, "new_decoder_architecture": True,
            "num_hidden_layers": 2, "vocab_size": 65024,
        },
    ),
    "mpt": ("30B", {"d_model": 7168, "n_heads": 64, "n_layers": 2, "vocab_size": 50432}),
    "opt": (
        "66B",
        {
            "hidden_size": 9216, "ffn_dim": 36864, "num_attention_heads": 72, "num_hidden_layers": 2,
            "word_embed_proj_dim": 9216, "vocab_size": 50272,
        },
    ),
    "stablelm": ("12B", _llama(5120, 13824, 32, 8, 100352, qk_layernorm=True, use_parallel_residual=True)),
    "starcoder2": ("15B", _llama(6144, 24576, 48, 4, 49152)),
    "olmo": ("7B", _llama(4096, 11008, 32, 32, 50304)),
    "cohere": ("Command R+", _llama(12288, 33792, 96, 8, 256000, use_qk_norm=True)),
    "cohere2": ("Command A", _llama(12288, 36864, 96, 8, 256000)),
    "deepseek_v2": (
        "236B",
        {
            "hidden_size": 5120, "intermediate_size": 12288, "num_attention_heads": 128, "num_key_value_heads": 128,
            "q_lora_rank": 1536, "kv_lora_rank": 512, "n_routed_experts": 160, "num_experts_per_tok": 6,
            "moe_intermediate_size": 1536, "n_shared_experts": 2, "num_hidden_layers": 2, "first_k_dense_replace": 1,
            "vocab_size": 102400, "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy",
        },
    ),
    "granite": ("8B", _llama(4096, 12800, 32, 8, 49155)),
    "granitemoe": ("3B-A800M", _llama(1536, 512, 24, 8, 49155, num_local_experts=40, num_experts_per_tok=8)),
    "glm": ("4 9B", _llama(4096, 13696, 32, 2, 151552, head_dim=128)),
    "glm4": ("4 32B", _llama(6144, 23040, 48, 8, 151552, head_dim=128)),
    "nemotron": ("4 340B", _llama(18432, 73728, 96, 8, 256000)),
    "persimmon": ("8B", _llama(4096, 16384, 64, 64, 262144)),
    "codegen": ("16B", _gpt2(6144, 24, 51200, rotary_dim=64)),
    "xglm": (
        "7.5B",
        {"d_model": 4096, "ffn_dim": 16384, "attention_heads": 32, "num_layers": 2, "vocab_size": 256008},
    ),
    "gpt_oss": ("120B", _llama(2880, 2880, 64, 8, 201088, head_dim=64, num_local_experts=128, num_experts_per_tok=4)),
    "smollm3": ("3B", _llama(2048, 11008, 16, 4, 128256)),
    "helium": ("2B", _llama(2560, 7040, 20, 20, 48000, head_dim=128)),
    "exaone4": ("32B", _llama(5120, 27392, 40, 8, 102400)),
    "seed_oss": ("36B", _llama(5120, 27648, 80, 8, 155136, head_dim=128)),
    "arcee": ("4.5B", _llama(2560, 18432, 20, 4, 128004, head_dim=128)),
}  # fmt: skip


def measured(name: str, lengths: tuple[int, ...]) -> Result:
    """One family at every length, in this process."""
    import torch
    import transformers

    from tpcompiler.api import compile_capture
    from tpcompiler.capture import capture
    from tpcompiler.check import check
    from tpcompiler.errors import TpcError
    from tpcompiler.spec.schema import Spec

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    published, sizes = WIDTHS[name]
    config = transformers.AutoConfig.for_model(name, **sizes, pad_token_id=None, bos_token_id=1, eos_token_id=2)
    config.use_cache = False

    def build() -> Any:
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()

    out: Result = {"published": published, "lengths": {}}
    for length in lengths:
        ids = torch.randint(3, 1000, (BATCH, length), generator=torch.Generator().manual_seed(0))
        found: Result = {}
        out["lengths"][str(length)] = found
        start = time.perf_counter()
        try:
            captured = capture(build, {"input_ids": ids, "labels": ids})
            sharded = compile_capture(captured, Spec.load({"mesh": {"tensor": DEGREE}}))
            source = sharded.source
        except TpcError as e:
            found |= {"status": "not compiled", "why": str(e)[:400]}
            continue
        found["compile_seconds"] = round(time.perf_counter() - start, 1)
        report = check(sharded.program, source=source)
        found |= {
            "status": "proven" if report.passed else "refused",
            "why": "" if report.passed else str(report.refused[0]),
            "check_seconds": round(report.seconds, 2),
            "fraction": round(sharded.sharded_fraction, 3),
        }
    return out


def table(results: dict[str, Result]) -> str:
    """The results as Markdown."""
    out = ["| family | published | split of the weights | check, seconds | verdict |", "|---|---|---|---|---|"]
    for name, r in sorted(results.items()):
        found = list(r.get("lengths", {}).values())
        verdicts = sorted({f["status"] for f in found}) or [r.get("status", "")]
        seconds = " ".join(str(f["check_seconds"]) for f in found if "check_seconds" in f)
        split = " ".join(sorted({f"{f['fraction']:.3f}" for f in found if "fraction" in f}))
        out.append(f"| {name} | {r.get('published', '')} | {split} | {seconds} | {', '.join(verdicts)} |")
    return "\n".join(out)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("names", nargs="*", default=list(WIDTHS))
    options.add_argument("--out", type=Path, default=Path("out/widths.json"))
    options.add_argument("--lengths", type=int, nargs="*", default=list(LENGTHS))
    options.add_argument("--timeout", type=float, default=900)
    options.add_argument("--table", type=Path)
    options.add_argument("--one", help=argparse.SUPPRESS)
    given = options.parse_args()
    lengths = tuple(given.lengths)
    if given.table:
        print(table(json.loads(given.table.read_text())["families"]))
        return
    if given.one:
        print(json.dumps(measured(given.one, lengths)))
        return
    import torch

    about = {"torch": torch.__version__, "python": platform.python_version(), "degree": DEGREE}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Result] = json.loads(given.out.read_text())["families"] if given.out.exists() else {}
    for name in given.names:
        if name in results:
            continue
        results[name] = _apart(name, lengths, given.timeout)
        given.out.write_text(json.dumps({**about, "families": results}, indent=1))
        print(table({name: results[name]}).splitlines()[-1], flush=True)


def _apart(name: str, lengths: tuple[int, ...], timeout: float) -> Result:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.widths", "--one", name]
    command += ["--lengths", *map(str, lengths)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        found: Result = json.loads(done.stdout.strip().splitlines()[-1])
        return found
    except subprocess.TimeoutExpired:
        return {"status": f"took over {timeout:.0f} seconds"}
    except (ValueError, IndexError):
        return {"status": "crashed", "why": (done.stderr.strip().splitlines() or ["no output"])[-1][:400]}


if __name__ == "__main__":
    main()
