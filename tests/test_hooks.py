"""Hooks, closures, the profiler, and what a step tells autograd, under the eight torch names."""

from __future__ import annotations

import functools
from typing import Any

import oracles
import pytest
import torch
from cases import TORCH_CASES, Case, both, each_backend, each_name, parametrize
from harness import param
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode

import fastopt

pytestmark = pytest.mark.contract("hooks")


@each_name
@each_backend
def test_step_hooks_fire_once_in_order(name: str, backend: str) -> None:
    """Also after the parent class was used: its step is wrapped by then, and a careless subclass would fire twice."""
    ours, theirs = both(name)
    p = param(3)
    p.grad = torch.ones(3)
    theirs([p]).step()
    optimizer, calls = ours([p], backend=backend), []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global post")),
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre")),
        optimizer.register_step_post_hook(lambda *_: calls.append("post")),
    ]
    try:
        optimizer.step()
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["global pre", "pre", "post", "global post"] * 2
    optimizer.step()
    assert len(calls) == 8


@each_name
def test_checkpoint_hooks_fire_once_in_order(name: str) -> None:
    optimizer, calls = getattr(fastopt, name)([param(3)]), []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("save pre"))
    optimizer.register_state_dict_post_hook(lambda o, d: calls.append("save post"))
    optimizer.register_load_state_dict_pre_hook(lambda o, d: calls.append("load pre"))
    optimizer.register_load_state_dict_pre_hook(lambda o, d: calls.append("load first"), prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("load post"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["save pre", "save post", "load first", "load pre", "load post"]


@each_backend
def test_pre_hook_may_replace_the_arguments_and_edit_the_group(backend: str) -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = fastopt.SGD([p], lr=1.0, backend=backend)

    def hook(o: Any, args: Any, kwargs: Any) -> Any:
        o.param_groups[0]["lr"] = 0.25
        return (o, lambda: setattr(p, "grad", torch.ones(1)) or 7.0), {}

    optimizer.register_step_pre_hook(hook)
    assert optimizer.step() == 7.0
    assert p.item() == -0.25
    optimizer.register_step_pre_hook(lambda o, args, kwargs: "nonsense")
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step()


@each_backend
def test_hooks_are_shown_the_arguments_as_they_were_given(backend: str) -> None:
    """And may add the closure by name, as to torch's."""

    def run(make: Any) -> list[Any]:
        p = torch.nn.Parameter(torch.zeros(1))
        optimizer, seen = make([p], lr=1.0), []
        handle = optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append((len(args), dict(kwargs))))
        p.grad = torch.ones(1)
        optimizer.step()
        optimizer.step(None)
        optimizer.step(float)
        optimizer.step(closure=float)
        handle.remove()
        optimizer.register_step_pre_hook(lambda o, args, kwargs: (args, {**kwargs, "closure": lambda: 7.0}))
        return [*seen, optimizer.step(), p.item()]

    theirs = run(torch.optim.SGD)
    assert run(functools.partial(fastopt.SGD, backend=backend)) == theirs
    assert run(lambda ps, lr: fastopt.Lookahead(fastopt.SGD(ps, lr=lr, backend=backend), k=100)) == theirs


@each_name
@each_backend
def test_closure_is_called_once_with_gradients_enabled(name: str, backend: str) -> None:
    w = torch.nn.Parameter(torch.full((3,), 2.0))
    optimizer, calls = getattr(fastopt, name)([w], backend=backend), []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        first = optimizer.step(closure)
    second = optimizer.step(closure=closure)
    assert optimizer.step(closure=None) is None
    assert calls == [True, True]
    assert first.item() == 12.0
    assert second.item() < 12.0
    assert w.grad is not None


def test_step_has_torchs_name_in_the_profiler() -> None:
    p = param(3)
    p.grad = torch.ones(3)
    optimizer = fastopt.RAdam([p])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert "Optimizer.step#RAdam.step" in {event.key for event in profile.key_averages()}


@parametrize(TORCH_CASES, ("fp32",))
def test_versions_are_bumped_and_gradients_left_alone(case: Case, dtype: torch.dtype, backend: str) -> None:
    """A stale tensor saved for backward must be detected, and .grad belongs to the user."""
    p = torch.nn.Parameter(torch.ones(37))
    optimizer = case.make([p], backend)
    p.grad = torch.linspace(-1, 1, 37)
    grad, values = p.grad, p.grad.clone()
    optimizer.step()
    for _ in range(4):
        tensors = [p, *(v for k, v in optimizer.state.get(p, {}).items() if k not in oracles.SCALAR_STATES)]
        versions = [tensor._version for tensor in tensors]
        optimizer.step()
        assert all(tensor._version > old for tensor, old in zip(tensors, versions, strict=True))
    assert p.grad is grad
    assert grad._version == 0
    assert torch.equal(grad, values)


@each_backend
def test_backward_through_a_parameter_changed_by_a_step_raises(backend: str) -> None:
    w = torch.nn.Parameter(torch.ones(4))
    optimizer = fastopt.Adam([w], backend=backend)
    w.grad = torch.ones(4)
    loss = (w * w).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Twice:
    """Mixed in before an optimizer: a `step` around its parent's."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)  # type: ignore[misc]


@pytest.mark.contract("hooks", difference="hooks")
@pytest.mark.parametrize("library", [fastopt, torch.optim])
def test_hooks_of_a_class_around_ours(library: Any) -> None:
    cls: Any = type("Around", (Twice, library.SGD), {})
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    library.SGD([p], lr=0.5)  # torch wraps a class's step when one of it is made
    optimizer, called = cls([p], lr=0.5), []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    optimizer.step()
    once = ["before", "after"]
    assert called == (once if library is fastopt else ["before", *once, "after"])
    assert (p == -0.5).all()


class Functions(TorchFunctionMode):
    seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "").endswith("_"):
            self.seen += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.contract("hooks", difference="hooks")
@each_backend
def test_a_mode_that_sees_functions_sees_no_step(backend: str) -> None:
    """torch's for-loop shows it every operation."""
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    for optimizer, sees in ((fastopt.SGD([p], backend=backend), False), (torch.optim.SGD([p], foreach=False), True)):
        optimizer.step()
        with Functions() as mode:
            optimizer.step()
        assert bool(mode.seen) == (sees or backend == "reference")
