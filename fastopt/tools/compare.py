"""Which optimizer suits a training problem, at which learning rate, and is the difference more than chance?

`compare` trains the user's model with every optimizer, learning rate and seed and returns a `Comparison`: a ranking, a
table, a CSV and a plot. It holds no opinion: what it says is what it measured on this problem with this many steps.

- Every seed means the same initial weights and the same batches for all optimizers.
- The score of a run is the first value of ``evaluate(model)`` after the last step, or without ``evaluate`` the mean
  loss over the next tenth of the batches. Lookahead and Ranger, which have ``slow_weights()``, are scored on them.
- A run diverged when its loss or its score was not finite, or when the loss raised an error after the weights or the
  loss had grown beyond measure. It stops there and counts; the others go on.
- How the scores become a ranking: `fastopt.tools.comparison`.
"""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastopt.report import Progress

from .comparison import Comparison, Run, best_lr
from .entrants import Entrant, OptimizerSpec, entrants
from .tasks import inference

Evaluation: TypeAlias = Callable[[nn.Module], float | Mapping[str, float]]
Batches: TypeAlias = Iterable[Any] | Callable[[int], Iterable[Any]]

START_POINTS = 3
MOST_POINTS = 10
"""A search without ``lrs`` begins with 3 half-decades around the optimizer's default and adds at most 7 more."""


def compare(
    make_model: Callable[[], nn.Module],
    loss: Callable[[nn.Module, Any], Tensor],
    batches: Batches,
    evaluate: Evaluation | None = None,
    *,
    optimizers: Sequence[OptimizerSpec] | Mapping[str, OptimizerSpec] | None = None,
    lrs: Sequence[float] | None = None,
    seeds: int | Sequence[int] = 3,
    steps: int = 300,
    higher_is_better: bool = False,
    confidence: float = 0.95,
    progress: bool = True,
) -> Comparison:
    """Train a model with several optimizers, learning rates and seeds; say which did best, and whether beyond chance.

    Args:
        make_model: makes a fresh model; called after ``torch.manual_seed(seed)``.
        loss: ``loss(model, batch)`` returns the scalar to minimise.
        batches: anything that can be iterated again and again (a DataLoader, a list), or a function from the seed to an
            iterable. A short one starts over.
        evaluate: ``evaluate(model)`` returns the score, or a mapping whose first value is the score and whose others
            are recorded beside it. Called in evaluation mode without gradients. Default: mean loss on the batches that
            follow.
        optimizers: names (``"Adam"``, ``"SGD(momentum=0.9)"``, ``"Lookahead(RAdam, k=6)"``, ``"torch.Adam"``), classes,
            or callables ``(params, lr) -> Optimizer``; a mapping gives them names of your own. Default: all that
            fastopt has.
        lrs: the grid of learning rates for every optimizer. Default: a grid of half-decades of its own for each, from 3
            around the optimizer's default to at most 10, extended for as long as the best one is at its end.
        seeds: how many (0, 1, ...), or which. Two at least are needed to know the noise.
        steps: optimizer steps of each run.
        higher_is_better: set it when ``evaluate`` returns, say, an accuracy.
        confidence: the confidence with which a difference is called more than noise.
        progress: show a progress bar on stderr.

    Raises:
        ValueError, TypeError: an argument cannot be used; found before any training.

    Example:
        >>> data = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
        >>> loss = lambda model, x: (model(x) - x.sum(1, keepdim=True)).square().mean()
        >>> result = compare(lambda: nn.Linear(3, 1), loss, data.split(16),
        ...                  optimizers=["SGD", "Adam"], lrs=[1e-9, 1e-1], steps=30, progress=False)
        >>> result.best.lr
        0.1
    """
    job = _Job(make_model, loss, batches, evaluate, _check_seeds(seeds), steps, higher_is_better)
    job.check()
    contestants = entrants(optimizers)
    grid = None if lrs is None else _check_lrs(lrs)
    if not (isinstance(confidence, Real) and 0 < confidence < 1):
        raise ValueError(f"confidence is a probability between 0 and 1; got {confidence!r}")
    points = START_POINTS if grid is None else len(grid)
    runs: list[Run] = []
    with Progress(len(contestants) * points * len(job.seeds) * steps, progress) as bar, _random_state_kept():
        for entrant in contestants:
            runs += _explore(job, entrant, grid, bar)
    return Comparison(tuple(runs), steps, higher_is_better, confidence)


@dataclass(frozen=True)
class _Job:
    make_model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], Tensor]
    batches: Batches
    evaluate: Evaluation | None
    seeds: tuple[int, ...]
    steps: int
    higher_is_better: bool

    def check(self) -> None:
        if not callable(self.make_model) or isinstance(self.make_model, nn.Module):
            raise TypeError(
                "make_model must be a function that makes a fresh model, as in lambda: Net(); "
                f"got {type(self.make_model).__name__}"
            )
        if not callable(self.loss):
            raise TypeError(f"loss is a function (model, batch) -> scalar; got {self.loss!r}")
        if not (self.evaluate is None or callable(self.evaluate)):
            raise TypeError(f"evaluate is a function of the model, or None; got {self.evaluate!r}")
        if not isinstance(self.steps, Integral):
            raise TypeError(f"steps is a whole number; got {self.steps!r}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1; got {self.steps}")
        if not (callable(self.batches) or hasattr(self.batches, "__iter__") or hasattr(self.batches, "__getitem__")):
            raise TypeError(f"batches is an iterable, or a function from the seed to one; got {self.batches!r}")
        if isinstance(self.batches, Iterator):
            raise TypeError(
                f"batches is a {type(self.batches).__name__}, read only once, but every run starts afresh: "
                "give a DataLoader, a list, or a function from the seed to an iterable"
            )

    def stream(self, seed: int) -> Iterator[Any]:
        source = self.batches(seed) if callable(self.batches) else self.batches
        while True:
            count = 0
            for batch in source:
                count += 1
                yield batch
            if count == 0 or isinstance(source, Iterator):
                raise ValueError(
                    f"batches ended after {count} in a run of {self.steps} steps: give an iterable that can start over "
                    "or never ends"
                )


def _check_seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    if not isinstance(seeds, Integral | Iterable):
        raise TypeError(f"seeds is a count, or a list of seeds; got {seeds!r}")
    chosen = tuple(range(int(seeds))) if isinstance(seeds, Integral) else tuple(seeds)
    if not all(isinstance(seed, Integral) for seed in chosen):
        raise TypeError(f"seeds are whole numbers; got {seeds!r}")
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"seeds must be a count of at least 1, or different numbers; got {seeds}")
    return chosen


def _check_lrs(lrs: Sequence[float]) -> tuple[float, ...]:
    if not isinstance(lrs, Iterable) or isinstance(lrs, str):
        raise TypeError(f"lrs is a list of learning rates; got {lrs!r}: write [{lrs}]")
    grid = tuple(sorted({float(lr) for lr in lrs}))
    if not grid or not all(0 < lr < math.inf for lr in grid):
        raise ValueError(f"lrs must be positive numbers, at least one; got {lrs}")
    return grid


def _random_state_kept() -> AbstractContextManager[None]:
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()))


def _explore(job: _Job, entrant: Entrant, grid: tuple[float, ...] | None, bar: Progress) -> list[Run]:
    """Run one optimizer over its grid; without one, over half-decades, extended while the best is at an end."""
    centre = round(2 * math.log10(entrant.default_lr))
    low, high = centre - 1, centre - 2 + START_POINTS
    runs = [
        _train(job, entrant, lr, seed, bar)
        for lr in grid or map(_half_decade, range(low, high + 1))
        for seed in job.seeds
    ]
    while grid is None and high - low + 1 < MOST_POINTS:
        best = best_lr(runs, job.higher_is_better)
        if best == _half_decade(high):
            high = fresh = high + 1
        elif best == _half_decade(low):
            low = fresh = low - 1
        else:
            break
        bar.grow(len(job.seeds) * job.steps)
        runs += [_train(job, entrant, _half_decade(fresh), seed, bar) for seed in job.seeds]
    return runs


def _blown_up(losses: Sequence[float], model: torch.nn.Module) -> bool:
    """Whether a weight is not finite or beyond a million, or the loss a hundred times what it began with."""
    if not all((parameter.abs() < 1e6).all() for parameter in model.parameters()):
        return True
    return len(losses) > 1 and abs(losses[-1]) > 100 * max(1.0, abs(losses[0]))


def _half_decade(exponent: int) -> float:
    return float(f"{10 ** (exponent / 2):.0e}")


def _train(job: _Job, entrant: Entrant, lr: float, seed: int, bar: Progress) -> Run:
    torch.manual_seed(seed)
    model = job.make_model()
    optimizer = entrant.make(list(model.parameters()), lr)
    stream = job.stream(seed)
    losses: array[float] = array("d")
    label = f"{entrant.name}  lr {lr:g}  seed {seed}"
    planned = bar.done + job.steps
    start = time.perf_counter()
    metrics: dict[str, float] = {}
    try:
        for _ in range(job.steps):
            optimizer.zero_grad()
            value = _checked(job.loss(model, next(stream)))
            losses.append(value.item())
            if not math.isfinite(losses[-1]):
                break
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            bar.advance(f"{label}  loss {losses[-1]:.4g}")
        else:
            metrics = _evaluate(job, model, optimizer, stream)
    except (RuntimeError, ValueError):
        # Losses that check their input raise once a run has blown up; any other error is the user's to see.
        if not _blown_up(losses, model):
            raise
    score = next(iter(metrics.values()), math.nan)
    seconds = time.perf_counter() - start
    diverged_at = None if math.isfinite(score) else len(losses)
    bar.grow(bar.done - planned)
    return Run(entrant.name, lr, seed, score, metrics, losses, diverged_at, seconds)


def _checked(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise TypeError(f"loss(model, batch) returned {what}: it must return a tensor with one element")
    return loss


def _evaluate(job: _Job, model: nn.Module, optimizer: Optimizer, stream: Iterator[Any]) -> dict[str, float]:
    with scored_weights(optimizer):
        if job.evaluate is None:
            count = max(1, job.steps // 10)
            return {"loss": sum(job.loss(model, next(stream)).item() for _ in range(count)) / count}
        with inference(model):
            result = job.evaluate(model)
    if not isinstance(result, Mapping):
        return {"score": float(result)}
    if not result:
        raise TypeError("evaluate returned an empty mapping: its first value must be the score")
    return {name: float(value) for name, value in result.items()}


def scored_weights(optimizer: Optimizer) -> AbstractContextManager[Any]:
    """Inside, the parameters are those to judge the optimizer by: the slow weights where it has some."""
    slow_weights: Callable[[], AbstractContextManager[Any]] = getattr(optimizer, "slow_weights", nullcontext)
    return slow_weights()
