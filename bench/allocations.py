"""Allocations in the steady state: blocks a step takes from torch's allocator, growth of the C heap over many."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from dataclasses import dataclass

from torch.autograd.profiler import profile

from bench.cases import Workload
from bench.contenders import Contender
from bench.workload import OptimizerRunner, Tensors

WARM_UP = 20
PROFILED = 3


@dataclass(frozen=True)
class Allocations:
    torch_per_step: list[float]
    heap_per_step: float | None


def measure(contender: Contender, workload: Workload, steps: int) -> Allocations:
    runner = OptimizerRunner(contender, Tensors(workload))
    counter = iter(range(WARM_UP + PROFILED + steps))
    _advance(runner, counter, WARM_UP)
    per_step = [_torch_allocations(runner, next(counter)) for _ in range(PROFILED)]
    before = _settled_heap(runner)
    _advance(runner, counter, steps)
    after = _settled_heap(runner)
    growth = (after - before) / steps if before is not None and after is not None else None
    return Allocations(per_step, growth)


def _advance(runner: OptimizerRunner, counter: Iterator[int], steps: int) -> None:
    for _ in range(steps):
        runner.prepare(next(counter))
        runner.run()


def _torch_allocations(runner: OptimizerRunner, step: int) -> float:
    """Blocks that one step takes from torch's CPU allocator, kept or not."""
    runner.prepare(step)
    with profile(profile_memory=True) as session:
        runner.run()
    # The raw events: `session.function_events` folds all allocations of an operator into one sum.
    return float(sum(event.name() == "[memory]" and event.nbytes() > 0 for event in session.kineto_results.events()))


def _settled_heap(runner: OptimizerRunner) -> int | None:
    """Bytes in use on the C heap with no gradient alive; None without mallinfo2 (glibc has it from 2.33)."""
    for p in runner.parameters:
        p.grad = None
    gc.collect()
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        return None
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]
