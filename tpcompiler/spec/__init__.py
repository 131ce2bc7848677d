"""The YAML spec: what to shard, over which ranks."""

from tpcompiler.spec.schema import AxisSpec, Override, Section, ShardSpec, Spec, covers, nearest, validate

__all__ = ["AxisSpec", "Override", "Section", "ShardSpec", "Spec", "covers", "nearest", "validate"]
