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

QWEN4: Mapping[str, Any] = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 20,
    "ngram_vocab_size_base": 50,
    "split_ngram_parts": 2,
}

# Sizes of one family that do not follow from their names.
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "codegen": {"n_head": 8, "rotary_dim": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 80, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note": {"per_layer_config": {"1": {"head_dim": 16}}},
    "dots3_note_text": {"per_layer_config": {"1": {"head_dim": 16}}},
    "esm": {"pad_token_id": 1, "mask_token_id": 3},
    "esmc": {"num_key_value_heads": 6},
    "falcon_h1": {"mamba_d_ssm": 96, "mamba_d_head": 16, "mamba_n_groups": 1},
    "gemma3n_text": {"intermediate_size": [80, 80]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "mamba2": {"head_dim": 16, "n_groups": 2},
    "mimo_v2_flash": {"num_key_value_heads": 3},  # and twice as many under a sliding window
    "musicgen": {"num_codebooks": 1},
    "musicgen_melody": {"num_codebooks": 1},
    "nemotron_h": {"n_groups": 2, "mamba_head_dim": 16},
    "qwen4_exp": QWEN4,
    "qwen4_exp_text": QWEN4,
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "roc_bert": {
        "pronunciation_embed_dim": 48,
        "pronunciation_vocab_size": 30,
        "shape_embed_dim": 40,
        "shape_vocab_size": 30,
    },
    "xlnet": {"use_mems_eval": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["hybrid", "linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}

# Encoders and speech models that no table of `TASKS` has.
MORE = {
    "clip_text_model:text": "CLIPTextModel",
    "siglip_text_model:text": "SiglipTextModel",
    "whisper:speech": "WhisperForConditionalGeneration",
}

# Of the image models, those that are transformers; the others are made of convolutions.
IMAGE = "beit clip data2vec-vision deit dinov2 dinov2_with_registers ijepa metaclip_2 siglip swin vit vit_msn".split()


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
        cls = getattr(transformers, self.architecture).config_class  # of a part, where the architecture is one
        config = shrunk(self.kind, {**CHANGES.get(self.kind, {}), **self.changes}, cls)
        if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = 0
        if config.is_encoder_decoder and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = 1
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
    out = {name: Family(*name.split(":"), architecture) for name, architecture in MORE.items()}
    for task, table in TASKS.items():
        for kind, names in getattr(modeling_auto, table).items():
            if task != "image" or kind in IMAGE:
                family = Family(kind, task, names if isinstance(names, str) else names[0])
                out[family.name] = family
    return out


FAMILIES = families()
