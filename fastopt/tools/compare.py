"""Which optimizer suits a training problem, at which learning rate, and is the difference more than chance?

`compare` trains the user's model with every optimizer, learning rate and seed and returns a `Comparison`: a ranking, a
table, a CSV and a plot. It holds no opinion: what it says is what it measured on this problem with this many steps.

- Every seed means the same initial weights and the same batches for all optimizers.
- The score of a run is the first value of ``evaluate(model)`` after the last step, or without ``evaluate`` the mean
  loss over the next tenth of the batches. Lookahead and Ranger, which have ``slow_weights()``, are scored on them.
- A run diverged when its loss or its score was not finite, or when the loss raised an error after the weights or the
  loss had grown beyond measure. It stops there and counts; the others go on.
- An error of an optimizer's own step makes it one that failed: its training ends there, the others go on. An error of
  the user's functions ends everything, and says in which run and at which step it arose.
- How the scores become a ranking: `fastopt.tools.comparison`.
"""

from __future__ import annotations

import itertools
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
from .entrants import Entrant, OptimizerSpec, describe, entrants, try_on
from .tasks import inference

Evaluation: TypeAlias = Callable[[nn.Module], float | Mapping[str, float]]
Batches: TypeAlias = Iterable[Any] | Callable[[int], Iterable[Any]]

START_POINTS = 3
MOST_POINTS = 10
"""A search without ``lrs`` begins with 3 half-decades around the optimizer's default and adds at most 7 more."""


class NothingComparedError(RuntimeError):
    """Every optimizer failed; the message gives their reasons."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during `compare`; ``result`` holds the optimizers that were finished by then, which may be none."""

    def __init__(self, result: Comparison) -> None:
        super().__init__()
        self.result = result


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
        make_model: makes a fresh model; called after ``torch.manual_seed(seed)``, and twice before any training.
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
        ValueError, TypeError: an argument cannot be used. Found before any training, but for what ``loss`` and
            ``evaluate`` return.
        RuntimeError: every optimizer failed. One that fails beside others that do not is a line in the result.
        KeyboardInterrupt: its ``result`` is a `Comparison` of the optimizers that were finished.

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
    with _random_state_kept():
        parameters = _sample_parameters(job)
        for entrant in contestants:
            try_on(entrant, parameters)
        try:
            with Progress(len(contestants) * points * len(job.seeds) * steps, progress) as bar:
                for entrant in contestants:
                    runs += _explore(job, entrant, grid, bar)
        except KeyboardInterrupt as stop:
            raise Interrupted(Comparison(tuple(runs), steps, higher_is_better, confidence)) from stop
    return _checked_result(Comparison(tuple(runs), steps, higher_is_better, confidence))


def _checked_result(result: Comparison) -> Comparison:
    reasons = [f"{it.optimizer} failed at lr {it.lr:g}: {it.failed}" for it in result.standings if it.failed]
    if len(reasons) == len(result.standings):
        raise NothingComparedError("\n  ".join(["nothing could be compared, every optimizer failed:", *reasons]))
    return result


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
        if self.higher_is_better and self.evaluate is None:
            raise ValueError(
                "higher_is_better=True needs evaluate=: without one the score is the loss, and the lower one is better"
            )
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


def _sample_parameters(job: _Job) -> list[Tensor]:
    """Those of a throw-away model, once `make_model` has shown that it makes models that can be trained, and new ones.

    One model trained by all would let each optimizer start where the last one ended.
    """
    torch.manual_seed(job.seeds[0])
    first, second = models = job.make_model(), job.make_model()
    if not all(callable(getattr(model, "parameters", None)) for model in models):
        raise TypeError(f"make_model() returned a {type(first).__name__}: it must return a torch.nn.Module")
    parameters: list[Tensor] = list(second.parameters())
    if not any(parameter.requires_grad for parameter in parameters):
        raise ValueError(
            "make_model() returned a model without a parameter that requires a gradient: there is nothing to train"
        )
    if first is second or _trainable_memory(first) & _trainable_memory(second):
        what = "the same model" if first is second else "models that share parameters"
        raise ValueError(
            f"make_model(), called twice, returned {what}, but every run starts afresh: build the model inside, as in "
            "lambda: Net(), or copy it, as in lambda: copy.deepcopy(model)"
        )
    return parameters


def _trainable_memory(model: nn.Module) -> set[int]:
    """Where the parameters to train lie; frozen ones may be shared, and those of lazy modules have no place yet."""
    trainable = [it for it in model.parameters() if it.requires_grad]
    placed = [it for it in trainable if type(it) is nn.Parameter and it.layout == torch.strided]
    return {id(it) for it in trainable} | {it.data_ptr() for it in placed} - {0}


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
    if isinstance(lrs, Mapping):
        raise TypeError(
            f"lrs is one list of learning rates for all optimizers; got the mapping {lrs!r}: leave lrs out, and each "
            "optimizer has a grid of its own"
        )
    try:
        grid = tuple(sorted({float(lr) for lr in lrs}))
    except (TypeError, ValueError):
        raise TypeError(f"lrs is a list of numbers; got {lrs!r}") from None
    if not grid or not all(0 < lr < math.inf for lr in grid):
        raise ValueError(f"lrs must be positive numbers, at least one; got {lrs}")
    return grid


def _random_state_kept() -> AbstractContextManager[None]:
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()))


def _explore(job: _Job, entrant: Entrant, grid: tuple[float, ...] | None, bar: Progress) -> list[Run]:
    """Run one optimizer over its grid; without one, over half-decades, extended while the best is at an end."""
    centre = round(2 * math.log10(entrant.default_lr))
    low, high = centre - 1, centre - 2 + START_POINTS
    runs = _train_all(job, entrant, grid or [_half_decade(exponent) for exponent in range(low, high + 1)], bar)
    while grid is None and not runs[-1].failed and high - low + 1 < MOST_POINTS:
        best = best_lr(runs, job.higher_is_better)
        if best == _half_decade(high):
            high = fresh = high + 1
        elif best == _half_decade(low):
            low = fresh = low - 1
        else:
            break
        bar.grow(len(job.seeds) * job.steps)
        runs += _train_all(job, entrant, [_half_decade(fresh)], bar)
    return runs


def _train_all(job: _Job, entrant: Entrant, lrs: Sequence[float], bar: Progress) -> list[Run]:
    """Every seed at every learning rate; a failure is the last run, for the next would most likely fail too."""
    settings = list(itertools.product(lrs, job.seeds))
    runs: list[Run] = []
    for lr, seed in settings:
        runs.append(_train(job, entrant, lr, seed, bar))
        if runs[-1].failed:
            break
    bar.grow((len(runs) - len(settings)) * job.steps)
    return runs


def _half_decade(exponent: int) -> float:
    return float(f"{10 ** (exponent / 2):.0e}")


def _train(job: _Job, entrant: Entrant, lr: float, seed: int, bar: Progress) -> Run:
    training = _Training(job, entrant, lr, seed)
    planned = bar.done + job.steps
    start = time.perf_counter()
    metrics: dict[str, float] = {}
    failed = ""
    try:
        metrics = training.run(bar)
    except Exception as error:
        cause = error.cause if isinstance(error, _EntrantError) else error
        # Losses that check their input raise once a run has blown up; any other error is there to be seen.
        if not (isinstance(cause, RuntimeError | ValueError) and training.blown_up()):
            if not isinstance(error, _EntrantError):
                raise _named(error, training.where()) from error
            failed = describe(cause)
    score = next(iter(metrics.values()), math.nan)
    seconds = time.perf_counter() - start
    diverged_at = None if failed or math.isfinite(score) else len(training.losses)
    bar.grow(bar.done - planned)
    return Run(entrant.name, lr, seed, score, metrics, training.losses, diverged_at, seconds, failed)


class _EntrantError(Exception):
    """Wraps what an optimizer raised, and so tells it from what the user's functions raise."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class _Training:
    """One run while it lasts: its loss at every step, and how far it is, for whoever must say where an error arose."""

    def __init__(self, job: _Job, entrant: Entrant, lr: float, seed: int) -> None:
        self.job, self.entrant, self.lr, self.seed = job, entrant, lr, seed
        self.losses: array[float] = array("d")
        self.stage = "make_model()"
        self.model: nn.Module | None = None

    def run(self, bar: Progress) -> dict[str, float]:
        """Train, and return what the evaluation says; nothing where the loss was not finite."""
        torch.manual_seed(self.seed)
        self.model = model = self.job.make_model()
        optimizer = _own(self.entrant.make, list(model.parameters()), self.lr)
        stream = self.job.stream(self.seed)
        label = f"{self.entrant.name}  lr {self.lr:g}  seed {self.seed}"
        for step in range(1, self.job.steps + 1):
            self.stage = f"step {step}"
            _own(optimizer.zero_grad)
            value = _checked(self.job.loss(model, next(stream)))
            self.losses.append(value.item())
            if not math.isfinite(self.losses[-1]):
                return {}
            value.backward()  # type: ignore[no-untyped-call]
            _own(optimizer.step)
            bar.advance(f"{label}  loss {self.losses[-1]:.4g}")
        self.stage = f"evaluation after step {self.job.steps}"
        return _evaluate(self.job, model, optimizer, stream)

    def where(self) -> str:
        return f"{self.entrant.name} at lr {self.lr:g}, seed {self.seed}, {self.stage}"

    def blown_up(self) -> bool:
        """Whether a weight is not finite or beyond a million, or the loss a hundred times what it began with."""
        if self.model is None:
            return False
        if not all((parameter.abs() < 1e6).all() for parameter in self.model.parameters()):
            return True
        return len(self.losses) > 1 and abs(self.losses[-1]) > 100 * max(1.0, abs(self.losses[0]))


def _own(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call what belongs to an entrant."""
    try:
        return call(*arguments)
    except Exception as error:
        raise _EntrantError(error) from error


def _named(error: Exception, where: str) -> Exception:
    """The same error with the place in front; a RuntimeError where its type cannot be made from a text alone."""
    text = f"{where}: {str(error) or type(error).__name__}"
    try:
        named: object = type(error)(text)
    except Exception:
        named = None
    if isinstance(named, Exception) and named.args == (text,):
        return named
    return RuntimeError(f"{where}: {describe(error)}")


def _checked(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise TypeError(f"loss(model, batch) returned {what}: it must return a tensor with one element")
    if loss.is_complex():
        raise TypeError("loss(model, batch) returned a complex number: it must be real, as with .abs()")
    if not loss.requires_grad:
        raise ValueError(
            "loss(model, batch) returned a tensor without a gradient: compute it from what the model returns, "
            "without detach(), item() or no_grad()"
        )
    return loss


def _evaluate(job: _Job, model: nn.Module, optimizer: Optimizer, stream: Iterator[Any]) -> dict[str, float]:
    with scored_weights(optimizer):
        if job.evaluate is None:
            count = max(1, job.steps // 10)
            return {"loss": sum(job.loss(model, next(stream)).item() for _ in range(count)) / count}
        with inference(model):
            result = job.evaluate(model)
    if not isinstance(result, Mapping):
        return {"score": _number(result, "")}
    if not result:
        raise TypeError("evaluate(model) returned an empty mapping: its first value must be the score")
    return {name: _number(value, f" for {name!r}") for name, value in result.items()}


def _number(value: Any, of: str) -> float:
    try:
        if not isinstance(value, str):
            return float(value)
        reason = None
    except (TypeError, ValueError, RuntimeError) as error:
        reason = error
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
    raise TypeError(
        f"evaluate(model) returned a {type(value).__name__}{shape}{of}: it must return a number, or a mapping from "
        "names to numbers whose first is the score"
    ) from reason


def scored_weights(optimizer: Optimizer) -> AbstractContextManager[Any]:
    """Inside, the parameters are those to judge the optimizer by: the slow weights where it has some."""
    slow_weights: Callable[[], AbstractContextManager[Any]] = getattr(optimizer, "slow_weights", nullcontext)
    return slow_weights()
