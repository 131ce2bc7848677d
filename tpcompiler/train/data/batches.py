"""The global batch of every step, dealt to ranks and micro-batches; the same at every degree.

The position in the data is one integer, `step · batch` samples, and everything follows from it: `divmod(position, n)`
is (epoch, place), the epoch's permutation gives the sample, and (seed, epoch, sample) gives what is random in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tpcompiler.errors import TpcError
from tpcompiler.runtime.mesh import part
from tpcompiler.runtime.runs import Run
from tpcompiler.train.data.corpus import sources
from tpcompiler.train.data.order import Permutation, mix
from tpcompiler.train.data.samples import Causal, Joined, Masked, Mixture, Part, Samples
from tpcompiler.train.data.source_target import Pairs, Spans
from tpcompiler.train.data.tokenizer import Tokenizer, load_tokenizer
from tpcompiler.train.data.tokens import Tokens, open_tokens
from tpcompiler.train.settings import Train


@dataclass(frozen=True)
class Batch:
    """What a rank runs at once: rows `first_sample` … of the step's global batch."""

    tensors: dict[str, Tensor]  # int64, [rows, sequence], or [rows] (pair_labels)
    first_sample: int
    weight: float  # rows over the global batch: the step's loss is the weighted sum of the micro-batches' mean losses
    mark: int | None = None  # the fingerprint, once it is known

    @property
    def rows(self) -> int:
        return len(next(iter(self.tensors.values())))

    def to(self, device: torch.device | str) -> Batch:
        """There, with its fingerprint: to read what is on a GPU would wait for all that was issued before."""
        there = {k: v.to(device, non_blocking=True) for k, v in self.tensors.items()}
        return replace(self, tensors=there, mark=self.fingerprint())

    def pinned(self) -> Batch:
        """In memory that a GPU reads by itself."""
        return replace(self, tensors={k: v.pin_memory() for k, v in self.tensors.items()}, mark=self.fingerprint())

    def fingerprint(self) -> int:
        """A 63-bit hash of the content, for ranks to compare: equal batches have equal ones."""
        if self.mark is not None:
            return self.mark
        h = mix(self.first_sample)
        for name, x in sorted(self.tensors.items()):
            flat = x.flatten().cpu()
            places = torch.arange(1, flat.numel() + 1) * 0x5851F42D4C957F2D
            scrambled = (flat + places) * 0x14057B7EF767814F
            scrambled = (scrambled ^ (scrambled >> 29)) * 0x5851F42D4C957F2D
            h = mix(h, *name.encode(), int(scrambled.sum()))
        return h >> 1


@dataclass(frozen=True)
class Batches:
    """Samples in order, `batch` a step. `step` counts from `first_step`, where the position is `first_position`."""

    samples: Samples
    batch: int
    micro_batch: int
    seed: int = 0
    shuffle: bool = True
    names: Mapping[str, str] = field(default_factory=dict)
    first_step: int = 0
    first_position: int = (
        0  # samples seen before: others than first_step · batch when the batch size changed on the way
    )

    def position(self, step: int) -> int:
        """Samples seen before a step: what a checkpoint keeps."""
        return self.first_position + (step - self.first_step) * self.batch

    @property
    def epoch_steps(self) -> int:
        """Steps that fit into one epoch whole; at least 1."""
        return max(1, len(self.samples) // self.batch)

    def micro_batches(self, data_degree: int) -> int:
        """How many micro-batches a step has on every rank.

        Raises `TpcError` when some would be empty.
        """
        most = -(-self.batch // data_degree)
        count = -(-most // self.micro_batch)
        if self.batch // data_degree < count:
            raise TpcError(
                f"train.batch: {self.batch} samples over {data_degree} data ranks in micro-batches of "
                f"{self.micro_batch} leave a rank without one; batch {count * data_degree} would work"
            )
        return count

    def rows(self, micro: int, data_rank: int, data_degree: int) -> Run:
        """The rows [start, stop) of the step's global batch that a rank runs in its `micro`-th micro-batch.

        Consecutive, data rank major: ranks and micro-batches may hold one row more than others, never other rows.
        """
        start, stop = part(self.batch, data_degree, data_rank)
        a, b = part(stop - start, self.micro_batches(data_degree), micro)
        return start + a, start + b

    def batch_at(self, step: int, micro: int, data_rank: int = 0, data_degree: int = 1) -> Batch:
        """A rank's micro-batch. It depends on the data coordinate alone: all ranks of a tensor group get the same."""
        start, stop = self.rows(micro, data_rank, data_degree)
        rows = [self._row(self.position(step) + i) for i in range(start, stop)]
        stacked = {self.names.get(k, k): torch.stack([row[k] for row in rows]) for k in rows[0]}
        return Batch(stacked, start, (stop - start) / self.batch)

    def _row(self, position: int) -> dict[str, Tensor]:
        samples, seed = self.samples, self.seed
        if isinstance(samples, Mixture):
            which, position = samples.place(position, seed)
            samples, seed = samples.parts[which], mix(seed, which, 3)
        epoch, place = divmod(position, len(samples))
        index = Permutation(len(samples), mix(seed, epoch, 0))[place] if self.shuffle else place
        return samples.sample(index, mix(seed, epoch, 1, index))


@dataclass(frozen=True)
class Corpus:
    """A run's data."""

    train: Batches
    validation: Batches | None  # in order, not shuffled; the same at every evaluation
    tokenizer: Tokenizer
    sequence: int
    largest_id: int  # that a batch may hold
    identity: tuple[tuple[str, int, int], ...] = ()  # of each file: its type, and how many tokens it has, the largest

    def fits(self, vocabulary: int | None = None, positions: int | None = None) -> None:
        """Raises `TpcError` when the model has too few embeddings for these ids or for this sequence length."""
        if vocabulary is not None and self.largest_id >= vocabulary:
            raise TpcError(
                f"data: holds token id {self.largest_id}, but the model's vocabulary is {vocabulary}; "
                f"vocab {self.largest_id + 1} or more would work (or the tokenizer that the ids were made with)"
            )
        if positions is not None and self.sequence > positions:
            raise TpcError(f"train.sequence: {self.sequence} is longer than the model's {positions} positions")


def open_corpus(train: Train) -> Corpus:
    """Opens a run's data, tokenising text that the cache does not hold yet.

    Let one process of each host do it first, then the others: they find the cache filled. Raises `TpcError`.
    """
    data, tokenizer = train.data, load_tokenizer(train.tokenizer)
    corpora = [_open((path,), train, tokenizer) for path in data.mix] or [_open(data.path, train, tokenizer)]
    found = [samples for samples, _, _ in corpora]
    largest = max(n for _, n, _ in corpora)
    identity = tuple(file for _, _, files in corpora for file in files)
    held: Samples | None = None
    if data.validation:
        held, other, _ = _open(data.validation, train, tokenizer)
        largest = max(largest, other)
    else:
        parts = [split(samples, data.held_out) for samples in found]
        kept = [rest for _, rest in parts if rest is not None]
        if train.evaluation.every and not kept and data.held_out:
            raise TpcError(
                f"data {data.path[0]}: {len(found[0])} sample of {train.sequence} tokens cannot be trained and "
                f"evaluated on; more text, a shorter sequence or evaluation: {{every: 0}} would work"
            )
        found = [mine for mine, _ in parts]
        held = Joined(tuple(kept)) if len(kept) > 1 else next(iter(kept), None)
    samples = Mixture(tuple(found), tuple(data.mix.values())) if data.mix else found[0]
    validation = _batches(held, train, shuffle=False) if held is not None else None
    batches = _batches(samples, train, shuffle=True)
    return Corpus(batches, validation, tokenizer, train.sequence, largest, identity)


def _open(
    paths: tuple[str, ...], train: Train, tokenizer: Tokenizer
) -> tuple[Samples, int, tuple[tuple[str, int, int], ...]]:
    """The samples of some files, at least one; the largest id that they can hold; and what the files are."""
    tokens = open_tokens(sources(paths, train.data), train.data, tokenizer)
    samples = make_samples(tokens, train, tokenizer)
    if not len(samples):
        raise TpcError(
            f"data {tokens}: {len(tokens)} tokens are less than one sample of {train.sequence}; "
            f"more text or a shorter sequence would work"
        )
    largest = tokens.largest
    if isinstance(samples, Masked):  # its batches hold marks and random words besides
        largest = max(largest, tokenizer.vocab - 1)
    elif isinstance(samples, Spans | Pairs):
        largest = max(largest, samples.largest)
    return samples, largest, tuple((f.dtype, f.count, f.largest) for f in tokens.files)


def make_samples(tokens: Tokens, train: Train, tokenizer: Tokenizer) -> Samples:
    """What the task makes of a stream of tokens."""
    task = train.data.task
    if task == "causal":
        end = _end_of_documents(tokens, tokenizer) if train.data.documents == "restart" else None
        return Causal(tokens, train.sequence, train.data.labels == "next", end)
    if task == "spans":
        return Spans(tokens, train.sequence, tokenizer)
    if task == "pairs":
        return Pairs(tokens, train.sequence, train.data.target_sequence or train.sequence, tokenizer)
    return Masked(tokens, train.sequence, tokenizer, task.removeprefix("mlm").removeprefix("+"))


def _end_of_documents(tokens: Tokens, tokenizer: Tokenizer) -> int:
    if tokenizer.specials.end is None:
        raise TpcError("data.documents: restart needs a tokenizer with an end token; `bytes` has one")
    if tokens.largest >= tokenizer.vocab:
        raise TpcError(
            f"data.documents: restart needs the tokenizer of the ids: {tokens} holds id {tokens.largest}, "
            f"train.tokenizer has {tokenizer.vocab}"
        )
    return tokenizer.specials.end


def split(samples: Samples, held_out: float) -> tuple[Samples, Samples | None]:
    """All but the last `held_out` share, and that share: at least one sample of two, or None."""
    n = len(samples)
    held = min(max(1, round(n * held_out)), n - 1) if held_out else 0
    return (Part(samples, 0, n - held), Part(samples, n - held, n)) if held else (samples, None)


def _batches(samples: Samples, train: Train, shuffle: bool) -> Batches:
    return Batches(samples, train.batch, train.micro_batch, train.seed, shuffle, train.data.names)
