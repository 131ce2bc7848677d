"""tpcompiler: a plain PyTorch transformer and a short YAML spec in, a tensor-parallel program out."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tpcompiler.api import parallelize as parallelize
    from tpcompiler.api import shard as shard
    from tpcompiler.errors import TpcError as TpcError
    from tpcompiler.generation.call import generate as generate
    from tpcompiler.interop.clip_grads import clip_grad_norm_ as clip_grad_norm_
    from tpcompiler.interop.sharded_state import load_state_dict as load_state_dict
    from tpcompiler.interop.sharded_state import state_dict as state_dict
    from tpcompiler.ops.record import OpRule as OpRule
    from tpcompiler.ops.record import WeightProduct as WeightProduct
    from tpcompiler.ops.table import rule as rule
    from tpcompiler.spec.schema import Spec as Spec
    from tpcompiler.verification.verify import verify as verify
    from tpcompiler.version import __version__ as __version__

# Resolved at first use: emitted programs import `tpcompiler.runtime` and must not pay for, or need, the compiler.
_HOME = {
    "shard": "api",
    "parallelize": "api",
    "generate": "generation.call",
    "clip_grad_norm_": "interop.clip_grads",
    "state_dict": "interop.sharded_state",
    "load_state_dict": "interop.sharded_state",
    "verify": "verification.verify",
    "Spec": "spec",
    "rule": "ops.table",
    "OpRule": "ops.record",
    "WeightProduct": "ops.record",
    "TpcError": "errors",
    "__version__": "version",
}
__all__ = [
    "OpRule",
    "Spec",
    "TpcError",
    "WeightProduct",
    "clip_grad_norm_",
    "generate",
    "load_state_dict",
    "parallelize",
    "rule",
    "shard",
    "state_dict",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tpcompiler' has no attribute {name!r}")
    return getattr(import_module(f"tpcompiler.{_HOME[name]}"), name)
