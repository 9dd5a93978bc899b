"""The Triton backend where the extension was built, if only for the CPU: the compiled plan does the host's work.

The tables and the kernels are TritonPlan's. What that does tensor by tensor in Python, comparing everything with the
tables, reading gradients, counting, is here the compiled plan's, which takes a fraction of the time; a step then hands
over one block for each device. The rows of steps that are counted on the device are made there, as TritonPlan has them
made. For rules with stages that the extension does not have, and for hyper-parameters on the device of rules that count
nothing, TritonPlan does it all.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastopt import routing
from fastopt.backends import native
from fastopt.backends.amp import NONE, Amp
from fastopt.backends.triton.launch import Addressed, Block, Scaler, Start, current
from fastopt.backends.triton.plan import TritonPlan
from fastopt.backends.triton.rows import Job, Part
from fastopt.backends.triton.tables import Bucket, Tile
from fastopt.chain import Chain
from fastopt.setting import Counts, Flags, Groups, Setting, State, chain_named
from fastopt.turns import Turns

Taken: TypeAlias = "tuple[int, int, bytes, bytes, bytes]"
"""What happens to tensors that take the same chain: its index, the first slot of its states, for each tensor of the
device the number of its row (-1: it takes no part), and the rows in float32 and in float64."""

_MULTIPLES = bytes(range(0, 256, 16))
"""The last bytes that an address has at a multiple of 16."""
_CALLED = "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"
_GIVEN = {"grad_scale", "found_inf", "_drive"}
"""What an optimizer has in its ``__dict__`` when a step is more than the plan's work (csrc/plan_names.h)."""
ENABLED = True
"""For tests of the plan that needs no extension."""


@cache
def _chain(index: int) -> Chain:
    module = native.extension()
    assert module is not None
    return chain_named(module.chain_names()[index])


@dataclass(frozen=True)
class Recipe:
    """The last step of a device, for one that differs from it in nothing but gradients' addresses and coefficients. (Of
    steps that the device counts there is none: what they give to it says nothing of what they find there.)"""

    shape: list[tuple[int, int, bytes, int, int]]
    numbers: list[bytes]
    """Of rows, for each launch: the last parts of the block."""
    starts: list[Start]


def _shape(taken: list[Taken]) -> list[tuple[int, int, bytes, int, int]]:
    return [(chain, slot, numbers, len(f32), len(f64)) for chain, slot, numbers, f32, f64 in taken]


class CompiledPlan(TritonPlan):
    def __init__(
        self,
        setting_of: Callable[[Mapping[str, Any]], Setting],
        names: native.Names,
        turns: Turns,
        tile: Tile | None = None,
    ) -> None:
        super().__init__(setting_of, tile)
        self._turns = turns
        self._core = native.make_core(names, setting_of, None, "external")
        self._counted, self._parts = False, dict[Bucket, list[Part]]()
        self._serves = False
        """Whether the compiled plan takes the steps of the tables that were built last."""
        self._recipes = dict[torch.device, Recipe]()

    def build(self, groups: Groups, state: State, takes: Flags, rows: Counts, fresh: Flags) -> None:
        self._serves = False
        super().build(groups, state, takes, rows, fresh)
        self._parts, self._recipes = {}, {}
        on_device = [segment for segments in self._segments for segment in segments if segment.on_device]
        self._counted = bool(on_device)
        counts = all(segment.entries[0].counters for segment in on_device)
        self._serves = counts and not any(map(native.lacks, self._settings.of(groups)))
        if not self._serves:
            self._core.build([], {}, [], [], [])  # holds nothing
            return
        self._core.build(groups, state, takes, rows, fresh)
        taken = [p for group, own in zip(groups, takes, strict=True) for p, yes in _pairs(group, own) if yes]
        self._on = {device: self._of(device) for device in dict.fromkeys(routing.within(p).device for p in taken)}
        """In the order in which the compiled plan met them; of each, the buckets and where their entries begin."""
        for k, (device, buckets) in enumerate(self._on.items()):
            entries = (entry for bucket, _ in buckets for entry in bucket.entries)
            places = {id(entry.owner): place for place, entry in enumerate(entries)}
            own = [p for p in taken if routing.within(p).device == device]
            waiting = iter(range(len(places), len(own)))  # without state: behind the others
            self._core.arrange(k, [places[id(p)] if id(p) in places else next(waiting) for p in own])

    def release(self) -> None:
        self._serves, self._parts, self._recipes, self._on = False, {}, {}, {}
        self._core.release()
        super().release()

    def _of(self, device: torch.device) -> list[tuple[Bucket, int]]:
        buckets = [bucket for bucket in self._buckets if bucket.key.device == device]
        ends = accumulate(len(bucket.entries) for bucket in buckets)
        return list(zip(buckets, [0, *ends], strict=False))

    @property
    def whole_step(self) -> Callable[[dict[str, Any]], bool] | None:
        """As `native.Plan.whole_step`."""
        return self._step_alone if self._serves else None

    def _step_alone(self, optimizer: dict[str, Any]) -> bool:
        groups, state = optimizer.get("param_groups"), optimizer.get("state")
        hooks = map(optimizer.get, _CALLED)
        if groups is None or state is None or any(found is None or len(found) for found in hooks):
            return False
        if not _GIVEN.isdisjoint(optimizer):
            return False
        with self._turns():
            if not (self._serves and self.gather(groups, state, None)) or self._turns.disturbed:
                return False
            try:
                self.launch()
            finally:
                if self._turns.disturbed:  # the engine's next step lets go of the rest
                    self.release()
        return True

    def gather(self, groups: Groups, state: State, sync: Sequence[Any] | None) -> bool:
        if not self._serves:
            return super().gather(groups, state, sync)
        self._forget_step()
        if not self._core.gather(groups, state, sync):
            return False
        if self._counted:
            settings = self._settings.of(groups)
            self._parts = {
                bucket: [s.part(settings[s.group], sync and sync[s.group]) for s in segments if s.on_device]
                for bucket, segments in zip(self._buckets, self._segments, strict=True)
            }
        return True

    def bind(self, amp: Amp) -> None:
        if not self._serves:
            return super().bind(amp)
        self._grads = self._scaled() if amp.scale is not None else []
        bound: dict[torch.device, list[Start]] = {}
        for k, device in enumerate(self._on):
            with current(device):
                gradients, taken = self._core.taken(k)
                starts = self._send_again(device, gradients, taken) if amp is NONE else None
                if starts is None:
                    starts = self._send_taken(device, gradients, taken, Scaler(amp, device))
                bound[device] = starts
        self._bound_starts = bound
        return None

    def launch(self, amp: Amp = NONE) -> None:
        if not self._serves:
            return super().launch(amp)
        try:
            if self._bound_starts is None:
                self.bind(amp)
            self._start_everywhere()
            self._core.launch([(0, 0, 0)] * len(self._on))
            if self._grads:
                torch.autograd.graph.increment_version(self._grads)
        finally:
            self._forget_step()
        return None

    def _scaled(self) -> list[Tensor]:
        """The gradients, which the kernels divide and write back."""
        grads = [entry.owner.grad for entry in self._entries if entry.owner.grad is not None]
        routing.refuse_shared_memory([routing.within(grad) for grad in grads])
        return grads

    def _send_again(self, device: torch.device, gradients: bytes, taken: list[Taken]) -> list[Start] | None:
        """As in the last step, if nothing but addresses and coefficients has changed since."""
        recipe = self._recipes.get(device)
        if recipe is None or recipe.shape != _shape(taken) or self._any_astray(device, gradients):
            return None
        for bucket, _ in self._on[device]:
            bucket.lend()
        block = Block()
        for part in (gradients, *(rows for own in taken for rows in own[3:]), *recipe.numbers):
            block.add(part)
        self._send(device, block)
        return recipe.starts

    def _send_taken(self, device: torch.device, gradients: bytes, taken: list[Taken], scaler: Scaler) -> list[Start]:
        """Send what a step gives to the tensors of a device; the kernels of every bucket."""
        self._recipes.pop(device, None)
        block = Block()
        grads_at = block.add(gradients)
        counted = self._add_jobs(device, block, self._jobs(device, gradients)) if self._counted else None
        parts = [
            (_chain(chain), first_slot, numbers, block.add(f32), block.add(f64))
            for chain, first_slot, numbers, f32, f64 in taken
        ]
        launches, sent_numbers = [], []
        for bucket, begin in self._on[device]:
            end = begin + len(bucket.entries)
            for chain, first_slot, numbers, f32_at, f64_at in parts:
                for aligned, own in _by_alignment(bucket, gradients[8 * begin : 8 * end], numbers[4 * begin : 4 * end]):
                    values_at = f64_at // 8 if bucket.key.compute == torch.float64 else f32_at // 4
                    launches.append((bucket, chain, first_slot, aligned, begin, block.add(own) // 4, values_at))
                    sent_numbers.append(own)
        sent = self._send(device, block)
        starts: list[Start] = []
        for bucket, chain, first_slot, aligned, begin, numbers_at, values_at in launches:
            bucket.lend()
            values = sent.values(bucket.key.compute)
            grads, rows = Addressed(sent.long, grads_at // 8 + begin), Addressed(sent.int, numbers_at)
            given = chain, first_slot, aligned, grads, rows, Addressed(values, values_at), scaler
            starts += self._bound(bucket, *given)
        if counted is not None:
            starts += self._bound_counted(device, counted, sent, scaler)
        elif scaler.absent and not self._counted and not self._any_astray(device, gradients):
            self._recipes[device] = Recipe(_shape(taken), sent_numbers, starts)
        return starts

    def _any_astray(self, device: torch.device, gradients: bytes) -> bool:
        return any(
            _astray(bucket, gradients[8 * begin : 8 * (begin + len(bucket.entries))])
            for bucket, begin in self._on[device]
        )

    def _jobs(self, device: torch.device, gradients: bytes) -> list[Job]:
        """What a step does to the buckets of a device whose steps are counted there."""
        jobs = []
        for bucket, begin in self._on[device]:
            own = gradients[8 * begin : 8 * (begin + len(bucket.entries))]
            taken = [
                part for part in self._parts[bucket] if part.asked or own[8 * part.begin : 8 * part.end].strip(b"\0")
            ]
            if taken:
                bucket.lend()
                jobs.append(Job(bucket, _astray(bucket, own), 0 not in array("q", own), begin, taken))
        return jobs


def _astray(bucket: Bucket, gradients: bytes) -> bool:
    """Whether some gradients begin elsewhere than all the rest of their bucket, at a multiple of 16."""
    return bucket.key.aligned and bool(gradients[::8].translate(None, _MULTIPLES))  # 1,000 in 3 µs; torch takes 37


def _by_alignment(bucket: Bucket, gradients: bytes, numbers: bytes) -> Iterator[tuple[bool, bytes]]:
    """The rows' numbers of one chain, and apart from the others those of tensors with misaligned gradients."""
    if not numbers.strip(b"\xff"):  # -1 is nobody's number
        return
    if not _astray(bucket, gradients):
        yield bucket.key.aligned, numbers
        return
    rows = torch.frombuffer(bytearray(numbers), dtype=torch.int32)
    astray = (torch.frombuffer(bytearray(gradients), dtype=torch.int64) & 15 != 0) & (rows >= 0)
    if not astray.any():
        yield True, numbers
        return
    for aligned in (True, False):
        own = rows.masked_fill(astray == aligned, -1)
        if (own >= 0).any():
            yield aligned, ctypes.string_at(own.data_ptr(), own.nbytes)


def _pairs(group: Mapping[str, Any], takes: Sequence[bool]) -> Iterator[tuple[Tensor, bool]]:
    return zip(group["params"], takes, strict=True)
