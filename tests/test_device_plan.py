"""Tables, items and parameters of a device's launches, on the emulated device: how many there are, and their limits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import backends
from harness import difference

import fastopt
from fastopt.backends import native

pytestmark = [pytest.mark.contract("device"), pytest.mark.parametrize("backend", backends(["emulated"]))]


def tensors(n: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.full(shape, 0.1 * (1 + i % 7)).to(dtype)) for i in range(n)]


def give(params: list[torch.nn.Parameter], step: int = 0) -> None:
    for i, p in enumerate(params):
        p.grad = torch.full_like(p, 0.01 * (1 + (i + step) % 5))


def launches(optimizer: Any) -> int:
    return int(optimizer.engine()._plans["emulated"].launches)


@pytest.mark.parametrize(
    ("n", "expected"), [(1, 1), (390, 1), (400, 1), (3200, 1), (3300, 2), (10_000, 4), (21_000, 7)]
)
def test_one_launch_while_the_parameters_hold_the_gradients(n: int, expected: int, backend: str) -> None:
    """32,752 bytes: ten for each tensor, and the rows."""
    params, twins = tensors(n, 3), tensors(n, 3)
    ours, plain = fastopt.Adam(params, backend=backend), fastopt.Adam(twins, backend="native")
    for step in range(2):
        give(params, step)
        give(twins, step)
        ours.step()
        plain.step()
    assert launches(ours) == expected
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


def test_rows_that_are_all_different_take_room(backend: str) -> None:
    params, twins = tensors(1000, 3), tensors(1000, 3)
    ours, plain = fastopt.Adam(params, backend=backend), fastopt.Adam(twins, backend="native")
    for optimizer, own in ((ours, params), (plain, twins)):
        give(own)
        optimizer.step()
        for i, p in enumerate(own):
            optimizer.state[p]["step"].fill_(i)
        give(own, 1)
        optimizer.step()
    assert launches(ours) == 2
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


def test_groups_share_one_launch(backend: str) -> None:
    params = tensors(930, 5)
    groups = [{"params": params[2 * i : 2 * i + 2], "lr": 1e-3 * (1 + i % 28)} for i in range(465)]
    optimizer = fastopt.RAdam(groups, backend=backend)
    give(params)
    optimizer.step()
    assert launches(optimizer) == 1


def test_absent_gradients_change_no_table(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params, twins = tensors(50, 300), tensors(50, 300)
    ours, plain = fastopt.Adam(params, backend=backend), fastopt.Adam(twins, backend="native")
    give(params)
    give(twins)
    ours.step()
    plain.step()
    monkeypatch.setattr(native.DeviceMemory, "upload", _must_not)
    for step in range(6):
        for own, optimizer in ((params, ours), (twins, plain)):
            give(own, step)
            for p in own[step % 3 :: 3]:
                p.grad = None
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


def _must_not(*args: object) -> None:
    raise AssertionError("tables were made again")


def test_a_misaligned_gradient_moves_its_tensor_for_good(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the kernel that takes any address; tables are made again once, not at every change."""
    (p,), (q,) = tensors(1, 100), tensors(1, 100)
    ours, plain = fastopt.Adam([p], backend=backend), fastopt.Adam([q], backend="native")
    for step in range(6):
        g = torch.full((101,), 0.1 * (step + 1))
        p.grad = g[1:] if step % 2 else g[:100].clone()
        q.grad = p.grad.clone()
        if step > 1:
            monkeypatch.setattr(native.DeviceMemory, "upload", _must_not)
        ours.step()
        plain.step()
        assert torch.equal(p, q)
    assert torch.equal(ours.state[p]["exp_avg"], plain.state[q]["exp_avg"])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads: int, backend: str) -> None:
    """From 400 tensors on all of torch's threads examine and count them; before some steps they have slept."""
    before = torch.get_num_threads()
    params, twins = tensors(1100, 3), tensors(1100, 3)
    ours, plain = fastopt.Adam(params, backend=backend), fastopt.Adam(twins, backend="native")
    torch.set_num_threads(threads)
    try:
        for step in range(6):
            for own, optimizer in ((params, ours), (twins, plain)):
                give(own, step)
                for p in own[step % 2 :: 7]:
                    p.grad = None
                time.sleep(0.01 * (step % 2))
                optimizer.step()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))
    counters = [(ours.state[p]["step"], plain.state[q]["step"]) for p, q in zip(params, twins, strict=True)]
    assert all(torch.equal(a, b) for a, b in counters)


@pytest.mark.contract("device", "layouts")
@pytest.mark.parametrize("layout", ["transposed", "gradient transposed", "gradient of another dtype"])
def test_a_gradient_may_change_its_kind(layout: str, backend: str) -> None:
    ours_p, plain_p = (torch.nn.Parameter(torch.linspace(-1, 1, 48).reshape(6, 8)) for _ in range(2))
    if layout == "transposed":
        ours_p, plain_p = (torch.nn.Parameter(torch.linspace(-1, 1, 48).reshape(8, 6).t()) for _ in range(2))
    ours, plain = fastopt.RAdam([ours_p], backend=backend), fastopt.RAdam([plain_p], backend="native")
    for step in range(6):
        for p, optimizer in ((ours_p, ours), (plain_p, plain)):
            g = torch.sin(torch.arange(48.0) + step).reshape(6, 8)
            if step % 2 and layout == "gradient transposed":
                g = g.t().contiguous().t()
            p.grad = g
            if step == 3 and layout == "gradient of another dtype":
                p.grad = None
                p.grad_dtype = None
                p.grad = g.bfloat16()
            optimizer.step()
        assert torch.equal(ours_p, plain_p)


def test_a_launch_for_each_way_of_storing(backend: str) -> None:
    """float32, bfloat16 and float64 parameters, and bfloat16 ones with float32 states: four kernels."""
    params = [p for d in (torch.float32, torch.bfloat16, torch.float64) for p in tensors(3, 40, dtype=d)]
    mixed = tensors(2, 40, dtype=torch.bfloat16)
    optimizer = fastopt.Adam([*params, *mixed], backend=backend)
    for p in mixed:
        optimizer.state[p].update(exp_avg=torch.zeros(40), exp_avg_sq=torch.zeros(40))
    give([*params, *mixed])
    optimizer.step()
    assert launches(optimizer) == 4


@pytest.mark.contract("device", optimizers="Ranger")
@pytest.mark.parametrize("rows", [(3, 5000), (1, 70_000), (7, 4096), (7, 4097), (600, 3), (2, 2, 3000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_centralised_rows_of_every_length(rows: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    """Short ones share a warp, long ones are summed in parts by a launch of their own."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.nn.Parameter(torch.ones(rows).to(dtype)) for _ in range(2))
    ours, plain = fastopt.Ranger([p], lr=0.1, backend=backend), fastopt.Ranger([q], lr=0.1, backend="native")
    for _ in range(7):
        g = (torch.randn(rows, generator=generator) * 3 + 1).to(dtype)
        p.grad, q.grad = g, g.clone()
        ours.step()
        plain.step()
    assert not difference(p.detach(), q.detach())
    longest = 4096
    assert launches(ours) == (2 if p.numel() // rows[0] > longest else 1)


@pytest.fixture
def only_the_end() -> Iterator[None]:
    module = native.extension()
    assert module is not None
    module.emulate_only_last(16)  # two times those whose elements are dealt out together
    yield
    module.emulate_only_last(0)


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
def test_more_than_two_to_the_31_elements(offset: int, backend: str, only_the_end: None) -> None:
    """Untouched memory costs nothing, and only the last items are run: do they lie where the end is?"""
    n, end = 2**31 + 7, 1000
    p = torch.nn.Parameter(torch.empty(n + offset, dtype=torch.bfloat16)[offset:])
    p.grad = torch.empty(n + offset, dtype=torch.bfloat16)[offset:]
    with torch.no_grad():
        p[-end:] = torch.linspace(-1, 1, end).bfloat16()
    p.grad[-end:] = torch.linspace(2, 3, end).bfloat16()
    twin = torch.nn.Parameter(p.detach()[-end:].clone())
    twin.grad = p.grad[-end:].clone()
    fastopt.SGD([p], lr=0.1, backend=backend).step()
    fastopt.SGD([twin], lr=0.1, backend="native").step()
    assert torch.equal(p[-end:], twin)
