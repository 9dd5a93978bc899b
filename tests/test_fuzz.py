"""Random programs (tests/fuzz) in a small, fixed number; `make fuzz` runs ten thousand, `make sanitize` some with
sanitizers. Programs that once failed are kept here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import Case, backends, by_id
from fuzz.program import (
    Copy,
    DropState,
    Edit,
    Grad,
    Group,
    Load,
    Operation,
    Param,
    Program,
    ReplaceState,
    Run,
    Save,
    Step,
    SwapData,
    ThroughTorch,
)
from fuzz.strategies import programs
from hypothesis import HealthCheck, given, note, settings

STEP = Step((Grad(),))


@pytest.mark.contract("fuzz", optimizers="all", backend="all")
@settings(max_examples=150, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs())
def test_programs(program: Program) -> None:
    note(f"\n{program}.run()\n")
    program.run()


def kept(*operations: Operation, case: str, dtype: str = "fp32", **flags: bool) -> Callable[[str], Program]:
    group = Group((Param((4, 5), dtype),))
    return lambda backend: Program(case, backend, (group,), operations, flags=tuple(flags.items()))


FOUND = {
    "slow weights in another layout than the state before them": kept(
        STEP, ReplaceState(0, 0, "transposed"), Step((None,)), case="lookahead-sgd-nesterov"
    ),
    "slow weights of another dtype than the state before them": kept(
        STEP, ReplaceState(0, 0, "contiguous", "bf16"), Step((None,)), STEP, case="lookahead-sgd-nesterov"
    ),
    "slow weights where the last gradient had another layout and dtype": kept(
        Step((Grad(layout="every_other", dtype="fp64"),)), Step((None,)), STEP, case="lookahead-adamw"
    ),
    "mu_product that torch cast to the parameter's dtype": kept(
        STEP, ThroughTorch(), Step((None,)), Save(), STEP, Load(0), STEP, case="nadam", dtype="bf16"
    ),
    "a counter is missing where there is no gradient": kept(
        STEP, DropState(0, "key"), Step((None,)), STEP, case="lookahead-adamw"
    ),
    "groups with and without momentum, pulled back without gradients": lambda backend: Program(
        "lookahead-sgd",
        backend,
        (Group((Param((7,)),), (("momentum", 0.5),)), Group((Param((7,)),))),
        (STEP, STEP, Step((None,)), STEP),
    ),
    "an overflow at the first step of a momentum buffer": kept(
        Step((None,)), Step((Grad(),), amp=(1024.0, True)), STEP, case="sgd-dampening", fused=True
    ),
}


@pytest.mark.contract("fuzz", optimizers="all", backend="triton")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_programs_on_triton() -> None:
    """In its interpreter, which a process decides for before it imports Triton."""
    command = [sys.executable, "-m", "fuzz", "--triton", "--cases", "100"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    assert "0 failures" in run.stdout


@pytest.mark.contract("fuzz")
@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("what", FOUND)
def test_programs_that_failed_once(what: str, backend: str) -> None:
    FOUND[what](backend).run()


@pytest.mark.contract("amp")
@pytest.mark.parametrize("backend", backends(["native", "emulated"]))
@pytest.mark.parametrize("case", by_id("sgd-momentum", "adam"), ids=lambda c: c.id)
def test_an_expanded_gradient_is_not_unscaled(case: Case, backend: str) -> None:
    """Its elements are one: dividing each in place would divide it several times. Nothing has changed then."""
    params = [torch.nn.Parameter(torch.ones(4, 5)) for _ in range(2)]
    optimizer = case.make(params, backend, fused=True)
    for p in params:
        p.grad = torch.full((4, 5), 2.0)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    params[1].grad = torch.full((1, 5), 8.0).expand(4, 5)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    with pytest.raises(RuntimeError, match="share memory"):
        optimizer.step()
    assert all(torch.equal(p.detach(), q) for p, q in zip(params, before, strict=True))
    assert (params[0].grad == 2.0).all()
    assert (params[1].grad == 8.0).all()
    assert all(s["step"] == 1 for s in optimizer.state.values() if "step" in s)


def _nudge(t: torch.Tensor) -> None:
    t.view(-1)[-1] = torch.nextafter(t.view(-1)[-1], torch.tensor(9.0))


SPOILS: dict[str, Callable[[Run], object]] = {
    "a parameter": lambda run: _nudge(run.params[0].data),
    "a state": lambda run: _nudge(run.optimizer.state[run.params[0]]["exp_avg_sq"]),
    "a counter": lambda run: run.optimizer.state[run.params[0]]["step"].add_(1),
    "a state too many": lambda run: run.optimizer.state[run.params[0]].update(max_exp_avg_sq=torch.zeros(7)),
    "a state lost": lambda run: run.optimizer.state[run.params[0]].pop("exp_avg"),
    "memory beside a parameter": lambda run: run.bases[run.params[0]][-1:].zero_(),
    "what was left behind": lambda run: run.kept[0].tensor.zero_(),
}


@pytest.mark.parametrize("what", SPOILS)
def test_the_twin_notices(what: str) -> None:
    """One last place, one byte beside a parameter: nothing of that passes."""
    run = Run(Program("adam", "native", (Group((Param((7,)),)),), ()))
    for operation in (STEP, SwapData(0, "offset3"), STEP):
        operation.apply(run)
        run.check("before")
    SPOILS[what](run)
    with pytest.raises(AssertionError):
        run.check("after")


def test_programs_print_as_what_makes_them() -> None:
    program = Program("adam", "native", (Group((Param((7,)),), (("lr", 0.1),)),), (STEP, Edit(0, 1), Copy("pickle")))
    assert repr(program) == (
        "Program(case='adam', backend='native', groups=(Group(params=(Param(shape=(7,)),), hyper=(('lr', 0.1),)),), "
        "operations=(Step(grads=(Grad(),)), Edit(param=0, state=1), Copy(by='pickle')))"
    )
