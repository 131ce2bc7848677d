"""What emitted programs import: groups of ranks, the operators between them, weights. Needs torch alone."""

from tpcompiler.runtime.expert_products import grouped_mm
from tpcompiler.runtime.groups import Group, Ranks
from tpcompiler.runtime.halves import Halves, cut_batch, join_batch
from tpcompiler.runtime.head import linear_cross_entropy
from tpcompiler.runtime.mesh import Mesh
from tpcompiler.runtime.module import Parameters
from tpcompiler.runtime.norms import layer_norm, rms_norm
from tpcompiler.runtime.operators import enter, gather, gather_sequence, lookup, reduce, scatter_sequence, take
from tpcompiler.runtime.overlap import entered_linear
from tpcompiler.runtime.random import Rng, dropout
from tpcompiler.runtime.vocab import cross_entropy
from tpcompiler.runtime.weights import load

__all__ = [
    "Group",
    "Halves",
    "Mesh",
    "Parameters",
    "Ranks",
    "Rng",
    "cross_entropy",
    "cut_batch",
    "dropout",
    "enter",
    "entered_linear",
    "gather",
    "gather_sequence",
    "grouped_mm",
    "join_batch",
    "layer_norm",
    "linear_cross_entropy",
    "load",
    "lookup",
    "reduce",
    "rms_norm",
    "scatter_sequence",
    "take",
]
