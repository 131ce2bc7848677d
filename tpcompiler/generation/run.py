"""`tpc generate`: continues texts with a trained model on the ranks of a spec."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch

from tpcompiler.decode import derive
from tpcompiler.errors import TpcError
from tpcompiler.generation.call import held_by
from tpcompiler.generation.prompts import Text
from tpcompiler.generation.stream import Served, Stream, Wish, check_prompts
from tpcompiler.load.target import Loaded
from tpcompiler.runtime import Ranks
from tpcompiler.spec.schema import Spec
from tpcompiler.train.data.tokenizer import Tokenizer, load_tokenizer
from tpcompiler.train.evaluate.measure import filled, ids_alone
from tpcompiler.train.hold.mapping import Renaming
from tpcompiler.train.hold.storage import Numbers
from tpcompiler.train.run.launch import Place
from tpcompiler.train.settings import Train
from tpcompiler.train.step.compiled import compile_model, logits_output

Show = Callable[[int, str, bool], None]  # called with the number of a prompt, its new text, and whether it is finished


@dataclass(frozen=True)
class WeightsSource:
    """Where a model's weights come from, and under which names."""

    weights: Path
    renaming: Renaming


def tokenizer_of(loaded: Loaded, spec: Spec, train: Train) -> Tokenizer:
    """The spec's tokenizer. If the spec names none, it is that of a Hugging Face model's directory, if there is one."""
    beside = None if loaded.weights is None else loaded.weights / "tokenizer.json"
    if "tokenizer" not in spec.train and beside is not None and beside.is_file():
        return load_tokenizer(str(beside))
    return load_tokenizer(train.tokenizer)


def run(
    loaded: Loaded,
    spec: Spec,
    train: Train,
    place: Place,
    source: WeightsSource,
    texts: Sequence[str],
    wish: Wish,
    show: Show,
    out: TextIO | None = None,
) -> dict[str, Any]:
    """Continues `texts`. Returns a report, which is the same on all ranks.

    `show` is called with every piece of new text. Finished texts are written to `out` as JSON lines. Raises `TpcError`,
    before weights are read, for a model that cannot generate and for prompts that do not fit.
    """
    tokenizer = tokenizer_of(loaded, spec, train)
    prompts = [tokenizer.encode(text) for text in texts]
    if tokenizer.specials.end is not None:
        wish = replace(wish, stop=frozenset({*wish.stop, tokenizer.specials.end}))
    name = train.data.names.get("input_ids", "input_ids")
    compiled = compile_model(
        loaded,
        spec.with_(outputs={"*": "shard"}),
        ids_alone(loaded, name),
        logits_output,
        double=train.precision == "fp64",
    )
    compiled.sharded.proven()
    decoder = derive(compiled.sharded.program)
    check_prompts(decoder, prompts, wish)
    numbers = Numbers.of(train.precision)
    ranks = Ranks.from_env(compiled.sharded.program.mesh, timeout=place.timeout)
    module = filled(compiled, ranks, numbers, place, source.weights, source.renaming)
    served = Served(decoder, ranks, held_by(module), place.device, _autocast(place, numbers))
    return _generated(Stream(served, prompts, wish), texts, tokenizer, show, out)


def _autocast(place: Place, numbers: Numbers) -> AbstractContextManager[object]:
    return torch.autocast(place.device.type, numbers.compute, enabled=numbers.mixed, cache_enabled=False)


def _generated(
    stream: Stream, texts: Sequence[str], tokenizer: Tokenizer, show: Show, out: TextIO | None
) -> dict[str, Any]:
    grown = [Text(tokenizer) for _ in texts]
    unwritten = tokenizer.specials.ids
    start, count = time.perf_counter(), 0
    for new in stream:
        text = grown[new.prompt]
        more = text.take(None if new.token in unwritten else new.token, new.last)
        count += 1
        show(new.prompt, more, new.last)
        if new.last and out is not None:
            line = {"number": new.prompt + 1, "prompt": texts[new.prompt], "text": text.whole}
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
            out.flush()
    seconds = time.perf_counter() - start
    return {
        "texts": [t.whole for t in grown],
        "tokens": count,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(count / max(seconds, 1e-9), 2),
    }


def opened(path: Path) -> TextIO:
    """A new file for results. Raises `TpcError` if it exists already."""
    try:
        return path.open("x", encoding="utf-8")
    except FileExistsError:
        raise TpcError(f"{path}: exists already and is not overwritten; name another file") from None
    except OSError as e:
        raise TpcError(f"{path}: {(e.strerror or str(e)).lower()}") from None
