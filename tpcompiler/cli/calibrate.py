"""`tpc calibrate`: measures the machine that it runs on and writes a description of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml
from rich.text import Text

from tpcompiler.cli.options import AsJson
from tpcompiler.cli.screen import Screen
from tpcompiler.errors import TpcError

if TYPE_CHECKING:
    import torch


def calibrate(
    out: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write it.")] = Path(
        "machine.yaml"
    ),
    base: Annotated[
        str, typer.Option("--base", metavar="H", help="The description that supplies the keys that are not measured.")
    ] = "h100",
    device: Annotated[
        str | None, typer.Option("--device", metavar="D", help="cuda or cpu. Default: cuda if there is a GPU.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure this machine and write a description of it for `hardware:` and `tpc plan --hardware`.

    Measures products, attention and memory, and under torchrun with several ranks also all-reduces. Takes some seconds.
    """
    import torch.distributed as dist

    from tpcompiler.cost.measured_rates import measure
    from tpcompiler.spec.schema import Spec
    from tpcompiler.train.step.flops import peak_tflops
    from tpcompiler.weights.atomic import replacing_file

    screen = Screen(as_json)
    with screen.open():
        spec = Spec.load({"mesh": {"tensor": 1}}).put(("hardware",), {"base": base}, f"--base {base}")
        if out.suffix not in (".yaml", ".yml"):
            raise TpcError(f"-o {out}: a description must be a .yaml file, so that `hardware:` can name it")
        where, name = _device(device)
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        if ranks > 1:
            dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
        try:
            told = spec.hardware.bandwidth_gbps if _same(name, base) else None
            found = measure(where, peak_tflops(name, "bf16"), told)
        finally:
            if ranks > 1:
                dist.destroy_process_group()
        measured = [key for key in found if key != "peak_tflops" and not (key == "bandwidth_gbps" and told)]
        text = f"# tpc calibrate, {name}, {ranks} rank{'s' * (ranks > 1)}, torch {_torch()}\n"
        text += yaml.safe_dump({"base": base, **found, "measured": measured, "fitted": []}, sort_keys=False)
        if os.environ.get("RANK", "0") == "0":
            with replacing_file(out) as new:
                new.write_text(text)
    if os.environ.get("RANK", "0") == "0":
        screen.show(Text(text), Text("written to ").append(str(out), style="bold"))
        screen.result({"written": str(out), "device": name, "ranks": ranks, **found})


def _device(asked: str | None) -> tuple[torch.device, str]:
    import torch

    if asked not in (None, "cpu", "cuda"):
        raise TpcError(f"--device {asked}: not a kind of device; write cuda or cpu")
    if asked == "cuda" and not torch.cuda.is_available():
        raise TpcError("--device cuda: torch finds no GPU here; `tpc doctor` says what there is")
    if asked != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("cuda", torch.cuda.current_device()), torch.cuda.get_device_name()
    return torch.device("cpu"), "CPU"


def _same(device: str, base: str) -> bool:
    """Whether a description is one of this kind of device, so that its maker's bandwidth holds."""
    return base.upper() in device.upper()


def _torch() -> str:
    import torch

    return torch.__version__
