"""What passes between stages prints itself for people: each value with its sizes, each axis with its reason."""

from __future__ import annotations

import tpcompiler as tpc
from models import gpt2


def test_capture_axes_and_program_are_readable() -> None:
    sizes = {"vocab": 129, "positions": 32, "hidden": 48, "heads": 8, "layers": 1}
    sharded = tpc.shard(lambda: gpt2.Model(**sizes), gpt2.example_inputs(vocab=129), {"mesh": {"tensor": 2}})
    capture, program = str(sharded.capture), str(sharded.program)
    assert capture.startswith("GPT2\n")
    assert "gpt2.py:" in capture and "float32[129, 48]" in capture
    assert "all-reduce" not in capture
    assert "all-reduce" in program and "tensor" in program.partition("\n")[0]
    for text in (capture, program):
        assert " at 0x" not in text and "<" not in text, "a value that Python shows by its address"
        assert text.count("\n") >= len(sharded.capture.graph.nodes) - 1
    axes = str(sharded.axes).splitlines()
    assert any("whole, since" in line for line in axes), "an axis that cannot be split says why"
    assert any("(129)" in line for line in axes), "the vocabulary"
