"""What a parallelized module remembers: where each of its parameters lies on the mesh, and which rank it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from tpcompiler.errors import TpcError
from tpcompiler.layout import Dim
from tpcompiler.program import Program
from tpcompiler.runtime import Ranks

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # what torch.compile and checkpoint_wrapper put into names


class OnMesh:
    """The place of a module's values. Copies of the module share it; a pickled module loses it."""

    def __init__(self, program: Program, ranks: Ranks, device_mesh: Any, device: str) -> None:
        """`device_mesh` is what `tpc.parallelize` was given, or None; `device` is the kind of device of the values."""
        self.ranks, self.mesh = ranks, ranks.mesh
        self.dims: Mapping[str, tuple[Dim, ...]] = {
            name: program.dims[p.name] for p in program.capture.parameters if p.name in program.dims for name in p.names
        }
        self._device_mesh, self._device = device_mesh, device

    @property
    def device_mesh(self) -> Any:
        """The `DeviceMesh` of the ranks; None where one process is alone. The first call is collective: torchrun's
        ranks make one, unless `tpc.parallelize` was given one."""
        if self._device_mesh is None and self.mesh.size > 1:
            names = self.mesh.names
            shape = tuple(self.mesh[name] for name in names)
            self._device_mesh = dist.init_device_mesh(self._device, shape, mesh_dim_names=names)
        return self._device_mesh

    def place(self, process: int) -> dict[str, int] | None:
        """The coordinates of a process of the world; None where it has no place on the mesh."""
        world = range(self.mesh.size) if self._device_mesh is None else self._device_mesh.mesh.flatten().tolist()
        return self.mesh.coords(world.index(process)) if process in world else None

    def __deepcopy__(self, memo: object) -> OnMesh:
        return self

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def attach(module: nn.Module, on_mesh: OnMesh) -> None:
    """Gives a parallelized module its place."""
    vars(module)["tpc_on_mesh"] = on_mesh


def attached(module: nn.Module) -> list[tuple[str, OnMesh]]:
    """The parallelized modules in a module, which may be one itself or may wrap some: (prefix of names, place).

    Raises `TpcError` when there is none.
    """
    found = [(f"{name}." if name else "", vars(m).get("tpc_on_mesh")) for name, m in module.named_modules()]
    parts = [(prefix, on_mesh) for prefix, on_mesh in found if on_mesh is not None]
    if not parts:
        what = type(module).__name__
        raise TpcError(f"{what} holds no module of tpc.parallelize: pass the module that it returned, or one around it")
    return parts


def located(
    module: nn.Module, values: Mapping[str, Any]
) -> Iterator[tuple[str, Any, OnMesh | None, tuple[Dim, ...] | None]]:
    """Each of `values`, which have a module's names, with the place that it belongs to and its layout there.

    Values outside of all parallelized modules have neither: every rank holds them whole. Raises `TpcError` for a
    parameter inside one that the compiled model did not have: nothing says which part of it a rank holds.
    """
    parts = attached(module)
    for name, value in values.items():
        inside = [(prefix, on_mesh) for prefix, on_mesh in parts if name.startswith(prefix)]
        if not inside or not isinstance(value, Tensor):
            yield plain_name(name), value, None, None
            continue
        prefix, on_mesh = max(inside, key=lambda part: len(part[0]))
        own = plain_name(name.removeprefix(prefix))
        if own not in on_mesh.dims:
            raise TpcError(f"{own} was added after tpc.parallelize, and nothing says which part of it a rank holds")
        yield plain_name(name), value, on_mesh, on_mesh.dims[own]


def plain_name(name: str) -> str:
    """A name without what wrappers of torch put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
