"""The CPU run: every selected job, one after the other, as measurements that `records` turns into rows.

A rival that cannot do the work is left out and said; that fastopt cannot is a failure.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from bench import allocations, streams
from bench.cases import CASES, TINY, Case, Workload, matches
from bench.contenders import OURS, Contender, ours, public_rules, rivals
from bench.race import Agreement, Measurement, Runner, Samples, Spread, agreement, race
from bench.rules import MIXES
from bench.streams import COPY, STRIPPED
from bench.study import study
from bench.training import TRAININGS, measure
from bench.workload import OptimizerRunner, Tensors

STREAM = "stream 1x50,000,000"
ALLOCATIONS = "allocations 1000x64"
QUICK_LARGEST = 2_000_000

# GB/s of the plainest kernels, measured in this run, by label.
Ceilings = dict[str, float]


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
    ceilings: Ceilings = {}
    everything = [
        Job(case.name, partial(measure_case, case, share, ceilings))
        for case in CASES
        if not quick or (case.workload.numel <= QUICK_LARGEST and case.rivals != "compiled")
    ]
    if not quick:  # first, for what follows is said in shares of it
        everything.insert(0, Job(STREAM, partial(measure_streams, ceilings, 4.0)))
        everything += [Job(f"training {training.name}", partial(measure, training)) for training in TRAININGS]
    everything.append(Job(ALLOCATIONS, partial(measure_allocations, 20 if quick else 200)))
    return [job for job in everything if matches(job.name, only)]


@dataclass
class Field:
    """Who races in a case: the first is the subject of every ratio, the yardstick (if any) is the last."""

    case: Case
    entries: list[tuple[Contender, Workload]]
    subject: str
    rivals: list[str]
    absent: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, case: Case) -> Field:
        opponents = rivals(case.rivals, case.kind.name, case.hyper)
        if case.rivals == "same":
            subject, opponents = opponents[-1], opponents[:-1]
        else:
            subject = ours(case.kind.name, case.hyper)
        entries = [(contender, case.workload) for contender in (subject, *opponents)]
        if case.yardstick:
            kind = case.yardstick.kind or case.kind
            yardstick = ours(kind.name, kind.hyper_for(case.mix), case.yardstick.label)
            entries.append((yardstick, case.yardstick.workload or case.workload))
        return cls(case, entries, subject.label, [contender.label for contender in opponents])

    def seat(self, backwards: bool) -> dict[str, OptimizerRunner]:
        """The runners by label, their tensors allocated in this order or in the opposite one. A rival that cannot do a
        step is absent from here on."""
        tensors = {workload: Tensors(workload) for _, workload in self.entries}
        runners: dict[str, OptimizerRunner] = {}
        for contender, workload in self.entries[::-1] if backwards else self.entries:
            try:
                runner = OptimizerRunner(contender, tensors[workload], MIXES[self.case.mix][1])
                if contender.label in self.rivals:
                    _try_a_step(contender, tensors[workload])
            except Exception as error:
                if contender.label not in self.rivals:
                    raise
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                print(f"  {self.case.name}: without {contender.label}: {reason}", file=sys.stderr, flush=True)
                self.absent.add(contender.label)
            else:
                runners[contender.label] = runner
        self.rivals = [label for label in self.rivals if label not in self.absent]
        self.entries = [entry for entry in self.entries if entry[0].label not in self.absent]
        return runners

    @property
    def contenders(self) -> list[Contender]:
        """Without the yardstick."""
        return [contender for contender, _ in self.entries if contender.label in (self.subject, *self.rivals)]


def _try_a_step(contender: Contender, tensors: Tensors) -> None:
    """On one small tensor: what a first step makes is part of what a race warms up."""
    p = Tensors(Workload(((33,),), dtype=tensors.workload.dtype)).parameters()
    p[0].grad = p[0].detach().clone()
    contender.make([{"params": p}]).step()


def measure_case(case: Case, share: float = 1.0, ceilings: Ceilings | None = None) -> list[Measurement]:
    field, samples = Field.of(case), Samples()
    agreements: dict[str, list[Agreement]] = {}
    for sitting in range(case.sittings):
        runners = field.seat(backwards=sitting % 2 == 1)
        seated: list[Runner] = [*runners.values(), *_stripped(case)]
        raced = race(
            seated,
            seconds=case.seconds * share / case.sittings,
            least_rounds=max(3, round(case.least_rounds * share / case.sittings)),
            most_rounds=case.most_rounds,
            warm_up=case.warm_up,
            steps_per_round=case.steps_per_round,
        )
        samples.extend(raced)
        subject = runners[field.subject]
        for rival in field.rivals:
            agreements.setdefault(rival, []).append(
                agreement(subject.values, runners[rival].values, subject.tensors.initial, raced.steps)
            )
        del runners, seated, subject
        gc.collect()
    worst = {rival: max(results, key=lambda result: result.rms) for rival, results in agreements.items()}
    return [
        *_times(case, field, samples, ceilings or {}),
        *_ratios(case, field, samples),
        *agreement_rows(field.subject, worst),
        *(study(case, field.contenders) if case.studied else ()),
    ]


def _stripped(case: Case) -> list[Runner]:
    """The streams that the rule cannot do without, where the memory is what is measured."""
    if not (case.memory_bound and case.table in ("adam", "rules") and case.mix == "fp32"):
        return []
    try:
        return [streams.stripped(case.kind.states, case.workload.numel)]
    except RuntimeError as error:
        print(f"  {case.name}: without {STRIPPED}: {error}", file=sys.stderr, flush=True)
        return []


def _times(case: Case, field: Field, samples: Samples, ceilings: Ceilings) -> list[Measurement]:
    measured: list[Measurement] = []
    for label in samples.seconds:
        measured.append((label, "us_per_step", samples.time(label).scaled(1e6)))
    for label in (field.subject, *field.rivals) if case.memory_bound else ():
        rate = samples.time(label).reciprocal(case.least_bytes * 1e-9)
        measured.append((label, "gb_per_s", rate))
        if copied := ceilings.get(COPY):
            measured.append((label, f"share/{COPY}", rate.scaled(1 / copied)))
    measured.append((field.subject, "bytes_per_step", case.least_bytes))
    measured.append((field.subject, "rounds", float(len(samples.seconds[field.subject]))))
    return measured


def _ratios(case: Case, field: Field, samples: Samples) -> list[Measurement]:
    measured: list[Measurement] = [
        (field.subject, f"speedup/{rival}", samples.ratio(rival, field.subject)) for rival in field.rivals
    ]
    if STRIPPED in samples.seconds:
        least = case.kind.streams(case.mix).bytes_per_element * case.workload.numel
        rate = samples.ratio(STRIPPED, field.subject).scaled(case.least_bytes / least)
        measured.append((field.subject, f"rate/{STRIPPED}", rate))
    if not case.yardstick:
        return measured
    label = case.yardstick.label
    if case.yardstick.kind:
        work = case.kind.bytes_per_element(case.mix) / case.yardstick.kind.bytes_per_element(case.mix)
        rate = samples.ratio(label, field.subject).scaled(work)
        return [*measured, (field.subject, f"rate/{label}", rate)]
    return [*measured, (field.subject, f"cost/{label}", samples.ratio(field.subject, label))]


def agreement_rows(subject: str, results: dict[str, Agreement]) -> list[Measurement]:
    measured: list[Measurement] = []
    for rival, result in results.items():
        measured += [
            (subject, f"rms_ulp/{rival}", result.rms),
            (subject, f"max_ulp/{rival}", result.largest),
            (subject, f"moved_ulp/{rival}", result.moved),
            (subject, f"same_work/{rival}", float(result.same_work)),
        ]
    return measured


def measure_streams(ceilings: Ceilings, seconds: float, numel: int = streams.NUMEL) -> list[Measurement]:
    samples = streams.measure(seconds, numel)
    measured: list[Measurement] = []
    for label in samples.seconds:
        time = samples.time(label)
        rate = time.reciprocal(streams.BYTES_PER_ELEMENT * numel * 1e-9)
        measured += [(label, "us_per_step", time.scaled(1e6)), (label, "gb_per_s", rate)]
        ceilings[label] = rate.p50
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
