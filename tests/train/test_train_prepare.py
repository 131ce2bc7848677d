"""What `compile: layers` compiles: the layers, their twins for second halves, and the loss; the results stay."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from tests.runtime.test_runtime_halves import batch_of, compiled, same, trained
from tpcompiler.train.settings import Train
from tpcompiler.train.step.prepare import prepare


@pytest.mark.parametrize("degree", [1, 2])
def test_layers_twins_and_the_loss_are_compiled(degree: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()

    def compile(fn: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            calls[fn.__name__] += 1
            return fn(*args, **kwargs)

        return run

    def change(module: nn.Module) -> None:
        prepare(module, Train(compile="layers"), hooked=False)

    inputs = batch_of("gpt2", 4)
    plain = trained(compiled("gpt2", degree, False), inputs)
    monkeypatch.setattr(torch, "compile", compile)
    same(trained(compiled("gpt2", degree, "halves"), inputs, change), plain)
    # two layers, on two halves with two ranks
    assert calls == {"forward": 2 * degree**2, "chunk_numbers": degree, "chunk_losses": degree}
