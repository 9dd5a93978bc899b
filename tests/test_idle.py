"""A parameter without a gradient has no step, so its state may be anything: parked elsewhere, in 8 bits, of another
shape, as in block-coordinate training. torch does not look at it either."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import TORCH_NAMES, backends, each_backend
from torch import Tensor, nn

import fastopt

pytestmark = pytest.mark.contract("live")

PARKED: dict[str, Callable[[Tensor], Any]] = {
    "8 bits": lambda t: (t * 127).to(torch.int8),
    "on meta": lambda t: t.to("meta"),
    "on disk": lambda t: "moments.pt",
    "nothing": lambda t: None,
    "packed": lambda t: (t, 0.5),
    "shorter": lambda t: t.flatten()[:1],
    "sparse": lambda t: t.to_sparse(),
    "negated": torch._neg_view,
    "emptied": lambda t: torch.empty(0),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()


def run(model: nn.Sequential, optimizer: torch.optim.Optimizer, park: Callable[[dict[str, Any]], None]) -> Tensor:
    """Trained, then with the first layer frozen and its state parked, then whole again."""
    advance(model, optimizer, 2)
    optimizer.zero_grad()
    model[0].requires_grad_(False)
    before = {p: dict(optimizer.state[p]) for p in model[0].parameters()}
    for p in before:
        park(optimizer.state[p])
    parked = {p: dict(optimizer.state[p]) for p in before}
    advance(model, optimizer, 2)
    for p, own in parked.items():
        assert all(optimizer.state[p][key] is value for key, value in own.items())
        optimizer.state[p].update(before[p])
    model[0].requires_grad_(True)
    advance(model, optimizer, 2)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@each_backend
@pytest.mark.parametrize("what", [*PARKED, "no step", "step as a number"])
@pytest.mark.parametrize("name", TORCH_NAMES)
def test_the_state_of_a_frozen_parameter_is_not_looked_at(name: str, what: str, backend: str) -> None:
    def park(state: dict[str, Any]) -> None:
        if what in PARKED:
            state.update({key: PARKED[what](t) for key, t in state.items() if t.dim()})
        elif "step" in state:
            state["step"] = None if what == "no step" else 2.0

    extra = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    results = []
    for parks in (park, lambda state: None):
        model = net()
        optimizer = getattr(fastopt, name)(model.parameters(), lr=0.01, backend=backend, **extra)
        results.append(run(model, optimizer, parks))
    assert torch.equal(*results)


@each_backend
def test_with_a_gradient_it_is(backend: str) -> None:
    model = net()
    optimizer = fastopt.AdamW(model.parameters(), backend=backend)
    advance(model, optimizer, 1)
    optimizer.zero_grad()
    model[0].requires_grad_(False)
    optimizer.state[model[0].weight]["exp_avg"] = torch.ones(2)
    advance(model, optimizer, 2)
    model[0].requires_grad_(True)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"state 'exp_avg' .*is real of shape \(2,\)"):
        advance(model, optimizer, 1)
    assert all(map(torch.equal, before, model.parameters()))


@each_backend
def test_an_embedding_that_a_batch_does_not_use(backend: str) -> None:
    """Its sparse momentum is torch's code's own."""
    results = []
    for make in (lambda ps: fastopt.SGD(ps, lr=0.1, momentum=0.9, backend=backend),
                 lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, foreach=False)):  # fmt: skip
        torch.manual_seed(0)
        embedding, layer = nn.Embedding(10, 4, sparse=True), nn.Linear(4, 1)
        optimizer = make([*embedding.parameters(), *layer.parameters()])
        for step in range(6):
            optimizer.zero_grad()
            x = embedding(torch.tensor([1, 2])) if step % 3 == 0 else torch.ones(2, 4)
            layer(x).sum().backward()
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in (embedding.weight, *layer.parameters())]))
    assert torch.equal(*results)


@pytest.mark.parametrize("backend", backends(["native"]))
def test_it_costs_a_rebuild_once(backend: str) -> None:
    model = net()
    optimizer = fastopt.AdamW(model.parameters(), backend=backend)
    advance(model, optimizer, 1)
    optimizer.zero_grad()
    model[0].requires_grad_(False)
    optimizer.state[model[0].weight]["exp_avg"] = "moments.pt"
    engine, prepared = optimizer.engine(), []
    usual = engine.prepare
    engine.prepare = lambda given: prepared.append(1) or usual(given)  # type: ignore[method-assign, func-returns-value]
    advance(model, optimizer, 3)
    assert len(prepared) == 1
    assert "its state does not fit" in str(fastopt.explain(optimizer))


@pytest.mark.parametrize("backend", backends(["emulated"]))
def test_a_device_goes_on_counting(backend: str) -> None:
    """And looks for an overflow itself."""
    model = net()
    optimizer = fastopt.AdamW(model.parameters(), fused=True, backend=backend)
    advance(model, optimizer, 1)
    optimizer.zero_grad()
    model[0].requires_grad_(False)
    optimizer.state[model[0].weight]["exp_avg"] = "moments.pt"
    advance(model, optimizer, 1)
    engine = optimizer.engine()
    assert engine.counts == [True]
    assert engine._defers()


@pytest.mark.parametrize("backend", backends(["native", "emulated"]))
@pytest.mark.parametrize("what", ["8 bits", "shorter"])
def test_idle_parameters_cost_no_rebuild(what: str, backend: str) -> None:
    params = [nn.Parameter(torch.ones(5)) for _ in range(3)]
    optimizer = fastopt.Adam(params, backend=backend)
    for p in params:
        p.grad = torch.ones(5)
    optimizer.step()
    own = optimizer.state[params[0]]
    own.update({key: PARKED[what](t) for key, t in own.items() if t.dim()})
    params[0].grad = None
    optimizer.step()
    engine, prepared = optimizer.engine(), []
    usual = engine.prepare
    engine.prepare = lambda given: prepared.append(1) or usual(given)  # type: ignore[method-assign, func-returns-value]
    for _ in range(3):
        optimizer.step()
    assert not prepared
    assert optimizer.state[params[1]]["step"] == 5


@each_backend
@pytest.mark.parametrize("fused", [False, True])
def test_a_group_that_wakes_up_synchronises_when_it_is_due(fused: bool, backend: str) -> None:
    def run(parks: bool) -> list[Tensor]:
        params = [nn.Parameter(torch.ones(5)) for _ in range(2)]
        inner = fastopt.Adam([{"params": [p]} for p in params], lr=0.1, fused=fused, backend=backend)
        optimizer = fastopt.Lookahead(inner, k=4)
        for step in range(6):
            own = optimizer.state[params[0]]
            for p in params:
                p.grad = torch.full((5,), 1.0 + step)
            if step in (1, 2):
                params[0].grad = None
            if parks and step == 1:
                kept = dict(own)
                own.clear()
                own["exp_avg"] = torch.zeros(9)
            if parks and step == 3:
                own.clear()
                own.update(kept)
            optimizer.step()
        return [p.detach() for p in params]

    assert all(map(torch.equal, run(True), run(False)))
