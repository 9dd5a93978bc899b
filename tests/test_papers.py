"""Claims of the papers, reproduced: AMSGrad's two counterexamples to Adam, and textbook rates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import backends, each_backend

import fastopt

pytestmark = pytest.mark.contract("numbers")


def online(optimizer: Any, x: torch.Tensor, slopes: Any, alpha: float, steps: int) -> torch.Tensor:
    """Minimise f_t(x) = slopes(t) x over [-1, 1] with step sizes alpha / sqrt(t). The mean loss per coordinate."""
    total = torch.zeros_like(x)
    group, grad = optimizer.param_groups[0], torch.zeros_like(x)
    x.grad = grad
    with torch.no_grad():
        for t in range(1, steps + 1):
            slope = slopes(t)
            total += slope * x
            grad.fill_(slope) if isinstance(slope, (int, float)) else grad.copy_(slope)
            group["lr"] = alpha / math.sqrt(t)
            optimizer.step()
            x.clamp_(-1, 1)
    return total / steps


@pytest.mark.contract("numbers", optimizers="Adam")
@pytest.mark.parametrize(("C", "adam_at_least", "amsgrad_at_most"), [(3.0, 0.99, -0.99), (10.0, 0.99, -0.99)])
@pytest.mark.parametrize("backend", backends(["native"]))
def test_amsgrad_theorem_1(C: float, adam_at_least: float, amsgrad_at_most: float, backend: str) -> None:
    """f_t = C x every third step, else -x: the optimum is -1, and Adam ends at +1 from every start.

    Its average regret is then the slope's mean times the distance, 2 (C - 2) / 3 per step; AMSGrad's vanishes. The
    three starts are three coordinates. arXiv:1904.09237, theorem 1, with beta1 = 0 and beta2 = 1 / (1 + C^2).
    """
    steps = 9_000
    results = []
    for amsgrad in (False, True):
        x = torch.nn.Parameter(torch.tensor([-1.0, 0.0, 1.0]))
        optimizer = fastopt.Adam([x], betas=(0.0, 1 / (1 + C * C)), amsgrad=amsgrad, backend=backend)
        mean_loss = online(optimizer, x, lambda t: C if t % 3 == 1 else -1.0, alpha=0.5, steps=steps)
        optimal = -(C - 2) / 3  # at x = -1
        results.append((x.detach(), mean_loss - optimal))
    (adam, adam_regret), (amsgrad_x, amsgrad_regret) = results
    assert (adam >= adam_at_least).all()
    assert (amsgrad_x <= amsgrad_at_most).all()
    torch.testing.assert_close(adam_regret, torch.full((3,), 2 * (C - 2) / 3), rtol=0.03, atol=0)
    assert (amsgrad_regret.abs() < 0.03 * 2 * (C - 2) / 3).all()


@pytest.mark.contract("numbers", optimizers="Adam")
@pytest.mark.parametrize("backend", backends(["native"]))
def test_amsgrad_section_5(backend: str) -> None:
    """f_t = 1010 x every 101st step, else -10 x; beta = (.9, .99). The optimum is -1; Adam goes to +1."""
    ends = []
    for amsgrad in (False, True):
        x = torch.nn.Parameter(torch.zeros(1))
        optimizer = fastopt.Adam([x], betas=(0.9, 0.99), amsgrad=amsgrad, backend=backend)
        online(optimizer, x, lambda t: 1010.0 if t % 101 == 1 else -10.0, alpha=0.5, steps=60_000)
        ends.append(x.item())
    assert ends[0] > 0.95
    assert ends[1] < -0.95


@pytest.mark.contract("numbers", optimizers="Adam")
@pytest.mark.parametrize("backend", backends(["native"]))
def test_amsgrad_section_5_stochastic(backend: str) -> None:
    """1010 x with probability .01, else -10 x, on 64 independent coordinates with constant steps.

    AMSGrad drifts to -1 only over the paper's 10^7 steps; what shows sooner is that Adam has settled at the wrong end.
    """
    generator = torch.Generator().manual_seed(0)
    xs = [torch.nn.Parameter(torch.zeros(64)) for _ in range(2)]
    optimizers = [
        fastopt.Adam([x], lr=1e-3, betas=(0.9, 0.99), amsgrad=a, backend=backend)
        for x, a in zip(xs, (False, True), strict=True)
    ]
    grads = [torch.zeros(64) for _ in xs]
    for x, g in zip(xs, grads, strict=True):
        x.grad = g
    with torch.no_grad():
        for _ in range(40):
            for rare in torch.rand(500, 64, generator=generator) < 0.01:
                slope = torch.where(rare, 1010.0, -10.0)
                for x, g, optimizer in zip(xs, grads, optimizers, strict=True):
                    g.copy_(slope)
                    optimizer.step()
                    x.clamp_(-1, 1)
    assert xs[0].mean() > 0.9
    assert xs[1].mean() < 0.5


@each_backend
@pytest.mark.parametrize(("name", "kwargs"), [("Adam", {}), ("NAdam", {"momentum_decay": 0.0}), ("Adamax", {})])
def test_invariance_to_the_scale_of_all_gradients(name: str, kwargs: dict[str, Any], backend: str) -> None:
    """Adam's update does not change when every gradient is multiplied by a power of two (eps = 0)."""
    runs = []
    for scale in (1.0, 2.0**10):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 33))
        optimizer = getattr(fastopt, name)([p], lr=0.01, eps=0.0, backend=backend, **kwargs)
        for step in range(12):
            p.grad = (torch.sin(torch.arange(33.0) + step) + 0.01) * scale
            optimizer.step()
        runs.append(p.detach())
    assert torch.equal(*runs)


@pytest.mark.contract("numbers", optimizers="Adam")
@each_backend
def test_adam_first_step_is_lr_times_the_sign(backend: str) -> None:
    """|delta_1| = lr |g| / (|g| + eps), whatever the betas."""
    g = torch.tensor([1e-6, 1e-3, 1.0, 1e3, -5.0])
    p = torch.nn.Parameter(torch.zeros(5))
    optimizer = fastopt.Adam([p], lr=0.1, betas=(0.7, 0.9), eps=1e-3, backend=backend)
    p.grad = g
    optimizer.step()
    torch.testing.assert_close(p.detach(), -0.1 * g / (g.abs() + 1e-3), rtol=1e-6, atol=0)


@pytest.mark.contract("numbers", optimizers="Adamax")
@each_backend
def test_adamax_never_moves_farther_than_lr(backend: str) -> None:
    p = torch.nn.Parameter(torch.zeros(50))
    optimizer = fastopt.Adamax([p], lr=0.1, backend=backend)
    for step in range(40):
        before = p.detach().clone()
        p.grad = torch.randn(50) * 10.0 ** (step % 7 - 3)
        optimizer.step()
        assert ((p.detach() - before).abs() <= 0.1 * (1 + 1e-5)).all()


@pytest.mark.contract("numbers", optimizers="Adagrad")
@each_backend
def test_adagrad_under_a_constant_gradient_moves_as_one_over_root_t(backend: str) -> None:
    """|delta_t| = lr / sqrt(t) exactly, up to eps."""
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = fastopt.Adagrad([p], lr=0.5, eps=0.0, backend=backend)
    for t in range(1, 50):
        before = p.item()
        p.grad = torch.full((1,), 3.7, dtype=torch.float64)
        optimizer.step()
        assert before - p.item() == pytest.approx(0.5 / math.sqrt(t), rel=1e-12)


@pytest.mark.contract("numbers", optimizers="SGD")
@each_backend
@pytest.mark.parametrize("kappa", [10.0, 100.0])
def test_gradient_descent_and_heavy_ball_have_the_textbook_rates(kappa: float, backend: str) -> None:
    """Eigenvalues 1 ... kappa: (kappa - 1) / (kappa + 1), and the same of sqrt(kappa) with the best momentum."""
    root = math.sqrt(kappa)
    settings = [
        ({"lr": 2 / (1 + kappa)}, (kappa - 1) / (kappa + 1)),
        ({"lr": 4 / (1 + root) ** 2, "momentum": ((root - 1) / (root + 1)) ** 2}, (root - 1) / (root + 1)),
    ]
    for kwargs, rate in settings:
        eigenvalues = torch.linspace(1, kappa, 16, dtype=torch.float64)
        p = torch.nn.Parameter(torch.ones(16, dtype=torch.float64))
        optimizer = fastopt.SGD([p], backend=backend, **kwargs)
        norms = []
        for _ in range(240):
            p.grad = eigenvalues * p.detach()
            optimizer.step()
            norms.append(p.detach().norm().item())
        measured = (norms[239] / norms[119]) ** (1 / 120)
        assert measured == pytest.approx(rate, rel=0.02)


@pytest.mark.contract("numbers", optimizers="Lookahead")
@each_backend
def test_lookahead_stabilises_a_learning_rate_that_diverges_alone(backend: str) -> None:
    """The paper's section 3: on a quadratic, interpolation damps an inner loop whose steps are too long."""

    def final(optimizer_of: Any) -> float:
        p = torch.nn.Parameter(torch.ones(8))
        optimizer = optimizer_of([p])
        for _ in range(200):
            p.grad = torch.linspace(0.1, 1.0, 8) * p.detach()
            optimizer.step()
        return p.detach().abs().max().item()

    alone = final(lambda ps: fastopt.SGD(ps, lr=2.05, backend=backend))
    damped = final(lambda ps: fastopt.Lookahead(fastopt.SGD(ps, lr=2.05, backend=backend), k=5, alpha=0.5))
    assert alone > 1e3
    assert damped < 1e-3
