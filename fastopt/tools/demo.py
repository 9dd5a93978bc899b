"""Train real models with torch.optim and with fastopt, side by side, and show both the losses and the time.

How it is made fair
- Twins: for every optimizer, one copy of the model for each of torch's implementations (its default, ``foreach`` and
  ``fused`` where there is one) and one for fastopt, with the same weights, batches and options.
- The twins take turns within every step, in an order that rotates, in one process; each does its own forward and
  backward.
- Only ``optimizer.step()`` counts as step time, and the median over all steps is shown. Training time is everything.
- torch has no Ranger. Its rival is the nearest that torch's parts can make, `fastopt.Lookahead` around
  ``torch.optim.RAdam``, which lacks gradient centralisation: the two losses may be compared, the curves are not
  expected to be the same.
"""

from __future__ import annotations

import csv
import inspect
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import fastopt
from fastopt import backends
from fastopt.report import Progress, need, table

from . import plots, tasks
from .compare import scored_weights
from .entrants import Make

STEPS = {"digits": 600, "chars": 250}
LEARNING_RATES = {"Adam": 3e-3, "AdamW": 3e-3, "RAdam": 1e-2, "NAdam": 3e-3, "Ranger": 3e-2}
"""One rate for each rule, chosen to train well within the steps above, not to win: `fastopt.compare` is for that."""


def _no_wait() -> None:
    """A CPU has finished when a call returns."""


@dataclass
class Lane:
    """One of the twins: a model, the optimizer that trains it, and what was measured at every step."""

    label: str
    model: nn.Module
    optimizer: Optimizer
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    """Of ``optimizer.step()`` alone."""
    iteration_seconds: list[float] = field(default_factory=list)
    """Of everything: forward, backward, step."""
    score: float = math.nan

    @property
    def step_median(self) -> float:
        return statistics.median(self.step_seconds)

    @property
    def train_seconds(self) -> float:
        return sum(self.iteration_seconds)

    def difference(self, other: Lane) -> float:
        """The largest difference between the two loss curves; 0 when they are the same to the last bit."""
        return max(abs(a - b) for a, b in zip(self.losses, other.losses, strict=True))

    def advance(self, task: tasks.Task, batch: tasks.Batch, wait: Callable[[], None] = _no_wait) -> None:
        """Train one step; `wait` waits for the device, so that each part's time is its own."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = task.loss(self.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        wait()
        before = time.perf_counter()
        self.optimizer.step()
        wait()
        end = time.perf_counter()
        self.losses.append(loss.item())
        self.step_seconds.append(end - before)
        self.iteration_seconds.append(end - start)


@dataclass(frozen=True)
class Result:
    """The race of one optimizer on one task; ``torch_lanes`` are torch's implementations, the default first."""

    task: str
    optimizer: str
    score_name: str
    torch_lanes: tuple[Lane, ...]
    fastopt: Lane
    same_rule: bool

    @property
    def torch_default(self) -> Lane:
        return self.torch_lanes[0]

    @property
    def torch_best(self) -> Lane:
        return min(self.torch_lanes, key=lambda lane: lane.step_median)


@dataclass(frozen=True)
class Pair:
    """An optimizer of fastopt and, by implementation, how torch makes the same; the first is torch's default."""

    name: str
    ours: Make
    theirs: Mapping[str, Make]
    same_rule: bool = True


def pairs() -> list[Pair]:
    """What the demo races: torch's rules that fastopt has too, and Ranger beside its nearest relative."""
    found = []
    for name in ("Adam", "AdamW", "RAdam", "NAdam"):
        cls = getattr(torch.optim, name)
        theirs = {label: partial(cls, **options) for label, options in _implementations(cls)}
        found.append(Pair(name, getattr(fastopt, name), theirs))
    like_ranger = {"betas": (0.95, 0.999), "eps": 1e-5}
    theirs = {
        label: partial(_lookahead_radam, {**like_ranger, **options})
        for label, options in _implementations(torch.optim.RAdam)
    }
    return [*found, Pair("Ranger", fastopt.Ranger, theirs, same_rule=False)]


def _implementations(cls: type[Optimizer]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "default", {}
    for flag in ("foreach", "fused"):
        if flag in inspect.signature(cls).parameters:
            yield flag, {flag: True}


def _lookahead_radam(options: dict[str, Any], params: list[torch.Tensor], lr: float) -> Optimizer:
    return fastopt.Lookahead(torch.optim.RAdam(params, lr=lr, **options), k=6, alpha=0.5)


def run(
    task_names: Sequence[str] = ("digits", "chars"),
    optimizers: Sequence[str] = tuple(LEARNING_RATES),
    steps: int | None = None,
    seed: int = 0,
    threads: int = 1,
    progress: bool = True,
) -> Demo:
    """Race every optimizer on every task.

    Args:
        task_names: names from `fastopt.tools.tasks`.
        optimizers: which of "Adam", "AdamW", "RAdam", "NAdam", "Ranger".
        steps: steps of each training; default 600 for digits, 250 for chars.
        seed: of the weights and the batches.
        threads: torch threads meanwhile; models this small gain nothing from more than one, and timings suffer.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: an unknown task or optimizer, or ``steps`` below 1.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    chosen_tasks = [tasks.get(name) for name in task_names]
    known = {pair.name: pair for pair in pairs()}
    if unknown := [name for name in optimizers if name not in known]:
        raise ValueError(f"the demo has no optimizer {unknown[0]!r}: it races {', '.join(known)}")
    chosen = [known[name] for name in optimizers]
    count = {task.name: steps or STEPS[task.name] for task in chosen_tasks}
    with tasks.threads(threads), Progress(sum(count.values()) * len(chosen), progress) as bar:
        results = [race(task, pair, count[task.name], seed, bar) for task in chosen_tasks for pair in chosen]
    return Demo(tuple(results), seed, threads)


def race(task: tasks.Task, pair: Pair, steps: int, seed: int, bar: Progress) -> Result:
    """Train the twins of one optimizer on one task, taking turns step by step."""
    lr = LEARNING_RATES[pair.name]
    lanes = []
    for label, make in {**pair.theirs, "fastopt": pair.ours}.items():
        model = task.make_model(seed)
        lanes.append(Lane(label, model, make(list(model.parameters()), lr)))
    *torch_lanes, ours = lanes
    for step, batch in zip(range(steps), task.batches(seed), strict=False):
        first = step % len(lanes)
        for lane in lanes[first:] + lanes[:first]:
            lane.advance(task, batch)
        losses = f"loss {torch_lanes[0].losses[-1]:.4f} torch, {ours.losses[-1]:.4f} fastopt"
        bar.advance(f"{task.name}  {pair.name}  {losses}")
    for lane in lanes:
        with scored_weights(lane.optimizer):
            score_name, lane.score = next(iter(task.evaluate(lane.model).items()))
    return Result(task.name, pair.name, score_name, tuple(torch_lanes), ours, pair.same_rule)


@dataclass(frozen=True)
class Demo:
    """The results of all races: ``str()`` for reading, ``to_csv`` and ``plot`` for keeping."""

    results: tuple[Result, ...]
    seed: int
    threads: int

    def table(self) -> str:
        """One line for each task and optimizer."""
        headings = (
            "task", "optimizer", "score\ntorch", "\nfastopt", "curves\ndiffer by",
            "step (ms)\ntorch", "\ntorch's best", "\nfastopt", "speed-up\nof the step", "train (s)\ntorch", "\nfastopt",
        )  # fmt: skip
        return table(headings, [_row(result) for result in self.results], left=2)

    def notes(self) -> str:
        """What the columns mean."""
        scores = ", ".join(dict.fromkeys(f"{result.score_name} of {result.task}" for result in self.results))
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        lines = [
            f"score: held-out, after the last step, lower is better ({scores}).",
            f"curves: largest difference between the training losses of torch and fastopt{self._among_torch()}.",
            f"step: median of optimizer.step() alone; train: everything; {threads}.",
            "speed-up: over torch's default, and over the fastest of torch's implementations.",
        ]
        if any(not result.same_rule for result in self.results):
            lines.append(
                "Ranger: torch has none. In its place stands Lookahead around torch's RAdam, the nearest it can make;\n"
                "  it has no gradient centralisation and is another rule, so the curve is another one."
            )
        if reason := backends.why_not("native"):
            lines.append(f"fastopt ran without its native kernels, so expect no speed-up: {reason}")
        return "\n".join(lines)

    def _among_torch(self) -> str:
        same_rule = [result for result in self.results if result.same_rule]
        among = [lane.difference(result.torch_default) for result in same_rule for lane in result.torch_lanes[1:]]
        return f"\n  (between torch's own implementations: up to {max(among):.1g})" if among else ""

    def __str__(self) -> str:
        return f"{self.table()}\n\n{self.notes()}"

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write one row for each twin, times in seconds."""
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([
                "task", "optimizer", "implementation", "lr", "seed", "steps", "threads", "torch_version",
                "score_name", "score", "largest_difference", "step_p20", "step_p50", "step_p80", "train",
            ])  # fmt: skip
            for result in self.results:
                for lane in (*result.torch_lanes, result.fastopt):
                    writer.writerow([*self._setting(result, lane), *_measurements(result, lane)])

    def _setting(self, result: Result, lane: Lane) -> list[Any]:
        implementation = lane.label if lane is result.fastopt else f"torch {lane.label}"
        lr = LEARNING_RATES[result.optimizer]
        steps = len(lane.losses)
        return [result.task, result.optimizer, implementation, lr, self.seed, steps, self.threads, torch.__version__]

    def plot(self, path: str | PathLike[str]) -> None:
        """Save a picture of the loss curves and the step times."""
        plots.demo(self.results, str(path))


def _row(result: Result) -> tuple[str, ...]:
    ours, default, best = result.fastopt, result.torch_default, result.torch_best
    if result.same_rule:
        difference = ours.difference(default)
        curves = f"{difference:.1g}" if difference else "identical"
    else:
        curves = "another rule"
    return (
        result.task,
        result.optimizer,
        f"{default.score:.4f}",
        f"{ours.score:.4f}",
        curves,
        f"{1e3 * default.step_median:.3f}",
        f"{1e3 * best.step_median:.3f} {best.label}",
        f"{1e3 * ours.step_median:.3f}",
        f"{default.step_median / ours.step_median:.1f}x, {best.step_median / ours.step_median:.1f}x",
        f"{default.train_seconds:.2f}",
        f"{ours.train_seconds:.2f}",
    )


def _measurements(result: Result, lane: Lane) -> list[Any]:
    ordered = sorted(lane.step_seconds)
    quantiles = [ordered[len(ordered) * percent // 100] for percent in (20, 50, 80)]
    return [result.score_name, lane.score, lane.difference(result.torch_default), *quantiles, lane.train_seconds]


def lacking(wanted: Sequence[str]) -> dict[str, str]:
    """Which of these, tasks and the "picture", cannot be had here, and the package that each needs."""
    packages = {"digits": ("sklearn.datasets", "scikit-learn"), "picture": ("matplotlib", "matplotlib")}
    missing = {}
    for what in wanted:
        module, package = packages.get(what, ("", ""))
        try:
            if module:
                need(module, what)
        except ModuleNotFoundError:
            missing[what] = package
    return missing


def save(demo: Demo, picture: Path) -> str:
    """Save the CSV and the picture, and return where they are."""
    picture.parent.mkdir(parents=True, exist_ok=True)
    numbers = picture.with_suffix(".csv")
    demo.to_csv(numbers)
    try:
        demo.plot(picture)
    except ModuleNotFoundError as error:
        return f"Numbers: {numbers}\nNo picture: {error}"
    return f"Numbers: {numbers}\nPicture: {picture}"
