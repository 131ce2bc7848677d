"""The `train:` section of a spec: everything a training run is made of, but the model and the mesh.

`spec.section(Train)` reads it, with errors that name file, line and key. All defaults together are a run: the embedded
text, bytes as tokens, AdamW with the paper's warm-up and cosine.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from tpcompiler.spec.schema import Section

BUILTIN = "builtin"  # the path of the text that every CPython carries

Task = Literal["causal", "mlm", "mlm+sop", "mlm+nsp", "spans", "pairs"]
Format = Literal["auto", "text", "jsonl", "tokens"]
TokenType = Literal["uint16", "uint32"]
Precision = Literal["bf16", "fp16", "fp32", "fp64"]


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _paths(value: Any) -> Any:
    return (value,) if isinstance(value, str) else _tuple(value)


def _compile(value: Any) -> Any:
    return {True: "layers", False: "none"}[value] if isinstance(value, bool) else value


Compile = Annotated[Literal["none", "layers", "whole"], BeforeValidator(_compile)]
Paths = Annotated[tuple[str, ...], BeforeValidator(_paths)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Data(Section):
    """What is read, and what the model is to guess."""

    path: Paths = Field(
        default=(BUILTIN,),
        min_length=1,
        description="Files, directories or globs. `builtin` is English text that Python itself carries.",
        examples=["data/*.jsonl"],
    )
    mix: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="Several corpora instead of `path`, each with its share of the samples. A small one with a large "
        "share is repeated.",
        examples=[{"books/*.jsonl": 0.7, "code/*.jsonl": 0.3}],
    )
    validation: Paths = Field(
        default=(),
        description="The same for evaluation. Left out: the end of `path`, see `held_out`.",
        examples=["v.txt"],
    )
    held_out: Fraction = Field(
        default=0.01, description="Share of the samples, at the end of `path`, that is kept for evaluation."
    )
    format: Format = Field(
        default="auto", description="auto: by suffix; .jsonl is jsonl, .bin and .tokens are tokens, others are text."
    )
    field: str = Field(default="text", min_length=1, description="The key of a .jsonl line that holds the text.")
    target_field: str = Field(
        default="target", min_length=1, description="pairs only: the key of the text that `field` is to become."
    )
    target_sequence: int | None = Field(
        default=None, gt=1, description="pairs only: tokens in a target. Left out: `train.sequence`."
    )
    token_type: TokenType | None = Field(
        default=None, description="How a token file stores its ids. Left out: its sidecar FILE.json says `dtype`."
    )
    task: Task = Field(
        default="causal",
        description="causal: the next token. mlm: masked tokens (BERT), with sop: whether two parts of a text were "
        "exchanged, with nsp: whether the second part belongs to another text. For encoder-decoders, spans: what was "
        "cut out of a text (T5); pairs: `target_field` of a .jsonl line from its `field`.",
    )
    labels: Literal["next", "same"] = Field(
        default="next",
        description="Causal labels: `next` hold the token after each input token; `same` are the input tokens, for "
        "models that shift inside (Hugging Face's).",
    )
    documents: Literal["continue", "restart"] = Field(
        default="continue",
        description="causal only: what happens in a sample where a document ends. continue: nothing. restart: the "
        "model gets position_ids, which begin with 0 in each document, and document_ids, and takes at least one of "
        "them; the first token of a document is not guessed.",
    )
    names: dict[str, str] = Field(
        default_factory=dict,
        description="The model's own names of input_ids, labels, attention_mask, token_type_ids, pair_labels, "
        "target_ids, position_ids and document_ids.",
        examples=[{"pair_labels": "next_sentence_label"}],
    )
    cache: str | None = Field(
        default=None, description="Where tokenised text is kept. Left out: $XDG_CACHE_HOME/tpcompiler, or ~/.cache/…"
    )

    @field_validator("names")
    @classmethod
    def _known(cls, names: dict[str, str]) -> dict[str, str]:
        keys = (
            "input_ids", "labels", "attention_mask", "token_type_ids", "pair_labels", "target_ids", "position_ids",
            "document_ids",
        )  # fmt: skip
        for name in names:
            if name not in keys:
                raise PydanticCustomError("name", "must have keys among " + ", ".join(keys))
        return names


class Group(Section):
    """Parameters that are trained in another way."""

    match: str = Field(min_length=1, description="Glob over parameter names.", examples=["*.wte.weight"])
    lr: float = Field(default=1.0, ge=0, description="Factor on the learning rate.")
    weight_decay: float | None = Field(
        default=None, ge=0, description="Weight decay instead of the optimizer's. It acts on norms and biases too."
    )


class Optimizer(Section):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101): weight decay acts on matrices, not on norms and biases."""

    class_: str | None = Field(
        default=None,
        alias="class",
        min_length=3,
        description="Another optimizer's import path. It takes `arguments` instead of betas and eps. Each element's "
        "step must depend on that element alone, which is tried out at the start. Left out: AdamW.",
        examples=["torch.optim.SGD"],
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="What `class` is made with.", examples=[{"momentum": 0.9}]
    )
    lr: float = Field(default=1.5e-4, gt=0, description="Peak learning rate.")
    betas: Annotated[tuple[float, float], BeforeValidator(_tuple)] = Field(
        default=(0.9, 0.999), description="Decay of the first and the second moment.", examples=[[0.9, 0.999]]
    )
    eps: float = Field(default=1e-8, gt=0, description="Added to the root of the second moment.")
    weight_decay: float = Field(default=0.01, ge=0, description="Decoupled weight decay of matrices.")
    clip: float | None = Field(
        default=1.0, gt=0, description="Largest global gradient norm; `null` leaves gradients as they are."
    )
    average: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Keeps an exponential moving average of the weights in checkpoints, which decays by this factor at "
        "every step. `tpc merge --average` writes it. Default: no average.",
        examples=[0.999],
    )
    groups: Annotated[tuple[Group, ...], BeforeValidator(_tuple)] = Field(
        default=(),
        description="Parameters that are trained in another way: {match: a glob of names, lr: a factor, weight_decay}. "
        "The first group that matches a parameter counts.",
        examples=[[{"match": "*.bias", "lr": 2.0}]],
    )

    @field_validator("betas")
    @classmethod
    def _below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise PydanticCustomError("betas", "must be two numbers from 0 up to, not including, 1")
        return betas


class Schedule(Section):
    """The learning rate as a function of the step: a linear warm-up from 0, then a decay."""

    decay: Literal["cosine", "linear", "constant", "inverse_sqrt", "stable"] = Field(
        default="cosine",
        description="How the learning rate falls. cosine, linear: from the warm-up to `until`. constant: not at all. "
        "inverse_sqrt: with one over the square root of the step. stable: not at all at first, then linearly during "
        "the last share `cooldown` of the steps until `until`.",
    )
    cooldown: Fraction = Field(default=0.2, gt=0, description="For stable: the share of `until` in which it falls.")
    warmup: int = Field(default=0, ge=0, description="Steps until the peak learning rate.")
    until: int | None = Field(
        default=None, gt=0, description="The step at which `min_lr` is reached. Default: the last step."
    )
    min_lr: float = Field(default=1e-5, ge=0, description="The learning rate at the end of the decay.")


class LossScale(Section):
    """Dynamic loss scaling (Micikevicius et al., arXiv 1710.03740). Only fp16 uses it."""

    start: float = Field(default=2.0**16, gt=0, description="The first scale.")
    growth: float = Field(default=2.0, gt=1, description="Factor on the scale after `interval` good steps in a row.")
    backoff: float = Field(
        default=0.5, gt=0, lt=1, description="Factor on the scale after a step whose gradients are not finite."
    )
    interval: int = Field(default=1000, gt=0, description="How many good steps in a row let the scale grow.")
    smallest: float = Field(
        default=1.0,
        gt=0,
        description="The run stops when the scale falls below this, as the scale is not the cause then.",
    )


class Evaluation(Section):
    """Loss on held-out text, while training."""

    every: int = Field(default=1000, ge=0, description="Steps between evaluations; 0: never.")
    batches: int = Field(default=10, gt=0, description="How many global batches an evaluation averages over.")


class Checkpoints(Section):
    """When checkpoints are written, and which are kept."""

    every: int = Field(default=1000, ge=0, description="Steps between checkpoints; 0: only at the last step.")
    keep: int = Field(default=2, gt=0, description="How many of the latest checkpoints are kept.")
    keep_best: bool = Field(
        default=True, description="Whether the checkpoint with the lowest evaluation loss is kept as well."
    )


class Logging(Section):
    """What a run logs."""

    every: int = Field(default=1, gt=0, description="Steps between records.")
    tensorboard: bool | None = Field(
        default=None,
        description="Whether a TensorBoard log is written besides log.jsonl. Default: if the package is installed.",
    )
    wandb: str | None = Field(
        default=None, min_length=1, description="A project of Weights & Biases that gets the records as well."
    )
    trace: int | None = Field(
        default=None,
        gt=0,
        description="A step that torch's profiler traces on GPUs: the run then says how much of its communication ran "
        "beside computation.",
    )


class Train(Section):
    """A training run."""

    steps: int = Field(default=1000, gt=0, description="Optimizer steps.")
    batch: int = Field(default=8, gt=0, description="Sequences a step, over all ranks.")
    micro_batch: int = Field(default=8, gt=0, description="The most sequences that a rank runs at once.")
    sequence: int = Field(default=1024, gt=1, description="Tokens in a sequence.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of the data's order and of the masking.")
    precision: Precision = Field(
        default="bf16",
        description="bf16 and fp16 compute in 16 bits, over fp32 master weights and fp32 gradient reduction.",
    )
    activation_checkpointing: Literal["none", "layer", "attention"] = Field(
        default="none", description="What is computed again in backward instead of kept."
    )
    compile: Compile = Field(
        default="layers",
        description="What goes through torch.compile. layers (true): each distinct layer, once. whole: the program and "
        "its loss as one graph, which is faster and takes minutes to compile for a deep model. none (false): nothing.",
    )
    cuda_graphs: bool = Field(
        default=True,
        description="Whether the host issues a step's work once and the device then repeats it: with one data rank, in "
        "16 bits, where micro-batches have one size, no size depends on a value, and nothing that draws random numbers "
        "inside of fused attention is computed again. Elsewhere it changes nothing.",
    )
    tokenizer: str = Field(
        default="bytes", min_length=1, description="`bytes`, or the path of a tokenizer.json or of its directory."
    )
    on_bad_batch: Annotated[str, Field(pattern=r"^(stop|skip|rewind( [1-9][0-9]*)?)$")] = Field(
        default="stop",
        description="What a bad batch does, one whose loss or gradient is not finite or a `spike`. stop: ends the run. "
        "skip: leaves the weights as they are; the host then waits for every step. rewind, or rewind N: goes back to "
        "the newest checkpoint, or to the N-th newest, and continues with the data behind that batch.",
    )
    spike: float | None = Field(
        default=None,
        gt=1,
        description="The loss or gradient norm that makes a batch bad, in standard deviations above the mean of the "
        "last 100 steps, once there are 20. Left out: none.",
    )
    compare_ranks: int = Field(
        default=1000,
        ge=0,
        description="Steps between comparisons of the parameters that several ranks hold whole; 0: never.",
    )
    data: Data = Field(default_factory=Data, description="What is read.")
    optimizer: Optimizer = Field(default_factory=Optimizer, description="AdamW.")
    schedule: Schedule = Field(
        default_factory=Schedule, description="The learning rate's course.", validate_default=True
    )
    loss_scale: LossScale = Field(default_factory=LossScale, description="fp16 only.")
    evaluation: Evaluation = Field(default_factory=Evaluation, description="Loss on held-out text.")
    checkpoints: Checkpoints = Field(default_factory=Checkpoints, description="What is kept.")
    logging: Logging = Field(default_factory=Logging, description="What is written down.")

    @field_validator("schedule")
    @classmethod
    def _reachable(cls, schedule: Schedule, info: ValidationInfo) -> Schedule:
        optimizer, steps = info.data.get("optimizer"), info.data.get("steps")
        if "min_lr" in schedule.model_fields_set and optimizer and schedule.min_lr > optimizer.lr:
            raise PydanticCustomError("min_lr", f"needs min_lr at most optimizer.lr = {optimizer.lr}")
        end = schedule.until or steps
        if end is not None and schedule.warmup >= end:
            raise PydanticCustomError("warmup", f"needs warmup below {end}, the step at which the decay ends")
        return schedule
