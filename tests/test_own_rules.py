"""A rule of the user's own, which no extension has compiled: the backend that needs no kernel of it takes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import difference, ramp, wave

import fastopt
from fastopt.chain import Stage, stage, tl
from fastopt.optimizers.base import Fused
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
