"""The ceilings: what this machine's memory does for the plainest kernels, on tensors of the largest case's size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.race import Samples, race

NUMEL = 50_000_000
# Per element of fp32: copy_ reads one tensor and writes another, add_ reads and writes the same one, as an optimizer
# does with its state.
BYTES_PER_ELEMENT = 8


class StreamRunner:
    """A kernel on tensors of its own; it needs no preparation."""

    def __init__(self, label: str, run: Callable[[], Tensor]) -> None:
        self.label = label
        self._run = run

    def prepare(self, step: int) -> None:
        pass

    def run(self) -> None:
        self._run()


def measure(seconds: float, numel: int = NUMEL) -> Samples:
    source, target, accumulator = (torch.ones(numel) for _ in range(3))
    runners = [
        StreamRunner("torch copy_", lambda: target.copy_(source)),
        StreamRunner("torch add_ (read, modify, write)", lambda: accumulator.add_(1.0)),
    ]
    return race(runners, seconds=seconds)
