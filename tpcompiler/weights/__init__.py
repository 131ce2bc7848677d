"""One format for weights and checkpoints (docs/format.md): shard, merge and reshard, slice by slice, bit for bit.

runs.py      index sets as runs, and copying by them
place.py     layouts resolved to runs per rank
files.py     safetensors files, read and written in pieces
manifest.py  what lies in a directory;  wire.py  its text
source.py    where weights are read from
match.py     a model's parameters found in a source
atomic.py    directories that change all at once
write.py     shard, merge, reshard, verify
"""

from __future__ import annotations

from tpcompiler.runtime.runs import cut, slice_of
from tpcompiler.weights.layouts import Layout, RankRuns
from tpcompiler.weights.manifest import Entry, Manifest, weight_mesh, weight_rank
from tpcompiler.weights.match import entries_of
from tpcompiler.weights.sources import Source, Weights, open_source
from tpcompiler.weights.tensor_files import FileInfo, write_file, write_text
from tpcompiler.weights.wire import load_manifest, save_manifest
from tpcompiler.weights.write import load_rank, merge, output, reshard, shard, verify, write_shards

__all__ = [
    "Entry",
    "FileInfo",
    "Layout",
    "Manifest",
    "RankRuns",
    "Source",
    "Weights",
    "cut",
    "entries_of",
    "load_manifest",
    "load_rank",
    "merge",
    "open_source",
    "output",
    "reshard",
    "save_manifest",
    "shard",
    "slice_of",
    "verify",
    "weight_mesh",
    "weight_rank",
    "write_file",
    "write_shards",
    "write_text",
]  # fmt: skip
