"""One rank's training: forward and backward over a step's micro-batches, gradients clipped, the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tpcompiler.errors import TpcError
from tpcompiler.runtime import Ranks, Rng
from tpcompiler.runtime.runs import Slice
from tpcompiler.train.data.batches import Batch, Batches
from tpcompiler.train.data.order import mix
from tpcompiler.train.hold.owned import fill, fill_buffers, state_name, trained_slice
from tpcompiler.train.hold.storage import Numbers, hold
from tpcompiler.train.optim.clip import grad_norm, local, share
from tpcompiler.train.optim.scaler import Scale, all_finite
from tpcompiler.train.optim.schedule import learning_rate
from tpcompiler.train.optim.spikes import Spikes
from tpcompiler.train.private_torch import equal_layers_share_a_graph
from tpcompiler.train.settings import Train
from tpcompiler.train.step.compiled import Compiled, select
from tpcompiler.train.step.prepare import prepare
from tpcompiler.train.step.replay import Device, Recorder, draws, on_stream, steady
from tpcompiler.weights.manifest import DATA

Read = Callable[[str, Slice], Tensor]


@dataclass(frozen=True)
class Outcome:
    """A step, done. The tensors are scalars on the device, the same on all ranks; reading them waits for the step."""

    step: int  # steps done, with this one
    loss: Tensor  # mean over the global batch, nats
    norm: Tensor  # of the gradient, before the clip
    alike: Tensor  # whether the ranks of each tensor group read the same batches
    lr: float
    scale: Scale | None  # fp16: for the next step
    applied: bool  # False when the step was left out
    skipped: int = 0  # steps left out so far
    fault: str = ""  # why the step was left out as a bad batch


class Engine:
    """A rank's program, its parameters and its optimizer.

    Collective throughout: every rank calls the same methods in the same order.
    """

    def __init__(self, compiled: Compiled, ranks: Ranks, train: Train, seed: int, device: torch.device) -> None:
        self.compiled, self.ranks, self.train, self.device = compiled, ranks, train, device
        self.numbers = Numbers.of(train.precision)
        self.rng = Rng(seed, device)
        self._seed = seed
        program = compiled.sharded.program
        names = {p.name: p.aliases for p in program.capture.parameters if not p.buffer}
        self.module: nn.Module = compiled.module(ranks, self.rng)
        self._draws = draws(program.graph)
        prepare(self.module, train, hooked=ranks.mesh.degree((DATA,)) > 1, draws=self._draws)
        self.storage = hold(self.module, names, ranks, train, device)
        fill_buffers(self.module, program, ranks.coords)
        mesh = program.mesh
        self.slices = {n: trained_slice(program.dims[n], mesh, ranks.coords) for n in names}
        self._shares = {n: share(program.dims[n], mesh, ranks.coords) for n in names}
        self.scale = Scale.start(train.loss_scale) if train.precision == "fp16" else None
        self.skipped = 0  # steps left out because their batch was bad
        self.spikes = Spikes(train.spike)
        self._whole = [n for n, s in self._shares.items() if not s.over]
        self._weights = ranks.group(tuple(n for n in mesh.names if n != DATA))
        self._recording = Device(device) if device.type == "cuda" and self._repeats() else None
        self._micro_batch, self._optimizer_step = Recorder(self._recording), Recorder(self._recording)
        self._loss_type = torch.float64 if train.precision == "fp64" else torch.float32

    @property
    def recorded(self) -> bool:
        """Whether the device repeats micro-batches by itself by now."""
        return self._micro_batch.recorded

    def _repeats(self) -> bool:
        """Whether all steps are the same work for the device, which is then recorded."""
        train = self.train
        wanted = train.cuda_graphs and (train.activation_checkpointing == "none" or not self._draws)
        alike = train.batch % -(-train.batch // train.micro_batch) == 0  # micro-batches have one size
        return wanted and alike and self.storage.steady and steady(self.compiled.capture.graph)

    def fill(self, read: Read) -> None:
        """Gives the parameters their values, this rank's slices of them."""
        fill(self.storage.masters, self.slices, read)
        self.storage.update.filled()
        self.storage.publish()

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of this rank, by the checkpoint's names: masters and moments, local parts."""
        out = {}
        for name, master in self.storage.masters.items():
            out[name] = local(master).detach()
            moments = self.storage.update.moments(name)
            out |= {state_name(name, m): local(t).detach() for m, t in moments.items()}
        return out

    def restore(self, read: Read, steps: int) -> None:
        """Masters and moments from a checkpoint, after so many optimizer steps."""
        self.fill(read)
        for name in self.storage.masters:
            moments = self.storage.update.moments(name)
            fill(moments, dict.fromkeys(moments, self.slices[name]), _prefixed(read, name))
        self.storage.update.restore(steps)

    def step(self, number: int, batches: Sequence[Batch]) -> Outcome:
        """The `number`-th step, counted from 0, over this rank's micro-batches. Does not wait for the device."""
        self.module.train()
        lr = learning_rate(self.train, number)
        with equal_layers_share_a_graph(self.train.compile != "none"), on_stream(self._recording):
            return self._step(number, batches, lr)

    def _step(self, number: int, batches: Sequence[Batch], lr: float) -> Outcome:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        factor = self.scale.value if self.scale is not None else 1.0
        gradients = None
        for i, batch in enumerate(batches):
            self.storage.before(i, last=i == len(batches) - 1)
            self._draw_for(number, batch)
            share = torch.full((), batch.weight * factor, dtype=self._loss_type, device=self.device)
            inputs = select(batch.tensors, self.compiled.takes).values()
            loss, gradients = self._micro_batch(self._forward_backward, share, *inputs)
            total += loss.double() * batch.weight
        total = self.ranks.group(DATA).all_reduce(total)
        held = self.storage.gradients() if gradients is None else gradients
        norm, applied, fault = self._update(held, lr, factor, total)
        return Outcome(number + 1, total, norm, self._alike(batches), lr, self.scale, applied, self.left_out, fault)

    def _forward_backward(self, share: Tensor, *inputs: Tensor) -> tuple[Tensor, dict[str, Tensor] | None]:
        """A micro-batch's loss, and the gradients of the step so far where they are the same tensors always."""
        loss = self._loss(inputs)
        if not loss.requires_grad:
            raise TpcError(
                f"{self.compiled.capture.model}: its loss follows from no trained parameter; is it detached?"
            )
        (loss * share).backward()
        return loss.detach(), self.storage.gradients() if self.storage.steady else None

    def _draw_for(self, number: int, batch: Batch) -> None:
        """What is random in a micro-batch follows from its place in the run."""
        _move(self.rng, number, batch.first_sample)
        # Dropout inside of a fused attention kernel draws from torch's generator: fix it too, so that a run that was
        # stopped goes on as if it had not been.
        torch.manual_seed(mix(self._seed, number, batch.first_sample, self._weights.index) >> 1)

    def _loss(self, inputs: Sequence[Tensor]) -> Tensor:
        with self._precision():
            loss: Tensor = self.module(**dict(zip(self.compiled.takes, inputs, strict=True)))
        return loss

    def _precision(self) -> AbstractContextManager[object]:
        """The program's 16-bit operations stay so; norms, softmax and loss are computed in float32."""
        if not self.numbers.mixed:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.numbers.compute, cache_enabled=False)

    @property
    def left_out(self) -> int:
        """Steps that did not change the weights."""
        return self.skipped + (self.scale.skipped if self.scale is not None else 0)

    def _update(self, gradients: dict[str, Tensor], lr: float, factor: float, loss: Tensor) -> tuple[Tensor, bool, str]:
        """The gradient's norm, whether the weights changed, and what was wrong with the batch if they did not."""
        if self.scale is not None:
            norm = grad_norm(gradients, self._shares, self.ranks)
            finite = bool(all_finite(gradients.values(), self.ranks))
            self.scale = self.scale.after(finite, self.train.loss_scale)
            if not finite:
                return norm / factor, False, ""
            self.storage.update.prepare(lr)
            return self.storage.update.step(gradients, norm, factor), True, ""
        if self.train.on_bad_batch == "skip":
            norm = grad_norm(gradients, self._shares, self.ranks)
            fault = self.spikes.fault(float(loss), float(norm))  # both numbers are the same on all ranks
            if fault:
                self.skipped += 1
                return norm, False, fault
            self.storage.update.prepare(lr)
            return self.storage.update.step(gradients, norm, factor), True, ""
        self.storage.update.prepare(lr)
        if not self.recorded:  # only then are gradients where they were the step before
            return self._clip_and_step(gradients), True, ""
        norm = self._optimizer_step(lambda: self._clip_and_step(gradients))
        return norm.clone(), True, ""

    def _clip_and_step(self, gradients: dict[str, Tensor]) -> Tensor:
        norm = grad_norm(gradients, self._shares, self.ranks)
        return self.storage.update.step(gradients, norm, 1.0)

    def _alike(self, batches: Sequence[Batch]) -> Tensor:
        if self._weights.size == 1:
            return torch.ones((), dtype=torch.bool, device=self.device)
        mark = mix(*(b.fingerprint() for b in batches)) >> 1
        both = torch.empty(2, dtype=torch.int64, device=self.device)
        for place, number in enumerate((mark, -mark)):
            both[place].fill_(number)  # does not make the host wait for the device
        return self._weights.all_reduce(both, "max").sum() == 0

    @torch.no_grad()
    def compare_replicas(self, step: int) -> None:
        """Raises `TpcError` when a parameter that the ranks of a tensor group all hold whole differs between them.

        Compares a sum over the bits of each, weighted by place. Collective; waits for the device.
        """
        if self._weights.size == 1 or not self._whole:
            return
        marks = torch.stack([_mark(local(self.storage.masters[n])) for n in self._whole])
        table = self._weights.all_gather(marks.unsqueeze(0), 0).tolist()  # a row for each rank
        for rank, row in enumerate(table):
            odd = [n for n, mine, first in zip(self._whole, row, table[0], strict=True) if mine != first]
            if odd:
                raise TpcError(
                    f"step {step}: {odd[0]} should be the same on all ranks of a tensor group, but rank {rank} of the "
                    f"group has another than rank 0; the hardware of one of them is to be suspected"
                )

    @torch.no_grad()
    def evaluate(self, batches: Batches, count: int) -> float:
        """The mean loss over the first `count` global batches, dropout off."""
        group = self.ranks.group(DATA)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with evaluating(self.module), equal_layers_share_a_graph(self.train.compile != "none"):
            for step in range(count):
                for micro in range(batches.micro_batches(group.size)):
                    batch = batches.batch_at(step, micro, group.index, group.size).to(self.device)
                    self._draw_for(step, batch)
                    inputs = select(batch.tensors, self.compiled.takes).values()
                    total += self._loss(tuple(inputs)).double() * batch.weight
        return float(group.all_reduce(total)) / count


def _mark(x: Tensor) -> Tensor:
    """A sum over the bits of a tensor, weighted by place: a scalar, int64, below 2^62."""
    bits = x.detach().contiguous().view(-1).view(torch.uint8).to(torch.int64)
    places = torch.arange(bits.numel(), device=bits.device) * 0x9E3779B1 + 1
    return (bits * (places & 0xFFFFFFFF)).sum() & (2**62 - 1)


def _move(rng: Rng, step: int, first_sample: int) -> None:
    """`rng.at`, without a copy from the host's memory, which would wait until the device has done the step before."""
    for place, number in ((2, step), (3, first_sample)):
        rng.state[place].fill_(number)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off for a block."""
    before = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(before)


def _prefixed(read: Read, parameter: str) -> Read:
    return lambda moment, runs: read(state_name(parameter, moment), runs)
