"""`tpc eval`: perplexity and cloze accuracy of a causal language model on the ranks of a spec."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpcompiler.errors import TpcError
from tpcompiler.layout import slice_on
from tpcompiler.load.target import Inputs, Loaded
from tpcompiler.runtime import Ranks, Rng
from tpcompiler.spec.schema import Spec
from tpcompiler.train.data.tokenizer import Tokenizer, load_tokenizer
from tpcompiler.train.data.wikitext import join_words
from tpcompiler.train.evaluate.scores import Score, cloze, cloze_hits, original_tokens, read_texts, score_tokens
from tpcompiler.train.hold.held import Numbers, by_name
from tpcompiler.train.hold.owned import allocate, fill, fill_buffers, from_source
from tpcompiler.train.run.checkpoint import checkpoints
from tpcompiler.train.run.compiled import Compiled, compile_model, logits_output
from tpcompiler.train.run.config import Train
from tpcompiler.train.run.loop import CHECKPOINTS
from tpcompiler.train.run.start import Place
from tpcompiler.weights import open_source
from tpcompiler.weights.manifest import DATA


@dataclass(frozen=True)
class Question:
    """What is measured."""

    perplexity: Path | None = None  # a text
    cloze: Path | None = None  # texts
    stride: int = 32
    batch: int = 8
    wikitext: bool = False  # the text has its words and marks apart


def measure(
    loaded: Loaded, spec: Spec, train: Train, place: Place, weights: Path, question: Question
) -> dict[str, float]:
    """The numbers, the same on all ranks. Windows and texts are shared by the data ranks. Raises `TpcError`."""
    tokenizer = load_tokenizer(train.tokenizer)
    program = Program(loaded, spec, train, place, weights)
    out: dict[str, float] = {}
    if question.perplexity is not None:
        out |= _perplexity(program, question, tokenizer)
    if question.cloze is not None:
        items = [cloze(t, tokenizer, train.sequence) for t in read_texts(question.cloze, train.data.field)]
        hits = cloze_hits(program, items, train.sequence, question.batch, program.share, place.device)
        out |= {"cloze_accuracy": program.sum(hits) / len(items), "cloze_texts": len(items)}
    return out


def _perplexity(program: Program, question: Question, tokenizer: Tokenizer) -> dict[str, float]:
    assert question.perplexity is not None
    try:
        text = question.perplexity.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise TpcError(f"{question.perplexity}: {e.strerror if isinstance(e, OSError) else 'not UTF-8 text'}") from None
    words = original_tokens(text)
    ids = torch.tensor(tokenizer.encode(join_words(text) if question.wikitext else text))
    mine = score_tokens(
        program,
        ids,
        program.length,
        min(question.stride, program.length),
        question.batch,
        program.share,
        program.device,
    )
    score = Score(program.sum(mine.nll), int(program.sum(mine.tokens)))
    return {
        "perplexity": score.perplexity(words),
        "token_perplexity": score.perplexity(),
        "nll": score.nll,
        "tokens": score.tokens,
        "words": words,
    }


class Program:
    """A model on this rank, from ids [b, s] to all logits [b, s, vocabulary]."""

    def __init__(self, loaded: Loaded, spec: Spec, train: Train, place: Place, weights: Path) -> None:
        self._ids = train.data.names.get("input_ids", "input_ids")
        self.compiled = compile_model(
            loaded, spec, ids_alone(loaded, self._ids), logits_output, double=train.precision == "fp64"
        )
        program = self.compiled.sharded.program
        self.device, self.length, self.numbers = place.device, train.sequence, Numbers.of(train.precision)
        self.ranks = Ranks.from_env(program.mesh)
        self.module = _filled(self.compiled, self.ranks, self.numbers, place, weights)

    def __call__(self, ids: Tensor) -> Tensor:
        with torch.autocast(self.device.type, self.numbers.compute, enabled=self.numbers.mixed, cache_enabled=False):
            logits: Tensor = self.module(**{self._ids: ids})
        return logits

    @property
    def share(self) -> tuple[int, int]:
        """This rank's part of the work: (index, degree) among the data ranks."""
        group = self.ranks.group(DATA)
        return group.index, group.size

    def sum(self, value: float) -> float:
        """Over the data ranks."""
        return float(self.ranks.group(DATA).all_reduce(torch.tensor(value, dtype=torch.float64, device=self.device)))


def _filled(compiled: Compiled, ranks: Ranks, numbers: Numbers, place: Place, weights: Path) -> nn.Module:
    program = compiled.sharded.program
    module = compiled.module(ranks, Rng(0, place.device))
    allocate(module, place.device, numbers.compute)
    names = {p.name: p.aliases for p in compiled.capture.parameters if not p.buffer}
    slices = {n: slice_on(program.dims[n], program.mesh, ranks.coords) for n in names}
    with open_source(newest(weights)) as source:
        fill(by_name(module, names), slices, from_source(source, compiled.capture))
    fill_buffers(module, program, ranks.coords)
    return module.eval()


def newest(path: Path) -> Path:
    """A run's newest checkpoint; anything else as it is."""
    found = checkpoints(path / CHECKPOINTS)
    return found[0] if found else path


def ids_alone(loaded: Loaded, ids: str) -> Inputs:
    """The example inputs with the tokens alone: the model then gives logits."""
    _, kwargs = loaded.inputs()
    if ids not in kwargs:
        raise TpcError(f"{loaded.source}: has no input {ids}; name it in train.data.names: {{input_ids: …}}")
    rest: dict[str, Any] = {k: v for k, v in kwargs.items() if not isinstance(v, Tensor)}
    return (), {ids: kwargs[ids], **rest}
