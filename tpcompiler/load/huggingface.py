"""Hugging Face models: `hf:DIR[:Class]` (config.json, perhaps safetensors) and `hf:TYPE[:Class]` (random weights).

Nothing is downloaded, and no code that comes with a model is run. `model:` and `--set` change the configuration.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tpcompiler.errors import ModelError, TpcError
from tpcompiler.load.target import Arguments, Inputs, Loaded
from tpcompiler.spec.located import one_line
from tpcompiler.spec.schema import Spec, nearest

# Globs for the files of a directory that configure tokenization and generation.
_BESIDE = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "spiece.*",
    "chat_template*", "generation_config.json", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
_TASKS = ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION")


def load_hf(ref: str, spec: Spec, arguments: Arguments) -> Loaded:
    """The model that `hf:…` names, in the architecture of its configuration or `:Class`. Raises `TpcError`."""
    try:
        import transformers
    except ImportError:
        raise ModelError(f"{ref}: needs transformers; pip install 'tpcompiler[hf]'") from None
    place, architecture = _split(ref.removeprefix("hf:"))
    directory = Path(place) if Path(place).exists() else None
    written = _read(directory, place, transformers) if directory else {"model_type": _type(place, transformers)}
    config = _config(written, arguments, ref, transformers)
    cls = _class(config, architecture, ref, transformers)
    _no_cache(config)

    def build() -> nn.Module:
        try:
            return _built(cls, config)
        except Exception as e:
            raise ModelError(f"{ref}: {cls.__name__} cannot be built: {_said(e)}") from e

    def make_inputs(sizes: Mapping[str, Any]) -> Inputs:
        return (), _inputs(cls, config, sizes, spec, ref)

    weights = directory if directory and any(directory.glob("*.safetensors")) else None
    return Loaded(build, make_inputs, ref, cls.__name__, spec.inputs, spec.seed, weights, arguments.overrides)


def save_beside(ref: str, spec: Spec, arguments: Arguments, dtype: torch.dtype, out: Path) -> None:
    """Writes to `out` what `from_pretrained` needs besides the weights of `hf:…`: configurations and tokenizer.

    The configuration is the one that the model was built with, and has `dtype`. The tokenizer's files and the
    configuration of generation are copied from the model's directory, if it has them. Raises `TpcError`.
    """
    import transformers

    place, architecture = _split(ref.removeprefix("hf:"))
    directory = Path(place) if Path(place).exists() else None
    written = _read(directory, place, transformers) if directory else {"model_type": _type(place, transformers)}
    config = _config(written, arguments, ref, transformers)
    cls = _class(config, architecture, ref, transformers)
    config.architectures, config.dtype = [cls.__name__], dtype
    try:
        config.save_pretrained(out)
        if directory is not None:
            for pattern in _BESIDE:
                for file in directory.glob(pattern):
                    shutil.copyfile(file, out / file.name)
        if not (out / "generation_config.json").exists() and cls.can_generate():
            transformers.GenerationConfig.from_model_config(config).save_pretrained(out)
    except OSError as e:
        raise ModelError(f"{out}: cannot write: {(e.strerror or str(e)).lower()}") from None


def _split(place: str) -> tuple[str, str]:
    if not Path(place).exists() and ":" in place:
        left, _, name = place.rpartition(":")
        return left, name
    return place, ""


def _read(directory: Path, place: str, transformers: Any) -> dict[str, Any]:
    """The content of config.json. Raises `ModelError` when it cannot be read or has a type unknown to transformers."""
    file = directory / "config.json"
    if not directory.is_dir():
        raise ModelError(f"hf:{place}: is a file; give the directory that holds config.json")
    if not file.exists():
        raise ModelError(f"hf:{place}: holds no config.json, which a Hugging Face model has")
    try:
        written = json.loads(file.read_bytes())
    except json.JSONDecodeError as e:
        raise ModelError(f"{file}:{e.lineno}: not JSON: {e.msg}") from None
    except (OSError, UnicodeDecodeError) as e:
        raise ModelError(f"{file}: cannot be read: {e}") from None
    if not isinstance(written, dict):
        raise ModelError(f"{file}: is not a JSON object")
    kind = str(written.get("model_type"))
    if kind not in transformers.CONFIG_MAPPING:
        near = nearest(kind, transformers.CONFIG_MAPPING.keys())
        raise ModelError(f"{file}: model_type {kind!r} is none of transformers {transformers.__version__}; {near}")
    return written


def _type(kind: str, transformers: Any) -> str:
    if kind in transformers.CONFIG_MAPPING:
        return kind
    if "/" in kind or kind.startswith("."):
        raise ModelError(f"hf:{kind}: no such directory; models are not downloaded, give a local directory")
    known = transformers.CONFIG_MAPPING.keys()
    raise ModelError(f"hf:{kind}: neither a directory nor a model type of transformers; {nearest(kind, known)}")


def _config(written: dict[str, Any], arguments: Arguments, ref: str, transformers: Any) -> Any:
    """The configuration, with the keys of `model:` and `--set` in place of its own. Keys that are given nowhere get
    transformers' defaults."""
    cls = transformers.CONFIG_MAPPING[written["model_type"]]
    try:
        known = {*cls.from_dict(written).to_dict(), *cls.attribute_map}
        for key, value in arguments.values.items():
            if key not in known:
                raise arguments.error(key, f"{cls.__name__} has no {key!r}; {nearest(key, known)}")
            name = cls.attribute_map.get(key, key)
            part = written.get(name)
            whole = {**part, **value} if isinstance(part, dict) and isinstance(value, Mapping) else value
            written = {**{k: v for k, v in written.items() if k != key}, name: whole}
        return cls.from_dict(written)
    except TpcError:
        raise
    except Exception as e:
        raise ModelError(f"{ref}: the configuration is refused: {_said(e)}") from e


def _class(config: Any, name: str, ref: str, transformers: Any) -> Any:
    """The model class: the one that is asked for, else the configuration's, else the usual one of its type."""
    names = [name] if name else list(getattr(config, "architectures", None) or [])
    for candidate in names:
        cls = getattr(transformers, candidate, None)
        if inspect.isclass(cls) and issubclass(cls, nn.Module):
            return cls
    if name:
        known = [n for n in dir(transformers) if n.lower().startswith(config.model_type.replace("_", "")[:4].lower())]
        raise ModelError(f"{ref}: transformers has no model class {name!r}; {nearest(name, known)}")
    usual: tuple[str, ...] = ("ForMaskedLM", "ForCausalLM", "")
    if config.is_encoder_decoder:
        usual = ("ForSeq2SeqLM", "")
    elif getattr(config, "is_decoder", False):
        usual = ("ForCausalLM", "")
    for auto in usual:
        mapping = getattr(transformers, f"AutoModel{auto}")._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise ModelError(f"{ref}: transformers has no model for {type(config).__name__}; name one: {ref}:CLASS")


def _no_cache(config: Any) -> None:
    """Switches the key-value cache off. It is for generation, and its tensors would be outputs of the program."""
    for part in (config, *(getattr(config, n, None) for n in getattr(config, "sub_configs", {}))):
        if part is not None and hasattr(part, "use_cache"):
            part.use_cache = False


def _built(cls: Any, config: Any) -> nn.Module:
    try:
        return cls._from_config(config, attn_implementation="sdpa").train()
    except ValueError as e:
        if "attention" not in str(e) and "sdpa" not in str(e):
            raise
        return cls._from_config(config, attn_implementation="eager").train()


def _inputs(cls: Any, config: Any, sizes: Mapping[str, Any], spec: Spec, ref: str) -> dict[str, torch.Tensor]:
    """Example inputs of the architecture. `batch` and `sequence` are their sizes, `target` that of an encoder-decoder's
    target; `attention_mask`, `labels` and `position_ids` switch inputs on.

    A causal model gets no mask unless it is switched on: without one, the causal mask is a constant that the fast
    kernels recognize.
    """
    known = ("batch", "sequence", "target", "attention_mask", "labels", "position_ids")
    for key in sizes:
        if key not in known:
            raise spec.error("inputs", key, what=f"{ref} takes no {key!r}; {nearest(key, known)}")
    takes = inspect.signature(cls.forward).parameters
    text = config.get_text_config()
    task = _task(cls, config)
    batch, sequence = _size("batch", sizes, 2, spec), _size("sequence", sizes, _length(text), spec)
    if getattr(cls, "main_input_name", "input_ids") == "pixel_values":
        return _images(config, batch, task, sizes)
    if "input_ids" not in takes:
        what = "takes no input_ids, so no example inputs can be made"
        raise ModelError(f"{ref}: {cls.__name__} {what}; wrap it in a model.py with example_inputs beside it")
    out = {"input_ids": _ids(text, batch, sequence)}
    if sizes.get("attention_mask", task != "CAUSAL_LM") and "attention_mask" in takes:
        out["attention_mask"] = torch.ones(batch, sequence, dtype=torch.long)
    if sizes.get("position_ids", False):
        if "position_ids" not in takes:
            raise spec.error("inputs", "position_ids", what=f"{cls.__name__} takes no position_ids")
        out["position_ids"] = torch.arange(sequence).repeat(batch, 1)
    target = _size("target", sizes, max(sequence * 3 // 4, 1), spec) if config.is_encoder_decoder else sequence
    labels = sizes.get("labels", task is not None) and "labels" in takes
    if labels and task == "SEQUENCE_CLASSIFICATION":
        out["labels"] = torch.randint(config.num_labels, (batch,))
    elif labels and task == "TOKEN_CLASSIFICATION":
        out["labels"] = torch.randint(config.num_labels, (batch, sequence))
    elif labels:
        out["labels"] = _ids(text, batch, target)
    shifts = "labels" in out and getattr(config, "decoder_start_token_id", None) is not None
    if config.is_encoder_decoder and "decoder_input_ids" in takes and not shifts:
        out["decoder_input_ids"] = _ids(text, batch, target)
    return out


def _images(config: Any, batch: int, task: str | None, sizes: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    height = width = config.image_size
    if isinstance(height, (list, tuple)):
        height, width = height
    out = {"pixel_values": torch.randn(batch, config.num_channels, height, width)}
    if sizes.get("labels", False):
        out["labels"] = torch.randint(config.num_labels, (batch,))
    return out


def _ids(config: Any, batch: int, sequence: int) -> torch.Tensor:
    """Random tokens [batch, sequence] without the padding token, from which some models compute positions."""
    pad = getattr(config, "pad_token_id", None)
    ids = torch.randint(config.vocab_size - 1, (batch, sequence))
    return ids if pad is None else ids + (ids >= pad).long()


def _length(config: Any) -> int:
    longest = getattr(config, "max_position_embeddings", None)
    return min(16, longest) if isinstance(longest, int) and longest > 0 else 16


def _size(name: str, sizes: Mapping[str, Any], default: int, spec: Spec) -> int:
    value = sizes.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise spec.error("inputs", name, what=f"{value!r} is not a positive integer; write e.g. {name}: {default}")
    return value


def _task(cls: Any, config: Any) -> str | None:
    """The task that the architecture is trained for, by transformers' own tables. None for a bare model."""
    from transformers.models.auto import modeling_auto

    for task in _TASKS:
        names = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}).values()
        if any(cls.__name__ in ((n,) if isinstance(n, str) else n) for n in names):
            return task
    return None


def _said(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}", 240)
