"""The house stands as docs/architecture.md says: its rooms, what each may import, and how large a file may be."""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

from docs.files import DOCUMENT, documented, listing, rooms

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tpcompiler"

LONGEST_FILE = 400
LONGEST_FUNCTION = 50
# To be shortened; nothing may be added here.
LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()


def files() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The modules that a file imports, anywhere in it, each with the names taken from it."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}:{node.lineno}: imports are absolute"
            yield node.module, tuple(alias.name for alias in node.names)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "the package itself"


@cache
def imports() -> nx.DiGraph:
    """An arrow from each module to every module of the package that it imports.

    `tpcompiler/__init__.py` is left out: it is the door, and opens everything at first use."""
    modules = files()
    graph = nx.DiGraph()
    for module, path in modules.items():
        if module == "tpcompiler":
            continue
        graph.add_node(module)
        for source, names in imported(path):
            if source.split(".")[0] != "tpcompiler":
                continue
            parts = [f"{source}.{name}" for name in names]
            targets = {part if part in modules else source for part in parts} or {source}
            graph.add_edges_from((module, target) for target in targets if target != module)
    return graph


allowed = cache(rooms)


def test_every_room_is_documented_below_the_rooms_that_it_may_import() -> None:
    order = list(allowed())
    assert sorted(order) == sorted({room(module) for module in files() if module != "tpcompiler"})
    for position, name in enumerate(order):
        assert allowed()[name] <= set(order[:position]), name


def test_no_import_goes_against_the_documented_arrows() -> None:
    wrong = [
        f"{source} imports {target}"
        for source, target in sorted(imports().edges)
        if room(target) not in {room(source), *allowed()[room(source)]}
    ]
    assert not wrong, "\n".join(wrong)


def test_files_do_not_import_each_other_in_a_circle() -> None:
    circles = [sorted(group) for group in nx.strongly_connected_components(imports()) if len(group) > 1]
    assert not circles


def test_the_runtime_imports_torch_and_the_errors_alone() -> None:
    for path in (PACKAGE / "runtime").rglob("*.py"):
        for module, _ in imported(path):
            ours = module == "tpcompiler.errors" or module.startswith("tpcompiler.runtime")
            assert ours or module.split(".")[0] in {"torch", *sys.stdlib_module_names}, f"{path}: {module}"


def test_the_check_reaches_nothing_of_what_it_checks() -> None:
    graph = imports()
    roots = [module for module in graph if room(module) == "check"]
    reached = {room(other) for module in roots for other in nx.descendants(graph, module)}
    assert not reached & {"ops", "axes", "plan", "partition", "passes"}


def test_nothing_imports_the_command_line() -> None:
    assert not [edge for edge in imports().edges if room(edge[1]) == "cli" != room(edge[0])]


def test_models_do_not_import_the_compiler() -> None:
    for path in (ROOT / "models").rglob("*.py"):
        assert not [module for module, _ in imported(path) if module.split(".")[0] == "tpcompiler"], path


def test_a_file_has_a_name_of_its_own() -> None:
    names = Counter(path.name for path in files().values() if path.name != "__init__.py")
    assert not [name for name, number in names.items() if number > 1]


def test_every_file_stands_in_the_list_with_what_its_docstring_says() -> None:
    assert documented() == listing(), "docs/architecture.md is older than the files: run `python -m docs.files`"


def test_every_file_that_the_page_names_is_there() -> None:
    named = set(re.findall(r"`((?:\w+/)+(?:\w+\.py)?)`", DOCUMENT.read_text().split("\n## Files\n")[0]))
    assert len(named) > 20
    assert not [name for name in sorted(named) if not any((base / name).exists() for base in (PACKAGE, ROOT))]


@pytest.mark.parametrize("path", files().values(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path: Path) -> None:
    name = str(path.relative_to(PACKAGE))
    assert len(path.read_text().splitlines()) <= LONGEST_FILE or name in LONG_FILES
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f"{name}: {f.name}" for f in functions if (f.end_lineno or f.lineno) - f.lineno + 1 > LONGEST_FUNCTION}
    assert long <= LONG_FUNCTIONS
