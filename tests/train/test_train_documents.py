"""Documents that are kept apart in a sample: positions restart, attention does not reach over, or not, as asked."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.test_train_engine import close
from tests.train.test_train_engine_runs import failing
from tests.train.train_runs import CASES, TRAIN, Case, in_threads, train_command
from tpcompiler.errors import TpcError
from tpcompiler.spec.schema import Spec
from tpcompiler.train.data.batches import open_corpus
from tpcompiler.train.data.samples import IGNORED, Causal
from tpcompiler.train.data.tokens import TokenFile, Tokens
from tpcompiler.train.settings import Train

END = 256
MODEL = """
import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, hidden, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x, mask):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


class Net(nn.Module):
    def __init__(self, vocab=261, hidden=16, heads=4):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab, hidden), nn.Embedding(16, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads) for _ in range(2))

    def forward(self, input_ids, position_ids, document_ids, labels=None):
        x = self.tokens(input_ids) + self.places(position_ids)
        place = torch.arange(input_ids.shape[1], device=x.device)
        mask = (place[:, None] >= place) & (document_ids[:, :, None] == document_ids[:, None, :])
        mask = mask[:, None]
        for block in self.blocks:
            x = block(x, mask)
        logits = x @ self.tokens.weight.t()
        return logits if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def example_inputs():
    ids = torch.zeros(2, 8, dtype=torch.int64)
    return {"input_ids": ids, "position_ids": ids.clone(), "document_ids": ids.clone(), "labels": ids.clone()}
"""


def of(tmp_path: Path, ids: list[int]) -> Tokens:
    with (tmp_path / "t.bin").open("wb") as f:
        array("H", ids).tofile(f)
    return Tokens((TokenFile(tmp_path / "t.bin", "uint16", len(ids), max(ids)),))


@pytest.mark.parametrize("shifted", [True, False])
def test_places_and_numbers_begin_anew_after_an_end(shifted: bool, tmp_path: Path) -> None:
    ids = [1, 2, END, 3, END, END, 4, 5, 6, 7, END, 8]
    sample = Causal(of(tmp_path, ids), 11, shifted, END).sample(0, 0)
    assert sample["input_ids"].tolist() == ids[:11]
    assert sample["position_ids"].tolist() == [0, 1, 2, 0, 1, 0, 0, 1, 2, 3, 4]
    assert sample["document_ids"].tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 3]
    begun = [1, 2, END, IGNORED, END, IGNORED, IGNORED, 5, 6, 7, END, IGNORED]
    assert sample["labels"].tolist() == (begun[1:] if shifted else begun[:11])


def texts(tmp_path: Path) -> dict[str, Any]:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": f"text {i}"[: 3 + i % 9]}) + "\n" for i in range(200)))
    return {"path": str(file), "cache": str(tmp_path / "cache"), "documents": "restart"}


def test_a_model_that_takes_documents_trains_at_every_degree(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(MODEL)
    case = Case(str(tmp_path / "net.py"), {}, {**TRAIN, "data": texts(tmp_path)})
    apart = in_threads(case, 1, 3)
    close(apart, in_threads(case, 2, 3))


@pytest.mark.nightly
def test_llama_of_hugging_face_keeps_documents_apart_by_their_positions(tmp_path: Path) -> None:
    """A batch of two documents a sample has the loss of the documents by themselves."""
    pytest.importorskip("transformers")
    sizes = {
        "model": {"vocab_size": 261, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
                  "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32},
        "inputs": {"batch": 2, "sequence": 8, "position_ids": True},
    }  # fmt: skip
    data = {**texts(tmp_path), "labels": "same"}
    case = Case("hf:llama", sizes, {**TRAIN, "data": data, "batch": 1, "micro_batch": 1})
    spec = Spec.load(case.spec(1))
    found = in_threads(case, 2, 1)[0]
    from tpcompiler.load.model import load_model

    loaded = load_model("hf:llama", spec)
    model = plain(loaded, spec.seed).double()
    sample = open_corpus(spec.section(Train)).train.batch_at(0, 0).tensors
    ids, documents = sample["input_ids"][0], sample["document_ids"][0]
    total, count = 0.0, 0
    for number in range(int(documents.max()) + 1):
        one = ids[documents == number].unsqueeze(0)
        if one.shape[1] > 1:
            total += float(model(one, labels=one).loss.detach()) * (one.shape[1] - 1)
            count += one.shape[1] - 1
    assert int(documents.max()) >= 1
    assert found == pytest.approx(total / count, rel=1e-6)  # it computes norms in float32


def plain(loaded: Any, seed: int) -> Any:
    """The model with the run's initial weights."""
    from tpcompiler.capture import record

    recorded, model = record(loaded.build), loaded.build()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(recorded.replay(name, seed))
    return model.eval()


def test_a_model_that_takes_neither_is_refused(tmp_path: Path) -> None:
    case = Case("gpt2", CASES["gpt2"].sizes, {**TRAIN, "data": texts(tmp_path)})
    command = train_command(case, case.spec(1), tmp_path)
    assert "takes neither position_ids nor document_ids" in failing(command, 1, tmp_path)


def test_ids_of_another_tokenizer_have_no_known_end(tmp_path: Path) -> None:
    of(tmp_path, [1, 2, 50256] * 20)
    data = {"path": str(tmp_path / "t.bin"), "token_type": "uint16", "documents": "restart"}
    data["cache"] = str(tmp_path / "cache")
    spec = Spec.load({"mesh": {"tensor": 1}, "train": {"sequence": 8, "evaluation": {"every": 0}, "data": data}})
    with pytest.raises(TpcError, match="needs the tokenizer of the ids"):
        open_corpus(spec.section(Train))


def test_a_file_larger_than_the_memory_is_read_by_place(tmp_path: Path) -> None:
    """A file with a hole in it, so that it takes no disk."""
    with open("/proc/meminfo") as info:
        memory = 1024 * int(info.readline().split()[1])
    count = 2 * memory  # of two bytes
    with (tmp_path / "t.bin").open("wb") as file:
        try:
            file.truncate(2 * count)
        except OSError:
            pytest.skip("the file system has no files of that size")
        file.seek(2 * (count - 3))
        file.write(array("H", [7, 8, 9]).tobytes())
    tokens = Tokens((TokenFile(tmp_path / "t.bin", "uint16", count, 9),))
    assert tokens.read(count - 4, count).tolist() == [0, 7, 8, 9]
    samples = Causal(tokens, 16)
    assert samples.sample(len(samples) // 2, 0)["input_ids"].tolist() == [0] * 16
