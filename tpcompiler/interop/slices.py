"""A rank's part of a parameter as torch.distributed.checkpoint sees it: boxes of the whole tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from tpcompiler.errors import TpcError
from tpcompiler.runtime.runs import Run


@dataclass(frozen=True)
class Box:
    """A block of the whole tensor, and where it stands in the rank's part."""

    whole: tuple[Run, ...]
    here: tuple[Run, ...]

    @property
    def chunk(self) -> ChunkStorageMetadata:
        offsets = torch.Size([start for start, _ in self.whole])
        return ChunkStorageMetadata(offsets, torch.Size([stop - start for start, stop in self.whole]))


class Slices(Tensor):
    """A tensor of the whole's shape of which this rank holds some boxes. It shares their memory (`local`).

    It stands where no placement of a DTensor can say what a rank holds; `why` says the reason. It is made for
    checkpoints, and computes nothing: `local` is the rank's part as a plain tensor.
    """

    local: Tensor
    boxes: tuple[Box, ...]
    why: str

    @staticmethod
    def __new__(cls, local: Tensor, boxes: Sequence[Box], shape: Sequence[int], why: str) -> Slices:
        out: Slices = Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=local.dtype, device=local.device)
        out.local, out.boxes, out.why = local.detach(), tuple(boxes), why
        return out

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        first, *rest = args
        if func in _COPIES:
            local = func(first.local, *rest, **(kwargs or {}))
            return cls(local, first.boxes, first.shape, first.why)
        if func is torch.ops.aten.copy_.default and isinstance(rest[0], Slices):
            first.local.copy_(rest[0].local)
            return first
        raise TpcError(f"{func} of a rank's part of a parameter: it is for checkpoints; compute with its `.local`")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Slices({list(self.shape)}, {self.dtype}: {len(self.boxes)} boxes; {self.why})"

    # torch.distributed.checkpoint asks any tensor for these three (torch/distributed/_checkpointable.py)

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                MetadataIndex(fqn, box.chunk.offsets, i),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(box.chunk, properties, self.shape),
            )
            for i, box in enumerate(self.boxes)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [box.chunk for box in self.boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for box in self.boxes:
            if box.chunk.offsets == index.offset:
                part = self.local
                for dim, (start, stop) in enumerate(box.here):
                    part = part.narrow(dim, start, stop - start)
                return part
        raise TpcError(f"{index.fqn}: this rank holds no box at {index.offset}")


_COPIES = (torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)
