"""Reads YAML and records the line of every key, so that errors can name file, line and key.

Scalars follow the core schema of YAML 1.2, not PyYAML's 1.1: `1e-4` is a number, `on` and `no` are strings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from tpcompiler.errors import SpecError

Key = tuple[str | int, ...]  # from the root: ("override", 0, "match")

_NODE_LIMIT = 100_000  # aliases can make a small file exponentially large


@dataclass(frozen=True)
class Origin:
    """Where a document comes from: its file, the line of each key, and the keys that options gave.

    All origins compare equal, so that specs with equal values are equal.
    """

    file: str = field(default="spec", compare=False)
    lines: Mapping[Key, int] = field(default_factory=dict, compare=False)
    options: Mapping[Key, str] = field(default_factory=dict, compare=False)  # as written: `-t steps=5`

    def given(self, key: Key, said: str) -> Origin:
        """The same origin, except that `key` and all keys below it come from the command-line option `said`."""
        return replace(self, options={**self.options, key: said})

    def line(self, key: Key) -> int | None:
        """The line of a key, or of the nearest enclosing key that has one."""
        for n in range(len(key), -1, -1):
            if key[:n] in self.lines:
                return self.lines[key[:n]]
        return None

    def error(self, key: Key, what: str) -> SpecError:
        """`file:line: key: what`, ready to raise; `option: what` for a key that an option gave."""
        for n in range(len(key), 0, -1):
            if key[:n] in self.options:
                return SpecError(f"{self.options[key[:n]]}: {one_line(what)}")
        line = self.line(key)
        place = self.file if line is None else f"{self.file}:{line}"
        return SpecError(": ".join(filter(None, (place, dotted(key), one_line(what)))))


def dotted(key: Key) -> str:
    """`("override", 0, "match")` → `override[0].match`."""
    return "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in key).removeprefix(".")


def one_line(text: str, limit: int = 400) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def read_text(path: Path, shown: str) -> str:
    """The text of a file, which messages call `shown`. Raises `SpecError`, one line, when it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        hint = f"; beside it stand {', '.join(near[:8])}" if near else ""
        raise SpecError(f"{shown}: no such file{hint}") from None
    except IsADirectoryError:
        raise SpecError(f"{shown}: is a directory; give a YAML file") from None
    except UnicodeDecodeError as e:
        line = e.object[: e.start].count(b"\n") + 1
        raise SpecError(f"{shown}:{line}: not text: byte 0x{e.object[e.start]:02x} is not UTF-8") from None
    except (OSError, ValueError) as e:
        raise SpecError(f"{one_line(shown)}: cannot be read: {getattr(e, 'strerror', None) or e}") from None


def parse(text: str, file: str) -> tuple[Any, Origin]:
    """Turns YAML text into plain values (keys of mappings are strings) and their origin. Raises `SpecError`."""
    lines: dict[Key, int] = {}
    origin = Origin(file, lines)
    try:
        root = yaml.compose(text, Loader=_Loader)
        if root is None:
            return None, origin
        return _Reader(origin, lines).value(root, (), ()), origin
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        place = file if mark is None else f"{file}:{mark.line + 1}"
        hint = "; indent with spaces, not tabs" if "'\\t'" in str(e.problem) else ""
        context = f" ({e.context})" if e.context else ""
        raise SpecError(one_line(f"{place}: not YAML: {e.problem}{context}{hint}")) from None
    except yaml.YAMLError as e:
        raise SpecError(one_line(f"{file}: not YAML: {e}")) from None
    except RecursionError:
        raise SpecError(f"{file}: nested too deeply to be a spec") from None


def scalar(text: str, file: str = "--set") -> Any:
    """A value given on the command line, with YAML's type: `8` is an int, `[1, 2]` a list, `gelu` a string."""
    return parse(text, file)[0]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


class _Reader:
    """Turns YAML's nodes into values and records the line of each key."""

    def __init__(self, origin: Origin, lines: dict[Key, int]) -> None:
        self.origin, self.lines, self.seen = origin, lines, 0

    def value(self, node: Node, key: Key, around: tuple[int, ...]) -> Any:
        self.seen += 1
        self.lines.setdefault(key, node.start_mark.line + 1)
        if id(node) in around:
            raise self.origin.error(key, "an alias that contains itself; write the value out")
        if self.seen > _NODE_LIMIT:
            raise self.origin.error(key, f"too many values for a spec, more than {_NODE_LIMIT}")
        inside = (*around, id(node))
        if isinstance(node, MappingNode):
            return self.mapping(node, key, inside)
        if isinstance(node, SequenceNode):
            return [self.value(item, (*key, i), inside) for i, item in enumerate(node.value)]
        assert isinstance(node, ScalarNode)
        return self.plain(node, key)

    def mapping(self, node: MappingNode, key: Key, inside: tuple[int, ...]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, item in node.value:
            line = name.start_mark.line + 1
            if not isinstance(name, ScalarNode):
                raise SpecError(f"{self.origin.file}:{line}: a key must be a plain word, not a list or a mapping")
            here = (*key, name.value)
            if name.value in out:
                raise SpecError(
                    f"{self.origin.file}:{line}: {dotted(here)}: written twice, first in line {self.lines[here]};"
                    " keep one of them"
                )
            self.lines[here] = line
            out[name.value] = self.value(item, here, inside)
        return out

    def plain(self, node: ScalarNode, key: Key) -> Any:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        text = node.value
        try:
            if kind == "null":
                return None
            if kind == "bool":
                return text.lower() == "true"
            if kind == "int":
                return int(text, 16) if text.startswith("0x") else int(text)
            if kind == "float":
                return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError:
            raise self.origin.error(key, f"{text[:40]!r} is not a number") from None
        if kind == "str":
            return text
        raise self.origin.error(key, f"the tag {node.tag} means nothing here; write a plain value")
