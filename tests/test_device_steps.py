"""Steps that are counted on a device: coefficient rows made there, nothing read back, overflows left to the kernels.

Run on the emulated device (the GPU kernels' source on the CPU), where the rows are the host's bit for bit.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import CASES, DTYPES, Case, backends, by_id
from harness import Built, Scenario, assert_same, difference, signature_has, trace
from test_numbers import GROUPS, INTERMITTENT, SIZES
from torch.utils._python_dispatch import TorchDispatchMode

import fastopt
from fastopt.plan import mended_counters

pytestmark = pytest.mark.contract("device")

EMULATED = backends(["emulated"])


def counted(case: Case) -> dict[str, Any]:
    """The option that puts `step` on the device; none for rules that have no counter."""
    if case.name == "SGD":
        return {}
    return {"capturable": True} if case.name == "Ranger" or signature_has(case, "capturable") else {"fused": True}


# Lookahead around Ranger is two optimizers, the outer one in torch code.
COUNTED = [c for c in CASES if counted(c) and not (c.name == "Ranger" and c.lookahead)]
ids = pytest.mark.parametrize("case", COUNTED, ids=lambda c: c.id)
SOME = by_id("adam", "adam-amsgrad", "nadam", "radam", "ranger", "lookahead-adam", "lookahead-nadam")
some = pytest.mark.parametrize("case", [c for c in SOME if c in COUNTED], ids=lambda c: c.id)


def plan(optimizer: Any) -> Any:
    (only,) = optimizer.engine()._plans.values()
    return only


@pytest.mark.parametrize("backend", EMULATED)
@pytest.mark.parametrize("scenario", [SIZES, INTERMITTENT, GROUPS], ids=lambda s: s.id)
@ids
def test_numbers_do_not_depend_on_where_steps_are_counted(case: Case, scenario: Scenario, backend: str) -> None:
    on_device, on_host = (Built(scenario, case, torch.float32) for _ in range(2))
    optimizer = case.make(on_device.groups, backend, **counted(case))
    got = trace(optimizer, on_device)
    assert any(optimizer.engine().counts)
    assert_same(got, trace(case.make(on_host.groups, "native"), on_host))
    on_device.assert_nothing_else_written()


@pytest.mark.contract("device", "low precision")
@pytest.mark.parametrize("backend", EMULATED)
@pytest.mark.parametrize("dtype", ["fp64", "bf16", "fp16"])
@some
def test_other_dtypes(case: Case, dtype: str, backend: str) -> None:
    on_device, on_host = (Built(SIZES, case, DTYPES[dtype]) for _ in range(2))
    got = trace(case.make(on_device.groups, backend, **counted(case)), on_device)
    assert_same(got, trace(case.make(on_host.groups, "native"), on_host))


@pytest.mark.parametrize("backend", EMULATED)
@some
def test_two_launches_a_step(case: Case, backend: str) -> None:
    """One that makes the rows and one for each chain that the device may choose."""
    params = [torch.nn.Parameter(torch.randn(9)) for _ in range(20)]
    optimizer = case.make(params, backend, **counted(case))
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert plan(optimizer).launches == (3 if case.lookahead or case.name == "Ranger" else 2)


@pytest.mark.parametrize("backend", EMULATED)
@some
def test_a_learning_rate_tensor_is_read_by_the_kernel(
    case: Case, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its value when the step runs counts, not when it was built: that is what a replayed graph needs."""
    monkeypatch.setattr("fastopt.setting.stays", lambda tensor, group: True)
    ps, qs = ([torch.nn.Parameter(torch.linspace(-1, 1, 33))] for _ in range(2))
    lr = torch.tensor(0.1)
    symbolic, plain = case.make(ps, backend, lr=lr, **counted(case)), case.make(qs, "native", lr=0.0)
    for step in range(12):
        lr.fill_(0.1 / (1 + step))
        plain.param_groups[0]["lr"] = lr.item()
        for p in (*ps, *qs):
            p.grad = torch.sin(torch.arange(33.0) + step)
        symbolic.step()
        plain.step()
        assert not difference(ps[0].detach(), qs[0].detach())


@pytest.mark.parametrize("backend", EMULATED)
@pytest.mark.parametrize("late", [False, True], ids=["from the beginning", "later"])
def test_a_rule_that_counts_nothing_reads_it_too(backend: str, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No row is made on the device for it, and none may be remembered: the same tensor is another number every time."""
    monkeypatch.setattr("fastopt.setting.stays", lambda tensor, group: True)
    p, lr = torch.nn.Parameter(torch.zeros(4)), torch.tensor(1.0)
    optimizer = fastopt.SGD([p], lr=1.0 if late else lr, fused=True, backend=backend)
    p.grad = torch.ones(4)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = lr
    for rate in (1.0, 0.5, 0.25, 0.5):
        lr.fill_(rate)
        before = p.detach().clone()
        optimizer.step()
        assert torch.equal(before - p, torch.full((4,), rate))


class Scaler:
    """What torch's GradScaler leaves on an optimizer that takes scaled gradients."""

    def __init__(self, scale: float) -> None:
        self.scale, self.found_inf = torch.tensor(scale), torch.zeros(())

    def step(self, optimizer: Any, overflow: bool = False) -> None:
        self.found_inf.fill_(float(overflow))
        optimizer.grad_scale, optimizer.found_inf = self.scale, self.found_inf
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf


@pytest.mark.contract("device", "amp")
@pytest.mark.parametrize("backend", EMULATED)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@some
def test_overflow_is_found_by_the_kernels(
    case: Case, dtype: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing changes, counters included, and the host does not wait for the flag."""
    p, q = (torch.nn.Parameter(torch.linspace(-1, 1, 33).to(DTYPES[dtype])) for _ in range(2))
    ours, plain = case.make([p], backend, **counted(case)), case.make([q], "native")
    scaler = Scaler(1024.0)
    for step in range(14):
        g = torch.sin(torch.arange(33.0) + step).to(p.dtype)
        p.grad, q.grad = g * 1024, g.clone()
        overflow = step in (2, 5, 6)
        with monkeypatch.context() as patch:
            if step > 1:  # the plan knows who takes what
                patch.setattr(torch.Tensor, "item", _waits)
            scaler.step(ours, overflow)
        if overflow:
            continue
        assert torch.equal(p.grad, g), "unscaled gradients are written back"
        plain.step()
        assert not difference(p.detach(), q.detach())
        for key, value in plain.state_dict()["state"][0].items():
            assert not difference(ours.state_dict()["state"][0][key], value), key


def _waits(self: torch.Tensor) -> float:
    raise AssertionError("the host waited for the device")


@pytest.mark.contract("device", "amp", optimizers="SGD")
@pytest.mark.parametrize("backend", EMULATED)
def test_momentum_that_met_an_overflow_first(backend: str) -> None:
    """SGD has no counter: its first step is only known by the state that was just created."""
    p, q = (torch.nn.Parameter(torch.ones(9)) for _ in range(2))
    options: dict[str, Any] = dict(lr=0.1, momentum=0.9, dampening=0.5)
    ours, plain = fastopt.SGD([p], fused=False, backend=backend, **options), fastopt.SGD([q], **options)
    scaler = Scaler(2.0)
    for step in range(5):
        p.grad, q.grad = torch.full((9,), 2.0), torch.ones(9)
        scaler.step(ours, overflow=step == 0)
        if step:
            plain.step()
        assert torch.equal(p, q)


@pytest.mark.contract("device", "state")
@pytest.mark.parametrize("backend", EMULATED)
@some
def test_resume_and_copies(case: Case, backend: str) -> None:
    built, again = (Built(SIZES, case, torch.float32) for _ in range(2))
    optimizer, other = (case.make(b.groups, backend, **counted(case)) for b in (built, again))
    for step in range(4):
        built.set_grads(step)
        optimizer.step()
    for p, q in zip(built.order, again.order, strict=True):
        q.data.copy_(p.data)
    saved = optimizer.state_dict()
    assert not any(isinstance(value, torch.Tensor) for group in saved["param_groups"] for value in group.values())
    other.load_state_dict(copy.deepcopy(saved))
    for step in range(4, 8):
        for b, o in ((built, optimizer), (again, other)):
            b.set_grads(step)
            o.step()
    for p, q in zip(built.order, again.order, strict=True):
        assert not difference(p.detach(), q.detach())


@pytest.mark.parametrize("backend", EMULATED)
def test_many_settings_and_many_tensors(backend: str) -> None:
    """More settings, and more tensors, than the parameters of one launch can hold."""
    n, settings = 9000, 700

    def make() -> list[dict[str, Any]]:
        ps = [torch.nn.Parameter(torch.full((3,), float(i))) for i in range(n)]
        return [{"params": ps[i::settings], "lr": 1e-3 * (i + 1)} for i in range(settings)]

    one, two = make(), make()
    a, b = fastopt.RAdam(one, capturable=True, backend=backend), fastopt.RAdam(two, backend="native")
    for step in range(7):
        for group in (*one, *two):
            for i, p in enumerate(group["params"]):
                p.grad = None if (i + step) % 5 == 0 else torch.full((3,), 0.5 + step)
        a.step()
        b.step()
    assert plan(a).launches > 2
    for x, y in zip(one, two, strict=True):
        for p, q in zip(x["params"], y["params"], strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("backend", EMULATED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.int64], ids=str)
def test_counters_of_other_dtypes(dtype: torch.dtype, backend: str) -> None:
    p, q = (torch.nn.Parameter(torch.ones(9)) for _ in range(2))
    ours, plain = fastopt.Adam([p], fused=True, backend=backend), fastopt.Adam([q], backend="native")
    for step in range(4):
        p.grad, q.grad = torch.full((9,), 0.1 * step), torch.full((9,), 0.1 * step)
        ours.step()
        plain.step()
        if step == 0:
            ours.state[p]["step"] = ours.state[p]["step"].to(dtype)
    assert torch.equal(p, q)
    assert ours.state[p]["step"].dtype == dtype
    assert ours.state[p]["step"] == 4


@pytest.mark.contract("device", "live")
def test_counters_follow_a_flag_that_is_set_later() -> None:
    """A step that a graph captures must not be counted by the host, for replays would not count."""
    p = torch.nn.Parameter(torch.empty(3, device="meta"))
    optimizer = fastopt.NAdam([p])
    (group,) = optimizer.param_groups
    state = {"step": torch.tensor(3.0), "mu_product": torch.tensor(0.5)}
    settings = optimizer.engine().settings
    assert mended_counters(settings.of(group), p, state) == {}
    group["capturable"] = True
    mended = mended_counters(settings.of(group), p, state)
    assert {key: value.device.type for key, value in mended.items()} == {"step": "meta", "mu_product": "meta"}


class Watching(TorchDispatchMode):
    """A mode that lets torch's operators pass; kernels it would not see."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", EMULATED)
def test_a_plan_outlives_steps_that_others_take(backend: str) -> None:
    """Graphs that were captured read memory that it keeps; of the last step's tensors it keeps nothing."""
    p = torch.nn.Parameter(torch.ones(9))
    optimizer = fastopt.Adam([p], backend=backend)
    p.grad = torch.ones(9)
    optimizer.step()
    before = plan(optimizer)
    with Watching():
        optimizer.step()
    assert before._core.devices() == []
    optimizer.step()
    assert plan(optimizer) is before
    assert optimizer.state[p]["step"] == 3
