"""Which dimensions of inputs are the height and width of images (or of latents, or frames of a video)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

Places = frozenset[tuple[int, int]]  # dimensions of inputs: (index of the input, dimension)


def image_sizes(inputs: Sequence[Tensor]) -> Places:
    """The dimensions from the third on of real inputs `[b, c, h, w]` or `[b, c, frames, h, w]`.

    A model computes windows, patches and strides from them, so that open sizes make its trace long (minutes for a
    Swin), and they become its number of tokens, which its tables of positions fix anyway. A size that another input has
    as its batch or sequence is no image's: a mask `[b, 1, s, s]` beside tokens `[b, s]`.
    """
    out = []
    for k, x in enumerate(inputs):
        lengths = {n for j, other in enumerate(inputs) if j != k for n in other.shape[:2]}
        if x.dim() > 3 and x.is_floating_point():
            out += [(k, i) for i in range(2, x.dim()) if x.shape[i] not in lengths]
    return frozenset(out)
