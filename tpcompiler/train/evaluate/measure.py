"""`tpc eval`: measures the perplexity and cloze accuracy of a causal language model on the ranks of a spec."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpcompiler.errors import TpcError
from tpcompiler.execute.interpret import bind_inputs
from tpcompiler.layout import slice_on
from tpcompiler.load.target import Inputs, Loaded
from tpcompiler.runtime import Ranks, Rng
from tpcompiler.runtime.stored import MANIFEST
from tpcompiler.spec.schema import Spec
from tpcompiler.train.data.tokenizer import Tokenizer, load_tokenizer
from tpcompiler.train.data.wikitext import join_words
from tpcompiler.train.evaluate.scores import Score, cloze, cloze_hits, original_tokens, read_texts, score_tokens
from tpcompiler.train.hold.mapping import Renaming, values_of
from tpcompiler.train.hold.owned import allocate, fill, fill_buffers
from tpcompiler.train.hold.storage import Numbers, by_name
from tpcompiler.train.run.checkpoint import checkpoints
from tpcompiler.train.run.launch import Place
from tpcompiler.train.run.training_run import CHECKPOINTS
from tpcompiler.train.settings import Train
from tpcompiler.train.step.compiled import Compiled, compile_model, logits_output
from tpcompiler.train.step.limits import check_inputs
from tpcompiler.weights import load_manifest, open_source, verify
from tpcompiler.weights.manifest import DATA


@dataclass(frozen=True)
class EvalRequest:
    """What `tpc eval` is asked to measure, and how."""

    perplexity: Path | None = None  # a text
    cloze: Path | None = None  # texts
    stride: int = 32
    batch: int = 8
    wikitext: bool = False  # the text has spaces around its punctuation
    renaming: Renaming = field(default_factory=Renaming)  # of the weights' names


def measure(
    loaded: Loaded, spec: Spec, train: Train, place: Place, weights: Path, request: EvalRequest
) -> dict[str, float]:
    """The measured numbers by name, the same on all ranks. The data ranks share the work. Raises `TpcError`."""
    tokenizer = load_tokenizer(train.tokenizer)
    scorer = Scorer(loaded, spec, train, place, weights, request)
    out: dict[str, float] = {}
    if request.perplexity is not None:
        out |= _perplexity(scorer, request, tokenizer)
    if request.cloze is not None:
        items = [cloze(t, tokenizer, train.sequence) for t in read_texts(request.cloze, train.data.field)]
        hits = cloze_hits(scorer, items, train.sequence, request.batch, scorer.share, place.device)
        out |= {"cloze_accuracy": scorer.sum(hits) / len(items), "cloze_texts": len(items)}
    return out


def _perplexity(scorer: Scorer, request: EvalRequest, tokenizer: Tokenizer) -> dict[str, float]:
    assert request.perplexity is not None
    try:
        text = request.perplexity.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise TpcError(f"{request.perplexity}: {e.strerror if isinstance(e, OSError) else 'not UTF-8 text'}") from None
    words = original_tokens(text)
    ids = torch.tensor(tokenizer.encode(join_words(text) if request.wikitext else text))
    mine = score_tokens(
        scorer,
        ids,
        scorer.length,
        min(request.stride, scorer.length),
        request.batch,
        scorer.share,
        scorer.device,
    )
    score = Score(scorer.sum(mine.nll), int(scorer.sum(mine.tokens)))
    return {
        "perplexity": score.perplexity(words),
        "token_perplexity": score.perplexity(),
        "nll": score.nll,
        "tokens": score.tokens,
        "words": words,
    }


class Scorer:
    """A model on this rank: a callable from ids [b, s] to logits [b, s, vocabulary], gathered from all ranks."""

    def __init__(
        self, loaded: Loaded, spec: Spec, train: Train, place: Place, weights: Path, request: EvalRequest
    ) -> None:
        self._ids = train.data.names.get("input_ids", "input_ids")
        self.compiled = compile_model(
            loaded, spec, ids_alone(loaded, self._ids), logits_output, double=train.precision == "fp64"
        )
        program = self.compiled.sharded.program
        sample = torch.zeros(2, train.sequence, dtype=torch.int64)
        vocabulary = load_tokenizer(train.tokenizer).vocab
        check_inputs(
            self.compiled.capture, bind_inputs(self.compiled.capture, **{self._ids: sample}), vocabulary - 1, self._ids
        )
        self.device, self.length, self.numbers = place.device, train.sequence, Numbers.of(train.precision)
        self.ranks = Ranks.from_env(program.mesh, timeout=place.timeout)
        self.module = filled(self.compiled, self.ranks, self.numbers, place, weights, request.renaming)
        self._check_causal(vocabulary)

    def __call__(self, ids: Tensor) -> Tensor:
        with torch.autocast(self.device.type, self.numbers.compute, enabled=self.numbers.mixed, cache_enabled=False):
            logits: Tensor = self.module(**{self._ids: ids})
        return logits

    def _check_causal(self, vocabulary: int) -> None:
        """Raises `TpcError` when a token changes the scores before it, since these are then not predictions."""
        ids = torch.arange(self.length, device=self.device).remainder(vocabulary).unsqueeze(0)
        other = ids.clone()
        other[0, -1] = (other[0, -1] + 1) % vocabulary
        with torch.no_grad():
            first, second = self(ids)[:, :-1], self(other)[:, :-1]
        if not torch.allclose(first, second, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise TpcError(
                f"{self.compiled.capture.model}: a token changes the scores before it, so that it is no causal model, "
                f"and has no perplexity; tpc eval measures only causal models"
            )

    @property
    def share(self) -> tuple[int, int]:
        """This rank's part of the work: its index among the data ranks, and their number."""
        group = self.ranks.group(DATA)
        return group.index, group.size

    def sum(self, value: float) -> float:
        """The sum of a number over the data ranks."""
        return float(self.ranks.group(DATA).all_reduce(torch.tensor(value, dtype=torch.float64, device=self.device)))


def filled(
    compiled: Compiled, ranks: Ranks, numbers: Numbers, place: Place, weights: Path, renaming: Renaming
) -> nn.Module:
    """This rank's module in evaluation mode, filled with its part of the weights."""
    program = compiled.sharded.program
    module = compiled.module(ranks, Rng(0, place.device))
    allocate(module, place.device, numbers.compute)
    names = {p.name: p.aliases for p in compiled.capture.parameters if not p.buffer}
    slices = {n: slice_on(program.dims[n], program.mesh, ranks.coords) for n in names}
    there = newest(weights)
    if (there / MANIFEST).is_file():  # each rank checks its share of the files
        files = [f.name for f in load_manifest(there).files]
        verify(there, files[place.rank :: place.world])
    with open_source(there) as source:
        _, read = values_of(source, compiled.capture, renaming)
        fill(by_name(module, names), slices, read)
    fill_buffers(module, program, ranks.coords)
    return module.eval()


def newest(path: Path) -> Path:
    """The newest checkpoint, if `path` is a run; else `path` itself."""
    found = checkpoints(path / CHECKPOINTS)
    return found[0] if found else path


def ids_alone(loaded: Loaded, ids: str) -> Inputs:
    """The example inputs without all but the tokens, so that the model returns logits and no loss."""
    _, kwargs = loaded.inputs()
    if ids not in kwargs:
        raise TpcError(f"{loaded.source}: has no input {ids}; name it in train.data.names: {{input_ids: …}}")
    rest: dict[str, Any] = {k: v for k, v in kwargs.items() if not isinstance(v, Tensor)}
    return (), {ids: kwargs[ids], **rest}
