"""The clocks of a GPU run. Each is a turn of `race`: it prepares and runs one contender's steps and times one of them.

`device` times with CUDA events around steps back to back, gradients staying the same: what a step costs a GPU that
always has work. `wall` times each step with the wait for the device: what a step costs a loop that looks at its result.
`rested` is `wall` after the processor had nothing to do for a while, as in a training whose gradients the device is
computing: its threads have fallen asleep, and its caches have gone to others. `host` times until step() returns: what a
step costs the processor that starts it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch

from bench.race import Runner, Turn

# How long the device is kept busy before the first event, so that the host is ahead of it and no launch is part of the
# time: at first about two milliseconds; for a runner whose host takes longer, as long as that took in its last turn.
# Not more than the most: a host that waits for the device by itself would ask for longer every time.
HEAD_START, MOST = 2e-3, 40e-3
REST = 30e-3  # threads that OpenMP keeps have stopped waiting actively by then
CYCLES = 2_000_000_000  # of a second, or fewer
_head_starts: WeakKeyDictionary[Runner, float] = WeakKeyDictionary()


def device(runner: Runner, first_step: int, steps: int) -> float:
    runner.prepare(first_step)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began = time.perf_counter()
    torch.cuda._sleep(int(_head_starts.get(runner, HEAD_START) * CYCLES))
    start.record()
    for _ in range(steps):
        runner.run()
    end.record()
    _head_starts[runner] = min(MOST, max(HEAD_START, 1.2 * (time.perf_counter() - began)))
    end.synchronize()
    return float(start.elapsed_time(end)) / steps * 1e-3


def wall(runner: Runner, first_step: int, steps: int) -> float:
    return _each(runner, first_step, steps, wait=True)


def rested(runner: Runner, first_step: int, steps: int) -> float:
    return _each(runner, first_step, steps, wait=True, rest=REST)


def host(runner: Runner, first_step: int, steps: int) -> float:
    return _each(runner, first_step, steps, wait=False)


def _each(runner: Runner, first_step: int, steps: int, wait: bool, rest: float = 0.0) -> float:
    elapsed = 0
    for step in range(first_step, first_step + steps):
        runner.prepare(step)
        synchronize()
        time.sleep(rest)
        started = time.perf_counter_ns()
        runner.run()
        if wait:
            synchronize()
        elapsed += time.perf_counter_ns() - started
    return elapsed / steps * 1e-9


def rehearsal(runner: Runner, first_step: int, steps: int) -> float:
    """Stands in for `device` where there is none."""
    runner.prepare(first_step)
    started = time.perf_counter_ns()
    for _ in range(steps):
        runner.run()
    return (time.perf_counter_ns() - started) / steps * 1e-9


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def named(name: str) -> Turn:
    clocks: dict[str, Callable[[Runner, int, int], float]] = {
        "device": device,
        "wall": wall,
        "rested": rested,
        "host": host,
    }
    return rehearsal if name == "device" and not torch.cuda.is_available() else clocks[name]
