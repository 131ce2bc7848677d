"""What the derivation gives: a program for new tokens, what is computed once for a session, and what is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tpcompiler.layout import Dim
from tpcompiler.program import Program

NEW, ALL = "new", "all"  # extents along the sequence: the rows of the new tokens, or all positions so far
Want = tuple[str | None, ...]  # for each dimension of a value: its extent along the sequence, None: it has none


@dataclass(frozen=True)
class Table:
    """A value that `once` computes. `along`: for each dimension, whether the sequence is in it."""

    name: str
    node: str
    along: tuple[bool, ...]
    shape: tuple[Any, ...]


@dataclass(frozen=True)
class Cache:
    """A value that later tokens look back at."""

    name: str
    node: str  # of the program for whole sequences
    shape: tuple[Any, ...]  # ints and symbols, global
    dim: int  # along which positions stand
    batch: int | None  # its dimension of sequences, if it has one to itself
    dtype: torch.dtype
    layout: tuple[Dim, ...] | None


@dataclass(frozen=True)
class Decoder:
    """A program for new tokens: `step`'s inputs are the rows of the tokens' inputs, the tables that `once` computes
    from sizes and from the other inputs, and a `runtime.cache.Session`.

    `uniform`: why all sequences of a batch must have the same length at every step; empty when they need not.
    """

    program: Program
    step: Program
    once: Program
    rows: tuple[str, ...]  # placeholders of the inputs along the sequence, the token ids first
    tables: tuple[Table, ...]
    caches: tuple[Cache, ...]
    vocabulary: Dim | None  # the layout of the logits' last dimension
    uniform: str = ""
