"""Lookahead where a device counts: the group's own counter, who may read it, and when the host has to count instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import backends
from harness import Snapshot, assert_same, snapshot, wave
from torch import Tensor

import fastopt
from fastopt.engine import Route

pytestmark = pytest.mark.contract("device", "lookahead", optimizers="Lookahead")

EMULATED = pytest.mark.parametrize("backend", backends(["emulated"]))


def made(backend: str, **kwargs: Any) -> tuple[Tensor, fastopt.Lookahead]:
    p = torch.nn.Parameter(torch.ones(9, dtype=torch.float32))
    return p, fastopt.Lookahead(fastopt.Adam([p], lr=0.1, backend=backend, **kwargs), k=3)


def taken(p: Tensor, optimizer: Any) -> list[Snapshot]:
    return [snapshot([p], [optimizer.state[p]])]


def step(p: Tensor, optimizer: Any, at: int) -> None:
    p.grad = wave((9,), at).to(p.dtype)
    optimizer.step()


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
@EMULATED
def test_the_counter_is_float32_whatever_torch_makes_by_default(backend: str, default: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        (p, ours), (q, plain) = made(backend, capturable=True), made("native")
        for at in range(7):
            step(p, ours, at)
            step(q, plain, at)
        count = ours.param_groups[0]["lookahead_step"]
    finally:
        torch.set_default_dtype(before)
    assert (count.dtype, count.item()) == (torch.float32, 7)
    assert torch.equal(p, q)


@EMULATED
def test_a_counter_of_another_dtype_is_taken_as_its_number(backend: str) -> None:
    (p, ours), (q, plain) = made(backend, capturable=True), made("native")
    for at in range(7):
        if at in (0, 4):
            group = ours.param_groups[0]
            group["lookahead_step"] = torch.tensor(int(group["lookahead_step"]))
        step(p, ours, at)
        step(q, plain, at)
    assert torch.equal(p, q)


@pytest.mark.parametrize("overflows", [1.0, 2.0, 8.0])
@EMULATED
def test_any_number_of_overflows_is_one_step_not_taken(backend: str, overflows: float) -> None:
    """Sharded training sums `found_inf` over its processes."""
    p, optimizer = made(backend, capturable=True)
    step(p, optimizer, 0)
    before = taken(p, optimizer)
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.full((), overflows)
    step(p, optimizer, 1)
    assert optimizer.param_groups[0]["lookahead_step"].item() == 1
    assert_same(taken(p, optimizer), before)
    optimizer.found_inf = torch.zeros(())
    step(p, optimizer, 1)
    assert optimizer.param_groups[0]["lookahead_step"].item() == 2


def on_two_devices(optimizer: Any) -> list[bool]:
    """Whether the engine lets a group's kernels count, with both parameters on one device and with one on each."""
    engine, inner = optimizer.engine(), getattr(optimizer, "optimizer", optimizer)
    (group,) = optimizer.param_groups
    engine._routes = {id(p): Route("native", device=True) for p in group["params"]}
    found = [engine._counts(inner, group["params"], engine.settings.of(group))]
    group["params"] = group["params"][:1]
    return [engine._counts(inner, group["params"], engine.settings.of(group)), *found]


def test_a_group_on_several_devices_is_counted_by_the_host() -> None:
    """Its counter lies on one device; kernels on the others cannot read it, or not in time."""
    ps = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.empty(3, device="meta"))]
    assert on_two_devices(fastopt.Lookahead(fastopt.Adam(ps, capturable=True))) == [True, False]
    assert on_two_devices(fastopt.Adam(ps, capturable=True)) == [True, True]
    assert on_two_devices(fastopt.Ranger(ps, capturable=True)) == [True, True]


INNER = {
    "sgd": lambda ps: fastopt.SGD(ps, lr=0.1),
    "adagrad": lambda ps: fastopt.Adagrad(ps, lr=0.1),
    "adam": lambda ps: fastopt.Adam(ps, lr=0.1),
    "torch sgd": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "torch adam": lambda ps: torch.optim.Adam(ps, lr=0.1),
}


def capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


@pytest.mark.parametrize("inner", INNER)
def test_a_graph_whose_replays_would_not_count_is_refused(inner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.nn.Parameter(torch.ones(9))
    optimizer = fastopt.Lookahead(INNER[inner]([p]), k=2)
    step(p, optimizer, 0)
    before = taken(p, optimizer)
    capture(monkeypatch)
    with pytest.raises(RuntimeError, match="this Lookahead counts its steps on the host"):
        step(p, optimizer, 1)
    assert_same(taken(p, optimizer), before)
    monkeypatch.undo()
    step(p, optimizer, 1)
    assert optimizer.param_groups[0]["lookahead_step"] == 2


@EMULATED
def test_one_that_counts_is_not(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p, optimizer = made(backend, capturable=True)
    optimizer.add_param_group({"params": []})
    step(p, optimizer, 0)
    capture(monkeypatch)
    step(p, optimizer, 1)
    assert optimizer.param_groups[0]["lookahead_step"].item() == 2
