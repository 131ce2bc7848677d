"""`tpc.generate`: generates tokens from Python, for example in a server."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tpcompiler.api import compile_capture
from tpcompiler.capture import capture_recorded, record
from tpcompiler.decode import derive
from tpcompiler.emit import load_source
from tpcompiler.generation.stream import Served, Stream, Token, Wish, check_prompts
from tpcompiler.runtime import Rng
from tpcompiler.runtime.precision import cast
from tpcompiler.runtime.sample import Sampling
from tpcompiler.spec.schema import Spec
from tpcompiler.train.step.compiled import logits_output, only
from tpcompiler.weights.fill import InitialValues, device_of, fill_from, own_values, ranks_of


def generate(
    model: Callable[[], nn.Module] | nn.Module,
    example_inputs: Any,
    spec: str | Path | Mapping[str, Any] | Spec,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: Collection[int] = (),
    batch: int = 8,
    mesh: Any = None,
    weights: Any = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[Token]:
    """Continues prompts of token ids, and yields a `Token` for every new token as soon as it is chosen.

    Every rank must call it, and all ranks yield the same tokens. `mesh`, `weights`, `device` and `dtype` are as in
    `tpc.parallelize`. `example_inputs` are inputs for which the model returns logits [batch, sequence, vocabulary].
    With `temperature` 0, the most likely token is taken. A text ends after a token in `stop`, or after `tokens` new
    ones. `batch` prompts are continued at the same time, and the next prompt takes the slot of a finished one. Raises
    `TpcError`, one line, before the first token.
    """
    how = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    wish = Wish(tokens, how, frozenset(stop), batch)
    read = Spec.load(spec).with_(outputs={"*": "shard"})
    recorded = record(model)
    captured = capture_recorded(recorded, example_inputs)
    sharded = compile_capture(only(captured, logits_output(captured)), read)
    sharded.proven()
    decoder = derive(sharded.program)
    check_prompts(decoder, prompts, wish)
    ranks = ranks_of(mesh, sharded.program.mesh)
    where = torch.device(device) if device is not None else device_of(mesh)
    with where:
        module: nn.Module = load_source(sharded.source, f"tpc_{captured.model}").Model(ranks, Rng(read.seed, where))
    if dtype is not None:
        module = cast(module, dtype)
    if weights is None:
        weights = own_values(model) if isinstance(model, nn.Module) else InitialValues(recorded, read.seed)
    fill_from(module, sharded.program, ranks.coords, weights)
    served = Served(decoder, ranks, held_by(module), where)
    return iter(Stream(served, prompts, wish))


def held_by(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's parameters and buffers, each under all of its names."""
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach() for name, tensor in named}
