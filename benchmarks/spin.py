"""A kernel that keeps its blocks' multiprocessors busy for a while, as a collective's does. Needs Triton and CUDA."""

import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]


@triton.jit
def spin(nanoseconds):  # type: ignore[no-untyped-def]
    """Returns after so long by the device's clock."""
    start = tl.extra.cuda.globaltimer()
    now = start
    while now - start < nanoseconds:
        now = tl.extra.cuda.globaltimer()
