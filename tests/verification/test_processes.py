"""Written programs in real processes: they compute what the plain model computes, alone, and fail in one line."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tpcompiler as tpc
from models.gpt2 import GPT2, example_inputs
from models.llama import Llama
from tpcompiler.api import Sharded, compile_capture
from tpcompiler.capture import capture, float64
from tpcompiler.errors import TpcError
from tpcompiler.execute.simulate import run_ranks
from tpcompiler.runtime import Mesh, Ranks, load
from tpcompiler.runtime.stored import VERSION, seal
from tpcompiler.runtime.worker import import_program
from tpcompiler.spec.schema import Spec
from tpcompiler.verification import processes
from tpcompiler.verification.against_model import Comparison
from tpcompiler.verification.emitted import emitted_case
from tpcompiler.verification.processes import processes_case, run_processes
from tpcompiler.verification.verify import initial_state, inputs_of, smaller, vary

EXAMPLE = example_inputs(2, 6, 61)
PAIR = Mesh((("tensor", 2),))


def plain() -> nn.Module:
    return GPT2(vocab=61, positions=16, hidden=24, heads=3, layers=2)


def few_kv_heads() -> nn.Module:
    return Llama(vocab=61, positions=16, hidden=16, heads=4, kv_heads=2, layers=1, intermediate=10)


@cache
def checked(degree: int) -> tuple[Sharded, Comparison]:
    """A program in float64, and what knows the plain model with noise on its weights."""
    build = {2: plain, 4: few_kv_heads}[degree]
    captured = capture(build, EXAMPLE)
    sharded = compile_capture(float64(captured), Spec.load({"mesh": {"tensor": degree}}))
    return sharded, Comparison(sharded, initial_state(captured, build(), torch.float64, 0), torch.float64, True)


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """After each test: no process runs, no temporary directory is there."""
    started: list[subprocess.Popen[bytes]] = []
    start = processes._start

    def noted(*args: Any) -> subprocess.Popen[bytes]:
        started.append(start(*args))
        return started[-1]

    monkeypatch.setattr(processes, "_start", noted)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    yield
    assert all(p.poll() is not None for p in started)
    assert not list(scratch.glob("tpc-*"))


@pytest.mark.parametrize("degree", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_processes_agree_with_the_plain_model(degree: int) -> None:
    """Three heads over two ranks; two kv heads over four, which takes a mesh with two tensor dimensions."""
    sharded, run = checked(degree)
    batch = inputs_of(sharded.capture, EXAMPLE, torch.float64)
    batches = [batch, vary(sharded.capture, batch, 1), smaller(sharded.capture, batch) or batch]
    case = processes_case(run, batches)
    assert case.passed, (case.notes, case.worst, case.max_rel_error)
    assert case.errors.keys() >= {p.name for p in sharded.capture.parameters if p.trainable}
    assert f"{degree} processes (gloo)" in case.what
    assert len(sharded.program.mesh.dims) == {2: 2, 4: 3}[degree]


@pytest.mark.nightly
@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("name", ["bert", "encoder", "gpt2", "llama", "seq2seq"])
def test_every_model_agrees_in_processes(name: str, degree: int) -> None:
    module = import_module(f"models.{name}")
    report = tpc.verify(
        lambda: module.Model(vocab=61, layers=2),
        module.example_inputs(2, 8, vocab=61),
        {"mesh": {"tensor": degree}},
        distributed=True,
    )
    assert report.passed, str(report)
    assert f"{degree} processes" in report.cases[-1].what


def test_other_weights_than_the_plain_models_are_found() -> None:
    sharded, run = checked(2)
    batch = inputs_of(sharded.capture, EXAMPLE, torch.float64)
    wrong = {**run.state, "h.0.mlp.c_fc.bias": run.state["h.0.mlp.c_fc.bias"] + 1e-6}
    case = processes_case(run, [batch], wrong)
    assert not case.passed
    assert case.max_rel_error > 1e-9


def test_logits_left_sharded_are_compared_slice_by_slice() -> None:
    """By the graph and by the emitted source; and one rank's wrong slice is found."""
    logits = {"input_ids": EXAMPLE["input_ids"]}
    captured = capture(plain, logits)
    sharded = compile_capture(float64(captured), Spec.load({"mesh": {"tensor": 2}, "outputs": "shard"}))
    assert sharded.check.passed, sharded.check.refused
    run = Comparison(sharded, initial_state(captured, plain(), torch.float64, 0), torch.float64, True)
    batch = inputs_of(captured, logits, torch.float64)
    for case in (run.case("", [batch]), emitted_case(run, [batch])):
        assert case.passed, (case.notes, case.worst, case.max_rel_error)
    found = run_ranks(sharded.program.mesh, lambda ranks: run.rank(ranks, [batch]))
    assert [r.outputs[0].shape[-1] for r in found] == [31, 30]
    found[1].outputs[0][0, 0, 0] += 1e-3
    assert run.compare(run.plain([batch]), found)[0]["output 0"] > 1e-6


def written(directory: Path, forward: str) -> Path:
    """A program as `tpc shard` writes it, of one line and no weights."""
    keys = {"format": "tpcompiler", "version": VERSION, "mesh": [["tensor", 2]], "tensors": [], "files": []}
    text = json.dumps(keys)[:-1] + ",\n"
    (directory / "manifest.json").write_text(text + seal(text.encode()))
    (directory / "model.py").write_text(
        "import os, time, torch\n"
        "class Model(torch.nn.Module):\n"
        "    def __init__(self, ranks):\n"
        "        super().__init__()\n"
        "        self.ranks, self.tensor = ranks, ranks.group('tensor')\n"
        "    def forward(self, x):\n"
        f"        {forward}\n"
        "        return self.tensor.all_reduce(x)\n"
    )
    return directory


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        ("assert self.ranks.rank == 0, 'out of luck'", "rank 1 of tensor 2 ended with status 1: AssertionError: out "),
        ("if self.ranks.rank == 0: os.kill(os.getpid(), 9)", "rank 0 of tensor 2 ended with status -9: it wrote no"),
    ],
)
def test_a_rank_that_dies_is_named_with_its_last_line(forward: str, said: str, tmp_path: Path) -> None:
    program = written(tmp_path, forward)
    with pytest.raises(TpcError, match=said) as error:
        run_processes(program, PAIR, [((torch.ones(3),), {})])
    assert "\n" not in str(error.value)


def test_ranks_that_hang_are_ended(tmp_path: Path) -> None:
    program = written(tmp_path, "while True: time.sleep(0.1)")
    start = time.monotonic()
    with pytest.raises(TpcError, match=r"ranks 0, 1 of tensor 2 did not end in 6 s: "):
        run_processes(program, PAIR, [((torch.ones(3),), {})], limit=6)
    assert time.monotonic() - start < 20


def test_a_program_without_weights_says_so(tmp_path: Path) -> None:
    program = checked(2)[0]
    program.write(tmp_path / "program")
    model = import_program(tmp_path / "program").Model

    def fill(ranks: Ranks) -> None:
        load(model(ranks), tmp_path / "program", ranks)

    with pytest.raises(TpcError, match=r"program: holds a program without weights; tpc shard --weights"):
        run_ranks(program.program.mesh, fill)


ALONE = """
import sys

class Only:
    "Nothing but torch and the runtime can be imported."
    others = {"networkx", "pydantic", "rich", "safetensors", "transformers", "typer", "yaml"}

    def find_spec(self, name, path=None, target=None):
        needed = (name + ".").startswith(("tpcompiler.runtime.", "tpcompiler.errors."))
        if name.startswith("tpcompiler.") and not needed or name.partition(".")[0] in self.others:
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Only())
import os, torch
from model import Model
DIRECTORY = os.path.dirname(os.path.abspath(__file__))
# what the file's own first lines say:
USE
batch = torch.load("batch.pt")
model.eval()
loss = model(**batch)
loss.backward()
assert all(p.grad is not None for p in model.parameters())
torch.save(loss.detach(), f"loss-{ranks.rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.nightly
def test_a_program_runs_as_its_docstring_says_where_only_torch_and_the_runtime_are(tmp_path: Path) -> None:
    model = plain()
    out = tmp_path / "out"
    program = tpc.shard(model, EXAMPLE, {"mesh": {"tensor": 2}})
    program.write(out, model.state_dict())
    doc = ast.get_docstring(ast.parse((out / "model.py").read_text()))
    assert doc is not None
    use = textwrap.dedent(doc[doc.index("    # torchrun") :])
    (out / "run.py").write_text(ALONE.replace("USE", use))
    torch.save(EXAMPLE, out / "batch.pt")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    done = subprocess.run(
        [*torchrun, "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", "run.py"],
        cwd=out,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = model.eval()(**EXAMPLE).detach()
    for rank in range(2):
        torch.testing.assert_close(torch.load(out / f"loss-{rank}.pt"), expected, rtol=1e-5, atol=0)
