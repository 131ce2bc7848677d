"""Whole compilations: plans, counts of collectives, and every rank against the plain model."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tpcompiler as tpc
from models import gpt2, llama
from tests.sample import sampled
from tests.zoo import ZOO
from tpcompiler.errors import SpecError, TpcError
from tpcompiler.graphs import layout_of
from tpcompiler.verification.verify import Report

SMALL: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab": 129, "positions": 32, "hidden": 48, "heads": 8, "layers": 2},
    "llama": {"vocab": 129, "hidden": 64, "heads": 8, "kv_heads": 4, "layers": 2, "intermediate": 37},
    "bert": {"vocab": 130, "hidden": 48, "heads": 8, "layers": 2},
    "encoder": {"vocab": 130, "hidden": 48, "heads": 8, "layers": 2},
    "seq2seq": {"vocab": 130, "hidden": 48, "heads": 8, "layers": 2},
}


def small(name: str, **changes: Any) -> tuple[Any, Any]:
    module = importlib.import_module(f"models.{name}")
    sizes = {**SMALL[name], **changes}
    return (lambda: module.Model(**sizes)), module.example_inputs(vocab=sizes["vocab"])


def assert_verified(report: Report) -> None:
    assert report.passed, str(report)


@pytest.mark.parametrize(
    ("name", "degree"),
    [
        *(pytest.param(name, 4, marks=pytest.mark.nightly) for name in SMALL),
        *(pytest.param(name, 8, marks=pytest.mark.nightly) for name in ("bert", "encoder")),
        *(pytest.param(name, 2, marks=pytest.mark.nightly) for name in ("bert", "encoder", "seq2seq")),
        *((name, 2) for name in ("gpt2", "llama")),
        *((name, 8) for name in ("gpt2", "llama", "seq2seq")),  # more ranks than kv heads; two stacks
    ],
)
def test_models_are_equal_on_all_ranks(name: str, degree: int) -> None:
    build, inputs = small(name)
    report = tpc.verify(build, inputs, {"mesh": {"tensor": degree}})
    assert_verified(report)
    assert report.max_rel_error < 1e-10 or report.cases[0].max_rel_error == report.max_rel_error
    assert report.sharded_fraction > 0.9


@pytest.mark.parametrize("name", sampled(ZOO, 5))
def test_models_of_any_habit_go_through_unedited(name: str) -> None:
    module = importlib.import_module(f"tests.zoo.{name}")
    report = tpc.verify(module.Model, module.example_inputs(), {"mesh": {"tensor": 3 if len(name) % 2 else 2}})
    assert_verified(report)


def test_gpt2_has_two_all_reduces_a_layer_each_way() -> None:
    for layers in (1, 3):
        build, inputs = small("gpt2", layers=layers)
        sharded = tpc.shard(build, inputs, {"mesh": {"tensor": 4}})
        kinds = [(c.kind, c.direction) for c in sharded.program.collectives]
        assert kinds.count(("all_reduce", "forward")) == 2 * layers + 1, "layers, embedding"
        assert kinds.count(("all_gather", "forward")) == 1, "loss"
        assert kinds.count(("all_reduce", "backward")) == 2 * layers + 1, "layers, head"
        assert len(kinds) == 4 * layers + 3


def test_parallel_blocks_have_one_all_reduce_a_layer() -> None:
    module = importlib.import_module("tests.zoo.parallel_block")
    sharded = tpc.shard(module.Model, module.example_inputs(), {"mesh": {"tensor": 2}})
    layers = max(b.layers for b in sharded.plan.blocks)
    wide = [c for c in sharded.program.collectives if len(c.shape) == 3]
    assert sum(c.direction == "forward" for c in wide) == layers + 1
    assert sum(c.direction == "backward" for c in wide) == layers + 1


@settings(max_examples=4)
@given(
    st.sampled_from([(5, 1), (5, 5), (6, 1), (6, 2), (6, 3), (12, 1), (12, 2), (12, 3), (12, 12)]),
    st.sampled_from([2, 3, 4, 5, 8]),
    st.booleans(),
)
def test_no_divisibility_rule(heads: tuple[int, int], degree: int, gpt: bool) -> None:
    check_divisibility(heads, degree, gpt)


@pytest.mark.nightly
@pytest.mark.timeout(0)
@settings(max_examples=300)
@given(
    st.sampled_from([(5, 1), (5, 5), (6, 1), (6, 2), (6, 3), (12, 1), (12, 2), (12, 3), (6, 6), (12, 12)]),
    st.sampled_from([2, 3, 4, 5, 8]),
    st.booleans(),
    st.sampled_from([37, 40, 96]),
    st.sampled_from([128, 129, 130]),
    st.integers(1, 2),
)
def test_no_divisibility_rule_nightly(
    heads: tuple[int, int], degree: int, gpt: bool, ff: int, vocab: int, layers: int
) -> None:
    check_divisibility(heads, degree, gpt, ff, vocab, layers)


def check_divisibility(
    heads: tuple[int, int], degree: int, gpt: bool, ff: int = 37, vocab: int = 129, layers: int = 1
) -> None:
    h, kv = heads
    sizes = {"vocab": vocab, "positions": 32, "hidden": 4 * h, "heads": h, "layers": layers}

    def build() -> nn.Module:
        return gpt2.Model(**sizes) if gpt else llama.Model(**sizes, kv_heads=kv, intermediate=ff)

    inputs = (gpt2 if gpt else llama).example_inputs(vocab=vocab)
    if degree > h:
        with pytest.raises(TpcError, match=f"{h}"):
            tpc.shard(build, inputs, {"mesh": {"tensor": degree}, "shard": {"attention": "shard"}})
        return
    report = tpc.verify(build, inputs, {"mesh": {"tensor": degree}, "shard": {"attention": "shard"}})
    assert_verified(report)


# -- what a spec says -------------------------------------------------------------------------------------------------


def kinds(spec: dict[str, Any]) -> set[str]:
    build, inputs = small("gpt2")
    return {b.kind for b in tpc.shard(build, inputs, spec).plan.blocks}


def test_kinds_of_block_can_be_replicated() -> None:
    mesh = {"tensor": 2}
    assert kinds({"mesh": mesh}) == {"embedding", "attention", "mlp", "head"}
    assert kinds({"mesh": mesh, "shard": {"mlp": "replicate"}}) == {"embedding", "attention", "head"}
    assert kinds({"mesh": mesh, "shard": {"head": "replicate"}}) == {"attention", "mlp"}, "tied: both ends or none"


def test_overrides_go_by_name() -> None:
    build, inputs = small("gpt2")
    spec = {"mesh": {"tensor": 2}, "override": [{"match": "h.0.mlp", "as": "replicate"}]}
    program = tpc.shard(build, inputs, spec).program
    assert not any(d.over for d in program.dims["h.0.mlp.c_fc.weight"])
    assert any(d.over for d in program.dims["h.1.mlp.c_fc.weight"])


def test_an_axis_can_be_named_outright() -> None:
    build, inputs = small("gpt2")
    spec = {"mesh": {"tensor": 2}, "axes": [{"parameter": "wpe.weight", "dimension": 0}]}
    program = tpc.shard(build, inputs, spec).program
    assert program.dims["wpe.weight"][0].over == ("tensor",)
    assert_verified(tpc.verify(build, inputs, spec))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"mesh": {"tensor": 16}, "shard": {"attention": "shard"}}, ["shard.attention", "16", "8"]),
        ({"mesh": {"tensor": 2}, "override": [{"match": "nothing.*", "as": "replicate"}]}, ["override", "nothing.*"]),
        ({"mesh": {"tensor": 2}, "axes": [{"parameter": "nothing", "dimension": 0}]}, ["axes", "nothing"]),
        ({"mesh": {"tensor": 2}, "axes": [{"parameter": "ln_f.weight", "dimension": 3}]}, ["ln_f.weight", "3"]),
        ({"mesh": {"tensor": 4096}}, ["4096", "nothing"]),
    ],
)
def test_what_cannot_be_had_is_one_line(spec: dict[str, Any], words: list[str]) -> None:
    build, inputs = small("gpt2")
    with pytest.raises(TpcError) as e:
        tpc.shard(build, inputs, spec)
    text = str(e.value)
    assert "\n" not in text and all(w in text for w in words), text


def test_outputs_may_be_left_sharded() -> None:
    module = importlib.import_module("models.gpt2")
    sizes = SMALL["gpt2"]
    inputs = {"input_ids": module.example_inputs(vocab=sizes["vocab"])["input_ids"]}
    build = lambda: module.Model(**sizes)  # noqa: E731
    gathered = tpc.shard(build, inputs, {"mesh": {"tensor": 2}}).program
    assert [c.kind for c in gathered.collectives].count("all_gather") == 1
    left = tpc.shard(build, inputs, {"mesh": {"tensor": 2}, "outputs": "shard"}).program
    assert "all_gather" not in [c.kind for c in left.collectives]
    assert_verified(tpc.verify(build, inputs, {"mesh": {"tensor": 2}}))


def test_outputs_go_by_name_too() -> None:
    class Named(gpt2.Model):
        def forward(self, input_ids: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            logits = super().forward(input_ids)
            return {"logits": logits, "scores": logits * 2}

    def left(outputs: dict[str, str]) -> list[bool]:
        """Which outputs come out sharded."""
        inputs = {"input_ids": gpt2.example_inputs(vocab=SMALL["gpt2"]["vocab"])["input_ids"]}
        spec = {"mesh": {"tensor": 2}, "outputs": outputs}
        graph = tpc.shard(lambda: Named(**SMALL["gpt2"]), inputs, spec).program.graph
        (output,) = graph.find_nodes(op="output")
        return [any(d.over for d in layout_of(x)) for x in output.args[0]]

    assert left({"logits": "shard"}) == left({"0": "shard"}) == [True, False]
    assert left({"*": "shard", "logits": "gather"}) == [False, True]


def test_every_rank_compiles_the_same_program() -> None:
    module = importlib.import_module("tests.zoo.qkv_neox")
    sources = {tpc.shard(module.Model, module.example_inputs(), {"mesh": {"tensor": 2}}).source for _ in range(4)}
    assert len(sources) == 1


def test_one_rank_is_the_plain_model() -> None:
    build, inputs = small("gpt2")
    sharded = tpc.shard(build, inputs, {"mesh": {"tensor": 1}})
    assert not sharded.program.collectives and not sharded.plan.split


def test_a_spec_error_names_its_file(tmp_path: Any) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("mesh: {tensor: 2}\noverride:\n  - match: no.such\n    as: replicate\n")
    build, inputs = small("gpt2")
    with pytest.raises(SpecError, match=r"s\.yaml:3: override"):
        tpc.shard(build, inputs, path)
