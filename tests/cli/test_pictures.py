"""What the command line draws: tables that fit, no number lost; two programs compared at any width."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from tpcompiler.cli import sides, tables
from tpcompiler.errors import format_bytes


def drawn(picture: RenderableType | None, width: int = 120) -> str:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(picture)
    return capture.get()


# -- tables -----------------------------------------------------------------------------------------------------------

numbers = st.lists(st.integers(0, 99), min_size=1, max_size=30, unique=True)


@given(numbers)
def test_equal_layers_are_one_row_with_their_number(layers: list[int]) -> None:
    rows = [{"name": f"h.{i}.mlp", "size": 4} for i in layers]
    folded = tables.fold(rows, "name", lambda r: r["size"])
    assert [(name, len(group)) for name, group in folded] == [
        ("h.*.mlp" if len(layers) > 1 else f"h.{layers[0]}.mlp", len(layers))
    ]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 1)), max_size=30))
def test_folding_loses_no_row_and_joins_only_equal_ones(rows: list[tuple[int, int, int]]) -> None:
    named = [{"name": f"a.{i}.b{j}", "size": k} for i, j, k in rows]
    groups = tables.fold(named, "name", lambda r: r["size"])
    assert sorted(map(str, named)) == sorted(str(r) for _, group in groups for r in group)
    assert all(len({r["size"] for r in group}) == 1 for _, group in groups)
    for name, group in groups:
        pattern = re.escape(name).replace(r"\*", r"\d+")
        assert all(re.fullmatch(pattern, r["name"]) for r in group)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=16))
def test_local_sizes_can_be_read_back(local: list[int]) -> None:
    text = tables.local_sizes(local)
    if len(set(local)) == 1:
        assert int(text.replace(",", "")) == local[0]
    else:
        back: list[int] = []
        for part in text.split(", "):
            n, _, times = part.partition(" × ")
            back += [int(n.replace(",", ""))] * int(times or 1)
        assert back == local


@given(st.integers(0, 10**15))
def test_sizes_are_right_to_a_digit(n: int) -> None:
    number, unit = format_bytes(n).split()
    scale = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}[unit]
    assert abs(float(number) * scale - n) <= 0.0501 * scale


def report(layers: int) -> dict[str, Any]:
    rows: dict[str, Any] = {"blocks": [], "collectives": [], "replicated": []}
    for i in range(layers):
        mlp = {"kind": "mlp", "name": f"h.{i}.mlp", "layers": 1, "axis": "ff", "size": 25, "over": ["tensor"]}
        rows["blocks"].append({**mlp, "local": [4, 3, 3, 3, 3, 3, 3, 3], "parameters": [f"h.{i}.mlp.w"]})
        for direction in ("forward", "backward"):
            one = {
                "kind": "all_reduce",
                "direction": direction,
                "over": ["tensor"],
                "bytes": 2**20,
                "block": f"h.{i} · mlp",
            }
            rows["collectives"].append({**one, "node": f"reduce_{i}", "count": 1, "reason": f"h.{i}.mlp contracts ff"})
        rows["replicated"].append({"name": f"h.{i}.ln.weight", "bytes": 64, "reason": "needed whole by layer_norm"})
    memory = {"parameters": 2**30, "gradients": 2**30, "optimizer": 2**31, "total": 2**32}
    return {**rows, "memory": memory, "seconds": {"capture": 1.0}}


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("layers", [0, 1, 72])
def test_the_report_has_every_number_and_fits(layers: int, width: int) -> None:
    text = drawn(tables.shard_report(report(layers), device_gib=8), width)
    assert max(map(len, text.splitlines())) <= width
    assert "4.0 GiB" in text
    assert "50%" in text
    name = "h.*.mlp" if layers > 1 else "h.0.mlp"
    assert (name in text) is (layers > 0)
    if layers:
        assert "4, 3 × 7" in text
        assert text.count(f"× {layers} ") >= 4  # forward, backward, their sums, the norms
        assert format_bytes(layers * 2**20) in text
        assert f"{name.removesuffix('.mlp')} · mlp" in text  # nothing is broken off
        assert "…" not in text


def test_what_is_piped_is_as_wide_as_columns_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tpcompiler.cli.screen import Screen

    for columns, width in (("64", 64), ("", 100)):
        monkeypatch.setenv("COLUMNS", columns) if columns else monkeypatch.delenv("COLUMNS", raising=False)
        Screen(as_json=False).show(tables.shard_report(report(3)), "x" * 300, width=100)
        assert max(map(len, capsys.readouterr().out.splitlines())) == width


def test_a_failed_verification_names_the_worst() -> None:
    cases = [
        {"what": "outputs", "worst": "logits", "max_rel_error": 1e-15, "passed": True},
        {"what": "gradients", "worst": "h.0.mlp.w", "max_rel_error": 0.25, "passed": False, "tolerance": 1e-10},
    ]
    text = drawn(tables.verify_report({"passed": False, "max_rel_error": 0.25, "cases": cases}))
    assert re.search(r"gradients +h\.0\.mlp\.w +2\.5e-01 +1\.0e-10 +DIFFERS", text)
    assert re.search(r"outputs +logits +1\.0e-15 +- +equal", text)
    assert "FAILED" in text


def test_what_is_not_an_error_of_numbers_is_shown_too() -> None:
    case = {
        "what": "outputs",
        "max_rel_error": 0.0,
        "passed": False,
        "notes": ["output 0 is not the same bits on all ranks"],
    }
    text = drawn(tables.verify_report({"passed": False, "max_rel_error": 0.0, "cases": [case]}))
    assert "not the same bits" in text


# -- side by side -----------------------------------------------------------------------------------------------------

code = st.sampled_from(
    ["x = f(x)", "y = g(x, 1)", "y = reduce(y, t)", "x = enter(x, t)", "return x", "", "x = f(x)  # [b, s]"]
)


@given(st.lists(code, max_size=12), st.lists(code, max_size=12))
def test_alignment_keeps_every_line_of_both_in_order(plain: list[str], sharded: list[str]) -> None:
    lines = sides.align(plain, sharded)
    assert [x.plain for x in lines if x.plain is not None] == plain
    assert [x.sharded for x in lines if x.sharded is not None] == sharded
    for line in lines:
        assert (line.plain is None) == (line.change == "inserted")
        assert (line.sharded is None) == (line.change == "removed")


@given(st.lists(code, max_size=12))
def test_a_program_is_the_same_as_itself(plain: list[str]) -> None:
    assert all(x.change == "same" and x.collective is None for x in sides.align(plain, plain))


def test_inserted_collectives_are_found_with_their_direction() -> None:
    plain = ["y = layer_norm(x)", "y = linear(y, self.up)", "y = linear(y, self.down)", "return y + self.bias"]
    sharded = plain.copy()
    sharded.insert(1, "y = enter(y, self.tensor)  # backward: all-reduce")
    sharded[-1] = "return reduce(y, self.tensor) + self.bias"
    found = [(x.sharded, x.collective) for x in sides.align(plain, sharded) if x.collective]
    assert found == [(sharded[1], "backward"), (sharded[-1], "forward")]


@pytest.mark.parametrize("layers", [2, 72])
def test_equal_layers_are_folded_and_counted(layers: int) -> None:
    def program(extra: list[str]) -> list[str]:
        body = [["a = norm(x)", *extra, f"b = mul(a, w{i})", f"x = add(x, b{i})"] for i in range(layers)]
        return ["start()", *(line for layer in body for line in layer), "return x"]

    lines = sides.fold_layers(sides.align(program([]), program(["a = enter(a, t)"])))
    assert [x.times for x in lines if x.change == "folded"] == [layers]
    assert len(lines) == 3 + 4  # start, the mark, one layer of four lines, return
    text = drawn(sides.Picture(lines, ("plain", "sharded")))
    assert f"× {layers}" in text


@pytest.mark.parametrize("width", [50, 64, 170])
def test_both_programs_can_be_read_at_any_width(width: int) -> None:
    """Two beside each other, or one with its changes marked: every line whole, what continues further indented."""
    long = "        return linear(x, self.weight, self.bias, 'a long argument')  # [b]"
    plain = ["class A:", "    def f(self):", long]
    sharded = [*plain[:2], plain[2].replace("self.bias", "None"), "        y = reduce(y, self.tensor)"]
    text = drawn(sides.Picture(sides.align(plain, sharded), ("plain", "sharded")), width)
    rows = text.splitlines()
    assert max(map(len, rows)) <= width
    if width >= 160:
        assert any(r.startswith(plain[2]) and sharded[2] in r[80:] for r in rows)
        return
    starts = [len(r[2:]) - len(r[2:].lstrip()) for r in rows]
    minus, plus = (next(i for i, r in enumerate(rows) if r.startswith(f"{m}         return")) for m in "-+")
    assert starts[minus] == starts[plus] == 8
    assert starts[minus + 1] == starts[plus + 1] == 12
    for line, first, last in ((plain[2], minus, plus), (sharded[2], plus, len(rows))):
        whole = " ".join(r[2:].strip() for r in rows[first:last])
        assert whole.replace(" ", "").startswith(line.replace(" ", ""))
    assert any(r.startswith("→         y = reduce") for r in rows)


@given(st.lists(st.booleans(), max_size=40), st.integers(0, 4))
def test_squeezing_keeps_all_changes_and_their_surroundings(changes: list[bool], context: int) -> None:
    lines = [sides.Line(str(i), str(i), "changed" if c else "same") for i, c in enumerate(changes)]
    kept = {x.plain for x in sides.squeeze(lines, context)}
    for i, changed in enumerate(changes):
        if changed:
            assert {str(j) for j in range(max(0, i - context), min(len(lines), i + context + 1))} <= kept
    assert sides.squeeze(lines, None) == lines
