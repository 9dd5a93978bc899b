"""The first look (csrc/survey.h): what it lets pass is what the closer look in Python finds nothing against."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import CASES
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fastopt
from fastopt import routing
from fastopt.backends import native
from fastopt.explain import _engine
from fastopt.plan import check_state, mended_counters, missing_state
from fastopt.routing import DTYPES
from fastopt.setting import Setting

pytestmark = pytest.mark.skipif(not fastopt.backends.available("native"), reason=fastopt.backends.why_not("native"))


class Subclass(nn.Parameter):
    pass


class WithGrad(nn.Parameter):
    @property
    def grad(self) -> Any:
        return None

    @grad.setter
    def grad(self, value: Any) -> None:
        pass


def released(p: Tensor) -> Tensor:
    p.untyped_storage().resize_(0)
    return p


def with_gradient(gradient: Callable[[], Tensor], p: Tensor | None = None) -> Callable[[], Tensor]:
    def make() -> Tensor:
        made = nn.Parameter(torch.ones(2, 3)) if p is None else p
        made.grad = gradient()
        return made

    return make


def inferred() -> Tensor:
    with torch.inference_mode():
        return torch.ones(3)


def replaced_gradient(gradient: Tensor) -> Tensor:
    """By one that assignment would refuse."""
    p = nn.Parameter(torch.ones(2, 3))
    p.grad = torch.ones(2, 3)
    p.grad.data = gradient
    return p


ORDINARY: dict[str, Callable[[], Tensor]] = {
    "a parameter": lambda: nn.Parameter(torch.ones(3)),
    "a tensor": lambda: torch.ones(2, 3, requires_grad=True),
    "a number": lambda: nn.Parameter(torch.ones(())),
    "transposed": lambda: nn.Parameter(torch.ones(2, 3).t()),
    "channels last": lambda: nn.Parameter(torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)),
    "part of a buffer": lambda: nn.Parameter(torch.ones(10)[3:7]),
    "with a gradient": with_gradient(lambda: torch.ones(2, 3)),
    "with a transposed gradient": with_gradient(lambda: torch.ones(3, 2).t()),
    "with a gradient of one number": with_gradient(lambda: torch.ones(()).expand(2, 3)),
    **{str(dtype): lambda dtype=dtype: nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in DTYPES},  # type: ignore[misc]
}
STRANGE: dict[str, Callable[[], Any]] = {
    "lazy": lambda: nn.UninitializedParameter(),
    "a subclass": lambda: Subclass(torch.ones(3)),
    "a grad of its own": lambda: WithGrad(torch.ones(3)),
    "sparse": lambda: torch.eye(3).to_sparse().requires_grad_(),
    "complex": lambda: nn.Parameter(torch.ones(3, dtype=torch.complex64)),
    "whole": lambda: torch.ones(3, dtype=torch.int32),
    "8 bits": lambda: nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn)),
    "on meta": lambda: nn.Parameter(torch.ones(3, device="meta")),
    "in inference mode": inferred,
    "negated": lambda: torch.ones(3, dtype=torch.complex64).conj().imag,
    "released": lambda: released(nn.Parameter(torch.ones(3))),
    "empty": lambda: nn.Parameter(torch.ones(0, 3)),
    "one number for all": lambda: nn.Parameter(torch.ones(1).expand(3)),
    "every second": lambda: nn.Parameter(torch.ones(6)[::2]),
    "overlapping": lambda: nn.Parameter(torch.ones(5).as_strided((3, 2), (1, 1))),
    "65 dimensions": lambda: nn.Parameter(torch.ones((1,) * 64).unsqueeze(0)),
    "a sparse gradient": with_gradient(lambda: torch.ones(2, 3).to_sparse()),
    "a gradient of another dtype": lambda: replaced_gradient(torch.ones(2, 3, dtype=torch.int8)),
    "a gradient of another shape": lambda: replaced_gradient(torch.ones(3)),
    "a released gradient": with_gradient(lambda: released(torch.ones(2, 3))),
    "a negated gradient": with_gradient(lambda: torch.ones(2, 3, dtype=torch.complex64).conj().imag),
    "an empty gradient": with_gradient(lambda: torch.ones(0, 3), nn.Parameter(torch.ones(0, 3))),
}


def objections(params: list[Any]) -> list[bool]:
    """Of the closer look, with what the engine asks beside `routing` (`Engine._route`)."""
    sharing = routing.sharing(params)

    def against(p: Any) -> bool:
        if id(p) in sharing or routing.why_not_tensor(p) or type(p).grad is not Tensor.grad:
            return True
        routing.check_grad_kind(p)
        return p.grad is not None and bool(routing.why_not_grad(p.grad, p.device) or p.grad.shape != p.shape)

    return list(map(against, params))


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_parameters(name: str) -> None:
    p = ORDINARY[name]()
    assert not any(objections([p]))
    assert native.find_ordinary([p]) == (b"\1", True)


def test_parameters_that_a_device_takes_otherwise_are_of_another_kind() -> None:
    few, many, more = (torch.ones((1,) * dims) for dims in (routing.MOST_DIMS, routing.MOST_DIMS + 1, 20))
    assert native.find_ordinary([few, many, few, more]) == (b"\1\2\1\2", False)
    assert native.find_ordinary([many, few]) == (b"\1\2", True)


@pytest.mark.parametrize("name", STRANGE)
def test_strange_parameters_are_looked_at_again(name: str) -> None:
    p = STRANGE[name]()
    assert native.find_ordinary([p]) == (b"\0", False)
    beside = nn.Parameter(torch.ones(3))
    assert native.find_ordinary([beside, p, beside])[0] == b"\1\0\1"


def test_functional_tensors_and_those_of_vmap_are_strange() -> None:
    found = []
    p = torch.ones(3)

    def look(x: Tensor) -> Tensor:
        found.append(native.find_ordinary([x])[0])
        return x.sum()

    torch.func.vmap(look)(p.unsqueeze(0))
    torch.func.grad(look)(p)
    torch.func.functionalize(look)(p)
    assert found == [b"\0"] * 3


BUFFER = torch.ones(64)


@st.composite
def views(draw: Any) -> Tensor:
    dims = draw(st.integers(0, 3))
    shape = [draw(st.integers(0, 4)) for _ in range(dims)]
    strides = [draw(st.sampled_from((0, 1, 2, 3, 4, 8))) for _ in range(dims)]
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if n)
    return BUFFER.as_strided(shape, strides, draw(st.integers(0, 63 - last)))


@given(st.lists(views(), min_size=1, max_size=4), st.data())
def test_what_passes_has_nothing_against_it(tensors: list[Tensor], data: Any) -> None:
    params = [t.detach().requires_grad_() for t in tensors]
    for p in params:
        kind = data.draw(st.sampled_from(("none", "own", "alike", "double")))
        if kind != "none":
            p.grad = torch.ones_like(p) if kind == "alike" else torch.ones(p.shape)
        if kind == "double":
            p.grad.data = torch.ones(p.shape, dtype=torch.float64)
    ordinary, apart = native.find_ordinary(params)
    found = objections(params)
    if apart:
        assert not any(found)
    sharing = routing.sharing(params)
    for p, sure, against in zip(params, ordinary, found, strict=True):
        assert not (sure and against) or id(p) in sharing


def test_parameters_that_touch_are_apart_and_those_that_overlap_are_not() -> None:
    buffer = torch.ones(10)
    low, high, middle = buffer[:5].detach(), buffer[5:].detach(), buffer[4:6].detach()
    assert native.find_ordinary([high, low]) == (b"\1\1", True)
    assert native.find_ordinary([high, middle, low]) == (b"\1\1\1", False)
    assert native.find_ordinary([low, low]) == (b"\1\1", False)


def after_a_step(case: Any, dtype: torch.dtype) -> tuple[Setting, Tensor, dict[str, Any]]:
    """A setting of a rule, a parameter, and the state that it has after a step."""
    p = nn.Parameter(torch.ones(3, 4, dtype=dtype))
    optimizer = case.make([p], "native")
    p.grad = torch.ones_like(p)
    optimizer.step()
    engine, owner, _ = _engine(optimizer)
    return engine.settings.of(owner.param_groups[0]), p, dict(owner.state[p])


def spoiled(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """States with one thing changed in each, not all of which is wrong."""
    changes: tuple[Callable[[Tensor], Any], ...] = (
        lambda t: None,
        lambda t: float(t.flatten()[0]),
        lambda t: t.double(),
        lambda t: t.to(torch.int32),
        lambda t: t.to(torch.complex64),
        lambda t: t.flatten()[:1],
        lambda t: t.to("meta"),
        lambda t: t.flatten()[:1].expand(3, 4),
        lambda t: t.to_sparse() if t.dim() else t,
        lambda t: nn.Parameter(t, requires_grad=False),
        lambda t: t.as_subclass(Subclass),
    )
    for key, change in itertools.product(state, changes):
        yield {**state, key: change(state[key])}
        yield {name: value for name, value in state.items() if name != key}


def lacks_nothing(setting: Setting, p: Tensor, state: dict[str, Any]) -> bool:
    """Of the closer look, as the engine asks (`Engine._create_state`)."""
    with contextlib.suppress(TypeError, ValueError, RuntimeError):
        check_state(setting, p, state, "it")
        return not missing_state(setting, p, state) and not mended_counters(setting, p, state)
    return False


PLANNED = [case for case in CASES if case.id != "lookahead-ranger"]
"""All that a plan serves: what is around slow weights of its own is torch code."""


@pytest.mark.parametrize("case", PLANNED, ids=lambda case: case.id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_that_pass_lack_nothing(case: Any, dtype: torch.dtype) -> None:
    setting, p, state = after_a_step(case, dtype)
    assert native.find_complete([(setting, [p])], {p: state}) == b"\1"
    for other in spoiled(state):
        if native.find_complete([(setting, [p])], {p: other}) == b"\1":
            assert lacks_nothing(setting, p, other), other
    assert (native.find_complete([(setting, [p])], {}) == b"\1") == lacks_nothing(setting, p, {})


@pytest.mark.parametrize("kernels", ["native", "emulated"])
def test_the_closer_look_is_for_one_of_many_alike(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a step which finds all parameters elsewhere does not take a Python's time for each."""
    if reason := fastopt.backends.why_not(kernels):
        pytest.skip(reason)
    params = [nn.Parameter(torch.ones(3)) for _ in range(50)]
    optimizer = fastopt.AdamW(params, backend=kernels)
    looked: list[Any] = []
    for name in ("why_not_tensor", "why_not_grad", "sharing", "within"):
        usual = getattr(routing, name)
        monkeypatch.setattr(routing, name, lambda *args, usual=usual: looked.append(args) or usual(*args))
    monkeypatch.setattr("fastopt.engine.check_state", lambda *args: looked.append(args))
    counts = []
    for _ in range(3):
        for p in params:
            p.data = p.data.clone()
            p.grad = torch.ones(3)
        looked.clear()
        optimizer.step()
        counts.append(len(looked))
    assert counts[0] <= 50 + 10
    assert max(counts[1:]) <= 10


@pytest.mark.parametrize("strange", ["a subclass", "every second", "empty"])
def test_routes_are_those_of_the_closer_look(strange: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def routes() -> list[Any]:
        params = [ORDINARY[name]() for name in ORDINARY] + [STRANGE[strange](), nn.Parameter(torch.ones((1,) * 9))]
        params += [params[0]]
        with pytest.warns(UserWarning, match="duplicate"):
            optimizer = fastopt.SGD([{"params": params}, {"params": [torch.ones(3)], "differentiable": True}], lr=0.1)
        engine = _engine(optimizer)[0]
        members = [group["params"] for group in optimizer.param_groups]
        found = engine.routes(optimizer, members, list(map(engine.settings.of, optimizer.param_groups)))
        return [found[id(p)] for own in members for p in own]

    quick = routes()
    monkeypatch.setattr(native, "find_ordinary", lambda params: (bytes(len(params)), False))
    assert quick == routes()
