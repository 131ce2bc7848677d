"""The arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="path/to/model.py[:NAME], hf:DIR (a local Hugging Face directory), or hf:TYPE (e.g. hf:llama).",
        show_default=False,
    ),
]
SpecFile = Annotated[Path, typer.Option("--spec", "-s", metavar="FILE", help="The YAML spec.", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="An argument of the model's constructor, over the spec's model:. Repeatable."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout and nothing else.")]
