"""Any optimizer by its import path, if each element's step depends on that element alone.

A rank holds parts of the parameters, so an optimizer that looks at a whole row, matrix or model would compute other
steps at other degrees. Whether one does is found out by trying: it is run on a small matrix, and on the matrix's parts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from tpcompiler.errors import TpcError
from tpcompiler.train.optim.clip import clip_factor, local
from tpcompiler.train.optim.optimizer import set_learning_rate, treatment
from tpcompiler.train.settings import Optimizer

STEP = "step"  # the one number that an optimizer may keep beside tensors of the parameter's shape
_STEPS = 4  # that a trial makes


@dataclass(frozen=True)
class Kind:
    """An optimizer's class, and what it keeps of a parameter."""

    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    decays: bool  # whether it has a weight decay
    state: tuple[str, ...]  # tensors of the parameter's shape
    counts: Any  # how it keeps the number of steps: a tensor, a number, or None when it does not


def kind_of(config: Optimizer) -> Kind:
    """The optimizer that `config` names, tried out. Raises `TpcError` when it cannot be used, with the reason."""
    assert config.class_ is not None
    try:
        return _kind(config.class_, tuple((k, _fixed(v)) for k, v in sorted(config.arguments.items())))
    except TypeError as e:  # an argument that is a mapping
        raise TpcError(f"optimizer.arguments: {e}; numbers, texts and lists of them would work") from None


def _fixed(value: Any) -> Any:
    return tuple(map(_fixed, value)) if isinstance(value, list) else value


@lru_cache(16)
def _kind(path: str, arguments: tuple[tuple[str, Any], ...]) -> Kind:
    found = _class(path)
    takes = inspect.signature(found).parameters
    given = dict(arguments)
    if "lr" not in takes:
        raise TpcError(f"optimizer.class: {path} takes no lr, which the schedule sets")

    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return found(groups, lr=1e-3, **given)

    decays = "weight_decay" in takes
    try:
        state, counts = _tried(make, decays, path)
    except TpcError:
        raise
    except Exception as e:
        raise TpcError(f"optimizer.class: {path} with {given} fails: {' '.join(str(e).split())[:200]}") from None
    return Kind(make, decays, state, counts)


def _class(path: str) -> Any:
    place, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(place), name)
    except (ImportError, AttributeError, ValueError) as e:
        raise TpcError(f"optimizer.class: {path} cannot be imported: {e}") from None
    if not (inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)):
        raise TpcError(f"optimizer.class: {path} is not a torch.optim.Optimizer")
    return found


def _tried(make: Callable[..., torch.optim.Optimizer], decays: bool, path: str) -> tuple[tuple[str, ...], Any]:
    """Runs an optimizer on a matrix, and on its rows and columns. Returns what it keeps."""
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(6, 4, generator=draw, dtype=torch.float64)
    gradients = [torch.randn(6, 4, generator=draw, dtype=torch.float64) for _ in range(_STEPS)]
    whole, state = _run(make, decays, start, gradients)
    for cut in ((slice(0, 2), slice(None)), (slice(2, 6), slice(None)), (slice(None), slice(1, 4))):
        part, _ = _run(make, decays, start[cut], [g[cut] for g in gradients])
        if not torch.equal(part, whole[cut]):
            raise TpcError(
                f"optimizer.class: {path} computes an element's step from others of its parameter, so that ranks that "
                f"hold parts of it would compute other steps; torch.optim.AdamW, SGD, Adagrad or RMSprop would work"
            )
    shaped = tuple(sorted(k for k, v in state.items() if isinstance(v, Tensor) and v.shape == start.shape))
    others = [k for k in state if k not in shaped and k != STEP and state[k] is not None]
    if others:
        raise TpcError(f"optimizer.class: {path} keeps {others[0]}, which a checkpoint has no place for")
    return shaped, state.get(STEP)


def _run(
    make: Callable[..., torch.optim.Optimizer], decays: bool, start: Tensor, gradients: list[Tensor]
) -> tuple[Tensor, Mapping[str, Any]]:
    p = nn.Parameter(start.clone())
    optimizer = make([{"params": [p], **({"weight_decay": 0.1} if decays else {})}])
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
    return p.detach(), optimizer.state[p]


class ByClass:
    """An optimizer of any class on a rank's own parts of the masters, which it takes for parameters of their own."""

    def __init__(self, masters: Mapping[str, Tensor], config: Optimizer, publish: Callable[[], None]) -> None:
        """`masters` are those that are trained."""
        self._masters, self._config, self._publish = masters, config, publish
        self._kind = kind_of(config)
        self._own = {n: nn.Parameter(local(m).detach()) for n, m in masters.items()}
        self._given: dict[str, dict[str, Tensor]] = {}  # state from a checkpoint, or zeros before the first step
        groups = []
        for name, p in self._own.items():
            rate, decay = treatment(name, masters[name].dim(), config)
            groups.append({"params": [p], "rate": rate, **({"weight_decay": decay} if self._kind.decays else {})})
        self._optimizer = self._kind.make(groups)

    def moments(self, name: str) -> dict[str, Tensor]:
        if name not in self._own:
            return {}
        p = self._own[name]
        state = self._optimizer.state.get(p, {})
        zeros = self._given.setdefault(name, {})
        for key in self._kind.state:
            if key not in state and key not in zeros:
                zeros[key] = torch.zeros_like(p).detach()
        return {key: state[key] if key in state else zeros[key] for key in self._kind.state}

    def filled(self) -> None:
        self._follow()

    def restore(self, steps: int) -> None:
        if not steps:  # the first step makes the state
            return
        for name, p in self._own.items():
            state: dict[str, Any] = dict(self.moments(name))
            if isinstance(self._kind.counts, Tensor):
                state[STEP] = torch.full_like(self._kind.counts, steps)
            elif self._kind.counts is not None:
                state[STEP] = type(self._kind.counts)(steps)
            self._optimizer.state[p] = state

    def prepare(self, lr: float) -> None:
        set_learning_rate(self._optimizer, lr)

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], norm: Tensor, scale: float) -> Tensor:
        norm, factor = clip_factor(norm, self._config.clip, scale)
        self._follow()
        for name, p in self._own.items():
            p.grad = local(gradients[name]).to(p.dtype) * factor if name in gradients else None
        with torch.enable_grad():
            self._optimizer.step()
        for p in self._own.values():
            p.grad = None
        self._publish()
        return norm

    def _follow(self) -> None:
        """FSDP2 may have given a master other memory."""
        for name, p in self._own.items():
            there = local(self._masters[name]).detach()
            if p.data_ptr() != there.data_ptr():
                p.data = there
