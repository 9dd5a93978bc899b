"""What a race does not show of a contender: its first step, what a step takes from torch, how exact its results are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import profile
from torch.nn import Parameter

import fastopt
from bench import gpu_clocks
from bench.cases import Case
from bench.contenders import Contender
from bench.peers import ForeachRanger, split
from bench.race import Measurement, agreement
from bench.workload import OptimizerRunner, Tensors

STEPS = 30


def study(case: Case, contenders: Sequence[Contender], device: str = "cpu") -> list[Measurement]:
    """Each alone, from the same beginning, with the same gradients."""
    tensors = Tensors(case.workload, device)
    exact = _exact(case, tensors)
    measured: list[Measurement] = []
    for contender in contenders:
        runner = OptimizerRunner(contender, tensors)
        first = _seconds(runner, 0)
        for step in range(1, STEPS):
            _seconds(runner, step)
        error = agreement(exact, runner.parameters, tensors.initial, STEPS)
        operators, peak = _taken(runner, STEPS)
        measured += [
            (contender.label, "first_step_us", first * 1e6),
            (contender.label, "operators", operators),
            (contender.label, "peak_extra_bytes", peak),
            (contender.label, "rms_error", error.rms),
            (contender.label, "max_error", error.largest),
        ]
    return measured


def _exact(case: Case, tensors: Tensors) -> list[Tensor]:
    """The parameters after as many steps in float64: torch's own, or where it has none, Lookahead in torch's operations
    around torch's Adam, and the transcription of ranger.py."""
    parameters = [Parameter(p.double()) for p in tensors.parameters()]
    name = case.kind.name
    optimizer: Any
    if name == "Lookahead":
        slow, adam = split(case.hyper)
        optimizer = fastopt.Lookahead(torch.optim.Adam(parameters, **adam), **slow)
    else:
        optimizer = (ForeachRanger if name == "Ranger" else getattr(torch.optim, name))(parameters, **case.hyper)
    given = tensors.parameters()
    for step in range(STEPS):
        tensors.give_gradients(given, step)
        for p, q in zip(parameters, given, strict=True):
            p.grad = None if q.grad is None else q.grad.double()
        optimizer.step()
    return [p.detach() for p in parameters]


def _seconds(runner: OptimizerRunner, step: int) -> float:
    runner.prepare(step)
    gpu_clocks.synchronize()
    started = time.perf_counter()
    runner.run()
    gpu_clocks.synchronize()
    return time.perf_counter() - started


def _taken(runner: OptimizerRunner, step: int) -> tuple[float, float]:
    """Operators of torch that a step calls, and the most bytes it holds at once beyond those it found."""
    runner.prepare(step)
    if on_gpu := runner.tensors.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with profile(profile_memory=not on_gpu) as session:
        runner.run()
    called = [e for e in session.function_events if e.name.startswith("aten::") and not _inside(e.cpu_parent)]
    if on_gpu:
        return float(len(called)), float(torch.cuda.max_memory_allocated() - before)
    held = peak = 0
    for event in session.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return float(len(called)), float(peak)


def _inside(parent: Any) -> bool:
    return parent is not None and (parent.name.startswith("aten::") or _inside(parent.cpu_parent))
