"""The stages as plain torch code: any device, any layout; the oracle that the kernels are held to.

The language a stage sees as ``tl`` is a handful of torch functions, each one correctly rounded operation. torch's own
``addcmul`` and ``add(alpha=)`` are used for ``fma`` where a probe proves them fused on this device; elsewhere an exact
emulation in float64 (about 40 times slower) takes their place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from fastopt.chain import Chain, bind


def why_not(device: str = "cpu") -> str:
    return ""


class _Language:
    """What ``tl`` means here. Arguments are tensors of one dtype, or Python floats already rounded to it."""

    class PropagateNan:
        ALL = True

    @staticmethod
    def fma(a: Tensor | float, b: Tensor | float, c: Tensor) -> Tensor:
        if not _has_fma(c.device.type, c.dtype):
            return exact_fma(_tensor(a, c), _tensor(b, c), c)
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return torch.addcmul(c, a, b)
        x, alpha = (a, b) if isinstance(a, Tensor) else (b, a)
        return torch.add(c, x, alpha=alpha)  # type: ignore[arg-type]

    @staticmethod
    def div_rn(a: Tensor | float, b: Tensor | float) -> Tensor:
        like = a if isinstance(a, Tensor) else b
        assert isinstance(like, Tensor)
        # A number as divisor may become a multiplication by its reciprocal on some devices; a tensor does not.
        return torch.div(_tensor(a, like), _tensor(b, like))

    @staticmethod
    def sqrt_rn(x: Tensor) -> Tensor:
        if not has_float64(x.device.type):
            return x.sqrt()
        if x.dtype == torch.float32:  # torch's vectorised sqrt is 1 ulp off for some values
            return x.double().sqrt().float()
        # Tuckerman's test: s is the nearest root exactly if s * (s - ulp) < x <= s * (s + ulp). (One Newton correction
        # instead would round twice, and be wrong just below powers of four.) What those products round away must be
        # representable: of small numbers the root is half the exponents up, which is exact.
        small = x < 2.0**-900
        scaled = torch.where(small, x * 2.0**200, x)
        s = scaled.sqrt()
        below, above = (torch.nextafter(s, s.new_full((), end)) for end in (0.0, torch.inf))
        s = torch.where(
            exact_fma(s, below, -scaled) >= 0, below, torch.where(exact_fma(s, above, -scaled) < 0, above, s)
        )
        return torch.where(x > 0, torch.where(small, s * 2.0**-100, s), x.sqrt())

    @staticmethod
    def maximum(a: Tensor, b: Tensor, propagate_nan: bool) -> Tensor:
        return torch.maximum(a, b)

    @staticmethod
    def abs(x: Tensor) -> Tensor:
        return x.abs()

    @staticmethod
    def where(condition: Tensor | bool, a: Tensor | float, b: Tensor | float) -> Tensor | float:
        """A condition on coefficients alone is a Python bool."""
        if isinstance(condition, Tensor):
            return torch.where(condition, a, b)
        return a if condition else b


def _tensor(x: Tensor | float, like: Tensor) -> Tensor:
    return x if isinstance(x, Tensor) else torch.tensor(x, dtype=like.dtype, device=like.device)


@cache
def _has_fma(device: str, dtype: torch.dtype) -> bool:
    """Whether torch fuses multiply and add on this device, in vector bodies and tails alike."""
    if device == "meta":
        return True
    numbers = torch.Generator().manual_seed(0)
    for n in (1, 7, 33, 1000):
        a, b = (torch.randn(n, dtype=dtype, generator=numbers, device="cpu") for _ in range(2))
        c = -(a * b)  # the sum is then the rounding error of the product: zero unless fused
        want = exact_fma(a, b, c)
        alpha = torch.tensor(1.1, dtype=dtype, device="cpu")
        c_alpha = -(a * alpha)
        want_alpha = exact_fma(a, alpha, c_alpha)
        got = torch.addcmul(c.to(device), a.to(device), b.to(device)).cpu()
        got_alpha = torch.add(c_alpha.to(device), a.to(device), alpha=alpha.item()).cpu()
        if not (torch.equal(got, want) and torch.equal(got_alpha, want_alpha)):
            return False
    return True


@cache
def has_float64(device: str) -> bool:
    """Whether a device computes in float64. Without it (Apple's GPUs) the last place is not defined here."""
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except torch.OutOfMemoryError:  # says nothing of the device, and is not remembered
        raise
    except (TypeError, RuntimeError):
        return False
    return True


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    s = a + b
    z = s - a
    return s, (a - (s - z)) + (b - z)


def _to_odd(s: Tensor, error: Tensor) -> Tensor:
    """s rounded to odd, given its rounding error: a later rounding to fewer bits is then the only one."""
    bits = s.view(torch.int64 if s.dtype == torch.float64 else torch.int32)
    inexact = (error != 0) & (bits & 1 == 0) & s.isfinite()
    # One ulp towards the error: away from zero if the error has the sign of s.
    away = ((error > 0) == (s > 0)) | (s == 0)
    return torch.where(inexact, torch.where(away, bits + 1, bits - 1), bits).view(s.dtype)


def _store(tensor: Tensor, value: Tensor) -> None:
    """With one rounding; torch goes from float64 to 16 bits by way of float32, and rounds there too."""
    if value.dtype == torch.float64 and tensor.dtype.itemsize == 2:
        single = value.float()
        value = _to_odd(single, value - single.double())
    tensor.copy_(value)


def exact_fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c with one rounding, from float64 operations.

    float32: the product is exact in float64 and the sum is rounded to odd. float64: Boldo and Melquiond 2008, with
    Veltkamp's splitting; where an intermediate overflows the plain expression is returned, and of a product below
    2^-969 what would have to be rounded is lost.
    """
    if not has_float64(c.device.type):
        return a * b + c
    if a.dtype == torch.float32:
        product = a.double() * b.double()
        return _to_odd(*_two_sum(product, c.double())).float()
    assert a.dtype == torch.float64, a.dtype
    # Splitting multiplies by 2^27: of a factor near the end of the range a part goes to the other one first.
    product = a * b
    moved = (
        torch.ones_like(product).masked_fill(b.abs() > 2.0**900, 2.0**100).masked_fill(a.abs() > 2.0**900, 2.0**-100)
    )
    x, y = a * moved, b / moved
    high = x * y
    low = _product_error(x, y, high)
    s1, e1 = _two_sum(c, low)
    s2, e2 = _two_sum(high, s1)
    result = s2 + _to_odd(*_two_sum(e2, e1))
    plain = product + c
    zero = torch.where((c == 0) & (a != 0) & (b != 0), product, plain)  # a product too small for float64 has its sign
    result = torch.where(result.isfinite(), torch.where(result == 0, zero, result), plain)
    return torch.where(c.isinf() & a.isfinite() & b.isfinite(), c, result)


def _product_error(a: Tensor, b: Tensor, product: Tensor) -> Tensor:
    a_high, b_high = _upper_half(a), _upper_half(b)
    a_low, b_low = a - a_high, b - b_high
    return a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)


def _upper_half(x: Tensor) -> Tensor:
    scaled = x * 134217729.0  # 2^27 + 1
    return scaled - (scaled - x)


def row_mean(g: Tensor, rows: int) -> Tensor:
    """The mean of each leading slice, shaped to broadcast: summed without error in float64, rounded once."""
    x = g.reshape(rows, -1)
    x = x.double() if has_float64(g.device.type) else x
    n, low = x.shape[1], torch.zeros_like(x[:, :1])
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        s, error = _two_sum(x[:, :half], x[:, half : 2 * half])
        low = low + error.sum(1, keepdim=True)
        x = torch.cat([s, x[:, 2 * half :]], 1)
    total = x + low
    # By a tensor: torch multiplies by the rounded reciprocal of a number, on a GPU.
    mean = torch.where(total.isnan(), x, total) / torch.full_like(x, n)
    return mean.to(g.dtype).reshape(rows, *[1] * (g.dim() - 1))


@cache
def _program(chain: Chain) -> Callable[..., tuple[Tensor, Tensor, list[Tensor]]]:
    functions = [(bind(stage.function, _Language), len(stage.state), len(stage.coefficients)) for stage in chain.stages]

    def run(p: Tensor, g: Tensor, state: list[Tensor], values: Sequence[float]) -> tuple[Tensor, Tensor, list[Tensor]]:
        done: list[Tensor] = []
        at = 0
        for function, slots, n in functions:
            own = state[len(done) : len(done) + slots]
            p, g, *own = function(p, g, *own, *values[at : at + n])
            done += own
            at += n
        return p, g, done

    return run


@torch.no_grad()
def launch(chain: Chain, p: Tensor, g: Tensor, state: Sequence[Tensor], values: Sequence[float], rows: int) -> None:
    """Apply a chain to one parameter in place; arithmetic in float32 for 16-bit dtypes, one rounding on store."""
    if rows and g.is_complex():
        g = g - torch.complex(row_mean(g.real, rows), row_mean(g.imag, rows))
        rows = 0
    if p.is_complex():
        p, g = torch.view_as_real(p), torch.view_as_real(g)
        state = [torch.view_as_real(s) for s in state]
    compute = p.dtype if p.dtype == torch.float64 else torch.float32
    rounded = torch.tensor(values, dtype=compute).tolist()
    grad = g.to(compute)
    if rows:
        grad = grad - row_mean(grad, rows)
    new_p, _, new_state = _program(chain)(p.to(compute), grad, [s.to(compute) for s in state], rounded)
    _store(p, new_p)
    for tensor, value in zip(state, new_state, strict=True):
        _store(tensor, value)


def fma_is_fused(device: str = "cpu") -> dict[str, bool]:
    """For `fastopt info`: whether torch's own multiply-add serves, per dtype."""
    return {str(dtype).removeprefix("torch."): _has_fma(device, dtype) for dtype in (torch.float32, torch.float64)}
