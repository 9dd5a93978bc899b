"""A step in one call of the compiled plan, on the host and on a device: when it is taken, when not, and that it counts
and updates like any other.

Twins are stepped by the reference backend, which looks everything up anew in every step and knows no shortcut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.optim.optimizer as torch_optimizer
from cases import BACKENDS, CASES, Case, backends, by_id, parametrize_cases
from harness import difference
from torch.optim import Optimizer

import fastopt
from fastopt.optimizers.adam import AdamRule
from fastopt.rule import Hyper, Number
from fastopt.setting import Settings

SIZES = (33, 1, 0, 64, 5)


@pytest.fixture(autouse=True, params=backends(("triton",) if BACKENDS == ("triton",) else ("native", "emulated")))
def compiled(request: pytest.FixtureRequest) -> str:
    """On the host and on a device, which is told the same in another way."""
    Twins.backend = request.param
    return str(request.param)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def parameters(sizes: tuple[int, ...] = SIZES) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in sizes]


def give(params: list[torch.nn.Parameter], t: int, absent: Callable[[int], bool] = lambda i: False) -> None:
    for i, p in enumerate(params):
        p.grad = None if absent(i) else torch.cos(torch.arange(p.numel()) * 0.7 + t + i)


class Twins:
    """The same optimizer on equal parameters, compiled and reference."""

    backend = "native"

    def __init__(self, make: Callable[..., Any], sizes: tuple[int, ...] = SIZES) -> None:
        self.params = [parameters(sizes) for _ in range(2)]
        pairs = zip(self.params, (self.backend, "reference"), strict=True)
        self.ours, self.theirs = (make(params, backend) for params, backend in pairs)
        self.t = 0

    def step(self, count: int = 1, absent: Callable[[int], bool] = lambda i: False) -> None:
        for _ in range(count):
            self.t += 1
            for params, optimizer in zip(self.params, (self.ours, self.theirs), strict=True):
                give(params, self.t, absent)
                optimizer.step()
            self.compare()

    def edit(self, change: Callable[[Any], None]) -> None:
        change(self.ours)
        change(self.theirs)

    def compare(self) -> None:
        for p, q in zip(*self.params, strict=True):
            assert not difference(p, q), self.t
            mine, other = self.ours.state[p], self.theirs.state[q]
            assert mine.keys() == other.keys()
            for key, value in mine.items():
                assert not difference(value, other[key]), (self.t, key)


def is_whole(optimizer: Any) -> bool:
    return optimizer.engine().whole_step is not None


@parametrize_cases(CASES)
def test_every_rule_steps_alike(case: Case, threads: int) -> None:
    """Longer than RAdam waits and Ranger's period, with parameters that come and go."""
    twins = Twins(case.make)
    twins.step(8)
    twins.step(3, absent=lambda i: i % 2 == 0)
    twins.step(3)
    twins.step(2, absent=lambda i: True)
    twins.step(4)


def test_the_second_step_is_one_call() -> None:
    params = parameters()
    optimizer = fastopt.Adam(params, backend=Twins.backend)
    assert optimizer.engine().whole_step is None
    give(params, 0)
    optimizer.step()
    assert is_whole(optimizer)


@pytest.mark.parametrize("way", ["hook", "closure", "lookahead"])
def test_steps_with_more_around_them_are_one_call_too(way: str) -> None:
    """What is found and used in one call needs not be kept alive from one to the next, tensor by tensor."""

    def make(params: Any, backend: str) -> Any:
        optimizer = fastopt.Adam(params, backend=backend)
        if way == "hook":
            optimizer.register_step_post_hook(lambda *args: None)
        return fastopt.Lookahead(optimizer, k=2) if way == "lookahead" else optimizer

    twins = Twins(make)
    closure = (lambda: None) if way == "closure" else None
    twins.step(2)
    plan = twins.ours.engine()._plans[twins.backend]
    if Twins.backend != "triton":  # whose kernels are started from Python, between the two
        plan.gather = plan.launch = None
    for t in range(3, 6):
        for params, optimizer in zip(twins.params, (twins.ours, twins.theirs), strict=True):
            give(params, t, absent=lambda i, t=t: i == t)
            optimizer.step(closure)
        twins.compare()


@pytest.mark.parametrize("where", ["pre", "post", "global pre", "global post"])
def test_hooks_registered_later_are_called(where: str) -> None:
    params = parameters()
    optimizer = fastopt.Adam(params, backend=Twins.backend)
    seen: list[int] = []

    def hook(*_: Any) -> None:
        seen.append(int(optimizer.state[params[0]]["step"]))

    give(params, 0)
    optimizer.step()
    register = {
        "pre": optimizer.register_step_pre_hook,
        "post": optimizer.register_step_post_hook,
        "global pre": torch_optimizer.register_optimizer_step_pre_hook,
        "global post": torch_optimizer.register_optimizer_step_post_hook,
    }
    handle = register[where](hook)
    try:
        optimizer.step()
    finally:
        handle.remove()
    optimizer.step()
    assert seen == [2 if "post" in where else 1]


def test_a_loss_scale_given_later_is_honoured() -> None:
    params = parameters((4,))
    optimizer = fastopt.SGD(params, lr=1.0, backend=Twins.backend)
    give(params, 0)
    optimizer.step()
    optimizer.step()
    before = params[0].detach().clone()
    params[0].grad = torch.full((4,), 8.0)
    optimizer.grad_scale = torch.tensor(8.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert torch.equal(params[0], before - 1)
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert torch.equal(params[0], before - 1)


def test_profiled_steps_are_recorded() -> None:
    params = parameters()
    optimizer = fastopt.Adam(params, backend=Twins.backend)
    give(params, 0)
    optimizer.step()
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert any(event.key == "Optimizer.step#Adam.step" for event in profile.key_averages())


def test_lookahead_around_an_optimizer_that_stepped_alone() -> None:
    """The inner optimizer has its own way to step at once, which would leave the slow weights out."""
    twins = Twins(lambda params, backend: fastopt.Adam(params, lr=0.1, backend=backend))
    twins.step(3)
    twins.ours, twins.theirs = (fastopt.Lookahead(inner, k=2) for inner in (twins.ours, twins.theirs))
    twins.step(5)
    assert not torch.equal(twins.params[0][0], twins.ours.state[twins.params[0][0]]["slow_param"]) or twins.t % 2 == 0


def test_subclass_with_a_step_of_its_own() -> None:
    class Counting(fastopt.Adam):
        calls = 0

        def step(self, closure: Any = None) -> Any:
            self.calls += 1
            return super().step(closure)

    twins = Twins(lambda params, backend: Counting(params, backend=backend))
    twins.step(4)
    assert twins.ours.calls == 4


def test_a_state_that_is_kept_elsewhere() -> None:
    """Where the parts of an optimizer are not in its ``__dict__``, the short way is not taken."""

    class Elsewhere(fastopt.Adam):
        @property
        def state(self) -> Any:
            return self.kept

        @state.setter
        def state(self, state: Any) -> None:
            self.kept = state

    twins = Twins(lambda params, backend: Elsewhere(params, backend=backend))
    twins.step(4)


def test_a_failed_look_does_not_pass_the_second_time() -> None:
    """What the one call has found unfit must still be unfit for the longer way that follows."""
    twins = Twins(lambda params, backend: fastopt.Adam(params, lr=0.1, backend=backend))
    twins.step(2)
    twins.edit(lambda optimizer: optimizer.param_groups[0].update(amsgrad=True))
    twins.step(2)
    assert "max_exp_avg_sq" in twins.ours.state[twins.params[0][0]]


RATES = (0.1, 0.05, 0.0, -0.0, 0.1, 1, 1e-30, 0.02, 1e30, 0.1)


@parametrize_cases(by_id("adam-everything", "adamw", "radam", "ranger", "nadam", "sgd-momentum", "lookahead-adam"))
def test_learning_rates_that_change_at_every_step(case: Case) -> None:
    twins = Twins(case.make)
    twins.step(2)
    for rate in RATES:
        twins.edit(lambda optimizer, rate=rate: optimizer.param_groups[0].update(lr=rate))
        twins.step()


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.array, torch.tensor, float])
def test_rates_of_other_kinds(kind: Callable[[float], Any]) -> None:
    """As schedules computed with numpy leave them in groups."""
    twins = Twins(lambda params, backend: fastopt.AdamW(params, backend=backend))
    twins.step(2)
    for rate in (0.1, 0.1, -0.0, 0.0, 0.05):
        values = {"lr": kind(rate), "weight_decay": kind(rate)}
        twins.edit(lambda optimizer, values=values: optimizer.param_groups[0].update(values))
        twins.step(2)


@pytest.mark.parametrize("rate", [math.nan, math.inf, -math.inf])
def test_learning_rates_that_are_no_numbers(rate: float) -> None:
    twins = Twins(lambda params, backend: fastopt.AdamW(params, backend=backend))
    twins.step(2)
    twins.edit(lambda optimizer: optimizer.param_groups[0].update(lr=rate))
    twins.step(2)


def test_groups_of_one_setting_go_apart_and_together_again() -> None:
    """Groups share a setting, and the rows they share are told apart by the learning rate each has moved to."""

    def make(params: list[torch.nn.Parameter], backend: str) -> Optimizer:
        return fastopt.AdamW([{"params": [p]} for p in params], lr=0.1, backend=backend)

    twins = Twins(make)
    twins.step(2)

    def change(rates: dict[int, float], **others: Any) -> None:
        def edit(optimizer: Optimizer) -> None:
            for i, rate in rates.items():
                optimizer.param_groups[i].update(lr=rate, **others)

        twins.edit(edit)
        twins.step(2)

    change({1: 0.2})
    change({0: 0.2, 1: 0.1})
    change({1: 0.0})
    change({0: 0.0, 1: 0.2}, weight_decay=0.3)
    change({0: 0.1, 1: 0.1, 2: 0.1, 3: 0.1, 4: 0.1}, weight_decay=0.01)


@pytest.mark.parametrize("betas", [("nought", 0.9), (0.9,)], ids=str)
def test_an_edit_that_raises_is_not_forgotten(betas: tuple[Any, ...]) -> None:
    """The step after a failed one must not run with what the group was before."""
    params = parameters()
    optimizer = fastopt.Adam(params, backend=Twins.backend)
    give(params, 0)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[0]["betas"] = betas
    for _ in range(3):
        with pytest.raises((TypeError, ValueError)):
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert all(int(optimizer.state[p]["step"]) == 1 for p in params)


def test_counters_that_go_apart() -> None:
    """A parameter whose step is not the one that was foreseen gets its own row."""
    twins = Twins(lambda params, backend: fastopt.NAdam(params, backend=backend))
    twins.step(3)

    def rewind(i: int) -> Callable[[Any], None]:
        return lambda optimizer: optimizer.state[optimizer.param_groups[0]["params"][i]]["step"].fill_(7)

    for i in (0, 4, 2):
        twins.edit(rewind(i))
        twins.step(2)


def test_every_tensor_is_counted_once(threads: int) -> None:
    """Whatever their sizes: a tensor that is cut for the threads, or has no element, or too many to cut evenly."""
    sizes = (0, 100_000, 0, 1, 70_000, *(7 for _ in range(500)), 0)
    params = parameters(sizes)
    optimizer = fastopt.Adam(params, backend=Twins.backend)
    give(params, 0)
    optimizer.step()
    versions = [p._version for p in params]
    for _ in range(3):
        optimizer.step()
    assert all(int(optimizer.state[p]["step"]) == 4 for p in params)
    assert [p._version - before for p, before in zip(params, versions, strict=True)] == [3] * len(params)


def test_a_rule_with_other_coefficients_does_not_inherit_the_compiled_ones() -> None:
    class Halved(AdamRule):
        def coefficients(self, h: Hyper, t: Number, carry: Number) -> tuple[Number, ...]:
            *others, step_size = super().coefficients(h, t, carry)
            return (*others, step_size / 2)

    class HalvedAdam(fastopt.Adam):
        rule = Halved()

    assert Settings(Halved(), lambda chain: 0).of(fastopt.Adam(parameters()).param_groups[0]).on_device() is None
    twins = Twins(lambda params, backend: HalvedAdam(params, lr=0.1, backend=backend))
    twins.step(4)
    whole, half = parameters(), parameters()
    for optimizer, params in ((fastopt.Adam(whole, lr=0.1), whole), (HalvedAdam(half, lr=0.1), half)):
        give(params, 0)
        optimizer.step()
    assert not torch.equal(whole[0], half[0])
