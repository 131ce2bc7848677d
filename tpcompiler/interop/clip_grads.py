"""`tpc.clip_grad_norm_`: what `torch.nn.utils.clip_grad_norm_` does, for a module whose parameters are slices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tpcompiler.errors import TpcError
from tpcompiler.interop.data_shards import check_data_mesh
from tpcompiler.runtime import Ranks
from tpcompiler.train.optim.clip import Share, clip_, grad_norm, share
from tpcompiler.weights.on_mesh import OnMesh, located


def clip_grad_norm_(module: nn.Module, max_norm: float, *, error_if_nonfinite: bool = False) -> Tensor:
    """Scales all gradients so that their 2-norm over the whole model is at most `max_norm`. Every rank calls this.

    `module` is what `tpc.parallelize` returned, or a module around it (DDP, torch.compile, FSDP2's `fully_shard`).
    Returns the norm before the clip, a scalar that is the same on every rank. Slices are counted by their own
    elements, and what several ranks hold is counted once: the norm is that of the plain model's gradients, at any
    degree. torch's own function sees one rank's slices as the whole; it gives another norm, and another factor, on
    each rank, and what all ranks hold drifts apart.
    Raises `TpcError` for a norm that is not finite when `error_if_nonfinite`, before anything is scaled.
    """
    gradients: dict[OnMesh | None, dict[str, Tensor]] = {}
    shares: dict[OnMesh | None, dict[str, Share]] = {}
    for name, p, on_mesh, dims in located(module, dict(module.named_parameters())):
        if p.grad is None:
            continue
        if on_mesh is not None:
            check_data_mesh(name, p, on_mesh)
        gradients.setdefault(on_mesh, {})[name] = p.grad
        shares.setdefault(on_mesh, {})[name] = (
            Share() if on_mesh is None or dims is None else share(dims, on_mesh.mesh, on_mesh.ranks.coords)
        )
    norms = [
        grad_norm(found, shares[on_mesh], on_mesh.ranks if on_mesh is not None else Ranks.single())
        for on_mesh, found in gradients.items()
    ]
    norm = torch.stack([n.square() for n in norms]).sum().sqrt() if norms else torch.zeros(())
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise TpcError(f"the gradients' norm is {float(norm)}: nothing was clipped")
    return clip_([g for found in gradients.values() for g in found.values()], norm, float(max_norm))
