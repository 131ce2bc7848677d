"""Predicts the step time and memory of one rank from a program's kernels and collectives and a machine's rates."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import torch

from tpcompiler import runtime
from tpcompiler.cost.rank_sizes import RankSizes
from tpcompiler.cost.rates import Price, Rates, Recompute
from tpcompiler.cost.work import Kernel, Work, WorkReader
from tpcompiler.graphs import operand
from tpcompiler.layout import Mesh
from tpcompiler.ops.table import UNKNOWN, find
from tpcompiler.plan import Plan
from tpcompiler.plan.collectives import CollectiveReader
from tpcompiler.program import Collective, Program
from tpcompiler.spec.machine import Hardware

STATE = {2: (2, 4, 8), 4: (0, 4, 8)}  # bytes per number computed with → bytes per parameter: copy, master, moments
UPDATE = 28 + 2  # bytes of memory traffic per parameter: a 16-bit update, and the gradient's norm (optim/update.py)
SHARDED_UPDATE = 28 + 12  # the same for torch's update, which clips in a pass of its own
LOGITS = 10  # bytes per logit at the peak: the logit in 16 bits, its log-softmax and its gradient in 32
OVERLAPPED = (runtime.entered_linear, runtime.linear_cross_entropy)  # their backward communicates during products
RESERVE = 0.25 * 2**30  # bytes that libraries keep: workspaces of products and collectives, and partly filled blocks


@dataclass(frozen=True)
class ParallelLayout:
    """One way to run a model on a number of ranks, apart from which axes are split."""

    tensor: int  # degree
    data: int  # degree
    micro: int  # sequences that a rank runs at once
    recompute: Recompute
    overlap: bool
    whole: bool = False  # every data rank holds all of the model's parameters, as in DDP; else FSDP2 shards them


@dataclass(frozen=True)
class Memory:
    """Bytes on the rank that holds most, at the step's peak."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    reserve: int = int(RESERVE)

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Prediction:
    """The prediction for one step on one rank, in seconds and bytes."""

    layout: ParallelLayout
    seconds: float
    parts: dict[str, float] = field(default_factory=dict)  # forward, backward, again, exposed, update, data
    communication: float = 0.0  # seconds of the tensor ranks' collectives, hidden or not
    communicated: int = 0  # bytes of the values in these collectives
    memory: Memory = Memory(0, 0, 0, 0, 0)
    tflops: float = 0.0  # model FLOPs per device, TFLOP/s
    mfu: float = 0.0  # the same as a share of the device's peak rate

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "memory": {**asdict(self.memory), "total": self.memory.total}}


class CostModel:
    """Predicts steps of a compiled program: at any mesh with the same axes, any batch, and any recomputation."""

    def __init__(self, program: Program, plan: Plan) -> None:
        """`program` must be compiled with `overlap: true`."""
        self.program, self.plan = program, plan
        self._held: dict[Mesh, int] = {}

    @cached_property
    def work(self) -> Work:
        return self.reader.work()

    @cached_property
    def reader(self) -> WorkReader:
        return WorkReader(self.program)

    @cached_property
    def _communicating(self) -> list[tuple[torch.fx.Node, bool, bool, int]]:
        """The nodes that communicate, equal ones once: (node, is it in a layer, is it recomputed, how many equal)."""
        reader, again = self.reader, self.reader.again
        found: dict[Any, list[Any]] = {}
        for node in self.program.graph.nodes:
            if node.target in CollectiveReader.KINDS:
                layered = bool(reader.layer.get(node))
                key = (reader.signatures(node), reader.signatures(node.all_input_nodes[0]), layered, node in again)
                found.setdefault(key, [node, layered, node in again, 0])[-1] += 1
        return [tuple(entry) for entry in found.values()]

    def mesh(self, tensor: int, data: int) -> Mesh:
        """The program's mesh at another degree. Raises `ValueError` where it has several tensor dimensions."""
        mesh = self.program.mesh
        if len(mesh.names) > 2 and prod(mesh[n] for n in mesh.names if n != "data") != tensor:
            raise ValueError(f"the program's mesh {mesh} is made for its degree")
        return Mesh.of({**dict(mesh.dims), "data": data, **({"tensor": tensor} if "tensor" in mesh else {})})

    def parameters(self, mesh: Mesh) -> tuple[int, int]:
        """How many numbers a rank trains: in all, and in one layer."""
        if mesh not in self._held:
            coords, dims = mesh.coords(0), self.program.dims
            alike = Counter(dims[p.name] for p in self.program.capture.parameters if p.trainable and not p.buffer)
            self._held[mesh] = sum(n * prod(d.local_size(mesh, coords) for d in dim) for dim, n in alike.items())
        return self._held[mesh], self._held[mesh] // max(1, self.work.layers)

    def predict(
        self, layout: ParallelLayout, hardware: Hardware, batch: int, sequence: int, width: int = 2
    ) -> Prediction:
        """Predicts a step over `batch` sequences in all, each of `sequence` tokens, with numbers of `width` bytes."""
        mesh = self.mesh(layout.tensor, layout.data)
        sizes = RankSizes(self.program.capture, mesh, layout.micro, sequence)
        rates = Rates(hardware, sizes, width)
        steps = -(-batch // (layout.data * layout.micro))
        priced = [(k, rates.price(k)) for k in self.work.kernels if k.kind not in ("view", "collective")]
        forward = sum(p.forward * k.count for k, p in priced)
        backward = sum(p.backward * k.count for k, p in priced)
        again = sum(p.forward * k.count for k, p in priced if recomputed(k, layout.recompute))
        exposed, crossing, number = self._communication(layout, rates, priced, mesh)
        update, data = self._state(layout, rates, mesh, steps, steps * (forward + backward + again))
        computing = forward + backward + again + exposed
        seconds = steps * computing + update + data
        flops = 3 * sum(p.flops * k.count for k, p in priced) * steps
        parts = {"forward": forward, "backward": backward, "again": again, "exposed": exposed}
        parts = {name: part * steps for name, part in parts.items()} | {"update": update, "data": data}
        achieved = flops / seconds / 1e12
        return Prediction(
            layout,
            seconds,
            parts,
            crossing * steps,
            number * steps,
            self._memory(layout, rates, mesh, steps),
            achieved,
            achieved / hardware.peak_tflops,
        )

    def _communication(
        self, layout: ParallelLayout, rates: Rates, priced: list[tuple[Kernel, Price]], mesh: Mesh
    ) -> tuple[float, float, int]:
        """The tensor ranks' collectives in a micro-batch: seconds that nothing hides, seconds in all, and bytes."""
        reader = CollectiveReader(self.program, self.plan, rates.sizes.number, mesh, self.reader.live)
        beside = {k.node: p.weights for k, p in priced}
        exposed = total = 0.0
        number = 0
        for node, layered, again, count in self._communicating:
            repeated = count * (2 if layered and again and layout.recompute == "layer" else 1)
            for c in reader.of(node):
                degree = mesh.degree(c.over)
                size = collective_bytes(c, node, rates.width, layout.overlap)
                seconds = rates.collective(c.kind, size, degree, 1)
                times = repeated if c.direction == "forward" else count
                hidden = 0.0
                if layout.overlap and c.direction == "backward" and node.target in OVERLAPPED:
                    hidden = min(seconds, beside.get(node, 0.0)) * rates.machine.hidden
                exposed += times * (seconds - hidden)
                total += times * seconds
                number += times * size if degree > 1 else 0
        return exposed, total, number

    def _state(
        self, layout: ParallelLayout, rates: Rates, mesh: Mesh, steps: int, computing: float
    ) -> tuple[float, float]:
        """Seconds of the optimizer's update, and seconds of the data ranks' communication that nothing hides."""
        held, _ = self.parameters(mesh)
        summing = (10 * held * steps if steps > 1 else 0) * (rates.width == 2)
        if layout.data == 1:
            return rates.moving(UPDATE * held + summing), 0.0
        if layout.whole:
            crossing = rates.collective("all_reduce", rates.width * held, layout.data, layout.tensor)
            return rates.moving(UPDATE * held + summing), max(0.0, crossing - rates.machine.hidden * computing)
        gathers = 2 * steps * rates.collective("all_gather", rates.width * held, layout.data, layout.tensor)
        scatter = rates.collective("reduce_scatter", 4 * held, layout.data, layout.tensor)
        copies = rates.moving(3 * rates.width * held * 2 * steps)  # FSDP2 copies what it gathers and what it scatters
        exposed = max(0.0, gathers + scatter - rates.machine.hidden * computing)
        return rates.moving(SHARDED_UPDATE * held / layout.data), exposed + copies

    def _memory(self, layout: ParallelLayout, rates: Rates, mesh: Mesh, steps: int) -> Memory:
        held, layer = self.parameters(mesh)
        compute, master, moments = STATE[rates.width]
        if layout.data > 1 and not layout.whole:
            shard = -(-held // layout.data)
            gathered = 3 * layer * (compute or 4)  # the current layer, the next one, and gradients being reduced
            parameters, gradients, optimizer = master * shard + gathered, 4 * shard, moments * shard
        else:
            parameters, optimizer = (compute + master) * held, moments * held
            gradients = (4 * held + rates.width * layer) if steps > 1 else rates.width * held
        activations = self._activations(rates, layout.recompute)
        loss = sum(LOGITS * rates.sizes.elements(k.reads[0]) for k in self.work.kernels if k.kind == "loss")
        loss += sum(int(rates.width * rates.logits(k.node)) for k in self.work.kernels if k.kind == "head")
        if steps == 1 and (layout.data == 1 or layout.whole):  # gradients take the memory that activations free
            gradients = max(0, gradients - activations - loss)
        return Memory(parameters, gradients, optimizer, activations, loss)

    def _activations(self, rates: Rates, recompute: Recompute) -> int:
        total = layered = 0
        for k in self.work.kept:
            size = rates.bytes((k.node,)) * k.count
            stays = not k.layered or recompute == "none" or k.border or (recompute == "attention" and k.product)
            total += size if stays else 0
            layered += size if k.layered and not stays else 0
        return total + layered // max(1, self.work.layers)  # backward recomputes one layer at a time


def recomputed(kernel: Kernel, recompute: Recompute) -> bool:
    """Whether backward computes a kernel again."""
    if not (kernel.layered and kernel.again) or recompute == "none":
        return False
    return recompute == "layer" or kernel.kind != "product"


def collective_bytes(c: Collective, node: torch.fx.Node, width: int, overlap: bool) -> int:
    """The bytes of a collective's value under autocast: `width` per number, except for sums of the loss and of norms.

    A norm's result is float32 under autocast. So is the gradient of an `enter` on it, unless the product's own backward
    reduces it (`overlap`).
    """
    numbers = c.bytes // c.dtype.itemsize
    if c.direction == "backward" and node.target in (runtime.enter, *OVERLAPPED):
        rule = find(operand(node).target) or UNKNOWN
        wide = rule.form in ("layer_norm", "rms_norm") and not (overlap and node.target in OVERLAPPED)
        return numbers * (4 if wide else width)
    return numbers * (width if node.target in (runtime.reduce, runtime.gather) else c.dtype.itemsize)
