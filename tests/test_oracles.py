"""The oracles: they agree with torch, with each other and with the papers; the comparison finds one wrong bit."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from cases import CASES, PLAIN, TORCH_CASES, Case, by_id, parametrize_cases
from harness import Built, Scenario, Snapshot, Spec, assert_same, difference, oracle_trace, snapshot

from fastopt.backends import reference

SCENARIO = Scenario("oracle", (Spec((40,)), Spec((3, 4, 5))), steps=9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exact_sqrt_is_the_nearest_number(dtype: torch.dtype) -> None:
    """(r - u/2)^2 < x < (r + u/2)^2, u the spacing at r, in exact rational arithmetic."""
    generator = torch.Generator().manual_seed(0)
    low, high = (-149, 127) if dtype == torch.float32 else (-1074, 1023)
    x = torch.rand(2000, generator=generator, dtype=torch.float64).to(dtype) + 0.5
    x = x * torch.exp2(torch.randint(low, high, x.shape, generator=generator).double()).to(dtype)
    almost_one = 1 - torch.finfo(dtype).eps / 2  # its root lies just below a midpoint
    x = torch.cat([x, torch.tensor([almost_one, almost_one / 4, torch.finfo(dtype).max, 2.0, 4.0], dtype=dtype)])
    with oracles.exact_sqrt():
        roots, in_place = x.sqrt(), x.clone().sqrt_()
    assert torch.equal(roots, in_place)
    up = torch.nextafter(roots, torch.full_like(roots, math.inf))
    for value, root, above in zip(x.tolist(), roots.tolist(), up.tolist(), strict=True):
        half = (Fraction(above) - Fraction(root)) / 2
        assert (Fraction(root) - half) ** 2 < Fraction(value) < (Fraction(root) + half) ** 2


def test_exact_fma_is_rounded_once() -> None:
    """In exact rational arithmetic, which becomes a float to nearest."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> torch.Tensor:
        exponents = torch.randint(low, high, (3000,), generator=generator).double()
        return torch.randn(3000, generator=generator, dtype=torch.float64) * torch.exp2(exponents)

    a, b, c = draw(-200, 200), draw(-200, 200), draw(-200, 200)
    c = torch.where(torch.arange(3000) % 3 == 0, -a * b * (1 + 2.0**-40), c)
    huge, tiny = torch.finfo(torch.float64).max, 1.22e-161
    a, b, c = (torch.cat([x, torch.tensor(y, dtype=torch.float64)]) for x, y in (
        (a, [-tiny, huge, 2.0, huge]), (b, [-huge, tiny, huge / 4, 2.0**-52]), (c, [-2.2e147, 1.0, -huge / 3, 0.0])
    ))  # fmt: skip
    want = [
        float(Fraction(x) * Fraction(y) + Fraction(z)) for x, y, z in zip(*(t.tolist() for t in (a, b, c)), strict=True)
    ]
    assert reference.exact_fma(a, b, c).tolist() == want


@pytest.mark.parametrize(("a", "b", "c", "want"), [
    (-0.0, 0.0, -0.0, -0.0), (0.0, 0.0, -0.0, 0.0), (1.0, 1.0, -1.0, 0.0), (1e-200, -1e-200, 0.0, -0.0),
    (1e300, -1e300, math.inf, math.inf), (1e300, 1e300, -math.inf, -math.inf), (1e300, 1e300, 0.0, math.inf),
    (math.inf, 1.0, -math.inf, math.nan), (math.nan, 1.0, math.inf, math.nan),
])  # fmt: skip
def test_exact_fma_of_zeros_and_infinities(a: float, b: float, c: float, want: float) -> None:
    got = reference.exact_fma(*(torch.tensor([x], dtype=torch.float64) for x in (a, b, c)))
    assert not difference(got, torch.tensor([want], dtype=torch.float64))
    assert math.copysign(1, got.item()) == math.copysign(1, want) or math.isnan(want)


def test_exact_sqrt_of_what_is_not_positive_and_its_end() -> None:
    x = torch.tensor([0.0, -0.0, math.inf, math.nan, -1.0])
    with oracles.exact_sqrt():
        assert not difference(x.sqrt(), torch.tensor([0.0, -0.0, math.inf, math.nan, math.nan]))
        assert x.bfloat16().sqrt().dtype == torch.bfloat16
    assert "sqrt" not in vars(torch.Tensor)
    assert "sqrt_" not in vars(torch.Tensor)


def test_exact_sqrt_reaches_the_code_of_torch_optim() -> None:
    """Adagrad's p - lr * g / sqrt(s), with an s whose root torch rounds wrongly."""
    s = torch.rand(4096, generator=torch.Generator().manual_seed(1))
    p = torch.nn.Parameter(torch.zeros(4096))
    optimizer = oracles.TorchLoop("Adagrad", [p], lr=1.0, eps=0.0)
    optimizer.state[p]["sum"].copy_(s)
    p.grad = torch.full_like(p, 1e-30)
    optimizer.step()
    assert torch.equal(p.detach(), -(torch.full_like(p, 1e-30) / torch.from_numpy(np.sqrt(s.numpy()))))


@parametrize_cases(TORCH_CASES)
def test_loop_is_torch_optim_but_for_the_square_root(case: Case) -> None:
    ours, theirs = (Built(SCENARIO, case, torch.float32, contiguous=True) for _ in range(2))
    oracle, optimizer = case.oracle(ours.groups), case.make_torch(theirs.groups)
    for step in range(SCENARIO.steps):
        for built, o in ((ours, oracle), (theirs, optimizer)):
            built.set_grads(step)
            o.step()
    for p, q in zip(ours.params, theirs.params, strict=True):
        if case.name == "SGD":
            assert torch.equal(p, q)
        # One ulp of the root per step, relative to the size of the update (at most 0.1 for 9 steps).
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)


@parametrize_cases(CASES)
def test_oracle_agrees_with_the_textbook(case: Case) -> None:
    """Two transcriptions that share no code, in float64: no more than rounding apart."""
    built = Built(SCENARIO, case, torch.float64, contiguous=True)
    oracle = case.oracle(built.groups)
    textbooks, truth = [case.textbook() for _ in built.params], [p.detach().clone() for p in built.params]
    for step in range(SCENARIO.steps):
        built.set_grads(step)
        truth = [t.update(q, p.grad) for t, q, p in zip(textbooks, truth, built.params, strict=True)]
        oracle.step()
    # float32 product of mu in NAdam: 6e-8 relative to the update.
    tolerance = 1e-7 if case.name == "NAdam" else 1e-12
    if case.lookahead and case.name == "Ranger":
        return  # the textbook knows one Lookahead at a time
    for p, q in zip(built.params, truth, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("k", "alpha", "expected"),
    [(5, 0.5, [1, 2, 3, 4, 2.5, 3.5]), (3, 0.8, [1, 2, 2.4, 3.4, 4.4, 4.8]), (1, 0.25, [0.25, 0.5])],
)
def test_lookahead_oracle_is_zhangs_formula(k: int, alpha: float, expected: list[float]) -> None:
    """p moves by one each step from 0: the trajectory of the authors' code (of alphadl's and timm's it is not)."""
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    oracle = oracles.Lookahead(oracles.TorchLoop("SGD", [p], lr=1.0), k, alpha)
    got = []
    for _ in expected:
        p.grad = -torch.ones_like(p)
        oracle.step()
        got.append(p.item())
    assert got == pytest.approx(expected, abs=1e-12)


def test_radam_rectification_has_the_papers_numbers() -> None:
    """r_6 = .025821, r_100 = .215335 for beta2 = .999, read off the displacement under a constant gradient."""
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    oracle, moves = oracles.TorchLoop("RAdam", [p], lr=1.0, eps=0.0), []
    for _ in range(100):
        before = p.item()
        p.grad = torch.ones_like(p)
        oracle.step()
        moves.append(before - p.item())
    assert moves[:5] == pytest.approx([1.0] * 5)
    assert [moves[5], moves[6], moves[9], moves[99]] == pytest.approx(
        [0.025821, 0.032739, 0.048998, 0.215335], abs=1e-6
    )


def test_row_mean_is_rounded_once() -> None:
    g = torch.tensor([[1e8, 1.0, -1e8, 1.0], [0.1, 0.2, 0.3, 0.4]])
    want = [sum(map(float, row)) / 4 for row in g.tolist()]
    assert oracles.row_mean(g).flatten().tolist() == torch.tensor(want).tolist()
    assert oracles.row_mean(torch.tensor([[1e16, 1.0, -1e16, 1.0]], dtype=torch.float64)).item() == 0.5
    assert oracles.row_mean(torch.zeros(3, 2, 2, 2)).shape == (3, 1, 1, 1)


def _replay(case: Case, step: Any) -> list[Snapshot]:
    """The oracle with its step replaced by `step(oracle, params)`."""
    built = Built(SCENARIO, case, torch.float32, contiguous=True)
    oracle, result = case.oracle(built.groups), []
    for i in range(SCENARIO.steps):
        built.set_grads(i)
        step(oracle, built.params, i)
        result.append(snapshot(built.order, [oracles.states_of(oracle, p) for p in built.order]))
    return result


def _want(case: Case) -> list[Snapshot]:
    return oracle_trace(case, SCENARIO, torch.float32)


@parametrize_cases(PLAIN)
def test_comparison_accepts_the_oracle_itself(case: Case) -> None:
    assert_same(_replay(case, lambda oracle, params, i: oracle.step()), _want(case))


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step", "parameter"])
def test_comparison_finds_one_wrong_bit(key: str) -> None:
    """The last step, the last element, one ulp."""

    def step(oracle: Any, params: Any, i: int) -> None:
        oracle.step()
        if i == SCENARIO.steps - 1:
            tensor = params[-1].detach() if key == "parameter" else oracle.state[params[-1]][key]
            tensor.view(-1)[-1:].view(torch.int32).add_(1)

    (case,) = by_id("adam")
    with pytest.raises(AssertionError, match="step 9, parameter 1"):
        assert_same(_replay(case, step), _want(case))


def _without_fma(oracle: Any, params: Any, i: int) -> None:
    """SGD with two roundings where the contract has one."""
    for p in params:
        p.data.sub_(p.grad * oracle.param_groups[0]["lr"])


def _inexact_sqrt(oracle: Any, params: Any, i: int) -> None:
    """Roots an ulp too large. (torch's own is off for 17% of values on one processor, for fewer than 1% on another.)"""

    def root(x: torch.Tensor) -> torch.Tensor:
        return torch.nextafter(oracles.rounded_sqrt(x), torch.full_like(x, math.inf))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "sqrt", root)
        patch.setattr(torch.Tensor, "sqrt_", lambda x: x.copy_(root(x)))
        oracle.inner.step()


def _slow_from_the_first_result(oracle: Any, params: Any, i: int) -> None:
    if i == 0:
        oracle.inner.step()
        oracle.steps, oracle.slow = [1], {p: p.detach().clone() for p in params}
    else:
        oracle.step()


@pytest.mark.parametrize(
    ("case_id", "step"),
    [
        pytest.param("sgd", _without_fma, id="sgd-unfused"),
        pytest.param("adam", _inexact_sqrt, id="adam-sqrt"),
        pytest.param("rmsprop-centered", _inexact_sqrt, id="rmsprop-sqrt"),
        pytest.param("lookahead-sgd", _slow_from_the_first_result, id="lookahead-late"),
    ],
)
def test_comparison_rejects_a_wrong_rule(case_id: str, step: Any) -> None:
    (case,) = by_id(case_id)
    with pytest.raises(AssertionError, match="differ"):
        assert_same(_replay(case, step), _want(case))


def test_comparison_tells_zeros_apart_and_equates_nans() -> None:
    assert difference(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not difference(torch.tensor([math.nan, 1.0]), torch.tensor([-math.nan, 1.0]))
    assert difference(torch.tensor([math.nan]), torch.tensor([1.0]))
    assert difference(torch.zeros(1), torch.zeros(1, dtype=torch.float64))


def test_low_precision_oracle_rounds_once() -> None:
    """bf16 SGD with momentum: the parameter moves by the unrounded buffer, the stored buffer is rounded."""
    p = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.bfloat16))
    oracle = oracles.LowPrecision(lambda groups: oracles.TorchLoop("SGD", groups, lr=1.0, momentum=0.9), [p])
    p.grad = torch.tensor([2**-7], dtype=torch.bfloat16)
    oracle.step()
    oracle.step()
    buffer = np.float32(2**-7 * np.float32(0.9)) + np.float32(2**-7)
    assert p.item() == torch.tensor(1 - 2**-7 - buffer).bfloat16().item()
    assert oracle.state[p]["momentum_buffer"].item() == torch.tensor(buffer).bfloat16().item()
    assert oracle.state[p]["momentum_buffer"].dtype == torch.bfloat16
