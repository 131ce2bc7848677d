"""Emit: a program becomes a Python file that a person would have written, a class for each distinct layer."""

from tpcompiler.emit.module import load_source
from tpcompiler.emit.source import emit

__all__ = ["emit", "load_source"]
