"""The CPU run: every selected job, one after the other, as measurements that `records` turns into rows."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from bench import allocations, streams
from bench.cases import CASES, STREAMS, TINY, Case, Workload, matches
from bench.contenders import OURS, Contender, ours, public_rules, rivals
from bench.race import Agreement, Samples, Spread, agreement, race
from bench.workload import OptimizerRunner, Tensors

# One metric of one contender, before it is known where and when: (contender, metric, value).
Measurement = tuple[str, str, Spread | float]

STREAM = "stream 1x50,000,000"
ALLOCATIONS = "allocations 1000x64"
QUICK_LARGEST = 2_000_000


@dataclass(frozen=True)
class Job:
    """One entry of a run. Where time is short, a job begins only if its `seconds` are left; a `last` one keeps its
    own."""

    name: str
    run: Callable[[], list[Measurement]]
    seconds: float = 0.0
    last: bool = False
    shown: tuple[str, ...] = ("speedup", "cost", "rate", "gb_per_s")
    """Metrics to report as soon as they are measured."""


class UnableError(RuntimeError):
    """A part of a job could not be done; what the rest measured is in `measured`."""

    def __init__(self, reasons: Sequence[str], measured: Sequence[Measurement] = ()) -> None:
        super().__init__("; ".join(reasons))
        self.measured = list(measured)


def jobs(only: str | None = None, quick: bool = False) -> list[Job]:
    """What a run consists of. `quick`, a smoke, leaves out large tensors and spends a sixth of the time on the rest."""
    share = 1 / 6 if quick else 1.0
    everything = [
        Job(case.name, partial(measure_case, case, share))
        for case in CASES
        if not quick or case.workload.numel <= QUICK_LARGEST
    ]
    if not quick:
        everything.append(Job(STREAM, partial(measure_streams, 4.0)))
    everything.append(Job(ALLOCATIONS, partial(measure_allocations, 20 if quick else 200)))
    return [job for job in everything if matches(job.name, only)]


@dataclass(frozen=True)
class Field:
    """Who races in a case: the first is the subject of every ratio, the yardstick (if any) is the last."""

    entries: tuple[tuple[Contender, Workload], ...]
    subject: str
    rivals: tuple[str, ...]

    @classmethod
    def of(cls, case: Case) -> Field:
        opponents = rivals(case.rivals, case.rule, case.hyper)
        if case.rivals == "same":
            subject, opponents = opponents[-1], opponents[:-1]
        else:
            subject = ours(case.rule, case.hyper)
        entries = [(contender, case.workload) for contender in (subject, *opponents)]
        if case.yardstick:
            rule = case.yardstick.rule
            yardstick = ours(rule or case.rule, {} if rule else case.hyper, case.yardstick.label)
            entries.append((yardstick, case.yardstick.workload or case.workload))
        return cls(tuple(entries), subject.label, tuple(contender.label for contender in opponents))

    def seat(self, backwards: bool) -> dict[str, OptimizerRunner]:
        """The runners by label, their tensors allocated in this order or in the opposite one."""
        tensors = {workload: Tensors(workload) for _, workload in self.entries}
        entries = self.entries[::-1] if backwards else self.entries
        return {contender.label: OptimizerRunner(contender, tensors[workload]) for contender, workload in entries}


def measure_case(case: Case, share: float = 1.0) -> list[Measurement]:
    field, samples = Field.of(case), Samples()
    agreements: dict[str, list[Agreement]] = {rival: [] for rival in field.rivals}
    for sitting in range(case.sittings):
        runners = field.seat(backwards=sitting % 2 == 1)
        raced = race(
            list(runners.values()),
            seconds=case.seconds * share / case.sittings,
            least_rounds=max(3, round(case.least_rounds * share / case.sittings)),
            warm_up=case.warm_up,
            steps_per_round=case.steps_per_round,
        )
        samples.extend(raced)
        subject = runners[field.subject]
        for rival, results in agreements.items():
            results.append(
                agreement(subject.parameters, runners[rival].parameters, subject.tensors.initial, raced.steps)
            )
        del runners, subject
        gc.collect()
    worst = {rival: max(results, key=lambda result: result.rms) for rival, results in agreements.items()}
    return [*_times(case, field, samples), *_ratios(case, field, samples), *agreement_rows(field.subject, worst)]


def _times(case: Case, field: Field, samples: Samples) -> list[Measurement]:
    measured: list[Measurement] = []
    for label in samples.seconds:
        measured.append((label, "us_per_step", samples.time(label).scaled(1e6)))
    for label in (field.subject, *field.rivals) if case.memory_bound else ():
        measured.append(
            (label, "gb_per_s", samples.time(label).reciprocal(_least_bytes(case.rule, case.workload) * 1e-9))
        )
    measured.append((field.subject, "rounds", float(len(samples.seconds[field.subject]))))
    return measured


def _ratios(case: Case, field: Field, samples: Samples) -> list[Measurement]:
    measured: list[Measurement] = [
        (field.subject, f"speedup/{rival}", samples.ratio(rival, field.subject)) for rival in field.rivals
    ]
    if not case.yardstick:
        return measured
    label = case.yardstick.label
    if case.yardstick.rule:
        work = _least_bytes(case.rule, case.workload) / _least_bytes(case.yardstick.rule, case.workload)
        rate = samples.ratio(label, field.subject).scaled(work)
        return [*measured, (field.subject, f"rate/{label}", rate)]
    return [*measured, (field.subject, f"cost/{label}", samples.ratio(field.subject, label))]


def agreement_rows(subject: str, results: dict[str, Agreement]) -> list[Measurement]:
    measured: list[Measurement] = []
    for rival, result in results.items():
        measured += [
            (subject, f"rms_ulp/{rival}", result.rms),
            (subject, f"max_ulp/{rival}", result.largest),
            (subject, f"same_work/{rival}", float(result.same_work)),
        ]
    return measured


def _least_bytes(rule: str, workload: Workload) -> float:
    return STREAMS[rule] * workload.dtype.itemsize * workload.numel


def measure_streams(seconds: float, numel: int = streams.NUMEL) -> list[Measurement]:
    samples = streams.measure(seconds, numel)
    measured: list[Measurement] = []
    for label in samples.seconds:
        time = samples.time(label)
        measured += [
            (label, "us_per_step", time.scaled(1e6)),
            (label, "gb_per_s", time.reciprocal(streams.BYTES_PER_ELEMENT * numel * 1e-9)),
        ]
    return measured


def measure_allocations(steps: int) -> list[Measurement]:
    """Every public rule, Adam also with half of the gradients absent, and torch's fused Adam for comparison."""
    half = Workload(TINY.shapes, absent=0.5)
    studied = [(ours(rule, {}, f"{OURS} {rule}"), TINY) for rule in public_rules()]
    studied.append((ours("Adam", {}, f"{OURS} Adam, half without a gradient"), half))
    studied += [(contender, TINY) for contender in rivals("fused", "Adam", {})]
    measured: list[Measurement] = []
    for contender, workload in studied:
        result = allocations.measure(contender, workload, steps)
        measured.append((contender.label, "torch_allocations", Spread.of(result.torch_per_step)))
        if result.heap_per_step is not None:
            measured.append((contender.label, "heap_bytes", result.heap_per_step))
    return measured
