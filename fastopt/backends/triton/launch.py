"""How a Triton plan reaches a device: one block of bytes a step, and the kernels that read it.

Triton is imported by the first function that needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from fastopt.backends.amp import Amp
from fastopt.backends.triton import kernels
from fastopt.backends.triton import rows as making
from fastopt.backends.triton.rows import Job, Made, Rows
from fastopt.backends.triton.tables import Bucket, Channel, Sent
from fastopt.chain import Chain
from fastopt.setting import PULL

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Addressed:
    """An argument of a kernel: a tensor, and at which of its elements what is meant begins."""

    tensor: Tensor
    at: int


class Scaler:
    """A loss scale and an overflow flag on the device that reads them."""

    def __init__(self, amp: Amp, device: torch.device) -> None:
        self.scale, self.found_inf = _on(amp.scale, device), _on(amp.found_inf, device)

    @property
    def absent(self) -> bool:
        return self.scale is None and self.found_inf is None


def _on(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device=device, dtype=torch.float32, non_blocking=True).reshape(())


class Block:
    """The bytes of one step, in parts at multiples of 16 bytes."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.size = 0

    def add(self, part: bytes) -> int:
        at, padding = self.size, -len(part) % 16
        self.parts += [part, bytes(padding)]
        self.size += len(part) + padding
        return at


class Ready:
    """A kernel as it is started again and again, with the same constants, on the same device.

    Triton looks at every argument of a launch to find out which compiled kernel it needs (24 µs of Python where the
    rest of a launch takes 3, with Triton 3.6 and all caches warm). That depends on types and constants, which are the
    same here, on which tensors are None, and on whether memory begins at a multiple of 16, which all from torch's
    allocator does that is not said otherwise. So what was compiled for the first launch is started directly.
    """

    def __init__(self, name: str, device: torch.device, kernel: Any, constants: tuple[Any, ...], warps: int) -> None:
        self._where = f"the Triton kernel {name} failed on {device}"
        self._kernel, self._constants = kernel, constants
        self._options = {"num_warps": warps, **kernels.OPTIONS}
        self._compiled: dict[tuple[bool, ...], Any] = {}

    def bound(self, programs: int, *arguments: Any) -> Callable[[], Any]:
        """What starts it with these arguments, which like the constants are in the kernel's order."""
        compiled = self.compiled(programs, *arguments)
        with self._named():
            if compiled is None:
                return partial(self._kernel[programs, 1, 1], *arguments, *self._constants, **self._options)
            return partial(compiled[programs, 1, 1], *arguments, *self._constants)  # which loads it

    def start(self, bound: Callable[[], Any]) -> None:
        try:  # a context manager would be another microsecond of every launch
            bound()
        except Exception as error:
            raise self._error(error) from error

    @contextmanager
    def _named(self) -> Iterator[None]:
        """An error inside says of which kernel it is."""
        try:
            yield
        except Exception as error:
            raise self._error(error) from error

    def _error(self, error: Exception) -> RuntimeError:
        return RuntimeError(f"{self._where}: {error}")

    def compiled(self, programs: int, *arguments: Any) -> Any:
        """What the kernel was compiled to for such arguments; None in the interpreter, which compiles nothing."""
        absent = tuple([argument is None for argument in arguments])
        found = self._compiled.get(absent)
        if found is None:
            with self._named():
                found = self._kernel.warmup(*arguments, *self._constants, grid=(programs, 1, 1), **self._options)
                if hasattr(found, "result"):  # in triton.AsyncCompileMode it is still being compiled
                    found = found.result()
            self._compiled[absent] = found
        return found


Start: TypeAlias = "tuple[Ready, Callable[[], Any]]"
"""A kernel, and what starts it."""

Update: TypeAlias = "tuple[Bucket, Chain, int, bool, Addressed, Addressed, Addressed, Scaler]"
"""A chain over a bucket: with the first slot of its states, whether all is aligned, where the gradients' addresses, the
numbers of rows and the rows are, and what scales."""


@dataclass(frozen=True)
class Counted:
    """What makes the rows of steps that a device counts, and where in the block its programs' work begins."""

    made: Made
    work_at: int


def current(device: torch.device) -> Any:
    """The device as the current one, for Triton launches on that."""
    same = device.type != "cuda" or device.index == torch.cuda.current_device()
    return nullcontext() if same else torch.cuda.device(device)


class Launcher:
    """Channels to devices, and what captured graphs read; whose plan it is says what to send and what to start."""

    def __init__(self) -> None:
        self._channels: dict[torch.device, Channel] = {}
        self._buckets: list[Bucket] = []
        self._rows: dict[torch.device, Rows] = {}
        self._ready: dict[Hashable, Ready] = {}
        self._captured: list[list[Bucket]] = []  # what CUDA graphs read at every replay
        self._captured_inputs: list[list[Tensor]] = []  # and of hyper-parameters
        self._captured_kernels: list[dict[Hashable, Ready]] = []  # Triton unloads what nobody holds
        self._bound_starts: dict[torch.device, list[Start]] | None = None  # of a step that is about to be launched
        self.launches = 0
        """How many kernels the last step launched."""

    def _forget_kernels(self) -> None:
        """Those of the tables that there were, and what knows them and, through them, states."""
        for made in self._rows.values():
            made.forget()
        if self._captured and self._captured[-1] is self._buckets:
            self._captured_kernels.append(self._ready)
        self._ready = {}

    def _send(self, device: torch.device, block: Block) -> Sent:
        """The block of a step on its device. What a graph that is being captured reads is kept."""
        channel = self._channels.get(device)
        if channel is None:
            channel = self._channels[device] = Channel(device)
        sent = channel.send(b"".join(block.parts))
        if channel.capturing and (not self._captured or self._captured[-1] is not self._buckets):
            self._captured.append(self._buckets)
        return sent

    def _add_jobs(self, device: torch.device, block: Block, jobs: list[Job]) -> Counted | None:
        """Put what makes the rows of counted steps into the block."""
        if not jobs:
            return None
        made = self._rows.setdefault(device, Rows()).made(jobs, block.size // 8)
        block.add(b"".join(made.inputs))
        return Counted(made, block.add(made.work.tobytes()))

    def _bound_counted(self, device: torch.device, counted: Counted, sent: Sent, scaler: Scaler) -> list[Start]:
        """The kernel that makes rows and counts, and those that read them; all of them are compiled."""
        made = counted.made
        memory = self._channels[device].scratch(made.size)
        starts: list[Update] = []
        for start in made.starts:
            job, values = start.job, memory.values(start.job.bucket.key.compute)
            starts.append((
                job.bucket, start.chain, start.first_slot, start.aligned,
                Addressed(sent.long, job.grads_at), Addressed(memory.int, start.rows_at),
                Addressed(values, start.values_at), scaler,
            ))  # fmt: skip
        kind = scaler.scale is None, scaler.found_inf is None
        if kind not in made.compiled:
            made.compiled.add(kind)
            for arguments in starts:
                for ready, given in self._launches(*arguments):
                    ready.compiled(*given)
        bound = [self._bound_rows(device, made, sent, memory, counted.work_at, scaler)]
        for start, arguments in zip(made.starts, starts, strict=True):
            if not start.idle:
                bound += self._bound(*arguments)
        return bound

    def _bound_rows(
        self, device: torch.device, made: Made, sent: Sent, memory: Sent, work_at: int, scaler: Scaler
    ) -> Start:
        if self._channels[device].capturing:
            self._captured_inputs.append(made.held)
        kernel = making.kernel(tuple(made.variants))
        ready = self._ready.get((device, kernel.fn))
        if ready is None:
            constants = making.BLOCK, making.WORK
            ready = self._ready[device, kernel.fn] = Ready(making.NAME, device, kernel, constants, 1)
        given = sent.long, sent.float64, memory.int, memory.float32, memory.float64, scaler.found_inf, work_at // 8
        return ready, ready.bound(made.programs, *given)

    def _bound(self, *update: Unpack[Update]) -> list[Start]:
        """The kernels that run a chain over a bucket, compiled and loaded: what can fail has then not."""
        return [(ready, ready.bound(*given)) for ready, given in self._launches(*update)]

    def _start_everywhere(self) -> None:
        """Start kernels device by device, when those of all of them are compiled."""
        bound, self._bound_starts, self.launches = self._bound_starts, None, 0
        for device, starts in (bound or {}).items():
            with current(device):
                for ready, start in starts:
                    ready.start(start)
            self.launches += len(starts)

    def _launches(
        self,
        bucket: Bucket,
        chain: Chain,
        first_slot: int,
        aligned: bool,
        grads: Addressed,
        rows: Addressed,
        coefficients: Addressed,
        scaler: Scaler,
    ) -> Iterator[tuple[Ready, tuple[Any, ...]]]:
        """The kernels that run a chain over a bucket, one after the other, and what they are given."""
        if not bucket.programs:
            return
        tables = bucket.programs, bucket.table, bucket.items, grads.tensor, rows.tensor
        if bucket.key.mean == kernels.SPLIT and chain is not PULL:
            summing = self._ready.get((bucket, aligned))
            if summing is None:
                summing = self._ready[bucket, aligned] = _summing(bucket, aligned)
            yield summing, (*tables, bucket.partials, scaler.scale, grads.at, rows.at)
        ready = self._ready.get((bucket, chain, first_slot, aligned))
        if ready is None:
            ready = self._ready[bucket, chain, first_slot, aligned] = _ready(bucket, chain, first_slot, aligned)
        given = coefficients.tensor, bucket.partials, scaler.scale, scaler.found_inf
        yield ready, (*tables, *given, grads.at, rows.at, coefficients.at)


def _ready(bucket: Bucket, chain: Chain, first_slot: int, aligned: bool) -> Ready:
    key, types, pulls = bucket.key, _types(), chain is PULL
    states = [types[dtype] for dtype in key.states[first_slot : first_slot + len(chain.state)]]
    constants = (
        types[key.compute], types[key.p], None if pulls else types[key.g], *states, first_slot, aligned, key.rank,
        bucket.width, kernels.FLAT if pulls else key.mean, bucket.chunk, bucket.tile.elements(key),
    )  # fmt: skip
    return Ready(kernels.name(chain), key.device, kernels.kernel(chain), constants, bucket.tile.warps)


def _summing(bucket: Bucket, aligned: bool) -> Ready:
    key, types = bucket.key, _types()
    shape = aligned, key.rank, bucket.width, bucket.chunk, bucket.tile.elements(key)
    return Ready(
        "sum_slices", key.device, kernels.sums(), (types[key.compute], types[key.g], *shape), bucket.tile.warps
    )


@cache
def _types() -> dict[torch.dtype, Any]:
    import triton.language as tl

    return {
        torch.float32: tl.float32,
        torch.float64: tl.float64,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
    }
