"""The ceilings: what this machine's memory does for the plainest kernels, on tensors of the largest case's size, and
for the streams of an optimizer with its arithmetic removed (streams.cpp)."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.race import Samples, race
from bench.records import ROOT
from fastopt import memory

NUMEL = 50_000_000
# Per element of fp32: copy_ reads one tensor and writes another, add_ reads and writes the same one, as an optimizer
# does with its state.
BYTES_PER_ELEMENT = 8
COPY = "torch copy_"
STRIPPED = "same streams, no arithmetic"
SOURCE = Path(__file__).with_name("streams.cpp")


class StreamRunner:
    """A kernel on tensors of its own; it needs no preparation."""

    def __init__(self, label: str, run: Callable[[], object], tensors: Sequence[Tensor] = ()) -> None:
        self.label, self.tensors = label, tensors
        self._run = run

    def prepare(self, step: int) -> None:
        pass

    def run(self) -> None:
        self._run()


def measure(seconds: float, numel: int = NUMEL) -> Samples:
    source, target, accumulator = (torch.ones(numel) for _ in range(3))
    runners = [
        StreamRunner(COPY, lambda: target.copy_(source)),
        StreamRunner("torch add_ (read, modify, write)", lambda: accumulator.add_(1.0)),
    ]
    return race(runners, seconds=seconds)


def stripped(states: int, numel: int) -> StreamRunner:
    """g read, p and the states read and written, by as many threads as torch has; the states lie where fastopt's do, on
    huge pages where there are any. Raises RuntimeError where there is no compiler."""
    kernel = _kernel()
    g, p = torch.ones(numel), torch.ones(numel)
    updated = [p, *(memory.zeros_like(p).fill_(1.0) for _ in range(states))]
    pointers = (ctypes.c_void_p * len(updated))(*(tensor.data_ptr() for tensor in updated))

    def run() -> None:
        kernel(ctypes.c_void_p(g.data_ptr()), pointers, len(updated), ctypes.c_int64(numel), torch.get_num_threads())

    return StreamRunner(STRIPPED, run, (g, *updated))


@functools.cache
def _kernel() -> Any:
    """Compiled once, for this processor."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise RuntimeError("no C++ compiler: set CXX")
    text = SOURCE.read_bytes()
    library = ROOT / "build" / "bench" / f"streams-{hashlib.sha256(text).hexdigest()[:12]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        flags = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread"]
        built = subprocess.run([compiler, *flags, str(SOURCE), "-o", str(library)], capture_output=True, text=True)
        if built.returncode:
            raise RuntimeError(f"{compiler} cannot compile {SOURCE.name}: {built.stderr[-1000:]}")
    return ctypes.CDLL(str(library)).streams
