"""The spec: what it means, and that every wrong one is one line that names file, line and key."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from tpcompiler.errors import SpecError
from tpcompiler.spec.located import parse
from tpcompiler.spec.schema import KINDS, Section, ShardSpec, Spec, covers

SPECS = sorted((Path(__file__).parents[2] / "specs").glob("*.yaml"))

choices = st.sampled_from(["shard", "replicate"])
names = st.text("abch_*.", min_size=1, max_size=8)
specs = st.fixed_dictionaries(
    {"mesh": st.fixed_dictionaries({"tensor": st.integers(1, 64)}, optional={"data": st.integers(1, 64)})},
    optional={
        "model": st.dictionaries(names, st.integers() | st.booleans() | st.text(max_size=4), max_size=3),
        "inputs": st.dictionaries(names, st.integers(), max_size=3),
        "shard": st.fixed_dictionaries({}, optional=dict.fromkeys(KINDS, choices)),
        "override": st.lists(st.fixed_dictionaries({"match": names, "as": choices}), max_size=3),
        "axes": st.lists(
            st.fixed_dictionaries(
                {"parameter": names, "dimension": st.integers(-2, 2)},
                optional={"as": choices, "factor": st.integers(0, 3) | names},
            ),
            max_size=3,
        ),
        "outputs": st.sampled_from(["gather", "shard"])
        | st.dictionaries(names, st.sampled_from(["gather", "shard"]), max_size=2),
        "uneven": st.sampled_from(["allow", "warn", "error"]),
        "allow_empty": st.booleans(),
        "seed": st.integers(0, 2**63 - 1),
        "hardware": st.fixed_dictionaries(
            {}, optional={"memory_gib": st.floats(1, 1000), "alpha_us": st.integers(0, 9)}
        ),
    },
)


@given(specs)
def test_dump_and_load_give_the_same_spec(value: dict[str, Any]) -> None:
    spec = Spec.load(value)
    again = Spec.load(json.loads(json.dumps(spec.dump())))
    assert again == spec
    assert again.explicit == spec.explicit


@given(specs)
def test_a_file_means_what_its_dictionary_means(value: dict[str, Any]) -> None:
    assert Spec.parse(yaml.safe_dump(value, allow_unicode=True)) == Spec.load(value)


@given(specs)
def test_explicit_kinds_are_those_written_as_shard(value: dict[str, Any]) -> None:
    spec = Spec.load(value)
    assert spec.explicit == {k for k, v in value.get("shard", {}).items() if v == "shard"}


@given(st.integers(1, 9), st.integers(1, 9))
def test_data_is_the_outer_mesh_dimension(tensor: int, data: int) -> None:
    ranks = Spec.load({"mesh": {"tensor": tensor, "data": data}}).ranks
    assert ranks.size == tensor * data
    assert ranks.group(("tensor",), 0) == tuple(range(tensor))


def test_the_least_spec() -> None:
    spec = Spec.load({"mesh": {"tensor": 2}})
    assert spec.mesh.data == 1
    assert spec.output("logits", "0") == "gather"
    assert not spec.explicit
    assert Spec.load(spec) is spec


def test_a_spec_does_not_change() -> None:
    spec = Spec.load({"mesh": {"tensor": 2}})
    with pytest.raises(Exception, match="frozen"):
        spec.seed = 1
    with pytest.raises(Exception, match="frozen"):
        spec.mesh.tensor = 3


@pytest.mark.parametrize("path", SPECS, ids=lambda p: p.name)
def test_specs_of_the_repository_are_valid(path: Path) -> None:
    spec = Spec.load(path)
    way = re.match(r"(\d+)way", path.name)
    assert way is None or spec.mesh.tensor == int(way[1])


def test_the_paper_s_sizes() -> None:
    """Parameters of table 1 of the paper (1.2, 2.5, 4.2, 8.3 billion), head size 96."""
    for size in (1.2, 2.5, 4.2, 8.3):
        m = Spec.load(SPECS[0].parent / f"gpt2-{size}b.yaml").model
        assert m["hidden"] == 96 * m["heads"]
        count = 12 * m["layers"] * m["hidden"] ** 2 + (m["vocab"] + m["positions"]) * m["hidden"]
        assert abs(count / 1e9 - size) < 0.06


@pytest.mark.parametrize(
    ("outputs", "names", "expected"),
    [
        ("shard", ("anything",), "shard"),
        ({"logits": "shard"}, ("logits",), "shard"),
        ({"logits": "shard"}, ("loss",), "gather"),
        ({"*": "shard", "loss": "gather"}, ("loss", "0"), "gather"),
        ({0: "shard"}, ("logits", "0"), "shard"),
        ({"loss": "gather", "*": "shard"}, ("loss",), "shard"),
    ],
)
def test_outputs_by_name_and_position(outputs: Any, names: tuple[str, ...], expected: str) -> None:
    assert Spec.load({"mesh": {"tensor": 2}, "outputs": outputs}).output(*names) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("3", 3),
        ("51_200", 51200),
        ("0x10", 16),
        ("on", "on"),
        ("no", "no"),
        ("12:30", "12:30"),
        ("true", True),
    ]
    + [
        ("~", None),
        ("2026-01-01", "2026-01-01"),
        (".5", 0.5),
        ("1.", 1.0),
        ("-2", -2),
        ("'3'", "3"),
        ("[1, a]", [1, "a"]),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    read = parse(f"a: {text}", "f")[0]["a"]
    assert read == value
    assert type(read) is type(value)


HEAD = "mesh: {tensor: 2}\n"
BAD = [  # text, line, key, words of the message
    ("mesh: {tensor: 0}", 1, "mesh.tensor", "at least 1"),
    ("mesh:\n  tensor: -3", 2, "mesh.tensor", "at least 1"),
    ("mesh:\n  tensor: '2'", 2, "mesh.tensor", "not an integer"),
    ("mesh:\n  tensor: 2.5", 2, "mesh.tensor", "not an integer"),
    ("mesh:\n  tensor: true", 2, "mesh.tensor", "not an integer"),
    ("mesh:\n  tensor:", 2, "mesh.tensor", "has no value"),
    ("mesh:\n  data: 2", 1, "mesh.tensor", "is missing"),
    ("seed: 3", 1, "mesh", "is missing"),
    ("mesh:\n  tensr: 2", 2, "mesh.tensr", "did you mean 'tensor'"),
    ("mesh: {tensor: 2}\nmodels: {}", 2, "models", "did you mean 'model'"),
    ("mesh: {tensor: 2}\nmesh: {tensor: 4}", 2, "mesh", "first in line 1"),
    ("mesh: 2", 1, "mesh", "not a mapping"),
    ("mesh: [2]", 1, "mesh", "not a mapping"),
    (HEAD + "shard: {mlp: maybe}", 2, "shard.mlp", "'shard' or 'replicate'"),
    (HEAD + "shard:\n  attention: shard\n  atention: shard", 4, "shard.atention", "did you mean 'attention'"),
    (HEAD + "shard:\n  mlp: yes", 3, "shard.mlp", "'yes' is not a choice"),
    (HEAD + "override: {h: shard}", 2, "override", "not a list"),
    (HEAD + "override:\n  - match: h\n", 3, "override[0].as", "is missing"),
    (HEAD + "override:\n  - {match: h, as: shard}\n  - match: ''\n    as: shard", 4, "override[1].match", "is empty"),
    (HEAD + "override:\n  - h.0", 3, "override[0]", "not a mapping"),
    (HEAD + "axes:\n  - parameter: w\n    dimension: one", 4, "axes[0].dimension", "not an integer"),
    (HEAD + "axes:\n  - parameter: w\n    dimension: 1\n    factor: [2]", 5, "axes[0].factor", "not an integer"),
    (HEAD + "outputs: whole", 2, "outputs", "'gather' or 'shard'"),
    (HEAD + "outputs:\n  logits: whole", 3, "outputs.logits", "'gather' or 'shard'"),
    (HEAD + "outputs: [gather]", 2, "outputs", "not a mapping"),
    (HEAD + "uneven: maybe", 2, "uneven", "'allow', 'warn' or 'error'"),
    (HEAD + "allow_empty: 1", 2, "allow_empty", "neither true nor false"),
    (HEAD + "seed: -1", 2, "seed", "at least 0"),
    (HEAD + "hardware:\n  alpha_us: .nan", 3, "hardware.alpha_us", "not a finite number"),
    (HEAD + "hardware:\n  memory_gib: 0", 3, "hardware.memory_gib", "more than 0"),
    (HEAD + "hardware:\n  memory_gib: much", 3, "hardware.memory_gib", "not a number"),
    (HEAD + "model: 3", 2, "model", "not a mapping"),
    (HEAD + "model:\n  a: 1\n  b:\n    c: 1\n    c: 2", 6, "model.b.c", "first in line 5"),
    (HEAD + "model: &m [*m]", 2, "model[0]", "contains itself"),
    (HEAD + "model: !!python/name:os.system x", 2, "model", "means nothing here"),
    (HEAD + "model:\n  n: " + "9" * 5000, 3, "model.n", "not a number"),
]


@pytest.mark.parametrize(("text", "line", "key", "words"), BAD, ids=[b[0][-40:] for b in BAD])
def test_a_bad_value_is_one_line_with_file_line_and_key(
    text: str, line: int, key: str, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(SpecError) as caught:
        Spec.load(file)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{file}:{line}: {key}")
    assert words in message


NESTED_ALIASES = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
BROKEN = [  # not a spec at all: text, line or none, words
    ("", None, "the spec is empty"),
    ("# only a comment", None, "the spec is empty"),
    ("- mesh", 1, "not a mapping"),
    ("mesh", 1, "not a mapping"),
    ("mesh: {tensor: 2", 1, "not YAML"),
    ("mesh:\n\ttensor: 2", 2, "spaces, not tabs"),
    ("mesh: {tensor: 2}\n---\nmesh: {tensor: 4}", 2, "another document"),
    ("? [a]\n: b", 1, "plain word"),
    ("mesh: *nowhere", 1, "undefined alias"),
    ("[" * 5000, None, "too deeply"),
    (NESTED_ALIASES, None, "too many values"),
]


@pytest.mark.parametrize(("text", "line", "words"), BROKEN, ids=[b[2] for b in BROKEN])
def test_a_broken_file_is_one_line(text: str, line: int | None, words: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(SpecError) as caught:
        Spec.load(file)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{file}:{line}: " if line else f"{file}")
    assert words in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "8way.yaml").write_text(HEAD)
    (tmp_path / "latin.yaml").write_bytes(b"mesh:\n  tensor: 2 # \xe9")
    for name, words in (("9way.yaml", "8way.yaml"), ("", "directory"), ("latin.yaml", "latin.yaml:2: not text")):
        with pytest.raises(SpecError, match=words):
            Spec.load(tmp_path / name)


def test_the_schema_names_every_key_and_says_what_it_is() -> None:
    schema = Spec.json_schema()
    sections = [schema, *schema["$defs"].values()]
    assert set(schema["properties"]) == set(Spec.model_fields)
    for section in sections:
        assert section["additionalProperties"] is False
        assert all("description" in p for p in section["properties"].values())
    assert {k for s in sections for k in s["properties"]} >= {"as", "match", "tensor", *ShardSpec.model_fields}


def test_a_section_of_another_owner_is_checked_with_the_same_lines(tmp_path: Path) -> None:
    class Train(Section):
        steps: int = Field(ge=1, description="Steps.", examples=[100])
        lr: float = Field(default=1e-4, description="Rate.")

    file = tmp_path / "s.yaml"
    file.write_text(HEAD + "train:\n  lr: 3e-4\n  stps: 3")
    with pytest.raises(SpecError, match=r"s.yaml:4: train.stps: unknown key 'stps'; did you mean 'steps'"):
        Spec.load(file).section(Train)
    assert Spec.load({"mesh": {"tensor": 2}, "train": {"steps": 3}}).section(Train).steps == 3
    with pytest.raises(SpecError, match=r"train.steps: is missing"):
        Spec.load({"mesh": {"tensor": 2}}).section(Train)


def test_later_stages_can_name_the_line_of_a_key(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(HEAD + "override:\n  - match: nothing.*\n    as: shard")
    spec = Spec.load(file)
    assert str(spec.error("override", 0, "match", what="matches\nnothing")).endswith(
        "s.yaml:3: override[0].match: matches nothing"
    )
    assert str(spec.error("shard", "mlp", what="no such block")).endswith("s.yaml:1: shard.mlp: no such block")


@pytest.mark.parametrize(
    ("pattern", "name", "covered"),
    [
        ("h.*.mlp", "h.3.mlp.c_fc.weight", True),
        ("h.*.mlp", "h.3.mlp", True),
        ("h.3", "h.31.mlp.weight", False),
        ("*.bias", "h.0.ln.bias", True),
        ("*.bias", "h.0.ln.weight", False),
        ("h.[0-3]", "h.2.attn.w", True),
        ("H.*", "h.0", False),
    ],
)
def test_a_glob_covers_what_lies_below_a_module(pattern: str, name: str, covered: bool) -> None:
    assert covers(pattern, name) is covered
