"""`tpc report`: one page that loads nothing, that a parser and a screen reader can read, with the program's numbers."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from models.gpt2 import GPT2, example_inputs
from models.llama import Llama
from models.llama import example_inputs as llama_inputs
from tests.sample import sampled
from tpcompiler.api import Sharded, compile_capture
from tpcompiler.capture import capture
from tpcompiler.cli import main
from tpcompiler.cost.layer_timeline import layer_timeline
from tpcompiler.cost.predict import CostModel, ParallelLayout
from tpcompiler.report.page_facts import page_facts
from tpcompiler.report.predicted import predicted
from tpcompiler.report.written_page import written_page
from tpcompiler.spec.schema import Spec

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "models/gpt2.py")
SIZES = ("--set", "hidden=48", "--set", "heads=3", "--set", "layers=2", "--set", "vocab=61")
VOID = {"meta", "br", "link", "img", "input", "hr"}


@dataclass
class Page(HTMLParser):
    """A page's tags, texts and attributes; `open` is what was never closed."""

    open: list[str] = field(default_factory=list)
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(part) for name, part in self.texts.items() if name != "style")


def read(text: str) -> Page:
    page = Page()
    page.feed(text)
    page.close()
    assert not page.open, page.open
    assert not page.wrong, page.wrong
    return page


@cache
def sharded(overlap: bool = True, recompute: str = "none") -> Sharded:
    spec = {"mesh": {"tensor": 2}, "overlap": overlap, "train": {"activation_checkpointing": recompute}}
    captured = capture(lambda: GPT2(vocab=61, hidden=48, heads=3, layers=3), example_inputs(vocab=61))
    return compile_capture(captured, Spec.load({**spec, "hardware": "h200"}))


def page_of(made: Sharded) -> tuple[dict[str, Any], Page]:
    facts = page_facts(made, predicted(made), [], "GPT2")
    return facts, read(written_page(facts))


def test_the_command_writes_a_page_that_loads_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    spec = tmp_path / "spec.yaml"
    spec.write_text("mesh: {tensor: 2}\n")
    assert main.main(["report", MODEL, "--spec", str(spec), *SIZES, "-o", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["written"] == str(out)
    text = out.read_text()
    page = read(text)
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed"}
        assert (attributes.get("href") or "#").startswith("#"), attributes
        assert "src" not in attributes
    assert "url(" not in text
    assert "@import" not in text
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    named = {name for _, a in page.tags for name in (a.get("aria-labelledby") or "").split()}
    assert named | {str(a["href"])[1:] for _, a in page.tags if "href" in a} <= set(ids)
    words = page.words
    for said in ("Proven", "proven equal to the model", "h.*.attn", "all-reduce", "mesh:", "an H100, because"):
        assert said in words, said
    assert "reduce(" in words, "the diff is missing"


def test_pictures_have_words_and_what_scrolls_can_be_reached_by_keys() -> None:
    _, page = page_of(sharded())
    for tag, a in page.tags:
        if a.get("role") == "img":
            assert a.get("aria-label") or a.get("aria-labelledby"), tag
        if "scroll" in (a.get("class") or "").split():
            assert a.get("tabindex") == "0" and a.get("role") == "region" and a.get("aria-label")
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(headings))
    assert ("html", {"lang": "en"}) in page.tags
    assert any(a.get("name") == "viewport" for _, a in page.tags)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_is_readable_in_both_schemes(scheme: str) -> None:
    """Contrast of 4.5 : 1 at least (WCAG 2, level AA), of texts on the page and on panels, and of dark ink on bars."""
    style = (ROOT / "tpcompiler/report/page.html").read_text().split("<style>")[1].split("</style>")[0]
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    colours = dict(re.findall(r"--(\w+): (#\w{6})", light))
    if scheme == "dark":
        colours |= dict(re.findall(r"--(\w+): (#\w{6})", dark.split("* {")[0]))
    for text in ("ink", "dim", "good", "bad", "forward", "backward", "removed", "link"):
        for ground in ("page", "panel"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for bar in ("rank0", "rank1", "rank2", "rank3"):
        assert contrast("#1b1f24", colours[bar]) >= 4.5, bar


def contrast(a: str, b: str) -> float:
    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_bars_and_edges_are_the_reports_numbers() -> None:
    made = sharded()
    facts, page = page_of(made)
    report = made.report()
    for block, shown in zip(report["blocks"], facts["blocks"], strict=False):
        assert [p.said for p in shown["shares"]] == [f"{n:,}" for n in block["local"]]
        assert sum(p.share for p in shown["shares"]) == pytest.approx(100)
    edges = [(c["kind"], c["count"]) for b in facts["blocks"] for c in b["crossing"]]
    assert sum(count for _, count in edges) == sum(c["count"] for c in report["collectives"])
    assert len(edges) == len(report["collectives"])
    held = [sum(p.share for p in bar.parts) for bar in facts["memory"]]
    assert len(held) == 2 and all(0 < h <= 100 for h in held)
    assert held[0] >= held[1], "the first rank holds most of an uneven axis"
    assert "<b>" not in written_page({**facts, "title": "<b>", "model": "<b>"})
    assert "torch" not in page.texts.get("script", [])


@cache
def deep(layers: int) -> CostModel:
    captured = capture(lambda: GPT2(vocab=61, hidden=48, heads=3, layers=layers), example_inputs(vocab=61))
    made = compile_capture(captured, Spec.load({"mesh": {"tensor": 2}, "overlap": True}))
    return CostModel(made.program, made.plan)


@pytest.mark.parametrize("recompute", sampled(["none", "attention", "layer"], 2))
@pytest.mark.parametrize("overlap", [True, False])
def test_the_timeline_of_the_layers_is_the_step_without_what_stands_outside(recompute: str, overlap: bool) -> None:
    """All layers are alike: twice as many take what the step is longer by, in every part."""
    hardware = Spec.load({"mesh": {"tensor": 2}, "hardware": "h200"}).hardware
    layout = ParallelLayout(2, 1, 4, recompute, overlap)  # type: ignore[arg-type]
    few, many = (deep(layers).predict(layout, hardware, 4, 32) for layers in (2, 4))
    line = layer_timeline(deep(2), layout, hardware, 32)
    assert line is not None and line.layers == 2
    difference = {name: many.parts[name] - few.parts[name] for name in few.parts}
    for phase in ("forward", "again"):
        computed = sum(e.seconds for e in line.events if e.phase == phase and not e.crosses)
        assert 2 * computed == pytest.approx(difference[phase], abs=1e-12), phase
    back = sum(e.seconds for e in line.events if e.phase == "backward" and not e.crosses)
    assert 2 * back == pytest.approx(difference["backward"])
    assert 2 * line.total(True) == pytest.approx(difference["exposed"])
    assert any(e.hidden for e in line.events) == overlap
    end = max(e.start + e.seconds for e in line.events if not e.crosses)
    assert end <= line.seconds * (1 + 1e-9)
    kernels = sorted((e.start, e.start + e.seconds) for e in line.events if not e.crosses)
    assert all(b[0] >= a[1] - 1e-12 for a, b in pairwise(kernels)), "kernels overlap"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((MODEL,), "Missing option '--spec'"),
        ((MODEL, "--spec", "nowhere.yaml"), "nowhere.yaml: no such file"),
        ((MODEL, "--spec", str(ROOT / "specs/2way.yaml"), "-o", str(ROOT)), "is a directory"),
        ((MODEL, "--spec", str(ROOT / "specs/2way.yaml"), "-o", "nowhere/page.html"), "there is no directory nowhere"),
        (("nowhere.py", "--spec", str(ROOT / "specs/2way.yaml")), "nowhere.py: no such file"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.main(["report", *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_model_without_equal_layers_has_a_page_too() -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(8, 32), torch.nn.Linear(32, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x).relu()).square().mean()

    made = compile_capture(capture(Two, (torch.randn(2, 8),)), Spec.load({"mesh": {"tensor": 2}}))
    facts, page = page_of(made)
    assert facts["timeline"] is None
    assert "no layers that are alike" in page.words


SPECS = {
    "fewer kv heads than ranks": {"mesh": {"tensor": 4}},
    "halves, and data ranks": {"mesh": {"tensor": 2, "data": 2}, "overlap": "halves"},
    "one rank": {"mesh": {"tensor": 1}},
}


@pytest.mark.parametrize("name", sampled(SPECS, 3))
def test_every_kind_of_spec_has_a_page(name: str) -> None:
    build = lambda: Llama(vocab=64, positions=16, hidden=32, heads=4, kv_heads=2, layers=2, intermediate=48)  # noqa: E731
    made = compile_capture(capture(build, llama_inputs(2, 8, 64)), Spec.load(SPECS[name]))
    facts, page = page_of(made)
    assert facts["passed"]
    assert len(facts["memory"]) == made.spec.mesh.tensor
    assert "layers.*.mlp" in page.words or name == "one rank"
