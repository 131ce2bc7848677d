"""`tpc merge` and `tpc schema`: the commands that need no model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tpcompiler.cli.options import AsJson, Set
from tpcompiler.cli.screen import Screen
from tpcompiler.errors import TpcError, format_bytes


def merge(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An output of `tpc shard`, or a checkpoint.")],
    out: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="OUT", help="A .safetensors file, or a directory like those of Hugging Face."
        ),
    ],
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="KIND", help="bf16, fp16, fp32 or fp64. Default: the weights' own."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="hf:DIR or hf:TYPE, whose configuration and tokenizer are written as well. A checkpoint needs none.",
        ),
    ] = None,
    settings: Set = None,
    average: Annotated[
        bool, typer.Option("--average", help="Merge the averaged weights, which train.optimizer.average keeps.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT even if it holds weights.")] = False,
    as_json: AsJson = False,
) -> None:
    """Merge the ranks' weights.

    The tensors get their original names, and are equal to the originals bit for bit. `from_pretrained` can read the
    directory of an hf: model.
    """
    screen = Screen(as_json)
    _refuse_mistakes(directory, out, force)
    with screen.open(), screen.progress() as stages:
        stages("merging")
        from tpcompiler.train.run.merging import merge as put_together

        files = put_together(directory, out, dtype, model, settings, average, progress=stages.bytes)
        written = [{"file": str(file), "bytes": file.stat().st_size} for file in files]
    screen.show(*(f"{f['file']}  {format_bytes(file.stat().st_size)}" for f, file in zip(written, files, strict=True)))
    screen.result({"files": written})


def _refuse_mistakes(directory: Path, out: Path, force: bool) -> None:
    """Raises `TpcError` for common mistakes: a run instead of a checkpoint, another format, weights that lie in OUT."""
    from tpcompiler.train.run.checkpoint import checkpoints

    if out.suffix in (".pt", ".pth", ".bin", ".ckpt") and not out.is_dir():
        would = out.with_suffix(".safetensors")
        raise TpcError(f"{out}: merge writes a .safetensors file or a directory of them; {would} would work")
    held = next(out.glob("*.safetensors"), None) if out.is_dir() else out if out.exists() else None
    if held is not None and not force:
        raise TpcError(f"{held}: exists already; name another place, or add --force to replace it")
    found = checkpoints(directory / "checkpoints")
    if found and not (directory / "manifest.json").exists():
        raise TpcError(
            f"{directory}: is a run; give one of its {len(found)} checkpoints, such as the newest, {found[0]}"
        )


def schema(as_json: AsJson = False) -> None:
    """Print the JSON schema of a spec.

    Editors complete and check specs with it.
    """
    import json

    from tpcompiler.spec.schema import Spec

    typer.echo(json.dumps(Spec.json_schema(), indent=None if as_json else 2, ensure_ascii=False))
