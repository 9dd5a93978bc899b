"""Lookahead around ours and around any torch.optim.Optimizer: the paper's numbers, and all a real optimizer must do.

The checks on which published wrappers fail (hooks, resume, copies, groups, schedulers, closures ...) are here.
"""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from cases import TORCH_CASES, Case, each_backend, parametrize
from harness import difference, ramp, same, train, wave
from lookaheads import INNER, each_inner, params, plain_sgd, watch_checkpoints

import fastopt

pytestmark = pytest.mark.contract("lookahead", optimizers="Lookahead")


@each_backend
@pytest.mark.parametrize("foreign", [False, True], ids=["ours", "torch"])
def test_the_papers_trajectory(foreign: bool, backend: str) -> None:
    """p moves by one a step, k = 5, alpha = .5: 1 2 3 4 2.5 and not 1 2 3 4 5 3.5, nor 1 ... 9 7.5."""
    p = torch.nn.Parameter(torch.zeros(1))
    inner = torch.optim.SGD([p], lr=1.0) if foreign else fastopt.SGD([p], lr=1.0, backend=backend)
    optimizer, seen = fastopt.Lookahead(inner, k=5, alpha=0.5), []
    for _ in range(12):
        p.grad = -torch.ones(1)
        optimizer.step()
        seen.append(p.item())
    assert seen == [1, 2, 3, 4, 2.5, 3.5, 4.5, 5.5, 6.5, 5, 6, 7]


@each_inner
@pytest.mark.parametrize(("k", "alpha"), [(5, 0.5), (1, 0.3), (2, 0.0), (3, 0.8)])
def test_foreign_and_own_inner_optimizers_follow_zhang(inner: str, k: int, alpha: float) -> None:
    """Against the same inner optimizer with the formula written out beside it."""
    ours, theirs = params(), params()
    optimizer = fastopt.Lookahead(INNER[inner](ours), k=k, alpha=alpha)
    bare, slow = INNER[inner](theirs), [p.detach().clone() for p in theirs]
    for step in range(11):
        train(optimizer, ours, step, step + 1)
        train(bare, theirs, step, step + 1)
        if (step + 1) % k == 0:
            for p, s in zip(theirs, slow, strict=True):
                s.lerp_(p.detach(), alpha)
                p.data.copy_(s)
        assert same(ours, theirs), f"step {step + 1}"
    assert same([optimizer.state[p]["slow_param"] for p in ours], slow)


@each_inner
def test_alpha_one_is_the_inner_optimizer(inner: str) -> None:
    ours, theirs = params(), params()
    train(fastopt.Lookahead(INNER[inner](ours), k=2, alpha=1.0), ours, 0, 9)
    train(INNER[inner](theirs), theirs, 0, 9)
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


@each_inner
def test_alpha_zero_returns_to_the_start_every_k_steps(inner: str) -> None:
    ours, start = params(), params()
    optimizer = fastopt.Lookahead(INNER[inner](ours), k=3, alpha=0.0)
    train(optimizer, ours, 0, 2)
    assert not same(ours, start)
    train(optimizer, ours, 2, 3)
    assert same(ours, start)
    train(optimizer, ours, 3, 6)
    assert same(ours, start)


@each_backend
def test_k_one_is_sgd_with_a_smaller_step(backend: str) -> None:
    ours, theirs = params(), params()
    train(fastopt.Lookahead(fastopt.SGD(ours, lr=0.2, backend=backend), k=1, alpha=0.25), ours, 0, 6)
    train(torch.optim.SGD(theirs, lr=0.05), theirs, 0, 6)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


BAD: list[dict[str, Any]] = [
    {"k": 0}, {"k": -3}, {"k": 2.5}, {"alpha": -0.1}, {"alpha": 1.1}, {"alpha": float("nan")}, {"k": float("nan")},
]  # fmt: skip


@pytest.mark.contract("lookahead", "construction", optimizers="Lookahead")
@pytest.mark.parametrize("kwargs", BAD, ids=str)
def test_bad_arguments_are_refused_before_anything_changes(kwargs: dict[str, Any]) -> None:
    inner = fastopt.Adam(params())
    before = copy.deepcopy(inner.param_groups)
    with pytest.raises(ValueError, match=r"k|alpha") as error:
        fastopt.Lookahead(inner, **kwargs)
    assert str(next(iter(kwargs.values()))) in str(error.value)
    assert [list(g) for g in inner.param_groups] == [list(g) for g in before]


@pytest.mark.contract("lookahead", "construction", optimizers="Lookahead")
def test_only_optimizers_are_wrapped() -> None:
    with pytest.raises(TypeError, match="Optimizer"):
        fastopt.Lookahead(params())  # type: ignore[arg-type]


@each_inner
def test_it_is_an_optimizer_with_live_views(inner: str) -> None:
    wrapped = INNER[inner](params())
    optimizer = fastopt.Lookahead(wrapped)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.optimizer is wrapped
    assert optimizer.param_groups is wrapped.param_groups
    assert optimizer.state is wrapped.state
    for key, value in wrapped.defaults.items():
        assert optimizer.defaults[key] == value
    group = optimizer.param_groups[0]
    assert (group["lookahead_k"], group["lookahead_alpha"], group["lookahead_step"]) == (5, 0.5, 0)
    assert type(wrapped).__name__ in repr(optimizer)


@each_inner
def test_step_counter_is_per_group(inner: str) -> None:
    ps = params()
    optimizer = fastopt.Lookahead(INNER[inner]([{"params": ps[:1]}]), k=3, alpha=0.0)
    train(optimizer, ps[:1], 0, 2)
    optimizer.add_param_group({"params": ps[1:]})
    if inner == "torch-adagrad":  # before 2.13 torch makes the state of its first parameters only
        optimizer.state[ps[1]].update(step=torch.tensor(0.0), sum=torch.zeros_like(ps[1]))
    start = ps[1].detach().clone()
    assert [g["lookahead_step"] for g in optimizer.param_groups] == [2, 0]
    train(optimizer, ps, 2, 3)
    assert torch.equal(ps[0], params()[0])
    assert not torch.equal(ps[1], start)
    train(optimizer, ps, 3, 5)
    assert torch.equal(ps[1], start)
    assert [g["lookahead_step"] for g in optimizer.param_groups] == [5, 3]


@each_inner
def test_groups_that_the_inner_optimizer_was_given(inner: str) -> None:
    """Or loaded: whatever looks at them first gives them what they lack."""
    looks: tuple[Any, ...] = (lambda o: o.state_dict(), lambda o: o.load_state_dict(saved), lambda o: o.step())
    if fastopt.Lookahead(INNER[inner](params())).fuses:
        looks += (fastopt.explain,)
    for look in looks:
        ps = params()
        optimizer = fastopt.Lookahead(INNER[inner]([{"params": ps[:1]}]), k=3, alpha=0.25)
        optimizer.optimizer.add_param_group({"params": ps[1:]})
        saved = optimizer.optimizer.state_dict()
        optimizer.optimizer.load_state_dict(saved)
        look(optimizer)
        assert [(g["lookahead_k"], g["lookahead_alpha"]) for g in optimizer.param_groups] == [(3, 0.25)] * 2
        assert {g["lookahead_step"] for g in optimizer.param_groups} <= {0, 1}


@each_inner
def test_groups_may_have_their_own_k_and_alpha(inner: str) -> None:
    ps = params()
    groups = [{"params": ps[:1], "lookahead_k": 2, "lookahead_alpha": 0.0}, {"params": ps[1:]}]
    optimizer = fastopt.Lookahead(INNER[inner](groups), k=3, alpha=1.0)
    assert [(g["lookahead_k"], g["lookahead_alpha"]) for g in optimizer.param_groups] == [(2, 0.0), (3, 1.0)]
    free = params()
    train(optimizer, ps, 0, 4)
    train(INNER[inner](free), free, 0, 4)
    assert torch.equal(ps[0], params()[0])
    assert torch.equal(ps[1], free[1])


@pytest.mark.contract("lookahead", "live", optimizers="Lookahead")
@pytest.mark.parametrize("inner", [fastopt.SGD, torch.optim.SGD])
@pytest.mark.parametrize("by", ["closure", "hook"])
def test_groups_added_within_a_step(inner: Any, by: str) -> None:
    """The new group takes this step as its first, and synchronises by its own count."""
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = fastopt.Lookahead(inner([p], lr=0.25), k=2, alpha=0.5)

    def add(*_: Any) -> None:
        p.grad, q.grad = torch.ones(2), torch.ones(2)
        if len(optimizer.param_groups) == 1:
            optimizer.add_param_group({"params": [q]})

    p.grad = torch.ones(2)
    optimizer.step()  # 0.75
    if by == "hook":
        optimizer.optimizer.register_step_pre_hook(add)
    optimizer.step(add if by == "closure" else None)  # to 0.5, back to half of the way from 1
    assert [g["lookahead_step"] for g in optimizer.param_groups] == [2, 1]
    assert [p.tolist(), q.tolist()] == [[0.75, 0.75], [0.75, 0.75]]


@pytest.mark.contract("lookahead", "live", optimizers="Lookahead")
@each_inner
def test_k_and_alpha_edited_in_the_group_take_effect(inner: str) -> None:
    ps = params()
    optimizer = fastopt.Lookahead(INNER[inner](ps), k=50, alpha=0.5)
    train(optimizer, ps, 0, 3)
    assert not same(ps, params())
    optimizer.param_groups[0].update(lookahead_k=4, lookahead_alpha=0.0)
    train(optimizer, ps, 3, 4)
    assert same(ps, params())


@pytest.mark.contract("lookahead", "live", optimizers="Lookahead")
@each_inner
def test_late_gradients(inner: str) -> None:
    """Slow weights are the value before the parameter's own first step, and the group's counter rules."""
    ps = params()
    optimizer = fastopt.Lookahead(INNER[inner](ps), k=4, alpha=0.0)
    for step in range(8):
        ps[0].grad = wave((9,), step)
        ps[1].grad = wave((3, 4), step) if step >= 2 else None
        if step == 2:
            assert torch.equal(ps[1], params()[1])
        optimizer.step()
        assert torch.equal(ps[1], params()[1]) == (step < 2 or step % 4 == 3)


@each_inner
def test_parameters_without_a_gradient_are_pulled_back_too(inner: str) -> None:
    """At the moment of synchronisation the second one has none: it must not keep its fast weights."""
    ps = params()
    optimizer = fastopt.Lookahead(INNER[inner](ps), k=3, alpha=0.0)
    train(optimizer, ps, 0, 2)
    ps[0].grad, ps[1].grad = wave((9,), 2), None
    optimizer.step()
    assert same(ps, params())


@pytest.mark.contract("lookahead", "live", optimizers="Lookahead")
@each_inner
def test_frozen_and_unused_parameters(inner: str) -> None:
    ps = [*params(), torch.nn.Parameter(ramp(3), requires_grad=False), torch.nn.Parameter(ramp(4))]
    optimizer = fastopt.Lookahead(INNER[inner](ps), k=2)
    train(optimizer, ps[:2], 0, 5)
    assert torch.equal(ps[2], ramp(3))
    assert torch.equal(ps[3].detach(), ramp(4))


@pytest.mark.contract("lookahead", "hooks", optimizers="Lookahead")
@each_inner
def test_hooks_of_wrapper_and_inner_fire_once_in_order(inner: str) -> None:
    ps, calls = params(), []
    wrapped = INNER[inner](ps)
    optimizer = fastopt.Lookahead(wrapped)
    optimizer.register_step_pre_hook(lambda *_: calls.append("outer pre"))
    wrapped.register_step_pre_hook(lambda *_: calls.append("inner pre"))
    wrapped.register_step_post_hook(lambda *_: calls.append("inner post"))
    optimizer.register_step_post_hook(lambda *_: calls.append("outer post"))
    train(optimizer, ps, 0, 2)
    assert calls == ["outer pre", "inner pre", "inner post", "outer post"] * 2
    calls.clear()
    watch_checkpoints(optimizer, calls)
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["save pre", "save post", "load pre", "load post"]


@pytest.mark.contract("lookahead", "hooks", optimizers="Lookahead")
def test_a_hook_that_raises_after_the_step_does_not_undo_its_count() -> None:
    ps, others = params(), params()
    optimizer = fastopt.Lookahead(fastopt.SGD(ps, lr=0.1), k=3)
    optimizer.optimizer.register_step_post_hook(lambda *_: 1 / 0)
    for step in range(7):
        for i, p in enumerate(ps):
            p.grad = wave(p.shape, step + i)
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
    train(fastopt.Lookahead(fastopt.SGD(others, lr=0.1), k=3), others, 0, 7)
    assert same(ps, others)
    assert optimizer.param_groups[0]["lookahead_step"] == 7


@pytest.mark.contract("lookahead", optimizers="Lookahead")
@each_inner
def test_k_of_numpy(inner: str) -> None:
    ps, others = params(), params()
    train(fastopt.Lookahead(INNER[inner](ps), k=np.int64(2)), ps, 0, 5)
    train(fastopt.Lookahead(INNER[inner](others), k=2), others, 0, 5)
    assert same(ps, others)


@pytest.mark.contract("lookahead", "hooks", optimizers="Lookahead")
@each_inner
def test_closure(inner: str) -> None:
    """Called once, with gradients enabled, its loss returned; first gradients may appear inside it."""
    ps, calls = params(), []
    optimizer = fastopt.Lookahead(INNER[inner](ps), k=2, alpha=0.0)

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum(((p - 3) ** 2).sum() for p in ps)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert isinstance(loss, torch.Tensor)
    assert optimizer.step(closure=closure) is not None
    assert calls == [True, True]
    assert same(ps, params())
    optimizer.zero_grad(set_to_none=True)
    assert optimizer.step(closure=None) is None


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=9),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3),
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.3),
}


@pytest.mark.contract("lookahead", "schedulers", optimizers="Lookahead")
@pytest.mark.parametrize("on", ["wrapper", "inner"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("inner", ["ours-sgd", "ours-adam", "ours-ranger", "torch-sgd", "torch-adam"])
def test_schedulers(inner: str, scheduler: str, on: str) -> None:
    """On the wrapper or on what it wraps: the inner optimizer's trajectory for alpha = 1, and no warning."""
    results = []
    for wrapped in (False, True):
        ps = params()
        bare = INNER[inner](ps)
        optimizer = fastopt.Lookahead(bare, k=3, alpha=1.0) if wrapped else bare
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            schedule = SCHEDULERS[scheduler](optimizer if on == "wrapper" else bare)
            for step in range(8):
                train(optimizer, ps, step, step + 1)
                schedule.step()
        results.append(ps)
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


@each_inner
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(inner: str, set_to_none: bool) -> None:
    ps = params()
    optimizer = fastopt.Lookahead(INNER[inner](ps))
    train(optimizer, ps, 0, 1)
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all(p.grad is None if set_to_none else not p.grad.any() for p in ps)


@each_inner
def test_gradients_are_left_alone(inner: str) -> None:
    ps = params()
    optimizer = fastopt.Lookahead(INNER[inner](ps), k=1)
    for p in ps:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(p.grad._version == 0 and (p.grad == 1).all() for p in ps)


def _scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)


AMP = {
    **INNER,
    "ours-fused-adam": lambda ps: fastopt.Adam(ps, lr=0.05, fused=True),
    "ours-fused-sgd": lambda ps: fastopt.SGD(ps, lr=0.05, momentum=0.9, fused=True),
}


@pytest.mark.contract("lookahead", "amp", optimizers="Lookahead")
@pytest.mark.parametrize("inner", AMP)
@pytest.mark.parametrize("bad", [{0}, {4}, {2, 3}], ids=["first", "synchronising", "middle"])
def test_gradscaler_overflow_neither_counts_nor_pulls_back(inner: str, bad: set[int]) -> None:
    """The trajectory is that of the finite steps alone: counter, slow weights, inner states and parameters."""
    ps, clean = params(), params()
    optimizer, reference = (fastopt.Lookahead(AMP[inner](p), k=5, alpha=0.5) for p in (ps, clean))
    amp = _scaler()
    for step in range(12):
        amp.scale(torch.zeros(1))
        for i, p in enumerate(ps):
            p.grad = wave(p.shape, step + i) * amp.get_scale()
        if step in bad:
            ps[1].grad[0, 0] = float("inf")
        before = [p.detach().clone() for p in ps], optimizer.param_groups[0]["lookahead_step"]
        amp.step(optimizer)
        amp.update()
        if step in bad:
            assert same(ps, before[0])
            assert optimizer.param_groups[0]["lookahead_step"] == before[1]
        else:
            train(reference, clean, step, step + 1)
        assert same(ps, clean), f"step {step}"
    assert optimizer.param_groups[0]["lookahead_step"] == 12 - len(bad)


@pytest.mark.contract("lookahead", "amp", optimizers="Lookahead")
def test_amp_scaling_is_left_to_the_scaler_unless_the_inner_optimizer_does_it() -> None:
    for inner, expected in (("ours-adam", False), ("ours-fused-adam", True), ("torch-adam", False)):
        optimizer = fastopt.Lookahead(AMP[inner](params()))
        assert bool(getattr(optimizer, "_step_supports_amp_scaling", False)) == expected


@each_inner
def test_slow_weights_context(inner: str) -> None:
    """Evaluation sees the slow weights; afterwards the fast ones are back bit for bit, also after an error."""
    ps = params()
    optimizer = fastopt.Lookahead(INNER[inner](ps), k=5, alpha=0.5)
    with optimizer.slow_weights():
        assert same(ps, params())
    train(optimizer, ps, 0, 7)
    fast = [p.detach().clone() for p in ps]
    slow = [optimizer.state[p]["slow_param"].clone() for p in ps]
    with optimizer.slow_weights():
        assert same(ps, slow)
    assert same(ps, fast)
    with pytest.raises(KeyError), optimizer.slow_weights():
        raise KeyError
    assert same(ps, fast)
    with optimizer.slow_weights(), pytest.raises(RuntimeError, match="would be undone"):
        optimizer.step()
    with optimizer.slow_weights(), pytest.raises(RuntimeError, match="would be undone"):
        optimizer.optimizer.step()
    assert same(ps, fast)
    assert same([optimizer.state[p]["slow_param"] for p in ps], slow)
    free = params()
    train(other := fastopt.Lookahead(INNER[inner](free), k=5, alpha=0.5), free, 0, 10)
    train(optimizer, ps, 7, 10)
    assert same(ps, free)
    with other.slow_weights():
        assert same(ps, free), "right after a synchronisation slow and fast weights are the same"


@each_inner
def test_slow_weights_that_cannot_be_put_in_or_taken_out_leave_the_fast_ones(inner: str) -> None:
    ps = params()
    optimizer = fastopt.Lookahead(INNER[inner](ps), k=5, alpha=0.5)
    train(optimizer, ps, 0, 7)
    fast, last = [p.detach().clone() for p in ps], ps[-1].data
    ps[-1].data = torch.zeros(77)
    with pytest.raises(RuntimeError, match="size"), optimizer.slow_weights():
        pytest.fail("entered")
    ps[-1].data = last
    assert same(ps, fast)
    with pytest.raises(RuntimeError, match="size"), optimizer.slow_weights():
        ps[0].data = torch.zeros(77)
    assert same(ps[1:], fast[1:])
    ps[0].data = fast[0].clone()
    train(optimizer, ps, 7, 10)
    free = params()
    train(fastopt.Lookahead(INNER[inner](free), k=5, alpha=0.5), free, 0, 10)
    assert same(ps, free)


@each_inner
def test_parameters_moved_before_the_first_step(inner: str) -> None:
    """model.double() or .to(device) after construction: slow weights are made at the first step, so they follow."""
    ps = params()
    optimizer = fastopt.Lookahead(INNER[inner](ps), k=2, alpha=0.0)
    if "adagrad" in inner:
        return  # its own states exist from construction on, in torch as well
    for p in ps:
        p.data = p.data.double() + 1
    for step in range(2):
        for p in ps:
            p.grad = wave(p.shape, step).double()
        optimizer.step()
    assert all(torch.equal(p.detach(), q.detach().double() + 1) for p, q in zip(ps, params(), strict=True))


@parametrize([c for c in TORCH_CASES if c.id in ("adam", "sgd", "radam")], ("fp32",))
def test_around_ours_it_is_one_pass(case: Case, dtype: torch.dtype, backend: str) -> None:
    """explain counts the same launches as for the inner optimizer, and names the synchronising stage's state."""
    ps = params()
    optimizer = fastopt.Lookahead(case.make(ps, backend))
    train(optimizer, ps, 0, 1)
    text = str(fastopt.explain(optimizer))
    assert "Lookahead" in text
    assert backend in text


@pytest.mark.contract("lookahead", "memory", optimizers="Lookahead")
def test_nothing_is_kept_alive() -> None:
    for inner in INNER:
        ps = params()
        optimizer = fastopt.Lookahead(INNER[inner](ps))
        train(optimizer, ps, 0, 6)
        grad, p = weakref.ref(ps[0].grad), weakref.ref(ps[0])
        ps[0].grad = None
        if "reference" not in inner:
            assert grad() is None, inner
        del optimizer, ps
        gc.collect()
        assert p() is None, inner


def test_stepping_the_inner_optimizer_directly_is_an_inner_step() -> None:
    """Some trainers do it. It must neither count nor pull back, nor corrupt what follows."""
    p, optimizer = plain_sgd(k=2, alpha=0.0)
    p.grad = -torch.ones(1)
    optimizer.optimizer.step()
    assert p.item() == 1.0
    assert optimizer.param_groups[0]["lookahead_step"] == 0
    optimizer.step()
    optimizer.step()
    assert p.item() == 1.0, "slow weights are those before the first Lookahead step"


def test_momentum_is_left_to_the_inner_optimizer() -> None:
    """The authors' default: buffers are neither reset nor pulled back at a synchronisation."""
    p, optimizer = plain_sgd(k=2, alpha=0.0, momentum=0.5)
    for expected in (-1.0, 0.0, -1.75):
        p.grad = torch.ones(1)
        optimizer.step()
        assert p.item() == expected


@pytest.mark.contract("lookahead", "low precision", optimizers="Lookahead")
@each_backend
def test_oracle_and_wrapper_agree_on_low_precision_parameters(backend: str) -> None:
    """bf16: the slow weights have the parameter's dtype and the pull-back is computed in float32."""
    p = torch.nn.Parameter(ramp(33).bfloat16())
    q = torch.nn.Parameter(ramp(33).bfloat16())
    optimizer = fastopt.Lookahead(fastopt.SGD([p], lr=0.1, backend=backend), k=2, alpha=0.3)

    def make(groups: Any) -> Any:
        return oracles.Lookahead(oracles.TorchLoop("SGD", groups, lr=0.1), 2, 0.3)

    oracle = oracles.LowPrecision(make, [q])
    for step in range(6):
        p.grad = q.grad = wave((33,), step).bfloat16()
        optimizer.step()
        oracle.step()
        assert not difference(p.detach(), q.detach())
    assert optimizer.state[p]["slow_param"].dtype == torch.bfloat16
