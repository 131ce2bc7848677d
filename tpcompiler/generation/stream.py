"""Prompts through a batch of places: a finished one gives its place to the next."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tpcompiler.decode import Decoder
from tpcompiler.decode.incremental import Incremental
from tpcompiler.errors import TpcError
from tpcompiler.runtime import Group, Ranks
from tpcompiler.runtime.runs import Runs, local_ids
from tpcompiler.runtime.sample import Sampling, choose, held, penalise
from tpcompiler.train.step.limits import check_inputs

__all__ = ["Sampling", "Served", "Stream", "Token", "Wish", "check_prompts"]


@dataclass(frozen=True)
class Served:
    """A model on this rank, ready to generate. `state`: its parameters and buffers, this rank's part of them."""

    decoder: Decoder
    ranks: Ranks
    state: dict[str, Tensor]
    device: torch.device
    around: AbstractContextManager[object] = field(default_factory=nullcontext)  # autocast

    @property
    def rows(self) -> Runs:
        """The token ids whose scores this rank holds."""
        dim = self.decoder.vocabulary
        assert dim is not None
        return dim.runs(self.ranks.mesh, self.ranks.coords)

    @property
    def group(self) -> Group:
        """The ranks that share the vocabulary."""
        dim = self.decoder.vocabulary
        return self.ranks.group(dim.over) if dim is not None and dim.over else Group()


@dataclass(frozen=True)
class Wish:
    """What is generated: at most `tokens` a prompt, none after one of `stop`, `batch` prompts at a time."""

    tokens: int = 64
    how: Sampling = field(default_factory=Sampling)
    stop: Collection[int] = ()
    batch: int = 8


@dataclass(frozen=True)
class Token:
    """A new token of a prompt. `last`: none follows it."""

    prompt: int
    token: int
    last: bool


def check_prompts(decoder: Decoder, prompts: Sequence[Sequence[int]], wish: Wish) -> None:
    """Raises `TpcError` when a prompt is empty, has a token that the model lacks, or does not fit into its positions.

    Nothing is computed but shapes: this is known before weights are read.
    """
    if wish.tokens < 1 or wish.batch < 1:
        raise TpcError(f"{wish.tokens} tokens in batches of {wish.batch}: both must be 1 at least")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise TpcError(f"prompt {number + 1} is empty: a model continues a text of one token at least")
    longest = max((len(p) for p in prompts), default=0)
    largest = max((max(p) for p in prompts), default=0)
    capture = decoder.program.capture
    names = dict(zip(capture.inputs, capture.arg_names, strict=True))
    used = {n.name for n in decoder.program.graph.nodes if n.op == "placeholder" and n.users}
    if others := [names[n] for n in capture.inputs if n in used and n != decoder.rows[0]]:
        raise TpcError(f"{capture.model} also takes {', '.join(others)}: a model of token ids alone would work")
    inputs = {decoder.rows[0]: torch.zeros(1, longest + wish.tokens, dtype=torch.int64)}
    try:
        check_inputs(capture, inputs, largest, names[decoder.rows[0]])
    except TpcError as e:
        why = str(e).removeprefix("train.sequence: ").removeprefix("data: ")
        raise TpcError(f"a prompt of {longest} tokens and {wish.tokens} new ones: {why}") from None


class Stream:
    """`for token in Stream(served, prompts, wish)`: the new tokens of all prompts, as they are made.

    `prompts` are token ids. What a prompt gets depends on its number, the seed and the weights, and not on the others:
    noise is drawn by number and position. All ranks run it and see the same.
    """

    def __init__(self, served: Served, prompts: Sequence[Sequence[int]], wish: Wish) -> None:
        check_prompts(served.decoder, prompts, wish)
        self.served, self.prompts, self.wish = served, prompts, wish
        alone = bool(served.decoder.uniform)
        self.places = 1 if alone else min(wish.batch, max(len(prompts), 1))
        capacity = max((len(p) for p in prompts), default=0) + wish.tokens
        self._growing = Incremental(
            served.decoder, served.ranks, served.state, capacity, self.places, device=served.device
        )
        self._index = held(served.rows, served.device)
        self._seen = torch.zeros(self.places, len(self._index), dtype=torch.bool, device=served.device)
        self._prompt = [-1] * self.places  # whose place it is; -1: nobody's
        self._made = [0] * self.places
        self._newest = [0] * self.places

    def __iter__(self) -> Iterator[Token]:
        waiting = iter(range(len(self.prompts)))
        while True:
            for place in range(self.places):
                while self._prompt[place] < 0 and (number := next(waiting, None)) is not None:
                    yield self._enter(place, number)
            if all(number < 0 for number in self._prompt):
                return
            yield from self._step()

    def _enter(self, place: int, number: int) -> Token:
        """Gives a prompt a place, and generates its first token."""
        ids = torch.tensor([list(self.prompts[number])], device=self.served.device)
        self._prompt[place], self._made[place] = number, 0
        self._seen[place] = False
        self._see(place, ids[0])
        with self.served.around:
            if self.served.decoder.uniform:
                self._growing.again()
                logits = self._growing(ids)
            else:
                logits = self._growing(ids, slot=place)
        (token,) = self._choose(logits[:, -1], [place])
        return self._take(place, token)

    def _step(self) -> list[Token]:
        """Generates one more token for every prompt in a place."""
        for place, number in enumerate(self._prompt):
            if number < 0:
                self._growing.session.begins(place, 0)  # nobody's: whatever it computes is not looked at
        ids = torch.tensor(self._newest, device=self.served.device)[:, None]
        with self.served.around:
            logits = self._growing(ids)
        chosen = self._choose(logits[:, 0], list(range(self.places)))
        return [self._take(place, chosen[place]) for place, number in enumerate(self._prompt) if number >= 0]

    def _choose(self, scores: Tensor, places: list[int]) -> list[int]:
        how, served = self.wish.how, self.served
        if how.repetition_penalty != 1:
            scores = penalise(scores, self._seen[places], how.repetition_penalty)
        numbers = [max(self._prompt[p], 0) for p in places]
        at = [len(self.prompts[n]) + self._made[p] for n, p in zip(numbers, places, strict=True)]
        where = [torch.tensor(x, device=served.device) for x in (numbers, at)]
        tokens: list[int] = choose(scores, self._index, served.group, how, *where).tolist()
        return tokens

    def _take(self, place: int, token: int) -> Token:
        number = self._prompt[place]
        self._made[place] += 1
        self._newest[place] = token
        self._see(place, torch.tensor([token], device=self.served.device))
        last = token in self.wish.stop or self._made[place] == self.wish.tokens
        if last:
            self._prompt[place] = -1
        return Token(number, token, last)

    def _see(self, place: int, ids: Tensor) -> None:
        if self.wish.how.repetition_penalty != 1:
            local, here = local_ids(ids, self.served.rows)
            self._seen[place, local[here]] = True
