"""Runs an optimizer and its oracle over the same scenario and compares every number of every step, bit for bit.

A scenario lists parameters (shape, memory layout, gradient layout, steps without a gradient, group); values follow from
their position in it, so the oracle gets the same ones in contiguous memory. Every parameter lies in a larger buffer of
sentinels: a write outside the parameter is found too.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import os
import pathlib
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import oracles
import torch
from cases import Case
from torch import Tensor

ROOT = pathlib.Path(__file__).resolve().parents[1]
SENTINEL = 7.0
INT_VIEW = {
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


@dataclass(frozen=True)
class Spec:
    """One parameter of a scenario."""

    shape: tuple[int, ...]
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    kind: str = "normal"
    absent: frozenset[int] = frozenset()
    group: int = 0


@dataclass(frozen=True)
class Scenario:
    id: str
    specs: tuple[Spec, ...]
    steps: int = 8
    overrides: Callable[[Case], list[dict[str, Any]]] = field(default=lambda case: [{}])


def strides_for(layout: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a tensor of this shape in the named layout."""
    if layout == "transposed":
        return tuple(reversed(strides_for("contiguous", tuple(reversed(shape)))))
    if layout == "channels_last":
        return torch.empty(shape).to(memory_format=torch.channels_last).stride()
    strides, step = [], {"every_other": 2, "gaps": 1}.get(layout, 1)
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1) + (3 if layout == "gaps" else 0)
    if layout == "odd_ones":
        strides = [77 if n == 1 else s for n, s in zip(reversed(shape), strides, strict=True)]
    return tuple(reversed(strides))


def place(value: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """The value in the named layout, and the buffer of sentinels it lies in."""
    if layout == "expanded":
        return value[:1].clone().expand_as(value), value
    offset = {"offset1": 1, "offset3": 3, "contiguous": 0}.get(layout, 16)
    strides = strides_for(layout, value.shape)
    last = sum((n - 1) * s for n, s in zip(value.shape, strides, strict=True)) if value.numel() else 0
    base = torch.full((offset + last + 20,), SENTINEL, dtype=value.dtype, device=value.device)
    view = base.as_strided(value.shape, strides, offset)
    view.copy_(value)
    return view, base


def outside(view: Tensor, base: Tensor) -> Tensor:
    """What the buffer holds outside the view."""
    mask = torch.ones(base.shape, dtype=torch.bool, device=base.device)
    if view.numel():
        mask.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    return base[mask]


def _specials(dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    values = [0.0, -0.0, 1.0, -1.0, 0.3, -2.5, 1e30, -1e30, 1e-30, 1e-19, math.nan, math.inf, -math.inf, info.max,
              -info.max, info.tiny, -info.tiny, info.tiny * info.eps, -3 * info.tiny * info.eps, 1e19]  # fmt: skip
    return torch.tensor(values, dtype=torch.float64).to(dtype)


@functools.lru_cache(maxsize=1024)  # a scenario's are the same for every case
def values(spec: Spec, seed: int, dtype: torch.dtype, what: str) -> Tensor:
    """The parameter (what = "p") or one step's gradient (what = "g"), contiguous."""
    if spec.kind == "special":
        all_values = _specials(dtype)
        n = len(all_values)
        index = torch.arange(n * n)
        # Every parameter value meets every gradient value, and a different history of gradients in each row.
        picked = index // n if what == "p" else (index + (seed % 97) * (1 + index // n)) % n
        return all_values[picked]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(spec.shape, generator=generator, dtype=torch.float64)
    if what == "g":
        x = x * torch.exp2(torch.randint(-8, 4, spec.shape, generator=generator).double())
        if spec.grad_layout == "expanded":
            x = x[:1].expand(spec.shape)
    return x.to(dtype).contiguous()


def ramp(n: int) -> Tensor:
    return torch.linspace(-1, 1, n)


def wave(shape: Any, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A gradient, another one at every step."""
    return torch.cos(torch.arange(torch.Size(shape).numel(), dtype=torch.float64) * 0.7 + step).reshape(shape).to(dtype)


def python(script: str, **environment: str) -> str:
    """What the script prints, which must end well, in a process of its own on one thread."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=variables, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr or f"exit status {result.returncode}"
    return result.stdout


class Built:
    """The parameters of a scenario, in their layouts or (for an oracle) contiguous, on `device`."""

    def __init__(
        self, scenario: Scenario, case: Case, dtype: torch.dtype, contiguous: bool = False, device: str = "cpu"
    ) -> None:
        self.scenario, self.dtype, self.contiguous, self.device = scenario, dtype, contiguous, device
        self.params: list[torch.nn.Parameter] = []
        self.bases: list[Tensor] = []
        overrides = scenario.overrides(case)
        members: list[list[torch.nn.Parameter]] = [[] for _ in overrides]
        for i, spec in enumerate(scenario.specs):
            value = values(spec, 1000 + i, dtype, "p").to(device)
            view, base = place(value, "contiguous" if contiguous else spec.layout)
            p = torch.nn.Parameter(view)
            self.params.append(p)
            self.bases.append(base)
            members[spec.group].append(p)
        self.groups = [{"params": m, **o} for m, o in zip(members, overrides, strict=True)]
        self.order = [p for m in members for p in m]

    def set_grads(self, step: int) -> None:
        for i, (spec, p) in enumerate(zip(self.scenario.specs, self.params, strict=True)):
            if step in spec.absent:
                p.grad = None
                continue
            g = values(spec, 10_000 + 100 * i + step, self.dtype, "g").to(self.device)
            if self.contiguous:
                p.grad = g
            elif i % 2 and p.grad is not None and spec.grad_layout != "expanded":
                p.grad.copy_(g)  # the same memory again, as with zero_grad(set_to_none=False)
            else:
                p.grad = place(g, spec.grad_layout)[0]

    def assert_nothing_else_written(self) -> None:
        for spec, p, base in zip(self.scenario.specs, self.params, self.bases, strict=True):
            assert (outside(p.detach(), base) == SENTINEL).all(), f"{spec}: written outside the parameter"


Snapshot = list[tuple[Tensor, dict[str, Tensor]]]


def snapshot(params: Sequence[Tensor], states: Sequence[dict[str, Any]]) -> Snapshot:
    return [
        (p.detach().clone(memory_format=torch.contiguous_format),
         {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in s.items() if isinstance(v, Tensor)})
        for p, s in zip(params, states, strict=True)
    ]  # fmt: skip


def states_in_order(optimizer: torch.optim.Optimizer, count: int) -> list[dict[str, Any]]:
    """Every parameter's states as the checkpoint names them (Lookahead's slow weights included)."""
    state = optimizer.state_dict()["state"]
    return [state.get(i, {}) for i in range(count)]


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def trace(optimizer: torch.optim.Optimizer, built: Built, threads: int = 1) -> list[Snapshot]:
    """What the optimizer makes of the scenario: parameters and states after every step."""
    result = []
    for step in range(built.scenario.steps):
        built.set_grads(step)
        with torch_threads(threads):
            optimizer.step()
        result.append(snapshot(built.order, states_in_order(optimizer, len(built.order))))
    return result


def oracle_trace(case: Case, scenario: Scenario, dtype: torch.dtype) -> list[Snapshot]:
    """The defined values: parameters and states after every step."""
    key = (case.id, scenario, dtype)
    if key not in _traces:
        if len(_traces) > 3:
            _traces.clear()
        _traces[key] = _oracle_trace(case, scenario, dtype)
    return _traces[key]


_traces: dict[Any, list[Snapshot]] = {}


def _oracle_trace(case: Case, scenario: Scenario, dtype: torch.dtype) -> list[Snapshot]:
    built = Built(scenario, case, dtype, contiguous=True)
    low = dtype in (torch.bfloat16, torch.float16)
    oracle = (case.low_precision_oracle if low else case.oracle)(built.groups)
    result = []
    for step in range(scenario.steps):
        built.set_grads(step)
        oracle.step()
        states = [oracles.states_of(oracle, p) for p in built.order]
        result.append(snapshot(built.order, states))
    return result


def difference(got: Tensor, want: Tensor, signed_zeros: bool = True) -> str:
    """'' when equal bit for bit (NaN equals NaN), else what differs."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{got.dtype} {tuple(got.shape)} instead of {want.dtype} {tuple(want.shape)}"
    kind = INT_VIEW.get(got.dtype)
    if torch.equal(got.view(kind), want.view(kind)) if kind else torch.equal(got, want):
        return ""
    unequal = got.view(kind) != want.view(kind) if kind and signed_zeros else got != want
    wrong = ~(got.isnan() & want.isnan()) & unequal
    if not wrong.any():
        return ""
    at = int(wrong.flatten().nonzero()[0])
    values = f"{got.flatten()[at].item()!r} instead of {want.flatten()[at].item()!r}"
    return f"{int(wrong.sum())} of {got.numel()} differ, first [{at}]: {values}"


def assert_same(
    got: list[Snapshot], want: list[Snapshot], names: Sequence[Any] | None = None, signed_zeros: bool = True
) -> None:
    """Equality of two traces: parameters, state keys and their order, states."""
    for step, (a, b) in enumerate(zip(got, want, strict=True)):
        for i, ((p, s), (q, r)) in enumerate(zip(a, b, strict=True)):
            where = f"step {step + 1}, parameter {i} {names[i] if names else tuple(p.shape)}"
            assert not (text := difference(p, q, signed_zeros)), f"{where}: {text}"
            if r or s:
                r = {k: v for k, v in r.items() if k in s or k != "slow_param" or not torch.equal(v, q)}
                assert list(s) == list(r), f"{where}: states {list(s)} instead of {list(r)}"
            for key in s:
                assert not (text := difference(s[key], r[key], signed_zeros)), f"{where}, {key}: {text}"


def check(case: Case, scenario: Scenario, dtype: torch.dtype, backend: str, threads: int = 1) -> None:
    """The case on this backend takes exactly the oracle's values through the scenario."""
    built = Built(scenario, case, dtype)
    got = trace(case.make(built.groups, backend), built, threads)
    order = [s for g in range(len(built.groups)) for s in scenario.specs if s.group == g]
    assert_same(got, oracle_trace(case, scenario, dtype), order, signed_zeros=not case.interpolates_fully)
    built.assert_nothing_else_written()


def signature_has(case: Case, *names: str) -> bool:
    cls = oracles.Ranger if case.name == "Ranger" else getattr(torch.optim, case.name)
    return all(n in inspect.signature(cls).parameters for n in names)


def param(*shape: int, **kwargs: Any) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(*shape, **kwargs))


def outcome(action: Callable[[], Any]) -> tuple[type, str] | None:
    """What is raised (warnings included), or None."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            action()
        except (Exception, Warning) as error:  # the type is what the tests compare
            return type(error), str(error)
    return None


def train(optimizer: Any, ps: list[Any], start: int, stop: int) -> None:
    """Steps with a gradient for each parameter that follows from the step."""
    for step in range(start, stop):
        for i, p in enumerate(ps):
            p.grad = wave(p.shape, step + i)
        optimizer.step()


def same(a: list[Any], b: list[Any]) -> bool:
    return all(not difference(p.detach(), q.detach()) for p, q in zip(a, b, strict=True))
