"""A captured graph is the model: its outputs, gradients, buffers and modes, at any size; weights take no memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.sample import sampled
from tests.zoo import ZOO
from tpcompiler.capture import capture, float64, record
from tpcompiler.errors import ModelError
from tpcompiler.execute.interpret import bind_inputs, interpret_capture
from tpcompiler.program import Capture, Training

aten = torch.ops.aten
MODELS = {name: name for name in ("gpt2", "bert", "llama", "encoder", "seq2seq")}
TINY = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
HUGGING_FACE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**TINY, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3ForCausalLM", {**TINY, "num_key_value_heads": 2, "head_dim": 8}),
    "olmo2": ("Olmo2ForCausalLM", {**TINY, "pad_token_id": 0}),
    "phi3": ("Phi3ForCausalLM", {**TINY, "num_key_value_heads": 2, "pad_token_id": 0}),
    "gemma2": ("Gemma2ForCausalLM", {**TINY, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}),
    "mixtral": (
        "MixtralForCausalLM",
        {**TINY, "num_key_value_heads": 2, "num_local_experts": 4, "experts_implementation": "batched_mm"},
    ),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}),
    "gpt_neox": ("GPTNeoXForCausalLM", TINY),
    "falcon": ("FalconForCausalLM", {k: v for k, v in TINY.items() if k != "intermediate_size"}),
    "opt": ("OPTForCausalLM", {**TINY, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 32}),
    "bert": ("BertForMaskedLM", TINY),
    "t5": (
        "T5ForConditionalGeneration",
        {**TINY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    ),
}


def state(model: nn.Module, captured: Capture) -> dict[str, Tensor]:
    """The model's own parameters, and the buffers' values as captured."""
    own = dict(model.named_parameters())
    return {p.name: own[p.name] if p.value is None else p.value for p in captured.parameters}


def tensors(out: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]


def assert_same(
    model: nn.Module, captured: Capture, args: tuple[Any, ...], kwargs: dict[str, Any], *, bound: float = 1e-5
) -> None:
    """Outputs, and the gradients of a random projection of them, agree; the largest of each sets the scale."""
    expected = tensors(model(*args, **kwargs))
    found = tensors(interpret_capture(captured, state(model, captured), bind_inputs(captured, *args, **kwargs)))
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert len(expected) == len(found)
    for a, b in zip(expected, found, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.requires_grad == b.requires_grad
        torch.testing.assert_close(a, b, rtol=bound, atol=bound * float(a.detach().abs().max() + 1e-3))
    gradients = []
    for outputs in (expected, found):
        generator = torch.Generator().manual_seed(1)
        live = [t for t in outputs if t.requires_grad]
        loss = torch.stack([(t * torch.rand(t.shape, generator=generator)).sum() for t in live]).sum()
        gradients.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    scale = max(float(g.abs().max()) for g in gradients[0] if g is not None)
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert float((a - b).abs().max()) <= bound * scale


@pytest.mark.parametrize("name", [*sampled(ZOO, 6), *MODELS])
def test_captured_graph_equals_the_model_at_other_sizes(name: str) -> None:
    module = import_module(f"tests.zoo.{name}" if name in ZOO else f"models.{name}")
    model = module.Model() if hasattr(module, "Model") else small(module)
    vocab = {} if name in ZOO else {"vocab": 64}
    captured = capture(model, module.example_inputs(**vocab))
    model.eval()
    for batch, sequence in ((2, 12), (3, 7)):
        assert_same(model, captured, (), module.example_inputs(batch=batch, sequence=sequence, **vocab))


def small(module: Any) -> nn.Module:
    cls = {"gpt2": "GPT2", "bert": "Bert", "llama": "Llama", "encoder": "Encoder", "seq2seq": "Seq2Seq"}
    build: Callable[..., nn.Module] = getattr(module, cls[module.__name__.rsplit(".")[-1]])
    return build(vocab=64, hidden=32, heads=4)


@pytest.mark.parametrize("name", sampled(HUGGING_FACE, 3))
def test_captured_graph_equals_the_hugging_face_model(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    cls, sizes = HUGGING_FACE[name]
    build = getattr(transformers, cls)
    model = build(build.config_class(**sizes, attn_implementation="eager" if name in ("t5", "gemma2") else "sdpa"))
    constant = {} if name == "bert" else {"use_cache": False}

    def inputs(batch: int, sequence: int) -> dict[str, Any]:
        ids = torch.randint(3, 50, (batch, sequence))
        return {"input_ids": ids, "labels": ids.clone(), **constant}

    captured = capture(model, inputs(2, 8))
    model.eval()
    for batch, sequence in ((2, 8), (3, 11)):
        assert_same(model, captured, (), inputs(batch, sequence))
    for p in captured.parameters:
        if p.buffer and p.name in dict(model.named_buffers()):
            assert p.value is not None
            torch.testing.assert_close(model.get_buffer(p.name), p.value, rtol=0, atol=0)


class Plain(nn.Module):
    """A tied, dropped-out model whose pieces the tests below look at."""

    def __init__(self, hidden: int = 8, p: float = 0.5) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, hidden)
        self.unused = nn.Parameter(torch.randn(3))
        self.register_buffer("slopes", torch.linspace(0.1, 1, hidden), persistent=False)
        self.scale = torch.tensor([2.0])
        self.inner = nn.Linear(hidden, hidden)
        self.drop = nn.Dropout(p)
        self.head = nn.Linear(hidden, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) * self.slopes * self.scale
        for _ in range(3):
            x = self.drop(self.inner(x))
        with torch.no_grad():
            x = x + self.inner(x)
        return self.head(x)


def test_parameters_stand_once_with_their_aliases_and_buffers_keep_their_values() -> None:
    captured = capture(Plain, (torch.zeros(2, 3, dtype=torch.long),))
    by_name = {p.name: p for p in captured.parameters}
    assert by_name["embed.weight"].aliases == ("head.weight",) and "head.weight" not in by_name
    assert "unused" in by_name and by_name["unused"].shape == (3,)
    assert by_name["slopes"].value is not None and by_name["scale"].value is not None
    assert torch.equal(by_name["slopes"].value, torch.linspace(0.1, 1, 8)) and by_name["scale"].value.tolist() == [2.0]
    assert by_name["slopes"].buffer and not by_name["slopes"].persistent
    placeholders = [n.name for n in captured.graph.nodes if n.op == "placeholder"]
    assert placeholders == [*(p.node for p in captured.parameters), *captured.inputs]


def test_no_grad_region_is_inlined_and_lets_no_gradient_through() -> None:
    model = Plain().eval()
    captured = capture(model, (torch.zeros(2, 3, dtype=torch.long),))
    assert not any(isinstance(n.target, torch._ops.HigherOrderOperator) for n in captured.graph.nodes)
    assert_same(model, captured, (torch.randint(20, (4, 5)),), {})


def test_a_module_called_again_has_the_next_call_number() -> None:
    captured = capture(Plain, (torch.zeros(2, 3, dtype=torch.long),))
    calls = [n.meta["stack"][-1] for n in captured.graph.nodes if n.target is aten.linear.default]
    assert [c for c in calls if c[0] == "inner"] == [("inner", "Linear", i) for i in range(4)]
    line = next(n.meta["line"] for n in captured.graph.nodes if n.target is aten.embedding.default)
    assert line[0] == __file__ and "self.embed(ids)" in line[2]


def test_dropout_follows_the_mode_and_zero_dropout_leaves() -> None:
    ids = torch.randint(20, (2, 3))
    captured = capture(Plain, (ids,))
    drops = [n.args for n in captured.graph.nodes if n.target is aten.dropout.default]
    assert [a[1:] for a in drops] == [(0.5, Training(True, False))] * 3
    without = capture(lambda: Plain(p=0.0), (ids,))
    assert not any(n.target is aten.dropout.default for n in without.graph.nodes)
    values = state(Plain(), captured)
    quiet = interpret_capture(captured, values, [ids], training=False)[0]
    loud = interpret_capture(captured, values, [ids], training=True)[0]
    assert not torch.allclose(quiet, loud)


def test_no_device_assertion_or_write_is_left_and_sizes_come_from_inputs() -> None:
    captured = capture(lambda: import_module("models.llama").Llama(), import_module("models.llama").example_inputs())
    for node in captured.graph.nodes:
        assert node.kwargs.get("device") is None
        if node.op == "call_function" and hasattr(node.target, "_schema"):
            assert not node.target._schema.is_mutable and "assert" not in str(node.target)
        if node.target is aten.sym_size.int:
            assert node.args[0].name in captured.inputs


def test_batch_one_and_batch_equal_to_sequence_stay_two_symbols() -> None:
    for shape in ((1, 6), (4, 4), (1, 1)):
        model = Plain().eval()
        captured = capture(model, (torch.zeros(shape, dtype=torch.long),))
        for other in ((1, 6), (3, 5)):
            assert_same(model, captured, (torch.randint(20, other),), {})


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor, *more: Tensor, scale: float = 1.0, **rest: Any) -> dict[str, Any]:
        return {"y": self.inner(x) * scale + sum(more) + rest["shift"]["by"][0], "none": None, "flag": rest["flag"]}


def test_arguments_and_results_keep_their_structure() -> None:
    def inputs(rows: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = torch.randn(rows, 4)
        return (x, x), {"shift": {"by": [torch.randn(rows, 4), 3]}, "flag": True, "scale": 2.0}

    model = Keywords()
    captured = capture(model, inputs(3))
    assert captured.arg_names == ("x", "more_0", "shift.by.0")
    args, kwargs = inputs(5)
    assert_same(model, captured, args, kwargs)
    flat = interpret_capture(captured, state(model, captured), bind_inputs(captured, *args, **kwargs))
    assert pytree.tree_unflatten(flat, captured.out_spec).keys() == {"y", "none", "flag"}


class Writer(nn.Module):
    """Writes in place to fresh tensors and to views of them, as one does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        first = y[:, 0]
        y[:, 1:3] = 2 * y[:, 3:5]
        y.mul_(2).add_(1)
        z = torch.zeros_like(y)
        z[..., 1] = first
        z.view(-1, 2, 3)[:, 1, 2] += y[:, 0]
        z.t()[0].copy_(y[:, 2])
        z[y > 1.5] = -3.0
        y, z = y.clone(), torch.nn.functional.relu(z, inplace=True)
        y[[0], [2, 1]] = 0.5
        return y.masked_fill_(y < 0, 0) + z + first[:, None]


def test_writes_to_fresh_tensors_and_their_views_become_values() -> None:
    model = Writer()
    captured = capture(model, (torch.randn(4, 6),))
    for rows in (4, 7):
        assert_same(model, captured, (torch.randn(rows, 6),), {})


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (lambda m, x: x.add_(1) + m.w, ("forward(self, x)", "writes into x")),
        (lambda m, x: x * m.seen.add_(1) * m.w, ("seen", "writes")),
        (lambda m, x: x * m.w if x.sum() > 0 else x, ("x.sum() > 0", "values of a tensor")),
        (lambda m, x: x @ torch.ones(5, 5) * m.w, ("torch.ones(5, 5)", "cannot be traced")),
        (lambda m, x: x.no_such_method(), ("no_such_method", "cannot be traced")),
    ],
)
def test_what_cannot_be_captured_is_told_in_one_line_with_the_models_own(forward: Any, words: tuple[str, ...]) -> None:
    class Bad(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(4))
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x)

    with pytest.raises(ModelError) as error:
        capture(Bad, (torch.randn(3, 4),))
    text = str(error.value)
    assert "\n" not in text and all(w in text for w in words), text


def test_the_users_own_instance_stays_as_it_is() -> None:
    model = Plain()
    model.inner.weight.grad = torch.ones_like(model.inner.weight)
    before = {n: (p, p.detach().clone(), p.data_ptr()) for n, p in model.named_parameters()}
    model.eval()
    captured = capture(model, (torch.zeros(2, 3, dtype=torch.long),))
    for name, p in model.named_parameters():
        same, value, address = before[name]
        assert p is same and torch.equal(p, value) and p.data_ptr() == address
    assert not model.training and not model.drop.training and model.scale.device.type == "cpu"
    assert captured.parameters[0].shape == (3,)
    recorded = record(model)
    assert all(torch.equal(recorded.replay(n), p) for n, p in model.named_parameters())


class Initialised(nn.Module):
    """Every way to initialise that a constructor may take."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.factory = nn.Parameter(torch.randn(64, 64) * 0.02 + 1)
        self.linear = nn.Linear(64, 64)
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
        self.orthogonal = nn.Parameter(nn.init.orthogonal_(torch.empty(16, 16)))
        self.bare = nn.Parameter(torch.empty(32, 32))
        with torch.no_grad():
            self.bare.uniform_(-1, 1)[3].zero_()
            self.bare.data[:, 5] = 7.0
            self.linear.weight /= 4
        both = torch.randn(2, 9)
        self.one, self.two = nn.Parameter(both[0]), nn.Parameter(both[1].clone())
        self.copied = nn.Parameter(self.one.detach().clone())
        self.cast = nn.Parameter(torch.randn(5).to(torch.bfloat16))
        self.literal = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.rate = [float(r) for r in torch.linspace(0, 0.5, 3)]
        self.register_buffer("mask", torch.ones(5, 5).tril().bool())
        assert self.mask.sum() == 15 and self.mask[0].nonzero().tolist() == [[0]]


def test_replayed_values_depend_on_seed_and_name_alone_and_are_the_constructors() -> None:
    recorded, again = record(Initialised), record(Initialised)
    names = [n for n, _ in recorded.model.named_parameters()]
    for name in reversed(names):
        value = recorded.replay(name, seed=3)
        assert (
            torch.equal(value, again.replay(name, seed=3)) and value.shape == recorded.model.get_parameter(name).shape
        )
    factory, bare = recorded.replay("factory", 3), recorded.replay("bare", 3)
    assert abs(float(factory.mean()) - 1) < 0.01 and 0.018 < float(factory.std()) < 0.022
    assert not torch.equal(factory, recorded.replay("factory", 4))
    assert bool((bare[3, :5] == 0).all()) and bool((bare[:, 5] == 7).all()) and float(bare[:3, :5].abs().max()) <= 1
    assert float(recorded.replay("linear.weight").abs().max()) <= 0.125 / 4
    q = recorded.replay("orthogonal")
    torch.testing.assert_close(q @ q.t(), torch.eye(16), rtol=0, atol=1e-5)
    assert recorded.replay("cast").dtype is torch.bfloat16 and recorded.replay("literal").tolist() == [1.0, 2.0]
    assert torch.equal(recorded.replay("one"), recorded.replay("copied"))
    assert not torch.equal(recorded.replay("one"), recorded.replay("two"))
    first, second = (recorded.replay(f"layers.layers.{i}.linear1.weight") for i in (0, 1))
    assert torch.equal(first, second)  # deep copies of one layer, as torch makes them
    assert recorded.model.rate == [0.0, 0.25, 0.5]


def test_neither_building_nor_capturing_allocates_the_parameters() -> None:
    class Huge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(200_000, 100_000) * 0.02)  # 80 GB, three times over in the constructor
            self.register_buffer("table", torch.arange(100_000.0))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.w) + 1

    tracemalloc.start()
    captured = capture(Huge, (torch.randn(2, 100_000),))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6
    assert captured.parameters[0].bytes == 80_000_000_000
    assert captured.parameters[1].value is not None and float(captured.parameters[1].value[-1]) == 99_999.0


class Masked(nn.Module):
    """Attention with a mask made of sizes alone."""

    window: Tensor

    def __init__(self, make: Callable[[int, int], Tensor] | None) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.make = make
        self.register_buffer("window", torch.ones(64, 64).tril() - torch.ones(64, 64).tril(-40))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k = (self.q(t).unflatten(-1, (2, 4)).transpose(1, 2) for t in (x, y))
        mask = self.make(x.shape[1], y.shape[1]) if self.make else self.window[: x.shape[1], : y.shape[1]].bool()
        return F.scaled_dot_product_attention(q, k, k, attn_mask=mask).transpose(1, 2).flatten(2)


def _back(rows: int, columns: int) -> Tensor:
    return torch.arange(rows)[:, None] - torch.arange(columns)[None]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda r, c: _back(r, c) >= 0, "causal"),
        (lambda r, c: torch.full((r, c), float("-inf")).triu(1), "causal"),
        (lambda r, c: torch.full((r, c), torch.finfo(torch.float32).min).triu(1)[None, None], "causal"),
        (lambda r, c: torch.ones(r, c, dtype=torch.bool), "full"),
        (lambda r, c: (_back(r, c) >= 0) & (_back(r, c) < 7), None),
        (lambda r, c: (_back(r, c) >= 0) & (_back(r, c) < 4096), None),
        (lambda r, c: _back(r, c) + c - r >= 0, None),  # the last row sees all: causal only when square
        (lambda r, c: torch.full((r, c), -1.0).triu(1), None),
        (None, None),  # a window of 40 in a buffer of 64
    ],
)
def test_causal_mask_is_recovered_only_where_it_is_one(make: Any, expected: str | None) -> None:
    model = Masked(make)
    captured = capture(model, (torch.randn(2, 5, 8), torch.randn(2, 6, 8)))
    node = next(n for n in captured.graph.nodes if n.target is aten.scaled_dot_product_attention.default)
    found = "causal" if node.args[5] else "full" if node.args[3] is None else None
    assert found == expected
    assert_same(model, captured, (torch.randn(2, 9, 8), torch.randn(2, 7, 8)), {})
    assert_same(model, captured, (torch.randn(2, 7, 8), torch.randn(2, 9, 8)), {})


class Casts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.register_buffer("table", torch.linspace(0, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x).to(torch.bfloat16).float() + torch.zeros(8, device=x.device) + self.table
        return torch.softmax(y.half(), dim=-1, dtype=torch.float32) + torch.arange(8, device=x.device) / 3


def test_float64_leaves_no_lower_precision_behind() -> None:
    captured = capture(Casts, (torch.randn(4, 8),))
    precise = float64(captured)
    model = Casts().double()
    x = torch.randn(3, 8, dtype=torch.float64)
    out = interpret_capture(precise, state(model, precise), [x])[0]
    y = model.inner(x) + model.table
    expected = torch.softmax(y, -1) + torch.arange(8, dtype=torch.float64) / 3
    assert out.dtype is torch.float64
    torch.testing.assert_close(out, expected, rtol=1e-14, atol=1e-14)
    low = [n for n in precise.graph.nodes if isinstance(n.meta["val"], Tensor) and n.meta["val"].is_floating_point()]
    assert all(n.meta["val"].dtype is torch.float64 for n in low)
    assert any(n.meta["val"].dtype is torch.bfloat16 for n in captured.graph.nodes if isinstance(n.meta["val"], Tensor))
