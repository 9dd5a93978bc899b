"""Sizes at which indices overflow, tables grow over a launch, or groups are many."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import Case, by_id
from gpu_support import CPU, DEVICE, each_backend, needs_cuda, ramp, wave
from harness import difference
from torch import Tensor

import fastopt

HUGE = 2**31 + 7
GIB = 2**30


@pytest.fixture(autouse=True)
def _memory_given_back() -> Iterator[None]:
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _bytes_free() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


def _pattern(numel: int, seed: int) -> Tensor:
    """A period that divides no power of two, so that an element taken from elsewhere has another value."""
    tile = torch.randn(1_000_003, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16).to(DEVICE)
    return tile.repeat(-(-numel // tile.numel()))[:numel]


@needs_cuda
@each_backend
@pytest.mark.parametrize("case", by_id("sgd", "adam"), ids=lambda c: c.id)
def test_more_elements_than_32_bits_count(case: Case, backend: str) -> None:
    """Element by element what the same optimizer makes of the tensor in pieces."""
    streams = 2 if case.name == "SGD" else 4
    needed = 2 * streams * HUGE * 2 + 8 * GIB
    if (free := _bytes_free()) < needed:
        pytest.skip(f"needs {needed / GIB:.0f} GiB of free memory, there are {free / GIB:.0f}")
    whole = torch.nn.Parameter(_pattern(HUGE, 1))
    gradient = _pattern(HUGE, 2)
    pieces = [torch.nn.Parameter(piece.clone()) for piece in whole.detach().split(300_000_000)]
    optimizers = [case.make(params, backend, lr=0.05) for params in ([whole], pieces)]
    for _ in range(2):
        whole.grad = gradient
        for p, g in zip(pieces, gradient.split(300_000_000), strict=True):
            p.grad = g
        for optimizer in optimizers:
            optimizer.step()
    for k, (got, want) in enumerate(zip(whole.detach().split(300_000_000), pieces, strict=True)):
        assert torch.equal(got, want), f"piece {k}: {difference(got, want.detach())}"
    assert not torch.equal(whole.detach()[-1000:], _pattern(HUGE, 1)[-1000:])


def _steps_agree(counts: list[int], groups: int, settings: int, backend: str, steps: int = 4) -> None:
    """Adam on many tensors, half of the gradients absent at one step, equals the CPU."""
    runs = []
    for name, device in ((backend, DEVICE), (CPU, "cpu")):
        base = torch.linspace(-1, 1, sum(counts), dtype=torch.float64).float().to(device)
        gradients = [wave(base.numel(), step, device=device) for step in range(steps)]
        params = [torch.nn.Parameter(piece.clone()) for piece in base.split(counts)]
        size = len(params) // groups
        dealt = [
            {"params": params[i * size : (i + 1) * size], "lr": 1e-2 * (1 + i % settings), "weight_decay": i % 2 * 0.1}
            for i in range(groups)
        ]
        optimizer = fastopt.Adam(dealt, backend=name)
        for step in range(steps):
            for i, (p, g) in enumerate(zip(params, gradients[step].split(counts), strict=True)):
                p.grad = None if step == 2 and i % 2 else g.clone()
            optimizer.step()
        states = [optimizer.state[p] for p in params]
        columns = [params, *([s[key] for s in states] for key in ("exp_avg", "exp_avg_sq", "step"))]
        runs.append([torch.cat([t.detach().reshape(-1).cpu() for t in column]) for column in columns])
    for got, want in zip(*runs, strict=True):
        assert not difference(got, want)


@each_backend
@pytest.mark.parametrize("count", [1, 127, 129, 1000, 4079, 4081, 21_000])
def test_many_tensors(count: int, backend: str) -> None:
    """One launch holds so many gradient pointers; beyond, tables must be continued."""
    _steps_agree([1 + i * 7 % 65 for i in range(count)], 1, 1, backend)


@each_backend
@pytest.mark.parametrize("settings", [1, 28, 465])
def test_465_groups(settings: int, backend: str) -> None:
    _steps_agree([1 + i * 13 % 257 for i in range(930)], 465, settings, backend)


@each_backend
def test_many_items_of_few_tensors(backend: str) -> None:
    _steps_agree([3_000_001, 17, 5_000_000, 4096], 1, 1, backend)


@each_backend
def test_growing_and_shrinking(backend: str) -> None:
    """Tables are made anew, smaller and larger, while earlier launches may still be reading the old ones."""
    runs = []
    for name, device in ((backend, DEVICE), (CPU, "cpu")):
        params = [ramp(5000, device=device)]
        optimizer = fastopt.AdamW(params, lr=1e-2, backend=name)
        for step in range(12):
            for i, p in enumerate(params):
                p.grad = wave(p.numel(), step + i, device=device)
            optimizer.step()
            if step % 3 == 0:
                params.append(ramp(1000 * (step + 1), device=device))
                optimizer.add_param_group({"params": [params[-1]]})
            if step == 7:
                del optimizer.param_groups[0]
        runs.append([p.detach().cpu() for p in params])
    assert not [text for a, b in zip(*runs, strict=True) if (text := difference(a, b))]
