"""The GPU run: every selected job, one after the other, as measurements that `records` turns into rows.

Both of fastopt's GPU backends race in every case, each against the rivals and against the streams it cannot do without
(gpu_streams). A rival that cannot do the work is left out and said; one of ours that cannot is a failure. A run on CPU
tensors of a thousandth of the size (`rehearse`) takes the same paths and measures nothing.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from bench import gpu_clocks, gpu_streams, training
from bench.cases import Workload, matches, tensors
from bench.contenders import OURS, Contender, ours, rivals
from bench.cpu import Job, UnableError, agreement_rows
from bench.gpu_cases import GPU_CASES, STUDIES, GpuCase
from bench.gpu_streams import COPY, STRIPPED, Stripped
from bench.race import Agreement, Measurement, Runner, Samples, agreement, race
from bench.rules import MIXES, RULES, Streams
from bench.study import study
from bench.workload import OptimizerRunner, Tensors

TRITON = f"{OURS} triton"
BACKENDS = {OURS: "native", TRITON: "triton"}
REHEARSED = {OURS: "native", TRITON: "reference"}
CEILINGS = "ceilings"
LAUNCHES = "launches 1,000x1,000"


class ContextLostError(RuntimeError):
    """A kernel faulted: nothing more can be run on the device from this process."""


@dataclass(frozen=True)
class Bench:
    """Where a run takes place, and what it has learnt of that place so far."""

    device: str = "cuda"
    scale: int = 1
    backends: Mapping[str, str] = field(default_factory=lambda: dict(BACKENDS))
    ceilings: dict[str, float] = field(default_factory=dict)
    """GB/s of ceilings measured in this run, by label."""

    def shrunk(self, case: GpuCase) -> GpuCase:
        if self.scale == 1:
            return case
        shapes = tuple(tuple(max(1, n // self.scale) for n in shape) for shape in case.workload.shapes[:40])
        groups = min(case.workload.groups, len(shapes))
        small = replace(case.workload, shapes=shapes[: len(shapes) // groups * groups], groups=groups)
        yardstick = case.yardstick and replace(case.yardstick, workload=replace(small, groups=1, settings=1))
        return replace(case, workload=small, yardstick=yardstick, seconds=0.0, least_rounds=2, warm_up=2)


def jobs(only: str | None = None, rehearse: bool = False) -> list[Job]:
    bench = Bench("cpu", 1000, REHEARSED) if rehearse else Bench()
    shown = () if rehearse else ("speedup", "cost", "share")
    everything = [
        Job(CEILINGS, partial(measure_ceilings, bench), shown=() if rehearse else ("gb_per_s",)),
        *(Job(case.name, partial(measure_case, bench, case), _estimate(case), shown=shown) for case in GPU_CASES),
        *(Job(case.name, partial(measure_study, bench, case), seconds=8.0) for case in STUDIES),
        *(
            Job(f"training {each.name}", partial(measure_training, bench, each), seconds=15.0, shown=shown)
            for each in training.TRAININGS
        ),
        Job(LAUNCHES, partial(measure_launches, bench), seconds=8.0, last=True, shown=("launches",)),
    ]
    # Shares of ceilings need the ceilings, whichever cases are chosen.
    return [job for job in everything if job.name == CEILINGS or matches(job.name, only)]


def _estimate(case: GpuCase) -> float:
    """Seconds, tensors and comparison of results included. With 10,000 tensors a round takes the rivals half a second
    on a slow host, and no race has fewer rounds than it needs."""
    return 2.0 * case.seconds + 1.0 + len(case.workload.shapes) / 600


class GpuRunner(OptimizerRunner):
    """One that has done a step: what is made in the first is not part of a race."""

    def __init__(self, contender: Contender, tensors: Tensors, state: torch.dtype) -> None:
        super().__init__(contender, tensors, state)
        self.prepare(0)
        self.run()
        gpu_clocks.synchronize()


class Field:
    """Who takes part in a case: the runners by label, and why others do not."""

    def __init__(self, bench: Bench, case: GpuCase) -> None:
        self.bench, self.case = bench, case
        self.tensors = {case.workload: Tensors(case.workload, bench.device)}
        self.runners: dict[str, Runner] = {}
        self.ours: list[str] = []
        self.rivals: list[str] = []
        self.unable: list[str] = []

    def seat(self) -> None:
        case = self.case
        if case.rivals == "same":
            contenders = rivals("same", case.kind.name, case.hyper)
            self.ours, self.rivals = [contenders[-1].label], [contenders[0].label]
            for contender in contenders:
                self._seat(contender, case.workload, necessary=True)
            return
        for label, backend in self.bench.backends.items():
            if self._seat(ours(case.kind.name, case.hyper, label, backend), case.workload, necessary=True):
                self.ours.append(label)
        for contender in rivals(case.rivals, case.kind.name, case.hyper):
            if self._seat(contender, case.workload, necessary=False):
                self.rivals.append(contender.label)
        if case.yardstick and self.ours:
            workload = case.yardstick.workload or case.workload
            self.tensors.setdefault(workload, Tensors(workload, self.bench.device))
            self._seat(self._yardstick(), workload, necessary=True)
        if case.stripped:
            self._seat_streams()

    def _yardstick(self) -> Contender:
        assert self.case.yardstick
        backend = self.bench.backends[self.ours[0]]
        return ours(self.case.kind.name, self.case.hyper, self.case.yardstick.label, backend)

    def _seat(self, contender: Contender, workload: Workload, necessary: bool) -> bool:
        try:
            self.runners[contender.label] = GpuRunner(contender, self.tensors[workload], MIXES[self.case.mix][1])
        except Exception as error:
            check_context(error)
            reason = f"{contender.label}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if necessary:
                self.unable.append(reason)
            print(f"  {self.case.name}: without {reason}", file=sys.stderr, flush=True)
            return False
        return True

    def _seat_streams(self) -> None:
        try:
            streams = self.case.kind.streams(self.case.mix)
            self.runners[STRIPPED] = Stripped(streams, self.case.workload.numel, self.bench.device)
        except Exception as error:
            check_context(error)
            print(f"  {self.case.name}: without {STRIPPED}: {error}", file=sys.stderr, flush=True)

    def race(self, clock: str, **changes: Any) -> Samples:
        case = self.case
        settings = {
            "seconds": case.seconds,
            "least_rounds": case.least_rounds,
            "most_rounds": case.most_rounds,
            "warm_up": case.warm_up,
            "steps_per_round": case.steps_per_round,
            **changes,
        }
        return race(list(self.runners.values()), turn=gpu_clocks.named(clock), **settings)

    def parameters(self, label: str) -> list[Tensor]:
        runner = self.runners[label]
        assert isinstance(runner, OptimizerRunner)
        return runner.values


def check_context(error: Exception) -> None:
    """Raise if the device no longer answers."""
    try:
        gpu_clocks.synchronize()
    except RuntimeError:
        raise ContextLostError(str(error)) from error


def measure_case(bench: Bench, case: GpuCase) -> list[Measurement]:
    try:
        measured, unable = _measure_case(bench, bench.shrunk(case))
    except Exception as error:
        check_context(error)
        raise
    finally:
        _release()
    if unable:
        raise UnableError(unable, measured)
    return measured


def _measure_case(bench: Bench, case: GpuCase) -> tuple[list[Measurement], list[str]]:
    """The measurements, and which of ours could not take part and why."""
    seated = Field(bench, case)
    seated.seat()
    if not seated.ours:
        return [], seated.unable
    samples = seated.race(case.clock)
    measured = [*_times(seated, samples), *_ratios(seated, samples), *_agreements(seated, samples.steps)]
    if case.host:
        hosted = seated.race("host", seconds=0.5, least_rounds=min(15, case.least_rounds), steps_per_round=1)
        measured += [(label, "host_us", hosted.time(label).scaled(1e6)) for label in hosted.seconds]
    return measured, seated.unable


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _times(seated: Field, samples: Samples) -> list[Measurement]:
    case, measured = seated.case, []
    for label in samples.seconds:
        time = samples.time(label)
        measured.append((label, "us_per_step", time.scaled(1e6)))
        if case.clock == "device":
            runner = seated.runners[label]
            moved = runner.bytes_moved if isinstance(runner, Stripped) else case.least_bytes
            measured.append((label, "gb_per_s", time.reciprocal(moved * 1e-9)))
    measured += [(label, "rounds", float(len(samples.seconds[label]))) for label in seated.ours]
    return measured


def _ratios(seated: Field, samples: Samples) -> list[Measurement]:
    case, measured = seated.case, []
    for label in seated.ours:
        others = [*seated.rivals, *(other for other in seated.ours if other != label)]
        measured += [(label, f"speedup/{other}", samples.ratio(other, label)) for other in others]
        if isinstance(stripped := seated.runners.get(STRIPPED), Stripped):
            work = case.least_bytes / stripped.bytes_moved
            measured.append((label, f"rate/{STRIPPED}", samples.ratio(STRIPPED, label).scaled(work)))
        if case.clock == "device" and (copied := seated.bench.ceilings.get(COPY)):
            rate = samples.time(label).reciprocal(case.least_bytes * 1e-9)
            measured.append((label, f"share/{COPY}", rate.scaled(1 / copied)))
    if case.yardstick and case.yardstick.label in samples.seconds:
        yardstick = case.yardstick.label
        measured.append((seated.ours[0], f"cost/{yardstick}", samples.ratio(seated.ours[0], yardstick)))
    return measured


def _agreements(seated: Field, steps: int) -> list[Measurement]:
    """Of every one of ours with every rival, and of ours with each other, which should be equal bit for bit."""
    initial = seated.tensors[seated.case.workload].initial
    measured: list[Measurement] = []
    for label in seated.ours:
        others = [*seated.rivals, *(other for other in seated.ours if other != label)]
        results: dict[str, Agreement] = {
            other: agreement(seated.parameters(label), seated.parameters(other), initial, steps + 1) for other in others
        }
        measured += agreement_rows(label, results)
    return measured


def measure_ceilings(bench: Bench) -> list[Measurement]:
    numel, rounds = gpu_streams.COPY_NUMEL // bench.scale, 30 if bench.scale == 1 else 1
    measured: list[Measurement] = []

    def add(label: str, ceiling: gpu_streams.Ceiling) -> None:
        measured.extend([(label, "us_per_step", ceiling.time.scaled(1e6)), (label, "gb_per_s", ceiling.rate)])
        bench.ceilings[label] = ceiling.rate.p50
        _release()

    add(COPY, gpu_streams.copy(bench.device, numel, rounds))
    add("torch add_ (read, modify, write)", gpu_streams.add(bench.device, numel, rounds))
    if reason := gpu_streams.why_not():
        raise UnableError([reason], measured)
    for streams in islice(_all_streams(), None if bench.scale == 1 else 2):
        runner = Stripped(streams, 200_000_000 // bench.scale, bench.device)
        add(str(streams), gpu_streams.measure(runner, runner.bytes_moved, min(rounds, 12)))
    return measured


def _all_streams() -> Iterator[Streams]:
    found = (RULES[kind].streams(mix) for kind in ("Adam", "AMSGrad", "RMSprop", "SGD") for mix in MIXES)
    yield from dict.fromkeys(found)


def measure_study(bench: Bench, case: GpuCase) -> list[Measurement]:
    """A contender that cannot be studied is left out and said; if it is one of ours that is a failure."""
    case = bench.shrunk(case)
    own = [ours(case.kind.name, case.hyper, label, backend) for label, backend in bench.backends.items()]
    measured: list[Measurement] = []
    unable: list[str] = []
    for contender in (*own, *rivals(case.rivals, case.kind.name, case.hyper)):
        try:
            measured += study(case, [contender], bench.device)
        except Exception as error:
            check_context(error)
            print(f"  {case.name}: without {contender.label}: {error}", file=sys.stderr, flush=True)
            unable += [f"{contender.label}: {error}"] if contender in own else []
    _release()
    if unable:
        raise UnableError(unable, measured)
    return measured


def measure_training(bench: Bench, each: training.Training) -> list[Measurement]:
    """Whole trainings; without the package that has the data, none."""
    try:
        return training.measure(each, bench.device, steps=4 if bench.scale > 1 else None)
    except ModuleNotFoundError as error:
        print(f"  training {each.name}: left out: {error}", file=sys.stderr, flush=True)
        return []
    except Exception as error:
        check_context(error)
        raise
    finally:
        _release()


def measure_launches(bench: Bench) -> list[Measurement]:
    """Kernels that one step starts. Last of all: the profiler slows down what is launched after it."""
    shapes = tensors(20 if bench.scale > 1 else 1000, 1000)
    measured: list[Measurement] = []
    unable: list[str] = []
    for contender, necessary in _studied(bench):
        try:
            runner = GpuRunner(contender, Tensors(Workload(shapes, gradients="shared"), bench.device), torch.float32)
            names = launches(runner.run)
        except Exception as error:
            check_context(error)
            print(f"  {LAUNCHES}: without {contender.label}: {error}", file=sys.stderr, flush=True)
            unable += [f"{contender.label}: {error}"] if necessary else []
            continue
        copies = sum(map(is_copy, names))
        measured += [
            (contender.label, "launches", float(len(names) - copies)),
            (contender.label, "copies", float(copies)),
        ]
    if unable:
        raise UnableError(unable, measured)
    return measured


def _studied(bench: Bench) -> Iterator[tuple[Contender, bool]]:
    for label, backend in bench.backends.items():
        yield ours("Adam", {}, f"{label} Adam", backend), True
        yield ours("Ranger", {}, f"{label} Ranger", backend), True
        if bench.device == "cuda":
            yield ours("Adam", {"capturable": True}, f"{label} Adam, capturable", backend), True
    for kind in ("Adam", "RAdam"):
        for contender in rivals("fast", kind, {}):
            yield replace(contender, label=f"{contender.label} {kind}"), False


def launches(run: Callable[[], object]) -> list[str]:
    """The names of all that `run` starts on the device, copies and fills of memory included."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
    gpu_clocks.synchronize()
    with profile(activities=[activity]) as session:
        run()
        gpu_clocks.synchronize()
    # Ranges that the host has named (torch names every optimizer's step) are shown on the device as well.
    found = [
        e for e in session.events() if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", 0)
    ]
    return [e.name for e in found if not e.name.startswith("Optimizer.")]


def is_copy(name: str) -> bool:
    return name.startswith(("Memcpy", "Memset"))


def warm() -> None:
    """Compile what takes long and needs none of our kernels, so that a later run finds it in the caches on disk."""
    for streams in _all_streams():
        for shape in gpu_streams.SHAPES:
            Stripped(streams, gpu_streams.UNIT, "cuda", shape).run()
    for case in GPU_CASES:
        if case.rivals == "compiled":
            compiled = rivals(case.rivals, case.kind.name, case.hyper)[-1]  # after torch fused, where there is one
            GpuRunner(compiled, Tensors(case.workload, "cuda"), torch.float32)
            _release()
