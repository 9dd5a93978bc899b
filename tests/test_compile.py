"""torch.compile around a training step, and around the step itself, which stays outside the compiled graph."""

from __future__ import annotations

import importlib.util
from typing import Any

import oracles
import pytest
import torch
from cases import Case, backends, by_id, parametrize
from harness import difference, ramp, wave

import fastopt

pytestmark = pytest.mark.contract("hooks", difference="compiled steps")


@pytest.mark.skipif(importlib.util.find_spec("torch._dynamo") is None, reason="torch without dynamo")
@pytest.mark.filterwarnings("error:Dynamo detected")
@parametrize(by_id("sgd-momentum", "adam-amsgrad", "radam", "ranger", "lookahead-adam"), ("fp32",))
def test_compiled_training_step_gives_the_same_numbers(case: Case, dtype: torch.dtype, backend: str) -> None:
    """The step itself stays outside the compiled graph."""
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 4)
        optimizer = case.make(model.parameters(), backend)
        x = torch.randn(8, 6)

        def train(model: Any = model, optimizer: Any = optimizer, x: Any = x) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).pow(2).mean()
            loss.backward()
            optimizer.step()
            return loss

        torch._dynamo.reset()
        step = torch.compile(train, backend="eager") if compiled else train
        losses = [step().item() for _ in range(8)]
        results.append((losses, [p.detach().clone() for p in model.parameters()]))
    torch._dynamo.reset()
    assert results[0][0] == results[1][0]
    assert all(torch.equal(p, q) for p, q in zip(results[0][1], results[1][1], strict=True))


@pytest.mark.parametrize("backend", backends(["native"]))
def test_compiled_step_method(backend: str) -> None:
    p, q = torch.nn.Parameter(ramp(9)), torch.nn.Parameter(ramp(9))
    optimizer, oracle = fastopt.Adam([p], backend=backend), oracles.TorchLoop("Adam", [q])
    step = torch.compile(optimizer.step, backend="eager")
    for t in range(4):
        p.grad, q.grad = wave((9,), t), wave((9,), t)
        step()
        oracle.step()
    torch._dynamo.reset()
    assert not difference(p.detach(), q.detach())
