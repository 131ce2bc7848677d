"""The emitted program is the plain model: outputs, gradients, names; a class for each distinct layer."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.sample import sampled
from tests.zoo import ZOO
from tpcompiler.axes.infer import infer_axes
from tpcompiler.capture import capture
from tpcompiler.emit import emit, load_source
from tpcompiler.execute.simulate import run_ranks
from tpcompiler.partition import partition
from tpcompiler.plan import make_plan
from tpcompiler.program import Program
from tpcompiler.runtime import Mesh, Ranks
from tpcompiler.runtime.runs import take_rows
from tpcompiler.spec.schema import Spec

Made = tuple[nn.Module, dict[str, Tensor]]


def model_of(name: str) -> Callable[..., Made]:
    """A factory for `models/NAME.py` like those of the zoo."""

    def make(**sizes: int) -> Made:
        sys.path.insert(0, str(Path(__file__).parents[2]))
        try:
            module = importlib.import_module(f"models.{name}")
        finally:
            sys.path.pop(0)
        return module.Model(), module.example_inputs(**sizes)

    return make


MAKERS = {name: model_of(name) for name in ("gpt2", "bert", "llama", "encoder", "seq2seq")} | ZOO


def plain_program(model: nn.Module, example: Any) -> Program:
    """The program of one rank: the capture as it is."""
    captured = capture(model, example)
    return Program(captured.graph, Mesh(()), captured, {})


def built(program: Program, model: nn.Module, ranks: Ranks | None = None) -> nn.Module:
    """The emitted module on this rank with its slices of `model`'s weights."""
    ranks = ranks or Ranks.single()
    emitted = load_source(emit(program), f"emitted_{program.capture.model}").Model(ranks)
    mine = dict(emitted.named_parameters(remove_duplicate=False)) | dict(emitted.named_buffers(remove_duplicate=False))
    theirs = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for p in program.capture.parameters:
            value = p.value if p.buffer else theirs[p.name]
            assert value is not None
            for i, dim in enumerate(program.dims.get(p.name, ())):
                value = take_rows(value, i, dim.runs(program.mesh, ranks.coords))
            for name in p.names:
                mine[name].copy_(value)
    return emitted.to(next(model.parameters()).dtype)


def tensors(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def outcome(model: nn.Module, inputs: dict[str, Any], seed: int = 3) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, and gradients under every name, for random output gradients; dropout draws from `seed`."""
    model.zero_grad()
    torch.manual_seed(seed)
    outputs = tensors(model(**inputs))
    live = [t for t in outputs if t.requires_grad]
    mine = torch.Generator().manual_seed(seed)  # ranks are threads: they share the global one
    torch.autograd.backward(live, [torch.randn(t.shape, generator=mine, dtype=t.dtype) for t in live])
    named = model.named_parameters(remove_duplicate=False)
    return outputs, {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named}


def same(emitted: nn.Module, model: nn.Module, inputs: dict[str, Any], training: bool) -> None:
    (a, grads), (b, expected) = outcome(emitted.train(training), inputs), outcome(model.train(training), inputs)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert grads.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6 * scale, msg=name)


def assert_readable(text: str) -> None:
    """Only torch and the runtime are imported."""
    assert all(len(line) <= 120 and line == line.rstrip() for line in text.splitlines())
    assert "torch.ops" not in text
    tree = ast.parse(text)
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    imported = {n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in imports}
    assert imported <= {"__future__", "typing", "torch", "torch.nn.functional", "tpcompiler.runtime"}
    stored = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    assert not stored & {"torch", "F", "nn", "self", "Parameters", "Ranks", *dir(builtins)}


# --- one rank is the plain model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sampled(MAKERS, 3))
def test_one_rank_is_the_plain_model(name: str) -> None:
    """Outputs and gradients, dropout on (drawn in the same order) and off, at the traced sizes and at others.

    And its file is for readers: at most 120 columns, no bare ATen, no name overwritten that is needed.
    """
    model, example = MAKERS[name]()
    program = plain_program(model, example)
    assert_readable(emit(program))
    emitted = built(program, model)
    assert emitted.state_dict().keys() == model.state_dict().keys()
    assert sorted(n for n, _ in emitted.named_parameters()) == sorted(n for n, _ in model.named_parameters())
    same(emitted, model, example, training=True)
    same(emitted, model, example, training=False)
    same(emitted, model, MAKERS[name](batch=3, sequence=9)[1], training=True)


def test_the_same_model_gives_the_same_text() -> None:
    make = MAKERS["tied_bare"]
    program = plain_program(*make())
    assert emit(program) == emit(program) == emit(plain_program(*make()))


# --- classes and instances --------------------------------------------------------------------------------------------


def classes(text: str) -> dict[str, str]:
    """Docstrings by class, the root last."""
    return {n.name: ast.get_docstring(n) or "" for n in ast.parse(text).body if isinstance(n, ast.ClassDef)}


@pytest.mark.parametrize("layers", [12, pytest.param(72, marks=pytest.mark.nightly)])
def test_equal_layers_are_one_class_and_a_loop(layers: int) -> None:
    module = importlib.import_module("models.gpt2")
    model = module.GPT2(vocab=64, positions=16, hidden=16, heads=4, layers=layers)
    program = plain_program(model, module.example_inputs(sequence=12, vocab=64))
    begin = time.process_time()
    text = emit(program)
    assert time.process_time() - begin < 2
    found = classes(text)
    assert list(found) == ["Block", "Model"]
    assert f"{layers} alike" in found["Block"]
    assert "for block in self.h:" in text
    emitted = load_source(text, "emitted_alike").Model(Ranks.single())
    assert len(emitted.h) == layers and len({type(b) for b in emitted.h}) == 1


class Scaled(nn.Module):
    """Layers that differ in a number: the scale of their branch."""

    class Layer(nn.Module):
        def __init__(self, i: int) -> None:
            super().__init__()
            self.fc, self.proj, self.i = nn.Linear(8, 16), nn.Linear(16, 8), i

        def forward(self, x: Tensor) -> Tensor:
            h = F.gelu(self.fc(x)) * (0.5 + 0.25 * self.i)
            h = h.roll(self.i, -1)
            return x + self.proj(h).tanh() / (self.i + 1)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer(i) for i in range(5))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_numbers_that_differ_by_layer_are_arguments() -> None:
    model, example = Scaled(), {"x": torch.randn(2, 3, 8)}
    program = plain_program(model, example)
    assert list(classes(emit(program))) == ["Layer", "Model"]
    same(built(program, model), model, example, training=True)


class Bare(nn.Module):
    """No modules: parameters in lists, and by number."""

    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        self.up = nn.ParameterList(torch.randn(8, 16) * 0.3 for _ in range(layers))
        for i in range(layers):
            self.register_parameter(f"down{i}", nn.Parameter(torch.randn(16, 8) * 0.3))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        residual = x * 2
        for i, up in enumerate(self.up):
            y = F.relu(self.norms[i](residual) @ up)
            residual, x = residual + y @ getattr(self, f"down{i}"), residual - x.sin()
        return x + residual


def test_parameters_in_lists_become_a_loop() -> None:
    model, example = Bare(), {"x": torch.randn(2, 3, 8)}
    program = plain_program(model, example)
    assert emit(program).count("F.relu") < 3
    same(built(program, model), model, example, training=True)


def test_a_module_called_often_is_one_instance() -> None:
    model, example = ZOO["shared_layer"]()
    text = emit(plain_program(model, example))
    assert classes(text).keys() == {"Layer", "Model"}
    assert text.count("Layer(ranks)") == 1


class Often(nn.Module):
    """One layer, again and again, with other numbers each time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Scaled.Layer(0)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(6):
            self.layer.i = i
            x = self.layer(x)
        return x


def test_numbers_that_differ_by_call_are_arguments_of_the_call() -> None:
    model, example = Often(), {"x": torch.randn(2, 3, 8)}
    program = plain_program(model, example)
    assert emit(program).count("self.layer") == 2  # made once, called in a loop
    same(built(program, model), model, example, training=True)


class Structured(nn.Module):
    """Inputs and outputs in containers, an input that is not given, and one that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(
        self, batch: dict[str, Tensor], pair: tuple[Tensor, Tensor], mask: Tensor | None = None, twice: bool = False
    ) -> dict[str, Any]:
        x = self.fc(batch["x"]) + pair[1]
        return {"sum": x, "parts": (x * 2, [pair[0] + 1])}


def test_structures_of_inputs_and_outputs_are_kept() -> None:
    model = Structured()
    tensors_ = {"batch": {"x": torch.randn(2, 8)}, "pair": (torch.randn(2, 8), torch.randn(2, 8))}
    example = tensors_ | {"mask": None, "twice": False}
    emitted = built(plain_program(model, example), model)
    got, want = emitted(**example), model(**example)
    assert pytree.tree_structure(got) == pytree.tree_structure(want)
    torch.testing.assert_close(got, want)
    with pytest.raises(AssertionError, match="traced with twice=False"):
        emitted(example["batch"], example["pair"], twice=True)


def test_tied_and_frozen_parameters_and_buffers_keep_what_they_are() -> None:
    model, example = MAKERS["gpt2"]()
    model.wpe.weight.requires_grad_(False)
    model.extra = nn.Linear(2, 2)  # unused
    model.again = nn.Module()
    model.again.weight = model.wte.weight
    model.register_buffer("kept", torch.arange(3.0))
    model.register_buffer("lost", torch.arange(3), persistent=False)
    emitted = built(plain_program(model, example), model)
    assert emitted.again.weight is emitted.wte.weight
    assert not emitted.wpe.weight.requires_grad and emitted.wte.weight.requires_grad
    assert emitted.state_dict().keys() == model.state_dict().keys()
    assert emitted.lost.dtype == torch.int64 and torch.equal(emitted.lost, torch.arange(3))


# --- many ranks -------------------------------------------------------------------------------------------------------


SPLITS = [("gpt2", 2), ("llama", 4), ("separate_heads", 3), ("multi_query", 2), ("bert", 3)]


@pytest.mark.parametrize(("name", "degree"), SPLITS)
def test_all_ranks_together_are_the_plain_model(name: str, degree: int) -> None:
    model, example = MAKERS[name]()
    captured = capture(model, example)
    axes, spec = infer_axes(captured), Spec.load({"mesh": {"tensor": degree}})
    program = partition(captured, axes, make_plan(captured, axes, spec), spec)
    model = model.double().eval()
    (loss, *_), expected = outcome(model, example)

    def on(ranks: Ranks) -> tuple[Tensor, dict[str, Tensor]]:
        outputs, gradients = outcome(built(program, model, ranks).double().eval(), example)
        return outputs[0], gradients

    results = run_ranks(program.mesh, on)
    scale = max(float(g.abs().max()) for g in expected.values())
    for rank, (got, gradients) in enumerate(results):
        torch.testing.assert_close(got, loss, rtol=1e-9, atol=1e-9)
        for p in captured.parameters:
            if not p.buffer:
                want = expected[p.name]
                for i, dim in enumerate(program.dims[p.name]):
                    want = take_rows(want, i, dim.runs(program.mesh, program.mesh.coords(rank)))
                torch.testing.assert_close(gradients[p.name], want, rtol=1e-8, atol=1e-9 * scale, msg=p.name)


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sampled(["gpt2", "llama", "separate_heads", "matmul"], 4))
def test_each_layer_compiles_as_one_graph(name: str) -> None:
    model, example = MAKERS[name]()
    emitted = built(plain_program(model, example), model).eval()
    torch._dynamo.reset()
    for child in emitted.modules():
        if child is not emitted and type(child).__module__.startswith("emitted_"):
            child.compile(fullgraph=True, backend="aot_eager")
    same(emitted, model, example, training=False)
    emitted.compile(fullgraph=True, backend="aot_eager")
    same(emitted, model, example, training=False)


# --- Hugging Face -----------------------------------------------------------------------------------------------------

SMALL = {"num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("LlamaForCausalLM", SMALL | {"num_key_value_heads": 2}, 1),
    "gpt2": ("GPT2LMHeadModel", {"n_layer": 3, "n_head": 4, "vocab_size": 64, "n_embd": 32, "n_positions": 64}, 1),
    "bert": ("BertForMaskedLM", SMALL, 1),
    "albert": ("AlbertForMaskedLM", SMALL | {"embedding_size": 16}, 1),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "vocab_size": 64}
        | {"decoder_start_token_id": 0},
        4,  # the first encoder and decoder layers make the position bias of the others
    ),
}


@pytest.mark.parametrize("family", sampled(FAMILIES, 3))
def test_hugging_face_models_are_what_they_were(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    name, sizes, layers = FAMILIES[family]
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0))
    cache = {} if "Masked" in name else {"use_cache": False}

    def inputs(batch: int, sequence: int) -> dict[str, Any]:
        ids = torch.randint(3, 64, (batch, sequence))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone(), **cache}

    program = plain_program(model, inputs(2, 12))
    found = classes(emit(program))
    assert len([c for c, doc in found.items() if c != "Model" and doc]) == layers
    emitted = built(program, model)
    assert emitted.state_dict().keys() == model.state_dict().keys()
    for sizes_ in ((2, 12), (3, 7)):
        same(emitted, model, inputs(*sizes_), training=True)
    assert emitted(**inputs(2, 5)).logits.shape == (2, 5, 64)  # results have the model's fields


def test_tracebacks_show_the_emitted_line() -> None:
    model, example = MAKERS["gpt2"]()
    module = load_source(emit(plain_program(model, example)), "emitted_lines")
    assert "F.scaled_dot_product_attention" in inspect.getsource(module.Block.forward)


def test_what_several_layers_share_does_not_make_the_first_unlike_them() -> None:
    """The encoder's output enters once, for all decoder layers: before the first, not inside of it."""
    model, example = MAKERS["seq2seq"]()
    captured = capture(model, example)
    axes, spec = infer_axes(captured), Spec.load({"mesh": {"tensor": 2}})
    text = emit(partition(captured, axes, make_plan(captured, axes, spec), spec))
    assert classes(text).keys() == {"EncoderLayer", "DecoderLayer", "Model"}
    assert text.count("for layer in self.") == 2
