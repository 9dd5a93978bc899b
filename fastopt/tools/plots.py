"""The two pictures: of a comparison and of a demo.

A picture has a light background of its own, so that it reads the same on a light page and on a dark one. It is drawn
without pyplot, so that a user's figures and backend are left alone. matplotlib is imported when a picture is drawn,
never before.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fastopt.report import need

if TYPE_CHECKING:
    from .comparison import Comparison
    from .demo import Result

LOOK: dict[str, Any] = {
    "figure.facecolor": "#fbfbfa",
    "axes.facecolor": "#fbfbfa",
    "axes.edgecolor": "#8a8a8a",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "grid.color": "#e2e2e0",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "font.size": 9,
    "text.color": "#222222",
    "axes.labelcolor": "#222222",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7b3294", "#a6192e", "#5b5b5b", "#6b8e23")
"""As many as eyes tell apart; beyond ten they repeat with another line style."""
STYLES = ("-", "--", ":")
LOG_SCALE_FROM = 10
"""An axis is logarithmic when its largest value is that many times its smallest."""


def comparison(result: Comparison, path: str) -> None:
    """Save the score by learning rate, the seeds of every optimizer at its best one, and the loss curves there."""
    looks = {standing.optimizer: _look(i) for i, standing in enumerate(result.standings)}

    def paint(figure: Any) -> None:
        by_lr, by_seed, curves = figure.subplots(1, 3)
        _paint_lrs(by_lr, result, looks)
        _paint_seeds(by_seed, result, looks)
        _paint_curves(curves, result, looks)
        figure.legend(*by_lr.get_legend_handles_labels(), loc="outside right upper")

    _save(path, (16, 5), paint)


def demo(results: Sequence[Result], path: str) -> None:
    """Save, for each task, the loss curves of both libraries, one above the other, and the time of a step."""
    tasks = list(dict.fromkeys(result.task for result in results))

    def paint(figure: Any) -> None:
        rows = figure.subplots(len(tasks), 2, squeeze=False, width_ratios=(3, 2))
        for task, (curves, times) in zip(tasks, rows, strict=True):
            of_task = [result for result in results if result.task == task]
            _paint_twins(curves, of_task)
            _paint_times(times, of_task)

    _save(path, (12, 4 * len(tasks)), paint)


def _save(path: str, size: tuple[float, float], paint: Callable[[Any], None]) -> None:
    matplotlib = need("matplotlib", "drawing the picture")
    figures = need("matplotlib.figure", "drawing the picture")
    with matplotlib.rc_context(LOOK):
        figure = figures.Figure(figsize=size, layout="constrained")
        paint(figure)
        figure.savefig(path, dpi=130)


def _look(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i // len(COLOURS) % len(STYLES)]}


def _log_if_wide(values: Iterable[float]) -> str:
    known = list(values)
    return "log" if known and min(known) > 0 and max(known) > LOG_SCALE_FROM * min(known) else "linear"


def _paint_lrs(axes: Any, result: Comparison, looks: dict[str, dict[str, Any]]) -> None:
    finite = [run.score for run in result.runs if run.finished]
    for name, look in looks.items():
        by_lr: dict[float, list[float]] = {}
        for run in result.runs:
            if run.optimizer == name and run.finished:
                by_lr.setdefault(run.lr, []).append(run.score)
        lrs = sorted(by_lr)
        means = [statistics.fmean(by_lr[lr]) for lr in lrs]
        axes.plot(lrs, means, marker="o", markersize=4, label=name, **look)
        axes.fill_between(
            lrs, [min(by_lr[lr]) for lr in lrs], [max(by_lr[lr]) for lr in lrs], color=look["color"], alpha=0.12, lw=0
        )
    axes.set(
        title="Score by learning rate (mean and range of the seeds)",
        xlabel="learning rate",
        ylabel=result.score_name,
        xscale="log" if finite else "linear",
        yscale=_log_if_wide(finite),
    )


def _paint_seeds(axes: Any, result: Comparison, looks: dict[str, dict[str, Any]]) -> None:
    for height, standing in enumerate(result.standings):
        colour = looks[standing.optimizer]["color"]
        axes.scatter(standing.scores, [height] * len(standing.scores), s=18, color=colour, alpha=0.7, lw=0)
        if standing.scores:
            axes.plot([standing.mean] * 2, [height - 0.3, height + 0.3], color=colour, lw=2.5)
    labels = [f"{standing.optimizer}  {standing.lr:g}" for standing in result.standings]
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set(
        title="Seeds at the best learning rate, and their mean",
        xlabel=result.score_name,
        xscale=_log_if_wide(score for standing in result.standings for score in standing.scores),
    )


def _paint_curves(axes: Any, result: Comparison, looks: dict[str, dict[str, Any]]) -> None:
    everything: list[float] = []
    for standing in result.standings:
        runs = [run.losses for run in result.runs if (run.optimizer, run.lr) == (standing.optimizer, standing.lr)]
        mean = [statistics.fmean(values) for values in zip(*(_smooth(losses) for losses in runs), strict=False)]
        axes.plot(range(1, len(mean) + 1), mean, lw=1.2, **looks[standing.optimizer])
        everything += mean
    axes.set(
        title="Training loss at the best learning rate (smoothed)",
        xlabel="step",
        ylabel="loss",
        yscale=_log_if_wide(everything),
    )


def _smooth(values: Sequence[float]) -> list[float]:
    """Means over a window that grows to a thirtieth of the curve."""
    width = max(1, len(values) // 30)
    return [statistics.fmean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def _paint_twins(axes: Any, results: Sequence[Result]) -> None:
    for i, result in enumerate(results):
        look = {"color": COLOURS[i % len(COLOURS)]}
        for curve, style in (
            (result.torch_default.losses, {"lw": 5, "alpha": 0.3}),
            (result.fastopt.losses, {"lw": 1.1}),
        ):
            smooth = _smooth(curve)
            axes.plot(range(1, len(smooth) + 1), smooth, **look, **style)
        axes.plot([], [], lw=2, label=result.optimizer, **look)
    axes.set(
        title=f"{results[0].task}: training loss (broad: torch.optim, thin: fastopt)",
        xlabel="step",
        ylabel="loss (smoothed)",
        yscale=_log_if_wide(loss for result in results for loss in _smooth(result.fastopt.losses)),
    )
    axes.legend()


def _paint_times(axes: Any, results: Sequence[Result]) -> None:
    bars = (
        ("torch.optim default", "#b9b9b4", [result.torch_default.step_median for result in results]),
        ("torch.optim best", "#7d7d78", [result.torch_best.step_median for result in results]),
        ("fastopt", COLOURS[0], [result.fastopt.step_median for result in results]),
    )
    for offset, (label, colour, seconds) in zip((-0.27, 0.0, 0.27), bars, strict=True):
        positions = [i + offset for i in range(len(results))]
        drawn = axes.barh(positions, [1e3 * value for value in seconds], height=0.25, color=colour, label=label)
        axes.bar_label(drawn, fmt="%.3g", padding=3, fontsize=8)
    axes.set_yticks(range(len(results)), [result.optimizer for result in results])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)
    axes.set(title=f"{results[0].task}: optimizer.step(), median", xlabel="ms")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=len(bars))
