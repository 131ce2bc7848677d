"""WikiText's text as people write it: its files hold words and marks apart, which no tokenizer was trained on.

Perplexities of such a text are taken over the joined text and divided by the count of the words as they stood
(arXiv 1909.08053, app. E.1): call `original_tokens` before `join_words`.
"""

from __future__ import annotations

import re

_JOINS = (
    (re.compile(r" @([-,.])@ "), r"\1"),  # 3 @,@ 000 → 3,000
    (re.compile(r" +([,.;:!?%)\]}])"), r"\1"),
    (re.compile(r"([(\[{$£€#]) +"), r"\1"),
    (re.compile(r" (n't|'(?:s|m|d|re|ve|ll))\b"), r"\1"),
    (re.compile(r"(?<=n) 't\b"), "'t"),
    (re.compile(r'" ([^"\n]*?) "'), r'"\1"'),
    (re.compile(r"(?<=s) ' "), "' "),
    (re.compile(r"(?<==) (?==)"), ""),  # = = Heading = = → == Heading ==
    (re.compile(r" °"), "°"),
    (re.compile(r"[ \t]*\n[ \t]*"), "\n"),
)


def join_words(text: str) -> str:
    """Takes out the spaces that word-level tokenisation put in. Words and their order stay."""
    for pattern, replacement in _JOINS:
        text = pattern.sub(replacement, text)
    return text
