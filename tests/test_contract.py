"""torch.optim's contract for the eight torch names: failing steps, state, edits, schedulers, implementation flags."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import harness
import oracles
import pytest
import torch
from cases import TORCH_CASES, TORCH_NAMES, Case, accepts, both, by_id, each_backend, each_name, parametrize
from harness import Built, Scenario, Spec, assert_same, difference, outcome, param, snapshot, states_in_order

import fastopt

pytestmark = pytest.mark.contract("construction")


def _step_outcome(cls: Any, kwargs: dict[str, Any], spoil: Callable[[list[Any]], None], fine: int = 1) -> Any:
    """What a step raises, and what it left behind, for `fine` good parameters followed by a bad one."""
    params = [torch.nn.Parameter(torch.ones(4, 3)) for _ in range(fine + 1)]
    for p in params:
        p.grad = torch.ones_like(p)
    spoil(params)
    optimizer = cls(params, **kwargs)
    result = outcome(optimizer.step)
    return result, [p.detach().clone() for p in params[:fine]], optimizer


def _sparse(params: list[Any]) -> None:
    params[-1].grad = torch.ones(4, 3).to_sparse()


@pytest.mark.contract("fallback", difference="failing steps")
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [(n, {}) for n in TORCH_NAMES if n not in ("SGD", "Adagrad")]
    + [
        ("Adagrad", {"weight_decay": 0.1}),
        ("SGD", {"fused": True}),
        ("Adagrad", {"fused": True}),
        ("Adam", {"fused": True}),
    ],
    ids=lambda x: str(x).replace(" ", ""),
)
def test_sparse_gradients_raise_as_in_torch(name: str, kwargs: dict[str, Any]) -> None:
    (ours, params, _), (theirs, _, _) = (_step_outcome(cls, kwargs, _sparse) for cls in both(name))
    assert theirs is not None
    assert ours == theirs
    if fastopt.backends.available("native"):
        assert torch.equal(params[0], torch.ones(4, 3)), "the parameter before the bad one has moved"


@pytest.mark.parametrize("name", [n for n in TORCH_NAMES if accepts(n, "capturable")])
def test_capturable_on_the_cpu_raises_as_in_torch(name: str) -> None:
    (ours, params, _), (theirs, _, _) = (_step_outcome(c, {"capturable": True}, lambda ps: None) for c in both(name))
    assert theirs is not None
    assert ours == theirs
    assert torch.equal(params[0], torch.ones(4, 3))


@pytest.mark.parametrize("name", [n for n in TORCH_NAMES if accepts(n, "fused")])
@pytest.mark.parametrize("device_dtype", [("cpu", torch.complex64), ("meta", torch.float32)], ids=str)
def test_fused_refuses_what_torchs_fused_refuses(name: str, device_dtype: tuple[str, torch.dtype]) -> None:
    def result(cls: Any) -> Any:
        p = torch.nn.Parameter(torch.ones(3, device=device_dtype[0], dtype=device_dtype[1]))
        p.grad = torch.ones_like(p)
        return outcome(lambda: cls([p], fused=True).step())

    ours, theirs = map(result, both(name))
    assert theirs is not None
    assert ours == theirs


@pytest.mark.contract("live", difference="options switched on late")
@pytest.mark.parametrize(
    ("name", "option", "key"),
    [
        ("Adam", {"amsgrad": True}, "max_exp_avg_sq"),
        ("RMSprop", {"centered": True}, "grad_avg"),
        ("RMSprop", {"momentum": 0.9}, "momentum_buffer"),
        ("SGD", {"momentum": 0.9}, "momentum_buffer"),
    ],
    ids=lambda x: str(x).replace(" ", ""),
)
@each_backend
def test_option_that_needs_another_state_may_be_switched_on_late(
    name: str, option: dict[str, Any], key: str, backend: str
) -> None:
    """torch raises a KeyError (SGD apart); here every edit of a group takes effect on the next step."""
    p = param(3)
    optimizer = getattr(fastopt, name)([p], backend=backend)
    for _ in range(2):
        p.grad = torch.ones(3)
        optimizer.step()
        assert key not in optimizer.state[p]
    optimizer.param_groups[0].update(option)
    value = p.detach().clone()
    for _ in range(2):
        optimizer.step()
    assert optimizer.state[p][key].shape == p.shape
    assert (p < value).all()
    if "step" in optimizer.state[p]:
        assert optimizer.state[p]["step"] == 4


def _describe(state: dict[str, Any]) -> list[Any]:
    return [(k, v.dtype, v.device, v.shape, v.stride(), v.requires_grad, type(v)) for k, v in state.items()]


@pytest.mark.contract("state")
@parametrize(TORCH_CASES, ("fp32", "bf16"))
def test_states_have_torchs_keys_order_types_and_strides(case: Case, dtype: torch.dtype, backend: str) -> None:
    layouts = {"contiguous": (5,), "transposed": (4, 6), "every_other": (5, 7), "channels_last": (2, 3, 4, 5)}
    scenario = Scenario("states", (Spec(()), *(Spec(shape, layout, layout) for layout, shape in layouts.items())))
    results = []
    for make in (lambda g: case.make(g, backend), case.make_torch):
        built = Built(scenario, case, dtype)
        optimizer = make(built.groups)
        built.set_grads(0)
        optimizer.step()
        results.append([_describe(optimizer.state[p]) if p in optimizer.state else None for p in built.params])
    assert results[0] == results[1]


@pytest.fixture
def _float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.contract("state")
@pytest.mark.usefixtures("_float64_by_default")
@parametrize(by_id("adam", "nadam", "nadam-psi2", "radam", "adagrad", "rmsprop", "ranger"), ("fp32", "fp64"))
def test_counters_follow_the_default_dtype(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Under a float64 default `step` and mu_product are float64, as torch's are, and so is the product's arithmetic."""
    pair = Pair(case, backend, dtype=dtype)
    pair.step(8)
    counters = [v for k, v in pair.optimizer.state[pair.ours.order[0]].items() if k in oracles.SCALAR_STATES]
    assert counters
    assert all(c.dtype == torch.float64 for c in counters)


@pytest.mark.contract("state")
@each_name
@each_backend
def test_state_is_created_on_the_first_gradient(name: str, backend: str) -> None:
    ours, theirs = both(name)
    a, b = param(3), param(3)
    optimizer, reference = ours([a, b], backend=backend), theirs([a, b])
    assert {p: list(s) for p, s in optimizer.state.items()} == {p: list(s) for p, s in reference.state.items()}
    optimizer.step()
    assert set(optimizer.state) == set(reference.state)
    a.grad = torch.ones(3)
    optimizer.step()
    reference.step()
    assert {p: list(s) for p, s in optimizer.state.items()} == {p: list(s) for p, s in reference.state.items()}


@pytest.mark.contract("state", difference="options switched on late", optimizers="Adagrad")
@each_backend
def test_an_accumulator_begins_with_the_value_of_its_group(backend: str) -> None:
    """Where a group's own differs from the constructor's, torch takes the latter."""
    ps = [param(3) for _ in range(3)]
    groups = [{"params": ps[:1]}, {"params": ps[1:2], "initial_accumulator_value": 0.7}]
    optimizer = fastopt.Adagrad(groups, initial_accumulator_value=0.3, backend=backend)
    optimizer.add_param_group({"params": ps[2:], "initial_accumulator_value": 0.9})
    for p in ps:
        p.grad = torch.ones(3)
    optimizer.step()
    assert [round(optimizer.state[p]["sum"][0].item() - 1, 4) for p in ps] == [0.3, 0.3, 0.9]
    optimizer.state.clear()
    optimizer.step()
    assert [round(optimizer.state[p]["sum"][0].item() - 1, 4) for p in ps] == [0.3, 0.7, 0.9]


@pytest.mark.contract("state", optimizers="Adam")
@each_backend
def test_state_put_there_by_a_hook_is_used(backend: str) -> None:
    """The recipe for states of one's own: a pre-step hook fills optimizer.state[p] before the first step."""
    p, q = torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(5))
    mine = {"step": torch.tensor(3.0), "exp_avg": torch.full((5,), 0.5), "exp_avg_sq": torch.full((5,), 0.25)}
    optimizer = fastopt.Adam([p], backend=backend)
    oracle = oracles.TorchLoop("Adam", [q])
    optimizer.register_step_pre_hook(lambda o, args, kwargs: o.state[p].update(mine) if not o.state[p] else None)
    oracle.state[q] = {k: v.clone() for k, v in mine.items()}
    for _ in range(2):
        p.grad, q.grad = torch.ones(5), torch.ones(5)
        optimizer.step()
        oracle.step()
    assert optimizer.state[p]["exp_avg"] is mine["exp_avg"]
    assert mine["step"] == 5
    assert not difference(p.detach(), q.detach())


@pytest.mark.contract("live")
@each_name
@each_backend
def test_step_without_gradients_changes_nothing(name: str, backend: str) -> None:
    params = [param(3), param(2, 2)]
    optimizer = getattr(fastopt, name)(params, backend=backend)
    before = [(p.detach().clone(), p._version) for p in params]
    states = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    for _ in range(2):
        assert optimizer.step() is None
    assert [p._version for p in params] == [v for _, v in before]
    assert all(torch.equal(p.detach(), v) for p, (v, _) in zip(params, before, strict=True))
    assert {p: set(s) for p, s in optimizer.state.items()} == {p: set(s) for p, s in states.items()}
    assert all(torch.equal(v, states[p][k]) for p, s in optimizer.state.items() for k, v in s.items())


@pytest.mark.contract("memory")
@each_name
@each_backend
def test_nothing_is_kept_alive(name: str, backend: str) -> None:
    """Neither gradients after zero_grad nor parameters after the optimizer is gone."""
    p = param(64)
    optimizer = getattr(fastopt, name)([p], backend=backend)
    for _ in range(3):
        p.grad = torch.ones(64)
        optimizer.step()
    grad, parameter = weakref.ref(p.grad), weakref.ref(p)
    p.grad = None
    assert grad() is None
    del optimizer, p
    gc.collect()
    assert parameter() is None


@pytest.mark.contract("state")
@each_backend
def test_a_subclass_that_goes_round_our_constructor(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTOPT_BACKEND", backend)

    def run(base: Any) -> torch.Tensor:
        class Own(base):  # type: ignore[misc]
            def __init__(self, params: Any) -> None:
                torch.optim.Optimizer.__init__(self, params, base([torch.zeros(1)]).defaults)

        p = torch.nn.Parameter(torch.ones(3))
        optimizer = Own([p])
        for _ in range(3):
            p.grad = torch.ones(3)
            optimizer.step()
        return p.detach()

    assert torch.equal(run(fastopt.SGD), run(torch.optim.SGD))


@pytest.mark.contract("live")
@each_name
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(name: str, set_to_none: bool) -> None:
    p = param(3)
    p.grad = torch.ones(3)
    getattr(fastopt, name)([p]).zero_grad(set_to_none=set_to_none)
    assert p.grad is None if set_to_none else torch.equal(p.grad, torch.zeros(3))


class Pair:
    """The same scenario driven through fastopt and through the oracle, compared after every step."""

    def __init__(self, case: Case, backend: str | None, specs: Any = None, dtype: torch.dtype = torch.float32) -> None:
        scenario = Scenario("pair", tuple(specs or (Spec((33,)), Spec((4, 5)))), steps=99)
        self.ours, self.theirs = (Built(scenario, case, dtype, contiguous=c) for c in (False, True))
        self.optimizer = case.make(self.ours.groups, backend)
        self.oracle = case.oracle(self.theirs.groups)
        self.t = 0

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            for built, optimizer in ((self.ours, self.optimizer), (self.theirs, self.oracle)):
                built.set_grads(self.t)
                optimizer.step()
            self.t += 1
            states = [oracles.states_of(self.oracle, p) for p in self.theirs.order]
            ours = snapshot(self.ours.order, states_in_order(self.optimizer, len(self.ours.order)))
            assert_same([ours], [snapshot(self.theirs.order, states)])

    def edit(self, **values: Any) -> None:
        for group in (self.optimizer.param_groups[0], self.oracle.param_groups[0]):
            group.update(values)


EDITS: list[dict[str, Any]] = [
    {"lr": 0.003},
    {"weight_decay": 0.05},
    {"betas": (0.7, 0.9)},
    {"eps": 1e-3},
    {"maximize": True},
    {"maximize": False, "weight_decay": 0},
    {"momentum": 0.5},
    {"dampening": 0.2},
    {"nesterov": True, "momentum": 0.6, "dampening": 0},
    {"alpha": 0.5},
    {"lr_decay": 0.3},
    {"momentum_decay": 0.1},
    {"decoupled_weight_decay": True, "weight_decay": 0.1},
    {"lr": 0},
    {"lr": 1},
]


ONE_OF_EACH = by_id("sgd-momentum", "rmsprop-momentum", "adagrad", "adam-amsgrad", "adamw", "adamax", "nadam", "radam")


@pytest.mark.contract("live")
@parametrize(ONE_OF_EACH, ("fp32",))
def test_edited_hyper_parameters_take_effect_on_the_next_step(case: Case, dtype: torch.dtype, backend: str) -> None:
    pair = Pair(case, backend)
    pair.step(2)
    for edit in EDITS:
        if accepts(case.name, *edit):
            if case.name == "AdamW" and "decoupled_weight_decay" in edit:
                continue
            pair.edit(**edit)
            pair.step(2)


@pytest.mark.contract("live", difference="tensor hyper-parameters")
@each_name
@each_backend
def test_lr_as_a_tensor_is_read_at_every_step(name: str, backend: str) -> None:
    """As the float it holds, exactly; torch itself computes with the float32 tensor: a few ulps of the update apart."""
    lr = torch.tensor(0.01)
    params = [torch.nn.Parameter(torch.linspace(-1, 1, 19)) for _ in range(3)]
    ours = getattr(fastopt, name)([params[0]], lr=lr, backend=backend)
    as_float = getattr(fastopt, name)([params[1]], lr=lr.item(), backend=backend)
    theirs = getattr(torch.optim, name)([params[2]], lr=lr)
    for step in range(8):
        if step == 4:
            lr.fill_(0.003)
            as_float.param_groups[0]["lr"] = lr.item()
        for p in params:
            p.grad = torch.cos(torch.arange(19.0) + step)
        for optimizer in (ours, as_float, theirs):
            optimizer.step()
    assert not difference(params[0].detach(), params[1].detach())
    torch.testing.assert_close(params[0], params[2], rtol=1e-6, atol=1e-6)


@pytest.mark.contract("live", difference="tensor hyper-parameters")
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@each_backend
def test_betas_as_tensors(name: str, backend: str) -> None:
    betas = (torch.tensor(0.85), torch.tensor(0.97))
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 19)) for _ in range(2))
    optimizer = getattr(fastopt, name)([ours], lr=torch.tensor(0.01), betas=betas, backend=backend)
    reference = getattr(torch.optim, name)([theirs], lr=torch.tensor(0.01), betas=betas)
    for step in range(5):
        for p, o in ((ours, optimizer), (theirs, reference)):
            p.grad = torch.cos(torch.arange(19.0) + step)
            o.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=12),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.05, step_size_up=3),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "CosineAnnealingWarmRestarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.02, anneal_epochs=5),
}  # fmt: skip


@pytest.mark.contract("schedulers")
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@parametrize(by_id("sgd-momentum", "adam", "adamax", "nadam", "radam", "rmsprop-momentum"), ("fp32",))
def test_schedulers(case: Case, dtype: torch.dtype, backend: str, scheduler: str) -> None:
    """torch's schedulers write lr, betas and momentum into the groups; ours must follow the oracle through it all."""
    pair = Pair(case, backend)
    schedules = [SCHEDULERS[scheduler](o) for o in (pair.optimizer, pair.oracle.inner)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()" among them
        for _ in range(10):
            pair.step()
            for schedule in schedules:
                schedule.step()


@pytest.mark.contract("schedulers")
def test_reduce_on_plateau() -> None:
    optimizer = fastopt.Adam([param(3)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    for _ in range(3):
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == 0.025


@pytest.mark.contract("live")
@parametrize(by_id(*["sgd-momentum", "rmsprop-centered", "adagrad", "adam-amsgrad", "nadam", "radam"]), ("fp32",))
def test_add_param_group_in_mid_run(case: Case, dtype: torch.dtype, backend: str) -> None:
    pair = Pair(case, backend)
    pair.step(3)
    specs = (Spec((7,)), Spec((2, 3)))
    late = [Built(Scenario("late", specs), case, torch.float32) for _ in range(2)]
    pair.optimizer.add_param_group({"params": late[0].params, "lr": 0.02})
    pair.oracle.inner.add_param_group({"params": late[1].params, "lr": 0.02})
    if case.name == "Adagrad":  # before 2.13 torch makes the state of its first parameters only, and cannot step others
        for q in late[1].params:
            pair.oracle.state[q].update(step=torch.tensor(0.0), sum=torch.zeros_like(q))
    for _ in range(7):
        for built in late:
            built.set_grads(pair.t)
        pair.step()
        for p, q in zip(late[0].params, late[1].params, strict=True):
            assert not difference(p.detach(), q.detach())


FLAGGED = [
    Case(f"{case.id}-{flag}", case.name, {**case.kwargs, flag: True})
    for case in TORCH_CASES
    for flag in ("fused", "foreach")
    if accepts(case.name, flag)
]


@pytest.mark.contract("numbers", "construction", difference="implementation flags")
@parametrize(FLAGGED, ("fp32", "bf16"))
def test_implementation_flags_do_not_change_the_numbers(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Late first gradients, strided and misaligned parameters included: torch's own fused kernels get those wrong."""
    specs = (
        Spec((33,)),
        Spec((9,), absent=frozenset({0, 3})),
        Spec((6, 5), "transposed", "contiguous"),
        Spec((5, 7), "every_other", "contiguous"),
        Spec((65,), "offset1"),
    )
    harness.check(case, Scenario("flags", specs, steps=7), dtype, backend)


@pytest.mark.contract("numbers")
@parametrize(by_id("adam", "radam-coupled", "sgd-momentum", "ranger", "lookahead-adam"), ("fp32",))
def test_four_hundred_groups(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Two small tensors each, 28 different settings."""
    scenario = Scenario(
        "many-groups",
        tuple(Spec((1 + i % 19,), group=i // 2, absent=frozenset({i % 5} if i % 3 else {})) for i in range(800)),
        steps=3 if case.name != "RAdam" else 7,
        overrides=lambda case: [{"lr": 0.001 * (1 + g % 28)} for g in range(400)],
    )
    harness.check(case, scenario, dtype, backend)


def tensors_allocated(action: Callable[[], Any]) -> int:
    """How many blocks the action takes from torch's CPU allocator, those it gives back included."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        action()
    events = profile.kineto_results.events()
    return sum(event.name() == "[memory]" and event.nbytes() > 0 for event in events)


@pytest.mark.contract("memory")
@parametrize([*ONE_OF_EACH, *by_id("rmsprop-everything", "ranger", "lookahead-adam")], ("fp32", "bf16"), ["native"])
def test_steady_state_allocates_no_tensor(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Seven steps measured after seven to get there: rectification and synchronisations included."""
    assert tensors_allocated(lambda: torch.empty(10).add_(torch.empty(10))) == 2
    params = [torch.nn.Parameter(torch.randn(n, dtype=dtype)) for n in (5, 64, 1000, 70_000)]
    params.append(torch.nn.Parameter(torch.randn(6, 7, dtype=dtype)))
    optimizer = case.make(params, backend)
    gradients = [[torch.randn_like(p) for p in params] for _ in range(14)]

    def train(steps: range) -> None:
        for step in steps:
            for p, g in zip(params, gradients[step], strict=True):
                p.grad = g
            optimizer.step()

    train(range(7))
    assert tensors_allocated(lambda: train(range(7, 14))) == 0
