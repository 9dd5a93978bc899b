"""zero_grad(): the extension lets go of the gradients of plain tensors; everything else is torch's."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import difference
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fastopt
from fastopt.backends import native

pytestmark = pytest.mark.contract("hooks")


class Watched(nn.Parameter):
    """Whose gradient is somewhere else, as of a parameter that is offloaded."""

    elsewhere: Tensor | None = None

    @property
    def grad(self) -> Tensor | None:
        return self.elsewhere

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self.elsewhere = value


class Subclass(nn.Parameter):
    pass


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "parameter": nn.Parameter,
    "tensor": lambda t: t.requires_grad_(),
    "subclass": Subclass,
    "watched": Watched,
}


@pytest.fixture(params=["native", "without the extension"])
def optimizer_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    if request.param != "native":
        monkeypatch.setattr(native, "drop_gradients", lambda groups: None)
    elif not fastopt.backends.available("native"):
        pytest.skip(fastopt.backends.why_not("native"))
    return lambda params: fastopt.SGD(params, lr=0.1)


def give(params: list[Any]) -> None:
    for p in params:
        p.grad = torch.ones(p.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_gone(kind: str, optimizer_of: Callable[..., Any]) -> None:
    params: list[Any] = [KINDS[kind](torch.zeros(2)) for _ in range(20)]
    optimizer = optimizer_of([{"params": params[:7]}, {"params": params[7:]}])
    optimizer.zero_grad()
    give(params[::2])
    last = [weakref.ref(p.grad) for p in params[::2]]
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)
    assert not any(gone() for gone in last)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_filled_with_zeros_where_that_is_asked_for(kind: str, optimizer_of: Callable[..., Any]) -> None:
    params: list[Any] = [KINDS[kind](torch.zeros(2)) for _ in range(3)]
    optimizer = optimizer_of(params)
    give(params)
    grads = [p.grad for p in params]
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is grad and not grad.any() for p, grad in zip(params, grads, strict=True))


def test_a_gradient_that_somebody_holds_stays_what_it_is(optimizer_of: Callable[..., Any]) -> None:
    params = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    give(params)
    held = params[1].grad
    optimizer_of(params).zero_grad()
    assert params[1].grad is None
    assert held is not None
    assert not difference(held, torch.ones(2))


@pytest.mark.filterwarnings("ignore:Using backward")
def test_sparse_gradients_and_those_of_a_graph(optimizer_of: Callable[..., Any]) -> None:
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    p = nn.Parameter(torch.ones(2))
    (p**3).sum().backward(create_graph=True)
    optimizer_of([table.weight, p]).zero_grad()
    assert table.weight.grad is None
    assert p.grad is None


@pytest.mark.parametrize("change", ["clear", "append", "replace"])
def test_code_that_runs_when_a_gradient_goes_may_change_the_groups(
    change: str, optimizer_of: Callable[..., Any]
) -> None:
    params = [nn.Parameter(torch.zeros(2)) for _ in range(30)]
    optimizer = optimizer_of(params)
    (group,) = optimizer.param_groups
    late = nn.Parameter(torch.zeros(2))
    give([*params, late])
    changes = {
        "clear": group["params"].clear,
        "append": lambda: group["params"].append(late),
        "replace": lambda: group.update(params=[late]),
    }
    for i in (0, 3, 29):
        weakref.finalize(params[i].grad, changes[change])
    optimizer.zero_grad()
    assert params[0].grad is None
    assert (params[1].grad is None) == (change != "clear")
    assert (late.grad is None) == (change == "append")


def test_an_error_is_torchs(optimizer_of: Callable[..., Any]) -> None:
    optimizer = optimizer_of([nn.Parameter(torch.zeros(2))])
    optimizer.param_groups[0].pop("params")
    with pytest.raises(KeyError, match="params"):
        optimizer.zero_grad()


def test_groups_may_hold_tuples(optimizer_of: Callable[..., Any]) -> None:
    params = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    optimizer = optimizer_of(params)
    optimizer.param_groups[0]["params"] = tuple(params)
    give(params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


def test_it_is_recorded(optimizer_of: Callable[..., Any]) -> None:
    params = [nn.Parameter(torch.zeros(2))]
    optimizer = optimizer_of(params)
    with torch.profiler.profile() as profile:
        optimizer.zero_grad()
    assert any(event.key == "Optimizer.zero_grad#SGD.zero_grad" for event in profile.key_averages())


def test_modes_see_it(optimizer_of: Callable[..., Any]) -> None:
    class Seeing(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[Any] = []
    params = [nn.Parameter(torch.zeros(2))]
    give(params)
    with Seeing():
        optimizer_of(params).zero_grad()
    assert Tensor.grad.__set__ in seen
    assert params[0].grad is None


def test_around_slow_weights(optimizer_of: Callable[..., Any]) -> None:
    params = [nn.Parameter(torch.zeros(2))]
    optimizer = fastopt.Lookahead(optimizer_of(params))
    give(params)
    optimizer.zero_grad()
    assert params[0].grad is None


def test_in_a_compiled_function(optimizer_of: Callable[..., Any]) -> None:
    params = [nn.Parameter(torch.ones(2))]
    optimizer = optimizer_of(params)

    @torch.compile(backend="eager")
    def train() -> Tensor:
        optimizer.zero_grad()
        loss = (params[0] ** 2).sum()
        loss.backward()
        optimizer.step()
        return loss

    losses = [train().item() for _ in range(3)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[2]
