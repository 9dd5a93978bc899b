"""What a set of training runs says about the optimizers in it: `Comparison`, the result of `fastopt.compare`.

How it judges
- An optimizer stands at the learning rate with the fewest diverged seeds and then the best mean score over its seeds.
  Where that is the end of its grid, the table says "widen the grid". The same scores choose the learning rate and rank
  the optimizers, so the scores of all are a little optimistic, those from longer grids a little more.
- A rival is worse than the winner beyond the noise when the difference of their means exceeds the half-width of its
  confidence interval: Student's t over the seeds with the pooled standard error, corrected (Bonferroni) for the number
  of rivals (`fastopt.tools.noise`).
- An optimizer with a diverged seed at its best learning rate ranks after all that have none.
- An optimizer whose own step raised an error failed: it ranks last, is no rival in the above, and its reason is shown.
"""

from __future__ import annotations

import csv
import math
import statistics
import textwrap
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike, fspath
from pathlib import Path

from fastopt.report import table

from . import noise, plots

REASON_WIDTH = 48
"""How much of a failure's reason the table shows; the summary has all of it."""


@dataclass(frozen=True)
class Run:
    """One training. It diverged when its loss or its score was not finite: then, or if it failed, ``score`` is NaN."""

    optimizer: str
    lr: float
    seed: int
    score: float
    metrics: dict[str, float]
    """Everything the evaluation returned, the score first."""
    losses: array[float] = field(repr=False)
    """The training loss at every step, before the update."""
    diverged_at: int | None
    """After how many steps the divergence was seen; None when there was none."""
    seconds: float
    failed: str = ""
    """The error that the optimizer itself raised, its type in front; "" when there was none."""

    @property
    def finished(self) -> bool:
        """Does it have a score?"""
        return self.diverged_at is None and not self.failed


@dataclass(frozen=True)
class Standing:
    """Where one optimizer stands, at its best learning rate, or at the one where it failed."""

    optimizer: str
    lr: float
    scores: tuple[float, ...]
    """The scores of the seeds that did not diverge."""
    diverged: int
    """How many seeds diverged at ``lr``."""
    lrs: tuple[float, ...]
    """Every learning rate that was tried."""
    behind: float
    """How much worse than the winner on average; 0 for the winner, NaN when nothing can be compared."""
    noise: float
    """What ``behind`` must exceed to be more than chance; NaN for the winner, and where the seeds are too few."""
    failed: str = ""
    """Why it failed; "" when it did not. A failed one has no scores."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores) if self.scores else math.nan

    @property
    def std(self) -> float:
        return statistics.stdev(self.scores) if len(self.scores) > 1 else math.nan

    @property
    def edge(self) -> str:
        """ "lowest" or "highest" where ``lr`` is an end of its grid and a better one may lie beyond; else ""."""
        if len(self.lrs) == 1 or self.failed:
            return ""
        return {min(self.lrs): "lowest", max(self.lrs): "highest"}.get(self.lr, "")

    @property
    def beyond_noise(self) -> bool:
        """Is it behind the winner by more than the noise? False also where the noise is unknown."""
        return self.behind > self.noise


def best_lr(runs: Sequence[Run], higher_is_better: bool) -> float:
    """The learning rate at which the runs of one optimizer did best."""
    lrs = sorted({run.lr for run in runs})
    return min(lrs, key=lambda lr: _rank([run for run in runs if run.lr == lr], higher_is_better))


def _rank(runs: Sequence[Run], higher_is_better: bool) -> tuple[bool, int, float]:
    """Sorts the runs of one setting: failed last, fewest diverged first, then the best mean score."""
    scores = _finite_scores(runs)
    failed = any(run.failed for run in runs)
    if not scores:
        return failed, len(runs), math.inf
    mean = statistics.fmean(scores)
    return failed, len(runs) - len(scores), -mean if higher_is_better else mean


def _finite_scores(runs: Sequence[Run]) -> tuple[float, ...]:
    return tuple(run.score for run in runs if run.finished)


@dataclass(frozen=True)
class Comparison:
    """What was found: ``best`` and ``standings``, ``str()`` for reading, ``to_csv`` and ``plot`` for keeping."""

    runs: tuple[Run, ...]
    steps: int
    higher_is_better: bool = False
    confidence: float = 0.95

    @property
    def best(self) -> Standing:
        """The winner. Look at ``standings`` for who is within the noise of it."""
        if not self.standings:
            raise ValueError("there are no runs in this comparison, so none is the best")
        return self.standings[0]

    @cached_property
    def standings(self) -> tuple[Standing, ...]:
        """Every optimizer at its best learning rate, the best optimizer first."""
        at_best: dict[str, list[Run]] = {}
        tried: dict[str, tuple[float, ...]] = {}
        for name in dict.fromkeys(run.optimizer for run in self.runs):
            runs = [run for run in self.runs if run.optimizer == name]
            failed = [run for run in runs if run.failed]
            lr = failed[0].lr if failed else best_lr(runs, self.higher_is_better)
            at_best[name] = failed[:1] or [run for run in runs if run.lr == lr]
            tried[name] = tuple(sorted({run.lr for run in runs}))
        ranking = sorted(at_best, key=lambda name: _rank(at_best[name], self.higher_is_better))
        winner = at_best[ranking[0]] if ranking else []
        rivals = sum(not runs[0].failed for runs in at_best.values()) - 1
        return tuple(self._standing(at_best[name], winner, tried[name], rivals) for name in ranking)

    def _standing(self, runs: list[Run], winner: list[Run], lrs: tuple[float, ...], rivals: int) -> Standing:
        scores, best = _finite_scores(runs), _finite_scores(winner)
        sign = -1 if self.higher_is_better else 1
        behind = sign * (statistics.fmean(scores) - statistics.fmean(best)) if scores and best else math.nan
        width = math.nan if runs is winner else noise.half_width(best, scores, self.confidence, max(1, rivals))
        diverged = sum(run.diverged_at is not None for run in runs)
        # Adding zero makes 0 of the -0 that an equal mean has where higher is better.
        return Standing(runs[0].optimizer, runs[0].lr, scores, diverged, lrs, behind + 0.0, width, runs[0].failed)

    @property
    def score_name(self) -> str:
        return next((name for run in self.runs for name in run.metrics), "score")

    def verdict(self, it: Standing) -> str:
        """A standing in words: "best", "within noise", "worse", "noise unknown", how many seeds diverged, or the error
        with which it failed."""
        if it.failed:
            return f"failed: {it.failed}"
        if it.diverged:
            return f"diverged: {it.diverged} of {it.diverged + len(it.scores)}"
        if it is self.best:
            return "best"
        if math.isnan(it.noise):
            return "noise unknown"
        return "worse" if it.beyond_noise else "within noise"

    def table(self) -> str:
        """One line for each optimizer, the best first."""
        headings = ("optimizer", "verdict", "best lr", self.score_name, "+- std", "behind", "noise", "lrs tried")
        return table(headings, [self._row(standing) for standing in self.standings], left=2)

    def _row(self, it: Standing) -> tuple[str, ...]:
        verdict = f"failed: {textwrap.shorten(it.failed, REASON_WIDTH)}" if it.failed else self.verdict(it)
        tried = f"{len(it.lrs)}: {min(it.lrs):g}..{max(it.lrs):g}" if len(it.lrs) > 1 else "1"
        widen = " (widen the grid)" if it.edge else ""
        against = (math.nan, math.nan) if it is self.best else (it.behind, it.noise)
        numbers = (f"{value:.4g}" if math.isfinite(value) else "-" for value in (it.mean, it.std, *against))
        return it.optimizer, verdict, "-" if it.failed else f"{it.lr:g}", *numbers, tried + widen

    def summary(self) -> str:
        """The result in sentences: who won, at which learning rate, by how much beyond the noise, what to doubt."""
        if not self.standings:
            return "No runs, so nothing to compare."
        return "\n".join(
            [
                *self._result(),
                *self._doubts(),
                f"This holds for this problem and {self.steps} steps; the lrs were chosen on the same scores.",
            ]
        )

    def _result(self) -> list[str]:
        best, rivals = self.best, self.standings[1:]
        if best.failed:
            return ["Every optimizer failed, so nothing could be compared."]
        if best.diverged:
            return ["No optimizer finished every seed without diverging: try smaller learning rates."]
        seeds = len(best.scores)
        spread = f" +- {best.std:.2g} over {seeds} seeds" if seeds > 1 else " with one seed"
        lines = [f"{best.optimizer} at lr {best.lr:g} did best: {self.score_name} {best.mean:.4g}{spread}."]
        if ties := [it.optimizer for it in rivals if self.verdict(it) == "within noise"]:
            lines.append(f"Not shown to be worse, within the noise of it: {', '.join(ties)}.")
        if worse := [it for it in rivals if self.verdict(it) == "worse"]:
            names = ", ".join(it.optimizer for it in worse)
            nearest = f"; the nearest, {worse[0].optimizer}," if len(worse) > 1 else ""
            by = f"by {worse[0].behind:.3g} where chance explains {worse[0].noise:.3g}"
            lines.append(f"Worse, beyond the noise ({self.confidence:.0%} confidence): {names}{nearest} {by}.")
        return lines

    def _doubts(self) -> list[str]:
        lines = []
        verdicts = {self.verdict(it) for it in self.standings}
        if "noise unknown" in verdicts:
            lines.append("One seed cannot tell a difference from chance: use at least 3.")
        if "within noise" in verdicts:
            lines.append("More seeds make the noise smaller.")
        if ends := [f"{it.optimizer} ({it.edge}, {it.lr:g})" for it in self.standings if it.edge]:
            lines.append(
                f"Best at the end of the grid, so widen the grid, a better lr may lie beyond: {', '.join(ends)}."
            )
        if diverged := sum(run.diverged_at is not None for run in self.runs):
            lines.append(f"{diverged} of {len(self.runs)} runs diverged.")
        lines += [f"{it.optimizer} failed at lr {it.lr:g}: {it.failed}" for it in self.standings if it.failed]
        return lines

    def __str__(self) -> str:
        return f"{self.table()}\n\n{self.summary()}"

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write one row for each run, numbers in full; ``diverged_at`` and ``failed`` are empty where it did not."""
        metrics = list(dict.fromkeys(name for run in self.runs for name in run.metrics if name != "score"))
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["optimizer", "lr", "seed", "steps", "score", "diverged_at", "failed", "seconds", *metrics])
            for run in self.runs:
                at = "" if run.diverged_at is None else run.diverged_at
                values = [run.metrics.get(name, "") for name in metrics]
                setting = (run.optimizer, run.lr, run.seed, self.steps)
                writer.writerow([*setting, run.score, at, run.failed, run.seconds, *values])

    def plot(self, path: str | PathLike[str]) -> None:
        """Save a picture: score by learning rate, the seeds of each optimizer at its best one, and the loss curves."""
        plots.comparison(self, fspath(path))
