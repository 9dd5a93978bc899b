"""Every scheduler of torch.optim.lr_scheduler, and weight averaging, on ours.

A scheduler writes into the groups: lr, and some of them betas or momentum. Ours must get the values that torch's own
optimizer gets from the same scheduler, and take the steps of a twin into whose groups these values are written by hand.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case, by_id, each_backend, parametrize
from harness import difference
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import fastopt

pytestmark = pytest.mark.contract("schedulers")

STEPS = 11


def has_momentum(optimizer: Any) -> bool:
    """Whether there is one to cycle: torch's cyclic schedulers refuse an optimizer without (Adagrad)."""
    return not optimizer.defaults.keys().isdisjoint({"momentum", "betas"})


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=3, gamma=0.3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, milestones=[2, 5], gamma=0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.25, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=8, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=8, eta_min=1e-4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=STEPS + 1, cycle_momentum=has_momentum(o)),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.05, step_size_up=3, cycle_momentum=has_momentum(o)),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, start_factor=0.2, total_iters=3), lr_scheduler.ExponentialLR(o, gamma=0.7)],
        milestones=[4],
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, factor=0.5, total_iters=5), lr_scheduler.ExponentialLR(o, gamma=0.9)]
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=0.02, anneal_epochs=5),
}
WRITTEN = ("lr", "betas", "momentum", "initial_lr", "max_momentum", "base_momentum", "max_lr", "min_lr", "swa_lr")
CASES = by_id("sgd-nesterov", "rmsprop-momentum", "adagrad", "adam-amsgrad", "adamw", "adamax", "nadam", "radam")
CASES += by_id("ranger", "lookahead-sgd-nesterov")
each_scheduler = pytest.mark.parametrize("scheduler", SCHEDULERS)


def test_every_scheduler_of_torch_is_here() -> None:
    public = {
        name
        for name in lr_scheduler.__all__
        if inspect.isclass(getattr(lr_scheduler, name)) and name not in ("LRScheduler", "_LRScheduler")
    }
    assert public <= SCHEDULERS.keys()


def params() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (9, 33)]


def groups(ps: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": ps[:1]}, {"params": ps[1:], "lr": 0.02}]


def values(optimizer: Any) -> list[dict[str, Any]]:
    return [{k: copy.deepcopy(v) for k, v in group.items() if k in WRITTEN} for group in optimizer.param_groups]


def advance(scheduler: Any, step: int) -> None:
    scheduler.step(1.0) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else scheduler.step()


def run(optimizer: Any, ps: list[Any], scheduler: Any, start: int = 0, stop: int = STEPS) -> list[Any]:
    """What the scheduler wrote before each step."""
    seen = []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*before.*optimizer.step")  # the scheduler watches whether we step
        for step in range(start, stop):
            for i, p in enumerate(ps):
                p.grad = torch.cos(torch.arange(float(p.numel())) + step + i)
            seen.append(values(optimizer))
            optimizer.step()
            advance(scheduler, step)
    return seen


class ByHand:
    """A scheduler that writes down what another one wrote."""

    def __init__(self, optimizer: Any, written: list[Any]) -> None:
        self.optimizer, self.rest = optimizer, iter(written)
        self.step()

    def step(self) -> None:
        for group, new in zip(self.optimizer.param_groups, next(self.rest, [{}, {}]), strict=True):
            group.update({k: v.item() if isinstance(v, torch.Tensor) else v for k, v in new.items()})


def assert_same(a: list[Any], b: list[Any]) -> None:
    assert all(not difference(p.detach(), q.detach()) for p, q in zip(a, b, strict=True))


@each_scheduler
@parametrize(CASES, ["fp32"])
def test_values_are_torchs_and_steps_are_those_of_the_values(
    case: Case, dtype: torch.dtype, backend: str, scheduler: str
) -> None:
    make = SCHEDULERS[scheduler]
    ours, theirs, by_hand = params(), params(), params()
    optimizer = case.make(groups(ours), backend)
    stock = torch.optim.RAdam if case.name == "Ranger" else getattr(torch.optim, case.name)
    shared = {k: v for k, v in optimizer.param_groups[0].items() if k in ("lr", "betas", "momentum", "nesterov")}
    reference = stock(groups(theirs), **{k: v for k, v in shared.items() if k in inspect.signature(stock).parameters})
    written = run(optimizer, ours, make(optimizer))
    assert written == run(reference, theirs, make(reference))
    oracle = case.oracle(groups(by_hand))
    run(oracle, by_hand, ByHand(oracle, written))
    assert_same(ours, by_hand)
    if scheduler in ("OneCycleLR", "CyclicLR") and has_momentum(optimizer):
        key = "betas" if "betas" in optimizer.defaults else "momentum"
        assert len({str(step[0][key]) for step in written}) > 3


@each_scheduler
@each_backend
def test_a_tensor_lr_is_written_in_place(backend: str, scheduler: str) -> None:
    """torch's schedulers fill a tensor lr: the same tensor holds another value, and the step must read that."""
    ours, twin = params(), params()
    lrs = [torch.tensor(0.01), torch.tensor(0.02)]
    optimizer = fastopt.Adam([{"params": [p], "lr": lr} for p, lr in zip(ours, lrs, strict=True)], backend=backend)
    written = run(optimizer, ours, SCHEDULERS[scheduler](optimizer))
    assert all(group["lr"] is lr for group, lr in zip(optimizer.param_groups, lrs, strict=True))
    other = fastopt.Adam([{"params": [p]} for p in twin], backend=backend)
    run(other, twin, ByHand(other, written))
    assert_same(ours, twin)


@each_scheduler
@pytest.mark.parametrize("case", by_id("sgd-nesterov", "nadam", "ranger", "lookahead-adam"), ids=lambda c: c.id)
def test_optimizer_and_scheduler_resume_together(case: Case, scheduler: str) -> None:
    """Saved and loaded in the middle, the optimizer first: making a scheduler writes into the groups."""
    whole, halves = params(), params()
    optimizer = case.make(groups(whole))
    run(optimizer, whole, SCHEDULERS[scheduler](optimizer))
    first = case.make(groups(halves))
    schedule = SCHEDULERS[scheduler](first)
    run(first, halves, schedule, 0, 5)
    second = case.make(groups(halves))
    resumed = SCHEDULERS[scheduler](second)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    resumed.load_state_dict(copy.deepcopy(schedule.state_dict()))
    run(second, halves, resumed, 5, STEPS)
    assert_same(whole, halves)


@each_backend
def test_a_plateau_halves_the_rate(backend: str) -> None:
    """Driven by a loss that stops falling, and bounded from below."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = fastopt.SGD([p], lr=0.1, backend=backend)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1, min_lr=0.02)
    rates = []
    for loss in (3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0):
        p.grad = torch.ones(3)
        before = p.detach().clone()
        optimizer.step()
        rates.append(round(float((before - p.detach())[0]), 6))
        scheduler.step(loss)
    assert rates == [0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.025, 0.025, 0.02, 0.02]


def test_a_scheduler_that_steps_first_is_warned_about() -> None:
    """It tells by wrapping optimizer.step, which must count also when it is called through the wrapper."""
    optimizer = fastopt.Adam(params())
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before `optimizer.step"):
        scheduler.step()
    optimizer = fastopt.Adam(params())
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()


AVERAGES: dict[str, dict[str, Any]] = {
    "mean": {},
    "mean-foreach": {"use_buffers": True},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
}


@pytest.mark.parametrize("average", AVERAGES)
@parametrize(by_id("sgd-momentum", "adam-amsgrad", "ranger", "lookahead-adam"), ["fp32"])
def test_averaged_models(case: Case, dtype: torch.dtype, backend: str, average: str) -> None:
    """SWA as in torch's documentation: the average of our weights is that of the oracle's, batch norm and all."""

    def train(make: Callable[[Any], Any]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 2))
        optimizer = make(list(model.parameters()))
        averaged = AveragedModel(model, **AVERAGES[average])
        schedule = SWALR(optimizer, swa_lr=0.02, anneal_epochs=3)
        batches = [torch.randn(8, 6) for _ in range(8)]
        for i, x in enumerate(batches):
            for p in model.parameters():
                p.grad = None
            model(x).pow(2).mean().backward()
            optimizer.step()
            if i > 2:
                averaged.update_parameters(model)
                schedule.step()
        update_bn(batches, averaged)
        return [*averaged.parameters(), *averaged.buffers()]

    ours = train(lambda ps: case.make(ps, backend))
    theirs = train(lambda ps: Stepped(case, ps))
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)


class Stepped(torch.optim.Optimizer):
    """An oracle as an optimizer, for code that insists on one."""

    def __init__(self, case: Case, ps: Any) -> None:
        self.oracle = case.oracle(ps)
        super().__init__(ps, {"lr": case.kwargs["lr"]})

    def step(self, closure: Any = None) -> None:
        for ours, theirs in zip(self.param_groups, self.oracle.param_groups, strict=True):
            theirs["lr"] = ours["lr"]
        self.oracle.step()
