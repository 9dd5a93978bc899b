"""Coefficient rows for steps that are counted on a device: one kernel makes them all, and advances the counters.

A rule's formulas arrive as text (`Setting.formulas`), which is compiled as it stands; hyper-parameters are read from
the block of the step, or where they live. `make` deals the parameters of a device out to programs, `Rows` keeps what it
made for as long as nothing changes. A program serves up to `BLOCK` parameters of one setting, one to each thread, and
finds all it needs in `WORK` numbers of the block. What it writes (for each chain that the device may choose, which of
its rows a parameter has, -1 for none, and the row) the kernels of the chains read as they read the host's.

Triton is imported by the functions that need it. Functions below whose arguments carry no annotations run on the
device.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import hashlib
import linecache
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from fastopt.backends.triton import kernels
from fastopt.backends.triton.tables import Bucket, Entry
from fastopt.chain import Chain, bind, tl
from fastopt.setting import DUE, PULL, Formulas, Path, Setting

BLOCK = 32
"""Parameters of a program: one warp, so that the few there are spread over the device."""
WORK = 22
"""Numbers that a program is told: the variant that serves it, where its counters are, how many parameters it has, where
in the block their gradients, the inputs of the formulas and the steps before are, the first one's row, and for each
path of the formulas where the rows go, where the numbers of rows go, and where those of gradients that are astray."""
NAME = "fastopt_rows"
MOST_VARIANTS = 64
"""In one kernel: a rule may put ever new numbers into its text."""
CLEAR = -1
"""The variant of parameters that none of a launch's rows is for."""


def number(x: tl.constexpr):
    return tl.full((), x, tl.float64)


def power(a, b):
    return tl.extra.cuda.libdevice.pow(a, b)


def root(x):
    return tl.sqrt_rn(x)


def remainder(a, b):
    """As Python has it, exact: with the sign of b."""
    r = tl.extra.cuda.libdevice.fmod(a, b)
    return tl.where(r == 0, b * 0, tl.where((r < 0) != (b < 0), r + b, r))


def to_single(x):
    return x.to(tl.float32).to(tl.float64)


def select(condition, a, b):
    return tl.where(condition, a, b)


def opposite(condition):
    return condition == 0


_KERNEL = f"""\
def {NAME}(
    block, doubles, rows, singles, wides, found_inf, work_at, BLOCK: tl.constexpr, WORK: tl.constexpr
):
    at = block + work_at + tl.program_id(0) * WORK
    variant = tl.load(at)
    k = tl.arange(0, BLOCK)
    mask = k < tl.load(at + 2)
    advances = mask
    if found_inf is not None:
        advances = mask & (tl.load(found_inf + tl.zeros_like(k)) == 0)
    if variant == {CLEAR}:
        tl.store(rows + tl.load(at + 8) + k, tl.full([BLOCK], -1, tl.int32), mask)
"""

_CALL = """\
    if variant == {number}:
        variant_{number}(at, k, mask, advances, block, doubles, rows, singles, wides)
"""

_VARIANT = """\
def variant(at, k, mask, advances, block, doubles, rows, singles, wides):
    gradient = tl.load(block + tl.load(at + 3) + k, mask, 0)
    stepped = mask & (gradient != 0)
    inputs = tl.load(at + 4) + tl.zeros_like(k)
    {before}
    {lines}
    first = tl.load(at + 6).to(tl.int32)
    {stores}
"""


def source(
    formulas: Formulas,
    inputs: tuple[torch.dtype | None, ...],
    counters: tuple[torch.dtype, ...],
    compute: torch.dtype,
    astray: bool,
) -> str:
    """The text of a variant: what makes the rows of one setting's parameters.

    `inputs` says which are in tensors, of what dtype; `astray`, whether there are gradients that do not begin at a
    multiple of 16 bytes, for which there are launches of their own.

    Each thread reads its parameter's counters, follows the formulas, and writes the row of the path that is taken. What
    is the same for all is read by all: Triton's interpreter cannot join a truth value of one with those of many.
    """
    before, after = [], []
    for i, (name, dtype) in enumerate(zip(("t", "carry"), counters, strict=False)):
        address = f"tl.load(at + 1).to(tl.pointer_type(tl.int64)) + {len(counters)} * k + {i}"
        before += [
            f"{name}_at = tl.load({address}, mask, 0).to(tl.pointer_type({_type(dtype)}))",
            f"{name} = tl.load({name}_at, stepped, 0).to(tl.float64)",
        ]
        value = "t" if i == 0 else formulas.carried
        after.append(f"tl.store({name}_at, ({value}).to({_type(dtype)}), stepped & advances)")
    if not counters:
        before.append("t = tl.load(doubles + tl.load(at + 5) + k, mask, 0)")
    after_t = "(t + 1.0).to(tl.float32).to(tl.float64)" if counters[:1] == (torch.float32,) else "t + 1.0"
    before.append(f"t = tl.where(stepped, {after_t}, 0.0)")
    for i, (name, held) in enumerate(zip(formulas.inputs, inputs, strict=True)):
        read = f"tl.load(doubles + inputs + {i})"
        if held is not None:
            address = f"tl.load(block + inputs + {i}).to(tl.pointer_type({_type(held)}))"
            read = f"tl.load({address}).to(tl.float64)"
        before.append(f"{name} = {read}")
    narrow, into = ("", "wides") if compute == torch.float64 else (".to(tl.float32)", "singles")
    stores = []
    who = [("active & (gradient % 16 == 0)", 1), ("active & (gradient % 16 != 0)", 2)] if astray else [("active", 1)]
    for j, path in enumerate(formulas.paths):
        to = 7 + 3 * j
        stores += [
            f"active = mask & {path.active}",
            f"row = {into} + tl.load(at + {to}) + k * {len(path.values)}",
            *(f"tl.store(row + {i}, ({value}){narrow}, active)" for i, value in enumerate(path.values)),
            *(
                f"tl.store(rows + tl.load(at + {to + i}) + k, tl.where({taker}, first + k, -1), mask)"
                for taker, i in who
            ),
        ]
    lines = [f"{name} = {text}" for name, text in formulas.lines]
    parts = {"before": before, "lines": lines or ["pass"], "stores": [*stores, *after]}
    return _VARIANT.format(**{key: "\n    ".join(value) for key, value in parts.items()})


def _type(dtype: torch.dtype) -> str:
    return f"tl.{str(dtype).removeprefix('torch.')}"


_DEVICE = (number, power, root, remainder, to_single, select, opposite)


@lru_cache(maxsize=256)
def kernel(variants: tuple[str, ...]) -> Any:
    """The kernel of these variants, whose numbers are their places."""
    names: dict[str, Any] = {"__name__": __name__, "tl": kernels.language()}
    ours: dict[str, Any] = {}
    for function in _DEVICE:
        names[function.__name__] = bind(function, kernels.language(), ours, kernels._jit)
    parts = [text.replace("def variant(", f"def variant_{i}(", 1) for i, text in enumerate(variants)]
    calls = [_CALL.format(number=i) for i in range(len(variants))]
    text = "\n\n".join([*parts, _KERNEL + "".join(calls)])
    file = f"<fastopt rows {hashlib.sha256(text.encode()).hexdigest()[:12]}>"
    linecache.cache[file] = (len(text), None, text.splitlines(True), file)
    exec(compile(text, file, "exec"), names)
    for i in range(len(variants)):
        names[f"variant_{i}"] = kernels._jit(names[f"variant_{i}"])
    return kernels._jit(names[NAME], do_not_specialize=["work_at"], do_not_specialize_on_alignment=["found_inf"])


@dataclass(frozen=True, eq=False)
class Due:
    """What a group's device decides by whether it synchronises: the steps taken, and every how many it does."""

    step: Tensor
    period: int

    def known(self) -> tuple[Any, ...]:
        return self.step.data_ptr(), self.step.dtype, self.step.device, self.period


@dataclass(frozen=True, eq=False)
class Part:
    """What a step does to the entries begin..end of a bucket."""

    begin: int
    end: int
    entries: Sequence[Entry]
    setting: Setting
    asked: bool | Due
    counters: tuple[torch.dtype, ...]
    single: bool

    def known(self) -> tuple[Any, ...]:
        """What its rows' making depends on."""
        due = self.asked if isinstance(self.asked, bool) else self.asked.known()
        where = [(t.data_ptr(), t.dtype) for t in self.setting.tensors]
        fresh = [] if self.counters else [entry.fresh for entry in self.entries]
        return self.begin, self.end, self.setting, due, self.counters, where, fresh

    def elsewhere(self, device: torch.device) -> bool:
        due = [] if isinstance(self.asked, bool) else [self.asked.step]
        return any(tensor.device != device for tensor in (*self.setting.tensors, *due))

    @cached_property
    def formulas(self) -> Formulas:
        return self.setting.formulas(self.single, self.asked if isinstance(self.asked, bool) else None)

    def inputs(self, device: torch.device) -> list[float | Tensor]:
        """The numbers that the formulas name, or the tensors on the device that hold them."""
        due: dict[str, float | Tensor] = {}
        if isinstance(self.asked, Due):
            due = dict(zip(DUE, (self.asked.step, self.asked.period), strict=True))
        found = [due[name] if name in due else self.setting.input(name) for name in self.formulas.inputs]
        return [v.to(device, non_blocking=True) if isinstance(v, Tensor) else float(v) for v in found]


@dataclass
class Job:
    """The parts of one bucket, and where in the block the addresses of its gradients begin."""

    bucket: Bucket
    astray: bool
    """Whether gradients do not begin at multiples of 16 bytes, where everything else does."""
    complete: bool
    """Whether no gradient is missing."""
    grads_at: int
    parts: list[Part]

    def known(self) -> tuple[Any, ...]:
        return self.bucket, self.astray, self.complete, self.grads_at, [part.known() for part in self.parts]


@dataclass
class Start:
    """A launch that reads rows made here: of which bucket and chain, and where its rows and their numbers are."""

    job: Job
    chain: Chain
    first_slot: int
    aligned: bool
    values_at: int
    rows_at: int

    @property
    def idle(self) -> bool:
        """Whether it is known to have nothing to do: what has a gradient is not pulled back without one."""
        return self.chain is PULL and self.job.complete


@dataclass
class Made:
    """What one launch needs to make the rows of a device."""

    variants: list[str]
    work: array[int] = field(default_factory=lambda: array("q"))
    inputs: list[bytes] = field(default_factory=list)
    held: list[Tensor] = field(default_factory=list)
    copied: bool = False
    """Whether some inputs are copies, of what lies on another device and may change there."""
    starts: list[Start] = field(default_factory=list)
    compiled: set[tuple[bool, bool]] = field(default_factory=set)
    """For which of loss scale and overflow flag, absent or not, the kernels of all starts are."""
    size: int = 0
    """Bytes of rows."""

    @property
    def programs(self) -> int:
        return len(self.work) // WORK

    def variant(self, part: Part, held: tuple[torch.dtype | None, ...], job: Job) -> int:
        """The number of the variant that serves a part."""
        formulas, key = part.formulas, (held, part.counters, job.bucket.key.compute, job.astray)
        text = formulas.texts.get(key)
        if text is None:
            text = formulas.texts[key] = source(formulas, *key)
        if text not in self.variants:
            self.variants.append(text)
        return self.variants.index(text)

    def room(self, size: int) -> int:
        at, self.size = self.size, self.size + size + -size % 16
        return at


def make(jobs: Sequence[Job], base: int, variants: list[str]) -> Made:
    """Deal out the parameters of a device.

    `base` is where in the block the inputs are going to be. `variants` that were needed before are compiled again with
    any new one, so that there are no more kernels than variants.
    """
    made = Made(variants)
    at = base
    for job in jobs:
        starts: dict[Chain, list[Start]] = {}
        for part in job.parts:
            formulas = part.formulas
            for path in formulas.paths:
                if path.chain not in starts:
                    starts[path.chain] = _starts(made, job, path)
            inputs = part.inputs(job.bucket.key.device)
            made.held += [value for value in inputs if isinstance(value, Tensor)]
            made.copied |= part.elsewhere(job.bucket.key.device)
            before = [] if part.counters else [0.0 if entry.fresh else 1.0 for entry in part.entries]
            made.inputs.append(_packed([*inputs, *before]))
            held = tuple(value.dtype if isinstance(value, Tensor) else None for value in inputs)
            places = [starts[path.chain] for path in formulas.paths]
            _deal(made, job, part, made.variant(part, held, job), at, at + len(inputs), places)
            at += len(inputs) + len(before)
        for own in starts.values():
            _clear(made, job, own)
            made.starts += own
    return made


def _starts(made: Made, job: Job, path: Path) -> list[Start]:
    """The launches of a chain: one, or beside it one for gradients that are astray."""
    n, size, aligned = len(job.bucket.entries), job.bucket.key.compute.itemsize, job.bucket.key.aligned
    values_at = made.room(n * len(path.values) * size) // size
    return [
        Start(job, path.chain, path.first_slot, well, values_at, made.room(4 * n) // 4)
        for well in ((True, False) if job.astray else (aligned,))
    ]


def _deal(
    made: Made, job: Job, part: Part, variant: int, inputs_at: int, before_at: int, places: list[list[Start]]
) -> None:
    """Programs that serve a part."""
    counters = job.bucket.counters
    for first in range(part.begin, part.end, BLOCK):
        where = 0 if counters is None else counters.data_ptr() + 8 * first * counters.shape[1]
        work = [variant, where, min(part.end - first, BLOCK), job.grads_at + first, inputs_at,
                before_at + first - part.begin, first]  # fmt: skip
        for well, *astray in places:
            values_at = well.values_at + first * len(well.chain.coefficients)
            work += [values_at, well.rows_at + first, astray[0].rows_at + first if astray else 0]
        made.work.extend(work + [0] * (WORK - len(work)))


def _clear(made: Made, job: Job, starts: list[Start]) -> None:
    """Programs for the parameters to which a chain does nothing: no part of theirs has such a path."""
    chain = starts[0].chain
    taken = sorted((p.begin, p.end) for p in job.parts if any(x.chain is chain for x in p.formulas.paths))
    ends = [0, *(end for _, end in taken)]
    begins = [*(begin for begin, _ in taken), len(job.bucket.entries)]
    for begin, end in zip(ends, begins, strict=True):
        for first in range(begin, end, BLOCK):
            for start in starts:
                work = [CLEAR, 0, min(end - first, BLOCK), 0, 0, 0, 0, 0, start.rows_at + first]
                made.work.extend(work + [0] * (WORK - len(work)))


def _packed(inputs: Sequence[float | Tensor]) -> bytes:
    """Eight bytes each: the number, or the address where it is."""
    kinds = "".join("q" if isinstance(value, Tensor) else "d" for value in inputs)
    return struct.pack(kinds, *(value.data_ptr() if isinstance(value, Tensor) else value for value in inputs))


class Rows:
    """What makes the rows of a device, found again only when something has changed."""

    def __init__(self) -> None:
        self._variants: list[str] = []
        self.forget()

    def forget(self) -> None:
        """All that holds tables and states."""
        self._known: Any = None
        self._made = Made(self._variants)

    def made(self, jobs: Sequence[Job], base: int) -> Made:
        known = base, [job.known() for job in jobs]
        if known != self._known or self._made.copied:
            if len(self._variants) >= MOST_VARIANTS:
                self._variants.clear()
            self._known, self._made = known, make(jobs, base, self._variants)
        return self._made
