"""A CSV -> the tables between the README's markers, and the plot. Writing them twice changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.contenders import OURS
from bench.gpu_tables import UNMEASURED, gpu_markdown
from bench.records import Row, read
from bench.tables import Results, Verdict, markdown, verdicts

OPENING, CLOSING = "<!-- bench:{name} -->", "<!-- /bench:{name} -->"
# Greys and hues of middling lightness, on no background of its own: the plot reads on white and on near-black pages.
INK, GRID, BAR, GOAL = "#7d8590", "#7d859055", "#3b8ed0", "#e3703a"
TICKS = (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


def write(csv: Path, readme: Path, plot: Path, name: str = "cpu") -> None:
    rows = read(csv)
    text = readme.read_text(encoding="utf-8")
    readme.write_text(with_block(text, name, markdown(rows), source=str(readme)), encoding="utf-8")
    draw(rows, plot)


def write_gpu(csv: Path, readme: Path) -> None:
    """The GPU's block, where the text has one; without a CSV it says that nothing was measured."""
    text = readme.read_text(encoding="utf-8")
    if OPENING.format(name="gpu") in text:
        body = gpu_markdown(read(csv)) if csv.exists() else UNMEASURED
        readme.write_text(with_block(text, "gpu", body, source=str(readme)), encoding="utf-8")


def with_block(text: str, name: str, body: str, source: str = "the text") -> str:
    """The text with `body` between the markers called `name`, whatever stood there before."""
    opening, closing = OPENING.format(name=name), CLOSING.format(name=name)
    before, opened, rest = text.partition(opening)
    _, closed, after = rest.partition(closing)
    if not (opened and closed):
        raise ValueError(
            f"{source} has no place for the tables: write a line {opening} and, below it, a line {closing}"
        )
    return f"{before}{opening}\n{body}\n{closing}{after}"


def draw(rows: Sequence[Row], path: Path) -> None:
    """How many times faster than the fastest rival, with the spread of the rounds and the goal."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = Results(rows)
    shown = [verdict for table in ("adam", "rules") for verdict in verdicts(results, table) if verdict.same_work][::-1]
    with pyplot.rc_context(
        {"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": INK}
    ):
        figure, axes = pyplot.subplots(figsize=(8, 1.1 + 0.34 * len(shown)), layout="constrained")
        _bars(axes, shown)
        figure.savefig(path, dpi=150, transparent=True, metadata={"Software": None})
        pyplot.close(figure)


def _bars(axes: Any, shown: Sequence[Verdict]) -> None:
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
    axes.set_yticks(places, [f"{v.case.rule} {v.case.size}, over {v.rival}" for v in shown])
    axes.set_xscale("log")
    axes.set_xticks(TICKS, [f"{tick:g}x" for tick in TICKS])
    axes.minorticks_off()
    reached = [value for v in shown for value in (v.speedup.p20, v.speedup.p80)] + [value for _, value in goals]
    axes.set_xlim(min([0.9, *reached]) / 1.1, max([2.0, *reached]) * 1.2)
    axes.axvline(1, color=INK, linewidth=1)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.patch.set_alpha(0)
    axes.set_xlabel(f"times faster: {OURS} over its fastest rival, CPU, fp32")
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
