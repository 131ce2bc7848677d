"""A family's configuration, every size in it made small.

Sizes that mean the same have many names; what a name means is said here once. Heads, their size and the widths are
distinct numbers, so that nothing fits by accident; 6 heads and 2 of keys and values are uneven over 4 ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers

HIDDEN, HEADS, KV, HEAD, FF, VOCAB, LAYERS, LONGEST, EXPERTS = 48, 6, 2, 8, 80, 130, 2, 64, 4

_SIZES: dict[str, int] = {
    **dict.fromkeys("hidden_size n_embd d_model dim embedding_size embed_dim input_embedding_size".split(), HIDDEN),
    **dict.fromkeys("emb_dim word_embed_proj_dim output_embedding_size decoder_hidden_size num_embeds".split(), HIDDEN),
    **dict.fromkeys("num_attention_heads n_head num_heads n_heads encoder_attention_heads".split(), HEADS),
    **dict.fromkeys("decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads".split(), HEADS),
    **dict.fromkeys("num_key_value_heads kv_n_heads num_kv_heads num_global_key_value_heads".split(), KV),
    **dict.fromkeys(
        "head_dim d_kv d_head attention_head_size v_head_dim qk_nope_head_dim qk_rope_head_dim".split(), HEAD
    ),
    **dict.fromkeys("global_head_dim swa_head_dim swa_v_head_dim attention_head_dim index_head_dim".split(), HEAD),
    **dict.fromkeys("linear_key_head_dim linear_value_head_dim linear_head_dim projection_dim".split(), HEAD),
    "qk_head_dim": 2 * HEAD,
    **dict.fromkeys("intermediate_size n_inner ffn_dim d_ff d_inner dim_ff dff dim_feedforward hidden_dim".split(), FF),
    **dict.fromkeys("encoder_ffn_dim decoder_ffn_dim feed_forward_size intermediate_size_mlp ff_dim".split(), FF),
    **dict.fromkeys(
        (
            "moe_intermediate_size shared_expert_intermediate_size "
            "shared_intermediate_size moe_shared_expert_intermediate_size"
        ).split(),
        56,
    ),
    "hidden_size_global": HIDDEN,
    "shared_experts_intermediate_size": 56,
    "encoder_hash_byte_group_vocab": 50,
    **dict.fromkeys("dense_intermediate_size expert_ffn_hidden_size moe_ffn_hidden_size ffn_hidden_size".split(), FF),
    **dict.fromkeys(
        "vocab_size src_vocab_size tgt_vocab_size vocab_size_per_layer_input decoder_vocab_size".split(), VOCAB
    ),
    **dict.fromkeys("unpadded_vocab_size audio_vocab_size entity_vocab_size".split(), VOCAB),
    **dict.fromkeys("num_hidden_layers n_layer num_layers n_layers encoder_layers decoder_layers".split(), LAYERS),
    **dict.fromkeys("num_decoder_layers num_encoder_layers num_layers_per_stack".split(), LAYERS),
    **dict.fromkeys(
        "max_position_embeddings n_positions n_ctx max_source_positions max_target_positions".split(), LONGEST
    ),
    **dict.fromkeys("max_seq_len context_length sliding_window local_attention attention_window_size".split(), LONGEST),
    **dict.fromkeys("max_encoder_position_embeddings max_decoder_position_embeddings window_size".split(), LONGEST),
    **dict.fromkeys("num_experts num_local_experts n_routed_experts moe_num_experts".split(), EXPERTS),
    **dict.fromkeys("num_experts_per_tok moe_k moe_top_k moe_topk top_k_experts num_experts_per_token".split(), 2),
    **dict.fromkeys(
        (
            "n_group topk_group num_expert_group "
            "num_expert_groups n_shared_experts num_shared_experts moe_num_shared_experts"
        ).split(),
        1,
    ),
    **dict.fromkeys("q_lora_rank kv_lora_rank o_lora_rank hidden_size_per_layer_input embedding_rank".split(), 20),
    **dict.fromkeys("mamba_n_heads linear_num_value_heads mamba_num_heads n_mamba_heads linear_num_heads".split(), 6),
    **dict.fromkeys("linear_num_key_heads index_n_heads".split(), 2),
    **dict.fromkeys("mamba_d_state state_size ssm_state_size".split(), 10),
    **dict.fromkeys("first_k_dense_replace num_kv_shared_layers num_nextn_predict_layers".split(), 0),
    **dict.fromkeys("index_topk index_topk_blocks".split(), 4),
    "lru_width": HIDDEN,
    "image_size": 16,
    "patch_size": 4,
    "pad_token_id": 1,
    "chunk_size": 8,
}


# Numbers that every rank would draw anew: a model that draws them is refused, and says to set them to 0.
_DRAWN = (
    "layerdrop encoder_layerdrop decoder_layerdrop router_jitter_noise input_jitter_noise drop_path_rate "
    "jitter_noise router_jitter stochastic_depth_rate"
).split()


def shrunk(family: str, changes: Mapping[str, Any] | None = None, cls: Any = None) -> Any:
    """The configuration of a model type, small. `changes` come last; a dictionary among them changes a part.

    `cls`: the configuration's class, where it is not the model type's own but that of its text model.
    """
    cls = cls or transformers.CONFIG_MAPPING[family]
    values = _small(cls, cls().to_dict())
    return cls(**_merged(values, changes or {}))


def _small(cls: Any, default: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    parts = getattr(cls, "sub_configs", {})
    for key, value in default.items():
        if key in parts and isinstance(value, dict):
            part = parts[key]
            kind = value.get("model_type")
            known = transformers.CONFIG_MAPPING[kind] if kind in transformers.CONFIG_MAPPING else part  # noqa: SIM401
            out[key] = ({"model_type": kind} if kind else {}) | _small(known, value)
        elif key == "per_layer_config" and isinstance(value, dict):
            out[key] = {layer: _small(cls, own) for layer, own in value.items() if int(layer) < LAYERS}
        elif key in _DRAWN and value:
            out[key] = 0.0
        elif key in _SIZES and isinstance(value, int) and not isinstance(value, bool):
            out[key] = _SIZES[key] if value else 0
        elif value is None and key in ("head_dim", "num_key_value_heads", "vocab_size"):
            out[key] = _SIZES[key]
        elif key.endswith("_token_id") and isinstance(value, int) and value >= VOCAB:
            out[key] = 2
        elif isinstance(value, list) and len(value) > LAYERS and key.endswith(("layer_types", "layers_block_type")):
            out[key] = _two(value)
    if default.get("kv_lora_rank"):  # keys and values come from a low-rank latent: every head has its own
        out["num_key_value_heads"] = HEADS
    return out


def _two(kinds: list[Any]) -> list[Any]:
    """Two layers, of two kinds where there are such."""
    other = next((k for k in kinds if k != kinds[0]), kinds[0])
    return [kinds[0], other]


def _merged(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(values)
    for key, value in changes.items():
        mine = out.get(key)
        out[key] = _merged(mine, value) if isinstance(mine, dict) and isinstance(value, Mapping) else value
    return out
