"""What test_triton.py runs under Triton's interpreter of steps that are counted on a device, which here is the CPU: the
kernel that makes the rows of coefficients, alone against the host's rows and in steps with all that may happen there.
"""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import triton_interpreter  # before anything imports Triton

# isort: split
import pytest
import test_device_steps as device_steps
import torch
from cases import Case, by_id
from counted_rows import Counted
from harness import Built, assert_same, place, trace
from interpreted import SIZES, cases
from test_device_steps import COUNTED, counted

import fastopt
from fastopt import routing
from fastopt.backends import native
from fastopt.backends.triton import compiled
from fastopt.chain import Stage, stage, tl
from fastopt.optimizers.base import Fused
from fastopt.rule import Hyper, Number, Rule, Slot, select

pytestmark = pytest.mark.contract("device", backend="triton")

assert triton_interpreter


@pytest.fixture
def _a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """capturable=True on a CPU parameter is an error: here the CPU is the device."""
    why_not = routing.why_not_setting
    monkeypatch.setattr(routing, "why_not_setting", lambda setting, p, _=False: why_not(setting, p, True))


# With the Python plan fewer of each: it gives the same kernels their work.
FEWER = native.extension() is not None and not compiled.ENABLED
ROWS = by_id(
    "adagrad-everything", "adam", "adam-amsgrad", "adamw", "adamax-coupled", "nadam-psi2", "radam-decoupled",
    "rmsprop-everything", "ranger-alpha03", "ranger-undegenerate", "lookahead-adam", "lookahead-nadam",
)[:: 4 if FEWER else 1]  # fmt: skip


@pytest.mark.usefixtures("_a_device")
@pytest.mark.parametrize("asked", [False, True])
@cases(COUNTED)
def test_rows_made_where_the_steps_are(case: Case, asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's own rows, in float64, are the host's, counters included; powers are libm's here."""
    built = Counted(case, "cpu", asked)
    built.check(built.step(monkeypatch), reach=0)


@pytest.mark.usefixtures("_a_device")
@cases(ROWS)
def test_numbers_do_not_depend_on_where_steps_are_counted(case: Case) -> None:
    traces = []
    for backend, options in (("triton", counted(case)), ("reference", {})):
        built = Built(SIZES, case, torch.float32)
        traces.append(trace(case.make(built.groups, backend, **options), built))
        built.assert_nothing_else_written()
    assert_same(*traces)


@pytest.mark.usefixtures("_a_device")
@cases(ROWS)
def test_two_launches_a_step_that_a_device_counts(case: Case) -> None:
    """One that makes the rows and one for each chain that the device may choose; nothing is made twice."""
    params = [torch.nn.Parameter(torch.ones(16)) for _ in range(3)]
    optimizer = case.make(params, "triton", **counted(case))
    made: list[Any] = []
    for _ in range(4):
        for p in params:
            p.grad = torch.ones(16)
        optimizer.step()
        plan: Any = optimizer.engine()._plans["triton"]
        made.append(plan._rows[params[0].device]._made)
    chains = 2 if case.lookahead or case.name == "Ranger" else 1
    assert plan.launches == 1 + chains * (2 if case.id == "ranger-undegenerate" else 1)
    assert made[-1] is made[-2] is made[-3]
    assert getattr(plan, "_serves", True), "where it is there, the compiled plan does the host's work"


@pytest.mark.usefixtures("_a_device")
@pytest.mark.parametrize("mixed", [False, True])
def test_steps_without_gradients_that_a_device_counts(mixed: bool) -> None:
    """What a step gives to the device says nothing of the steps that are counted there: none is done again unseen."""
    runs = []
    for backend in ("triton", "reference"):
        params = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
        flags = [backend == "triton", backend == "triton" and not mixed]
        groups = [{"params": [p], "capturable": flag} for p, flag in zip(params, flags, strict=True)]
        optimizer = fastopt.Adam(groups, lr=0.1, backend=backend)
        for step in range(7):
            for i, p in enumerate(params):
                absent = step in (2, 3) and (i == 0 or not mixed)
                p.grad = None if absent else torch.full((5,), 1.0 + step)
            optimizer.step()
        runs.append([*params, *(optimizer.state[p]["step"] for p in params)])
    assert all(map(torch.equal, *runs))


@pytest.mark.usefixtures("_a_device")
def test_states_are_let_go_when_others_are_loaded() -> None:
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = fastopt.RAdam([p], capturable=True, backend="triton")
    p.grad = torch.ones(4)
    optimizer.step()
    old = weakref.ref(optimizer.state[p]["exp_avg"])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    gc.collect()
    assert old() is None


@pytest.mark.usefixtures("_a_device")
def test_a_counter_elsewhere_is_refused() -> None:
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = fastopt.RAdam([p], capturable=True, backend="triton")
    p.grad = torch.ones(4)
    optimizer.step()
    optimizer.state[p]["step"] = torch.ones((), device="meta")
    with pytest.raises(ValueError, match="'step' of a parameter of group 0 is on meta, it on cpu"):
        optimizer.step()


needs_extension = pytest.mark.skipif(native.extension() is None, reason="the other side is the extension's plan")
LIVE = pytest.mark.parametrize("case", by_id("lookahead-adam", "nadam")[: 1 if FEWER else 2], ids=lambda c: c.id)


@pytest.mark.usefixtures("_a_device")
@needs_extension
@LIVE
def test_what_the_emulated_device_does_too(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A learning rate in a tensor, overflows, checkpoints in mid-run."""
    device_steps.test_a_learning_rate_tensor_is_read_by_the_kernel(case, "triton", monkeypatch)
    device_steps.test_overflow_is_found_by_the_kernels(case, "fp32", "triton", monkeypatch)
    device_steps.test_resume_and_copies(case, "triton")


@needs_extension
def test_what_the_emulated_device_does_without_counters_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for late in (False, True):
        device_steps.test_a_rule_that_counts_nothing_reads_it_too("triton", late, monkeypatch)
    device_steps.test_momentum_that_met_an_overflow_first("triton")
    for dtype in (torch.float64, torch.int32, torch.int64):
        device_steps.test_counters_of_other_dtypes(dtype, "triton")


@pytest.mark.usefixtures("_a_device")
def test_gradients_astray_have_a_launch_of_their_own() -> None:
    """The others stay in the one with wide accesses."""

    def run(backend: str, options: dict[str, Any]) -> tuple[list[torch.Tensor], Any]:
        ps = [torch.nn.Parameter(torch.full((33,), 1.0 + i)) for i in range(40)]
        optimizer = fastopt.RAdam(ps, lr=0.1, backend=backend, **options)
        for step in range(3):
            for i, p in enumerate(ps):
                where = "offset1" if (i + step) % 3 == 0 else "contiguous"
                p.grad = None if (i + step) % 7 == 0 else place(torch.full((33,), 0.25 * step - 0.5 + i), where)[0]
            optimizer.step()
        return ps, optimizer

    ours, optimizer = run("triton", {"capturable": True})
    plan: Any = optimizer.engine()._plans["triton"]
    assert plan.launches == 3
    assert sorted(start.aligned for start in plan._rows[ours[0].device]._made.starts) == [False, True]
    for p, q in zip(ours, run("reference", {})[0], strict=True):
        assert torch.equal(p, q)


@pytest.mark.usefixtures("_a_device")
def test_settings_of_many_kinds_in_one_launch() -> None:
    """Decay or none, more parameters than a program serves, gradients that come and go; host-counted ones beside."""

    def run(backend: str, options: dict[str, Any]) -> list[torch.Tensor]:
        ps = [torch.nn.Parameter(torch.full((4,), 1.0 + i)) for i in range(75)]
        cuts = (ps[:40], ps[40:41], ps[41:73], ps[73:])
        groups = [{"params": own, "weight_decay": 0.1 * (i % 2), "lr": 0.1 + i} for i, own in enumerate(cuts)]
        groups[3] |= {"capturable": False}
        optimizer = fastopt.NAdam(groups, backend=backend, **options)
        for step in range(4):
            for i, p in enumerate(ps):
                p.grad = None if (i + step) % 5 == 0 else torch.full((4,), 0.25 * step - 0.5)
            optimizer.step()
        return ps

    for p, q in zip(run("triton", {"capturable": True}), run("reference", {}), strict=True):
        assert torch.equal(p, q)


@stage("m v")
def shaken_off(p, g, m, v, w1, w2, bc2, eps, step_size):  # type: ignore[no-untyped-def]
    m = tl.fma(w1, g - m, m)
    v = tl.fma(w2 * (g - m), g - m, v)
    p = p - tl.div_rn(step_size * m, tl.sqrt_rn(tl.div_rn(v, bc2)) + eps)
    return p, g, m, v


class ShakenOffRule(Rule):
    hyper = ("lr", "betas", "eps")

    def update(self, h: Hyper) -> tuple[Stage, ...]:
        return (shaken_off,)

    def slots(self, h: Hyper) -> dict[str, Slot]:
        return {"m": Slot("m"), "v": Slot("v")}

    def coefficients(self, h: Hyper, t: Number, carry: Number) -> tuple[Number, ...]:
        warm = select(t > 3, lambda: 1.0 - 0.5 / t, 0.25) + (t * 0.25) % 1.0 + (t - 4) % 3 + (4 - t) % -3
        return shaken_off.row(w1=1 - h.beta1, w2=1 - h.beta2, bc2=1 - h.beta2**t, eps=h.eps, step_size=h.lr * warm)


class ShakenOff(Fused, torch.optim.Optimizer):
    rule = ShakenOffRule()

    def __init__(self, params: Any, capturable: bool = False, *, backend: str | None = None) -> None:
        defaults = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-8, "capturable": capturable}
        super().__init__(params, defaults, backend=backend)


@pytest.mark.usefixtures("_a_device")
def test_a_rule_of_ones_own_is_counted_on_the_device_too() -> None:
    """Its formulas, written once in Python, are the kernel that makes its rows."""
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 20)) for _ in range(2))
    on_device, on_host = ShakenOff([ours], capturable=True, backend="triton"), ShakenOff([theirs], backend="reference")
    for step in range(6):
        for p, optimizer in ((ours, on_device), (theirs, on_host)):
            p.grad = torch.cos(torch.arange(20.0) + step)
            optimizer.step()
        assert torch.equal(ours, theirs)
    assert on_device.state[ours]["step"].item() == 6
