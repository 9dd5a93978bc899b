"""What the optimizers are measured against. Nothing here imports fastopt.

* ``exact_sqrt()``: inside it ``Tensor.sqrt``/``sqrt_`` are correctly rounded, in torch.optim's own code too.
  torch.optim's for-loop inside it is the defined value of every torch-named rule, bit for bit.
* ``TorchLoop``, ``Lookahead``, ``Ranger``: optimizers that compute that value, for contiguous fp32 and fp64 parameters.
* ``LowPrecision``: the same for bf16 and fp16: the fp32 rule on upcast values, every result rounded once.
* ``Textbook``: each rule transcribed from its paper in float64, for accuracy; it shares no code with the ones above.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

SCALAR_STATES = ("step", "mu_product")  # per-parameter scalars, float32 whatever the parameter's dtype


def rounded_sqrt(x: Tensor) -> Tensor:
    """The square root of x, rounded to nearest (torch's own is an ulp off for up to 17% of values)."""
    if x.dtype not in (torch.float32, torch.float64):
        return _torch_sqrt(x)
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.asarray(np.sqrt(x.detach().numpy())))


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as another dtype, to nearest and once: to 16 bits torch goes from float64 by way of float32, rounding there."""
    if x.dtype != torch.float64 or dtype.itemsize > 2:
        return x.to(dtype)
    there = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).double()
    finite = there[there.isfinite()].unique()
    edges = (finite[1:] + finite[:-1]) / 2  # exact; a tie goes to the even one, whose last bit is 0
    above = torch.searchsorted(edges, x.contiguous(), right=True)
    odd = finite.to(dtype).view(torch.int16) & 1 == 1
    tie = (above > 0) & (edges[(above - 1).clamp(min=0)] == x) & odd[above]
    nearest = finite[above - tie.long()]
    end = torch.finfo(dtype).max
    beyond = end + (end - finite[-2]) / 2
    nearest = torch.where(x.abs() >= beyond, torch.inf * x.sign(), nearest)
    return torch.where(x.isnan(), x, torch.where(nearest == 0, nearest.copysign(x), nearest)).to(dtype)


def hard_to_round(dtype: torch.dtype) -> Tensor:
    """float64 numbers on, just above and just below each half way between two of a dtype of 16 bits, and the ends."""
    there = torch.arange(0, 2**15, 7, dtype=torch.int32).to(torch.int16).view(dtype).double()
    finite = there[there.isfinite()]
    half = (finite[1:] + finite[:-1]) / 2
    near = torch.cat([half, half * (1 + 2.0**-40), half * (1 - 2.0**-40), finite])
    ends = torch.tensor([1e-50, 1e-310, 5e-324, 1e39, 1e300, torch.inf, torch.nan], dtype=torch.float64)
    positive = torch.cat([near, ends])
    return torch.cat([positive, -positive]).add(0.0)


_torch_sqrt = torch.Tensor.sqrt


@contextlib.contextmanager
def exact_sqrt() -> Iterator[None]:
    """Make Tensor.sqrt and Tensor.sqrt_ correctly rounded, in every code that runs inside."""
    inherited = [name for name in ("sqrt", "sqrt_") if name not in vars(torch.Tensor)]
    assert len(inherited) == 2, "torch.Tensor.sqrt is patched already"
    torch.Tensor.sqrt = rounded_sqrt  # type: ignore[method-assign]
    torch.Tensor.sqrt_ = lambda x: x.copy_(rounded_sqrt(x))  # type: ignore[method-assign]
    try:
        yield
    finally:
        for name in inherited:
            delattr(torch.Tensor, name)


class TorchLoop:
    """torch.optim's per-tensor loop on the CPU, square roots correctly rounded."""

    def __init__(self, name: str, groups: Any, **kwargs: Any) -> None:
        cls = getattr(torch.optim, name)
        flags = {f: False for f in ("foreach", "fused") if f in inspect.signature(cls).parameters}
        self.inner = cls(groups, **{**kwargs, **flags})
        self.param_groups = self.inner.param_groups
        self.state = self.inner.state

    def step(self) -> None:
        with exact_sqrt():
            self.inner.step()


class Lookahead:
    """Zhang et al. 2019: every k-th step slow += alpha (fast - slow), fast = slow; slow starts as the parameters do.

    One counter per group; a parameter without a gradient is pulled back as well. The interpolation is torch's lerp.
    """

    def __init__(self, inner: Any, k: int = 5, alpha: float = 0.5) -> None:
        self.inner, self.k, self.alpha = inner, k, alpha
        self.param_groups = inner.param_groups
        self.slow: dict[Tensor, Tensor] = {}
        self.steps: list[int] = []

    @property
    def state(self) -> Any:
        return self.inner.state

    def step(self) -> None:
        self.steps += [0] * (len(self.param_groups) - len(self.steps))
        for group in self.param_groups:
            for p in group["params"]:
                self.slow.setdefault(p, p.detach().clone())
        self.inner.step()
        for i, group in enumerate(self.param_groups):
            self.steps[i] += 1
            if self.steps[i] % group.get("lookahead_k", self.k) == 0:
                with torch.no_grad():
                    for p in group["params"]:
                        wide = p if p.dtype == torch.float64 else p.float()
                        alpha = group.get("lookahead_alpha", self.alpha)
                        self.slow[p].copy_(self.slow[p].to(wide.dtype).lerp(wide, alpha))
                        p.copy_(self.slow[p])


def row_mean(g: Tensor) -> Tensor:
    """Mean over every dimension but the first, summed without error in float64 and rounded once."""
    total = _fsum_rows(g.double())
    count = g[0].numel() if g.shape[0] else 1
    return (total / count).to(g.dtype).reshape(-1, *[1] * (g.dim() - 1))


def _fsum_rows(g: Tensor) -> Tensor:
    def exact(row: list[float]) -> float:
        return math.fsum(row) if all(map(math.isfinite, row)) else sum(row)

    return torch.tensor([exact(row.tolist()) for row in g.flatten(1)], dtype=g.dtype)


class Ranger:
    """lessw2020's ranger.py (v20.4.11) with torch's RAdam arithmetic and without its ten defects."""

    def __init__(self, groups: Any, lr: float = 1e-3, alpha: float = 0.5, k: int = 6, n_sma_threshold: float = 5,
                 betas: tuple[float, float] = (0.95, 0.999), eps: float = 1e-5, weight_decay: float = 0,
                 use_gc: bool = True, gc_conv_only: bool = False, *, degenerated_to_sgd: bool = True,
                 maximize: bool = False) -> None:  # fmt: skip
        defaults = {"lr": lr, "alpha": alpha, "k": k, "n_sma_threshold": n_sma_threshold, "betas": betas, "eps": eps,
                    "weight_decay": weight_decay, "use_gc": use_gc, "gc_conv_only": gc_conv_only,
                    "degenerated_to_sgd": degenerated_to_sgd, "maximize": maximize}  # fmt: skip
        groups = list(groups)
        self.param_groups = [
            {**defaults, **g} for g in (groups if isinstance(groups[0], dict) else [{"params": groups}])
        ]
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    s = self.state.setdefault(p, {})
                    if not s:
                        s.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p),
                                 slow_buffer=p.detach().clone())  # fmt: skip
                    self._update(p, p.grad, s, group)

    @staticmethod
    def _update(p: Tensor, g: Tensor, s: dict[str, Tensor], h: dict[str, Any]) -> None:
        beta1, beta2 = h["betas"]
        g = -g if h["maximize"] else g
        if h["use_gc"] and g.dim() > (3 if h["gc_conv_only"] else 1):
            g = g - row_mean(g)
        s["step"] += 1
        t = s["step"].item()
        bc1, bc2 = 1 - beta1**t, 1 - beta2**t
        s["exp_avg"].lerp_(g, 1 - beta1)
        s["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * t * beta2**t / bc2
        rectified = rho > h["n_sma_threshold"]
        if rectified or h["degenerated_to_sgd"]:
            if h["weight_decay"] != 0:
                p.mul_(1 - h["lr"] * h["weight_decay"])
            update = s["exp_avg"] / bc1 * h["lr"]
            if rectified:
                rect = ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) ** 0.5
                update = update * (bc2**0.5 / rounded_sqrt(s["exp_avg_sq"]).add_(h["eps"])) * rect
            p.sub_(update)
        if t % h["k"] == 0:
            s["slow_buffer"].lerp_(p, h["alpha"])
            p.copy_(s["slow_buffer"])


class LowPrecision:
    """A float32 oracle for bf16 or fp16 parameters: upcast, step in float32, round parameters and states once."""

    def __init__(self, make: Callable[[Any], Any], groups: Any) -> None:
        groups = list(groups)
        groups = groups if isinstance(groups[0], dict) else [{"params": groups}]
        self.pairs = [(p, p.detach().float().requires_grad_()) for g in groups for p in g["params"]]
        shadow = dict(self.pairs)
        self.inner = make([{**g, "params": [shadow[p] for p in g["params"]]} for g in groups])
        self.param_groups = groups
        self._round()

    def step(self) -> None:
        for p, shadow in self.pairs:
            shadow.data.copy_(p.data)
            shadow.grad = None if p.grad is None else p.grad.float()
        self.inner.step()
        self._round()

    @torch.no_grad()
    def _round(self) -> None:
        for p, shadow in self.pairs:
            p.copy_(shadow)
            shadow.copy_(p)
            for key, value in self._states(shadow).items():
                if key not in SCALAR_STATES:
                    value.copy_(value.to(p.dtype))

    def _states(self, shadow: Tensor) -> dict[str, Tensor]:
        return states_of(self.inner, shadow)

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        return {
            p: {k: v if k in SCALAR_STATES else v.to(p.dtype) for k, v in self._states(shadow).items()}
            for p, shadow in self.pairs
        }


def states_of(oracle: Any, p: Tensor) -> dict[str, Tensor]:
    """The oracle's states of one parameter; Lookahead's slow weights are one of them, under fastopt's key."""
    states = {k: v for k, v in oracle.state.get(p, {}).items() if isinstance(v, Tensor)}
    if isinstance(oracle, Lookahead) and p in oracle.slow:
        states["slow_param"] = oracle.slow[p]
    return states


# The rules as the papers and torch's documentation state them, in float64. `s` starts empty, t counts from 1.


def _sgd(p: Tensor, g: Tensor, s: dict[str, Any], t: int, h: dict[str, Any]) -> Tensor:
    if h["momentum"] != 0:
        s["buf"] = h["momentum"] * s["buf"] + (1 - h["dampening"]) * g if "buf" in s else g
        g = g + h["momentum"] * s["buf"] if h["nesterov"] else s["buf"]
    return p - h["lr"] * g


def _rmsprop(p: Tensor, g: Tensor, s: dict[str, Any], t: int, h: dict[str, Any]) -> Tensor:
    a = h["alpha"]
    s["v"] = a * s.get("v", 0) + (1 - a) * g * g
    variance = s["v"]
    if h["centered"]:
        s["mean"] = a * s.get("mean", 0) + (1 - a) * g
        variance = variance - s["mean"] ** 2
    d = variance.sqrt() + h["eps"]
    s["buf"] = h["momentum"] * s.get("buf", 0) + g / d
    return p - h["lr"] * s["buf"]


def _adagrad(p: Tensor, g: Tensor, s: dict[str, Any], t: int, h: dict[str, Any]) -> Tensor:
    s["sum"] = s.get("sum", h["initial_accumulator_value"]) + g * g
    return p - h["lr"] / (1 + (t - 1) * h["lr_decay"]) * g / (s["sum"].sqrt() + h["eps"])


def _moments(g: Tensor, s: dict[str, Any], betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
    s["m"] = betas[0] * s.get("m", 0) + (1 - betas[0]) * g
    s["v"] = betas[1] * s.get("v", 0) + (1 - betas[1]) * g * g
    return s["m"], s["v"]


def _adam(p: Tensor, g: Tensor, s: dict[str, Any], t: int, h: dict[str, Any]) -> Tensor:
    m, v = _moments(g, s, h["betas"])
    if h["amsgrad"]:
        v = s["vmax"] = torch.maximum(s.get("vmax", torch.zeros_like(v)), v)
    m_hat, v_hat = m / (1 - h["betas"][0] ** t), v / (1 - h["betas"][1] ** t)
    return p - h["lr"] * m_hat / (v_hat.sqrt() + h["eps"])


def _adamax(p: Tensor, g: Tensor, s: dict[str, Any], t: int, h: dict[str, Any]) -> Tensor:
    b1, b2 = h["betas"]
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    s["u"] = torch.maximum(b2 * s.get("u", torch.zeros_like(g)), g.abs() + h["eps"])
    return p - h["lr"] / (1 - b1**t) * s["m"] / s["u"]


def _nadam(p: Tensor, g: Tensor, s: dict[str, Any], t: int, h: dict[str, Any]) -> Tensor:
    m, v = _moments(g, s, h["betas"])
    mu, mu_next = (h["betas"][0] * (1 - 0.5 * 0.96 ** (i * h["momentum_decay"])) for i in (t, t + 1))
    s["product"] = s.get("product", 1.0) * mu
    d = (v / (1 - h["betas"][1] ** t)).sqrt() + h["eps"]
    return p - h["lr"] * ((1 - mu) / (1 - s["product"]) * g + mu_next / (1 - s["product"] * mu_next) * m) / d


def _radam(p: Tensor, g: Tensor, s: dict[str, Any], t: int, h: dict[str, Any]) -> Tensor:
    m, v = _moments(g, s, h["betas"])
    b1, b2 = h["betas"]
    rho_inf = 2 / (1 - b2) - 1
    rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
    m_hat = m / (1 - b1**t)
    if rho <= h.get("n_sma_threshold", 5):
        return p - h["lr"] * m_hat
    r = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
    return p - h["lr"] * r * m_hat * math.sqrt(1 - b2**t) / (v.sqrt() + h["eps"])


RULES = {"SGD": _sgd, "RMSprop": _rmsprop, "Adagrad": _adagrad, "Adam": _adam, "AdamW": _adam, "Adamax": _adamax,
         "NAdam": _nadam, "RAdam": _radam, "Ranger": _radam}  # fmt: skip


class Textbook:
    """One rule in float64 on one parameter: `update(p, g)` gives the next p. `h` holds the group's hyper-parameters."""

    def __init__(self, name: str, h: dict[str, Any], lookahead: tuple[int, float] | None = None) -> None:
        self.name, self.h, self.t, self.s = name, h, 0, {}
        self.lookahead = (h["k"], h["alpha"]) if name == "Ranger" else lookahead
        self.decoupled = name in ("AdamW", "Ranger") or h.get("decoupled_weight_decay", False)

    def update(self, p: Tensor, g: Tensor) -> Tensor:
        self.t += 1
        p = p.double()
        slow = self.s.setdefault("slow", p)
        g = -g.double() if self.h.get("maximize") else g.double()
        if self.h.get("use_gc") and g.dim() > (3 if self.h["gc_conv_only"] else 1):
            g = g - g.mean(dim=tuple(range(1, g.dim())), keepdim=True)
        decay = self.h["weight_decay"]
        if self.decoupled and self._moves():
            p = p * (1 - self.h["lr"] * decay)
        elif not self.decoupled:
            g = g + decay * p
        new = RULES[self.name](p, g, self.s, self.t, self.h)
        p = new if self._moves() else p
        if self.lookahead and self.t % self.lookahead[0] == 0:
            p = self.s["slow"] = slow + self.lookahead[1] * (p - slow)
        return p

    def _moves(self) -> bool:
        """False only for a Ranger that, like the authors' RAdam, does not move before it can rectify."""
        if self.name != "Ranger" or self.h["degenerated_to_sgd"]:
            return True
        b2 = self.h["betas"][1]
        return 2 / (1 - b2) - 1 - 2 * self.t * b2**self.t / (1 - b2**self.t) > self.h["n_sma_threshold"]
