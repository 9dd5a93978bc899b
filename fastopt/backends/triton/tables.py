"""What the Triton kernels read beside the tensors: static tables, and the block that every step sends anew.

A `Bucket` holds the parameters that one launch can update: same device, same dtypes, same kind of memory. Its table
and its map of work items lie in device memory and stay as long as the plan. A `Channel` carries one block of bytes per
step and device (gradient addresses, row indices, coefficients), in one asynchronous copy from pinned memory that is not
written to again before the copy has happened.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastopt.backends import native
from fastopt.backends.triton import kernels


@dataclass(frozen=True)
class Tile:
    """The shape of a launch: elements per work item, elements that a program loads at a time, and its warps.

    A thread must have an element of its own: of copies, one could be read after another was updated and written.
    """

    chunk: int = 2048
    block: int = 1024
    warps: int = 4
    longest: int = 32768
    """Elements of a slice that one program sums and updates; longer ones are cut into chunks and summed before."""

    def length(self, key: Key) -> int:
        """Elements per work item: `chunk` of four bytes. (8 KB of the widest stream: of the lengths tried on an H200
        none takes less time, see bench/results/tuning.csv.)"""
        return self.chunk * 4 // max(dtype.itemsize for dtype in (key.p, *key.states))

    def elements(self, key: Key) -> int:
        """What a program loads at a time: float64 and strided addresses take twice and more the registers."""
        if key.rank:
            return max(16, self.block // 4)
        return max(16, self.block // 2) if key.p == torch.float64 else self.block


TILE = Tile()
"""The shape of every launch of plans made from now on."""


@dataclass(frozen=True)
class Key:
    """What the parameters of a bucket have in common."""

    device: torch.device
    p: torch.dtype
    g: torch.dtype
    states: tuple[torch.dtype, ...]
    aligned: bool
    """p and states lie at multiples of 16 bytes, and so does every item of theirs."""
    rank: int
    """0: all streams share one dense layout. Else the number of dimensions that the kernel walks."""
    mean: int
    """FLAT, ROWS or SPLIT."""

    @property
    def compute(self) -> torch.dtype:
        return torch.float64 if self.p == torch.float64 else torch.float32


@dataclass(eq=False)
class Entry:
    """One parameter with complete state."""

    owner: Tensor
    """What is in the group: p, or the DTensor whose local shard p is."""
    p: Tensor
    group: int
    tensors: list[Tensor]
    """State in the order of the setting's slots."""
    counters: list[Tensor]
    strides: tuple[int, ...]
    """Of its gradient."""
    slice: int
    """Elements of a leading slice whose mean is subtracted; 0: no centralisation."""
    fresh: bool
    key: Key = field(init=False)
    sizes: list[int] = field(init=False, default_factory=list)
    walks: list[list[int]] = field(init=False, default_factory=list)


def classify(entry: Entry, gradient: torch.dtype, tile: Tile) -> None:
    """Find the bucket of an entry, and how its memory is walked."""
    p, tensors = entry.p, entry.tensors
    streams = [p.stride(), entry.strides, *(t.stride() for t in tensors)]
    rank = 0
    if p.numel() and not (p.is_contiguous() and streams.count(streams[0]) == len(streams)):  # as they mostly are
        sizes, walks = coalesce(p.shape, streams)
        together = walks.count(walks[0]) == len(walks) and _is_dense(p) and (not entry.slice or _leads(p))
        rank = 0 if together else 1 << max(0, len(sizes) - 1).bit_length()
        if rank:
            padding = rank - len(sizes)
            entry.sizes = sizes[::-1] + [1] * padding
            entry.walks = [walk[::-1] + [0] * padding for walk in walks]
    smallest = min(gradient.itemsize, *(t.element_size() for t in (p, *tensors)))
    mean = kernels.FLAT if not entry.slice else kernels.ROWS if entry.slice <= tile.longest else kernels.SPLIT
    aligned = rank == 0 and entry.slice * smallest % 16 == 0 and all(t.data_ptr() % 16 == 0 for t in (p, *tensors))
    entry.key = Key(p.device, p.dtype, gradient, tuple(t.dtype for t in tensors), aligned, rank, mean)


def coalesce(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """The fewest dimensions in which all streams visit the same elements in the same order: sizes and strides."""
    sizes: list[int] = []
    walks: list[list[int]] = [[] for _ in strides]
    for d, n in enumerate(shape):
        if n == 1:
            continue
        if sizes and all(walk[-1] == n * stride[d] for walk, stride in zip(walks, strides, strict=True)):
            sizes[-1] *= n
            for walk, stride in zip(walks, strides, strict=True):
                walk[-1] = stride[d]
            continue
        sizes.append(n)
        for walk, stride in zip(walks, strides, strict=True):
            walk.append(stride[d])
    return sizes, walks


def _is_dense(t: Tensor) -> bool:
    """Whether the elements of t fill the memory between its first and its last."""
    return sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1 == t.numel()


def _leads(t: Tensor) -> bool:
    """Whether the leading slices of a dense t follow each other in memory."""
    return t.shape[0] == 1 or t.stride(0) * t.shape[0] == t.numel()


@dataclass(eq=False)
class Bucket:
    """Parameters updated by the same launches, and what their kernels read that does not change from step to step."""

    key: Key
    entries: list[Entry]
    begin: int
    """Where they begin among all entries of the plan."""
    tile: Tile
    table: Tensor = field(init=False)
    items: Tensor = field(init=False)
    partials: Tensor = field(init=False)
    counters: Tensor | None = field(init=False, default=None)
    """The addresses of each entry's counters, where a device counts steps."""
    programs: int = field(init=False)
    chunk: int = field(init=False)
    width: int = field(init=False)
    stream: int = field(init=False)
    """Where its memory belongs, see `lend`."""

    @torch.inference_mode(False)  # steps outside it read and write these too
    def __post_init__(self) -> None:
        key, entries = self.key, self.entries
        self.width = kernels.SIZES + key.rank * (3 + len(key.states))
        lengths = torch.tensor([e.p.numel() for e in entries], device="cpu")
        self.chunk = self.tile.length(key)
        counts = self._counts(lengths)
        first = counts.cumsum(0) - counts
        rows = [
            [e.p.data_ptr(), *(t.data_ptr() for t in e.tensors), *[0] * (kernels.LENGTH - 1 - len(e.tensors)),
             e.p.numel(), e.slice, at, *e.sizes, *(stride for walk in e.walks for stride in walk)]
            for e, at in zip(entries, first.tolist(), strict=True)
        ]  # fmt: skip
        # Items are numbered tensor by tensor; the largest tensors start first, so that the last programs are short.
        order = torch.argsort(lengths, descending=True, stable=True) if key.mean != kernels.SPLIT else None
        self.items = _sent(item_map(counts, order), key.device)
        self.programs = int(counts.sum())
        self.table = _sent(torch.tensor(rows, dtype=torch.int64, device="cpu"), key.device)
        split = key.mean == kernels.SPLIT
        self.partials = torch.empty(2 * self.programs if split else 2, dtype=torch.float64, device=key.device)
        self.stream = stream_of(key.device)
        assert self.chunk % 16 == 0

    def lend(self) -> None:
        """Kernels on the current stream are about to read the tables."""
        if stream_of(self.key.device) != self.stream:
            lend(self.table, self.items, self.partials, *([] if self.counters is None else [self.counters]))

    def list_counters(self) -> None:
        addresses = [[c.data_ptr() for c in e.counters] for e in self.entries]
        self.counters = _sent(torch.tensor(addresses, dtype=torch.int64, device="cpu"), self.key.device)

    def _counts(self, lengths: Tensor) -> Tensor:
        """How many work items each entry has."""
        chunk = self.chunk
        if self.key.mean == kernels.FLAT:
            return (lengths + chunk - 1) // chunk
        slices = torch.tensor([max(1, e.slice) for e in self.entries], device="cpu")
        rows = lengths // slices
        return rows if self.key.mean == kernels.ROWS else rows * ((slices + chunk - 1) // chunk)


def _sent(host: Tensor, device: torch.device) -> Tensor:
    return native.pinned(host, device).to(device, non_blocking=True)


def item_map(counts: Tensor, order: Tensor | None = None) -> Tensor:
    """Pairs (tensor, part), tensor by tensor; `order` says in which order the tensors come."""
    order = torch.arange(len(counts), device="cpu") if order is None else order
    counts = counts[order]
    tensor = torch.repeat_interleave(order, counts)
    part = torch.arange(len(tensor), device="cpu") - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return torch.stack([tensor, part], 1).to(torch.int32)


def stream_of(device: torch.device) -> int:
    """The current stream as a number."""
    return 0 if device.type != "cuda" else int(torch._C._cuda_getCurrentRawStream(device.index))


def lend(*tensors: Tensor) -> None:
    """Tell the allocator of another stream: it gives freed memory to the one it was allocated on without asking."""
    for tensor in tensors:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))


class Sent:
    """The block in device memory, and the same memory as numbers."""

    def __init__(self, memory: Tensor) -> None:
        self.bytes = memory
        self.long, self.int = memory.view(torch.int64), memory.view(torch.int32)
        self.float32, self.float64 = memory.view(torch.float32), memory.view(torch.float64)

    def values(self, compute: torch.dtype) -> Tensor:
        return self.float64 if compute == torch.float64 else self.float32


class Staging:
    """Pinned memory for a block on its way, and an event after the copy: it is not written to again before.

    The views that a copy goes from and to are kept: blocks of one length after the other are the rule.
    """

    def __init__(self, memory: Tensor, event: Any) -> None:
        self.event = event
        self.memory, self._address = memory, memory.data_ptr()
        self._from = self._to = self._target = memory
        self._length = -1

    def copy(self, block: bytes, target: Tensor) -> None:
        n = len(block)
        if self._target is not target or self._length != n:
            self._from, self._to, self._target, self._length = self.memory[:n], target[:n], target, n
        ctypes.memmove(self._address, block, n)
        self._to.copy_(self._from, non_blocking=True)


class Channel:
    """Sends a block of bytes to a device, in stream order.

    Ring slots are guarded by events. What a CUDA graph captures is read again at every replay, so there each block gets
    a slot of its own, made beforehand (memory must not be pinned during capture) and kept.
    """

    SLOTS, SPARE = 3, 2

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cuda = device.type == "cuda"
        self._capacity = 0
        self._next = 0
        self._ring: list[Staging] = []
        self._spare: list[Tensor] = []
        self._kept: list[Any] = []
        self.capturing = False
        self._stream = 0
        self._known: tuple[int, Any] = -1, None
        self.sent = Sent(torch.empty(0, dtype=torch.uint8, device="cpu"))
        self._scratch, self._scratch_stream = self.sent, 0

    def send(self, block: bytes) -> Sent:
        """The block in device memory; the same memory every time, unless the block has outgrown it."""
        capturing = self.capturing = self._cuda and torch.cuda.is_current_stream_capturing()
        if len(block) > self._capacity:
            self._check_growth()
            self._grow(len(block))
        if capturing:
            if not self._spare:
                raise RuntimeError(
                    f"more than {self.SPARE} optimizer steps were captured in CUDA graphs since the last step outside "
                    "of one: run a step between the captures"
                )
            slot = Staging(self._spare.pop(), None)
            self._kept.append((slot, self.sent))
        else:
            self._refill()
            slot = self._ring[self._next]
            self._next = (self._next + 1) % len(self._ring)
            if slot.event is not None and not slot.event.query():
                slot.event.synchronize()
        stream = stream_of(self.device)
        if stream != self._stream:
            lend(self.sent.bytes)
        slot.copy(block, self.sent.bytes)
        if not capturing and slot.event is not None:
            slot.event.record(self._current(stream))
        return self.sent

    def _current(self, stream: int) -> Any:
        """The current stream, whose number this is: to ask torch for it takes 8 µs."""
        if stream != self._known[0]:
            self._known = stream, torch.cuda.current_stream(self.device)
        return self._known[1]

    def scratch(self, n: int) -> Sent:
        """Memory of n bytes that the kernels of the block sent last write and read among themselves."""
        if n > self._scratch.bytes.numel():
            self._check_growth()
            self._scratch = Sent(_memory(_roomy(n), self.device))
            self._scratch_stream = stream_of(self.device)
        if self.capturing and self._scratch not in self._kept:
            self._kept.append(self._scratch)
        if stream_of(self.device) != self._scratch_stream:
            lend(self._scratch.bytes)
        return self._scratch

    def _check_growth(self) -> None:
        if self.capturing:
            raise RuntimeError(
                "a CUDA graph is being captured, and this step sends more to the device than any before (more rows of "
                "coefficients, or other stages): run such a step before capturing"
            )

    def _grow(self, n: int) -> None:
        self._capacity = _roomy(n)
        self.sent = Sent(_memory(self._capacity, self.device))
        self._stream = stream_of(self.device)
        event: Callable[[], Any] = torch.cuda.Event if self._cuda else lambda: None
        self._ring = [Staging(self._host(), event()) for _ in range(self.SLOTS)]
        self._spare = []

    def _refill(self) -> None:
        while self._cuda and len(self._spare) < self.SPARE:
            self._spare.append(self._host())

    def _host(self) -> Tensor:
        return _memory(self._capacity, "cpu", pin_memory=self._cuda)


@torch.inference_mode(False)
def _memory(n: int, device: torch.device | str, **kwargs: Any) -> Tensor:
    """Bytes that can be written again outside inference mode, whoever needs them first."""
    return torch.empty(n, dtype=torch.uint8, device=device, **kwargs)


def _roomy(n: int) -> int:
    """Bytes for n and for more of them later."""
    return max(4096, 2 * n + -2 * n % 16)
