"""`tpc eval`: perplexity and cloze accuracy of a causal language model on the ranks of a spec."""

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
class Question:
    """What is measured."""

    perplexity: Path | None = None  # a text
    cloze: Path | None = None  # texts
    stride: int = 32
    batch: int = 8
    wikitext: bool = False  # the text has its words and marks apart
    renaming: Renaming = field(default_factory=Renaming)  # of the weights' names


def measure(
    loaded: Loaded, spec: Spec, train: Train, place: Place, weights: Path, question: Question
) -> dict[str, float]:
    """The numbers, the same on all ranks. Windows and texts are shared by the data ranks. Raises `TpcError`."""
    tokenizer = load_tokenizer(train.tokenizer)
    program = Program(loaded, spec, train, place, weights, question)
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

    def __init__(
        self, loaded: Loaded, spec: Spec, train: Train, place: Place, weights: Path, question: Question
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
        self.module = filled(self.compiled, self.ranks, self.numbers, place, weights, question.renaming)
        self._check_causal(vocabulary)

    def __call__(self, ids: Tensor) -> Tensor:
        with torch.autocast(self.device.type, self.numbers.compute, enabled=self.numbers.mixed, cache_enabled=False):
            logits: Tensor = self.module(**{self._ids: ids})
        return logits

    def _check_causal(self, vocabulary: int) -> None:
        """Raises `TpcError` when a later token changes the scores of earlier ones: they are then no predictions."""
        ids = torch.arange(self.length, device=self.device).remainder(vocabulary).unsqueeze(0)
        other = ids.clone()
        other[0, -1] = (other[0, -1] + 1) % vocabulary
        with torch.no_grad():
            first, second = self(ids)[:, :-1], self(other)[:, :-1]
        if not torch.allclose(first, second, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise TpcError(
                f"{self.compiled.capture.model}: a token changes the scores before it, so that it is no causal model, "
                f"and has no perplexity; tpc eval measures causal models alone"
            )

    @property
    def share(self) -> tuple[int, int]:
        """This rank's part of the work: (index, degree) among the data ranks."""
        group = self.ranks.group(DATA)
        return group.index, group.size

    def sum(self, value: float) -> float:
        """Over the data ranks."""
        return float(self.ranks.group(DATA).all_reduce(torch.tensor(value, dtype=torch.float64, device=self.device)))


def filled(
    compiled: Compiled, ranks: Ranks, numbers: Numbers, place: Place, weights: Path, renaming: Renaming
) -> nn.Module:
    """This rank's module with its part of the weights, in evaluation mode."""
    program = compiled.sharded.program
    module = compiled.module(ranks, Rng(0, place.device))
    allocate(module, place.device, numbers.compute)
    names = {p.name: p.aliases for p in compiled.capture.parameters if not p.buffer}
    slices = {n: slice_on(program.dims[n], program.mesh, ranks.coords) for n in names}
    there = newest(weights)
    if (there / MANIFEST).is_file():  # each rank looks at its share of the files
        files = [f.name for f in load_manifest(there).files]
        verify(there, files[place.rank :: place.world])
    with open_source(there) as source:
        _, read = values_of(source, compiled.capture, renaming)
        fill(by_name(module, names), slices, read)
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
