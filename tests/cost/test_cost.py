"""The cost model: laws that hold at any size, and descriptions of machines."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from models.gpt2 import GPT2, example_inputs
from models.llama import Llama
from models.llama import example_inputs as llama_inputs
from tpcompiler.api import Sharded, shard
from tpcompiler.cost.predict import CostModel, ParallelLayout
from tpcompiler.errors import SpecError
from tpcompiler.spec.machine import Hardware, known_machines
from tpcompiler.spec.schema import Spec
from tpcompiler.train.step.flops import forward_flops

BATCH, SEQUENCE = 2, 16


@cache
def compiled(tensor: int, overlap: bool = True, llama: bool = False) -> Sharded:
    spec = {"mesh": {"tensor": tensor}, "overlap": overlap}
    if llama:
        return shard(Llama, llama_inputs(BATCH, SEQUENCE), spec)
    return shard(lambda: GPT2(vocab=96, hidden=96, heads=12, layers=3), example_inputs(BATCH, SEQUENCE, vocab=96), spec)


def model(made: Sharded) -> CostModel:
    return CostModel(made.program, made.plan)


def machine(name: str = "h200") -> Hardware:
    return Spec.load({"mesh": {"tensor": 1}, "hardware": name}).hardware


def layout(tensor: int = 1, **changes: object) -> ParallelLayout:
    return ParallelLayout(
        **{"tensor": tensor, "data": 1, "micro": BATCH, "recompute": "none", "overlap": False, **changes}
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("tensor", [1, 3, 4, 5])
def test_a_program_of_two_ranks_predicts_every_degree_as_one_compiled_for_it(tensor: int) -> None:
    for recompute in ("none", "attention", "layer"):
        wanted = layout(tensor, recompute=recompute, overlap=tensor > 1)
        two, own = (model(compiled(n)).predict(wanted, machine(), BATCH, SEQUENCE) for n in (2, tensor))
        assert own.memory == two.memory
        if tensor > 1:  # one rank's program has no collectives to leave out, and fuses across them
            assert two == own


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("llama", [False, True])
def test_the_ranks_flops_add_up_to_the_models(tensor: int, llama: bool) -> None:
    made = compiled(2, llama=llama)
    p = model(made).predict(layout(tensor), machine(), BATCH, SEQUENCE)
    nodes = {n.name: n for n in made.capture.graph.find_nodes(op="placeholder")}
    shapes = {n: (BATCH, SEQUENCE) for n in made.capture.inputs if len(nodes[n].meta["val"].shape) == 2}
    assert p.tflops * 1e12 * p.seconds * tensor == pytest.approx(3 * forward_flops(made.capture.graph, shapes))


@pytest.mark.parametrize("tensor", [2, 3])
def test_what_is_communicated_is_what_the_program_lists(tensor: int) -> None:
    """In 32 bits and without overlap nothing is cast: the bytes are those of the list."""
    listed = sum(c.bytes for c in compiled(tensor, overlap=False).program.collectives)
    p = model(compiled(2)).predict(layout(tensor), machine(), BATCH, SEQUENCE, width=4)
    assert p.communicated == listed


@pytest.mark.parametrize("tensor", [1, 2, 5])
def test_parameters_are_those_that_shard_reports(tensor: int) -> None:
    made = compiled(tensor)
    held, _ = model(made).parameters(made.program.mesh)
    assert held * 4 == made.memory["parameters"]


def test_a_step_is_the_sum_of_its_parts_and_micro_batches_repeat() -> None:
    m = model(compiled(2))
    for wanted in (layout(2), layout(2, recompute="layer"), layout(2, data=2), layout(2, data=2, whole=True)):
        p = m.predict(wanted, machine(), 8, SEQUENCE)
        assert p.seconds == pytest.approx(sum(p.parts.values()))
    one, four = (m.predict(layout(2), machine(), n, SEQUENCE) for n in (BATCH, 4 * BATCH))
    assert four.parts["forward"] == pytest.approx(4 * one.parts["forward"])
    assert four.communicated == 4 * one.communicated


def test_more_recomputation_costs_time_and_saves_memory() -> None:
    m = model(compiled(2))
    none, some, all_ = (
        m.predict(layout(2, recompute=r, micro=64), machine(), 64, 512) for r in ("none", "attention", "layer")
    )
    assert none.parts["again"] == 0 < some.parts["again"] < all_.parts["again"] <= all_.parts["forward"]
    assert none.memory.activations > some.memory.activations > all_.memory.activations > 0
    assert all_.communication > none.communication == some.communication


def test_overlap_hides_no_more_than_its_share_of_what_is_beside_it() -> None:
    m = model(compiled(2))
    exposed = []
    for hidden in (0.0, 0.5, 1.0):
        h = machine().model_copy(update={"hidden": hidden})
        exposed.append(m.predict(layout(2, overlap=True), h, BATCH, SEQUENCE).parts["exposed"])
    assert exposed[0] > exposed[1] > exposed[2] > 0


def test_a_faster_machine_is_never_slower() -> None:
    m, slow = model(compiled(2)), machine()
    base = m.predict(layout(2, data=2), slow, 8, SEQUENCE).seconds
    for key in ("peak_tflops", "bandwidth_gbps", "beta_gbps", "efficiency"):
        fast = slow.model_copy(update={key: getattr(slow, key) * 1.2})
        assert m.predict(layout(2, data=2), fast, 8, SEQUENCE).seconds <= base, key


def test_a_group_over_hosts_is_slower_than_one_in_a_host() -> None:
    m, near = model(compiled(2)), machine()
    far = near.model_copy(update={"host": 1})
    assert (
        m.predict(layout(2), far, BATCH, SEQUENCE).communication
        > m.predict(layout(2), near, BATCH, SEQUENCE).communication
    )


# -- descriptions of machines -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", known_machines())
def test_every_machine_says_which_of_its_keys_are_known(name: str) -> None:
    h = machine(name)
    assert {*h.measured, *h.fitted} <= set(Hardware.model_fields)
    assert h.base == name
    spec = Spec.load({"mesh": {"tensor": 2}, "hardware": name})
    assert Spec.load(spec.dump()) == spec


def test_a_machine_from_a_file_and_single_keys_over_another(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base: a100\nmemory_gib: 39.5\n")
    mine = machine(str(file))
    assert mine.memory_gib == 39.5
    assert mine.peak_tflops == machine("a100").peak_tflops
    text = f"mesh: {{tensor: 2}}\nhardware: {{base: {file}, beta_gbps: 100}}\n"
    assert Spec.parse(text).hardware.beta_gbps == 100
    assert Spec.parse(text).hardware.memory_gib == 39.5


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("h2000", "did you mean 'h200'"),
        ("nowhere.yaml", "no such file"),
        ("{base: h200, speed: 3}", "speed"),
        ("{base: h200, memory_gib: 0}", "more than 0"),
    ],
)
def test_what_is_wrong_with_hardware_is_one_line(given: str, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        Spec.parse(f"mesh: {{tensor: 2}}\nhardware: {given}\n", "s.yaml")
    assert said in str(caught.value)
    assert str(caught.value).startswith("s.yaml:2: hardware")
    assert "\n" not in str(caught.value)
