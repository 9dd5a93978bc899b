"""The numbers contract: native == reference == the oracle, bit for bit, parameters and every state after every step."""

from __future__ import annotations

import functools
import math
import os
import pathlib
import subprocess
import sys
from typing import Any

import digests
import oracles
import pytest
import torch
from cases import CASES, DTYPES, PLAIN, Case, backends, by_id, parametrize
from harness import Built, Scenario, Spec, assert_same, check, difference, python, signature_has, trace

import fastopt

pytestmark = pytest.mark.contract("numbers", difference="square roots")

S = Spec
SIZES = Scenario(
    "sizes",
    (
        *(S((n,)) for n in (0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 4097)),
        *(S(shape) for shape in ((), (3, 0), (0, 3), (2, 3), (5, 1, 3), (1, 9), (4, 3, 2, 2))),
    ),
)

LAYOUTS = Scenario(
    "layouts",
    (
        S((33,), "offset1"),
        S((67,), "offset3", "offset1"),
        S((64,), "contiguous", "offset1"),
        S((64,), "offset1", "contiguous"),
        S((6, 11), "transposed", "transposed"),
        S((6, 11), "transposed", "contiguous"),
        S((6, 11), "contiguous", "transposed"),
        S((2, 3, 4, 5), "channels_last", "channels_last"),
        S((2, 3, 4, 5), "channels_last", "contiguous"),
        S((2, 3, 4, 5), "contiguous", "channels_last"),
        S((5, 7), "every_other", "every_other"),
        S((5, 7), "every_other", "contiguous"),
        S((5, 7), "contiguous", "every_other"),
        S((40,), "every_other", "contiguous"),
        S((4, 9), "gaps", "contiguous"),
        S((4, 9), "gaps", "gaps"),
        S((2, 3, 5), "transposed", "gaps"),
        S((4, 9), "contiguous", "expanded"),
        S((8, 5), "transposed", "expanded"),
        S((1, 9), "odd_ones", "contiguous"),
        S((9, 1), "contiguous", "odd_ones"),
        S((1, 1), "odd_ones", "odd_ones"),
        S((1030,), "offset1", "offset3"),
        S((3, 301), "contiguous", "offset1"),
    ),
)

_NEVER, _ONCE = frozenset(range(9)), frozenset(range(1, 9))
INTERMITTENT = Scenario(
    "intermittent",
    (
        S((33,)),
        S((33,), absent=frozenset({0, 1})),
        S((17,), absent=frozenset({1})),
        S((9, 4), absent=frozenset({2, 3, 4})),
        S((8,), absent=frozenset({0, 2, 4, 6, 8})),
        S((8,), absent=frozenset({1, 3, 5, 7})),
        S((64,), absent=_NEVER),
        S((64,), absent=_ONCE),
        S((0,), absent=frozenset({1})),
        S((5,), absent=frozenset({0, 1, 2, 3, 4, 5, 6, 7})),
    ),
    steps=9,
)

SPECIAL = Scenario("special", (S((400,), kind="special"),), steps=9)
LARGE = Scenario("large", (S((40_003,)), S((16,)), S((17_000,), "offset1")), steps=7)  # two threads share them


def _different_groups(case: Case) -> list[dict[str, Any]]:
    """Six groups, each with another setting, some of them another chain (amsgrad, centered, maximize, nesterov ...)."""
    groups: list[dict[str, Any]] = [
        {},
        {"lr": case.kwargs["lr"] * 0.3},
        {"weight_decay": 0.07},
        {"maximize": True, "lr": 0.02},
    ]
    options = {"betas": (0.8, 0.95), "eps": 1e-4, "momentum": 0.5, "centered": True, "amsgrad": True, "lr_decay": 0.2,
               "momentum_decay": 0.1, "k": 2, "alpha": 0.6, "use_gc": False,
               "decoupled_weight_decay": True}  # fmt: skip
    options = {k: v for k, v in options.items() if signature_has(case, k)}
    if case.name == "AdamW":
        options.pop("decoupled_weight_decay", None)
    return [*groups, options, {**options, "weight_decay": 0.02, "maximize": False}]


GROUPS = Scenario(
    "groups",
    (
        *(S(shape, group=g) for g in range(6) for shape in ((9,), (4, 5), (33,))[: 1 + g % 3]),
        S((7,), group=1, absent=frozenset({0, 3})),
    ),
    overrides=_different_groups,
)


@parametrize()
def test_sizes(case: Case, dtype: torch.dtype, backend: str) -> None:
    check(case, SIZES, dtype, backend)


@pytest.mark.contract("numbers", "layouts", difference="square roots")
@parametrize()
def test_layouts(case: Case, dtype: torch.dtype, backend: str) -> None:
    check(case, LAYOUTS, dtype, backend)


@pytest.mark.contract("numbers", "live", difference="square roots")
@parametrize()
def test_intermittent_gradients(case: Case, dtype: torch.dtype, backend: str) -> None:
    check(case, INTERMITTENT, dtype, backend)


@parametrize()
def test_special_values(case: Case, dtype: torch.dtype, backend: str) -> None:
    check(case, SPECIAL, dtype, backend)


@pytest.mark.contract("numbers", difference="numbers beyond float32")
@pytest.mark.parametrize("backend", backends())
def test_a_learning_rate_beyond_float32_is_infinite(backend: str) -> None:
    for dtype, want in ((torch.float32, -math.inf), (torch.float64, -1e39)):
        ps = [torch.nn.Parameter(torch.zeros(3, dtype=dtype)) for _ in range(2)]
        for p in ps:
            p.grad = torch.ones_like(p)
        fastopt.SGD(ps[:1], lr=1e39, backend=backend).step()
        assert torch.equal(ps[0].detach(), torch.full((3,), want, dtype=dtype))
        theirs = torch.optim.SGD(ps[1:], lr=1e39)
        if dtype == torch.float64:
            theirs.step()
            continue
        with pytest.raises(RuntimeError, match="without overflow"):
            theirs.step()


@parametrize([Case("rmsprop-extrapolating", "RMSprop", {"alpha": 1.75, "centered": True})])
def test_an_average_beyond_its_ends(case: Case, dtype: torch.dtype, backend: str) -> None:
    """A weight of -0.75, as torch's constructor lets pass: from the farther end, as torch.lerp does it."""
    check(case, Scenario("beyond", (S((33,)),), steps=5), dtype, backend)


@pytest.mark.parametrize("backend", backends())
def test_the_sign_of_a_learning_rate_of_zero(backend: str) -> None:
    """0.0 equals -0.0, and -0.0 - 0.0 * 1 does not equal -0.0 - -0.0 * 1 in its sign."""
    ps = [torch.nn.Parameter(torch.tensor([-0.0])) for _ in range(2)]
    optimizer = fastopt.SGD([{"params": [p], "lr": lr} for p, lr in zip(ps, (0.0, -0.0), strict=True)], backend=backend)
    for p in ps:
        p.grad = torch.ones(1)
    optimizer.step()
    assert [math.copysign(1, p.item()) for p in ps] == [-1, 1]


@parametrize(PLAIN, ("fp32",))
def test_an_infinite_learning_rate(case: Case, dtype: torch.dtype, backend: str) -> None:
    """What decays by nothing does not become infinity times zero."""
    infinite = Scenario("infinite", (S((9,)), S((17,), group=1)), steps=4, overrides=lambda _: [{"lr": math.inf}] * 2)
    check(case, infinite, dtype, backend)


@pytest.mark.contract("numbers")
@parametrize([c for c in CASES if c.interpolates_fully], names=["native"])
def test_backends_agree_on_the_signs_of_zeros(case: Case, dtype: torch.dtype, backend: str) -> None:
    """The cases in which torch itself does not define them."""
    traces = []
    for name in (backend, "reference"):
        built = Built(SPECIAL, case, dtype)
        traces.append(trace(case.make(built.groups, name), built))
    assert_same(*traces)


@parametrize()
def test_groups(case: Case, dtype: torch.dtype, backend: str) -> None:
    check(case, GROUPS, dtype, backend)


@parametrize()
def test_large_on_one_and_two_threads(case: Case, dtype: torch.dtype, backend: str) -> None:
    for threads in (1, 2) if backend == "native" else (1,):
        check(case, LARGE, dtype, backend, threads)


LOW_PRECISION = Scenario(
    "low",
    (
        *(S((n,)) for n in (0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 65, 1027)),
        S(()),
        S((33,), "offset1", "offset3"),
        S((1030,), "offset1", "offset3"),
        S((3, 301), "contiguous", "offset1"),
        S((6, 11), "transposed", "contiguous"),
        S((2, 3, 4, 5), "channels_last", "contiguous"),
        S((5, 7), "every_other", "every_other"),
        S((4, 9), "contiguous", "expanded"),
        S((17,), absent=frozenset({0, 3})),
        S((400,), kind="special"),
    ),
    steps=9,
)


@pytest.mark.contract("low precision", difference="low precision")
@parametrize(dtypes=("bf16", "fp16"))
def test_low_precision(case: Case, dtype: torch.dtype, backend: str) -> None:
    """fp32 arithmetic, one rounding per stored value."""
    check(case, LOW_PRECISION, dtype, backend)


@pytest.mark.contract("low precision", difference="dtypes of loaded states")
@parametrize(dtypes=("bf16", "fp16"), names=["native"])
def test_low_precision_beside_states_in_float32(case: Case, dtype: torch.dtype, backend: str) -> None:
    """States as a checkpoint may bring them; torch has no such, so the backends are held to each other."""
    traces = []
    for name in (backend, "reference"):
        built = Built(LOW_PRECISION, case, dtype)
        optimizer = case.make(built.groups, name)
        built.set_grads(0)
        optimizer.step()
        saved = optimizer.state_dict()
        for states in saved["state"].values():
            states.update({k: v.float() for k, v in states.items() if k not in oracles.SCALAR_STATES})
        optimizer.load_state_dict(saved)
        traces.append(trace(optimizer, built))
        built.assert_nothing_else_written()
    assert_same(*traces)


def _mixed_dtypes(dtypes: list[str]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.linspace(-1, 1, 5 + 9 * i).to(DTYPES[d])) for i, d in enumerate(dtypes)]


@pytest.mark.contract("low precision")
@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no Tensor.grad_dtype")
@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_kind_of_float_is_rounded_as_torch_does(dtype: torch.dtype, backend: str) -> None:
    """p = 0 + g with g in float32: subnormals, NaNs and infinities among normals, at every place in a vector."""
    count = 1_000_003
    patterns = torch.arange(count, dtype=torch.int64).mul_(2**32 // count + 1).remainder_(2**32) - 2**31
    g = patterns.to(torch.int32).view(torch.float32)
    p = torch.nn.Parameter(torch.zeros(count, dtype=dtype))
    p.grad_dtype = None
    p.grad = g
    fastopt.SGD([p], lr=1.0, maximize=True, backend=backend).step()
    assert not difference(p.detach(), g.add(0.0).to(dtype))


@pytest.mark.contract("low precision")
@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_product_is_rounded_as_torch_does(dtype: torch.dtype, backend: str) -> None:
    """p = 0 + lr * g with g of p's own dtype, which has kernels of its own: every g there is, and lr that make ties,
    subnormals and infinities of it."""
    g = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    for lr in (1.0, 1.00390625, 0.501953125, 1 / 3, 1.7e-4, 3e-39, 2.0**-14, 3e38):
        p = torch.nn.Parameter(torch.zeros(g.shape, dtype=dtype))
        p.grad = g.clone()
        fastopt.SGD([p], lr=lr, maximize=True, backend=backend).step()
        product = g.double() * torch.tensor(lr, dtype=torch.float32).double()  # exact
        assert not difference(p.detach(), product.add(0.0).float().to(dtype)), lr


@pytest.mark.contract("low precision", optimizers="SGD")
@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float64_is_rounded_to_16_bits_once(dtype: torch.dtype, backend: str) -> None:
    """A momentum of 16 bits beside a float64 parameter, from nothing: what torch makes of it is rounded twice."""
    g = oracles.hard_to_round(dtype)
    p = torch.nn.Parameter(torch.zeros_like(g))
    optimizer = fastopt.SGD([p], lr=1.0, momentum=0.5, backend=backend)
    optimizer.state[p]["momentum_buffer"] = torch.zeros(g.shape, dtype=dtype)
    p.grad = g
    optimizer.step()
    assert not difference(optimizer.state[p]["momentum_buffer"], oracles.rounded(g, dtype))
    assert not difference(p.detach(), 0.0 - g)


@pytest.mark.contract("layouts")
@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize(
    "case", by_id("sgd-momentum", "adam-amsgrad", "nadam-coupled", "ranger-decay", "lookahead-adam"), ids=lambda c: c.id
)
def test_one_group_of_several_dtypes_is_as_each_dtype_alone(case: Case, backend: str) -> None:
    dtypes = ["fp32", "bf16", "fp64", "fp16", "fp32", "bf16"]
    together, alone = _mixed_dtypes(dtypes), _mixed_dtypes(dtypes)
    optimizers = [case.make(together, backend), *(case.make([p], backend) for p in alone)]
    for step in range(7):
        for p in together + alone:
            p.grad = torch.cos(torch.arange(p.numel()) + step).to(p.dtype)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(together, alone, strict=True):
        assert not difference(p.detach(), q.detach())


def _rms(values: torch.Tensor, truth: torch.Tensor) -> float:
    return (values.double() - truth).pow(2).mean().sqrt().item()


ACCURACY = Scenario("accuracy", (S((30_000,)),), steps=10)


@pytest.mark.contract("numbers")
@parametrize([c for c in PLAIN if c.name != "Ranger"], ("fp32", "bf16"))
def test_no_less_accurate_than_torch(case: Case, dtype: torch.dtype, backend: str) -> None:
    """rms distance to the float64 trajectory <= 1.01 times torch.optim's (0.01: two random samples of rounding)."""
    ours, theirs = Built(ACCURACY, case, dtype), Built(ACCURACY, case, dtype)
    torch_optimizer = case.make_torch(theirs.groups)
    textbook, truth = case.textbook(), ours.params[0].detach().double()
    optimizer = case.make(ours.groups, backend)
    for step in range(ACCURACY.steps):
        for built in (ours, theirs):
            built.set_grads(step)
        truth = textbook.update(truth, ours.params[0].grad)
        optimizer.step()
        torch_optimizer.step()
    assert _rms(ours.params[0], truth) <= 1.01 * _rms(theirs.params[0], truth)


@parametrize(by_id("adam", "radam", "nadam", "sgd-momentum", "rmsprop-centered", "adagrad"), ("fp32",))
def test_many_steps(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Far from the start, where bias corrections are close to one."""
    scenario = Scenario("many", (S((65,)), S((9,), absent=frozenset(range(150, 190)))), steps=200)
    check(case, scenario, dtype, backend)


@parametrize(by_id("adam", "nadam", "radam", "ranger", "adagrad-lr-decay"))
@pytest.mark.parametrize("start", [1000, 250_000, 16_777_215, 16_777_216])
def test_large_step_counts(case: Case, dtype: torch.dtype, backend: str, start: int) -> None:
    """`step` is a float32: it stops counting at 2^24, as in torch."""
    built, reference = (Built(Scenario("late", (S((33,)),)), case, dtype, contiguous=c) for c in (False, True))
    optimizer, oracle = case.make(built.groups, backend), case.oracle(reference.groups)
    for step in range(4):
        built.set_grads(step)
        reference.set_grads(step)
        optimizer.step()
        oracle.step()
        if step == 0:
            for state in (optimizer.state[built.params[0]], oracle.state[reference.params[0]]):
                state["step"].fill_(start)
    assert torch.equal(built.params[0], reference.params[0])
    assert optimizer.state[built.params[0]]["step"] == oracle.state[reference.params[0]]["step"]


@pytest.mark.parametrize("exponent", [0, -1], ids=["ordinary", "tiny"])
@parametrize(by_id("adagrad"))
def test_square_roots_are_rounded_to_nearest(case: Case, dtype: torch.dtype, backend: str, exponent: int) -> None:
    """eps = 0 and a gradient too small for the sum: p = -g / sqrt(sum), with sums chosen to be hard, subnormals too."""
    eps = torch.finfo(dtype).eps
    root_of_scale = 2.0 ** (exponent * (60 if dtype == torch.float32 else 510))
    powers = torch.exp2(2.0 * torch.arange(-8, 9, dtype=torch.float64)).to(dtype)
    ones = torch.cat([powers * (1 - eps / 2), powers * (1 + eps), powers * 4 * (1 - eps), powers * 2])
    total = torch.cat([ones, torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=dtype) + 1e-3])
    total *= root_of_scale**2
    g = torch.full_like(total, 1e-20 * root_of_scale)
    p = torch.nn.Parameter(torch.zeros_like(total))
    optimizer = case.make([p], backend, lr=1.0, eps=0.0)
    optimizer.state[p]["sum"].copy_(total)
    p.grad = g
    optimizer.step()
    assert torch.equal(optimizer.state[p]["sum"], total)
    assert torch.equal(p.detach(), -(g / oracles.rounded_sqrt(total)))


@pytest.mark.contract("numbers")
@parametrize(CASES, ("fp32", "bf16"))
def test_lr_zero_and_zero_gradients_leave_parameters_untouched(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Checkpoint loaders create optimizer state with exactly this step. (A zero may change its sign, as in torch.)"""
    p = torch.nn.Parameter(torch.tensor([0.0, -0.0, 1.0, -1.5, 1e-30, -3e38, 7e-41]).to(dtype))
    before = p.detach().clone()
    optimizer = case.make([p], backend, lr=0.0)
    for _ in range(7):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert torch.equal(p.detach(), before)


@parametrize(by_id("sgd-momentum", "adam-everything", "ranger"), ("fp32",))
def test_tensors_large_enough_for_huge_pages(case: Case, dtype: torch.dtype, backend: str) -> None:
    """State of 9 MB takes another path through the allocator, in whatever layout."""
    check(case, Scenario("huge", (Spec((1500, 1500), "transposed", "contiguous"),), steps=3), dtype, backend, threads=2)


@functools.cache
def _digests_in_this_process() -> dict[str, str]:
    return digests.digests()


@pytest.mark.contract("numbers", optimizers="all")
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("backend", backends(["native"]))
def test_instruction_sets_agree(isa: str, backend: str) -> None:
    """Every compiled width gives the bits of the widest, which the rest of this file holds to the oracle."""
    root = pathlib.Path(fastopt.__file__).resolve().parents[1]
    result = subprocess.run(
        [sys.executable, str(pathlib.Path(digests.__file__))],
        env={**os.environ, "FASTOPT_ISA": isa, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if "FASTOPT_ISA" in result.stderr:
        pytest.skip(result.stderr.strip().splitlines()[-1])
    assert result.returncode == 0, result.stderr
    got = dict(line.split() for line in result.stdout.splitlines())
    want = _digests_in_this_process()
    assert got.keys() == want.keys()
    assert not [key for key in want if got[key] != want[key]]


@pytest.mark.contract("low precision", optimizers="SGD")
@pytest.mark.parametrize("backend", backends(["native", "emulated"]))
def test_float16_does_not_become_a_subnormal_float32_on_the_way(backend: str) -> None:
    """So a processor that takes those for zero takes no float16 for it, also where it has no conversion of its own."""
    script = f"""
        import torch, fastopt
        if torch.set_flush_denormal(True):
            p = torch.nn.Parameter(torch.zeros(1024, dtype=torch.float16))
            p.grad = torch.arange(1024, dtype=torch.int16).view(torch.float16)
            fastopt.SGD([p], lr=1024.0, maximize=True, backend={backend!r}).step()
            torch.set_flush_denormal(False)
            assert torch.equal(p.detach(), p.grad * 1024), p
        """
    python(script, FASTOPT_ISA="baseline")


@pytest.mark.contract("numbers")
@pytest.mark.parametrize("backend", backends(["native"]))
def test_backend_none_gives_the_same_numbers(backend: str) -> None:
    """Where there are kernels; without them torch's own code runs, with torch's own square root."""
    for case in by_id("radam", "ranger", "lookahead-adam"):
        traces = []
        for name in (None, backend):
            built = Built(SIZES, case, torch.float32)
            traces.append(trace(case.make(built.groups, name), built))
        for (p, _), (q, _) in zip(traces[0][-1], traces[1][-1], strict=True):
            assert not difference(p, q)
