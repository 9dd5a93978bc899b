"""Whole training loops: a group of processes, optimizers in backward, a step in one graph, clipping, accumulation."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import distributed_steps
import pytest
import torch
import torch.distributed as dist
from cases import Case, by_id
from gpu_support import (
    DEVICE,
    assert_equal,
    each_backend,
    needs_cuda,
    no_waiting,
    parametrize,
    rate,
    side_stream,
    tensors_of,
    wave,
)
from torch import Tensor

import fastopt

LIBRARY = "nccl" if DEVICE == "cuda" else "gloo"
HAS_LIBRARY = dist.is_available() and getattr(dist, f"is_{LIBRARY}_available")()


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(33, 65), torch.nn.Tanh(), torch.nn.Linear(65, 7)).to(DEVICE)


def batch(step: int) -> tuple[Tensor, Tensor]:
    return wave(16 * 33, step).reshape(16, 33), wave(16 * 7, step + 1).reshape(16, 7)


def backward(net: torch.nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss = torch.nn.functional.mse_loss(net(x), y)
    loss.backward()
    return loss.detach()


@pytest.mark.skipif(not HAS_LIBRARY, reason=f"this torch has no {LIBRARY}")
@pytest.mark.parametrize("tasks", [("fsdp",), ("ddp",), ("resume", "reshard"), ("slow",)], ids="-".join)
def test_a_group_of_one(tasks: tuple[str, ...], tmp_path: Path) -> None:
    """The tasks of tests/test_distributed.py, on this device: bit for bit what training without a group gives, the
    evaluation on slow weights up to rounding."""
    for task in tasks:
        distributed_steps.run(task, tmp_path, DEVICE, world=1)


@pytest.mark.parametrize("aside", [pytest.param(False, id="current"), pytest.param(True, id="aside", marks=needs_cuda)])
@parametrize(by_id("adam", "sgd-momentum", "ranger"))
def test_optimizers_stepped_in_backward(case: Case, dtype: torch.dtype, backend: str, aside: bool) -> None:
    """On a GPU in a thread of autograd's, with a current stream of its own: on any other stream a step would read the
    gradient too early."""
    runs = []
    for hooked in (True, False):
        net = network()
        optimizers = {p: case.make([p], backend) for p in net.parameters()}

        def step(p: Tensor, optimizers: dict[Any, Any] = optimizers) -> None:
            optimizers[p].step()
            p.grad = None

        if hooked:
            for p in net.parameters():
                p.register_post_accumulate_grad_hook(step)
        given = [batch(i) for i in range(8)]
        with side_stream() if aside and hooked else nullcontext():
            for x, y in given:
                if aside:
                    torch.cuda._sleep(10_000_000)  # some milliseconds
                backward(net, x, y)
                for p in () if hooked else net.parameters():
                    step(p)
        assert all(p.grad is None for p in net.parameters())
        runs.append([t for optimizer in optimizers.values() for t in tensors_of(optimizer)])
    assert_equal(*runs)


@needs_cuda
@parametrize(by_id("adam", "radam", "rmsprop", "lookahead-adam"))
def test_a_training_step_in_one_graph(case: Case, dtype: torch.dtype, backend: str) -> None:
    """As torch's documentation captures it; replays take new inputs and rates, and give the eager run's bits."""
    runs = []
    for captured in (True, False):
        net, lr = network(), torch.tensor(rate(0), device=DEVICE)
        optimizer = case.make(net.parameters(), backend, lr=lr, capturable=True)
        x, y = (torch.empty_like(t) for t in batch(0))

        def feed(step: int, lr: Tensor = lr, x: Tensor = x, y: Tensor = y) -> None:
            lr.fill_(rate(step))
            for static, new in zip((x, y), batch(step), strict=True):
                static.copy_(new)

        def train(net: Any = net, optimizer: Any = optimizer, x: Tensor = x, y: Tensor = y) -> Tensor:
            loss = backward(net, x, y)
            optimizer.step()
            return loss

        with side_stream():
            for step in range(3):
                feed(step)
                optimizer.zero_grad(set_to_none=True)
                train()
        optimizer.zero_grad(set_to_none=True)
        graph, losses = torch.cuda.CUDAGraph(), []
        if captured:
            with torch.cuda.graph(graph):
                loss = train()
        for step in range(3, 13):
            feed(step)
            if captured:
                graph.replay()
            else:
                optimizer.zero_grad(set_to_none=True)
                loss = train()
            losses.append(loss.clone())
        runs.append([*losses, *tensors_of(optimizer)])
        torch.cuda.synchronize()
    assert_equal(*runs)


@needs_cuda
@each_backend
def test_clipping_and_accumulation_wait_for_nothing(backend: str) -> None:
    """fused=True says how a scaler's gradients are taken; without one its steps are the others', bit for bit."""
    runs = []
    for fused in (True, False):
        net, given = network(), [batch(i) for i in range(12)]
        optimizer = fastopt.AdamW(net.parameters(), lr=0.01, fused=fused, backend=backend)
        for i, (x, y) in enumerate(given):
            with no_waiting() if i >= 6 else nullcontext():  # what is compiled and uploaded once is by then
                backward(net, x, y)
                if i % 2:
                    torch.nn.utils.clip_grad_norm_(net.parameters(), 2.0**-6, foreach=True)
                    optimizer.step()
                    optimizer.zero_grad()
        runs.append(tensors_of(optimizer))
    assert_equal(*runs)


def test_compare_trains_where_the_model_is() -> None:
    """Its own seeds, copies and evaluations, of ours and torch's optimizers."""
    data = batch(0)[0]

    def loss(model: torch.nn.Module, x: Tensor) -> Tensor:
        result: Tensor = (model(x) - x.sum(1, keepdim=True)).square().mean()
        return result

    result = fastopt.compare(
        lambda: torch.nn.Linear(33, 1).to(DEVICE), loss, data.split(4),
        optimizers=["Adam", "torch.Adam", "Ranger", "Lookahead(SGD, k=3)"], lrs=[1e-9, 1e-2], seeds=2, steps=30,
        progress=False,
    )  # fmt: skip
    assert result.best.lr == 1e-2
