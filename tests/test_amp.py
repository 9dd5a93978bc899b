"""GradScaler: with fused gradients arrive scaled and overflows are ours to skip; else torch's scaler does both."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from cases import Case, backends, by_id, parametrize
from harness import Built, Scenario, Spec, assert_same, difference, snapshot, states_in_order

import fastopt

pytestmark = pytest.mark.contract("amp")

SCENARIO = Scenario(
    "amp",
    (Spec((33,)), Spec((4, 5), absent=frozenset({0, 3})), Spec((6, 3), "transposed", "contiguous")),
    steps=9,
)
SCALE = 2.0**10
FUSED = [
    Case(f"{c.id}-fused", c.name, {**c.kwargs, "fused": True}, c.lookahead)
    for c in by_id(
        "sgd", "sgd-momentum", "sgd-nesterov", "adagrad-everything", "adam-coupled", "adam-everything", "adamw"
    )
]
UNFUSED = by_id("sgd-momentum", "rmsprop-momentum", "adagrad", "adam", "adamw", "adamax", "nadam", "radam")
UNFUSED += by_id("ranger", "lookahead-adam")


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=1000, backoff_factor=0.5)


def set_scaled_grads(built: Built, step: int, scale: float, overflow: bool) -> None:
    built.set_grads(step)
    present = [p for p in built.params if p.grad is not None]
    for p in present:
        p.grad.mul_(scale)  # a power of two: exact
    if overflow:
        present[-1].grad.view(-1)[0] = float("inf") if step % 2 else float("nan")


@pytest.mark.parametrize("bad", [{0}, {4}, {0, 1, 5}, set()], ids=["first", "middle", "several", "never"])
@parametrize(FUSED + UNFUSED, ("fp32",))
def test_steps_with_an_overflow_did_not_happen(case: Case, dtype: torch.dtype, backend: str, bad: set[int]) -> None:
    """Parameters, states and step counts are those of a run over the finite steps alone."""
    ours, theirs = Built(SCENARIO, case, dtype), Built(SCENARIO, case, dtype, contiguous=True)
    optimizer, oracle, amp = case.make(ours.groups, backend), case.oracle(theirs.groups), scaler()
    for step in range(SCENARIO.steps):
        scale = amp.get_scale()
        amp.scale(torch.zeros(1))  # what a training step does first; the scaler refuses to step without it
        set_scaled_grads(ours, step, scale, overflow=step in bad)
        result = amp.step(optimizer)
        assert result is None
        amp.update()
        assert amp.get_scale() == (scale / 2 if step in bad else scale)
        if step not in bad:
            theirs.set_grads(step)
            oracle.step()
        got = snapshot(ours.order, states_in_order(optimizer, len(ours.order)))
        want = snapshot(theirs.order, [oracles.states_of(oracle, p) for p in theirs.order])
        if not any(step not in bad for step in range(step + 1)):
            # States may exist after a skipped first step, but then they are at their start.
            got = [(p, {k: v for k, v in s.items() if k in r}) for (p, s), (_, r) in zip(got, want, strict=True)]
        assert_same([got], [want])
        assert not hasattr(optimizer, "grad_scale") or optimizer.grad_scale is None
        assert not hasattr(optimizer, "found_inf") or optimizer.found_inf is None


@parametrize(FUSED, ("fp32", "bf16"))
def test_found_inf_leaves_everything_untouched(case: Case, dtype: torch.dtype, backend: str) -> None:
    built = Built(SCENARIO, case, dtype)
    optimizer = case.make(built.groups, backend)
    for step in range(3):
        built.set_grads(step)
        optimizer.step()
    before = snapshot(built.order, states_in_order(optimizer, len(built.order)))
    built.set_grads(4)
    grads = [p.grad.clone() for p in built.params]
    optimizer.found_inf, optimizer.grad_scale = torch.ones(()), torch.tensor(SCALE)
    optimizer.step()
    assert_same([snapshot(built.order, states_in_order(optimizer, len(built.order)))], [before])
    for p, grad in zip(built.params, grads, strict=True):
        assert torch.equal(p.grad, grad)


@parametrize(FUSED, ("fp32",))
def test_gradients_are_unscaled_in_place_as_torchs_fused_kernels_do(
    case: Case, dtype: torch.dtype, backend: str
) -> None:
    """The one exception to never writing gradients: whoever reads .grad after the step sees the true gradient."""
    p = torch.nn.Parameter(torch.zeros(5))
    optimizer = case.make([p], backend)
    p.grad = torch.full((5,), 8.0)
    grad = p.grad
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.zeros(())
    optimizer.step()
    assert p.grad is grad
    assert grad.tolist() == [2.0] * 5


@parametrize(by_id("adam", "sgd-momentum", "adagrad"), ("fp32",))
def test_scale_that_is_no_power_of_two(case: Case, dtype: torch.dtype, backend: str) -> None:
    """One ulp of the gradient (divided here, multiplied by a reciprocal elsewhere) is one ulp of the update."""
    p, q = (torch.nn.Parameter(torch.linspace(-1, 1, 19)) for _ in range(2))
    optimizer, reference = case.make([p], backend, fused=True), case.make([q], backend)
    for step in range(3):
        q.grad = torch.cos(torch.arange(19.0) + step)
        p.grad = q.grad * 3
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(3.0), torch.zeros(())
        optimizer.step()
        reference.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@parametrize(FUSED, ("fp32",))
def test_scaled_gradients_of_parameters_that_fall_back(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Overlapping memory goes to torch's code: unscaled once, not twice, and not through torch's fused kernel."""
    runs = []
    for scale in (1.0, SCALE):
        base = torch.linspace(-1, 1, 40)
        params = [torch.nn.Parameter(base[:25]), torch.nn.Parameter(base[15:]), torch.nn.Parameter(torch.ones(9))]
        optimizer = case.make(params, backend)
        for step in range(6):
            for i, p in enumerate(params):
                p.grad = torch.cos(torch.arange(float(p.numel())) + step + i) * scale
            if scale != 1.0:
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(float(step == 2))
            if scale != 1.0 or step != 2:
                optimizer.step()
        runs.append((base, params[2].detach()))
    assert all(not difference(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam", "AdamW"])
def test_amp_support_is_announced_exactly_when_torch_announces_it(name: str) -> None:
    for kwargs in ({}, {"fused": True}, {"fused": False}, {"foreach": True}):
        ours, theirs = (getattr(m, name)([torch.nn.Parameter(torch.ones(1))], **kwargs) for m in (fastopt, torch.optim))
        flags = [getattr(o, "_step_supports_amp_scaling", False) for o in (ours, theirs)]
        assert flags[0] == flags[1]


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("fused", [True, False])
def test_clipping_between_unscale_and_step(fused: bool, backend: str) -> None:
    """scaler.unscale_ first: the step must not divide again."""
    p, q = (torch.nn.Parameter(torch.linspace(-1, 1, 19)) for _ in range(2))
    optimizer, reference = fastopt.Adam([p], fused=fused, backend=backend), oracles.TorchLoop("Adam", [q])
    amp = scaler()
    for step in range(3):
        amp.scale(torch.zeros(1))
        grad = torch.cos(torch.arange(19.0) + step)
        p.grad, q.grad = grad * amp.get_scale(), grad.clone()
        amp.unscale_(optimizer)
        for parameter in (p, q):
            torch.nn.utils.clip_grad_norm_([parameter], 0.5)
        amp.step(optimizer)
        amp.update()
        reference.step()
        assert not difference(p.detach(), q.detach())


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("make", [
    lambda ps, b: fastopt.Adam(ps, lr=0.2, fused=True, backend=b),
    lambda ps, b: fastopt.Lookahead(fastopt.Adam(ps, lr=0.2, fused=True, backend=b)),
    lambda ps, b: fastopt.Ranger(ps, lr=0.2, backend=b),
], ids=["adam", "lookahead", "ranger"])  # fmt: skip
def test_training_under_autocast(make: Any, backend: str) -> None:
    """The whole recipe, model and all, with a scale that overflows at first: the loss falls and nothing turns NaN."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    x = torch.randn(64, 8)
    y = x[:, :1] * 20
    optimizer, amp = (
        make(model.parameters(), backend),
        torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-8),
    )
    losses, skipped = [], 0
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = torch.nn.functional.mse_loss(model(x).float(), y)
        amp.scale(loss).backward()
        before = [p.detach().clone() for p in model.parameters()]
        scale = amp.get_scale()
        amp.step(optimizer)
        amp.update()
        if amp.get_scale() < scale:
            skipped += 1
            assert all(torch.equal(p.detach(), q) for p, q in zip(model.parameters(), before, strict=True))
        losses.append(loss.item())
    assert 0 < skipped < 20
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.isfinite().all() for p in model.parameters())
