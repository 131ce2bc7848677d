"""A plain causal model as an incremental decoder: what a new token needs of the past is derived from the graph."""

from tpcompiler.decode.decoder import Cache, Decoder, Table
from tpcompiler.decode.derive import derive

__all__ = ["Cache", "Decoder", "Table", "derive"]
