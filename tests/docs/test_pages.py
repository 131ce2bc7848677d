"""The documentation is true: links lead somewhere, commands have the options they are shown with, marked blocks run."""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from tpcompiler.cli import main

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
NOT_RUN = {"train", "doctor"}  # minutes, and what depends on the machine


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as mkdocs makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        plain = unicodedata.normalize("NFKD", heading.replace("`", "")).encode("ascii", "ignore").decode()
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower()))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_pages_and_headings_that_are_there(page: Path) -> None:
    """Also what `mkdocs build --strict` refuses: a link out of docs/."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        there = page.parent / name if name else page
        assert there.exists() and there.resolve().is_relative_to(ROOT / "docs"), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(there), f"{page.name}: {target}"


def test_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text()):
        assert target.startswith("http") or (ROOT / target.partition("#")[0]).exists(), target


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every `tpc …` line in a page's blocks."""
    text = page.read_text().replace("\\\n", " ")
    for line in re.findall(r"^(?:    |\$ )?(?:torchrun .*--no-python )?tpc +(\w.*)$", text, re.MULTILINE):
        words = shlex.split(line, comments=True)
        if not any(word in line for word in ("[", "…", "COMMAND")):
            yield words


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_commands_have_the_options_that_they_are_shown_with(page: Path) -> None:
    program = typer.main.get_command(main.app)
    for words in commands(page):
        name, *arguments = words
        assert name in main.COMMANDS, f"{page.name}: tpc {' '.join(words)}"
        command = program.commands[name]  # type: ignore[attr-defined]
        known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)} | {"-h", "--help"}
        used = {word.partition("=")[0] for word in arguments if re.match(r"--?[a-zA-Z]", word)}
        assert used <= known, f"{page.name}: tpc {name} has no {used - known}"


def blocks(page: Path) -> Iterator[tuple[list[str], str]]:
    """The blocks of a page that are marked by `<!-- test: … -->`, with the words of the mark."""
    pattern = r"<!-- test: ([\w. ]+) -->\n```\w*\n(.*?)^```"
    for mark, text in re.findall(pattern, page.read_text(), re.MULTILINE | re.DOTALL):
        yield mark.split(), text


MARKED = [page for page in PAGES if any(True for _ in blocks(page))]


@pytest.mark.parametrize("page", MARKED, ids=lambda page: page.name)
def test_marked_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    known: dict[str, object] = {}
    for (kind, *name), text in blocks(page):
        if kind == "file":
            Path(*name).write_text(text)
        else:
            exec(compile(text, f"{page.name}", "exec"), known)


def test_the_quick_start_is_among_the_blocks_that_run() -> None:
    assert ROOT / "docs/start.md" in MARKED


@pytest.mark.nightly
def test_the_commands_of_the_quick_start_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = ROOT / "docs/start.md"
    (_, text), *_ = blocks(page)
    (tmp_path / "tiny.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    run = [words for words in commands(page) if words[0] not in NOT_RUN]
    assert [words[0] for words in run] == ["init", "shard", "report", "diff", "explain", "verify"]
    for words in run:
        assert main.main(words) == 0, (words, capsys.readouterr().err)
