"""Runs the emitted source on all ranks in threads, so that what `tpc shard` writes is what was verified."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from tpcompiler.emit import load_source
from tpcompiler.execute.simulate import run_ranks
from tpcompiler.program import Capture, InputLeaf
from tpcompiler.runtime import Ranks
from tpcompiler.runtime.precision import cast
from tpcompiler.verification.against_model import Batch, Case, Comparison, Results, count_executed, count_listed
from tpcompiler.weights.fill import fill_from

ForwardArguments = tuple[tuple[Any, ...], dict[str, Any]]  # args, kwargs of the model's forward


def emitted_case(run: Comparison, batches: Sequence[Batch]) -> Case:
    """Compares outputs, accumulated gradients and executed collectives of the emitted source over `batches`."""
    program, source = run.sharded.program, run.sharded.source
    name = hashlib.sha256(source.encode()).hexdigest()[:12]
    emitted = load_source(source, f"tpc_verify_{name}")

    def rank(ranks: Ranks) -> Results:
        model: nn.Module = cast(emitted.Model(ranks), run.dtype).eval()
        fill_from(model, program, ranks.coords, run.state)

        def forward(batch: Batch) -> list[Any]:
            args, kwargs = call_of(program.capture, batch)
            return pytree.tree_leaves(model(*args, **kwargs))

        return run.run(forward, dict(model.named_parameters(remove_duplicate=False)), batches, ranks.coords)

    log: list[Any] = []
    plain, ranks = run.plain(batches), run_ranks(program.mesh, rank, log)
    errors, notes = run.compare(plain, ranks)
    even = sum(next(iter(batch.values())).shape[0] % 2 == 0 for batch in batches)
    counted, listed = count_executed(log), count_listed(program, len(batches), run.backward, even)
    if counted != listed:
        notes.append(f"executed collectives {counted}, the report lists {listed}")
    return Case("the emitted source", errors, run.tolerance, tuple(notes))


def call_of(capture: Capture, batch: Batch) -> ForwardArguments:
    """The arguments of the model's forward from its tensor inputs by placeholder."""
    leaves = [batch[leaf.node] if isinstance(leaf, InputLeaf) else leaf for leaf in capture.input_leaves]
    args, kwargs = pytree.tree_unflatten(leaves, capture.in_spec)
    return args, kwargs
