"""convert: a live optimizer changes hands without losing a bit. explain and info: true figures, and reasons."""

from __future__ import annotations

import copy
import os
import pathlib
import subprocess
import sys
import types
import warnings
from contextlib import nullcontext
from typing import Any

import oracles
import pytest
import torch
from cases import TORCH_CASES, TORCH_NAMES, Case, backends, by_id, parametrize
from harness import Built, Scenario, Spec, assert_same, ramp, snapshot, states_in_order

import fastopt
from fastopt.backends import native

native_only = pytest.mark.parametrize("backend", backends(["native"]))
SCENARIO = Scenario("convert", (Spec((33,)), Spec((4, 5)), Spec((9,), absent=frozenset({0, 1, 6}))), steps=12)


def params(*sizes: int, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(ramp(n).to(dtype)) for n in sizes]


def give_gradients(ps: list[Any], step: int = 0) -> None:
    for i, p in enumerate(ps):
        p.grad = torch.cos(torch.arange(p.numel()) + step + i).reshape(p.shape).to(p.dtype)


@pytest.mark.contract("import")
@parametrize(TORCH_CASES, ("fp32",))
def test_live_state_continues_bit_for_bit(case: Case, dtype: torch.dtype, backend: str) -> None:
    """torch.optim for five steps, then ours on the same parameters: the oracle never stopped."""
    ours, theirs = Built(SCENARIO, case, dtype), Built(SCENARIO, case, dtype, contiguous=True)
    before, oracle = case.oracle(ours.groups), case.oracle(theirs.groups)
    for step in range(5):
        for built, o in ((ours, before), (theirs, oracle)):
            built.set_grads(step)
            o.step()
    groups = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in before.param_groups])
    optimizer = fastopt.convert(before.inner, backend=backend)
    assert type(optimizer) is getattr(fastopt, case.name)
    assert [{k: v for k, v in g.items() if k != "params"} for g in before.param_groups] == groups
    assert optimizer.state_dict()["param_groups"] == before.inner.state_dict()["param_groups"]
    for step in range(5, 12):
        for built, o in ((ours, optimizer), (theirs, oracle)):
            built.set_grads(step)
            o.step()
        got = snapshot(ours.order, states_in_order(optimizer, len(ours.order)))
        want = snapshot(theirs.order, [oracles.states_of(oracle, p) for p in theirs.order])
        assert_same([got], [want], signed_zeros=not case.interpolates_fully)


@pytest.mark.contract("import")
@pytest.mark.parametrize("name", TORCH_NAMES)
def test_hyper_parameters_groups_and_names_come_along(name: str) -> None:
    model = torch.nn.Linear(3, 2)
    named = list(model.named_parameters())
    source = getattr(torch.optim, name)(
        [{"params": named[:1], "lr": 0.5}, {"params": named[1:], "weight_decay": 0.25, "mine": "kept"}], lr=0.125
    )
    torch.optim.lr_scheduler.LambdaLR(source, lambda epoch: 1.0)
    optimizer = fastopt.convert(source)
    assert optimizer.defaults == source.defaults
    for ours, theirs in zip(optimizer.param_groups, source.param_groups, strict=True):
        assert {k: v for k, v in ours.items() if k != "params"} == {k: v for k, v in theirs.items() if k != "params"}
        assert all(p is q for p, q in zip(ours["params"], theirs["params"], strict=True))
    assert optimizer.param_groups[1]["mine"] == "kept"
    assert optimizer.param_groups[0]["initial_lr"] == 0.5


@pytest.mark.contract("import")
def test_overrides_apply_to_every_group() -> None:
    a, b = params(3, 4)
    source = torch.optim.Adam([{"params": [a], "lr": 0.5}, {"params": [b], "lr": 0.25}], betas=(0.8, 0.9))
    optimizer = fastopt.convert(source, lr=0.1)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.1]
    assert [g["betas"] for g in optimizer.param_groups] == [(0.8, 0.9)] * 2
    assert [g["lr"] for g in source.param_groups] == [0.5, 0.25]


def _decaying(ps: list[Any]) -> list[dict[str, Any]]:
    return [{"params": ps[:1], "weight_decay": 0.0}, {"params": ps[1:], "weight_decay": 0.05}]


def _decay_warning(expected: bool) -> Any:
    return pytest.warns(UserWarning, match="weight_decay=0.05 of group 1 was") if expected else nullcontext()


@pytest.mark.contract("import")
@parametrize(by_id("sgd-momentum", "adamw", "radam", "ranger"), ("fp32",))
def test_handing_over_to_another_rule(case: Case, dtype: torch.dtype, backend: str) -> None:
    """The classic recipe, train with Adam and finish with SGD: from there on it is that rule, started afresh."""
    ours, theirs = params(9, 5), params(9, 5)
    source, twin = (fastopt.Adam(_decaying(ps), lr=0.01) for ps in (ours, theirs))
    for step in range(6):
        for ps, o in ((ours, source), (theirs, twin)):
            give_gradients(ps, step)
            o.step()
    with _decay_warning(case.name in ("AdamW", "Ranger")):
        optimizer = fastopt.convert(source, getattr(fastopt, case.name), **case.kwargs, backend=backend)
    assert type(optimizer) is getattr(fastopt, case.name)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.05]
    assert all(g["lr"] == case.kwargs["lr"] for g in optimizer.param_groups)
    fresh = case.make(_decaying(theirs), backend)
    for step in range(6, 14):
        for ps, o in ((ours, optimizer), (theirs, fresh)):
            give_gradients(ps, step)
            o.step()
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    assert source.state[ours[0]]["step"] == 6, "the old optimizer's state is its own"


@pytest.mark.contract("import")
@pytest.mark.parametrize("to", ["Adam", "NAdam", "RAdam"])
@pytest.mark.parametrize("decoupled", [False, True])
def test_decay_stays_what_it_is(to: str, decoupled: bool, recwarn: pytest.WarningsRecorder) -> None:
    ps = params(9)
    for module in (torch.optim, fastopt):
        source = (module.AdamW if decoupled else module.Adamax)(ps, weight_decay=0.5)
        group = fastopt.convert(source, getattr(fastopt, to), lr=0.1).param_groups[0]
        assert (group["weight_decay"], group["decoupled_weight_decay"]) == (0.5, decoupled)
        chosen = fastopt.convert(source, getattr(fastopt, to), decoupled_weight_decay=not decoupled, weight_decay=0.1)
        assert chosen.param_groups[0]["decoupled_weight_decay"] is not decoupled
    assert not recwarn.list


@pytest.mark.contract("import")
@pytest.mark.parametrize(
    ("of", "to", "warns"),
    [("AdamW", "SGD", True), ("SGD", "AdamW", True), ("Ranger", "AdamW", False), ("AdamW", "Ranger", False)],
)
def test_decay_that_cannot_stay_what_it_is_warns(of: str, to: str, warns: bool) -> None:
    source = getattr(fastopt, of)(_decaying(params(3, 4)), lr=0.1)
    with _decay_warning(warns):
        fastopt.convert(source, getattr(fastopt, to), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastopt.convert(source, getattr(fastopt, to), lr=0.1, weight_decay=0.0)


@pytest.mark.contract("import")
def test_keys_of_the_user_follow_to_another_rule_and_those_of_schedulers_do_not() -> None:
    source = torch.optim.SGD([{"params": params(3), "lr_scale": 0.5, "name": "body"}], lr=0.1, momentum=0.9)
    torch.optim.lr_scheduler.OneCycleLR(source, 1.0, total_steps=10)
    (group,) = fastopt.convert(fastopt.Lookahead(fastopt.convert(source)), fastopt.Adam, lr=0.2).param_groups
    fresh = fastopt.Adam(params(3), lr=0.2).param_groups[0]
    assert group.keys() - fresh.keys() == {"lr_scale", "name"}
    assert {k: v for k, v in group.items() if k in fresh and k != "params"} == {
        k: v for k, v in fresh.items() if k != "params"
    }


@pytest.mark.contract("import")
def test_converting_ours_is_free_and_lookahead_follows() -> None:
    ps = params(5)
    optimizer = fastopt.RAdam(ps)
    assert fastopt.convert(optimizer) is optimizer
    lookahead = fastopt.Lookahead(optimizer)
    assert fastopt.convert(lookahead) is lookahead
    give_gradients(ps)
    wrapped = fastopt.Lookahead(fastopt.convert(torch.optim.Adam(ps)), k=1, alpha=0.0)
    wrapped.step()
    assert torch.equal(ps[0].detach(), ramp(5))


@pytest.mark.contract("import")
def test_the_fused_flag_keeps_its_meaning() -> None:
    optimizer = fastopt.convert(torch.optim.Adam(params(3), fused=True))
    assert optimizer.param_groups[0]["fused"] is True
    assert optimizer._step_supports_amp_scaling


@pytest.mark.contract("import")
def test_a_subclass_of_a_torch_class_converts() -> None:
    class Mine(torch.optim.AdamW):
        pass

    assert type(fastopt.convert(Mine(params(3)))) is fastopt.AdamW


@pytest.mark.contract("import")
def test_a_subclass_with_a_step_of_its_own_is_not_replaced_unasked() -> None:
    class Clipping(torch.optim.Adam):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    (p,) = ps = params(3)
    source = Clipping(ps)
    give_gradients(ps)
    source.step()
    with pytest.raises(TypeError, match=r"Clipping has a step\(\) of its own.*convert\(optimizer, fastopt.Adam\)"):
        fastopt.convert(source)
    optimizer = fastopt.convert(source, fastopt.Adam)
    assert optimizer.state[p]["exp_avg"] is source.state[p]["exp_avg"], "asked for, it goes on from where it was"


@pytest.mark.contract("import")
def test_what_cannot_be_converted_is_refused_with_the_choices() -> None:
    with pytest.raises(TypeError, match=r"LBFGS.*Adam"):
        fastopt.convert(torch.optim.LBFGS(params(3)))
    with pytest.raises(TypeError, match="momentum"):
        fastopt.convert(torch.optim.Adam(params(3)), momentum=0.9)
    with pytest.raises(TypeError, match="betas"):
        fastopt.convert(torch.optim.Adam(params(3)), fastopt.SGD, lr=0.1, betas=(0.9, 0.99))
    source = torch.optim.LBFGS(params(3))
    assert type(fastopt.convert(source, fastopt.Adam, lr=0.1)) is fastopt.Adam


@pytest.mark.contract("import")
def test_bad_override_leaves_the_old_optimizer_alone() -> None:
    source = torch.optim.Adam(params(3))
    before = copy.deepcopy(source.state_dict())
    with pytest.raises(ValueError, match="Invalid learning rate"):
        fastopt.convert(source, lr=-1.0)
    assert source.state_dict() == before


# (optimizer of the parameters, states per parameter of its size, numbers beside them, tensors moved per step)
COUNTS: dict[str, tuple[Any, int, int, float]] = {
    "sgd": (lambda ps: fastopt.SGD(ps), 0, 0, 3),
    "sgd-momentum": (lambda ps: fastopt.SGD(ps, momentum=0.9), 1, 0, 5),
    "adagrad": (lambda ps: fastopt.Adagrad(ps), 1, 1, 5),
    "rmsprop": (lambda ps: fastopt.RMSprop(ps), 1, 1, 5),
    "rmsprop-centered-momentum": (lambda ps: fastopt.RMSprop(ps, centered=True, momentum=0.9), 3, 1, 9),
    "adam": (lambda ps: fastopt.Adam(ps), 2, 1, 7),
    "amsgrad": (lambda ps: fastopt.Adam(ps, amsgrad=True), 3, 1, 9),
    "nadam": (lambda ps: fastopt.NAdam(ps), 2, 2, 7),
    "ranger": (lambda ps: fastopt.Ranger(ps, k=4), 3, 1, 7.5),
    "lookahead-adam": (lambda ps: fastopt.Lookahead(fastopt.Adam(ps), k=5), 3, 1, 7.4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("what", COUNTS)
@native_only
def test_explain_counts_bytes_and_launches(what: str, dtype: torch.dtype, backend: str) -> None:
    """Against hand counts; the same before the first step, when no state exists, as after it."""
    make, states, numbers, moved = COUNTS[what]
    ps, size = params(1000, 24, 0, dtype=dtype), torch.finfo(dtype).bits // 8
    optimizer = make(ps)
    for _ in range(2):
        explanation = fastopt.explain(optimizer)
        (group,) = explanation.groups
        (row,) = explanation.backends
        assert (group.tensors, group.parameters, group.parameter_bytes) == (3, 1024, 1024 * size)
        assert group.state_bytes == 1024 * size * states + 4 * numbers * 3
        assert (row.backend, row.tensors, row.bytes_per_step) == (
            "native",
            3,
            pytest.approx(1024 * size * moved, abs=2),
        )
        assert row.launches.startswith("1")
        assert not explanation.fallbacks
        give_gradients(ps)
        optimizer.step()
    held = [v for s in optimizer.state.values() for v in s.values()]
    assert sum(v.numel() * v.element_size() for v in held) == explanation.groups[0].state_bytes


@native_only
def test_explain_counts_state_as_it_is_stored(backend: str) -> None:
    """float32 states of a bfloat16 parameter, by hand: 2 bytes an element for p, g and the slow weights."""
    ps = params(1000, dtype=torch.bfloat16)
    optimizer = fastopt.Ranger(ps, k=4)
    give_gradients(ps)
    optimizer.step()
    for key in ("exp_avg", "exp_avg_sq"):
        optimizer.state[ps[0]][key] = optimizer.state[ps[0]][key].float()
    explanation = fastopt.explain(optimizer)
    assert explanation.groups[0].state_bytes == 1000 * (4 + 4 + 2) + 4
    assert explanation.backends[0].bytes_per_step == 1000 * (2 + 2 * (2 + 4 + 4) + 2 * 2 / 4)


def test_explain_says_what_a_lookahead_in_torch_code_lacks() -> None:
    for inner in (torch.optim.Adam(params(3)), fastopt.Ranger(params(3))):
        with pytest.raises(TypeError, match=f"torch code around {type(inner).__name__}"):
            fastopt.explain(fastopt.Lookahead(inner))


def test_explain_changes_nothing() -> None:
    for make, *_ in COUNTS.values():
        ps = params(5, 7)
        optimizer = make(ps)
        give_gradients(ps)
        before = list(optimizer.state), copy.deepcopy(optimizer.state_dict()["param_groups"])
        str(fastopt.explain(optimizer))
        assert (list(optimizer.state), optimizer.state_dict()["param_groups"]) == before
        assert all(torch.equal(p.detach(), q.detach()) for p, q in zip(ps, params(5, 7), strict=True))


@native_only
def test_explain_tells_groups_fallbacks_and_reasons(backend: str) -> None:
    ps = [*params(5, 6), torch.nn.Parameter(torch.complex(ramp(4), ramp(4))), *params(8)]
    optimizer = fastopt.SGD([{"params": ps[:3], "lr": 0.125}, {"params": ps[3:], "lr": 0.5, "momentum": 0.75}], lr=1.0)
    give_gradients([ps[0]])
    ps[1].grad = torch.ones(6).to_sparse()
    explanation = fastopt.explain(optimizer)
    text = str(explanation)
    assert {(f.group, f.positions) for f in explanation.fallbacks} == {(0, (1,)), (0, (2,))}
    assert all(f.backend == "torch" for f in explanation.fallbacks)
    for word in ("0.125", "0.75", "native", "torch", "sparse", "complex64"):
        assert word in text
    assert sum(row.tensors for row in explanation.backends) == 4
    assert {row.backend for row in explanation.backends} == {"native", "torch"}
    ps[1].grad = None
    assert [f.positions for f in fastopt.explain(optimizer).fallbacks] == [(2,)]


def test_explain_agrees_with_what_a_forced_backend_does() -> None:
    optimizer = fastopt.Adam(params(5), backend="reference")
    (row,) = fastopt.explain(optimizer).backends
    assert row.backend == "reference"


def test_explain_shows_whatever_a_group_holds() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = fastopt.Adam([{"params": [p], "mask": torch.ones(3), "rate": torch.tensor(0.5)}])
    text = str(fastopt.explain(optimizer))
    assert "tensor of shape (3,)" in text
    assert "tensor(0.5)" in text


def test_explain_wants_one_of_ours() -> None:
    with pytest.raises(TypeError, match=r"convert"):
        fastopt.explain(torch.optim.Adam(params(3)))


class HandsOn(fastopt.AdamW):
    def __init__(self, params: Any, **rest: Any) -> None:
        super().__init__(params, **rest)


@pytest.mark.parametrize("of", [fastopt.AdamW, fastopt.SGD, HandsOn], ids=lambda cls: cls.__name__)
def test_a_class_that_hands_its_arguments_on_has_those_of_the_class_above(of: Any) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = of([p], lr=0.2)
    optimizer.state["mine"] = 5
    converted = fastopt.convert(optimizer, HandsOn, lr=0.3, eps=1e-5)
    assert (type(converted), converted.defaults["lr"], converted.param_groups[0]["eps"]) == (HandsOn, 0.3, 1e-5)
    assert converted.state.get("mine") == (5 if of is HandsOn else None)
    for wrong in ("momentum", "params"):
        with pytest.raises(
            TypeError, match=rf"HandsOn has no hyper-parameter {wrong}; it has amsgrad, .*, weight_decay"
        ):
            fastopt.convert(optimizer, HandsOn, **{wrong: 0.9})


def test_convert_wants_a_class() -> None:
    with pytest.raises(TypeError, match=r"such as fastopt.SGD, to hand over to; got 'SGD'"):
        fastopt.convert(torch.optim.Adam(params(3)), "SGD")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"such as fastopt.SGD, to hand over to; got <class 'int'>"):
        fastopt.convert(torch.optim.Adam(params(3)), int)  # type: ignore[type-var]


def test_info_names_versions_and_backends_or_reasons() -> None:
    text = str(fastopt.info())
    assert torch.__version__ in text
    assert fastopt.__version__ in text
    assert "cpu" in text
    assert "native" in text
    assert "reference" in text
    if reason := fastopt.backends.why_not("native"):
        assert reason in text


def test_info_says_why_a_torch_built_for_cuda_has_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    info = fastopt.info()
    assert "none that torch can use" in str(info)
    assert info.backends["cuda", "native"]
    assert "cuda" not in info.chosen


@pytest.mark.skipif(not fastopt.backends.available("native"), reason="the compiled extension is not there")
@pytest.mark.parametrize("device", [False, True])
def test_a_compiler_is_advised_only_where_there_is_a_gpu(device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most laptops have a torch for CUDA and no device."""
    monkeypatch.setattr(native, "_load", lambda: (types.SimpleNamespace(has_cuda=lambda: False), ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device)
    reason = native.why_not("cuda")
    assert ("nvcc" in reason) == device
    assert ("torch sees no CUDA device" in reason) != device


def test_info_from_the_command_line() -> None:
    root = pathlib.Path(fastopt.__file__).resolve().parents[1]
    result = subprocess.run(
        [sys.executable, "-m", "fastopt", "info"], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "native" in result.stdout
    assert torch.__version__ in result.stdout


def test_backends_that_do_not_exist_or_do_not_serve_a_device() -> None:
    assert fastopt.backends.why_not("reference") == ""
    assert "xpu" in fastopt.backends.why_not("native", "xpu")
    assert torch.cuda.is_available() or fastopt.backends.why_not("native", "cuda")
    assert not fastopt.backends.available("native", "xpu")
    with pytest.raises(ValueError, match="nonsense"):
        fastopt.backends.why_not("nonsense")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("BACKEND", "triton", "was asked for"), ("BACKEND", "nonsense", "unset it"), ("ISA", "abacus", "no kernels")],
)
def test_info_shows_what_the_environment_cannot_have(name: str, value: str, words: str) -> None:
    root = pathlib.Path(fastopt.__file__).resolve().parents[1]
    result = subprocess.run(
        [sys.executable, "-m", "fastopt", "info"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, f"FASTOPT_{name}": value},
    )
    assert result.returncode == 0, result.stderr
    assert f"FASTOPT_{name}" in result.stdout
    assert words in result.stdout
    assert torch.__version__ in result.stdout
