"""Reads prompts from files, and turns new tokens into text."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from tpcompiler.errors import TpcError
from tpcompiler.train.data.tokenizer import Tokenizer

_FIELDS = ("prompt", "text")


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file of JSON lines. Each line is a string, or an object with a string under `prompt` or `text`.

    All lines are read before anything is generated. Raises `TpcError`, which names the file and the line.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise TpcError(f"{path}: {e.strerror if isinstance(e, OSError) else 'not UTF-8 text'}") from None
    prompts = [_prompt(f"{path}:{n}", line) for n, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise TpcError(f"{path}: holds no prompt; write one per line, such as {{'prompt': 'Once upon a time'}}")
    return prompts


def _prompt(where: str, line: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as e:
        raise TpcError(f"{where}: not JSON: {e.msg} at column {e.colno}") from None
    if isinstance(value, dict):
        value = next((value[k] for k in _FIELDS if k in value), None)
    if not isinstance(value, str) or not value:
        raise TpcError(f"{where}: no text under {' or '.join(map(repr, _FIELDS))}, nor a text itself")
    return value


@dataclass
class Text:
    """The continuation of a prompt, as it is shown. A character may consist of several tokens."""

    tokenizer: Tokenizer
    ids: list[int] = field(default_factory=list)
    shown: str = ""

    @property
    def whole(self) -> str:
        return self.tokenizer.decode(self.ids)

    def take(self, token: int | None, last: bool) -> str:
        """Adds a token, or None for one that is not shown. Returns the characters that are now complete, or at the
        `last` token all that are left."""
        if token is not None:
            self.ids.append(token)
        whole = self.whole
        if not last and (whole.endswith("\ufffd") or not whole.startswith(self.shown)):
            return ""
        more, self.shown = whole[len(self.shown) :], whole
        return more
