"""Saving, loading, copying: torch's checkpoints continue here and ours there, bit for bit, in mid-run."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from typing import Any

import oracles
import pytest
import torch
from cases import CASES, TORCH_CASES, TORCH_NAMES, Case, backends, by_id, parametrize
from harness import Built, Scenario, Snapshot, Spec, assert_same, difference, snapshot, states_in_order
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.testing._internal.common_optimizers import optim_db

import fastopt

pytestmark = pytest.mark.contract("state")

MIDRUN = Scenario(
    "midrun",
    (
        Spec((33,)),
        Spec((4, 5)),
        Spec((6, 3), "transposed", "contiguous"),
        Spec((9,), absent=frozenset({0, 1, 7})),
        Spec(()),
    ),
    steps=12,
)
SAVED_AFTER = 5


def advance(optimizer: Any, built: Built, start: int, stop: int, states: Any = None) -> list[Snapshot]:
    """Steps start..stop-1 of the scenario. `states` reads the optimizer's states; by default from its state_dict."""
    read = states or (lambda: states_in_order(optimizer, len(built.order)))
    result = []
    for step in range(start, stop):
        built.set_grads(step)
        optimizer.step()
        result.append(snapshot(built.order, read()))
    return result


def copied(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Through a file, as only tensors, numbers and strings survive it."""
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def fresh(case: Case, dtype: torch.dtype, like: Built | None = None) -> Built:
    built = Built(MIDRUN, case, dtype)
    if like is not None:
        with torch.no_grad():
            for p, q in zip(built.params, like.params, strict=True):
                p.copy_(q)
    return built


@parametrize(TORCH_CASES, ("fp32",))
def test_torch_checkpoint_continues_here_and_ours_in_torch(case: Case, dtype: torch.dtype, backend: str) -> None:
    """torch -> fastopt -> torch, four steps each, against torch all the way (square roots correctly rounded)."""
    whole = Built(MIDRUN, case, dtype, contiguous=True)
    through = case.oracle(whole.groups)
    want = advance(through, whole, 0, 12, lambda: [oracles.states_of(through, p) for p in whole.order])

    first = Built(MIDRUN, case, dtype, contiguous=True)
    torch_run = case.oracle(first.groups)
    advance(torch_run, first, 0, 4, lambda: [{} for _ in first.order])
    ours = fresh(case, dtype, first)
    optimizer = case.make(ours.groups, backend)
    optimizer.load_state_dict(copied(torch_run.inner.state_dict()))
    assert_same(advance(optimizer, ours, 4, 8), want[4:8], signed_zeros=not case.interpolates_fully)

    last = Built(MIDRUN, case, dtype, contiguous=True)
    with torch.no_grad():
        for p, q in zip(last.params, ours.params, strict=True):
            p.copy_(q)
    again = case.oracle(last.groups)
    again.inner.load_state_dict(copied(optimizer.state_dict()))
    # Loading gave the oracle new group dicts and a new state.
    again.param_groups, again.state = again.inner.param_groups, again.inner.state
    got = advance(again, last, 8, 12, lambda: [oracles.states_of(again, p) for p in last.order])
    assert_same(got, want[8:12], signed_zeros=not case.interpolates_fully)


@parametrize(CASES, ("fp32", "bf16"))
def test_resumed_run_is_the_uninterrupted_one(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Through torch.save and torch.load(weights_only=True), into a new optimizer with default hyper-parameters."""
    whole = fresh(case, dtype)
    want = advance(case.make(whole.groups, backend), whole, 0, 12)
    first = fresh(case, dtype)
    saved = case.make(first.groups, backend)
    advance(saved, first, 0, SAVED_AFTER)
    state_dict = copied(saved.state_dict())
    second = fresh(case, dtype, first)
    resumed = case.make(second.groups, backend)
    resumed.load_state_dict(state_dict)
    assert_same(advance(resumed, second, SAVED_AFTER, 12), want[SAVED_AFTER:])


@parametrize(by_id("sgd-momentum", "adam-amsgrad", "nadam", "ranger", "lookahead-radam"), ("fp32",))
def test_loading_in_mid_run_replaces_the_states(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Into an optimizer that has already stepped: whatever it cached about its old states is void."""
    built = fresh(case, dtype)
    optimizer = case.make(built.groups, backend)
    advance(optimizer, built, 0, 3)
    values, state_dict = [p.detach().clone() for p in built.params], copied(optimizer.state_dict())
    first = advance(optimizer, built, 3, 9)
    with torch.no_grad():
        for p, value in zip(built.params, values, strict=True):
            p.copy_(value)
    optimizer.load_state_dict(state_dict)
    assert_same(advance(optimizer, built, 3, 9), first)


@pytest.mark.contract("state", "wrappers")
@parametrize(CASES, ("fp32",), names=["native"])
def test_copies_are_independent_and_exact(case: Case, dtype: torch.dtype, backend: str) -> None:
    """deepcopy and pickle of model and optimizer together, in mid-run: both continue as the original does."""
    built = fresh(case, dtype)
    optimizer = case.make(built.groups, backend)
    advance(optimizer, built, 0, SAVED_AFTER)
    pickled = pickle.loads(pickle.dumps((built.params, optimizer)))
    deep = copy.deepcopy((built.params, optimizer))
    before = snapshot(built.order, states_in_order(optimizer, len(built.order)))
    traces = []
    for params, other in (pickled, deep):
        assert type(other) is type(optimizer)
        twin = fresh(case, dtype)
        twin.params = twin.order = list(params)
        traces.append(advance(other, twin, SAVED_AFTER, 12))
    assert_same([snapshot(built.order, states_in_order(optimizer, len(built.order)))], [before])
    want = advance(optimizer, built, SAVED_AFTER, 12)
    for got in traces:
        assert_same(got, want)


@pytest.mark.contract("wrappers", difference="copies")
@pytest.mark.parametrize("name", TORCH_NAMES)
def test_deepcopy_keeps_public_attributes_and_the_backend(name: str) -> None:
    optimizer = getattr(fastopt, name)([torch.nn.Parameter(torch.ones(3))], backend="reference")
    optimizer.step()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert {k for k in vars(other) if not k.startswith("_")} == {
            k for k in vars(optimizer) if not k.startswith("_")
        }
        other.param_groups[0]["params"][0].grad = torch.ones(3)
        other.step()
        assert "reference" in str(fastopt.explain(other))


@parametrize(TORCH_CASES, ("fp32",), names=["native"])
def test_state_dict_has_torchs_structure(case: Case, dtype: torch.dtype, backend: str) -> None:
    dicts = []
    for make in (lambda g: case.make(g, backend), case.make_torch):
        built = fresh(case, dtype)
        optimizer = make(built.groups)
        advance(optimizer, built, 0, 3)
        dicts.append(optimizer.state_dict())
    ours, theirs = dicts
    assert list(ours) == list(theirs)
    assert ours["param_groups"] == theirs["param_groups"]
    assert [list(g) for g in ours["param_groups"]] == [list(g) for g in theirs["param_groups"]]
    assert [(i, list(s)) for i, s in ours["state"].items()] == [(i, list(s)) for i, s in theirs["state"].items()]


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_state_dict_is_deterministic(name: str) -> None:
    def run() -> dict[str, Any]:
        torch.manual_seed(3)
        model = torch.nn.Linear(3, 2)
        optimizer = getattr(fastopt, name)(model.named_parameters())
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(4, 3)).pow(2).sum().backward()
            optimizer.step()
        return optimizer.state_dict()

    first, second = run(), run()
    assert first["param_groups"] == second["param_groups"]
    assert first["param_groups"][0]["param_names"] == ["weight", "bias"]
    for i, states in first["state"].items():
        for key, value in states.items():
            assert torch.equal(value, second["state"][i][key])


SEVERAL = by_id("sgd-momentum", "adagrad", "adam-amsgrad", "nadam", "rmsprop-centered", "ranger", "lookahead-sgd")
WRONG = {"longer": (34,), "shorter": (32,), "same-size-other-shape": (11, 3), "scalar-like": (1,)}


@pytest.mark.contract("state", difference="shapes of loaded states")
@pytest.mark.parametrize("shape", WRONG.values(), ids=WRONG)
@parametrize(SEVERAL, ("fp32",))
def test_wrong_shape_is_refused_before_anything_changes(
    case: Case, dtype: torch.dtype, backend: str, shape: tuple[int, ...]
) -> None:
    """The last state of the last parameter is bad: everything before it must be untouched, and training goes on."""
    built, twin = (Built(Scenario("wrong", (Spec((4,)), Spec((33,)))), case, dtype) for _ in range(2))
    optimizer, undisturbed = case.make(built.groups, backend), case.make(twin.groups, backend)
    advance(optimizer, built, 0, 3)
    advance(undisturbed, twin, 0, 3)
    state_dict = copy.deepcopy(optimizer.state_dict())
    for value in state_dict["state"][0].values():
        value.fill_(9)
    state_dict["param_groups"][0]["lr"] = 123.0
    key = [k for k in state_dict["state"][1] if k not in oracles.SCALAR_STATES][-1]
    state_dict["state"][1][key] = torch.zeros(shape)
    with pytest.raises((ValueError, RuntimeError), match=key) as error:
        optimizer.load_state_dict(state_dict)
    assert "33" in str(error.value)
    assert str(tuple(shape)) in str(error.value) or str(list(shape)) in str(error.value)
    assert optimizer.param_groups[0]["lr"] == case.kwargs["lr"]
    assert_same(advance(optimizer, built, 3, 6), advance(undisturbed, twin, 3, 6))


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_wrong_groups_are_refused_as_in_torch(name: str) -> None:
    messages = []
    for cls in (getattr(fastopt, name), getattr(torch.optim, name)):
        optimizer = cls([torch.nn.Parameter(torch.ones(3))])
        other = cls([torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))])
        two = cls([{"params": [torch.nn.Parameter(torch.ones(3))]}, {"params": [torch.nn.Parameter(torch.ones(3))]}])
        for source in (other, two):
            with pytest.raises(ValueError, match=r".") as error:
                optimizer.load_state_dict(source.state_dict())
            messages.append(str(error.value))
    assert messages[:2] == messages[2:]


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_older_checkpoints_load(name: str) -> None:
    """Without the flags that torch added over the years, and with `step` as a Python number."""
    info = next(i for i in optim_db if i.name == name)
    p, q = (torch.nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    optimizer, reference = getattr(fastopt, name)([p]), getattr(fastopt, name)([q])
    for parameter, o in ((p, optimizer), (q, reference)):
        parameter.grad = torch.ones(7)
        o.step()
    state_dict = copied(optimizer.state_dict())
    for flag in (*info.not_og_supported_flags, "fused"):
        state_dict["param_groups"][0].pop(flag, None)
    for states in state_dict["state"].values():
        if "step" in states:
            states["step"] = states["step"].item()
    optimizer.load_state_dict(state_dict)
    for _ in range(3):
        for parameter, o in ((p, optimizer), (q, reference)):
            parameter.grad = torch.ones(7)
            o.step()
    assert not difference(p.detach(), q.detach())
    if "step" in optimizer.state[p]:
        assert torch.is_tensor(optimizer.state[p]["step"])
        assert optimizer.state[p]["step"] == 4


@pytest.mark.contract("state", optimizers="SGD")
def test_sgd_checkpoint_with_an_empty_momentum_buffer() -> None:
    """torch wrote momentum_buffer=None for parameters without a gradient, and still does with momentum=0."""
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = fastopt.SGD([p], lr=1.0, momentum=0.5, dampening=0.5)
    state_dict = optimizer.state_dict()
    state_dict["state"] = {0: {"momentum_buffer": None}}
    optimizer.load_state_dict(state_dict)
    p.grad = torch.ones(2)
    optimizer.step()
    assert p.tolist() == [-1.0, -1.0]


@pytest.mark.contract("state", difference="ownership of loaded states")
@parametrize(by_id("sgd-momentum", "adam-amsgrad", "ranger", "lookahead-adam"), ("fp32",))
def test_one_dict_loaded_twice_serves_two_optimizers(case: Case, dtype: torch.dtype, backend: str) -> None:
    """torch shares the dict's tensors with the optimizer; here a loaded dict stays what it was."""
    source = fresh(case, dtype)
    optimizer = case.make(source.groups, backend)
    advance(optimizer, source, 0, SAVED_AFTER)
    state_dict = optimizer.state_dict()
    kept = copy.deepcopy(state_dict)
    traces = []
    for _ in range(2):
        built = fresh(case, dtype, source)
        other = case.make(built.groups, backend)
        other.load_state_dict(state_dict)
        traces.append(advance(other, built, SAVED_AFTER, 12))
    assert_same(*traces)
    for i, states in kept["state"].items():
        assert all(torch.equal(value, state_dict["state"][i][key]) for key, value in states.items())


def test_unknown_states_survive() -> None:
    """States that a user or another library keeps there are nobody else's business."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = fastopt.Adam([p])
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.state[p].update(mine=torch.ones(7), note="kept", number=3)
    other = fastopt.Adam([p])
    other.load_state_dict(optimizer.state_dict())
    p.grad = torch.ones(3)
    other.step()
    assert other.state[p]["note"] == "kept"
    assert other.state[p]["number"] == 3
    assert "mine" in other.state[p]


@pytest.mark.contract("state", "distributed")
@pytest.mark.parametrize("name", TORCH_NAMES)
@pytest.mark.parametrize("backend", backends())
def test_distributed_checkpoint_functions(name: str, backend: str) -> None:
    """DCP creates states with an lr = 0 step on zero gradients: parameters must not move; a reload must be exact."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))

    def train(module: torch.nn.Module, optimizer: Any, steps: int) -> None:
        for step in range(steps):
            optimizer.zero_grad()
            module(torch.linspace(-1, 1, 5) * step).pow(2).sum().backward()
            optimizer.step()

    optimizer = getattr(fastopt, name)(model.parameters(), lr=0.01, backend=backend)
    train(model, optimizer, 7)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    twin = copy.deepcopy(model)
    before = [p.detach().clone() for p in twin.parameters()]
    other = getattr(fastopt, name)(twin.parameters(), lr=0.5, backend=backend)
    set_optimizer_state_dict(twin, other, saved)
    assert all(torch.equal(p.detach(), q) for p, q in zip(twin.parameters(), before, strict=True))
    train(model, optimizer, 5)
    train(twin, other, 5)
    assert all(
        not difference(p.detach(), q.detach()) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


@pytest.mark.contract("distributed", optimizers=TORCH_NAMES)
def test_zero_redundancy_style_construction() -> None:
    """ZeroRedundancyOptimizer builds shards with cls(params, **defaults)."""
    for name in TORCH_NAMES:
        optimizer = getattr(fastopt, name)([torch.nn.Parameter(torch.ones(3))])
        clone = type(optimizer)([torch.nn.Parameter(torch.ones(3))], **{
            k: v for k, v in optimizer.defaults.items() if not (name == "AdamW" and k == "decoupled_weight_decay")
        })  # fmt: skip
        assert clone.defaults == optimizer.defaults


# Whose checkpoints go on under whose rule: those that hold all that it needs, as in torch.
RELATED = {
    *itertools.permutations(("Adam", "AdamW", "RAdam"), 2),
    *(("NAdam", other) for other in ("Adam", "AdamW", "RAdam", "Ranger")),
    *((other, "Ranger") for other in ("Adam", "AdamW", "RAdam")),
    *(("Ranger", other) for other in ("Adam", "AdamW", "RAdam")),
}
STEPPING = (*TORCH_NAMES, "Ranger")


@pytest.mark.contract("state", difference="checkpoints of other optimizers")
@pytest.mark.parametrize(("saved", "loading"), [*itertools.permutations(STEPPING, 2)])
def test_another_rules_checkpoint_is_refused_before_anything_changes(saved: str, loading: str) -> None:
    (p,) = ps = [torch.nn.Parameter(torch.ones(4))]
    p.grad = torch.ones(4)
    options = {"momentum": 0.9} if saved == "SGD" else {}
    source, optimizer = getattr(fastopt, saved)(ps, lr=0.5, **options), getattr(fastopt, loading)(ps, lr=0.25)
    source.step()
    if (saved, loading) in RELATED:
        optimizer.load_state_dict(source.state_dict())
        optimizer.step()
        assert optimizer.state[p]["step"] == 2
        return
    before = str(optimizer.state_dict())  # four elements: all of them are in it
    with pytest.raises(ValueError, match=f"which {loading} needs"):
        optimizer.load_state_dict(source.state_dict())
    assert str(optimizer.state_dict()) == before
    # Nor is one imported whose state is yet to come, so that only its groups tell.
    if optimizer.rule.lacking(source.param_groups[0]):
        with pytest.raises(ValueError, match=f"which {loading} needs"):
            fastopt.import_state(optimizer, {**source.state_dict(), "state": {}}, source="torch")
        assert str(optimizer.state_dict()) == before


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_a_checkpoint_older_than_some_hyper_parameters_loads_as_in_torch(name: str) -> None:
    (p,) = ps = [torch.nn.Parameter(torch.ones(4))]
    p.grad = torch.ones(4)
    ours, theirs = getattr(fastopt, name), getattr(torch.optim, name)
    (source := theirs(ps, lr=0.5)).step()
    saved = source.state_dict()
    newer = {*ours.rule.optional, "maximize", "foreach", "capturable", "differentiable", "fused"}
    for key in newer & saved["param_groups"][0].keys():
        del saved["param_groups"][0][key]
    groups = []
    for cls in (ours, theirs):
        optimizer = cls(ps, lr=0.25)
        optimizer.load_state_dict(copy.deepcopy(saved))
        groups.append({key: value for key, value in optimizer.param_groups[0].items() if key != "params"})
    assert groups[0] == groups[1]
