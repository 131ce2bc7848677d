"""Emit: a program becomes a Python file that a person would have written, a class for each distinct layer."""

from tpcompiler.emit.write.file import emit
from tpcompiler.emit.write.loaded import load_source

__all__ = ["emit", "load_source"]
