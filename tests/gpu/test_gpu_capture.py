"""Where `step` lives on the device: nothing is waited for, nothing allocated, and a captured step can be replayed."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from cases import Case, by_id
from gpu_support import (
    assert_equal,
    each_backend,
    needs_cuda,
    no_waiting,
    parametrize,
    ramp,
    rate,
    side_stream,
    tensors_of,
    wave,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastopt

pytestmark = needs_cuda

CAPTURABLE = by_id(
    "rmsprop-everything",
    "adam-coupled",
    "adam-everything",
    "adamw",
    "adamax",
    "nadam-coupled",
    "radam-decoupled",
)
LOOKAHEAD = [Case(f"lookahead-{c.id}", c.name, c.kwargs, (3, 0.5)) for c in by_id("adam", "radam")]
SIZES = (1, 33, 1000, 20_000)


def _make(case: Case, params: list[Any], backend: str, lr: Any, **overrides: Any) -> Any:
    return case.make([{"params": params[:2]}, {"params": params[2:]}], backend, lr=lr, capturable=True, **overrides)


def _lr(value: float = 1e-2) -> Tensor:
    return torch.tensor(value, device="cuda")


def _cpu_run(case: Case, steps: int) -> list[Tensor]:
    params = [ramp(n, device="cpu") for n in SIZES]
    optimizer = case.make([{"params": params[:2]}, {"params": params[2:]}], "reference")
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        for p in params:
            p.grad = wave(p.numel(), step, device="cpu")
        optimizer.step()
    return tensors_of(optimizer)


@parametrize([*CAPTURABLE, *LOOKAHEAD])
def test_device_counters_give_the_same_numbers(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Coefficients computed on the device, in float64, round to the values computed on the host."""
    params, lr = [ramp(n) for n in SIZES], _lr()
    optimizer = _make(case, params, backend, lr)
    for step in range(30):
        lr.fill_(rate(step))
        for p in params:
            p.grad = wave(p.numel(), step)
        optimizer.step()
    assert optimizer.state[params[0]]["step"].is_cuda
    assert_equal(tensors_of(optimizer), _cpu_run(case, 30))


@pytest.mark.parametrize("warm_up", [1, 3])
@parametrize([*CAPTURABLE, *LOOKAHEAD])
def test_replay_is_the_eager_run(case: Case, dtype: torch.dtype, backend: str, warm_up: int) -> None:
    """A step captured once, gradients in the graph's own pool, replayed under a schedule of the learning rate."""
    if case.lookahead and backend == "triton" and warm_up == 1:
        pytest.skip("Triton compiles the kernel that synchronises in the second step")
    runs = []
    for captured in (True, False):
        params, lr = [ramp(n) for n in SIZES], _lr()
        inputs = [torch.zeros(n, device="cuda") for n in SIZES]
        optimizer = _make(case, params, backend, lr)

        def train(params: Any = params, inputs: Any = inputs, optimizer: Any = optimizer) -> None:
            for p, x in zip(params, inputs, strict=True):
                p.grad = x * 2
            optimizer.step()

        def feed(step: int, inputs: Any = inputs, lr: Tensor = lr) -> None:
            lr.fill_(rate(step))
            for x in inputs:
                x.copy_(wave(x.numel(), step))

        with side_stream():
            for step in range(warm_up):
                feed(step)
                train()
        graph = torch.cuda.CUDAGraph()
        if captured:
            feed(warm_up)
            with torch.cuda.graph(graph):
                train()
        for step in range(warm_up, 15):
            feed(step)
            graph.replay() if captured else train()
        runs.append(tensors_of(optimizer))
        torch.cuda.synchronize()
    assert_equal(*runs)


@parametrize([*CAPTURABLE, *LOOKAHEAD, *by_id("ranger")])
def test_no_host_waits_and_nothing_is_allocated(case: Case, dtype: torch.dtype, backend: str) -> None:
    params, lr = [ramp(n) for n in SIZES], _lr()
    if case.name == "Ranger" and "capturable" not in inspect.signature(fastopt.Ranger).parameters:
        pytest.skip("Ranger has no capturable argument")
    optimizer = _make(case, params, backend, lr)
    for p in params:
        p.grad = wave(p.numel(), 0)
    for _ in range(8):
        optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with no_waiting():
        for _ in range(7):
            optimizer.step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@each_backend
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam", "RAdam", "Ranger"])
def test_ordinary_steps_allocate_nothing_either(name: str, backend: str) -> None:
    params = [ramp(n) for n in SIZES]
    optimizer = getattr(fastopt, name)(params, lr=1e-3, backend=backend)
    for p in params:
        p.grad = wave(p.numel(), 0)
    for _ in range(13):
        optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with no_waiting():
        for _ in range(13):
            optimizer.step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@each_backend
def test_a_first_step_inside_a_capture_is_refused(backend: str) -> None:
    """Tables would be uploaded while the graph records: at a replay they may be gone. Nothing half made stays."""
    p, q = ramp(100), ramp(100)
    optimizer, fresh = (fastopt.Adam([t], lr=_lr(), capturable=True, backend=backend) for t in (p, q))
    p.grad, q.grad = wave(100, 0), wave(100, 0)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    torch.cuda.synchronize()
    for _ in range(2):
        optimizer.step()
        fresh.step()
    assert_equal(tensors_of(optimizer), tensors_of(fresh))


def _assert_not_captured(optimizer: Any, p: Tensor) -> Tensor:
    """The parameter as it was, and still is after the attempt."""
    before = p.detach().clone()
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    torch.cuda.synchronize()
    assert torch.equal(p.detach(), before)
    return before


@each_backend
def test_capture_without_capturable_is_refused(backend: str) -> None:
    """The learning rate and the step count would be frozen into the graph; torch's own check says so."""
    p = ramp(100)
    optimizer = fastopt.Adam([p], lr=1e-2, backend=backend)
    p.grad = wave(100, 0)
    optimizer.step()
    before = _assert_not_captured(optimizer, p)
    optimizer.step()
    assert not torch.equal(p.detach(), before)


@pytest.mark.parametrize("inner", [fastopt.SGD, fastopt.Adagrad, torch.optim.SGD])
def test_a_lookahead_that_the_host_counts_for_is_not_captured(inner: Any) -> None:
    """All replays would synchronise, or none."""
    p = ramp(100)
    optimizer = fastopt.Lookahead(inner([p], lr=1e-2), k=2)
    p.grad = wave(100, 0)
    optimizer.step()
    _assert_not_captured(optimizer, p)
    optimizer.step()
    assert optimizer.param_groups[0]["lookahead_step"] == 2


class Watching(TorchDispatchMode):
    """A mode that lets torch's operators pass; kernels it would not see."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@each_backend
def test_a_graph_outlives_steps_that_torchs_operators_take(backend: str) -> None:
    """Its tables stay, however much memory is asked for meanwhile."""
    runs = []
    for captured in (True, False):
        params = [ramp(n) for n in SIZES]
        optimizer = fastopt.Adam(params, lr=_lr(), capturable=True, backend=backend)
        for p in params:
            p.grad = wave(p.numel(), 0)
        for _ in range(3):
            optimizer.step()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step()
        with Watching():
            optimizer.step()
        rubbish = [torch.full((n,), -1, dtype=torch.int64, device="cuda") for n in range(1, 4000, 7)]
        for _ in range(3):
            graph.replay() if captured else optimizer.step()
        torch.cuda.synchronize()
        del rubbish
        # What torch's operators do in between differs from the kernels in the last bits, and is the same in both runs.
        runs.append(tensors_of(optimizer))
    assert_equal(*runs)
