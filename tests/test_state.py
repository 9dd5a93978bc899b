"""The contract of states: what a checkpoint holds comes back as it was, however much of it there is."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
import torch.distributed.checkpoint as dcp
from cases import CASES, Case, backends, by_id, each_backend, parametrize
from harness import assert_same, difference, snapshot, states_in_order
from test_checkpoints import MIDRUN, SAVED_AFTER, advance, copied, fresh
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import fastopt
from fastopt.plan import missing_state
from fastopt.setting import Settings

pytestmark = pytest.mark.contract("state")

EVERY_RULE = by_id(
    "sgd-momentum", "rmsprop-everything", "adagrad", "adam-amsgrad", "adamw", "adamax", "nadam", "radam-decoupled",
    "ranger", "lookahead-sgd-nesterov", "lookahead-adam", "lookahead-ranger",
)  # fmt: skip
WITH_STEPS = [case for case in EVERY_RULE if case.name != "SGD"]
PLAIN_RULES = [case for case in EVERY_RULE if not case.lookahead]
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def mid_run(case: Case, dtype: torch.dtype, backend: str) -> tuple[Any, Any]:
    built = fresh(case, dtype)
    optimizer = case.make(built.groups, backend)
    advance(optimizer, built, 0, SAVED_AFTER)
    return optimizer, built


@pytest.mark.contract("state", difference=("dtypes of loaded states", "ownership of loaded states"))
@parametrize(EVERY_RULE, ("fp32", "bf16"), names=["native"])
@pytest.mark.parametrize("state_dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
def test_loading_keeps_every_dtype_bit_for_bit_and_shares_nothing(
    case: Case, dtype: torch.dtype, backend: str, state_dtype: torch.dtype
) -> None:
    """torch casts all but `step` to the parameter's dtype (pytorch #43706), and shares what it need not cast."""
    optimizer, built = mid_run(case, dtype, backend)
    state_dict = optimizer.state_dict()
    for states in state_dict["state"].values():
        for key in states.keys() - set(oracles.SCALAR_STATES):
            states[key] = (states[key].double() / 3).to(state_dtype)  # thirds: a cast there and back would show
    kept = copy.deepcopy(state_dict)
    twin = fresh(case, dtype, built)
    other = case.make(twin.groups, backend)
    other.load_state_dict(state_dict)
    loaded = other.state_dict()["state"]
    assert loaded.keys() == kept["state"].keys()
    for i, states in loaded.items():
        assert list(states) == list(kept["state"][i])
        for key, value in states.items():
            assert not difference(value, kept["state"][i][key]), key
            assert value.data_ptr() != state_dict["state"][i][key].data_ptr()
    advance(other, twin, SAVED_AFTER, SAVED_AFTER + 2)
    for i, states in kept["state"].items():
        assert not any(difference(state_dict["state"][i][key], value) for key, value in states.items())
    assert all(
        value.dtype == kept["state"][i][key].dtype
        for i, states in other.state_dict()["state"].items() if i in kept["state"] for key, value in states.items()
    )  # fmt: skip


@pytest.mark.contract("state")
@parametrize(EVERY_RULE, ("fp32", "bf16"))
def test_a_state_that_was_read_into_its_own_tensors_stays_in_them(case: Case, dtype: torch.dtype, backend: str) -> None:
    """As torch.distributed.checkpoint reads: there need not be memory for another one."""
    optimizer, built = mid_run(case, dtype, backend)
    saved = copied(optimizer.state_dict())
    other = fresh(case, dtype, built)
    elsewhere = case.make(other.groups, backend)
    elsewhere.load_state_dict(saved)
    values = [p.detach().clone() for p in built.params]
    want = advance(elsewhere, other, SAVED_AFTER, SAVED_AFTER + 2)
    assert_same(advance(optimizer, built, SAVED_AFTER, SAVED_AFTER + 2), want)
    with torch.no_grad():
        for p, value in zip(built.params, values, strict=True):
            p.copy_(value)
    own = {i: optimizer.state_dict()["state"][i] for i in saved["state"]}
    for i, states in own.items():
        for key, value in states.items():
            value.copy_(saved["state"][i][key])
    held = {id(value) for states in own.values() for value in states.values()}
    optimizer.load_state_dict({"state": own, "param_groups": saved["param_groups"]})
    for states in optimizer.state.values():
        assert all(id(states[key]) in held for key in states.keys() - set(oracles.SCALAR_STATES))
    assert_same(advance(optimizer, built, SAVED_AFTER, SAVED_AFTER + 2), want)


@pytest.mark.contract("state", difference=("dtypes of loaded states", "ownership of loaded states"))
def test_torch_casts_and_shares_states() -> None:
    """What the test above is about, so that the claim stays true."""
    p, q = (torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2))
    saved = {"step": torch.tensor(1.0), "mu_product": torch.tensor(1 / 3),
             "exp_avg": torch.ones(3, dtype=torch.bfloat16), "exp_avg_sq": torch.full((3,), 1 / 3)}  # fmt: skip
    theirs, ours = torch.optim.NAdam([p]), fastopt.NAdam([q])
    for optimizer in (theirs, ours):
        optimizer.load_state_dict(optimizer.state_dict() | {"state": {0: saved}})
    assert [theirs.state[p][key].dtype for key in ("mu_product", "exp_avg_sq")] == [torch.bfloat16] * 2
    assert [ours.state[q][key].dtype for key in ("mu_product", "exp_avg_sq")] == [torch.float32] * 2
    assert theirs.state[p]["exp_avg"] is saved["exp_avg"]
    assert ours.state[q]["exp_avg"] is not saved["exp_avg"]


@pytest.mark.parametrize(("step", "product"), [("cpu", "cuda"), ("cuda", "cpu"), (None, "cuda"), ("cpu", "cpu")])
def test_counters_come_to_where_step_is(step: str | None, product: str) -> None:
    """torch's loading takes NAdam's mu_product to the parameter's device and leaves `step` where it was."""
    with FakeTensorMode():
        p = torch.nn.Parameter(torch.ones(3, device="cuda"))
        state = {"mu_product": torch.ones((), device=product)} | ({"step": torch.ones((), device=step)} if step else {})
        setting = Settings(fastopt.NAdam.rule).of(fastopt.NAdam([p]).param_groups[0])
        counters = state | missing_state(setting, p, state)
    wanted = step or "cpu"
    assert {key: counters[key].device.type for key in ("step", "mu_product")} == {"step": wanted, "mu_product": wanted}
    assert {counters[key].dtype for key in ("step", "mu_product")} == {torch.float32}


@pytest.mark.contract("state", "layouts", difference="mixed dtypes")
@parametrize(PLAIN_RULES, ("fp32",))
def test_states_that_a_hook_put_there_in_another_dtype_are_used(case: Case, dtype: torch.dtype, backend: str) -> None:
    """bf16 states of fp32 parameters, as trainers create them: arithmetic in float32, one rounding on store."""
    built, twin = fresh(case, dtype), fresh(case, dtype)
    optimizer, oracle = case.make(built.groups, backend), case.oracle(twin.groups)
    tensors: dict[Any, dict[str, torch.Tensor]] = {}
    template = case.make(fresh(case, dtype).groups, backend)
    fastopt.materialize_state(template)
    keys = list(template.state[template.param_groups[0]["params"][0]])

    def narrow(o: Any, args: Any, kwargs: Any) -> None:
        for p in built.params:
            if p.grad is not None and p not in tensors:
                tensors[p] = {key: _first(key, p) for key in keys}
                o.state[p].clear()
                o.state[p].update(tensors[p])

    optimizer.register_step_pre_hook(narrow)
    for step in range(7):
        for run, params in ((optimizer, built), (oracle, twin)):
            params.set_grads(step)
            run.step()
        if case.name == "SGD" and step == 0:  # a buffer that is there is not a first step
            for p, q in zip(built.params, twin.params, strict=True):
                assert q.grad is None or not difference(p.detach(), q.detach(), signed_zeros=False)
        for p, q in zip(built.params, twin.params, strict=True):
            for key, value in oracle.state[q].items() if p in tensors else ():
                if key not in oracles.SCALAR_STATES:
                    value.copy_(value.bfloat16())
                    assert optimizer.state[p][key] is tensors[p][key]
                    assert not difference(optimizer.state[p][key].float(), value, signed_zeros=False), key
            assert not difference(p.detach(), q.detach(), signed_zeros=False), f"step {step + 1}"


def _first(key: str, p: torch.Tensor) -> torch.Tensor:
    if key in oracles.SCALAR_STATES:
        return torch.tensor(1.0 if key == "mu_product" else 0.0)
    return p.detach().bfloat16() if key == "slow_buffer" else torch.zeros_like(p, dtype=torch.bfloat16)


@parametrize(EVERY_RULE, ("fp32",))
def test_a_missing_key_is_completed_and_the_others_stay(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Each key in turn: the run is the one in which it was reset to its first value. torch raises a KeyError."""
    optimizer, built = mid_run(case, dtype, backend)
    state_dict = copied(optimizer.state_dict())
    first = case.make(fresh(case, dtype, built).groups, backend)
    fastopt.materialize_state(first)
    initial = first.state_dict()["state"]
    for key in state_dict["state"][0]:
        traces = []
        for present in (False, True):
            changed, twin = copy.deepcopy(state_dict), fresh(case, dtype, built)
            for i, states in changed["state"].items():
                # Not setting the key again lets SGD take the next gradient undamped, as the first of a parameter.
                states.pop(key)
                if present:
                    changed["state"][i] = {k: initial[i][k] if k == key else states[k] for k in state_dict["state"][i]}
            other = case.make(twin.groups, backend)
            other.load_state_dict(changed)
            run = advance(other, twin, SAVED_AFTER, SAVED_AFTER + 4)
            traces.append([[(p, dict(sorted(s.items()))) for p, s in step] for step in run])
        assert_same(*traces, signed_zeros=False)


@pytest.mark.parametrize("name", ["Adagrad", "AdamW", "NAdam", "RAdam", "RMSprop", "Ranger"])
def test_states_that_somebody_began_to_fill_are_copied_and_loaded(name: str) -> None:
    """Trainers fill moments before any step and pass state_dict() back: torch's Adam looks for `step` there."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = getattr(fastopt, name)([p])
    optimizer.state[p].clear()
    optimizer.state[p]["exp_avg"] = torch.full((3,), 0.5)
    optimizer.load_state_dict(optimizer.state_dict())
    other = copy.deepcopy(optimizer)
    for o in (optimizer, other):
        (q,) = o.param_groups[0]["params"]
        assert torch.equal(o.state[q]["exp_avg"], torch.full((3,), 0.5))
        assert o.state[q]["step"] == 0
        q.grad = torch.ones(3)
        o.step()
        assert o.state[q]["step"] == 1


STEPS: dict[str, Callable[[torch.Tensor], Any]] = {
    "int": lambda t: int(t.item()),
    "float": lambda t: t.item(),
    "float64": lambda t: t.double(),
    "int64": lambda t: t.long(),
    "int32": lambda t: t.int(),
    "one-element": lambda t: t.reshape(1),
}


@pytest.mark.parametrize("form", STEPS)
@parametrize(WITH_STEPS, ("fp32",))
def test_step_loads_in_every_form(case: Case, dtype: torch.dtype, backend: str, form: str) -> None:
    optimizer, built = mid_run(case, dtype, backend)
    state_dict = copied(optimizer.state_dict())
    want = [p for p, _ in advance(optimizer, built, SAVED_AFTER, SAVED_AFTER + 4)[-1]]
    for states in state_dict["state"].values():
        states["step"] = STEPS[form](states["step"])
    twin = fresh(case, dtype)
    again = case.make(twin.groups, backend)
    advance(again, twin, 0, SAVED_AFTER)
    again.load_state_dict(state_dict)
    got = [p for p, _ in advance(again, twin, SAVED_AFTER, SAVED_AFTER + 4)[-1]]
    assert not [text for p, q in zip(got, want, strict=True) if (text := difference(p, q))]
    for p, q in zip(twin.params, built.params, strict=True):
        assert torch.is_tensor(again.state[p]["step"])
        assert again.state[p]["step"].item() == optimizer.state[q]["step"].item()


@parametrize(CASES, ("fp32",), names=["native"])
def test_nothing_but_tensors_in_states_and_plain_values_in_groups(case: Case, dtype: torch.dtype, backend: str) -> None:
    """What torch.distributed.checkpoint can flatten and torch.load(weights_only=True) reads."""
    optimizer, _ = mid_run(case, dtype, backend)
    state_dict = optimizer.state_dict()
    assert all(type(value) is torch.Tensor for states in state_dict["state"].values() for value in states.values())
    assert all(states for states in state_dict["state"].values())
    for group in state_dict["param_groups"]:
        for key, value in group.items():
            plain = (value,) if not isinstance(value, (tuple, list)) else value
            assert all(v is None or type(v) in (int, float, bool, str) for v in plain), key


@parametrize(by_id("adam", "nadam", "ranger", "lookahead-adam", "sgd-momentum"), ("fp32",), names=["native"])
def test_loading_twice_is_loading_once(case: Case, dtype: torch.dtype, backend: str) -> None:
    optimizer, built = mid_run(case, dtype, backend)
    state_dict = copied(optimizer.state_dict())
    for _ in range(2):
        optimizer.load_state_dict(optimizer.state_dict())
    again = optimizer.state_dict()
    assert again["param_groups"] == state_dict["param_groups"]
    n = len(built.order)
    states = [[s["state"].get(i, {}) for i in range(n)] for s in (again, state_dict)]
    assert_same([snapshot(built.order, states[0])], [snapshot(built.order, states[1])])


def trace(case: Case, dtype: torch.dtype, backend: str, materialize_at: int | None) -> tuple[Any, Any, Any]:
    built = fresh(case, dtype)
    optimizer = case.make(built.groups, backend)
    result = []
    for step in range(MIDRUN.steps):
        if step == materialize_at:
            fastopt.materialize_state(optimizer)
        result += advance(optimizer, built, step, step + 1)
    return [[(p, {}) for p, _ in step] for step in result], states_in_order(optimizer, len(built.order)), built


@pytest.mark.parametrize("at", [0, 1, 5])
@parametrize([case for case in CASES if case.id != "sgd-dampening"], ("fp32", "bf16"), names=["native"])
def test_materialised_state_changes_no_bit(case: Case, dtype: torch.dtype, backend: str, at: int) -> None:
    """Before the first step and in mid-run; one parameter gets its first gradient only at step 3."""
    want, states, _ = trace(case, dtype, backend, None)
    got, materialised, _ = trace(case, dtype, backend, at)
    assert_same(got, want, signed_zeros=False)  # SGD: 0 * mu + -0 is 0
    for a, b in zip(materialised, states, strict=True):
        assert list(a) == list(b)
        assert not any(difference(a[key], b[key], signed_zeros=False) for key in a)


def test_materialised_buffers_dampen_first_gradients_as_torchs_own_way_does() -> None:
    """The documented exception."""
    moved = []
    for materialise in (False, True):
        p = torch.nn.Parameter(torch.zeros(2))
        optimizer = fastopt.SGD([p], lr=1.0, momentum=0.5, dampening=0.75)
        if materialise:
            fastopt.materialize_state(optimizer)
        p.grad = torch.ones(2)
        optimizer.step()
        moved.append(p[0].item())
    q = torch.nn.Parameter(torch.zeros(2))
    theirs = torch.optim.SGD([q], lr=0.0, momentum=0.5, dampening=0.75)
    q.grad = torch.zeros(2)
    theirs.step()
    theirs.param_groups[0]["lr"], q.grad = 1.0, torch.ones(2)
    theirs.step()
    assert moved == [-1.0, q[0].item()] == [-1.0, -0.25]


@pytest.mark.parametrize("backend", backends())
def test_materialising_creates_what_the_first_step_would_and_only_that(backend: str) -> None:
    p, q, frozen = (torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).t()) for _ in range(3))
    frozen.requires_grad_(False)
    for make in (
        fastopt.Adam,
        fastopt.NAdam,
        fastopt.Ranger,
        lambda g, **kw: fastopt.Lookahead(fastopt.RAdam(g, **kw)),
    ):
        optimizer = make([p, q, frozen], backend=backend)
        p.grad, q.grad = torch.ones(3, 2), None
        optimizer.step()
        before = dict(optimizer.state[p])
        fastopt.materialize_state(optimizer)
        fastopt.materialize_state(optimizer)
        assert list(optimizer.state) == [p, q]
        assert all(optimizer.state[p][key] is value for key, value in before.items())
        assert list(optimizer.state[q]) == list(before)
        assert optimizer.state[q]["step"] == 0
        assert all(
            (v.dtype, v.device, v.stride()) == (before[k].dtype, before[k].device, before[k].stride())
            for k, v in optimizer.state[q].items()
        )


def test_materialising_refuses_what_does_not_fit_and_whom_it_does_not_know() -> None:
    p, q = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = fastopt.Adam([p, q])
    optimizer.state[q]["exp_avg"] = torch.zeros(4)
    with pytest.raises(ValueError, match=r"state 'exp_avg' of parameter 1 of group 0 is real of shape \(4,\)"):
        fastopt.materialize_state(optimizer)
    assert p not in optimizer.state
    for foreign in (torch.optim.Adam([p]), fastopt.Lookahead(torch.optim.Adam([p]))):
        with pytest.raises(TypeError, match=r"fastopt\.convert"):
            fastopt.materialize_state(foreign)


class HalfUsed(torch.nn.Module):
    """A model with a layer that no gradient ever reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


@pytest.mark.contract("state", "distributed")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    "make",
    [fastopt.AdamW, fastopt.Ranger, lambda params: fastopt.Lookahead(fastopt.NAdam(params), k=2)],
    ids=["adamw", "ranger", "lookahead"],
)
def test_strict_resume_with_parameters_that_never_had_a_gradient(make: Any) -> None:
    """torch.distributed.checkpoint wants every parameter's state: impossible without materialising, exact with it."""

    def train(model: torch.nn.Module, optimizer: Any, steps: int) -> None:
        for step in range(steps):
            optimizer.zero_grad()
            model(torch.full((2, 3), 0.1 * step + 0.3)).square().sum().backward()
            optimizer.step()

    def save_and_load(model: torch.nn.Module, optimizer: Any, folder: str) -> tuple[torch.nn.Module, Any]:
        dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder, no_dist=True)
        twin = copy.deepcopy(model)
        other = make(twin.parameters())
        into = {"optimizer": get_optimizer_state_dict(twin, other)}
        dcp.load(into, checkpoint_id=folder, no_dist=True)
        set_optimizer_state_dict(twin, other, into["optimizer"])
        return twin, other

    model = HalfUsed()
    optimizer = make(model.parameters())
    train(model, optimizer, 3)
    with tempfile.TemporaryDirectory() as folder, pytest.raises(BaseException, match="Missing key"):
        save_and_load(model, optimizer, folder)
    fastopt.materialize_state(optimizer)
    with tempfile.TemporaryDirectory() as folder:
        twin, other = save_and_load(model, optimizer, folder)
    train(model, optimizer, 4)
    train(twin, other, 4)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert [s["step"].item() for s in other.state_dict()["state"].values()] == [7, 7, 0, 0]


@pytest.mark.contract("state", optimizers="NAdam")
@each_backend
def test_a_product_saved_as_a_whole_number_goes_on_as_a_fraction(backend: str) -> None:
    results = []
    for first in (1, 1.0):
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = fastopt.NAdam([p], lr=0.1, backend=backend)
        p.grad = torch.ones(3)
        optimizer.step()
        saved = optimizer.state_dict()
        saved["state"][0]["mu_product"] = torch.tensor(first)
        optimizer.load_state_dict(saved)
        for _ in range(3):
            optimizer.step()
        results.append((p.detach(), optimizer.state[p]["mu_product"]))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)
    assert 0 < results[0][1] < 1
