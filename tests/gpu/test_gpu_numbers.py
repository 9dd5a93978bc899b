"""The numbers contract on a GPU: native == triton == reference == the CPU, bit for bit, after every step; torch.optim
on the same GPU to a stated number of ulps."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from cases import CASES, DTYPES, TORCH_CASES, Case, by_id
from gpu_support import DEVICE, KERNELS, check, each_backend, on_cpu, parametrize, ramp, wave
from harness import Built, Scenario, Spec, assert_same, difference, snapshot, states_in_order
from test_numbers import GROUPS, INTERMITTENT, LAYOUTS, SIZES, SPECIAL
from torch import Tensor

import fastopt

S = Spec
# Several work items of a tensor, aligned and not; rows to centralise that are short, long, and longer than any block.
LARGE = (
    S((100_003,)),
    S((40_000,), "offset1"),
    S((20_000,), "contiguous", "offset3"),
    S((300, 129)),
    S((3, 5000)),
    S((2, 40_001)),
    S((17, 31, 9)),
)
EVERYTHING = Scenario(
    "gpu",
    (*GROUPS.specs, *SIZES.specs, *LAYOUTS.specs, *INTERMITTENT.specs, *SPECIAL.specs, *LARGE),
    steps=9,
    overrides=GROUPS.overrides,
)


@parametrize(CASES, ("fp32", "fp64", "bf16", "fp16"))
def test_as_on_the_cpu(case: Case, dtype: torch.dtype, backend: str) -> None:
    """All sizes, layouts, absences, special values and groups in one optimizer: one launch takes them all."""
    check(case, EVERYTHING, dtype, backend)


# The reference backend takes dozens of torch calls a tensor: fewer of them.
REFERENCE = Scenario(
    "gpu reference",
    (
        *GROUPS.specs,
        *LAYOUTS.specs[:13],
        *SPECIAL.specs,
        S((300, 129)),
        S((17, 31, 9)),
        S((33,), absent=frozenset({1})),
    ),
    steps=7,
    overrides=GROUPS.overrides,
)


@parametrize(CASES, ("fp32", "fp64", "bf16", "fp16"), names=("reference",))
def test_reference_as_on_the_cpu(case: Case, dtype: torch.dtype, backend: str) -> None:
    check(case, REFERENCE, dtype, backend)


@parametrize(by_id("adam", "nadam", "radam", "ranger", "lookahead-adam"), ("fp32",))
def test_many_steps(case: Case, dtype: torch.dtype, backend: str) -> None:
    check(case, Scenario("many", (S((65,)), S((9,), absent=frozenset(range(50, 90)))), steps=120), dtype, backend)


MIXES = {
    "bf16 with fp32 states": (torch.bfloat16, torch.float32),
    "fp16 with fp32 states": (torch.float16, torch.float32),
    "fp32 with bf16 states": (torch.float32, torch.bfloat16),
    "bf16 with fp64 states": (torch.bfloat16, torch.float64),
}


def _stepped(case: Case, backend: str, device: str, dtype: torch.dtype, state_dtype: torch.dtype) -> list[Any]:
    sizes = (1, 33, 1000, 4097, 100_003)
    params = [ramp(n, dtype, device) for n in sizes]
    optimizer, result = case.make(params, backend), []
    for step in range(7):
        for p in params:
            p.grad = wave(p.numel(), step, dtype, device)
        optimizer.step()
        if step == 0:  # what a user does who wants states of another dtype
            for p in params:
                own = optimizer.state[p]
                own.update({k: v.to(state_dtype) for k, v in own.items() if v.shape == p.shape and k != "step"})
        result.append(snapshot(params, states_in_order(optimizer, len(params))))
    return on_cpu(result)


@pytest.mark.parametrize("mix", MIXES)
@parametrize(by_id("sgd-momentum", "rmsprop-momentum", "adagrad", "adam-amsgrad", "adamax", "nadam", "radam", "ranger"))
def test_states_of_another_dtype(case: Case, dtype: torch.dtype, backend: str, mix: str) -> None:
    got, want = (_stepped(case, *where, *MIXES[mix]) for where in ((backend, DEVICE), ("reference", "cpu")))
    assert_same(got, want)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no Tensor.grad_dtype")
@pytest.mark.parametrize("grad_dtype", ["fp32", "fp64", "bf16", "fp16"])
@parametrize(by_id("sgd-momentum", "adam", "ranger"), ("fp32", "bf16"))
def test_gradients_of_another_dtype(case: Case, dtype: torch.dtype, backend: str, grad_dtype: str) -> None:
    runs = []
    for name, device in ((backend, DEVICE), ("reference", "cpu")):
        params = [ramp(n, dtype, device) for n in (33, 5000)]
        optimizer = case.make(params, name)
        for step in range(7):
            for p in params:
                p.grad_dtype = None
                p.grad = wave(p.numel(), step, DTYPES[grad_dtype], device)
            optimizer.step()
        runs.append([p.detach().cpu() for p in params])
    assert not [text for a, b in zip(*runs, strict=True) if (text := difference(a, b))]


@each_backend
@pytest.mark.parametrize(
    "case", by_id("sgd-momentum", "adam-amsgrad", "nadam-coupled", "ranger-decay", "lookahead-adam"), ids=lambda c: c.id
)
def test_one_group_of_several_dtypes(case: Case, backend: str) -> None:
    runs = []
    for name, device in ((backend, DEVICE), ("reference", "cpu")):
        params = [ramp(5 + 9 * i, DTYPES[d], device) for i, d in enumerate(["fp32", "bf16", "fp64", "fp16"] * 2)]
        optimizer = case.make(params, name)
        for step in range(7):
            for p in params:
                p.grad = wave(p.numel(), step, p.dtype, device)
            optimizer.step()
        runs.append([p.detach().cpu() for p in params])
    assert not [text for a, b in zip(*runs, strict=True) if (text := difference(a, b))]


# torch.optim on the same GPU, one step at a time from the same parameters and states, so that nothing accumulates.


def _implementations(case: Case) -> list[str]:
    signature = inspect.signature(getattr(torch.optim, case.name)).parameters
    # Adagrad's fused step is for CPUs only in some versions of torch; its constructor says so.
    fused = ["fused"] if "fused" in signature and case.name != "Adagrad" else []
    return ["for-loop", "foreach", *fused]


PARITY = [
    pytest.param(case, implementation, backend, id=f"{case.id}-{implementation}-{backend}")
    for case in TORCH_CASES
    for implementation in _implementations(case)
    for backend in KERNELS
]


def _amplification(case: Case, h: dict[str, Any], t: int, states: dict[str, Tensor], fused: bool) -> Tensor | float:
    """By how much one rounding inside the update may be magnified in it.

    torch's fused kernels compute 1 - beta^t in fp32, where the subtraction cancels: a rounding of beta^t is
    1 / (1 - beta^t) times larger in the difference. Centered RMSprop divides by the root of v - ga^2, which cancels.
    """
    factor: Tensor | float = 1.0
    if "betas" in h and fused:
        factor = sum(1 / (1 - beta**t) for beta in h["betas"])
    if h.get("centered"):
        v, ga = states["square_avg"], states["grad_avg"]
        factor = factor + v / (v - ga * ga).clamp(min=torch.finfo(torch.float32).eps * v)
    return factor


@pytest.mark.parametrize(("case", "implementation", "backend"), PARITY)
def test_parity_with_torch(case: Case, implementation: str, backend: str) -> None:
    """States within 4 ulps of the largest term of their sum: at most four roundings differ (of the decayed gradient, of
    a product, of the sum, and of a scalar that torch turned into a reciprocal). The update within 16 ulps: from the
    states to it there are at most eight operations, and each may be off by an ulp in either code. Ulps of the largest
    update of any element: where the terms of one cancel their roundings stay, and all gradients are of one size."""
    flags = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}[implementation]
    eps = torch.finfo(torch.float32).eps
    ours, theirs = ramp(4099), ramp(4099)
    optimizer, torch_optimizer = case.make([ours], backend), case.make_torch([theirs], **flags)
    for step in range(8):
        theirs.data.copy_(ours.data)
        old = {k: v.clone() for k, v in optimizer.state.get(ours, {}).items() if isinstance(v, Tensor)}
        for key, value in old.items():
            torch_optimizer.state[theirs][key].copy_(value)
        ours.grad, theirs.grad = (wave(4099, step) for _ in range(2))
        before = ours.detach().clone()
        optimizer.step()
        torch_optimizer.step()
        states, torch_states = optimizer.state[ours], torch_optimizer.state.get(theirs, {})
        h = torch_optimizer.param_groups[0]
        amplified = _amplification(case, h, step + 1, torch_states, implementation == "fused")
        g = ours.grad.abs() + h["weight_decay"] * before.abs()
        for key, value in torch_states.items():
            if isinstance(value, Tensor) and value.shape == ours.shape:
                scale = value.abs() + old.get(key, value).abs() + torch.maximum(g, g * g)
                ulps = (states[key] - value).abs() / (eps * scale * (amplified if key == "momentum_buffer" else 1.0))
                assert ulps.max() <= 4, f"step {step + 1}: {key}"
        tolerance = eps * (16 * (theirs.detach() - before).abs().max() * amplified + before.abs())
        wrong = (ours.detach() - theirs.detach()).abs() > tolerance
        assert not wrong.any(), f"step {step + 1}: {int(wrong.sum())} of 4099, first {int(wrong.nonzero()[0])}"


@pytest.mark.parametrize("name", ["native", "reference"])
def test_automatic_choice_takes_the_kernels(name: str) -> None:
    """Without `backend=` the numbers are the kernels', bit for bit."""
    runs = []
    for backend in (None, name):
        p = ramp(1000)
        optimizer = fastopt.RAdam([p], lr=0.01, backend=backend)
        for step in range(7):
            p.grad = wave(1000, step)
            optimizer.step()
        runs.append(p.detach())
    assert not difference(*runs)


def test_scenario_reaches_the_shapes_it_is_meant_to() -> None:
    """EVERYTHING must hold misaligned views, absent gradients, several groups and rows of every length."""
    built = Built(EVERYTHING, by_id("adam")[0], torch.float32)
    assert len(built.groups) == 6
    assert {"offset1", "transposed", "gaps", "every_other"} <= {s.layout for s in EVERYTHING.specs}
    assert any(s.absent for s in EVERYTHING.specs)
    assert any(p.data_ptr() % 16 for p in built.params)
