"""Rows of a GPU run -> Markdown tables. Every figure in them is a row; goals come from `gpu_cases`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from bench.cases import Measure
from bench.contenders import NOISE_LABELS, OURS
from bench.cpu_tables import Verdict, curves, different, trainings
from bench.gpu import CEILINGS, LAUNCHES, TRITON
from bench.gpu_cases import GPU_CASES, STUDIES, GpuCase
from bench.gpu_clocks import REST
from bench.gpu_streams import COPY, STRIPPED
from bench.records import Row
from bench.tables import NONE, Results, bytes_of, number_of, provenance, rate_of, ratio_of, table, time_of

UNMEASURED = "Nothing was measured on a GPU yet."
Part: TypeAlias = Callable[[Results], str]
SHARING = {"optimi foreach": "(it changes p.grad, which the steps of a turn share)"}


@dataclass(frozen=True)
class Line:
    """A case as the tables see it. The subject is the native backend, or Triton where that took no part."""

    case: GpuCase
    results: Results

    def get(self, contender: str, metric: str) -> Row | None:
        return self.results.get(self.case.name, contender, metric)

    @property
    def subject(self) -> str:
        return OURS if self.get(OURS, "us_per_step") else TRITON

    @property
    def rival(self) -> str | None:
        """The fastest of them."""
        raced = [row.metric.partition("/")[2] for row in self.results.of(self.case.name, "speedup")]
        times = {label: row for label in raced if (row := self.get(label, "us_per_step")) and not _is_ours(label)}
        return min(times, key=lambda label: times[label].p50) if times else None

    @property
    def verdict(self) -> Verdict:
        """Over its rival."""
        found = Verdict.of(self.case, self.results, self.subject, self.rival)
        assert found, f"{self.case.name} has no rival"
        return found

    @property
    def size(self) -> str:
        """For a table that has aligned and misaligned tensors."""
        return f"{self.case.size}, misaligned" if self.case.workload.misaligned else self.case.size

    def time(self, contender: str) -> str:
        return time_of(self.get(contender, "us_per_step"))

    def ratio(self, measure: str, contender: str | None = None) -> str:
        contender = contender or self.subject
        rows = self.results.of(self.case.name, measure)
        return ratio_of(next((row for row in rows if row.contender == contender), None))

    def goal(self, measure: Measure) -> str:
        goal = self.case.goal(measure)
        return str(goal) if goal else NONE

    def against(self) -> dict[str, str]:
        """The fastest rival, how many times faster than it, and whether the results were the same."""
        rival = self.rival
        if rival is None:
            return {"fastest rival": NONE, "times faster": NONE, "goal": NONE, "same results": NONE}
        return {
            "fastest rival": f"{self.time(rival)} ({rival})",
            "times faster": ratio_of(self.get(self.subject, f"speedup/{rival}")),
            "goal": self.goal("speedup"),
            "same results": self._agreement(rival),
        }

    def _agreement(self, rival: str) -> str:
        same = self.get(self.subject, f"same_work/{rival}")
        rms = self.get(self.subject, f"rms_ulp/{rival}")
        apart = f", {rms.p50:.2g} ulp rms apart" if rms and rms.p50 and self.case.mix != "fp32" else ""
        if same and same.p50 == 1.0:
            return f"yes{apart}"
        return " ".join(filter(None, (different(self.case, rival), SHARING.get(rival, "")))) + apart

    def equal(self) -> str:
        """Whether the two backends ended bit for bit alike."""
        largest = self.get(OURS, f"max_ulp/{TRITON}")
        return NONE if largest is None else "yes" if largest.p50 == 0.0 else "**no**"


def _is_ours(label: str) -> bool:
    return label.startswith(OURS)


def gpu_markdown(rows: Sequence[Row], parts: Sequence[Part] | None = None) -> str:
    """The tables that the rows can fill, all or these, and where the figures come from."""
    results = Results(rows)
    texts = [text for text in (build(results) for build in parts or ALL) if text]
    return "\n\n".join([*texts, provenance(results)]) if rows else UNMEASURED


def _lines(results: Results, *tables: str) -> Iterator[Line]:
    for case in GPU_CASES:
        line = Line(case, results)
        if case.table in tables and line.get(line.subject, "us_per_step"):
            yield line


def _hosted(title: str, name: str) -> Part:
    """Steps whose time is the host's."""

    def build(results: Results) -> str:
        return table(
            title,
            [
                {
                    **_waited(line),
                    "until step() returns": time_of(line.get(line.subject, "host_us")),
                    "rival's": time_of(line.get(line.rival or "", "host_us")),
                }
                for line in _lines(results, name)
            ],
        )

    return build


def _rested(results: Results) -> str:
    return table(
        f"The same after the processor has had {REST * 1e3:.0f} ms of rest, as while a device computes gradients",
        [_waited(line) for line in _lines(results, "gpu rested")],
    )


def _waited(line: Line) -> dict[str, str]:
    return {
        "tensors": line.case.size,
        OURS: line.time(OURS),
        TRITON: line.time(TRITON),
        "goal of time": line.goal("time"),
        **line.against(),
    }


def _groups(results: Results) -> str:
    return table(
        "Many groups: Adam, fp32, step and the wait for the device",
        [
            {
                "tensors": line.case.size,
                OURS: line.time(OURS),
                TRITON: line.time(TRITON),
                "compared with": line.case.yardstick.label if line.case.yardstick else NONE,
                "cost": line.ratio("cost"),
                "goal of cost": line.goal("cost"),
                **line.against(),
            }
            for line in _lines(results, "gpu groups")
        ],
    )


def _raced(title: str, *tables: str) -> Callable[[Results], str]:
    def build(results: Results) -> str:
        lines = [line for line in _lines(results, *tables) if line.rival]
        return table(
            title,
            [
                {
                    "rule": line.case.kind.label,
                    "stored as": line.case.mix,
                    "tensors": line.case.size,
                    OURS: line.time(OURS),
                    TRITON: line.time(TRITON),
                    **line.against(),
                    "both backends equal": line.equal(),
                }
                for line in lines
            ],
        )

    return build


def _roof(results: Results) -> str:
    lines = [line for line in _lines(results, *{case.table for case in GPU_CASES}) if line.case.stripped]
    return table(
        "How close to the memory: bytes that a step must move, over its time",
        [
            {
                "rule": line.case.kind.label,
                "stored as": line.case.mix,
                "tensors": line.size,
                "GB/s": rate_of(line.get(OURS, "gb_per_s")),
                f"of the {STRIPPED}": line.ratio("rate", OURS),
                f"of {COPY}": line.ratio("share", OURS),
                "Triton's GB/s": rate_of(line.get(TRITON, "gb_per_s")),
                "Triton's share of the streams": line.ratio("rate", TRITON),
                "goals": f"{line.goal('rate')}, {line.goal('share')}",
            }
            for line in lines
        ],
    )


def _ceilings(results: Results) -> str:
    return table(
        "The ceilings: what the plainest kernels reach",
        [
            {
                "kernel": row.contender,
                "time": time_of(results.get(CEILINGS, row.contender, "us_per_step")),
                "GB/s": rate_of(row),
            }
            for row in results.of(CEILINGS, "gb_per_s")
        ],
    )


def _launches(results: Results) -> str:
    lines = []
    for row in results.of(LAUNCHES, "launches"):
        copies = results.get(LAUNCHES, row.contender, "copies")
        copied = f"{copies.p50:,.0f}" if copies else NONE
        lines.append({"1,000x1,000": row.contender, "kernels": f"{row.p50:,.0f}", "copies": copied})
    return table("What one step starts on the device", lines)


def _studies(results: Results) -> str:
    lines = []
    for case in STUDIES:
        for row in results.of(case.name, "first_step_us"):
            rms, largest = (results.get(case.name, row.contender, metric) for metric in ("rms_error", "max_error"))
            lines.append(
                {
                    "rule": case.kind.label,
                    "contender": row.contender,
                    "first step": time_of(row),
                    "operators": number_of(results.get(case.name, row.contender, "operators")),
                    "extra memory": bytes_of(results.get(case.name, row.contender, "peak_extra_bytes")),
                    "rms (largest) error, ulp": f"{rms.p50:.3g} ({largest.p50:.3g})" if rms and largest else NONE,
                }
            )
    return table("First step, operators called, memory taken, distance from float64: 100x1,000, fp32", lines)


def _noise(results: Results) -> str:
    again = NOISE_LABELS[1]
    lines = [Line(case, results) for case in GPU_CASES if case.table == "gpu noise"]
    return table(
        "Noise of the run: torch fused raced against itself",
        [
            {
                "tensors": line.case.size,
                "torch fused": line.time(again),
                "ratio": ratio_of(line.get(again, f"speedup/{NOISE_LABELS[0]}")),
            }
            for line in lines
            if line.get(again, "us_per_step")
        ],
    )


SHORT_TABLES = ("gpu small", "gpu groups", "gpu models", "gpu fused", "gpu rules")


def in_short(results: Results) -> list[Line]:
    """What the README shows: every rule in fp32, the 16 bits of those that torch has a fused step for, few sizes."""
    return [
        line
        for name in SHORT_TABLES
        for line in sorted(_lines(results, name), key=lambda line: line.case.mix != "fp32")
        if line.rival
        and (line.case.mix == "fp32" or name == "gpu fused")
        and line.case.size not in ("1,000x50,000", "1x1,000", "100x10,000")
        and "centered" not in line.case.kind.label
    ]


def _short(results: Results) -> str:
    return table(
        "One step: of small tensors with the wait for the device, of large ones by its clock",
        [
            {
                "optimizer": line.case.kind.label,
                "stored as": line.case.mix,
                "tensors": line.case.size,
                OURS: line.time(OURS),
                **{name: cell for name, cell in line.against().items() if name != "goal"},
            }
            for line in in_short(results)
        ],
    )


SHORT: tuple[Part, ...] = (_short,)
ALL: tuple[Part, ...] = (
    _hosted("Small tensors: Adam, fp32, step and the wait for the device", "gpu small"),
    _rested,
    _hosted("The same with `fused=True` for all, which keeps the steps on the device", "gpu counted"),
    _hosted("The same with zero_grad() after the step", "gpu cleared"),
    _hosted("The same where every step finds the parameters in other memory", "gpu moved"),
    _hosted("The same of AdamW, whose parameters are DTensors, as FSDP2 makes them, in a group of one", "gpu sharded"),
    _groups,
    _raced("Large tensors, by the device's clock: rules that torch has a fused step for", "gpu fused", "gpu roof"),
    _raced("Large tensors, by the device's clock: rules that it has none for", "gpu rules"),
    _raced(
        "Large tensors that begin one element after a multiple of 16 bytes, as parts of flat memory do",
        "gpu misaligned",
    ),
    _raced("Parameter lists of real models, step and the wait for the device", "gpu models"),
    _raced("Against the compiled step of torch, by the device's clock", "gpu compiled"),
    trainings,
    curves(GPU_CASES),
    _studies,
    _roof,
    _ceilings,
    _launches,
    _noise,
)
