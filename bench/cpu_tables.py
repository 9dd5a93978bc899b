"""Rows of a CPU run -> Markdown tables. Every figure in them is a row; goals come from `cases`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench.cases import CASES, CURVES, Case, Measure
from bench.contenders import NOISE_LABELS, OURS
from bench.cpu import ALLOCATIONS, STREAM
from bench.peers import rounds_otherwise, why_different
from bench.records import Row
from bench.rules import RULES
from bench.streams import COPY, STRIPPED
from bench.tables import NONE, Results, bytes_of, number_of, provenance, rate_of, ratio_of, table, time_of
from bench.training import TRAININGS


@dataclass(frozen=True)
class Verdict:
    """A case as the report sees it: our time, the fastest rival that did the same work (if none did, the fastest) and
    the ratio to it, the yardstick's ratio, and which faster ones did other work."""

    case: Case
    time: Row
    rival: str
    rival_time: Row
    speedup: Row
    same_work: bool
    relative: Row | None
    others: tuple[str, ...] = ()

    @classmethod
    def of(cls, case: Case, results: Results, subject: str = OURS, rival: str | None = None) -> Verdict | None:
        time = results.get(case.name, subject, "us_per_step")
        speedups = {
            row.metric.partition("/")[2]: row for row in results.of(case.name, "speedup") if row.contender == subject
        }
        times = {rival: results.get(case.name, rival, "us_per_step") for rival in speedups}
        known = {rival: row for rival, row in times.items() if row is not None}
        if time is None or not known:
            return None
        same = {label for label in known if (row := results.get(case.name, subject, f"same_work/{label}")) and row.p50}
        rival = rival or min(same or known, key=lambda label: known[label].p50)
        others = tuple(label for label in known if label not in same and known[label].p50 < known[rival].p50)
        yardstick = case.yardstick.label if case.yardstick else ""
        metrics = (f"{measure}/{yardstick}" for measure in ("cost", "rate"))
        relative = next((row for metric in metrics if (row := results.get(case.name, subject, metric))), None)
        return cls(case, time, rival, known[rival], speedups[rival], rival in same, relative, others)

    @property
    def agreement(self) -> str:
        said = "yes" if self.same_work else different(self.case, self.rival)
        return "; ".join([said, *(f"not {label}: {different(self.case, label)}" for label in self.others)])

    def goal(self, measure: Measure) -> str:
        goal = self.case.goal(measure)
        return str(goal) if goal else NONE


def _of(name: str, results: Results) -> Iterator[Case]:
    """The measured cases of the table of that name."""
    return (case for case in CASES if case.table == name and case.name in results.cases)


def verdicts(results: Results, name: str) -> list[Verdict]:
    """Of the cases of the table of that name."""
    subject = NOISE_LABELS[1] if name == "noise" else OURS
    found = (Verdict.of(case, results, subject) for case in CASES if case.table == name)
    return [verdict for verdict in found if verdict]


def _adam(results: Results) -> str:
    return table(
        "Adam, fp32",
        [
            {
                "tensors": v.case.size,
                OURS: time_of(v.time),
                "torch fused": time_of(v.rival_time),
                **_comparison(v),
                "GB/s": rate_of(results.get(v.case.name, OURS, "gb_per_s")),
                "of its streams": ratio_of(results.get(v.case.name, OURS, f"rate/{STRIPPED}")),
            }
            for v in verdicts(results, "adam")
        ],
    )


def _rules(results: Results) -> str:
    return table(
        "Rules that torch has no fused CPU step for, fp32",
        [
            {
                "rule": v.case.kind.label,
                "tensors": v.case.size,
                OURS: time_of(v.time),
                "fastest rival": f"{time_of(v.rival_time)} ({v.rival})",
                **_comparison(v),
                "GB/s": rate_of(results.get(v.case.name, OURS, "gb_per_s")),
                "of its streams": ratio_of(results.get(v.case.name, OURS, f"rate/{STRIPPED}")),
                "per byte, own Adam = 1": ratio_of(v.relative),
                "goal per byte": v.goal("rate"),
            }
            for v in verdicts(results, "rules")
        ],
    )


def _short(results: Results) -> str:
    """What a newcomer wants to know of both; goals and ceilings are on the page that explains them."""
    return table(
        "One step on two threads, fp32",
        [
            {
                "optimizer": v.case.kind.label,
                "tensors": v.case.size,
                OURS: time_of(v.time),
                "fastest rival": f"{time_of(v.rival_time)} ({v.rival})",
                "times faster": ratio_of(v.speedup),
                "same results": v.agreement,
            }
            for v in (*verdicts(results, "adam"), *verdicts(results, "rules"))
        ],
    )


def _compared(title: str, name: str) -> Callable[[Results], str]:
    def build(results: Results) -> str:
        return table(
            title,
            [
                {
                    "rule": v.case.kind.label,
                    "tensors": v.case.size,
                    OURS: time_of(v.time),
                    "compared with": v.case.yardstick.label if v.case.yardstick else NONE,
                    "cost": ratio_of(v.relative),
                    "goal of cost": v.goal("cost"),
                    "fastest rival": f"{time_of(v.rival_time)} ({v.rival})",
                    **_comparison(v),
                }
                for v in verdicts(results, name)
            ],
        )

    return build


def _mixes(results: Results) -> str:
    return table("Every rule, by how its numbers are stored", [_mix(results, case) for case in _of("mixes", results)])


def _mix(results: Results, case: Case) -> dict[str, str]:
    verdict = Verdict.of(case, results)
    apart = results.get(case.name, OURS, f"rms_ulp/{verdict.rival}") if verdict else None
    return {
        "rule": case.kind.label,
        "stored as": case.mix,
        "tensors": case.size,
        "bytes per parameter": f"{case.kind.bytes_per_element(case.mix):.3g}",
        OURS: time_of(results.get(case.name, OURS, "us_per_step")),
        "GB/s": rate_of(results.get(case.name, OURS, "gb_per_s")),
        f"of {COPY}": ratio_of(results.get(case.name, OURS, f"share/{COPY}")),
        "fastest rival": f"{time_of(verdict.rival_time)} ({verdict.rival})" if verdict else NONE,
        "times faster": ratio_of(verdict.speedup) if verdict else NONE,
        "ulp apart, rms": f"{apart.p50:.2g}" if apart else NONE,
        "same work": verdict.agreement if verdict else NONE,
    }


def cost(name: str, results: Results) -> str:
    """What the class of that name costs, in all its variants."""
    cases = [case for case in _of("mixes", results) if case.kind.name == name]
    if not cases:
        return UNMEASURED
    body = table("", [_mix(results, case) for case in cases])
    return f"{body}\n\n{provenance(results)}"


def _peers(results: Results) -> str:
    """Everybody in one race a rule, the fastest first."""
    parts = []
    for name, large in _races():
        case = next((case for case in CASES if case.name == name and name in results.cases), None)
        if case is not None:
            parts.append(table(f"{case.kind.label}, {case.size}", _standings(results, case, large)))
    return "\n\n".join(part for part in parts if part)


def _races() -> Iterator[tuple[str, str | None]]:
    """Names of the studied case of each rule, and of the one with large tensors if there is one."""
    everyone = [case for case in CASES if case.table == "everyone"]
    for case in everyone:
        if case.studied:
            same = (other.name for other in everyone if other.kind == case.kind and not other.studied)
            yield case.name, next(same, None)


def _standings(results: Results, case: Case, large: str | None) -> list[dict[str, str]]:
    times = sorted(results.of(case.name, "us_per_step"), key=lambda row: row.p50)
    size = next((other.size for other in CASES if other.name == large), "")
    return [
        {
            "contender": row.contender,
            "time": time_of(row),
            f"{OURS} is faster by": ratio_of(results.get(case.name, OURS, f"speedup/{row.contender}")),
            **(
                {
                    f"at {size}": time_of(results.get(large, row.contender, "us_per_step")),
                    "there by": ratio_of(results.get(large, OURS, f"speedup/{row.contender}")),
                }
                if large
                else {}
            ),
            "first step": time_of(results.get(case.name, row.contender, "first_step_us")),
            "operators": number_of(results.get(case.name, row.contender, "operators")),
            "extra memory": bytes_of(results.get(case.name, row.contender, "peak_extra_bytes")),
            "rms (largest) error, ulp": _error(results, case, row.contender),
            "same work": _work(results, case, row.contender),
        }
        for row in times
    ]


def _error(results: Results, case: Case, contender: str) -> str:
    rms, largest = (results.get(case.name, contender, metric) for metric in ("rms_error", "max_error"))
    return f"{rms.p50:.3g} ({largest.p50:.3g})" if rms and largest else NONE


def _work(results: Results, case: Case, contender: str) -> str:
    if contender == OURS:
        return NONE
    same = results.get(case.name, OURS, f"same_work/{contender}")
    return "yes" if same and same.p50 == 1.0 else different(case, contender)


def different(case: Case, contender: str) -> str:
    """What to say of a contender whose results are others."""
    if rounded := rounds_otherwise(contender, case.kind.name):
        return f"rounds {rounded} otherwise"
    return f"**different work** {why_different(contender, case.kind.name, case.mix)}".strip()


def curve(of: str, results: Results, cases: Sequence[Case] = CASES) -> list[Case]:
    """The points of a curve that were measured."""
    return [case for case in cases if case.table.endswith(f"curve {of}") and case.name in results.cases]


def curves(cases: Sequence[Case]) -> Callable[[Results], str]:
    def build(results: Results) -> str:
        parts = (_curve(of, unit, results, curve(of, results, cases)) for of, unit in CURVES.items())
        return "\n\n".join(filter(None, parts))

    return build


def _curve(of: str, unit: str, results: Results, cases: Sequence[Case]) -> str:
    labels = list(dict.fromkeys(row.contender for case in cases for row in results.of(case.name, "us_per_step")))
    return table(
        f"Number of {of}, {unit}: Adam, fp32",
        [
            {
                of: f"{case.x:,}",
                **{label: time_of(results.get(case.name, label, "us_per_step")) for label in labels},
                "until step() returns": time_of(results.get(case.name, OURS, "host_us")),
                "per tensor": _per_tensor(results, case),
                **{
                    f"faster than {label}": ratio_of(results.get(case.name, OURS, f"speedup/{label}"))
                    for label in labels
                    if label != OURS
                },
            }
            for case in cases
        ],
    )


def _per_tensor(results: Results, case: Case) -> str:
    """Of the host, where that is known apart from the device."""
    row = results.get(case.name, OURS, "host_us") or results.get(case.name, OURS, "us_per_step")
    return f"{row.p50 / len(case.workload.shapes):.3g} µs" if row else NONE


def trainings(results: Results) -> str:
    lines = []
    for training in TRAININGS:
        case = f"training {training.name}"
        for row in results.of(case, "training_us"):
            part = results.get(case, row.contender, "part_of_training")
            loss = results.get(case, row.contender, "final_loss")
            lines.append(
                {
                    "model": training.model,
                    "rule": training.kind.label,
                    "contender": row.contender,
                    "training step": time_of(row),
                    "optimizer": time_of(results.get(case, row.contender, "us_per_step")),
                    "its part": f"{100 * part.p50:.1f} %" if part else NONE,
                    f"{OURS} trains faster by": ratio_of(results.get(case, OURS, f"speedup/{row.contender}")),
                    "final loss": f"{loss.p50:.5f}" if loss else NONE,
                }
            )
    return table("Training", lines)


def _comparison(v: Verdict) -> dict[str, str]:
    return {"times faster": ratio_of(v.speedup), "goal": v.goal("speedup"), "same results": v.agreement}


def _first_steps(results: Results) -> str:
    lines = [
        {"rule": case.kind.label, "contender": row.contender, "first step": time_of(row)}
        for case in _of("compiled", results)
        for row in results.of(case.name, "first_step_us")
    ]
    return table("What the first step costs, 10x1,000,000", lines)


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


_EXTRACTS: dict[str, tuple[Callable[[Results], str], ...]] = {"cpu short": (_short,)}
"""What repeats figures of the blocks below, for pages that want fewer."""
_BLOCKS: dict[str, tuple[Callable[[Results], str], ...]] = {
    "cpu": (_adam, _rules),
    "structure": (
        _compared("Many groups, absent gradients, changing rates, moved or misaligned memory: Adam, fp32", "structure"),
        _compared("Parameters that are DTensors, as FSDP2 makes them, in a group of one: AdamW, fp32", "sharded"),
    ),
    "models": (_compared("Parameter lists of real models, and of extremes: AdamW, fp32", "models"),),
    "mixes": (_mixes,),
    "compiled": (_compared("Against the compiled step of torch, fp32", "compiled"), _first_steps),
    "ceilings": (_ceilings, _allocations, _noise),
    "peers": (_peers,),
    "curves": (curves(CASES),),
    "training": (trainings,),
}
UNMEASURED = "Not measured yet: `make bench` does it."


def names() -> list[str]:
    """Of the blocks that a page may have."""
    return [*_EXTRACTS, *_BLOCKS, *(f"cost {name}" for name in dict.fromkeys(kind.name for kind in RULES.values()))]


def block(name: str, rows: Sequence[Row]) -> str:
    """The tables of a block that the rows can fill, and where their figures come from."""
    results = Results(rows)
    if name.startswith("cost "):
        return cost(name.removeprefix("cost "), results)
    parts = [part for part in (build(results) for build in (_EXTRACTS | _BLOCKS)[name]) if part]
    return "\n\n".join([*parts, provenance(results)]) if parts else UNMEASURED


def markdown(rows: Sequence[Row]) -> str:
    """All tables that the rows can fill, and where the figures come from."""
    results = Results(rows)
    parts = [part for builds in _BLOCKS.values() for part in (build(results) for build in builds) if part]
    return "\n\n".join([*parts, provenance(results)])
