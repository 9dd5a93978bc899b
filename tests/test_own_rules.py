"""A rule of the user's own, which no extension has compiled: the backend that needs no kernel of it takes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import backends
from harness import difference, ramp, wave

import fastopt
from fastopt import stages
from fastopt.chain import Stage, stage, tl
from fastopt.optimizers.adam import AdamRule
from fastopt.optimizers.base import Fused
from fastopt.optimizers.radam import RAdamRule
from fastopt.rule import Hyper, Number, Rule, Slot

pytestmark = pytest.mark.contract("fallback")


@stage("m")
def pulled_back(p, g, m, w, step_size):  # type: ignore[no-untyped-def]
    m = tl.fma(w, g - m, m)
    p = tl.where(m > p, p - step_size * m, p)
    return p, g, m


class PulledBackRule(Rule):
    hyper = ("lr",)

    def update(self, h: Hyper) -> tuple[Stage, ...]:
        return (pulled_back,)

    def slots(self, h: Hyper) -> dict[str, Slot]:
        return {"m": Slot("moment")}

    def coefficients(self, h: Hyper, t: Number, carry: Number) -> tuple[Number, ...]:
        return pulled_back.row(w=0.5, step_size=h.lr / t)


class PulledBack(Fused, torch.optim.Optimizer):
    rule = PulledBackRule()

    def __init__(self, params: Any, lr: float = 0.5, *, backend: str | None = None) -> None:
        super().__init__(params, {"lr": lr}, backend=backend)


class Replaced(fastopt.Adam):
    """torch's code for its parent is another rule."""

    rule = PulledBackRule()


@pytest.mark.parametrize("cls", [PulledBack, Replaced])
@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.skipif(not fastopt.backends.available("native"), reason="without the extension nothing is missing in it")
def test_a_rule_that_is_not_compiled_runs_all_the_same(cls: Any, slow: bool) -> None:
    """By the backend that needs no kernel of it, and says so; who asks for another is told what is missing."""

    def make(backend: str | None = None) -> tuple[torch.Tensor, Any]:
        p = torch.nn.Parameter(ramp(9))
        inner = cls([p], lr=0.5, backend=backend)
        return p, fastopt.Lookahead(inner, k=2) if slow else inner

    (p, ours), (q, other) = make(), make("reference")
    for step in range(5):
        p.grad, q.grad = wave((9,), step), wave((9,), step)
        ours.step()
        other.step()
        assert not difference(p.detach(), q.detach())
    assert "no kernel for scale+" in str(fastopt.explain(ours))
    p, native = make("native")
    p.grad = wave((9,), 0)
    with pytest.raises(
        RuntimeError, match=r"pulled_back.* is not compiled into fastopt._C: add its rule to csrc/chains"
    ):
        native.step()


def rows_of(self: Rule, h: Hyper, p: torch.Tensor) -> int:
    return p.shape[0] if p.dim() > 1 else 0


class CentredAdam(fastopt.Adam):
    """torch's code for its parent does not centralise."""

    class _Rule(AdamRule):
        rows = rows_of

    rule = _Rule()


class CentredRAdam(fastopt.RAdam):
    class _Rule(RAdamRule):
        rows = rows_of

    rule = _Rule()


def of_mean_zero() -> torch.Tensor:
    return torch.tensor([[1.0, 2.0, -3.0], [0.5, -0.25, -0.25]])


@pytest.mark.parametrize("backend", backends(["native", "reference"]))
def test_lookahead_keeps_what_the_rule_does_with_gradients(backend: str) -> None:
    p, q = (torch.nn.Parameter(ramp(6).reshape(2, 3)) for _ in range(2))
    ours = fastopt.Lookahead(CentredAdam([p], backend=backend), k=2)
    plain = fastopt.Lookahead(fastopt.Adam([q], backend=backend), k=2)
    for _ in range(5):
        p.grad, q.grad = of_mean_zero() + 2.0, of_mean_zero()  # sums and means are exact
        ours.step()
        plain.step()
    assert not difference(p.detach(), q.detach())


@pytest.mark.parametrize("backend", backends(["emulated"]))
@pytest.mark.parametrize("counted", [False, True])
def test_a_kernel_that_was_not_compiled_is_missed_before_anything_changes(backend: str, counted: bool) -> None:
    ps = [torch.nn.Parameter(torch.ones(2, 3, dtype=dtype)) for dtype in (torch.float64, torch.float32)]

    def fails(optimizer: Any, match: str) -> None:
        before = [(p.detach().clone(), dict(optimizer.state[p])) for p in ps]
        counts = [int(optimizer.state[p].get("step", 0)) for p in ps]
        for p in ps:
            p.grad = of_mean_zero().to(p.dtype)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=match):
                optimizer.step()
        for p, (was, state), count in zip(ps, before, counts, strict=True):
            assert not difference(p.detach(), was)
            assert list(optimizer.state[p]) == list(state)
            assert int(optimizer.state[p].get("step", 0)) == count

    own = {"capturable": True} if counted else {}
    fails(CentredAdam(ps, backend=backend, **own), r"no kernel for scale\+shrink\+adam with centralised gradients")
    there = CentredRAdam(ps, backend=backend, decoupled_weight_decay=True, weight_decay=0.1, **own)
    for p in ps:
        p.grad = of_mean_zero().to(p.dtype)
    there.step()
    there.param_groups[0].update(decoupled_weight_decay=False)  # another chain for the same state
    fails(there, "not compiled for centralised gradients")


class MisnamedRule(AdamRule):
    def twin(self, h: Hyper) -> tuple[str, dict[str, Number]]:
        return "adamant", {"lr": h.lr}


class Misnamed(fastopt.Adam):
    rule = MisnamedRule()


@pytest.mark.skipif(not fastopt.backends.available("native"), reason="without the extension nobody asks for twins")
def test_a_twin_that_is_not_listed_is_named() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"MisnamedRule.twin\(\) says 'adamant'.*ROW_RULES.*RowRules in csrc/rows.h"):
        Misnamed([p]).step()


@pytest.mark.parametrize("backend", backends(["native", "reference", "emulated"]))
def test_a_learning_rate_that_is_no_number_is_a_type_error(backend: str) -> None:
    """As in torch, though Python can make a number of it."""
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = fastopt.SGD([p], lr=0.1, backend=backend)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = "0.1"
    with pytest.raises(TypeError):
        optimizer.step()


class KeepsMaximum(AdamRule):
    """Of whose states the stages use some only."""

    def slots(self, h: Hyper) -> dict[str, Slot]:
        return {"m": Slot("exp_avg"), "v": Slot("exp_avg_sq"), "vmax": Slot("max_exp_avg_sq")}


class Keeping(fastopt.Adam):
    rule = KeepsMaximum()


@pytest.mark.parametrize("backend", backends(["native", "emulated", "reference"]))
def test_a_state_that_no_stage_uses_is_made_all_the_same(backend: str) -> None:
    p = torch.nn.Parameter(ramp(5))
    optimizer = fastopt.Adam([p], backend=backend)
    p.grad = wave((5,), 0)
    optimizer.step()
    keeping = Keeping([p], backend=backend)
    keeping.state[p] = {**optimizer.state[p]}
    for t in range(3):
        p.grad = wave((5,), t)
        keeping.step()
    assert not keeping.state[p]["max_exp_avg_sq"].any()
    assert keeping.state[p]["step"] == 4


class CountsTicksRule(Rule):
    hyper = ("lr",)
    counters = {"ticks": 0.0}  # noqa: RUF012

    def update(self, h: Hyper) -> tuple[Stage, ...]:
        return (stages.sgd,)

    def slots(self, h: Hyper) -> dict[str, Slot]:
        return {}

    def coefficients(self, h: Hyper, t: Number, carry: Number) -> tuple[Number, ...]:
        return stages.sgd.row(minus_lr=-h.lr / t)


class CountsTicks(Fused, torch.optim.Optimizer):
    rule = CountsTicksRule()

    def __init__(self, params: Any, lr: float = 1.0, *, backend: str | None = None) -> None:
        super().__init__(params, {"lr": lr}, backend=backend)


@pytest.mark.parametrize("backend", backends(["native", "emulated", "reference"]))
def test_a_counter_of_another_name_goes_on_in_float32(backend: str) -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = CountsTicks([p], backend=backend)
    optimizer.state[p]["ticks"] = torch.tensor(4)
    for ticks in (5, 6):
        p.grad = torch.ones(3)
        optimizer.step()
        assert optimizer.state[p]["ticks"].dtype == torch.float32
        assert optimizer.state[p]["ticks"] == ticks
    assert not difference(p, torch.full((3,), -1.0).div(5) - torch.ones(3).div(6))
