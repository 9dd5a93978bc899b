"""What test_triton.py runs under Triton's interpreter of steps that fail, or that change what the next one finds."""

from __future__ import annotations

import copy
import sys
import threading
import time
import weakref
from typing import Any

import triton_interpreter  # before anything imports Triton

# isort: split
import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import fastopt
from fastopt.backends import triton

assert triton_interpreter


def test_states_that_are_no_plain_memory_are_refused() -> None:
    for change in (torch._neg_view, lambda t: TwoTensor(t.clone(), t.clone())):
        p = torch.nn.Parameter(torch.ones(4))
        p.grad = torch.ones(4)
        optimizer = fastopt.SGD([p], lr=1.0, momentum=0.5, backend="triton")
        optimizer.step()
        optimizer.state[p]["momentum_buffer"] = change(optimizer.state[p]["momentum_buffer"])
        before = p.detach().clone()
        with pytest.raises(ValueError, match="not plain memory"):
            optimizer.step()
        assert torch.equal(p, before)


def test_nothing_is_started_before_all_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 and float64 take kernels of their own; the second one may fail to compile, or be interrupted."""
    params = [torch.nn.Parameter(torch.ones(4, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = fastopt.Adam(params, lr=1.0, backend="triton")
    usual, calls = triton.launch.Ready.compiled, [0]

    def compiled(self: Any, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise MemoryError("of a test")
        return usual(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(triton.launch.Ready, "compiled", compiled)
        with pytest.raises(MemoryError, match="of a test"):
            optimizer.step()
    assert all((p == 1).all() for p in params)
    assert not optimizer.state
    optimizer.step()
    assert {optimizer.state[p]["step"].item() for p in params} == {1}


@pytest.mark.parametrize("k", [2, 3])
def test_counters_that_float32_cannot_advance(k: int) -> None:
    """At 2^24 the step is the same again, and with it whether slow weights synchronise."""
    found = []
    for backend in ("triton", "reference"):
        p = torch.nn.Parameter(torch.ones(4))
        p.grad = torch.ones(4)
        optimizer = fastopt.Ranger([p], lr=1.0, k=k, backend=backend)
        optimizer.step()
        optimizer.state[p]["step"].fill_(2.0**24)
        optimizer.state[p]["slow_buffer"].fill_(100.0)
        optimizer.step()
        found.append(p.detach())
    assert torch.equal(*found)


def test_slow_weights_that_come_with_a_state_filled_in_later() -> None:
    found = []
    for backend in ("triton", "reference"):
        p, q = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
        optimizer = fastopt.Lookahead(fastopt.SGD([p, q], lr=1.0, backend=backend), k=2)
        p.grad = torch.ones(4)
        _ = optimizer.state[q]  # makes an empty one
        optimizer.step()
        optimizer.state[q]["slow_param"] = torch.full((4,), 101.0)
        optimizer.step()
        found.append(torch.cat([p.detach(), q.detach()]))
    assert torch.equal(*found)
    assert found[0][-1] == 51


def test_threads_take_turns() -> None:
    """Beside a thread that loads: a step is a whole one or says that something changed."""
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(3)]
    for p in params:
        p.grad = torch.ones(4)
    optimizer = fastopt.Adam(params, backend="triton")
    optimizer.step()
    saved, failed, steps = copy.deepcopy(optimizer.state_dict()), list[str](), 15

    def work() -> None:
        for _ in range(steps):
            try:
                optimizer.step()
            except RuntimeError as error:
                failed.append(str(error))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for loads in (0, 20):
            threads = [threading.Thread(target=work) for _ in range(2)]
            for thread in threads:
                thread.start()
            for _ in range(loads):
                optimizer.load_state_dict(saved)
                time.sleep(0.001)
            for thread in threads:
                thread.join()
            assert loads or not failed
            assert loads or {optimizer.state[p]["step"].item() for p in params} == {2 * steps + 1}
    finally:
        sys.setswitchinterval(interval)
    assert all("changed" in text for text in failed), failed
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert {optimizer.state[p]["step"].item() for p in params} == {2}


def broken(patch: pytest.MonkeyPatch, point: str) -> None:
    """Something that a launch needs fails."""

    def fails(*arguments: Any, **kwargs: Any) -> Any:
        raise MemoryError("of a test")

    patch.setattr(triton.launch.Ready if point == "compiled" else triton.tables.Channel, point, fails)


@pytest.mark.parametrize("point", ["compiled", "send"])
def test_other_plans_and_torchs_code_wait_for_what_can_fail(point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = torch.ones(6)
    for make in (fastopt.Ranger, fastopt.AdamW):  # the rest goes to the reference, or to torch's code
        params = [torch.nn.Parameter(t) for t in (torch.ones(4), memory[:4].clone(), memory[2:].clone())]
        params[1].data = params[2].data[:4]
        optimizer = make(params, lr=0.1, backend="triton")
        for p in params:
            p.grad = torch.ones(4)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)  # type: ignore[union-attr]
        before = [t.clone() for p in params for t in (p.detach(), p.grad)]  # type: ignore[union-attr]
        for _ in range(2):
            with monkeypatch.context() as patch:
                broken(patch, point)
                with pytest.raises(MemoryError):
                    optimizer.step()
            assert all(map(torch.equal, before, [t for p in params for t in (p.detach(), p.grad)]))  # type: ignore[list-item]
            assert not optimizer.state
        optimizer.step()
        assert {optimizer.state[p]["step"].item() for p in params} == {1}


@pytest.mark.parametrize("point", ["compiled", "send"])
def test_slow_weights_begin_with_the_first_step_that_is_one(point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.nn.Parameter(torch.zeros(4))
    p.grad = torch.ones(4)
    optimizer = fastopt.Lookahead(fastopt.SGD([p], lr=1.0, backend="triton"), k=1, alpha=0.5)
    with monkeypatch.context() as patch:
        broken(patch, point)
        with pytest.raises(MemoryError):
            optimizer.step()
    freed = weakref.ref(p.grad)
    p.grad = None
    assert freed() is None
    with torch.no_grad():
        p.fill_(10.0)
    p.grad = torch.ones(4)
    optimizer.step()
    assert torch.equal(p, torch.full((4,), 9.5))


def test_a_step_in_inference_mode_is_none_the_others_suffer_from() -> None:
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    optimizer = fastopt.SGD([p], lr=0.125, backend="triton")
    with torch.inference_mode():
        optimizer.step()
    optimizer.step()
    optimizer.step()
    assert torch.equal(p, torch.full((4,), 1 - 3 * 0.125))
