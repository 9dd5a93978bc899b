"""Lookahead saved, loaded and copied: one flat checkpoint, exact resumes, hooks, distributed checkpoints."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from harness import same, train
from lookaheads import INNER, each_inner, params, watch_checkpoints
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import fastopt

pytestmark = pytest.mark.contract("lookahead", optimizers="Lookahead")


def _saved(optimizer: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.contract("lookahead", "state", optimizers="Lookahead")
@each_inner
@pytest.mark.parametrize("at", [1, 5, 8])
def test_resume_is_exact(inner: str, at: int) -> None:
    """Saved between synchronisations: slow weights, counter, k and alpha all come back."""
    whole, first = params(), params()
    train(fastopt.Lookahead(INNER[inner](whole), k=5, alpha=0.4), whole, 0, 17)
    optimizer = fastopt.Lookahead(INNER[inner](first), k=5, alpha=0.4)
    train(optimizer, first, 0, at)
    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    resumed = fastopt.Lookahead(INNER[inner](second), k=2, alpha=0.9)
    resumed.load_state_dict(_saved(optimizer))
    assert resumed.param_groups[0]["lookahead_step"] == at
    train(resumed, second, at, 17)
    assert same(whole, second)


@pytest.mark.contract("lookahead", "state", optimizers="Lookahead")
@each_inner
def test_state_dict_is_flat(inner: str) -> None:
    ps = params()
    optimizer = fastopt.Lookahead(INNER[inner](ps))
    train(optimizer, ps, 0, 2)
    state_dict = optimizer.state_dict()
    assert set(state_dict) == {"state", "param_groups"}
    assert list(state_dict["state"]) == [0, 1]
    assert all(torch.equal(state_dict["state"][i]["slow_param"], p) for i, p in enumerate(params()))
    group = state_dict["param_groups"][0]
    assert (group["lookahead_k"], group["lookahead_alpha"], group["lookahead_step"]) == (5, 0.5, 2)


@pytest.mark.contract("lookahead", "state", optimizers="Lookahead")
@each_inner
def test_checkpoint_of_the_inner_optimizer_alone_loads(inner: str) -> None:
    """Slow weights then start as the parameters are, and the counter at zero."""
    bare = params()
    alone = INNER[inner](bare)
    train(alone, bare, 0, 4)
    ps = [torch.nn.Parameter(p.detach().clone()) for p in bare]
    optimizer = fastopt.Lookahead(INNER[inner](ps), k=3, alpha=0.0)
    optimizer.load_state_dict(copy.deepcopy(alone.state_dict()))
    group = optimizer.param_groups[0]
    assert (group["lookahead_k"], group["lookahead_alpha"], group["lookahead_step"]) == (3, 0.0, 0)
    train(optimizer, ps, 4, 7)
    assert same(ps, bare)
    train(optimizer, ps, 7, 8)
    train(alone, bare, 7, 8)
    if inner.startswith("torch-") or "adam" in inner:
        assert not same(ps, params())


@pytest.mark.contract("lookahead", "state", optimizers="Lookahead")
@each_inner
def test_lr_edited_after_loading_takes_effect(inner: str) -> None:
    ps = params()
    optimizer = fastopt.Lookahead(INNER[inner](ps), k=50)
    train(optimizer, ps, 0, 3)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups is optimizer.optimizer.param_groups
    assert optimizer.state is optimizer.optimizer.state
    optimizer.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in ps]
    train(optimizer, ps, 3, 4)
    if inner not in ("torch-rprop", "torch-asgd"):  # these keep a step size of their own
        assert same(ps, before)


@pytest.mark.contract("lookahead", "state", optimizers="Lookahead", difference="shapes of loaded states")
@each_inner
def test_wrong_shape_of_slow_weights_is_refused(inner: str) -> None:
    ps = params()
    optimizer = fastopt.Lookahead(INNER[inner](ps))
    train(optimizer, ps, 0, 2)
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["state"][1]["slow_param"] = torch.zeros(4, 3)
    state_dict["param_groups"][0]["lr"] = 9.0
    with pytest.raises(ValueError, match="slow_param"):
        optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["lr"] != 9.0


@pytest.mark.contract("lookahead", "wrappers", optimizers="Lookahead")
@each_inner
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(inner: str, how: str) -> None:
    """In mid-run, both go on alike and apart; nothing else in the process is disturbed."""
    ps = params()
    optimizer = fastopt.Lookahead(INNER[inner](ps), k=4, alpha=0.4)
    train(optimizer, ps, 0, 6)
    pair = (ps, optimizer)
    twin_ps, twin = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    before = [p.detach().clone() for p in ps]
    train(twin, list(twin_ps), 6, 13)
    assert same(ps, before)
    train(optimizer, ps, 6, 13)
    assert same(ps, list(twin_ps))
    fresh = params()
    train(fastopt.Lookahead(INNER[inner](fresh), k=4, alpha=0.4), fresh, 0, 13)
    assert same(ps, fresh)


class Counting(torch.optim.Adam):
    """Keeps more in its checkpoint than states and groups."""

    def __init__(self, ps: Any) -> None:
        super().__init__(ps, lr=0.1)
        self.calls = 0

    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"calls": self.calls}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rest = dict(state_dict)
        self.calls = rest.pop("calls")
        super().load_state_dict(rest)


@pytest.mark.contract("lookahead", "state", optimizers="Lookahead")
def test_a_checkpoint_has_what_the_inner_optimizer_adds_to_it() -> None:
    optimizer, resumed = fastopt.Lookahead(Counting(params())), fastopt.Lookahead(Counting(params()))
    train(optimizer, optimizer.param_groups[0]["params"], 0, 3)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.optimizer.calls == 3
    assert resumed.param_groups[0]["lookahead_step"] == 3


@pytest.mark.contract("lookahead", "hooks", optimizers="Lookahead")
@each_inner
def test_hooks_of_the_inner_optimizer_see_its_checkpoints(inner: str) -> None:
    calls: list[str] = []
    optimizer = fastopt.Lookahead(INNER[inner](params()))
    watch_checkpoints(optimizer.optimizer, calls)
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["save pre", "save post", "load pre", "load post"]


@pytest.mark.contract("lookahead", "hooks", optimizers="Lookahead")
@each_inner
def test_hook_that_edits_the_dict(inner: str) -> None:
    """Post-save and pre-load hooks may return another dict."""
    ps = params()
    optimizer = fastopt.Lookahead(INNER[inner](ps))
    train(optimizer, ps, 0, 1)
    optimizer.register_state_dict_post_hook(lambda o, d: {**d, "note": 1})
    assert optimizer.state_dict()["note"] == 1

    def half(o: Any, d: dict[str, Any]) -> dict[str, Any]:
        return {**d, "param_groups": [{**g, "lr": 0.5} for g in d["param_groups"]]}

    optimizer.register_load_state_dict_pre_hook(half)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.contract("lookahead", "state", "distributed", optimizers="Lookahead")
@each_inner
def test_distributed_checkpoint_functions(inner: str) -> None:
    """get/set_optimizer_state_dict, into a model that has never stepped: nothing lost, nothing advanced."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))

    def steps(module: torch.nn.Module, optimizer: Any, start: int, stop: int) -> None:
        train(optimizer, list(module.parameters()), start, stop)

    optimizer = fastopt.Lookahead(INNER[inner](model.parameters()), k=4, alpha=0.4)
    steps(model, optimizer, 0, 6)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    twin = copy.deepcopy(model)
    other = fastopt.Lookahead(INNER[inner](twin.parameters()), k=4, alpha=0.4)
    before = [p.detach().clone() for p in twin.parameters()]
    set_optimizer_state_dict(twin, other, saved)
    assert same(list(twin.parameters()), before)
    assert other.param_groups[0]["lookahead_step"] == 6
    steps(model, optimizer, 6, 13)
    steps(twin, other, 6, 13)
    assert same(list(model.parameters()), list(twin.parameters()))
