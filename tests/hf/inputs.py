"""Inputs for a tiny family: tokens with labels, or images."""

from __future__ import annotations

import inspect

import torch
import transformers
from torch import Tensor

from tests.hf.families import Family

BATCH, SEQUENCE = 3, 10


def inputs(family: Family, config: object | None = None) -> dict[str, Tensor]:
    """Keyword arguments of the model's forward; labels wherever the architecture computes a loss."""
    config = family.config() if config is None else config
    takes = inspect.signature(getattr(transformers, family.architecture).forward).parameters
    generator = torch.Generator().manual_seed(0)
    if family.task == "image":
        vision = getattr(config, "vision_config", config)
        size = vision.image_size  # type: ignore[attr-defined]
        h, w = size if isinstance(size, list | tuple) else (size, size)
        return {"pixel_values": torch.randn(BATCH, vision.num_channels, h, w, generator=generator)}  # type: ignore[attr-defined]
    if family.task == "speech":
        frames = 2 * config.max_source_positions  # type: ignore[attr-defined]
        mel = torch.randn(BATCH, config.num_mel_bins, frames, generator=generator)  # type: ignore[attr-defined]
        return {
            "input_features": mel,
            "labels": torch.randint(4, config.vocab_size, (BATCH, SEQUENCE), generator=generator),
        }  # type: ignore[attr-defined]
    vocabulary = config.get_text_config().vocab_size  # type: ignore[attr-defined]

    def ids() -> Tensor:
        return torch.randint(4, vocabulary, (BATCH, SEQUENCE), generator=generator)  # past the special tokens

    out = {"input_ids": ids()}
    if family.kind == "git":  # its loss is of what follows the image
        out["pixel_values"] = torch.randn(BATCH, 3, 16, 16, generator=generator)
    if family.task != "causal-lm" and "attention_mask" in takes:
        out["attention_mask"] = torch.ones(BATCH, SEQUENCE, dtype=torch.long)
    if "labels" in takes:
        out["labels"] = ids().unsqueeze(-1) if hasattr(config, "num_codebooks") else ids()
    elif "decoder_input_ids" in takes:
        out["decoder_input_ids"] = ids()
    return out
