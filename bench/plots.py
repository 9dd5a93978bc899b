"""Rows of a run -> pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.cases import CASES, CURVES, Case
from bench.contenders import OURS
from bench.cpu_tables import Verdict, curve, verdicts
from bench.gpu import TRITON
from bench.gpu_cases import GPU_CASES
from bench.gpu_tables import in_short
from bench.records import Row
from bench.tables import Results

# Greys and hues of middling lightness, on no background of its own: a plot reads on white and on near-black pages.
INK, GRID, BAR, GOAL = "#7d8590", "#7d859055", "#3b8ed0", "#e3703a"
COLOURS = {OURS: BAR, TRITON: "#8a63c9", "torch fused": GOAL, "torch foreach": "#5a9e54"}
TICKS = (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


def speedups(rows: Sequence[Row], path: Path) -> bool:
    """How many times faster than the fastest rival, with the spread of the rounds and the goal."""
    results = Results(rows)
    tables = ("adam", "rules", "models")
    shown = [verdict for table in tables for verdict in verdicts(results, table) if verdict.same_work][::-1]
    return _bars(path, shown, "CPU, fp32")


def gpu_speedups(rows: Sequence[Row], path: Path) -> bool:
    """The same of the README's table of a GPU."""
    return _bars(path, [line.verdict for line in in_short(Results(rows))][::-1], "GPU")


def curves(rows: Sequence[Row], path: Path) -> bool:
    """How a step's time grows with the number of tensors, their size, and the number of groups."""
    return _curves(rows, path, CASES, "CPU")


def gpu_curves(rows: Sequence[Row], path: Path) -> bool:
    """The same, with the wait for the device."""
    return _curves(rows, path, GPU_CASES, "GPU")


def _curves(rows: Sequence[Row], path: Path, cases: Sequence[Case], where: str) -> bool:
    results = Results(rows)
    measured = {of: points for of in CURVES if (points := curve(of, results, cases))}
    if not measured:
        return False
    with _figure(path, figsize=(11, 3.6), ncols=len(measured), sharey=True, squeeze=False) as (_, panels):
        for axes, (of, cases) in zip(panels[0], measured.items(), strict=True):
            for label, colour in COLOURS.items():
                points = [(case.x, row) for case in cases if (row := results.get(case.name, label, "us_per_step"))]
                if not points:
                    continue
                x = [place for place, _ in points]
                axes.plot(x, [row.p50 for _, row in points], color=colour, marker="o", markersize=4, label=label)
                axes.fill_between(x, *([getattr(row, p) for _, row in points] for p in ("p20", "p80")), color=colour,
                                  alpha=0.2, linewidth=0)  # fmt: skip
            axes.set(xscale="log", yscale="log", xlabel=f"{of} {CURVES[of]}")
            _plain(axes)
        panels[0][0].set_ylabel(f"µs per step, Adam, {where}, fp32")
        panels[0][0].legend(frameon=False)
    return True


@contextmanager
def _figure(path: Path, **shape: Any) -> Iterator[tuple[Any, Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    inked = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
    with pyplot.rc_context(dict.fromkeys(inked, INK)):
        figure, axes = pyplot.subplots(layout="constrained", **shape)
        yield figure, axes
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, transparent=True, metadata={"Software": None})
        pyplot.close(figure)


def _plain(axes: Any) -> None:
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.patch.set_alpha(0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _bars(path: Path, shown: Sequence[Verdict], where: str) -> bool:
    if not shown:
        return False
    with _figure(path, figsize=(8, 1.1 + 0.34 * len(shown))) as (_, axes):
        _draw_bars(axes, shown)
        axes.set_xlabel(f"times faster: {OURS} over its fastest rival, {where}")
    return True


def _draw_bars(axes: Any, shown: Sequence[Verdict]) -> None:
    """Bars grow from 1, "as fast": to the right where fastopt is the faster one, to the left where the rival is."""
    places = range(len(shown))
    middles = [v.speedup.p50 for v in shown]
    spread = [[v.speedup.p50 - v.speedup.p20 for v in shown], [v.speedup.p80 - v.speedup.p50 for v in shown]]
    axes.barh(places, [middle - 1 for middle in middles], left=1, height=0.62, color=BAR)
    axes.errorbar(middles, places, xerr=spread, fmt="none", ecolor=INK, elinewidth=1.5, capsize=3)
    goals = [(place, goal.value) for place, v in zip(places, shown, strict=True) if (goal := v.case.goal("speedup"))]
    axes.scatter(
        [value for _, value in goals], [place for place, _ in goals], marker="|", s=220, color=GOAL, label="goal"
    )
    mixes = ["" if v.case.mix == "fp32" else f"{v.case.mix}, " for v in shown]
    names = [f"{v.case.kind.label} {mix}{v.case.size}, over {v.rival}" for v, mix in zip(shown, mixes, strict=True)]
    axes.set_yticks(places, names)
    axes.set_xscale("log")
    axes.set_xticks(TICKS, [f"{tick:g}x" for tick in TICKS])
    axes.minorticks_off()
    reached = [value for v in shown for value in (v.speedup.p20, v.speedup.p80)] + [value for _, value in goals]
    axes.set_xlim(min([0.9, *reached]) / 1.1, max([2.0, *reached]) * 1.2)
    axes.axvline(1, color=INK, linewidth=1)
    _plain(axes)
    axes.grid(visible=False, axis="y")
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0)
