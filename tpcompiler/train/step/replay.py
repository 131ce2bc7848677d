"""CUDA graphs: what the host issues for a micro-batch and for an update, recorded once and then replayed as one call.

A rank's share of a layer is short work for the device and the same thousands of calls for the host as the whole layer
would be, so that at some degree the host is what a step waits for. A recorded step leaves it next to nothing to do.
Collectives are recorded with the rest.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from tpcompiler.errors import TpcError
from tpcompiler.program import Training
from tpcompiler.train.private_torch import depends_on_values, draws_numbers, is_steady

_WARM_UP = 2  # calls before the recorded one: compilation, NCCL's connections, the libraries' choice of kernels


class Graph(Protocol):
    """What can be replayed."""

    def replay(self) -> None: ...


class RecordingDevice(Protocol):
    """What can record."""

    def record(self, fn: Callable[[], Any]) -> tuple[Graph, Any]:
        """Records what `fn` issues, without doing it; and its result, which replaying fills."""

    def watch(self, fn: Callable[[], Any]) -> tuple[Any, bool]:
        """Runs `fn`. Its result, and whether the host waited for the device on the way."""


class Recorder:
    """Runs a function of tensors as it is at first, then replays it, which overwrites the result of the call before.

    The function must issue the same work on every call, and leave behind no tensor but those of its result. One that
    waits for the device cannot be recorded, and without `on` none is: it always runs as it is.
    """

    def __init__(self, on: RecordingDevice | None) -> None:
        self._on = on
        self._calls = 0
        self._graph: Graph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._result: Any = None

    def __call__(self, fn: Callable[..., Any], *inputs: Tensor) -> Any:
        """The result. `fn` is the same work at every call, and the inputs have the same shapes."""
        self._calls += 1
        if self._calls == _WARM_UP and self._on is not None:
            result, waits = self._on.watch(lambda: fn(*inputs))
            self._on = None if waits else self._on
            return result
        if self._calls <= _WARM_UP or self._on is None:
            return fn(*inputs)
        if self._graph is None:
            self._inputs = tuple(x.clone() for x in inputs)
            self._graph, self._result = self._on.record(lambda: fn(*self._inputs))
        for mine, given in zip(self._inputs, inputs, strict=True):
            assert mine.shape == given.shape, f"recorded for {list(mine.shape)}, given {list(given.shape)}"
            mine.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._result

    @property
    def recorded(self) -> bool:
        """Whether the calls from now on are replayed."""
        return self._graph is not None


class Device:
    """Records on one GPU. Recordings share one pool of memory: they are replayed in the order they were made in."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None

    def record(self, fn: Callable[[], Any]) -> tuple[Graph, Any]:
        """Raises `TpcError` when it cannot be; nothing more can be computed then."""
        graph = torch.cuda.CUDAGraph()
        try:
            # NCCL's watchdog asks about its events meanwhile, from a thread of its own.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = fn()
        except RuntimeError as e:
            why = str(_first(e)).strip().splitlines()[0]
            raise TpcError(
                f"a step cannot be recorded as a CUDA graph: {why}; train.cuda_graphs: false would work"
            ) from e
        self._pool = graph.pool()
        return graph, result

    def watch(self, fn: Callable[[], Any]) -> tuple[Any, bool]:
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                result = fn()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        return result, any("synchronizing CUDA operation" in str(w.message) for w in said)

    @contextmanager
    def running(self) -> Iterator[None]:
        """A block on the stream that is recorded on; what comes before and after it is ordered with it.

        The runs before the recording must be there too: autograd adds up a gradient on the stream it first did so on.
        """
        outside = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            yield
        outside.wait_stream(self._stream)


def _first(e: BaseException) -> BaseException:
    """What went wrong first: that the recording ended badly is said last."""
    while e.__context__ is not None:
        e = e.__context__
    return e


def steady(graph: fx.Graph) -> bool:
    """Whether a program issues the same work whatever its inputs hold: no size depends on a value."""
    return all(is_steady(node.target) and not depends_on_values(node) for node in graph.nodes)


def draws(graph: fx.Graph) -> bool:
    """Whether a program in training draws from torch's own generator.

    What is computed again would have to draw the same numbers again, and a recording cannot put the generator back.
    """
    return any(draws_numbers(n.target) and _drops(n) for n in graph.nodes)


def _drops(node: fx.Node) -> bool:
    if node.target is not torch.ops.aten.scaled_dot_product_attention.default:
        return True
    p = node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0)
    return bool(p.on if isinstance(p, Training) else p)


def on_stream(device: Device | None) -> AbstractContextManager[None]:
    return nullcontext() if device is None else device.running()
