"""`tpc tokenize`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from tpcompiler.cli.options import AsJson
from tpcompiler.cli.screen import Screen


def tokenize(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH…", help="Files, directories or globs, as in train.data.path.")
    ],
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", metavar="FILE", help="`bytes`, or a tokenizer.json or its directory.")
    ] = "bytes",
    format: Annotated[
        str, typer.Option("--format", metavar="KIND", help="auto, text or jsonl, as train.data.format.")
    ] = "auto",
    field: Annotated[str, typer.Option("--field", metavar="KEY", help="The key of a .jsonl line's text.")] = "text",
    target_field: Annotated[
        str | None,
        typer.Option("--target-field", metavar="KEY", help="Of pairs: the key of the target's text, for task: pairs."),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", metavar="DIR", help="As train.data.cache. Default: the same.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", "-j", min=1, metavar="N", help="Processes. Default: one a core.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tokenise text before a run, in parallel.

    A run with the same tokenizer, format, field and cache finds it done. Stopped, it goes on where it was.
    """
    screen = Screen(as_json)
    with screen.open(), screen.progress() as stages:
        from tpcompiler.spec.schema import Spec
        from tpcompiler.train.data.corpus import sources
        from tpcompiler.train.data.tokenizer import load_tokenizer
        from tpcompiler.train.data.tokens import cache_directory, tokenised
        from tpcompiler.train.settings import Train

        pairs = {"task": "pairs", "target_field": target_field} if target_field else {}
        settings = {**pairs, "format": format, "field": field, "cache": None if cache is None else str(cache)}
        data = Spec.load({"mesh": {"tensor": 1}, "train": {"data": settings}}).section(Train).data
        loaded = load_tokenizer(tokenizer)
        rows, began = [], time.perf_counter()
        for source in sources(tuple(paths), data):
            if source.format != "tokens":
                stages(str(source))
                files = tokenised(source, data, loaded, cache_directory(data), workers, stages.bytes)
                rows.append({"text": str(source), "tokens": sum(f.count for f in files), "parts": len(files)})
    seconds = time.perf_counter() - began
    screen.show(*(f"{r['text']}  {r['tokens']:,} tokens" for r in rows), f"{seconds:.1f} s")
    screen.result({"texts": rows, "seconds": seconds})
