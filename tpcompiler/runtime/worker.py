"""One rank of a written program, run once in a process of its own that has `torchrun`'s environment.

    python -m tpcompiler.runtime.worker PROGRAM WORK

PROGRAM is a directory that `tpc shard` wrote, with weights. Rank 0 reads `WORK/call-00000.pt` and writes its results to
`WORK/result-00000.pt`: dictionaries of plain values and tensors, described at `run`. If it fails, it prints a traceback
and then one line that says why, and exits with status 1. It needs only torch, as programs do.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tpcompiler.errors import TpcError
from tpcompiler.runtime.groups import Ranks
from tpcompiler.runtime.mesh import Mesh
from tpcompiler.runtime.precision import cast
from tpcompiler.runtime.private_apis import pytree
from tpcompiler.runtime.weights import load

CALL, RESULT, ERRORS = "call-{rank:05d}.pt", "result-{rank:05d}.pt", "stderr-{rank:05d}"
LONGEST = 500  # characters of the line that says why a rank failed


def run(program: Path, call: dict[str, Any]) -> dict[str, Any]:
    """Runs forward on this rank in evaluation mode, and backward if there are cotangents.

    `call` has `mesh`: ((name, degree), …); `backend`: nccl or gloo; `timeout`: seconds that a rank waits for others;
    `dtype` of parameters, None for the program's own; `batches`: [(args, kwargs)]; `cotangents`: for each batch a list
    with a tensor or None for each output, or None for no backward. Gradients add up over the batches.
    The result has `outputs` of all batches in one list; `gradients` under every name of a parameter; `imported`: the
    modules of the package that were imported.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if call["backend"] == "nccl" else torch.device("cpu")
    ranks = Ranks.from_env(Mesh(tuple(call["mesh"])), call["backend"], timedelta(seconds=call["timeout"]))
    with device:
        model: nn.Module = import_program(program).Model(ranks)
    if call["dtype"] is not None:
        cast(model, call["dtype"])
    load(model, program, ranks)
    model.eval()
    outputs: list[Any] = []
    for i, batch in enumerate(call["batches"]):
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to(device), batch)
        backward = call["cotangents"] is not None
        with torch.set_grad_enabled(backward):
            found = pytree.tree_leaves(model(*args, **kwargs))
        if backward:
            _backward(found, call["cotangents"][i])
        outputs += [x.detach().cpu() if isinstance(x, Tensor) else x for x in found]
    named = model.named_parameters(remove_duplicate=False)
    gradients = {name: None if p.grad is None else p.grad.cpu() for name, p in named}
    imported = sorted(m for m in sys.modules if m.partition(".")[0] == "tpcompiler")
    return {"outputs": outputs, "gradients": gradients, "imported": imported}


def import_program(directory: Path) -> ModuleType:
    """Imports `DIRECTORY/model.py`, even if another module is called `model`."""
    path = directory / "model.py"
    spec = importlib.util.spec_from_file_location("tpc_program", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise TpcError(f"{directory}: holds no model.py; give a directory that tpc shard wrote")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # torch.compile and inspect look it up there
    spec.loader.exec_module(module)
    return module


def _backward(outputs: Sequence[Any], cotangents: Sequence[Tensor | None]) -> None:
    assert len(outputs) == len(cotangents), f"{len(outputs)} outputs, {len(cotangents)} cotangents"
    pairs = [(x, c.to(x.device)) for x, c in zip(outputs, cotangents, strict=True) if c is not None and x.requires_grad]
    if pairs:
        torch.autograd.backward([x for x, _ in pairs], [c for _, c in pairs])


def main(argv: Sequence[str]) -> NoReturn:
    """Runs the rank that the environment names. Exits without clean-up, which could wait for ranks that have ended."""
    code = 1
    try:
        program, work = map(Path, argv)
        rank = int(os.environ["RANK"])
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        call = torch.load(work / CALL.format(rank=rank), weights_only=True)
        torch.save(run(program, call), work / RESULT.format(rank=rank))
        if dist.is_initialized():
            dist.barrier()  # no rank closes its connections while another still needs them
        code = 0
    except BaseException as e:
        traceback.print_exc()
        first = str(e).strip().partition("\n")[0]
        said = first if isinstance(e, TpcError) else f"{type(e).__name__}: {first}"
        sys.stderr.write(f"{said[:LONGEST]}\n")
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
