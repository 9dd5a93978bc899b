"""The method. One process; contenders take turns within every round and the order changes from round to round, so that
whatever the machine does to one it does to the other; only `run` is timed, `prepare` (new gradients) is not; warm-up
rounds are left out; what is reported are medians with the 20th and 80th percentile, of times and of the ratios of
times taken in the same round. After the race `agreement` compares the parameters: a ratio between contenders that did
different work means nothing.

What a turn is and which clock times it is the run's choice: here the processor's clock around each step; gpu_clocks
has those of a GPU.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

PIECE = 4_000_000
ROUNDINGS = 10
T = TypeVar("T")


class Labelled(Protocol):
    label: str


class Runner(Labelled, Protocol):
    """One that the processor's clock can time from here."""

    def prepare(self, step: int) -> None: ...

    def run(self) -> None: ...


class Turn(Protocol):
    """One contender's turn in a round: prepares and runs `steps` steps, gives the seconds that one of them took."""

    def __call__(self, runner: Any, first_step: int, steps: int, /) -> float: ...


@dataclass(frozen=True)
class Spread:
    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        tenths = statistics.quantiles(values, n=10, method="inclusive")
        return cls(tenths[1], statistics.median(values), tenths[7])

    def scaled(self, factor: float) -> Spread:
        return Spread(self.p20 * factor, self.p50 * factor, self.p80 * factor)

    def reciprocal(self, numerator: float) -> Spread:
        """`numerator` over the value: times become rates, and the ends change places."""
        return Spread(numerator / self.p80, numerator / self.p50, numerator / self.p20)


# One metric of one contender, before it is known where and when: (contender, metric, value).
Measurement = tuple[str, str, Spread | float]


class Samples:
    """Seconds per step of every contender, one value per round."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.steps = 0

    def add(self, label: str, seconds: float) -> None:
        self.seconds.setdefault(label, []).append(seconds)

    def extend(self, other: Samples) -> None:
        for label, values in other.seconds.items():
            self.seconds.setdefault(label, []).extend(values)
        self.steps = other.steps

    def time(self, label: str) -> Spread:
        return Spread.of(self.seconds[label])

    def ratio(self, above: str, below: str) -> Spread:
        """Time of `above` in units of the time of `below`, round by round."""
        return Spread.of([a / b for a, b in zip(self.seconds[above], self.seconds[below], strict=True)])


def race(
    runners: Sequence[Labelled],
    *,
    seconds: float,
    least_rounds: int = 8,
    most_rounds: int = 300,
    warm_up: int = 4,
    steps_per_round: int = 1,
    first_step: int = 0,
    clock: Callable[[], int] = time.perf_counter_ns,
    turn: Turn | None = None,
) -> Samples:
    """Race for about `seconds`, preparation included; the last warm-up round decides how many rounds that is.
    Contenders are `Runner`s, unless a `turn` knows what else they are."""
    samples, step = Samples(), first_step
    take: Turn = turn or partial(_turn, clock)

    def hold(round_: int, record: Callable[[str, float], None]) -> None:
        nonlocal step
        for runner in order(runners, round_):
            record(runner.label, take(runner, step, steps_per_round))
        step += steps_per_round

    with _no_collection():
        wall = float("inf")
        for i in range(warm_up):
            started = time.perf_counter()
            hold(i, lambda label, value: None)
            wall = time.perf_counter() - started
        affordable = int(seconds / wall)
        for i in range(max(least_rounds, min(most_rounds, affordable))):
            hold(i, samples.add)
    samples.steps = step
    return samples


def order(runners: Sequence[T], round_: int) -> list[T]:
    """Every contender takes every place equally often."""
    turn = (round_ // 2) % len(runners)
    rotated = [*runners[turn:], *runners[:turn]]
    return rotated if round_ % 2 == 0 else rotated[::-1]


def _turn(clock: Callable[[], int], runner: Runner, first_step: int, steps: int) -> float:
    elapsed = 0
    for step in range(first_step, first_step + steps):
        runner.prepare(step)
        started = clock()
        runner.run()
        elapsed += clock() - started
    return elapsed / steps * 1e-9


@contextmanager
def _no_collection() -> Iterator[None]:
    """A collection would fall into somebody's turn; reference counting still frees gradients and temporaries."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True)
class Agreement:
    """Difference of the parameters after `steps` equal steps, and how far they had moved, in ulps."""

    rms: float
    largest: float
    moved: float
    steps: int
    share: float = 0.0
    """Of the distance moved, by which a step that rounds after every operation may differ from one that does not."""

    @property
    def same_work(self) -> bool:
        """Each step rounds a parameter once, half an ulp at most in each contender: two roundings of the same sum
        differ by one ulp at most, and such differences add up as a random walk (rms <= sqrt(steps)), at worst in a
        line (largest <= steps, and one for the rounding of the update itself). Any other update rule is off by a share
        of the distance moved, which must be far longer than the tolerance to tell.

        In 16 bits a contender that rounds after each of some ten operations is off by as many times half an ulp of what
        it adds to the parameter, again and again in the same direction: a `share`, and no bound for single elements."""
        tolerance = math.sqrt(self.steps)
        if self.share:
            return self.rms <= tolerance + self.share * self.moved and self.moved >= 2 * tolerance
        return self.rms <= tolerance and self.largest <= self.steps + 1 and self.moved >= 100 * tolerance


def agreement(ours: Sequence[Tensor], theirs: Sequence[Tensor], initial: Sequence[Tensor], steps: int) -> Agreement:
    """In ulps of theirs. An ulp is the dtype's eps times the parameter, or times the rms of all parameters where that
    is larger: near zero the terms that were rounded are larger than their sum."""
    floor = math.sqrt(sum(_squares(t) for t in initial) / sum(t.numel() for t in initial))
    squares, moved, largest, count = 0.0, 0.0, 0.0, 0
    for a, b, start in zip(_pieces(ours), _pieces(theirs), _pieces(initial), strict=True):
        wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        ulp = b.to(wide).abs().clamp_(min=floor).mul_(torch.finfo(b.dtype).eps)
        difference = (a.to(wide) - b.to(wide)).div_(ulp)
        squares += _squares(difference)
        moved += _squares((b.to(wide) - start.to(wide)).div_(ulp))
        largest = max(largest, difference.abs().max().item()) if torch.isfinite(difference).all() else math.inf
        count += b.numel()
    rms = math.sqrt(squares / count) if math.isfinite(squares) else math.inf
    narrow = [b.dtype for b in theirs if b.dtype.itemsize == 2]
    share = max((ROUNDINGS * torch.finfo(dtype).eps / 2 for dtype in narrow), default=0.0)
    return Agreement(rms, largest, math.sqrt(moved / count), steps, share)


def _squares(tensor: Tensor) -> float:
    return tensor.float().square().sum(dtype=torch.float64).item()


def _pieces(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Flat pieces: comparing 50 million parameters at once would need more memory than racing them, and ten thousand
    small tensors one by one more time."""
    bundle: list[Tensor] = []
    held = 0
    for tensor in tensors:
        for piece in torch.split(tensor.detach().reshape(-1), PIECE) if tensor.numel() else ():
            bundle.append(piece)
            held += piece.numel()
            if held >= PIECE:
                yield torch.cat(bundle) if len(bundle) > 1 else piece
                bundle, held = [], 0
    if bundle:
        yield torch.cat(bundle)
