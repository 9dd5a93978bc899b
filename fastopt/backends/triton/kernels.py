"""Chains as Triton kernels: the stages' own functions, compiled, strung together by a few lines of generated source.

`kernel(chain)` mints one kernel per chain. What differs between its launches (dtypes, alignment, strides, row means) is
a compile-time constant, what differs between steps lies in device memory, so nothing is ever recompiled for a value. A
program updates one item of the map: a chunk of a tensor, or one leading slice where the gradient is centralised.

Triton reads the source of a function and looks its names up in the function's globals, so minting is binding: each
stage is copied with `tl` meaning Triton's language, and the kernel's cache key covers the stage's text. The text that
loads, calls the stages and stores is generated, and kept where tracebacks and Triton find it. Triton is imported by
the functions that need it, never by this module.

Functions below whose arguments carry no annotations run on the device.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import linecache
from functools import cache
from types import FunctionType, ModuleType
from typing import Any

from fastopt.chain import Chain, bind, tl

P, LENGTH, SLICE, FIRST_ITEM, SIZES = 0, 5, 6, 7, 8
"""Columns of a table row: addresses of p and up to four states, elements, elements of a slice, first item; then, where
memory is strided, sizes from the innermost outwards and the strides of p, of the gradient, and of each state."""

FLAT, ROWS, SPLIT = 0, 1, 2
"""Items: chunks of a tensor | whole leading slices | chunks of leading slices, summed in a launch before."""

OPTIONS: dict[str, Any] = {"enable_fp_fusion": False, "num_stages": 1}
"""For every launch: multiply-adds are those that the stages write; no software pipeline through shared memory."""


def divide(a, b):
    """One rounding for both types: tl.div_rn is float32's alone, and float64's plain division is IEEE's."""
    if b.dtype == tl.float64:
        return a / b
    else:  # noqa: RET505 the other half of a compile-time choice
        return tl.div_rn(a, b)


def root(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:  # noqa: RET505
        return tl.sqrt_rn(x)


def add_exactly(hi, lo, x, y):
    """Add two unevaluated sums of float64 without losing a rounding error (Knuth's two-sum)."""
    s = hi + x
    z = s - hi
    return s, lo + y + ((hi - (s - z)) + (x - z))


def span(entry, part, MEAN, CHUNK):
    """Where an item starts in its tensor, how many elements it has, and the first item of its slice."""
    if MEAN == FLAT:
        start = part.to(tl.int64) * CHUNK
        n = tl.minimum(tl.load(entry + LENGTH) - start, CHUNK).to(tl.int32)
        first = part
    elif MEAN == ROWS:
        n = tl.load(entry + SLICE).to(tl.int32)
        start = part.to(tl.int64) * n
        first = part
    else:
        length = tl.load(entry + SLICE)
        chunks = ((length + CHUNK - 1) // CHUNK).to(tl.int32)
        begin = (part % chunks).to(tl.int64) * CHUNK
        start = (part // chunks).to(tl.int64) * length + begin
        n = tl.minimum(length - begin, CHUNK).to(tl.int32)
        first = part - part % chunks
    return start, n, first


def pointer(address, dtype, start, ALIGNED, RANK):
    """The item's first element. Only a hint on the pointer itself makes accesses 16 bytes wide."""
    at = tl.load(address).to(tl.pointer_type(dtype))
    if RANK == 0:
        at = at + start
    if ALIGNED:
        at = tl.multiple_of(at, 16)
    return at


def elements(at, entry, stream, start, offsets, RANK):
    """Pointers to elements of an item; in a strided tensor they are counted in the order of its indices."""
    if RANK == 0:
        return at + offsets
    else:  # noqa: RET505
        rest = start + offsets
        moved = tl.zeros_like(rest)
        for d in tl.static_range(RANK):
            size = tl.load(entry + SIZES + d)
            moved += rest % size * tl.load(entry + SIZES + RANK * (stream + 1) + d)
            rest = rest // size
        return at + moved


def gradient(at, mask, scale, T):
    g = tl.load(at, mask).to(T)
    if scale is not None:
        g = tl.div_rn(g, scale)
    return g


def narrow(x, dtype):
    """x in another dtype, rounded once. From float64 to 16 bits Triton rounds to float32 first: do that to odd."""
    if (x.dtype == tl.float64) and ((dtype == tl.bfloat16) or (dtype == tl.float16)):
        single = x.to(tl.float32)
        bits, back = single.to(tl.int32, bitcast=True), single.to(tl.float64)
        kept = (back == x) | (x != x) | (bits & 1 != 0) | (bits & 0x7F800000 == 0x7F800000)
        odd = tl.where((back < x) == (x > 0), bits + 1, bits - 1)
        return tl.where(kept, bits, odd).to(tl.float32, bitcast=True).to(dtype)
    else:  # noqa: RET505
        return x.to(dtype)


def tile(at, entry, start, offsets, n, scale, T, RANK):
    """The gradients of a tile as float64, zero from n on."""
    mask = offsets < n
    g = gradient(elements(at, entry, 1, start, offsets, RANK), mask, scale, T)
    return tl.where(mask, g, 0).to(tl.float64)


def slice_sum(at, entry, start, n, scale, T, ALIGNED, RANK, BLOCK):
    """The sum of n gradients as a pair (sum, error): the same, rounded, in whatever order they are added.

    The last elements, fewer than 16, come first: every warp reads them, and the reduction over warps at the end makes
    sure that all have, before one of them writes an unscaled gradient back.
    """
    hi = tl.zeros([BLOCK], tl.float64)
    lo = tl.zeros([BLOCK], tl.float64)
    whole = n
    if ALIGNED:
        whole = tl.multiple_of(n // 16 * 16, 16)
        last = tile(at, entry, start, whole + tl.arange(0, 16), n, scale, T, RANK)
        x, y = tl.reduce((last, tl.zeros([16], tl.float64)), 0, add_exactly)
    for i in range(0, whole, BLOCK):
        g = tile(at, entry, start, i + tl.arange(0, BLOCK), whole, scale, T, RANK)
        hi, lo = add_exactly(hi, lo, g, 0.0)
    total, error = tl.reduce((hi, lo), 0, add_exactly)
    if ALIGNED:
        total, error = add_exactly(total, error, x, y)
    return total, error


def partial_sum(partials, first, count):
    """The sum of a slice whose chunks were summed before."""
    hi = tl.zeros([128], tl.float64)
    lo = tl.zeros([128], tl.float64)
    for i in range(0, count, 128):
        k = i + tl.arange(0, 128)
        mask = k < count
        at = partials + 2 * (first + k)
        hi, lo = add_exactly(hi, lo, tl.load(at, mask, 0.0), tl.load(at + 1, mask, 0.0))
    return tl.reduce((hi, lo), 0, add_exactly)


def mean(total, error, count, T):
    """Rounded once. Infinities leave NaN in the error; the plain sum is then right."""
    exact = total + error
    return (tl.where(exact == exact, exact, total) / count.to(tl.float64)).to(T)


def sum_slices(
    table,
    items,
    grads,
    rows,
    partials,
    grad_scale,
    grads_at,
    rows_at,
    T: tl.constexpr,
    G: tl.constexpr,
    ALIGNED: tl.constexpr,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The launch before an update with SPLIT items: the sum of each item."""
    program = tl.program_id(0)
    tensor = tl.load(items + 2 * program)
    part = tl.load(items + 2 * program + 1)
    if tl.load(rows + rows_at + tensor) >= 0:
        entry = table + tensor.to(tl.int64) * WIDTH
        start, n, _ = span(entry, part, SPLIT, CHUNK)
        scale = None
        if grad_scale is not None:
            scale = tl.load(grad_scale).to(T)
        at = pointer(grads + grads_at + tensor, G, start, ALIGNED, RANK)
        total, error = slice_sum(at, entry, start, n, scale, T, ALIGNED, RANK, BLOCK)
        tl.store(partials + 2 * program, total)
        tl.store(partials + 2 * program + 1, error)


_UPDATE = """\
def update({pointers}, mask, shift, divisor, {values}, T, {types}):
    {loads}
    g = p
    if G is not None:
        g = gradient(g_at, mask, divisor, T)
        if divisor is not None:
            tl.store(g_at, narrow(g, G), mask)
        if shift is not None:
            g = g - shift
    {stages}
    {stores}
"""

_KERNEL = """\
def {name}(
    table, items, grads, rows, coefficients, partials, grad_scale, found_inf, grads_at, rows_at, coefficients_at,
    T: tl.constexpr, {typed}, FIRST: tl.constexpr, ALIGNED: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr,
    MEAN: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    tensor = tl.load(items + 2 * program)
    part = tl.load(items + 2 * program + 1)
    row = tl.load(rows + rows_at + tensor)
    if found_inf is not None:
        row = tl.where(tl.load(found_inf) == 0, row, -1)
    if row >= 0:
        entry = table + tensor.to(tl.int64) * WIDTH
        start, n, first = span(entry, part, MEAN, CHUNK)
        {bases}
        g_base = p_base
        if G is not None:
            g_base = pointer(grads + grads_at + tensor, G, start, ALIGNED, RANK)
        {coefficients}
        divisor = None
        if grad_scale is not None:
            divisor = tl.load(grad_scale).to(T)
        shift = None
        if (G is not None) and (MEAN == ROWS):
            total, error = slice_sum(g_base, entry, start, n, divisor, T, ALIGNED, RANK, BLOCK)
            shift = mean(total, error, n, T)
        if (G is not None) and (MEAN == SPLIT):
            length = tl.load(entry + SLICE)
            count = ((length + CHUNK - 1) // CHUNK).to(tl.int32)
            total, error = partial_sum(partials, tl.load(entry + FIRST_ITEM) + first, count)
            shift = mean(total, error, length, T)
        whole = n
        if ALIGNED:
            whole = tl.multiple_of(n // 16 * 16, 16)
        if ALIGNED:
            if whole < n:
                offsets = whole + tl.arange(0, 16)
                update({tile}, offsets < n, shift, divisor, {values}, T, {types})
        for i in range(0, whole, BLOCK):
            offsets = i + tl.arange(0, BLOCK)
            update({tile}, offsets < whole, shift, divisor, {values}, T, {types})
"""


def name(chain: Chain) -> str:
    """What profilers and errors call the kernel of a chain."""
    return f"fastopt_{chain.name.replace('+', '_')}"


def source(chain: Chain) -> str:
    """The generated text: one tile of a chain, and the kernel around it.

    The last elements, fewer than 16, come first: after the loop they would keep registers busy during it.
    """
    streams = ["p", "g", *(f"s{k}" for k in range(len(chain.state)))]
    states = list(enumerate(streams[2:]))
    types = [name.upper() for name in streams]
    values = [f"c{k}" for k in range(len(chain.coefficients))]
    calls, slot, value = [], 0, 0
    for stage in chain.stages:
        own = ", ".join(["p", "g", *streams[2 + slot : 2 + slot + len(stage.state)]])
        given = ", ".join([own, *values[value : value + len(stage.coefficients)]])
        calls.append(f"{own} = apply_{stage.name}({given})")
        slot += len(stage.state)
        value += len(stage.coefficients)
    lines: dict[str, list[str]] = {
        "loads": [f"{s} = tl.load({s}_at, mask).to(T)" for s in streams if s != "g"],
        "stages": calls,
        # Without cache hints: an H200 is slower with them (docs/performance.md).
        "stores": [f"tl.store({s}_at, narrow({s}, {s.upper()}), mask)" for s in ("p", *(s for _, s in states))],
        "bases": ["p_base = pointer(entry, P, start, ALIGNED, RANK)"]
        + [f"{s}_base = pointer(entry + {k + 1} + FIRST, {s.upper()}, start, ALIGNED, RANK)" for k, s in states],
        "coefficients": [f"{c} = tl.load(coefficients + coefficients_at + row * {len(values)} + {k})"
                         for k, c in enumerate(values)],
    }  # fmt: skip
    numbers = ["0", "1", *(f"{k + 2} + FIRST" for k, _ in states)]
    words = {
        "name": name(chain),
        "pointers": ", ".join(f"{s}_at" for s in streams),
        "tile": ", ".join(
            f"elements({s}_base, entry, {number}, start, offsets, RANK)"
            for s, number in zip(streams, numbers, strict=True)
        ),
        "values": ", ".join(values),
        "types": ", ".join(types),
        "typed": ", ".join(f"{t}: tl.constexpr" for t in types),
    }
    inner = {key: "\n    ".join(value) for key, value in lines.items()}
    outer = {key: "\n        ".join(value) for key, value in lines.items()}
    return _UPDATE.format(**words, **inner) + "\n\n" + _KERNEL.format(**words, **outer)


@cache
def language() -> ModuleType:
    """Triton's language with `div_rn` and `sqrt_rn` for both types; a module, since Triton accepts only those."""
    import triton.language

    module = ModuleType("fastopt.backends.triton.language")
    vars(module).update(
        __getattr__=lambda name: getattr(triton.language, name),
        div_rn=bind(divide, triton.language, wrap=_jit),
        sqrt_rn=bind(root, triton.language, wrap=_jit),
    )
    return module


def _globals() -> dict[str, Any]:
    """What functions of this module see on the device, beside `tl`."""
    import triton.language

    constants = {name: triton.language.constexpr(value) for name, value in globals().items() if type(value) is int}
    return {"triton_language": triton.language, **constants}  # the interpreter wants the module itself among the names


def _jit(function: FunctionType, **options: Any) -> Any:
    import triton

    function.__globals__.update(_globals())
    return triton.jit(function, **options)


_DEVICE = (span, pointer, elements, gradient, narrow, slice_sum, partial_sum, mean)
_UNSPECIALISED = {
    "do_not_specialize": ["grads_at", "rows_at", "coefficients_at"],
    "do_not_specialize_on_alignment": ["grad_scale", "found_inf"],
}


@cache
def kernel(chain: Chain) -> Any:
    """The kernel of a chain."""
    names: dict[str, Any] = {"__name__": __name__, "tl": language()}
    ours: dict[str, Any] = {}
    for function in _DEVICE:
        names[function.__name__] = bind(function, language(), ours, _jit)
    theirs: dict[str, Any] = {}
    for stage in chain.stages:
        names[f"apply_{stage.name}"] = bind(stage.function, language(), theirs, _jit)
    file, text = f"<fastopt kernel {chain.name}>", source(chain)
    linecache.cache[file] = (len(text), None, text.splitlines(True), file)
    exec(compile(text, file, "exec"), names)
    names["update"] = _jit(names["update"])
    return _jit(names[name(chain)], **_UNSPECIALISED)


@cache
def sums() -> Any:
    """The kernel that sums chunks of slices, before an update with SPLIT items."""
    options = {key: [n for n in names if n != "coefficients_at"] for key, names in _UNSPECIALISED.items()}
    return bind(sum_slices, language(), wrap=lambda f: _jit(f, **options if f.__name__ == "sum_slices" else {}))
