"""The plain models: they learn, they can be traced with batch and sequence left open, and they know nothing of us."""

from __future__ import annotations

import ast
import importlib
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from tests.sample import sampled
from tests.zoo import ZOO

MODELS = Path(__file__).parents[2] / "models"
ZOO_FILES = sorted((Path(__file__).parents[1] / "zoo").glob("*.py"))
NAMES = sorted(path.stem for path in MODELS.glob("*.py"))
SMALL = {"vocab": 120, "hidden": 24, "heads": 4, "layers": 2}


def load(name: str) -> ModuleType:
    return importlib.import_module(f"models.{name}")


def build(name: str, batch: int = 3, sequence: int = 10) -> tuple[nn.Module, dict[str, Tensor]]:
    """A small model and inputs, `name` of models/ or of the zoo, on torch's default device."""
    if name in ZOO:
        return ZOO[name](batch=batch, sequence=sequence)
    module = load(name)
    return module.Model(**SMALL), module.example_inputs(batch=batch, sequence=sequence, vocab=SMALL["vocab"])


def loss_of(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def export(model: nn.Module, inputs: dict[str, Tensor]) -> torch.export.ExportedProgram:
    auto = torch.export.Dim.AUTO
    shapes = {name: dict.fromkeys(range(x.dim()), auto) for name, x in inputs.items()}
    return torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)


def input_sizes(program: torch.export.ExportedProgram, inputs: dict[str, Tensor]) -> list[int | torch.SymInt]:
    """The sizes of all inputs as the trace has them: symbols where they are left open."""
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs]
    assert len(placeholders) == len(inputs)
    return [size for node in placeholders for size in node.meta["val"].shape]


def silence_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0  # type: ignore[assignment]


@pytest.mark.parametrize("name", NAMES + sampled(ZOO, 3))
def test_model_learns_and_every_parameter_takes_part(name: str) -> None:
    model, inputs = build(name)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(12):
        loss = loss_of(model(**inputs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < 0.95 * losses[0]
    idle = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not idle


@pytest.mark.parametrize("name", NAMES + sampled(ZOO, 6))
def test_model_is_built_and_runs_on_meta(name: str) -> None:
    with torch.device("meta"):
        model, inputs = build(name)
    assert all(x.is_meta for x in [*model.parameters(), *inputs.values()])
    assert loss_of(model.train()(**inputs)).shape == ()


@pytest.mark.parametrize("name", NAMES)
def test_model_is_traced_without_weights(name: str) -> None:
    with torch.device("meta"):
        model, inputs = build(name)
    assert all(isinstance(size, torch.SymInt) for size in input_sizes(export(model.train(), inputs), inputs))


@pytest.mark.parametrize("name", NAMES + sampled(ZOO, 6))
def test_traced_model_computes_what_the_model_does_at_other_sizes(name: str) -> None:
    model, inputs = build(name)
    silence_dropout(model)
    program = export(model.train(), inputs)
    assert sum(isinstance(size, torch.SymInt) for size in input_sizes(program, inputs)) >= 2
    other = build(name, batch=5, sequence=7)[1]
    torch.testing.assert_close(program.module()(**other), model(**other))


@pytest.mark.parametrize("name", NAMES + sorted(ZOO))
def test_example_inputs_are_distinct_tensors_and_follow_the_seed(name: str) -> None:
    first: list[Tensor] = []
    second: list[Tensor] = []
    for draws in (first, second):
        torch.manual_seed(7)
        draws.extend(build(name)[1].values())
    assert len({x.untyped_storage().data_ptr() for x in first}) == len(first)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("path", [*MODELS.glob("*.py"), *ZOO_FILES], ids=lambda path: path.stem)
def test_plain_models_import_no_parallel_code(path: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module or "")
    assert not [name for name in imported if name.startswith(("tpcompiler", "torch.distributed"))]


def test_gpt2_starts_as_the_paper_says() -> None:
    model = load("gpt2").GPT2(vocab=2000, hidden=192, heads=4, layers=8)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.dim() == 2:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name


@pytest.mark.parametrize(
    ("hidden", "heads", "layers", "billions"),
    [(1536, 16, 40, 1.2), (1920, 20, 54, 2.5), (2304, 24, 64, 4.2), (3072, 32, 72, 8.3)],
)
def test_gpt2_has_the_papers_parameter_counts(hidden: int, heads: int, layers: int, billions: float) -> None:
    with torch.device("meta"):
        model = load("gpt2").GPT2(hidden=hidden, heads=heads, layers=layers)
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 1) == billions
