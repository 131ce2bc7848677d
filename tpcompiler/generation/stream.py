"""Continues many prompts in a batch of slots. The next prompt takes the slot of a finished one."""

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
    """A model on this rank, ready to generate."""

    decoder: Decoder
    ranks: Ranks
    state: dict[str, Tensor]  # this rank's part of the parameters and buffers
    device: torch.device
    around: AbstractContextManager[object] = field(default_factory=nullcontext)  # every forward runs in it: autocast

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
    """How prompts are to be continued."""

    tokens: int = 64  # the most new tokens of a prompt
    how: Sampling = field(default_factory=Sampling)
    stop: Collection[int] = ()  # tokens after which a text ends
    batch: int = 8  # how many prompts are continued at the same time


@dataclass(frozen=True)
class Token:
    """A new token of a prompt."""

    prompt: int  # the prompt's number, from 0
    token: int
    last: bool  # whether the text ends with it


def check_prompts(decoder: Decoder, prompts: Sequence[Sequence[int]], wish: Wish) -> None:
    """Raises `TpcError` when a prompt is empty, has a token that the model does not have, or is too long for the model.

    Only shapes are computed, so that mistakes are found before weights are read.
    """
    if wish.tokens < 1 or wish.batch < 1:
        raise TpcError(f"{wish.tokens} tokens in batches of {wish.batch}: both must be at least 1")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise TpcError(f"prompt {number + 1} is empty: a model can only continue a text of at least one token")
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
    """Iterates over the new tokens of all prompts as they are chosen: `for token in Stream(served, prompts, wish)`.

    `prompts` are token ids. All ranks must iterate, and get the same tokens. What a prompt gets depends on its number,
    the seed and the weights, and not on other prompts, because random numbers are drawn by number and position.
    """

    def __init__(self, served: Served, prompts: Sequence[Sequence[int]], wish: Wish) -> None:
        check_prompts(served.decoder, prompts, wish)
        self.served, self.prompts, self.wish = served, prompts, wish
        alone = bool(served.decoder.uniform)
        self.slots = 1 if alone else min(wish.batch, max(len(prompts), 1))
        capacity = max((len(p) for p in prompts), default=0) + wish.tokens
        self._growing = Incremental(
            served.decoder, served.ranks, served.state, capacity, self.slots, device=served.device
        )
        self._index = held(served.rows, served.device)
        self._seen = torch.zeros(self.slots, len(self._index), dtype=torch.bool, device=served.device)
        self._prompt = [-1] * self.slots  # the number of the prompt in each slot; -1 for an empty slot
        self._made = [0] * self.slots
        self._newest = [0] * self.slots

    def __iter__(self) -> Iterator[Token]:
        waiting = iter(range(len(self.prompts)))
        while True:
            for slot in range(self.slots):
                while self._prompt[slot] < 0 and (number := next(waiting, None)) is not None:
                    yield self._admit(slot, number)
            if all(number < 0 for number in self._prompt):
                return
            yield from self._step()

    def _admit(self, slot: int, number: int) -> Token:
        """Gives a prompt a slot and generates its first token."""
        ids = torch.tensor([list(self.prompts[number])], device=self.served.device)
        self._prompt[slot], self._made[slot] = number, 0
        self._seen[slot] = False
        self._see(slot, ids[0])
        with self.served.around:
            if self.served.decoder.uniform:
                self._growing.again()
                logits = self._growing(ids)
            else:
                logits = self._growing(ids, slot=slot)
        (token,) = self._choose(logits[:, -1], [slot])
        return self._take(slot, token)

    def _step(self) -> list[Token]:
        """Generates one more token for every prompt in a slot."""
        for slot, number in enumerate(self._prompt):
            if number < 0:
                self._growing.session.begins(slot, 0)  # an empty slot computes as well, and its result is ignored
        ids = torch.tensor(self._newest, device=self.served.device)[:, None]
        with self.served.around:
            logits = self._growing(ids)
        chosen = self._choose(logits[:, 0], list(range(self.slots)))
        return [self._take(slot, chosen[slot]) for slot, number in enumerate(self._prompt) if number >= 0]

    def _choose(self, scores: Tensor, slots: list[int]) -> list[int]:
        how, served = self.wish.how, self.served
        if how.repetition_penalty != 1:
            scores = penalise(scores, self._seen[slots], how.repetition_penalty)
        numbers = [max(self._prompt[p], 0) for p in slots]
        at = [len(self.prompts[n]) + self._made[p] for n, p in zip(numbers, slots, strict=True)]
        where = [torch.tensor(x, device=served.device) for x in (numbers, at)]
        tokens: list[int] = choose(scores, self._index, served.group, how, *where).tolist()
        return tokens

    def _take(self, slot: int, token: int) -> Token:
        number = self._prompt[slot]
        self._made[slot] += 1
        self._newest[slot] = token
        self._see(slot, torch.tensor([token], device=self.served.device))
        last = token in self.wish.stop or self._made[slot] == self.wish.tokens
        if last:
            self._prompt[slot] = -1
        return Token(number, token, last)

    def _see(self, slot: int, ids: Tensor) -> None:
        if self.wish.how.repetition_penalty != 1:
            local, here = local_ids(ids, self.served.rows)
            self._seen[slot, local[here]] = True
