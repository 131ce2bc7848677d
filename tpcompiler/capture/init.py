"""Builds a model without its weights: the constructor's tensor operations are recorded, not run.

Everything that a constructor computes (random weights, rotary frequencies, masks) is a tensor on the meta device, and
the operations go on a tape. A tensor gets its values later, by a replay of the operations that it depends on. Buffers
are replayed at once; parameters one at a time, where they are needed, with the same values for any number of ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tpcompiler.capture.own_backward import refuse_hooks
from tpcompiler.capture.private_tracing import pytree
from tpcompiler.capture.recording import Recording, Values
from tpcompiler.capture.refusals import CannotTrace, explain
from tpcompiler.capture.tape import Tape, seed_from
from tpcompiler.errors import ModelError, TpcError


@dataclass(frozen=True)
class Recorded:
    """A model whose parameters and buffers lie on meta, and the tape that gives their values."""

    model: nn.Module
    tape: Tape
    keys: Mapping[int, str]  # random entry → the name of the parameter whose seed it draws by

    def replay(self, name: str, seed: int = 0) -> Tensor:
        """The value that the constructor gives a parameter or buffer, as a real tensor on the CPU.

        It depends only on the seed and the name, never on ranks or order. Random numbers that several parameters share
        (as layers that are deep copies do) are drawn by the first one's name. A model that was built before keeps its
        own values.
        """
        return self.value(_named(self.model)[name], seed)

    def value(self, t: Tensor, seed: int = 0) -> Tensor:
        """The value of any tensor that the constructor made."""

        def seed_of(entry: int) -> int:
            if entry in self.tape.drawn:
                return seed_from(0, f"#{entry}")
            return seed_from(seed, self.keys.get(entry, f"#{entry}"))

        return self.tape.replay(self.tape.view(t), seed_of)


def record(build: Callable[[], nn.Module] | nn.Module, *, source: str = "") -> Recorded:
    """Builds a model without allocating its parameters. A model that is built already is copied and not changed.

    Errors: `ModelError` when the constructor fails or does not return a module.
    """
    tape = Tape()
    recording = Recording(tape)
    try:
        if isinstance(build, nn.Module):
            refuse_hooks(build)
            memo: dict[int, Any] = {id(p): recording.stand_in(p) for p in build.parameters() if not p.is_meta}
            with Values(recording):
                model = copy.deepcopy(build, memo)
        else:
            with recording, Values(recording):
                model = build()
    except TpcError:
        raise
    except Exception as error:
        raise explain(error, source, "cannot be built") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{source or 'the model'}: gives a {type(model).__name__}, not a torch.nn.Module")
    try:
        refuse_hooks(model)
    except CannotTrace as error:
        raise explain(error, source, "cannot be traced") from error
    _adopt_attributes(model, recording)
    return Recorded(model, tape, _keys(tape, _named(model).items()))


def _named(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _keys(tape: Tape, named: Iterable[tuple[str, Tensor]]) -> dict[int, str]:
    keys: dict[int, str] = {}
    for name, t in named:
        random = (i for i in tape.slice(tape.view(t).storage) if tape.entries[i].random)
        for count, i in enumerate(random):
            keys.setdefault(i, f"{name}/{count}")
    return keys


def _adopt_attributes(model: nn.Module, recording: Recording) -> None:
    """Puts tensors that modules hold and the tape does not know (from numpy, or literals) on the tape as constants."""
    memo: dict[int, Tensor] = {}

    def adopt(t: Tensor) -> Tensor:
        return t if t.is_meta else memo.setdefault(id(t), recording.stand_in(t))

    for module in model.modules():
        own = {k: v for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")}
        for held, items in (
            (module._parameters, module._parameters),
            (module._buffers, module._buffers),
            (vars(module), own),
        ):
            for key, value in list(items.items()):
                if any(isinstance(t, Tensor) and not t.is_meta for t in pytree.tree_leaves(value)):
                    held[key] = pytree.tree_map_only(Tensor, adopt, value)
