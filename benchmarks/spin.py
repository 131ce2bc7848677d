"""Kernels that play a collective's part on a device: they wait, for a wire that several of them share. Needs Triton."""

import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]


@triton.jit
def reserve(nanoseconds, free, until):  # type: ignore[no-untyped-def]
    """The wire's next so many nanoseconds: `free` is when it is free, by the device's clock, `until` when they end."""
    tl.atomic_max(free, tl.extra.cuda.globaltimer())
    tl.store(until, tl.atomic_add(free, nanoseconds.to(tl.int64)) + nanoseconds)


@triton.jit
def spin(until):  # type: ignore[no-untyped-def]
    """Keeps its blocks' multiprocessors busy until then."""
    end = tl.load(until)
    now = tl.extra.cuda.globaltimer()
    while now < end:
        now = tl.extra.cuda.globaltimer()
