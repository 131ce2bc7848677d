"""How a rank holds its parameters: what the program computes with, what the optimizer changes, and the gradients.

| data ranks | computes with         | optimizer changes        | gradients                                     |
|------------|-----------------------|--------------------------|-----------------------------------------------|
| 1, 32 bit  | the parameters        | the parameters           | autograd's own                                |
| 1, 16 bit  | 16-bit parameters     | float32 copies (masters) | of one micro-batch: autograd's own;           |
|            |                       |                          | of several: summed in float32 as they come    |
| more       | FSDP2's gathered ones | FSDP2's shards, float32  | FSDP2's reduce-scatter, float32               |

FSDP2 is not used for one data rank, where it would only copy each layer's weights and gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from tpcompiler.runtime import Ranks
from tpcompiler.train.hold.layers import layers_of
from tpcompiler.train.hold.owned import allocate
from tpcompiler.train.optim.average import Averaged
from tpcompiler.train.optim.by_class import ByClass
from tpcompiler.train.optim.update import OnePass, Torch, Update
from tpcompiler.train.private_torch import copy_, parameters_here, zero_
from tpcompiler.train.settings import Precision, Train
from tpcompiler.weights.manifest import DATA


@dataclass(frozen=True)
class Numbers:
    """The dtypes of a precision: of the computation, and of master weights, moments and gradient sums."""

    master: torch.dtype
    compute: torch.dtype

    @property
    def mixed(self) -> bool:
        return self.master != self.compute

    @classmethod
    def of(cls, precision: Precision) -> Numbers:
        return {
            "bf16": cls(torch.float32, torch.bfloat16),
            "fp16": cls(torch.float32, torch.float16),
            "fp32": cls(torch.float32, torch.float32),
            "fp64": cls(torch.float64, torch.float64),
        }[precision]


class Storage(Protocol):
    """A rank's parameters and their gradients."""

    masters: dict[str, Tensor]  # what the optimizer changes, by name; tied ones once
    trained: dict[str, bool]  # by name, whether the optimizer changes it
    update: Update
    steady: bool  # whether every micro-batch of a shape, and every update, is the same work on the same tensors

    def before(self, micro: int, last: bool) -> None:
        """Called before the forward of a step's `micro`-th micro-batch."""

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of masters that have one, summed over the step. Called after the last backward."""

    def publish(self) -> None:
        """Called when masters have changed."""


def hold(
    module: nn.Module, names: Mapping[str, tuple[str, ...]], ranks: Ranks, train: Train, device: torch.device
) -> Storage:
    """Allocates a module on meta. `names` maps each parameter to all of its names."""
    storage: Storage
    if ranks.mesh.degree((DATA,)) > 1:
        storage = ShardedStorage(module, names, ranks, train, device)
    else:
        storage = PlainStorage(module, names, train, device)
    if train.optimizer.average is not None:
        trained = [name for name, is_trained in storage.trained.items() if is_trained]
        storage.update = Averaged(storage.update, storage.masters, trained, train.optimizer.average)
    return storage


class PlainStorage:
    """One data rank: plain tensors."""

    def __init__(
        self, module: nn.Module, names: Mapping[str, tuple[str, ...]], train: Train, device: torch.device
    ) -> None:
        numbers = Numbers.of(train.precision)
        allocate(module, device, numbers.compute)
        self._parameters = by_name(module, names)
        self.trained = {name: p.requires_grad for name, p in self._parameters.items()}
        self.masters: dict[str, Tensor] = dict(self._parameters)
        self._mixed = self.steady = numbers.mixed
        self._sums: dict[str, Tensor] = {}  # the summed gradients of parameters that had one
        self._totals: list[Tensor] = []
        self.update: Update
        if not self._mixed:
            self.update = _update(self, train)
            return
        for name, p in self._parameters.items():
            self.masters[name] = torch.empty(p.shape, dtype=numbers.master, device=device)
        if train.batch > train.micro_batch:
            for name, p in self._parameters.items():
                if p.requires_grad:
                    self._sum(name, p, torch.empty_like(self.masters[name]))
        if train.optimizer.class_ is not None:
            self.steady = False
            self.update = _update(self, train)
            return
        compiled = train.compile != "none" and device.type == "cuda"
        units = _units(module, self._parameters)
        self.update = OnePass(self.masters, self._parameters, units, train.optimizer, compiled)

    def _sum(self, name: str, p: nn.Parameter, total: Tensor) -> None:
        """Adds the parameter's gradient to `total` as soon as autograd has computed it, and frees it."""
        self._totals.append(total)

        def add(p: Tensor) -> None:
            assert p.grad is not None
            self._sums[name] = total.add_(p.grad)
            p.grad = None

        p.register_post_accumulate_grad_hook(add)

    def before(self, micro: int, last: bool) -> None:
        if micro == 0:
            if self._totals:
                zero_(self._totals)
            for p in self._parameters.values():
                p.grad = None

    def gradients(self) -> dict[str, Tensor]:
        return {**{name: p.grad for name, p in self._parameters.items() if p.grad is not None}, **self._sums}

    @torch.no_grad()
    def publish(self) -> None:
        if self._mixed:
            copy_(list(self._parameters.values()), list(self.masters.values()))


class ShardedStorage:
    """Several data ranks: FSDP2 over the data dimension, a group of parameters for each emitted layer.

    FSDP2 cannot shard a parameter that is a scalar; its gradient is summed here.
    """

    def __init__(
        self,
        module: nn.Module,
        names: Mapping[str, tuple[str, ...]],
        ranks: Ranks,
        train: Train,
        device: torch.device,
    ) -> None:
        numbers = Numbers.of(train.precision)
        self.steady = False
        self._group = ranks.group(DATA)
        for m in module.modules():  # so that shards have the master's precision
            for p in parameters_here(m).values():
                if p is not None and p.dtype != numbers.master:
                    p.data = p.data.to(numbers.master)
        found = by_name(module, names)
        scalars = {p for p in found.values() if p.dim() == 0}
        policy = MixedPrecisionPolicy(
            param_dtype=numbers.compute if numbers.mixed else None,
            reduce_dtype=numbers.master,
            cast_forward_inputs=False,
        )
        mesh = data_mesh(ranks, device)
        for part in (*_separable(module), module):
            fully_shard(part, mesh=mesh, mp_policy=policy, ignored_params=scalars)
        self._parts = [m for m in module.modules() if isinstance(m, FSDPModule)]
        for m in self._parts:
            m.set_gradient_divide_factor(1.0)  # the loss is already divided by the weights of the batches
            m.set_force_sum_reduction_for_comms(True)  # every communication backend has a plain sum
        module.to_empty(device=device)
        self._module = module
        self.masters: dict[str, Tensor] = dict(by_name(module, names))
        self.trained = {name: m.requires_grad for name, m in self.masters.items()}
        self._scalars = [n for n, p in self.masters.items() if p.dim() == 0]
        self.update: Update = _update(self, train)

    def before(self, micro: int, last: bool) -> None:
        if micro == 0:
            for master in self.masters.values():
                master.grad = None
        assert isinstance(self._module, FSDPModule)
        self._module.set_requires_gradient_sync(last)
        self._module.set_is_last_backward(last)

    def gradients(self) -> dict[str, Tensor]:
        out = {name: m.grad for name, m in self.masters.items() if m.grad is not None}
        for name in self._scalars:
            if name in out:
                out[name] = self._group.all_reduce(out[name])
                self.masters[name].grad = out[name]
        return out

    def publish(self) -> None:
        """FSDP2 gathers the new values itself, at the next forward."""


def _update(storage: Storage, train: Train) -> Update:
    if train.optimizer.class_ is None:
        return Torch(storage.masters, train.optimizer, storage.publish)
    trained = {name: master for name, master in storage.masters.items() if storage.trained[name]}
    return ByClass(trained, train.optimizer, storage.publish)


def by_name(module: nn.Module, names: Mapping[str, tuple[str, ...]]) -> dict[str, nn.Parameter]:
    """A module's parameters by their first names, whichever name a tied one has in the module."""
    there = dict(module.named_parameters(remove_duplicate=False))
    out = {}
    for name, others in names.items():
        found = [n for n in (name, *others) if n in there]
        assert found, f"the program does not use {name}"
        out[name] = there[found[0]]
    return out


def _units(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[list[str]]:
    """The names of the parameters of each emitted layer, then of those outside of layers. Each name comes once."""
    names = {p: name for name, p in parameters.items()}
    units = []
    for part in (*layers_of(module), module):
        units.append([names.pop(p) for p in part.parameters() if p in names])
    return units


def _separable(module: nn.Module) -> list[nn.Module]:
    """The layers that share no parameter with the rest of the program. FSDP2 needs one owner for each parameter."""
    users: dict[nn.Parameter, int] = {}
    layers = layers_of(module)
    inside = {m for layer in layers for m in layer.modules()}
    parts = [*(list(dict.fromkeys(layer.parameters())) for layer in layers)]
    parts.append([p for m in module.modules() if m not in inside for p in parameters_here(m).values() if p is not None])
    for part in parts:
        for p in dict.fromkeys(part):
            users[p] = users.get(p, 0) + 1
    return [layer for layer, part in zip(layers, parts, strict=False) if part and all(users[p] == 1 for p in part)]


def data_mesh(ranks: Ranks, device: torch.device) -> DeviceMesh:
    """This rank's group of data ranks, as torch's mesh. The group has the run's timeout."""
    mesh = ranks.mesh
    rest = mesh.size // mesh[DATA]
    assert mesh.names[0] == DATA, f"{DATA} is not the outermost dimension of {mesh}"
    table = torch.arange(dist.get_world_size()).view(mesh[DATA], rest)
    groups = [dist.new_group(column.tolist(), timeout=ranks.timeout) for column in table.t()]
    mine = groups[dist.get_rank() % rest]
    return DeviceMesh.from_group(mine, device.type, mesh_dim_names=(DATA,))
