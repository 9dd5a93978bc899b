"""The plan of a Triton optimizer, in Python: what is checked and collected in every step, and what is sent.

`TritonPlan` answers to the calls of ``_C.Plan`` (build, gather, launch): `build` sorts the parameters into buckets and
makes their tables, `gather` compares what is *now* in param_groups, state and ``.grad`` with what the tables say, and
`launch` sends one block of bytes and starts the kernels. Tensors that are not dense, or whose gradient lies otherwise
than they do, go through a strided variant of the same kernel.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from itertools import chain as concatenated
from itertools import compress
from operator import attrgetter, eq, is_, or_
from typing import Any

import torch
from torch import Tensor

from fastopt import routing
from fastopt.backends.amp import NONE, Amp
from fastopt.backends.triton import tables
from fastopt.backends.triton.launch import Addressed, Block, Launcher, Scaler, Start, current
from fastopt.backends.triton.rows import Due, Job, Part
from fastopt.backends.triton.tables import Bucket, Entry, Key, Tile, classify
from fastopt.chain import Chain
from fastopt.rule import FLAGS, to_single
from fastopt.setting import Counts, Flags, Groups, Row, Setting, State

_COUNTERS: dict[torch.dtype, Any] = {
    torch.float32: ctypes.c_float,
    torch.float64: ctypes.c_double,
    torch.int32: ctypes.c_int32,
    torch.int64: ctypes.c_int64,
}


class _SlowCounter:
    """A counter of an unusual dtype."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    @property
    def value(self) -> float:
        return self._tensor.item()

    @value.setter
    def value(self, value: float) -> None:
        self._tensor.fill_(value)


def _counter(tensor: Tensor) -> Any:
    """A counter in host memory. Through ctypes a read costs 0.03 us, through torch an addition costs 1.5."""
    kind = _COUNTERS.get(tensor.dtype)
    return kind.from_address(tensor.data_ptr()) if kind else _SlowCounter(tensor)


@dataclass(eq=False)
class Segment:
    """The entries begin..end of a bucket, all of one parameter group."""

    group: int
    begin: int
    end: int
    steps: list[Any]
    """Counters in host memory; empty where `on_device`, and for rules that count nothing."""
    carries: list[Any]
    single: bool
    """Whether the carries are stored in float32."""
    on_device: bool
    """Whether steps are counted, or a hyper-parameter lies, on the device: the rows are then made there."""
    entries: list[Entry]
    _written: dict[tuple[int, int], list[list[Tensor]]] = field(default_factory=dict)

    @cached_property
    def kinds(self) -> tuple[torch.dtype, ...]:
        return tuple(counter.dtype for counter in self.entries[0].counters)

    def part(self, setting: Setting, asked: Any) -> Part:
        """What a step does to them that is counted on the device."""
        due = Due(*asked) if isinstance(asked, tuple) else bool(asked)
        return Part(self.begin, self.end, self.entries, setting, due, self.kinds, self.single)

    def steps_before(self) -> list[float]:
        """Of entries whose rule counts nothing: whether a step was taken."""
        return [0.0 if entry.fresh else 1.0 for entry in self.entries]

    def written(self, first: int, used: int) -> list[list[Tensor]]:
        """What a step of each entry writes to, when it uses these states."""
        if (first, used) not in self._written:
            self._written[first, used] = [_written(e, first, used) for e in self.entries]
        return self._written[first, used]


def _written(entry: Entry, first: int, used: int) -> list[Tensor]:
    owner = [] if entry.owner is entry.p else [entry.owner]
    return [entry.p, *entry.tensors[first : first + used], *entry.counters, *owner]


@dataclass(eq=False)
class Launch:
    """One chain over one bucket: the row of coefficients of each entry, -1 for those that it leaves alone."""

    chain: Chain
    first_slot: int
    aligned: bool
    rows: array[int]
    coefficients: list[tuple[float, ...]] = field(default_factory=list)
    known: dict[int, int] = field(default_factory=dict)

    def index(self, row: Row) -> int:
        index = self.known.get(id(row))
        if index is None:
            index = self.known[id(row)] = len(self.coefficients)
            self.coefficients.append(row.coefficients)
        return index


@dataclass(eq=False)
class Work:
    """What one step does to one bucket."""

    bucket: Bucket
    pointers: list[int]
    """Of the gradients, 0 where there is none; an empty one has no address and gets 1."""
    present: list[bool] | None
    """None: all."""
    misaligned: list[bool] | None
    """Entries whose gradient is not at a multiple of 16 bytes; None: none of them."""
    launches: dict[tuple[Chain, bool], Launch] = field(default_factory=dict)
    on_device: list[Part] = field(default_factory=list)

    def launch(self, chain: Chain, first_slot: int, aligned: bool) -> Launch:
        found = self.launches.get((chain, aligned))
        if found is None:
            rows = array("i", [-1]) * len(self.pointers)
            found = self.launches[chain, aligned] = Launch(chain, first_slot, aligned, rows)
        return found

    def job(self, grads_at: int) -> Job:
        return Job(self.bucket, self.misaligned is not None, self.present is None, grads_at, self.on_device)

    def has(self, k: int) -> bool:
        return self.present is None or self.present[k]

    def is_aligned(self, k: int) -> bool:
        return self.bucket.key.aligned and not (self.misaligned and self.misaligned[k])


_dtype, _shape, _layout, _grad = attrgetter("dtype"), attrgetter("shape"), attrgetter("layout"), attrgetter("grad")
_local = attrgetter("_local_tensor")


class Memory:
    """Where tensors lie and how, compared on every step; through map(), at a third less than in a loop."""

    def __init__(self, tensors: list[Tensor], counters: list[Tensor]) -> None:
        self._tensors, self._every = tensors, tensors + counters
        self._pointers = [t.data_ptr() for t in self._every]
        self._dtypes = [t.dtype for t in self._every]
        self._strides = [t.stride() for t in tensors]
        self._shapes = [t.shape for t in tensors]
        self._guards: Any = None

    def holds(self) -> bool:
        if list(map(Tensor.data_ptr, self._every)) != self._pointers:
            return False
        if self._guards is not None and self._guards.check(*self._every):
            return True
        found = (
            all(map(is_, map(_dtype, self._every), self._dtypes))
            and all(map(eq, map(Tensor.stride, self._tensors), self._strides))
            and all(map(eq, map(_shape, self._tensors), self._shapes))
            and not any(map(routing.intercepts, self._every))
            and not any(map(Tensor.is_neg, self._every))
        )
        if found and self._guards is None:
            self._guards = _guards(self._every)
        return found


def _guards(tensors: Sequence[Tensor]) -> Any:
    """What says in one pass over tensors, in a fifth of the time, whether they are of the type, the dispatch keys,
    dtype, device, shape and strides that these are of. It holds none of them. "No" may have other reasons, such as
    autocast. None where this torch has no such thing."""
    try:
        from torch._C._dynamo.guards import TensorGuards

        return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    except Exception:  # dynamo's own: it may change with any version
        return None


class GroupSettings:
    """The settings of the parameter groups, looked up again only where a value is another object than it was."""

    def __init__(self, setting_of: Callable[[Mapping[str, Any]], Setting]) -> None:
        self._setting_of = setting_of
        self._known: list[tuple[Setting, tuple[str, ...], list[Any]]] = []

    def of(self, groups: Groups) -> list[Setting]:
        del self._known[len(groups) :]
        for i, group in enumerate(groups):
            if i < len(self._known):
                _, keys, values = self._known[i]
                if all(map(is_, map(group.get, keys), values)):
                    continue
            setting = self._setting_of(group)
            keys = tuple(dict.fromkeys((*setting.rule.hyper, *FLAGS)))
            # What can change in place is looked up every time: no value is the stand-in.
            held = [v if _is_immutable(v) else object() for v in map(group.get, keys)]
            self._known[i : i + 1] = [(setting, keys, held)]
        return [setting for setting, _, _ in self._known]


def _is_immutable(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_immutable, value))
    return value is None or type(value) in (bool, int, float, str)


class TritonPlan(Launcher):
    """The plan of an optimizer whose parameters Triton updates; see `fastopt.plan.PythonPlan` for the calls."""

    def __init__(self, setting_of: Callable[[Mapping[str, Any]], Setting], tile: Tile | None = None) -> None:
        super().__init__()
        self._settings = GroupSettings(setting_of)
        self._tile = tile or tables.TILE
        self._memo: dict[tuple[Any, ...], Row] = {}
        self._params: list[Tensor] = []
        self._counts = [-1]
        self._work: list[Work] = []
        self._updates: list[tuple[list[Any], float]] = []
        self._written: list[Tensor] = []
        self._grads: list[Tensor] = []

    def build(self, groups: Groups, state: State, takes: Flags, rows: Counts, fresh: Flags) -> None:
        self._counts = [-1]  # nothing fits until all is there: memory may run out on the way
        self._forget_kernels()
        self._params = [p for group in groups for p in group["params"]]
        settings = self._settings.of(groups)
        self._layouts = [setting.layout for setting in settings]
        self._waiting: list[Tensor] = []
        entries: list[Entry] = []
        for i, group in enumerate(groups):
            for p, taken, n, new in zip(group["params"], takes[i], rows[i], fresh[i], strict=True):
                if not taken:
                    continue
                entry = _entry(p, i, settings[i], state.get(p, {}), n, new)
                if entry is None:
                    self._waiting.append(p)
                    continue
                classify(entry, p.dtype if p.grad is None else p.grad.dtype, self._tile)
                entries.append(entry)
        self._make_buckets(entries, settings)
        self._record(state)
        self._counts = [len(group["params"]) for group in groups]

    def _make_buckets(self, entries: list[Entry], settings: list[Setting]) -> None:
        by_key: dict[Key, list[Entry]] = {}
        for entry in entries:
            by_key.setdefault(entry.key, []).append(entry)
        self._entries = list(concatenated.from_iterable(by_key.values()))
        self._buckets, self._segments = [], []
        for key, members in by_key.items():
            begin = sum(len(bucket.entries) for bucket in self._buckets)
            self._buckets.append(Bucket(key, members, begin, self._tile))
            kinds = [(e.group, self._on_device(e, settings[e.group]), *(c.dtype for c in e.counters)) for e in members]
            self._segments.append([self._segment(run, members, settings) for run in _runs(kinds)])
            if any(segment.on_device for segment in self._segments[-1]):
                self._buckets[-1].list_counters()

    def _segment(self, run: tuple[int, int], members: list[Entry], settings: list[Setting]) -> Segment:
        own = members[run[0] : run[1]]
        setting = settings[own[0].group]
        on_device = self._on_device(own[0], setting)
        # Without counters there are none; a second one is carried.
        columns: list[list[Any]] = [[e.counters[k] for e in own] for k in range(len(setting.rule.counters))]
        single = len(columns) < 2 or columns[1][0].dtype == torch.float32
        columns = [] if on_device else [[_counter(tensor) for tensor in column] for column in columns]
        steps, carries = [*columns, [], []][:2]
        return Segment(own[0].group, *run, steps, carries, single, on_device, own)

    def _on_device(self, entry: Entry, setting: Setting) -> bool:
        if not entry.counters:
            return setting.symbolic
        device = entry.counters[0].device
        return device.type != "cpu" or (setting.counts_on_device and device == entry.p.device)

    def _record(self, state: State) -> None:
        """What the next steps must find unchanged."""
        entries = self._entries
        self._state_keys = list(state)
        self._state_values = list(state.values())
        self._dicts = [state[p] for p in (*(e.owner for e in entries), *self._waiting) if p in state]
        self._keys = list(concatenated.from_iterable(self._dicts))
        self._values = list(concatenated.from_iterable(map(dict.values, self._dicts)))
        self._memory = Memory([t for e in entries for t in (e.p, *e.tensors)], [t for e in entries for t in e.counters])
        self._owners = [e.owner for e in entries]
        standing_for = [(t, routing.within(t)) for t in (*self._owners, *filter(torch.is_tensor, self._values))]
        self._wrapped = [t for t, local in standing_for if local is not t]
        self._locals = [local for t, local in standing_for if local is not t]
        self._grad_strides = [e.strides for e in entries]
        self._grad_shapes = [e.p.shape for e in entries]
        self._grad_dtypes = [e.key.g for e in entries]
        self._devices = [e.p.get_device() for e in entries]
        self._grad_guards: Any = None
        self._fresh = [e for e in entries if e.fresh]

    def _unchanged(self, groups: Groups, state: State) -> bool:
        """Whether every object is the one the tables were made from, and lies where it lay."""
        if [len(group["params"]) for group in groups] != self._counts or len(state) != len(self._state_keys):
            return False
        return (
            all(map(is_, (p for group in groups for p in group["params"]), self._params))
            and all(map(is_, state, self._state_keys))
            and all(map(is_, state.values(), self._state_values))
            and list(concatenated.from_iterable(self._dicts)) == self._keys
            and all(map(is_, concatenated.from_iterable(map(dict.values, self._dicts)), self._values))
            and all(map(is_, map(_local, self._wrapped), self._locals))
            and self._memory.holds()
        )

    def release(self) -> None:
        TritonPlan.build(self, [], {}, [], [], [])
        self._forget_step()

    def gather(self, groups: Groups, state: State, sync: Sequence[Any] | None) -> bool:
        """Collect this step's work; False when the tables do not fit what is found. Changes nothing."""
        self._forget_step()
        if len(self._memo) > 4096:  # a schedule that never repeats a value must not grow this for ever
            self._memo.clear()
        if not self._unchanged(groups, state) or any(p.grad is not None for p in self._waiting):
            return False
        settings = self._settings.of(groups)
        if any(setting.layout is not layout for setting, layout in zip(settings, self._layouts, strict=True)):
            return False
        pointers = self._gradients()
        if pointers is None:
            return False
        for bucket, segments in zip(self._buckets, self._segments, strict=True):
            work = _bucket_work(bucket, pointers[bucket.begin : bucket.begin + len(bucket.entries)])
            for segment in segments:
                setting = settings[segment.group]
                if segment.on_device != self._on_device(bucket.entries[segment.begin], setting):
                    return False
                self._add(work, segment, setting, False if sync is None else sync[segment.group])
            if work.launches or work.on_device:
                self._work.append(work)
        return True

    def _gradients(self) -> list[int] | None:
        """Addresses of the gradients, 0 for none, 1 for an empty one; None if one does not fit."""
        grads: list[Tensor | None] = list(map(_grad, self._owners))
        if self._wrapped:
            for p in (p for p in self._wrapped if p.grad is not None):
                routing.check_placements(p)
            grads = [None if g is None else routing.within(g) for g in grads]
        present = self._grads = [g for g in grads if g is not None]
        if len(present) == len(grads) and self._grad_guards is not None and self._grad_guards.check(*present):
            pointers = list(map(Tensor.data_ptr, present))
            if min(pointers) >= 1 << 40:
                return pointers
        if not set(map(type, present)) <= {Tensor, torch.nn.Parameter} and any(map(routing.why_not_grad, present)):
            return None
        if not set(map(_layout, present)) <= {torch.strided}:
            return None
        pointers = list(map(Tensor.data_ptr, present))
        # A small number is an offset into storage that was released, or a tensor without memory.
        low = [g for g, pointer in zip(present, pointers, strict=True) if pointer < 1 << 40]
        if any(map(routing.why_not_grad, low)) or any(map(Tensor.is_neg, present)):
            return None
        where = None if len(present) == len(grads) else [i for i, g in enumerate(grads) if g is not None]

        def chosen(expected: list[Any]) -> list[Any]:
            return expected if where is None else [expected[i] for i in where]

        if not (
            all(map(is_, map(_dtype, present), chosen(self._grad_dtypes)))
            and all(map(eq, map(Tensor.stride, present), chosen(self._grad_strides)))
            and all(map(eq, map(_shape, present), chosen(self._grad_shapes)))
            and all(map(eq, map(Tensor.get_device, present), chosen(self._devices)))
        ):
            return None
        if low:
            pointers = [pointer or 1 for pointer in pointers]
        if where is None:
            if present and self._grad_guards is None:
                self._grad_guards = _guards(present)
            return pointers
        found = iter(pointers)
        return [0 if g is None else next(found) for g in grads]

    def _add(self, work: Work, segment: Segment, setting: Setting, asked: Any) -> None:
        """Find what happens to the entries of a segment."""
        a, b = segment.begin, segment.end
        if work.present is not None and not any(work.present[a:b]) and asked is False:
            return
        if segment.on_device:
            work.on_device.append(segment.part(setting, asked))
            everything = segment.written(0, len(setting.slots))
            taken = everything if asked or work.present is None else compress(everything, work.present[a:b])
            self._written += concatenated.from_iterable(taken)
            return
        if isinstance(asked, tuple):
            step, k = asked
            asked = (int(step.item()) + 1) % k == 0  # the engine's `is_due` has decided this before
        steps = [t + 1 for t in ([c.value for c in segment.steps] if segment.steps else segment.steps_before())]
        if max(steps) > 2.0**24 and segment.kinds[:1] == (torch.float32,):
            steps = list(map(to_single, steps))  # where counting stops, as torch's does
        carries = [c.value for c in segment.carries] if segment.carries else [0.0] * (b - a)
        if self._add_alike(work, segment, setting, steps, carries, asked):
            return
        for k in range(b - a):
            has = work.has(a + k)
            if not has and not (asked and setting.rule.slow):
                continue
            row = self._row(setting, steps[k] if has else None, carries[k] if has else 0.0, segment.single, asked)
            launch = work.launch(row.chain, setting.first_slot(row.chain), work.is_aligned(a + k))
            launch.rows[a + k] = launch.index(row)
            written = _written(segment.entries[k], launch.first_slot, len(row.chain.state))
            if has:
                self._updates += [(segment.steps[k : k + 1], steps[k]), (segment.carries[k : k + 1], row.carry)]
            self._written += written if has else written[:2]

    def _add_alike(
        self, work: Work, segment: Segment, setting: Setting, steps: list[float], carries: list[float], asked: bool
    ) -> bool:
        """Add the entries of a segment if all that have a gradient take the same row, and the others no part."""
        a, b = segment.begin, segment.end
        has = None if work.present is None or all(work.present[a:b]) else work.present[a:b]
        if has is not None:
            if asked and setting.rule.slow:
                return False
            if not any(has):
                return True
        counters, second = segment.steps, segment.carries
        if has is not None:
            steps, carries = list(compress(steps, has)), list(compress(carries, has))
            counters, second = list(compress(counters, has)), list(compress(second, has))
        if steps.count(steps[0]) < len(steps) or carries.count(carries[0]) < len(carries):
            return False
        row = self._row(setting, steps[0], carries[0], segment.single, asked)
        first_slot = setting.first_slot(row.chain)
        for aligned, taken in _apart(work, a, b, has):
            launch = work.launch(row.chain, first_slot, aligned)
            index = launch.index(row)
            launch.rows[a:b] = array("i", [index if yes else -1 for yes in taken] if taken else [index] * (b - a))
        self._updates += [(counters, steps[0]), (second, row.carry)]
        written = segment.written(first_slot, len(row.chain.state))
        self._written += concatenated.from_iterable(written if has is None else compress(written, has))
        return True

    def _row(self, setting: Setting, t: float | None, carry: float, single: bool, asked: bool) -> Row:
        key = (setting, t, carry, single, asked)
        row = self._memo.get(key)
        if row is None:
            row = self._memo[key] = setting.at(*key[1:])
        return row

    @torch.no_grad()
    def bind(self, amp: Amp) -> None:
        """Send the gathered work, and compile and load the kernels: all of a launch that can fail, and no change."""
        if amp.scale is not None:
            routing.refuse_shared_memory(self._grads)
            self._written += self._grads
        devices: dict[torch.device, list[Work]] = {}
        for work in self._work:
            devices.setdefault(work.bucket.key.device, []).append(work)
        bound: dict[torch.device, list[Start]] = {}
        for device, works in devices.items():
            with current(device):
                bound[device] = self._send_work(device, works, Scaler(amp, device))
        self._bound_starts = bound

    @torch.no_grad()
    def launch(self, amp: Amp = NONE) -> None:
        """Run the gathered work."""
        try:
            if self._bound_starts is None:
                self.bind(amp)
            self._start_everywhere()
            for counters, value in self._updates:
                for counter in counters:
                    counter.value = value
            for entry in self._fresh:
                entry.fresh = entry.owner.grad is None
            self._fresh = [entry for entry in self._fresh if entry.fresh]
            torch.autograd.graph.increment_version(self._written)
        finally:
            self._forget_step()

    def _forget_step(self) -> None:
        self._work, self._updates, self._written, self._grads, self._bound_starts = [], [], [], [], None

    def _send_work(self, device: torch.device, works: list[Work], scaler: Scaler) -> list[Start]:
        """Send what a step gives to a device; the kernels that are to be started."""
        block = Block()
        grads = [block.add(array("q", work.pointers).tobytes()) // 8 for work in works]
        jobs = [work.job(at) for work, at in zip(works, grads, strict=True) if work.on_device]
        counted = self._add_jobs(device, block, jobs)
        places = [_place(block, work) for work in works]
        sent = self._send(device, block)
        starts: list[Start] = []
        for work, grads_at, launches in zip(works, grads, places, strict=True):
            work.bucket.lend()
            values = sent.values(work.bucket.key.compute)
            for launch, rows_at, values_at in launches:
                starts += self._bound(
                    work.bucket, launch.chain, launch.first_slot, launch.aligned,
                    Addressed(sent.long, grads_at), Addressed(sent.int, rows_at), Addressed(values, values_at), scaler,
                )  # fmt: skip
        if counted is not None:
            starts += self._bound_counted(device, counted, sent, scaler)
        return starts


def _place(block: Block, work: Work) -> list[tuple[Launch, int, int]]:
    """Put a bucket's rows into the block: where the numbers of each launch's rows are, and the coefficients."""
    code = "d" if work.bucket.key.compute == torch.float64 else "f"
    return [
        (launch, block.add(launch.rows.tobytes()) // 4,
         block.add(array(code, concatenated.from_iterable(launch.coefficients)).tobytes()) // array(code).itemsize)
        for launch in work.launches.values()
    ]  # fmt: skip


def _entry(p: Tensor, group: int, setting: Setting, state: Mapping[str, Any], rows: int, fresh: bool) -> Entry | None:
    """The parameter with its state, or None if some of that does not exist."""
    tensors, counters = (
        [routing.within(t) for t in map(state.get, keys) if isinstance(t, Tensor)]
        for keys in (setting.slots, setting.rule.counters)
    )
    if len(tensors) < len(setting.slots) or len(counters) < len(setting.rule.counters):
        return None
    local = routing.within(p)
    for key, counter in zip(setting.rule.counters, counters, strict=True):
        if counter.numel() != 1:
            raise ValueError(
                f"state {key!r} of a parameter of group {group} has {counter.numel()} elements; a counter has one"
            )
        if counter.device.type != "cpu" and counter.device != local.device:
            raise ValueError(
                f"state {key!r} of a parameter of group {group} is on {counter.device}, it on {local.device}; "
                "a counter is on the CPU or where its parameter is"
            )
    for t in (*tensors, *counters):
        if not routing.is_memory(t):
            raise ValueError(
                f"a state of a parameter of group {group} is a {type(t).__name__} that is not plain memory, which is "
                "what the kernels read: replace it by one that is (torch.clone makes one of a view)"
            )
    strides = (local if p.grad is None else routing.within(p.grad)).stride()
    return Entry(p, local, group, tensors, counters, strides, local.numel() // rows if rows else 0, fresh)


def _apart(work: Work, a: int, b: int, has: list[bool] | None) -> Iterator[tuple[bool, list[bool] | None]]:
    """Of the entries a..b with a gradient those that are aligned and those that are not; None for all of them."""
    if work.misaligned is None:
        yield work.bucket.key.aligned, has
        return
    off = work.misaligned[a:b]
    for aligned in (True, False):
        taken = [h and o is not aligned for h, o in zip(has or [True] * (b - a), off, strict=True)]
        if any(taken):
            yield aligned, taken


def _runs(kinds: Sequence[object]) -> Iterator[tuple[int, int]]:
    """Begin and end of each run of equal ones."""
    begin = 0
    for k in range(1, len(kinds) + 1):
        if k == len(kinds) or kinds[k] != kinds[begin]:
            yield begin, k
            begin = k


def _bucket_work(bucket: Bucket, pointers: list[int]) -> Work:
    present = [pointer != 0 for pointer in pointers] if 0 in pointers else None
    misaligned = None
    if bucket.key.aligned and reduce(or_, pointers, 0) & 15:
        # An empty gradient's 1 is no address.
        off = [pointer > 1 and pointer & 15 != 0 for pointer in pointers]
        misaligned = off if any(off) else None
    return Work(bucket, pointers, present, misaligned)
