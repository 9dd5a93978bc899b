"""The ceilings of a GPU run: a copy, and for every rule the same streams with the arithmetic removed.

A step that reads g, reads and writes p and S states cannot be faster than a kernel that only does that. What shape of
kernel does it fastest is found by trying a few; the fastest is the ceiling.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import gpu_clocks
from bench.race import Spread, race
from bench.rules import Streams
from bench.streams import COPY, STRIPPED, StreamRunner

COPY_NUMEL = 500_000_000
# (elements of a block, blocks of a program, warps): 8 elements a thread, 1K to 8K elements a program; and 4 a thread.
SHAPES = ((1024, 1, 4), (1024, 2, 4), (2048, 4, 8), (1024, 1, 8))
UNIT = 8192  # elements; every shape divides it, so the kernel needs no mask


class Stripped:
    """The streams' kernel on memory of its own, as a runner of a race. Without Triton there is none: see `why_not`."""

    label = STRIPPED

    def __init__(self, streams: Streams, numel: int, device: str, shape: tuple[int, int, int] | None = None) -> None:
        self.numel = max(UNIT, numel // UNIT * UNIT)
        dtypes = [streams.parameter] * 2 + [streams.state] * streams.states
        self.tensors = [_values(self.numel, dtype, device) for dtype in dtypes]
        self.streams, self.device = streams, device
        self.shape = shape or fastest_shape(streams, device)

    @property
    def bytes_moved(self) -> int:
        return self.numel * self.streams.bytes_per_element

    def prepare(self, step: int) -> None:
        pass

    def run(self) -> None:
        if self.device != "cuda":
            self._rehearse()
            return
        block, blocks, warps = self.shape
        given: list[Any] = [*self.tensors, *self.tensors[:1] * (3 - self.streams.states)]
        grid = (self.numel // (block * blocks),)
        _kernel()[grid](*given, STATES=self.streams.states, BLOCK=block, BLOCKS=blocks, num_warps=warps)

    def _rehearse(self) -> None:
        g = self.tensors[1]
        for tensor in (self.tensors[0], *self.tensors[2:]):
            torch.sub(g, tensor, out=tensor) if tensor.dtype == g.dtype else tensor.copy_(g - tensor)


def why_not() -> str:
    """Why there is no stripped kernel here; empty if there is."""
    if not torch.cuda.is_available():
        return ""
    try:
        _kernel()
    except ImportError as error:
        return f"the stripped kernels need Triton: {error}"
    return ""


@functools.cache
def _kernel() -> Any:
    return importlib.import_module("bench.gpu_kernels").streams


@functools.cache
def fastest_shape(streams: Streams, device: str, numel: int = 50_000_000) -> tuple[int, int, int]:
    if device != "cuda":
        return SHAPES[0]
    times = {}
    for shape in SHAPES:
        runner = Stripped(streams, numel, device, shape)
        samples = race(
            [runner], seconds=0, least_rounds=5, warm_up=2, steps_per_round=5, turn=gpu_clocks.named("device")
        )
        times[shape] = samples.time(STRIPPED).p50
    return min(times, key=lambda shape: times[shape])


def _values(numel: int, dtype: torch.dtype, device: str) -> Tensor:
    """Random and not zero: zeros draw less power, and a GPU runs faster on them."""
    return torch.empty(numel, dtype=dtype, device=device).normal_()


@dataclass(frozen=True)
class Ceiling:
    time: Spread
    rate: Spread  # GB/s


def measure(runner: Any, bytes_moved: int, rounds: int) -> Ceiling:
    """Rounds of five, after a third as many to warm up."""
    turn = gpu_clocks.named("device")
    samples = race([runner], seconds=0, least_rounds=rounds, warm_up=-(-rounds // 3), steps_per_round=5, turn=turn)
    time = samples.time(runner.label)
    return Ceiling(time, time.reciprocal(bytes_moved * 1e-9))


def copy(device: str, numel: int, rounds: int) -> Ceiling:
    source, target = (_values(numel, torch.float32, device) for _ in range(2))
    run: Callable[[], Tensor] = functools.partial(target.copy_, source)
    return measure(StreamRunner(COPY, run), 8 * numel, rounds)


def add(device: str, numel: int, rounds: int) -> Ceiling:
    accumulator = _values(numel, torch.float32, device)
    return measure(StreamRunner("torch add_ (read, modify, write)", lambda: accumulator.add_(1.0)), 8 * numel, rounds)
