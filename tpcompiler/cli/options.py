"""The arguments that several commands share, and commands whose options are the fields of a record."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

Record = TypeVar("Record")

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
        "--set",
        metavar="KEY=VALUE",
        help="Set an argument of the model's constructor, instead of the spec's model: section. Can be repeated.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]


def command_with(record: type[Record]) -> Callable[[Callable[[Record], None]], Callable[..., None]]:
    """Turns a function of one record into a command that has an option for each field of the dataclass."""

    def decorate(function: Callable[[Record], None]) -> Callable[..., None]:
        hints = get_type_hints(record, include_extras=True)
        fields = signature(record).parameters.values()

        @wraps(function)
        def command(**given: Any) -> None:
            function(record(**given))

        vars(command).pop("__wrapped__")  # else typer would read the function's own parameters
        described = [f.replace(annotation=hints[f.name]) for f in fields]
        vars(command)["__signature__"] = signature(record).replace(parameters=described, return_annotation=None)
        command.__annotations__ = {f.name: f.annotation for f in described}
        return command

    return decorate
