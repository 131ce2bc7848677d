"""A sequence that grows, against the whole of it: what the tests of the decoder share."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.zoo import ZOO
from tpcompiler.api import compile_capture
from tpcompiler.capture import capture, float64
from tpcompiler.decode import Decoder, derive
from tpcompiler.decode.incremental import Incremental
from tpcompiler.execute.interpret import interpret_capture
from tpcompiler.execute.simulate import run_ranks
from tpcompiler.program import Capture, Program
from tpcompiler.runtime import Ranks
from tpcompiler.runtime.runs import take_rows
from tpcompiler.spec.schema import Spec
from tpcompiler.verification.against_model import local_slice

SMALL: dict[str, dict[str, int]] = {
    "gpt2": {"vocab": 61, "positions": 24, "hidden": 24, "heads": 3, "layers": 2},
    "llama": {"vocab": 61, "positions": 24, "hidden": 48, "heads": 6, "kv_heads": 2, "layers": 2, "intermediate": 40},
}


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A small model of models/ or of the zoo, and example inputs."""
    if name in ZOO:
        return ZOO[name]()
    module = importlib.import_module(f"models.{name}")
    return module.Model(**SMALL[name]), {"input_ids": module.example_inputs(2, 12, vocab=61)["input_ids"]}


def scores(captured: Capture) -> Capture:
    """The capture with its last value [batch, sequence, n] as the only output: the logits, also of a model that gives
    its loss alone."""
    ids = next(n for n in captured.graph.nodes if n.name == captured.inputs[0]).meta["val"]
    found = None
    for node in captured.graph.nodes:
        value = node.meta.get("val")
        if (
            not isinstance(value, Tensor)
            or value.dim() != 3
            or not value.is_floating_point()
            or node.op != "call_function"
        ):
            continue
        if str(value.shape[:2]) == str(ids.shape[:2]) and isinstance(value.shape[2], int):
            found = node
    out = next(n for n in captured.graph.nodes if n.op == "output")
    out.args = ((found,),)
    captured.graph.eliminate_dead_code()
    return replace(captured, out_spec=pytree.tree_structure(0))


@dataclass(frozen=True)
class Growing:
    """A model's decoder, and the whole model's logits to compare with."""

    decoder: Decoder
    state: dict[str, Tensor]
    rows: list[Tensor]  # the inputs along the sequence [b, length, …]
    whole: Tensor  # [b, length, vocabulary]

    @property
    def program(self) -> Program:
        return self.decoder.program

    def full(self, ids: Tensor) -> Tensor:
        """The whole model's logits for other token ids."""
        with torch.no_grad():
            (logits,) = interpret_capture(self.program.capture, self.state, {self.decoder.rows[0]: ids})
        assert isinstance(logits, Tensor)
        return logits

    def run(self, cuts: Sequence[int], counts: Sequence[int] | None = None) -> float:
        """The largest difference of any rank's logits, over steps that begin at `cuts`. With `counts`, sequences begin
        with so many tokens each, and go on token by token."""
        errors = run_ranks(self.program.mesh, lambda ranks: self._rank(ranks, list(cuts), counts))
        return max(errors)

    def _rank(self, ranks: Ranks, cuts: list[int], counts: Sequence[int] | None) -> float:
        b, length = self.rows[0].shape[:2]
        growing = Incremental(self.decoder, ranks, self.held(ranks), length, b)
        expected = self._mine(self.whole, ranks)
        if counts is not None:
            return self._ragged(growing, expected, torch.tensor(counts))
        ends = [*cuts[1:], length]
        found = [growing(*(x[:, i:j] for x in self.rows)) for i, j in zip(cuts, ends, strict=True)]
        return _difference(torch.cat(found, 1), expected)

    def _ragged(self, growing: Incremental, expected: Tensor, counts: Tensor) -> float:
        longest, length = int(counts.max()), self.rows[0].shape[1]
        found = growing(*(x[:, :longest] for x in self.rows), counts=counts)
        errors = [_difference(found[i, :n], expected[i, :n]) for i, n in enumerate(counts.tolist())]
        sequences = torch.arange(len(counts))
        for at in (counts + k for k in range(length - longest)):
            found = growing(*(x[sequences, at][:, None] for x in self.rows))
            errors.append(_difference(found[:, 0], expected[sequences, at]))
        return max(errors)

    def held(self, ranks: Ranks) -> dict[str, Tensor]:
        dims = self.program.dims
        return {n: local_slice(x, dims[n], ranks.mesh, ranks.coords) for n, x in self.state.items()}

    def _mine(self, logits: Tensor, ranks: Ranks) -> Tensor:
        dim = self.decoder.vocabulary
        return logits if dim is None else take_rows(logits, 2, dim.runs(ranks.mesh, ranks.coords))


def _difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max()) if a.numel() else 0.0


def growing(model: nn.Module, inputs: dict[str, Any], degree: int, length: int = 16, batch: int = 3) -> Growing:
    """A model in float64, split over `degree` ranks, with random tokens of that length.

    It is captured in its own dtype, as a user's is: casts that follow the model's dtype are then operations.
    """
    captured = scores(float64(capture(model, inputs)))
    model = model.double()
    doubled = {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}
    sharded = compile_capture(
        captured, Spec.load({"mesh": {"tensor": degree}, "outputs": "shard", "allow_empty": True})
    )
    decoder = derive(sharded.program)
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {p.name: next((held[n] for n in p.names if n in held), p.value) for p in sharded.capture.parameters}
    examples = dict(zip(captured.inputs, (doubled[n] for n in captured.arg_names), strict=True))
    rows = [_drawn(examples[name], batch, length) for name in decoder.rows]
    given = {**examples, **dict(zip(decoder.rows, rows, strict=True))}
    with torch.no_grad():
        (whole,) = interpret_capture(captured, {k: v for k, v in state.items() if v is not None}, given)
    return Growing(decoder, {k: v.detach() for k, v in state.items() if v is not None}, rows, whole)


def _drawn(example: Tensor, batch: int, length: int) -> Tensor:
    if example.dtype is torch.bool:
        return torch.arange(length).expand(batch, length) >= length - 2
    return torch.randint(int(example.max()) + 1, (batch, length))
