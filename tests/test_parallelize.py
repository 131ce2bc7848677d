"""`tpc.parallelize` on every rank: a module that trains as the plain model does, whatever its values come from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import tpcompiler as tpc
from models.gpt2 import GPT2, example_inputs
from models.llama import Llama
from tests.runtime.test_runtime_processes import in_processes
from tpcompiler.capture import record
from tpcompiler.errors import TpcError
from tpcompiler.runtime import Mesh, Ranks
from tpcompiler.weights.fill import ranks_of

STEPS = 5
Batch = dict[str, Tensor]


def gpt2(seed: int = 1) -> nn.Module:
    """Three heads, 61 words, in float64: nothing divides by two."""
    torch.manual_seed(seed)
    return GPT2(vocab=61, positions=16, hidden=24, heads=3, layers=3, dropout=0.0).double()


def llama() -> nn.Module:
    """Two kv heads, for four ranks; rotary frequencies are buffers that no state_dict has."""
    torch.manual_seed(2)
    return Llama(vocab=61, positions=16, hidden=16, heads=4, kv_heads=2, layers=1, intermediate=10).double()


def batches(count: int = STEPS) -> list[Batch]:
    torch.manual_seed(3)
    return [example_inputs(4, 6, 61) for _ in range(count)]


def train(
    model: nn.Module, before_step: Callable[[nn.Module], None] = lambda model: None, data: int = 0
) -> list[float]:
    """The losses of a few steps of AdamW. `data`: the half of each batch to train on, 1 or 2; 0 is all of it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    losses = []
    for batch in batches():
        loss = model(**{k: v if not data else v.chunk(2)[data - 1] for k, v in batch.items()})
        optimizer.zero_grad()
        loss.backward()
        before_step(model)
        optimizer.step()
        losses.append(loss.item())
    return losses


def parallel(model: Any, degree: int, mesh: Any = None, **more: Any) -> nn.Module:
    return tpc.parallelize(model, batches(1)[0], {"mesh": {"tensor": degree}, "seed": 7}, mesh, **more)


def pair() -> dict[str, list[float]]:
    out = {"built by every rank": train(parallel(gpt2, 2))}
    mesh = dist.init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
    module = parallel(gpt2, 2, mesh, weights=os.environ["WEIGHTS"])
    for layer in module.h:  # type: ignore[union-attr]
        layer.compile(fullgraph=True, backend="aot_eager")
    out["from a file, layers compiled"] = train(module)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled == 1, f"three equal layers, {compiled} graphs"
    return out


def plain_values(seed: int) -> nn.Module:
    """The plain model with the values that its constructor draws by seed and name."""
    model, recorded = gpt2(), record(gpt2)
    model.load_state_dict({name: recorded.replay(name, seed) for name in model.state_dict()})
    return model


def test_two_ranks_train_as_the_plain_model(tmp_path: Path) -> None:
    stored = gpt2(seed=4)
    save_file(stored.state_dict(), tmp_path / "weights.safetensors")
    expected = {"built by every rank": train(plain_values(seed=7)), "from a file, layers compiled": train(stored)}
    for found in in_processes(pair, 2, tmp_path, {"WEIGHTS": str(tmp_path / "weights.safetensors")}):
        assert found.keys() == expected.keys()
        for name, losses in found.items():
            assert losses == pytest.approx(expected[name], rel=1e-9), name
    first, second = (losses[0] for losses in expected.values())
    assert abs(first - second) > 1e-3, "the cases are one case"


def four() -> list[list[float]]:
    def average(model: nn.Module) -> None:
        for p in model.parameters():
            assert p.grad is not None
            dist.all_reduce(p.grad, group=mesh.get_group("data"))
            p.grad /= 2

    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    halves = train(parallel(gpt2(seed=4), 2, mesh), average, 1 + mesh.get_local_rank("data"))
    both = torch.tensor(halves, dtype=torch.double)
    dist.all_reduce(both, group=mesh.get_group("data"))
    tensors = dist.init_device_mesh("cpu", (1, 4), mesh_dim_names=("data", "tensor"))
    return [(both / 2).tolist(), train(parallel(llama(), 4, tensors))]


@pytest.mark.nightly
def test_four_ranks_of_a_device_mesh_train_as_the_plain_model(tmp_path: Path) -> None:
    """Two copies of two ranks on halves of each batch; and four ranks for two kv heads."""
    expected = [train(gpt2(seed=4)), train(llama())]
    for found in in_processes(four, 4, tmp_path):
        for losses, plain in zip(found, expected, strict=True):
            assert losses == pytest.approx(plain, rel=1e-9)


@pytest.fixture
def eight() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("eight")
def test_a_device_mesh_serves_a_program_whose_tensor_dimension_has_factors() -> None:
    device_mesh = dist.init_device_mesh("cpu", (2, 4), mesh_dim_names=("data", "tensor"))
    mesh = Mesh.of({"data": 1, "tensor0": 2, "tensor1": 2})
    ranks = ranks_of(device_mesh, mesh)
    assert ranks.mesh == Mesh.of({"data": 2, "tensor0": 2, "tensor1": 2})
    assert (ranks.rank, ranks.coords) == (5, {"data": 1, "tensor0": 0, "tensor1": 1})
    for over in [("tensor0",), ("tensor1",), ("tensor0", "tensor1"), ("tensor1", "tensor0")]:
        group = ranks.group(over)
        assert (group.size, group.index) == (ranks.mesh.degree(over), ranks.mesh.index(over, ranks.coords))


@pytest.mark.usefixtures("eight")
def test_device_meshes_that_do_not_fit_are_refused() -> None:
    tensors = Mesh.of({"data": 1, "tensor": 8})
    named = dist.init_device_mesh("cpu", (2, 4), mesh_dim_names=("data", "tensor"))
    with pytest.raises(TpcError, match="the program is for tensor 8, the device mesh is data 2 × tensor 4"):
        ranks_of(named, tensors)
    with pytest.raises(TpcError, match="the program is for data 4, the device mesh is data 2 × tensor 4"):
        ranks_of(named, Mesh.of({"data": 4, "tensor": 4}))
    with pytest.raises(TpcError, match="dp 1 × tp 8 has no dimension 'tensor'"):
        ranks_of(dist.init_device_mesh("cpu", (1, 8), mesh_dim_names=("dp", "tp")), tensors)
    with pytest.raises(TpcError, match="no mesh_dim_names"):
        ranks_of(dist.init_device_mesh("cpu", (8,)), tensors)


def test_a_model_without_values_needs_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with torch.device("meta"):
        empty = GPT2(vocab=61, positions=16, hidden=24, heads=3, layers=1)
    with pytest.raises(TpcError, match=r"has no values \(device meta\)"):
        parallel(empty, 1)
    whole = GPT2(vocab=61, positions=16, hidden=24, heads=3, layers=1)
    with pytest.raises(TpcError, match=r"no h\.0\.mlp\.c_fc\.bias"):
        parallel(empty, 1, weights={k: v for k, v in whole.state_dict().items() if k != "h.0.mlp.c_fc.bias"})
    module = parallel(empty, 1, weights=whole.state_dict(), dtype=torch.bfloat16)
    assert all(torch.equal(p, whole.get_parameter(name).bfloat16()) for name, p in module.named_parameters())
    assert isinstance(ranks_of(None, Mesh.of({"tensor": 1})), Ranks)
