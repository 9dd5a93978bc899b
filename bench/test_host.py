"""Micro-benchmarks of the host's share of a step, for use while working on it: `pytest bench/test_host.py`.

Not part of the tests (pytest collects `tests/` only): what is checked here is time, and that is for a person to judge.
Compare two states of the tree with pytest-benchmark's `--benchmark-autosave` and `--benchmark-compare`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Optimizer

import fastopt
from bench.cases import TINY, Workload
from bench.workload import Tensors


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Without a thread pool to wake, what is left is the host."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def adam(workload: Workload) -> tuple[Optimizer, Tensors, list[Parameter]]:
    tensors = Tensors(workload)
    parameters = tensors.parameters()
    optimizer = fastopt.Adam(workload.deal(parameters), backend="native")
    tensors.give_gradients(parameters, 0)
    optimizer.step()
    return optimizer, tensors, parameters


def with_fresh_gradients(benchmark: Any, optimizer: Optimizer, tensors: Tensors, parameters: list[Parameter]) -> None:
    steps = iter(range(1, 1_000_000))
    benchmark.pedantic(
        optimizer.step, setup=lambda: tensors.give_gradients(parameters, next(steps)), rounds=200, warmup_rounds=10
    )


def test_step_of_1000_tiny_tensors(benchmark: Any) -> None:
    with_fresh_gradients(benchmark, *adam(TINY))


def test_step_with_the_same_gradients(benchmark: Any) -> None:
    optimizer, _, _ = adam(TINY)
    benchmark(optimizer.step)


def test_step_with_half_of_the_gradients(benchmark: Any) -> None:
    with_fresh_gradients(benchmark, *adam(Workload(TINY.shapes, absent=0.5)))


@pytest.mark.parametrize("settings", [1, 28])
def test_step_of_400_groups(benchmark: Any, settings: int) -> None:
    with_fresh_gradients(benchmark, *adam(Workload(TINY.shapes[:800], groups=400, settings=settings)))


def test_first_step(benchmark: Any) -> None:
    """State is created and the plan is built."""

    def construct() -> tuple[tuple[Optimizer], dict[str, Any]]:
        tensors = Tensors(TINY)
        parameters = tensors.parameters()
        tensors.give_gradients(parameters, 0)
        return (fastopt.Adam(parameters, backend="native"),), {}

    benchmark.pedantic(lambda optimizer: optimizer.step(), setup=construct, rounds=20)


def test_step_after_add_param_group(benchmark: Any) -> None:
    """The plan is rebuilt; the parameters that were there keep their state."""

    def grow() -> tuple[tuple[Optimizer], dict[str, Any]]:
        optimizer, _, _ = adam(TINY)
        newcomer = Parameter(torch.zeros(64))
        newcomer.grad = torch.ones(64)
        optimizer.add_param_group({"params": [newcomer]})
        return (optimizer,), {}

    benchmark.pedantic(lambda optimizer: optimizer.step(), setup=grow, rounds=20)


def test_step_after_load_state_dict(benchmark: Any) -> None:
    optimizer, _, _ = adam(TINY)
    checkpoint = optimizer.state_dict()
    benchmark.pedantic(optimizer.step, setup=lambda: optimizer.load_state_dict(checkpoint), rounds=20)


def test_step_after_new_learning_rate(benchmark: Any) -> None:
    """What a scheduler does: every group's coefficients change every step."""
    optimizer, _, _ = adam(Workload(TINY.shapes[:800], groups=400))

    def schedule() -> None:
        for group in optimizer.param_groups:
            group["lr"] *= 0.999

    benchmark.pedantic(optimizer.step, setup=schedule, rounds=200, warmup_rounds=10)


def test_state_dict(benchmark: Any) -> None:
    optimizer, _, _ = adam(TINY)
    benchmark(optimizer.state_dict)


def test_load_state_dict(benchmark: Any) -> None:
    optimizer, _, _ = adam(TINY)
    checkpoint = optimizer.state_dict()
    benchmark.pedantic(optimizer.load_state_dict, args=(checkpoint,), rounds=20)
