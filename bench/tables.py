"""Rows of the CSV -> Markdown tables. Every figure in them is a row; goals come from `cases`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from bench.cases import CASES, Case, Measure
from bench.contenders import NOISE_LABELS, OURS
from bench.cpu import ALLOCATIONS, STREAM
from bench.records import Environment, Row

NONE = "–"


class Results:
    """The latest run of every case, looked up by contender and metric."""

    def __init__(self, rows: Iterable[Row]) -> None:
        latest: dict[str, list[Row]] = {}
        for row in rows:
            known = latest.setdefault(row.case, [])
            if known and row.date > known[0].date:
                known.clear()
            if not known or row.environment == known[0].environment:
                known.append(row)
        self.cases = {case: {(row.contender, row.metric): row for row in rows} for case, rows in latest.items()}

    def get(self, case: str, contender: str, metric: str) -> Row | None:
        return self.cases.get(case, {}).get((contender, metric))

    def of(self, case: str, prefix: str) -> Iterator[Row]:
        """Rows of a case whose metric is `prefix`, or `prefix` relative to something."""
        return (row for row in self.cases.get(case, {}).values() if row.metric.partition("/")[0] == prefix)

    def environments(self) -> list[Environment]:
        return sorted({row.environment for case in self.cases.values() for row in case.values()}, key=lambda e: e.date)


@dataclass(frozen=True)
class Verdict:
    """A case as the report sees it: our time, the fastest rival and the ratio to it, the yardstick's ratio."""

    case: Case
    time: Row
    rival: str
    rival_time: Row
    speedup: Row
    same_work: bool
    relative: Row | None

    @classmethod
    def of(cls, case: Case, results: Results, subject: str = OURS) -> Verdict | None:
        time = results.get(case.name, subject, "us_per_step")
        speedups = {
            row.metric.partition("/")[2]: row for row in results.of(case.name, "speedup") if row.contender == subject
        }
        times = {rival: results.get(case.name, rival, "us_per_step") for rival in speedups}
        known = {rival: row for rival, row in times.items() if row is not None}
        if time is None or not known:
            return None
        rival = min(known, key=lambda label: known[label].p50)
        same = results.get(case.name, subject, f"same_work/{rival}")
        relative = next((row for prefix in ("cost", "rate") for row in results.of(case.name, prefix)), None)
        return cls(case, time, rival, known[rival], speedups[rival], bool(same and same.p50 == 1.0), relative)

    def goal(self, measure: Measure) -> str:
        goal = self.case.goal(measure)
        return str(goal) if goal else NONE


def verdicts(results: Results, name: str) -> list[Verdict]:
    """Of the cases of the table of that name."""
    subject = NOISE_LABELS[1] if name == "noise" else OURS
    found = (Verdict.of(case, results, subject) for case in CASES if case.table == name)
    return [verdict for verdict in found if verdict]


def markdown(rows: Sequence[Row]) -> str:
    """All tables that the rows can fill, and where the figures come from."""
    results = Results(rows)
    parts = [part for part in (build(results) for build in _PARTS) if part]
    return "\n\n".join([*parts, provenance(results)])


def headline(rows: Sequence[Row], shown: Sequence[str]) -> str:
    """One line for a case that has just been measured."""
    ratios = [row for row in rows if row.metric.partition("/")[0] in shown]
    return ", ".join(f"{row.metric.replace('/', ' ')} {row.contender} {ratio_of(row)}" for row in ratios) or "done"


def _adam(results: Results) -> str:
    return table(
        "Adam, fp32",
        [
            {"tensors": v.case.size, OURS: time_of(v.time), "torch fused": time_of(v.rival_time), **_comparison(v)}
            for v in verdicts(results, "adam")
        ],
    )


def _rules(results: Results) -> str:
    return table(
        "Rules that torch has no fused CPU step for, fp32",
        [
            {
                "rule": v.case.rule,
                "tensors": v.case.size,
                OURS: time_of(v.time),
                "fastest rival": f"{time_of(v.rival_time)} ({v.rival})",
                **_comparison(v),
                "GB/s": rate_of(results.get(v.case.name, OURS, "gb_per_s")),
                "per byte, own Adam = 1": ratio_of(v.relative),
                "goal per byte": v.goal("rate"),
            }
            for v in verdicts(results, "rules")
        ],
    )


def _structure(results: Results) -> str:
    return table(
        "Many groups, absent gradients: Adam, fp32",
        [
            {
                "tensors": v.case.size,
                OURS: time_of(v.time),
                "compared with": v.case.yardstick.label if v.case.yardstick else NONE,
                "cost": ratio_of(v.relative),
                "goal of cost": v.goal("cost"),
                "torch fused": time_of(v.rival_time),
                **_comparison(v),
            }
            for v in verdicts(results, "structure")
        ],
    )


def _comparison(v: Verdict) -> dict[str, str]:
    same = "yes" if v.same_work else "**different work**"
    return {"times faster": ratio_of(v.speedup), "goal": v.goal("speedup"), "same results": same}


def _ceilings(results: Results) -> str:
    streams = [(f"{row.contender}, 50,000,000 elements", row) for row in results.of(STREAM, "gb_per_s")]
    raced = [
        (f"Adam {case.size}, {row.contender}", row)
        for case in CASES
        if case.table == "adam"
        for row in results.of(case.name, "gb_per_s")
    ]
    lines = [
        {"kernel": name, "time": time_of(results.get(row.case, row.contender, "us_per_step")), "GB/s": rate_of(row)}
        for name, row in streams + raced
    ]
    return table("Bytes per second: the ceilings, and Adam at 28 bytes per parameter", lines)


def _allocations(results: Results) -> str:
    lines = []
    for row in results.of(ALLOCATIONS, "torch_allocations"):
        growth = results.get(ALLOCATIONS, row.contender, "heap_bytes")
        heap = f"{growth.p50:,.1f} B" if growth else NONE
        blocks = f"{row.p50:,.0f}"
        lines.append({"1000x64": row.contender, "blocks from torch's allocator": blocks, "growth of the heap": heap})
    return table("Allocations of one step in the steady state", lines)


def _noise(results: Results) -> str:
    lines = [
        {"tensors": v.case.size, "torch fused": time_of(v.time), "ratio": ratio_of(v.speedup)}
        for v in verdicts(results, "noise")
    ]
    return table("Noise of the run: torch fused raced against itself", lines)


_PARTS: tuple[Callable[[Results], str], ...] = (_adam, _rules, _structure, _ceilings, _allocations, _noise)


def table(title: str, lines: Sequence[dict[str, str]]) -> str:
    """A column that has nothing to say in any line is left out."""
    columns = [column for column in (lines[0] if lines else ()) if any(line[column] != NONE for line in lines)]
    if not columns:
        return ""
    cells = [columns, ["---"] * len(columns), *([line[column] for column in columns] for line in lines)]
    body = "\n".join(f"| {' | '.join(row)} |" for row in cells)
    return f"**{title}**\n\n{body}"


def provenance(results: Results) -> str:
    runs = [
        f"commit {e.commit}, {e.date}: {e.device}; {e.threads} threads; torch {e.torch}, Python {e.python}"
        for e in results.environments()
    ]
    return (
        "Medians, in parentheses the 20th to 80th percentile of the rounds' ratios. Measured at "
        + "; and at ".join(runs)
        + "."
    )


def time_of(row: Row | None) -> str:
    if row is None:
        return NONE
    return f"{row.p50:.0f} µs" if row.p50 < 1000 else f"{row.p50 / 1000:.3g} ms"


def rate_of(row: Row | None) -> str:
    return f"{row.p50:.1f}" if row else NONE


def ratio_of(row: Row | None) -> str:
    if row is None:
        return NONE
    p20, p50, p80 = (f"{value:.1f}" if value >= 10 else f"{value:.2f}" for value in (row.p20, row.p50, row.p80))
    return f"{p50} ({p20}–{p80})"
