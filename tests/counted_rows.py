"""The coefficient rows that the Triton backend makes where the steps are counted, read after a step."""

from __future__ import annotations

import itertools
import math
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import Case
from test_device_steps import counted
from test_rows import STEPS, carries, has_carry

from fastopt.backends import triton
from fastopt.setting import PULL, Row, Setting

ROOTS = ("sqrt_bc2", "rect")
"""Coefficients that end in a root. A device has the correctly rounded one; libm's pow(x, 0.5) is an ulp off at most."""


class Shaken(float):
    """A step t whose powers come out so many ulps away from libm's, those of t + 1 so many."""

    def __new__(cls, value: float, now: int, after: int) -> Shaken:  # noqa: PYI034 typing.Self is newer than 3.10
        return super().__new__(cls, value)

    def __init__(self, value: float, now: int, after: int) -> None:
        self.now, self.after = now, after

    def __add__(self, other: float) -> Shaken:
        return Shaken(float(self) + other, self.after, self.after)

    def __mul__(self, other: float) -> Shaken:
        return Shaken(float(self) * other, self.now, self.after)

    def __rmul__(self, other: float) -> Shaken:
        return Shaken(other * float(self), self.now, self.after)

    def __rpow__(self, base: float, mod: None = None) -> float:
        x = base ** float(self)
        for _ in range(abs(self.now)):
            x = math.nextafter(x, math.inf if self.now > 0 else 0.0)
        return x


def shaken(setting: Setting, t: int, carry: float, asked: bool, reach: int) -> list[Row]:
    """The rows that powers within `reach` ulp of libm's lead to: everything after the powers is IEEE arithmetic."""
    shifts = itertools.product(range(-reach, reach + 1), repeat=2)
    return [setting.at(Shaken(t, *shift), carry, True, asked) for shift in shifts]


def near(got: float, rows: list[Row], i: int) -> bool:
    """Whether a coefficient is that of one of these rows."""
    wanted = {row.coefficients[i] for row in rows}
    if rows[0].chain.coefficients[i].endswith(ROOTS):
        wanted |= {math.nextafter(value, end) for value in wanted for end in (-math.inf, math.inf)}
    return got in wanted


@dataclass
class Taken:
    """What a step does to one parameter."""

    chain: str
    coefficients: list[float]


class Counted:
    """A case whose parameters are at the steps `STEPS`, each at its own, and one more that has no gradient."""

    def __init__(self, case: Case, device: str, asked: bool, dtype: torch.dtype = torch.float64) -> None:
        self.params = [torch.nn.Parameter(torch.ones(3, dtype=dtype, device=device)) for _ in (0, *STEPS)]
        self.optimizer = case.make(self.params, "triton", **counted(case))
        self._give_gradients()
        self.optimizer.step()  # makes the state
        engine = self.optimizer.engine()
        self.group = self.optimizer.param_groups[0]
        self.setting: Setting = engine.settings.of(self.group)
        self.before = [1.0, *carries(self.setting, STEPS, True)]
        for t, carry, p in zip((1, *STEPS), self.before, self.params, strict=True):
            state = self.optimizer.state[p]
            state["step"].fill_(t - 1)
            if has_carry(self.setting):
                state["mu_product"].fill_(carry)
        if "lookahead_step" in self.group:
            self.group["lookahead_step"].fill_(self.group["lookahead_k"] - 1 if asked else 0)
        (self.plan,) = engine._plans.values()
        self.asked = asked or self.group.get("lookahead_k") == 1

    def _give_gradients(self) -> None:
        for p in self.params:
            p.grad = torch.zeros_like(p)

    def step(self, monkeypatch: pytest.MonkeyPatch) -> list[Taken | None]:
        """What happens to each parameter; to the first, without a gradient, perhaps nothing."""
        self._give_gradients()
        self.params[0].grad = None
        found: list[Taken | None] = [None] * len(self.params)

        def bound(plan: Any, *update: Any) -> list[Any]:
            return [(types.SimpleNamespace(start=lambda bound: read(*update)), None)]

        def read(bucket: Any, chain: Any, first: int, aligned: bool, grads: Any, *made: Any) -> None:
            n, width, (rows, values, _) = len(bucket.entries), len(chain.coefficients), made
            table = values.tensor[values.at : values.at + n * width].reshape(n, width).tolist()
            order = [next(i for i, p in enumerate(self.params) if p is entry.owner) for entry in bucket.entries]
            for k, number in zip(order, rows.tensor[rows.at : rows.at + n].tolist(), strict=True):
                assert number < 0 or found[k] is None, "a parameter takes one path"
                if number >= 0:
                    found[k] = Taken(chain.name, table[number])

        with monkeypatch.context() as patch:
            patch.setattr(triton.plan.TritonPlan, "_bound", bound)
            self.optimizer.step()
        return found

    def check(self, found: list[Taken | None], reach: int) -> None:
        """Each row against the host's, whose powers may be off by up to `reach` ulp."""
        pulls = self.setting.rule.slow is not None and not self.setting.rule.period(self.setting.h) and self.asked
        assert (found[0] is not None) == pulls
        if found[0] is not None:
            assert found[0] == Taken(PULL.name, list(self.setting.at(None, 0.0, True, True).coefficients))
        for t, carry, taken, p in zip(STEPS, self.before[1:], found[1:], self.params[1:], strict=True):
            want = self.setting.at(float(t), carry, True, self.asked)
            rows = shaken(self.setting, t, carry, self.asked, reach)
            assert taken is not None
            assert taken.chain == want.chain.name
            for k, value in enumerate(taken.coefficients):
                assert near(value, rows, k), (t, want.chain.coefficients[k], value, want.coefficients[k])
            state = self.optimizer.state[p]
            assert state["step"].item() == torch.tensor(float(t), dtype=state["step"].dtype).item()
            if has_carry(self.setting):
                assert state["mu_product"].item() in {row.carry for row in rows}
        assert self.optimizer.state[self.params[0]]["step"].item() == 0
