"""What test_triton.py runs under Triton's interpreter, in a process of its own: every chain, bit for bit, with the plan
that serves most installations; with the other one, which gives the same kernels their work, every stage.

Sizes are around the 16 elements of a vector and the 64 of a work item, beyond which a slice is cut too (see
triton_interpreter.py). The other side is the reference backend, which test_numbers.py holds to torch's for-loop.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import triton_interpreter  # before anything imports Triton

# isort: split
import oracles
import pytest
import torch
from cases import DTYPES, Case, by_id, one_for_each_kernel
from harness import Built, Scenario, Snapshot, Spec, assert_same, difference, place, signature_has, snapshot, trace

import fastopt
from fastopt.backends import native, triton
from fastopt.chain import Stage, stage, tl
from fastopt.optimizers.base import Fused
from fastopt.rule import Hyper, Number, Rule, Slot

pytestmark = pytest.mark.contract("numbers", backend="triton")

assert triton_interpreter

S = Spec
# One case or two of every stage.
STAGES = by_id(
    "sgd-everything", "sgd-dampening", "rmsprop-momentum", "rmsprop-everything", "adagrad-everything",
    "adam-everything", "adamw", "adamax-coupled", "nadam-decoupled", "radam-coupled", "ranger-undegenerate",
    "ranger-alpha03", "lookahead-rmsprop",
)  # fmt: skip
FEW = by_id("adam-everything", "rmsprop-everything", "ranger-alpha03")


def _groups(case: Case) -> list[dict[str, Any]]:
    other = {"betas": (0.8, 0.95), "eps": 1e-4, "momentum": 0.5, "amsgrad": True, "k": 2, "lr": 0.02}
    return [{}, {k: v for k, v in other.items() if signature_has(case, k)}]


SIZES = Scenario(
    "sizes",
    (
        *(S((n,)) for n in (0, 1, 15, 16, 17, 100)),
        S((33,), absent=frozenset({0, 3})),
        S((17,), "offset1", absent=frozenset({1})),
        S((33,), grad_layout="offset1", group=1),
        S((3, 5), group=1),
        S((2, 48), group=1, absent=frozenset({5})),
    ),
    steps=7,
    overrides=_groups,
)
LAYOUTS = Scenario(
    "layouts",
    (
        S((3, 7), "transposed", "contiguous"),
        S((2, 3, 2, 3), "channels_last", "channels_last"),
        S((2, 3, 2, 3), "contiguous", "channels_last"),
        S((3, 5), "every_other", "gaps"),
        S((40,), "every_other", "contiguous"),
        S((4, 5), "contiguous", "expanded"),
        S((1, 9), "odd_ones", "contiguous"),
    ),
    steps=3,
)
SPECIAL = Scenario("special", (S((400,), kind="special"),), steps=9)
SLICES = Scenario(
    "slices",
    (
        *(S(shape) for shape in ((1, 64), (5, 16), (3, 17), (2, 65), (3, 200), (2, 3, 4, 2), (3, 1))),
        S((2, 144), "offset1"),
        S((3, 70), "transposed", "contiguous"),
        S((2, 96), grad_layout="every_other"),
    ),
    steps=2,
)


SHORT = Scenario("short", SIZES.specs, 3, _groups)


def both(case: Case, scenario: Scenario, dtype: torch.dtype) -> tuple[list[Snapshot], list[Snapshot]]:
    traces = []
    for backend in ("triton", "reference"):
        built = Built(scenario, case, dtype)
        traces.append(trace(case.make(built.groups, backend), built))
        built.assert_nothing_else_written()
    return traces[0], traces[1]


def cases(wanted: list[Case]) -> Any:
    return pytest.mark.parametrize("case", wanted, ids=lambda case: case.id)


def dtypes(*names: str) -> Any:
    return pytest.mark.parametrize("dtype", [DTYPES[name] for name in names], ids=names)


@cases(one_for_each_kernel() if triton.compiled.ENABLED or not native.extension() else STAGES)
def test_fp32(case: Case) -> None:
    """Ranger synchronises at step 6, where RAdam begins to rectify; the others soon do what they always do."""
    late = case.lookahead or case.name in ("RAdam", "Ranger")
    assert_same(*both(case, SIZES if late else SHORT, torch.float32))


@pytest.mark.contract("numbers", "low precision", backend="triton")
@dtypes("fp64", "bf16")
@cases(STAGES)
def test_other_dtypes_of_kernels(case: Case, dtype: torch.dtype) -> None:
    assert_same(*both(case, SHORT, dtype))


@pytest.mark.contract("low precision", backend="triton")
@cases(FEW)
def test_fp16_of_kernels(case: Case) -> None:
    assert_same(*both(case, SHORT, torch.float16))


@pytest.mark.contract("numbers", "layouts", backend="triton")
@cases(by_id("adam-amsgrad", "ranger"))
def test_layouts(case: Case) -> None:
    assert_same(*both(case, LAYOUTS, torch.float32))


@cases(STAGES)
def test_special_values_of_kernels(case: Case) -> None:
    assert_same(*both(case, SPECIAL, torch.float32))


@pytest.mark.contract("low precision", backend="triton")
@cases(FEW)
def test_special_values_in_bf16_of_kernels(case: Case) -> None:
    assert_same(*both(case, SPECIAL, torch.bfloat16))


@pytest.mark.contract("numbers", optimizers="Ranger", backend="triton")
@dtypes("fp32", "fp64", "bf16")
def test_slices_whose_mean_is_subtracted_of_kernels(dtype: torch.dtype) -> None:
    """Within one program and cut into chunks, aligned or not, in memory order or not."""
    assert_same(*both(by_id("ranger-k1")[0], SLICES, dtype))


@pytest.mark.contract("numbers", optimizers="Ranger", backend="triton")
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan"), 1e38])
@pytest.mark.parametrize("columns", [10, 200])
def test_slices_that_are_not_finite_of_kernels(bad: float, columns: int) -> None:
    """1e38 adds up to more than float32 holds, but its mean does not."""
    results = []
    for backend in ("triton", "reference"):
        p = torch.nn.Parameter(torch.ones(2, columns))
        optimizer = fastopt.Ranger([p], lr=0.1, backend=backend)
        p.grad = torch.ones(2, columns)
        p.grad[0, 3:9] = bad
        optimizer.step()
        results.append([snapshot([p], [optimizer.state[p]])])
    assert_same(*results)


MIXES = {
    "bf16 and fp32 states": (torch.bfloat16, torch.float32),
    "fp32 and bf16 states": (torch.float32, torch.bfloat16),
}


@pytest.mark.contract("layouts", backend="triton", difference="mixed dtypes")
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@cases(by_id("adam-amsgrad", "nadam", "rmsprop-everything", "ranger-alpha03", "lookahead-sgd-nesterov"))
def test_states_of_another_dtype_of_kernels(case: Case, mix: tuple[torch.dtype, torch.dtype]) -> None:
    traces = []
    for backend in ("triton", "reference"):
        built = Built(SHORT, case, mix[0])
        optimizer = case.make(built.groups, backend)
        snapshots = []
        for step in range(SHORT.steps):
            built.set_grads(step)
            optimizer.step()
            states = [optimizer.state.get(p, {}) for p in built.order]
            for state in states if step == 0 else ():
                state.update({k: v.to(mix[1]) for k, v in state.items() if torch.is_tensor(v) and v.dim()})
            snapshots.append(snapshot(built.order, states))
        traces.append(snapshots)
    assert_same(*traces)


@pytest.mark.contract("low precision", optimizers="SGD", backend="triton")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float64_is_rounded_to_16_bits_once_of_kernels(dtype: torch.dtype) -> None:
    """As in test_numbers.py, of some of the numbers."""
    g = oracles.hard_to_round(dtype)[::37]
    p = torch.nn.Parameter(torch.zeros_like(g))
    optimizer = fastopt.SGD([p], lr=1.0, momentum=0.5, backend="triton")
    optimizer.state[p]["momentum_buffer"] = torch.zeros(g.shape, dtype=dtype)
    p.grad = g
    optimizer.step()
    assert not difference(optimizer.state[p]["momentum_buffer"], oracles.rounded(g, dtype))


FUSED = [
    Case(f"{c.id}-fused", c.name, {**c.kwargs, "fused": True}, c.lookahead)
    for c in by_id("sgd-momentum", "adagrad-everything", "adam-everything", "adamw", "lookahead-adam")
]


@pytest.mark.contract("amp", backend="triton")
@pytest.mark.parametrize("overflow", [False, True])
@cases(FUSED)
def test_scaled_gradients(case: Case, overflow: bool) -> None:
    """As over gradients divided before, which are written back; an overflow changes nothing, counters included."""
    check_scaled(case, overflow, torch.float32)


@pytest.mark.contract("amp", "low precision", backend="triton")
def test_scaled_gradients_in_bf16() -> None:
    check_scaled(FUSED[2], True, torch.bfloat16)


def check_scaled(case: Case, overflow: bool, dtype: torch.dtype) -> None:
    scale = 2.0**10
    runs = []
    for scaled in (True, False):
        built = Built(SHORT, case, dtype)
        optimizer = case.make(built.groups, "triton")
        for step in range(SHORT.steps):
            built.set_grads(step)
            if scaled and step:
                for p in built.params:
                    if p.grad is not None:
                        p.grad.mul_(scale)
                optimizer.grad_scale = torch.tensor(scale)
                optimizer.found_inf = torch.tensor(float(overflow and step == 1))
            if scaled or not (overflow and step == 1):
                optimizer.step()
        states = [optimizer.state.get(p, {}) for p in built.order]
        grads = [p.grad for p in built.order if p.grad is not None]
        runs.append(([snapshot(built.order, states)], [snapshot(grads, [{} for _ in grads])]))
    assert_same(runs[0][0], runs[1][0])
    assert_same(runs[0][1], runs[1][1])


@pytest.mark.contract("amp", backend="triton")
def test_unscaling_gradients_that_share_memory_is_refused() -> None:
    p = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = fastopt.SGD([p], lr=0.1, fused=True, backend="triton")
    p.grad = torch.ones(1, 4).expand(4, 4)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    with pytest.raises(RuntimeError, match="share memory"):
        optimizer.step()
    assert (p == 1).all()


@pytest.mark.contract("device", backend="triton")
def test_launches_of_one_step() -> None:
    """One for everything that shares dtypes and chain; a misaligned gradient costs a second."""
    params = [torch.nn.Parameter(torch.ones(n)) for n in (3, 16, 50)]
    optimizer = fastopt.Adam([{"params": [p], "lr": 0.1 * i} for i, p in enumerate(params)], backend="triton")

    def step() -> int:
        optimizer.step()
        plan = optimizer.engine()._plans["triton"]
        assert isinstance(plan, triton.plan.TritonPlan)
        return plan.launches

    for p in params:
        p.grad = torch.ones_like(p)
    assert step() == 1
    assert step() == 1
    params[1].grad = place(torch.ones(16), "offset1")[0]
    assert step() == 2
    params[1].grad = None
    assert step() == 1


@pytest.mark.contract("hooks", backend="triton")
def test_what_is_written_is_known_to_autograd() -> None:
    """The version of each tensor that a step writes goes up, and of no other."""
    p, idle = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    optimizer = fastopt.Lookahead(fastopt.Adam([p, idle], backend="triton"), k=3)
    for _ in range(3):
        p.grad = idle.grad = torch.ones(5)
        optimizer.step()
    idle.grad = None
    state = optimizer.state[p]
    before = {k: v._version for k, v in (*state.items(), ("p", p), ("g", p.grad), ("idle", idle))}
    optimizer.step()
    after = {k: v._version for k, v in (*state.items(), ("p", p), ("g", p.grad), ("idle", idle))}
    changed = {k for k in before if after[k] > before[k]}
    assert changed - {"step"} == {"p", "exp_avg", "exp_avg_sq"}  # counters: as the plan at work has it


@pytest.mark.contract("device", backend="triton")
def test_a_learning_rate_that_comes_to_be_a_tensor_is_read_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastopt.setting.stays", lambda tensor, group: True)
    p, lr = torch.nn.Parameter(torch.zeros(4)), torch.tensor(1.0)
    optimizer = fastopt.SGD([p], lr=1.0, fused=True, backend="triton")
    p.grad = torch.ones(4)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = lr
    for rate in (1.0, 0.5, 0.25):
        lr.fill_(rate)
        before = p.detach().clone()
        optimizer.step()
        assert torch.equal(before - p, torch.full((4,), rate))


@pytest.mark.contract("device", backend="triton")
def test_tables_of_a_captured_step_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replayed graph reads them, whatever the plan has been built for since."""
    capturing, send = [False], triton.tables.Channel.send

    def recorded(self: triton.tables.Channel, block: bytes) -> triton.tables.Sent:
        sent = send(self, block)
        self.capturing = capturing[0]
        return sent

    monkeypatch.setattr(triton.tables.Channel, "send", recorded)
    p, q = (torch.nn.Parameter(torch.zeros(8)) for _ in range(2))
    optimizer = fastopt.SGD([p], lr=1.0, momentum=0.9, backend="triton")
    p.grad, q.grad = torch.ones(8), torch.ones(8)
    for capturing[0] in (False, False, True, False):
        optimizer.step()
    plan: Any = optimizer.engine()._plans["triton"]
    table = weakref.ref(plan._buckets[0].table)
    optimizer.add_param_group({"params": [q]})
    optimizer.step()
    gc.collect()
    assert plan._buckets[0].table is not table()
    assert table() is not None


@pytest.mark.parametrize("compiled", [False, True])
def test_a_default_device_moves_no_tables(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.set_default_device` is for what a training makes."""
    monkeypatch.setattr(triton.compiled, "ENABLED", compiled)
    p, q = (torch.nn.Parameter(torch.ones(3, 5)) for _ in range(2))
    ours, plain = fastopt.Ranger([p], backend="triton"), fastopt.Ranger([q], backend="reference")
    for _ in range(3):
        p.grad, q.grad = torch.arange(15.0).reshape(3, 5), torch.arange(15.0).reshape(3, 5)
        with torch.device("meta"):
            ours.step()
        plain.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("compiled", [False, True])
def test_tables_that_were_not_finished_are_made_again(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory ran out between two of them, and the next step finds things as they were before."""
    monkeypatch.setattr(triton.compiled, "ENABLED", compiled)
    p, q = torch.nn.Parameter(torch.ones(4, 8)), torch.nn.Parameter(torch.ones(64, dtype=torch.float64))
    optimizer = fastopt.SGD([p, q], lr=0.25, backend="triton")

    def step(grad: torch.Tensor) -> None:
        p.grad, q.grad = grad, torch.ones(64, dtype=torch.float64)
        optimizer.step()

    step(torch.ones(4, 8))
    made: list[Any] = []

    def fails(*args: Any) -> Any:
        made.append(args)
        if len(made) == 2:
            raise torch.OutOfMemoryError("no memory for the second")
        return triton.tables.Bucket(*args)

    with monkeypatch.context() as patched:
        patched.setattr(triton.plan, "Bucket", fails)
        with pytest.raises(torch.OutOfMemoryError):
            step(torch.ones(8, 4).t())
    step(torch.ones(4, 8))
    assert (p == 0.5).all()
    assert (q == 0.5).all()


@stage()
def descend_signs(p, g, rate):  # type: ignore[no-untyped-def]
    g = tl.where(g > 0, 1.0, -1.0)
    p = p - rate * g
    return p, g


class SignRule(Rule):
    hyper = ("lr",)

    def update(self, h: Hyper) -> tuple[Stage, ...]:
        return (descend_signs,)

    def slots(self, h: Hyper) -> dict[str, Slot]:
        return {}

    def coefficients(self, h: Hyper, t: Number, carry: Number) -> tuple[Number, ...]:
        return descend_signs.row(rate=h.lr)


class Signs(Fused, torch.optim.Optimizer):
    rule = SignRule()

    def __init__(self, params: Any, lr: float = 0.25, *, backend: str | None = None) -> None:
        super().__init__(params, {"lr": lr}, backend=backend)


def test_a_stage_that_no_extension_has() -> None:
    """Seven lines of mathematics, written once, are a Triton kernel."""
    p = torch.nn.Parameter(torch.zeros(40))
    optimizer = Signs([p], backend="triton")
    p.grad = torch.linspace(-1, 1, 40)
    for _ in range(3):
        optimizer.step()
    assert torch.equal(p.detach(), torch.where(p.grad > 0, -0.75, 0.75))
