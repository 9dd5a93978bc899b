"""The ceilings' kernel in Triton: the streams of an optimizer's step with the arithmetic removed. Imports Triton."""

import triton
import triton.language as tl


@triton.jit
def streams(p, g, a, b, c, STATES: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """Reads all, writes all but g. One subtraction a stream, so that no load is dead and values stay in bounds."""
    first = tl.program_id(0).to(tl.int64) * (BLOCK * BLOCKS)
    for i in tl.static_range(BLOCKS):
        at = first + i * BLOCK + tl.arange(0, BLOCK)
        d = tl.load(g + at)
        x = tl.load(p + at)
        if STATES >= 1:
            u = tl.load(a + at)
        if STATES >= 2:
            v = tl.load(b + at)
        if STATES >= 3:
            w = tl.load(c + at)
        tl.store(p + at, d - x)
        if STATES >= 1:
            tl.store(a + at, (d - u).to(a.dtype.element_ty))
        if STATES >= 2:
            tl.store(b + at, (d - v).to(b.dtype.element_ty))
        if STATES >= 3:
            tl.store(c + at, (d - w).to(c.dtype.element_ty))
