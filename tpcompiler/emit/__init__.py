"""Emission: turns a `Program` into a Python file that reads as if a person had written it.

The file has one class for each distinct layer, and a class `Model`. The work is done in five rooms. Each room imports
only from the rooms before it:

    text     pieces of Python as text: expressions, subscripts, line breaks, comments
    ops      what a graph node stands for, and how one ATen call is written
    layers   which module calls a program consists of, which of them are equal, and what becomes a loop
    names    what variables, sizes and attributes are called
    write    functions, constructors, classes and the whole file
"""

from tpcompiler.emit.write.file import emit
from tpcompiler.emit.write.loaded import load_source

__all__ = ["emit", "load_source"]
