"""One format for weights and checkpoints (docs/format.md): shard, merge and reshard, slice by slice, bit for bit.

layouts.py       layouts as each rank's runs of indices
tensor_files.py  writes safetensors files in pieces; runtime/stored.py reads them
manifest.py      what a directory holds;  wire.py  writes and reads its text
sources.py       where weights are read from
match.py         finds a model's parameters in a source
atomic.py        replaces directories and files all at once
write.py         shard, merge, reshard, verify
fill.py          gives a rank's module its values
"""

from __future__ import annotations

from tpcompiler.runtime.runs import cut, slice_of
from tpcompiler.weights.layouts import Layout, RankRuns
from tpcompiler.weights.manifest import Entry, Manifest, weight_mesh
from tpcompiler.weights.match import entries_of
from tpcompiler.weights.sources import StateSource, Weights, open_source
from tpcompiler.weights.tensor_files import FileInfo, write_file, write_text
from tpcompiler.weights.wire import load_manifest, save_manifest
from tpcompiler.weights.write import merge, output, refuse_to_replace, reshard, shard, verify, write_shards

__all__ = [
    "Entry",
    "FileInfo",
    "Layout",
    "Manifest",
    "RankRuns",
    "StateSource",
    "Weights",
    "cut",
    "entries_of",
    "load_manifest",
    "merge",
    "open_source",
    "output",
    "refuse_to_replace",
    "reshard",
    "save_manifest",
    "shard",
    "slice_of",
    "verify",
    "weight_mesh",
    "write_file",
    "write_shards",
    "write_text",
]  # fmt: skip
