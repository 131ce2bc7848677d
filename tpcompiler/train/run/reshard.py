"""`tpc reshard`: weights and checkpoints to another mesh, with or without the plain model at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tpcompiler import weights
from tpcompiler.errors import TpcError, WeightsError
from tpcompiler.layout import Dim
from tpcompiler.runtime.mesh import Mesh
from tpcompiler.spec.schema import Spec
from tpcompiler.train.run.checkpoint import STATE, State
from tpcompiler.weights import Manifest
from tpcompiler.weights.wire import from_tree


def reshard(
    directory: Path,
    spec: Spec,
    out: Path,
    *,
    model: str | None = None,
    settings: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
    tell: Callable[[str], None] = lambda stage: None,
) -> Manifest:
    """Writes `directory` for the mesh of `spec` into `out`, every bit kept; optimizer state follows its parameters.

    Without `model` the axes are split as they are there, over the new degrees. A mesh whose dimensions have other
    names (fewer kv heads than ranks) needs the model. Raises `TpcError`.
    """
    manifest = weights.load_manifest(directory)
    if model is None:
        mesh = spec.ranks
        dims = stored_layouts(directory, manifest)
        _fits(dims, mesh, directory)
    else:
        tell("compiling the model")
        dims, mesh = _compiled(model, spec, settings)
    tell("writing")
    return weights.reshard(directory, dims, mesh, out, spec=spec.dump(), progress=progress)


def stored_layouts(directory: Path, manifest: Manifest) -> dict[str, tuple[Dim, ...]]:
    """The layouts that the manifest holds; a checkpoint's state has those that data ranks have cut into."""
    out = {}
    for entry in manifest.entries:
        trees = [d.tree for d in entry.layout.dims]
        if all(t is not None for t in trees):
            out[entry.name] = tuple(t for t in trees if t is not None)
    if (directory / STATE).is_file():
        for name, written in State.load(directory).layouts.items():
            out[name] = tuple(map(from_tree, written))
    return out


def _fits(dims: Mapping[str, Sequence[Dim]], mesh: Mesh, directory: Path) -> None:
    for name, tree in dims.items():
        for d in tree:
            unknown = [over for over in d.over if over not in mesh]
            if unknown:
                raise WeightsError(
                    f"{directory}: {name} is split over {unknown[0]}, which the spec's mesh ({mesh}) does not have; "
                    f"name the plain model too: --model MODEL"
                )


def _compiled(model: str, spec: Spec, settings: Sequence[str]) -> tuple[dict[str, Any], Mesh]:
    from tpcompiler.api import shard
    from tpcompiler.load.model import load_model, parse_settings

    loaded = load_model(model, spec, parse_settings(list(settings)))
    with loaded.environment:
        sharded = shard(loaded.build, loaded.inputs(), spec, source=loaded.source)
    dims = {name: tuple(d) for name, d in sharded.program.dims.items()}
    if not dims:
        raise TpcError(f"{model}: has no parameters")
    return dims, sharded.program.mesh
