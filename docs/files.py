"""The list of files in docs/architecture.md, made from the first sentence of each file's docstring.

python -m docs.files     writes it anew; tests/test_architecture.py compares it with the tree
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- files: python -m docs.files -->\n", "<!-- end of files -->\n"


def rooms() -> dict[str, set[str]]:
    """The table of rooms: each with what it may import, in the order in which data flows."""
    section = DOCUMENT.read_text().split("\n## Rooms\n")[1].split("\n## ")[0]
    lines = re.findall(r"^\| `(\w+)` \|([\w, ]*)\|$", section, re.MULTILINE)
    return {name: set(re.findall(r"\w+", others)) for name, others in lines}


def listing() -> str:
    """A table for every room that is a package, and one for the files beside the packages."""
    package = ROOT / "tpcompiler"
    beside = [package / f"{name}.py" for name in rooms() if (package / f"{name}.py").exists()]
    parts = ["### Beside the packages\n", _table([package / "__init__.py", *beside], package)]
    for name in rooms():
        folder = package / name
        if folder.is_dir():
            parts += [f"### {name}\n", _table(sorted(folder.rglob("*.py")), folder)]
    return "\n".join(parts)


def _table(files: list[Path], folder: Path) -> str:
    rows = [f"| `{file.relative_to(folder)}` | {sentence(file)} |\n" for file in files if _speaks(file)]
    return "".join(["| file | what it is for |\n|---|---|\n", *rows])


def _speaks(file: Path) -> bool:
    """Whether a file is more than the docstring that makes a directory a package."""
    return file.name != "__init__.py" or len(ast.parse(file.read_text()).body) > 1


def sentence(file: Path) -> str:
    """What a file's docstring says first: its first sentence, on one line."""
    text = " ".join((ast.get_docstring(ast.parse(file.read_text())) or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z`])", text)[0].replace("|", "\\|")


def documented() -> str:
    return DOCUMENT.read_text().split(BEGIN)[1].split(END)[0]


def main() -> None:
    before, rest = DOCUMENT.read_text().split(BEGIN)
    DOCUMENT.write_text(before + BEGIN + listing() + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
