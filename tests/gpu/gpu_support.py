"""Shared by the GPU tests: backends as parameters, traces on the GPU compared with the CPU's, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import CASES, DTYPES, Case
from gpu_presence import ABSENT, DEVICE, REQUIRED
from harness import Built, Scenario, Snapshot, assert_same, difference, snapshot, states_in_order, trace
from torch import Tensor

import fastopt

if ABSENT:  # of every module here that is collected
    pytest.skip(ABSENT, allow_module_level=True)
KERNELS = ("native", "triton" if DEVICE == "cuda" else "emulated")
# The native CPU kernels are held to torch's for-loop by the tests beside this folder.
CPU = "native" if fastopt.backends.available("native") else "reference"


def _unless_available(backend: str) -> list[Any]:
    """With FASTOPT_REQUIRE_GPU=1 nothing is skipped: the constructor then fails with the backend's own reason."""
    if REQUIRED:
        return []
    reason = fastopt.backends.why_not(backend, DEVICE)
    return [pytest.mark.skip(reason=f"{backend} on {DEVICE}: {reason}")] if reason else []


def backends(names: Iterable[str] = KERNELS) -> list[Any]:
    return [pytest.param(b, id=b, marks=_unless_available(b)) for b in names]


needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="a feature of CUDA")
each_backend = pytest.mark.parametrize("backend", backends())


def parametrize(
    cases: Iterable[Case] = CASES, dtypes: Iterable[str] = ("fp32",), names: Iterable[str] = KERNELS
) -> Callable[[Any], Any]:
    """As in cases.py, for the backends on a GPU."""
    rows = [
        pytest.param(case, DTYPES[d], b, id=f"{case.id}-{d}-{b}", marks=_unless_available(b))
        for case in cases
        for d in dtypes
        for b in names
    ]
    return pytest.mark.parametrize(("case", "dtype", "backend"), rows)


def on_cpu(traces: Sequence[Snapshot]) -> list[Snapshot]:
    """Traces brought over in one copy for each dtype and device (`step` may be on the CPU already): one by one, a
    step's tensors take longer than the step."""
    tensors = [t for step in traces for p, states in step for t in (p, *states.values())]
    moved: dict[int, Tensor] = {}
    for kind in {(t.dtype, t.device) for t in tensors}:
        group = [t for t in tensors if (t.dtype, t.device) == kind]
        flat = torch.cat([t.reshape(-1) for t in group]).cpu()
        pieces = flat.split([t.numel() for t in group])
        moved |= {id(t): piece.view(t.shape) for t, piece in zip(group, pieces, strict=True)}
    return [[(moved[id(p)], {k: moved[id(t)] for k, t in s.items()}) for p, s in step] for step in traces]


def cpu_trace(case: Case, scenario: Scenario, dtype: torch.dtype) -> list[Snapshot]:
    key = (case.id, scenario, dtype)
    if key not in _traces:
        if len(_traces) > 3:
            _traces.clear()
        built = Built(scenario, case, dtype)
        _traces[key] = trace(case.make(built.groups, CPU), built)
    return _traces[key]


_traces: dict[Any, list[Snapshot]] = {}


def gpu_trace(optimizer: torch.optim.Optimizer, built: Built) -> list[Snapshot]:
    """Parameters and states after every step, brought to the CPU at the end."""
    result = []
    for step in range(built.scenario.steps):
        built.set_grads(step)
        optimizer.step()
        result.append(snapshot(built.order, states_in_order(optimizer, len(built.order))))
    return on_cpu(result)


def check(case: Case, scenario: Scenario, dtype: torch.dtype, backend: str) -> None:
    """The case takes on the GPU exactly the values it takes on the CPU, and writes nothing beside its parameters."""
    built = Built(scenario, case, dtype, device=DEVICE)
    got = gpu_trace(case.make(built.groups, backend), built)
    order = [s for g in range(len(built.groups)) for s in scenario.specs if s.group == g]
    assert_same(got, cpu_trace(case, scenario, dtype), order)
    built.assert_nothing_else_written()


def wave(numel: int, step: int, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> Tensor:
    """A gradient that has the same bits wherever it is made."""
    return torch.cos(torch.arange(numel, dtype=torch.float64) + 3.0 * step).to(dtype).to(device)


def ramp(numel: int, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.linspace(-1, 1, numel, dtype=torch.float64).to(dtype).to(device))


def tensors_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every parameter and every state tensor, in order."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = states_in_order(optimizer, len(params))
    return [t.detach() for p, s in zip(params, states, strict=True) for t in (p, *s.values()) if isinstance(t, Tensor)]


def assert_equal(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert not (text := difference(a.detach().cpu(), b.detach().cpu())), f"tensor {i}: {text}"


def rate(step: int) -> float:
    """A schedule, in numbers that float32 holds exactly."""
    return 2.0**-7 * (1 + (step % 4) / 4)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises inside."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def side_stream() -> Iterator[None]:
    """A stream of its own inside, after what was asked for before and before what is asked for afterwards."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield
    torch.cuda.current_stream().wait_stream(side)
