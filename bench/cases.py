"""What is measured: every case is data, the goals of the speed tables included.

A `Workload` is a set of tensors, how they are dealt into parameter groups, and how gradients arrive. A `Case` races
fastopt's `rule` on a workload against a family of rivals (see `contenders.rivals`), and where it has a `Yardstick`
also against fastopt itself on simpler work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from typing import Any, Literal

import torch
from torch import Tensor

Measure = Literal["speedup", "cost", "rate", "share", "time"]
ADAM_LIKE = ("Adam", "RAdam", "NAdam", "Adamax")

# Tensors of the parameter's size that a step must at least read and write; Ranger (k = 6) touches its slow weights
# twice every sixth step.
STREAMS = {**dict.fromkeys(ADAM_LIKE, 7.0), "RMSprop": 5.0, "Ranger": 7.0 + 2.0 / 6.0}


@dataclass(frozen=True)
class Workload:
    """Tensors, groups and gradients.

    `groups` deals the tensors into that many equal consecutive groups, which share `settings` distinct hyper-parameter
    settings in turn. `absent` is the share of tensors without a gradient, drawn anew each step. `gradients`: "fresh"
    allocates every gradient anew each step, "rewritten" refills two alternating buffers behind new tensor objects (for
    sizes at which allocation would be most of the run), "shared" hands all contenders the same memory behind new tensor
    objects (for sizes at which the copies would not fit).
    """

    shapes: tuple[tuple[int, ...], ...]
    groups: int = 1
    settings: int = 1
    absent: float = 0.0
    gradients: Literal["fresh", "rewritten", "shared"] = "fresh"
    dtype: torch.dtype = torch.float32

    @property
    def numel(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    def deal(self, parameters: Sequence[Tensor]) -> list[dict[str, Any]]:
        """The parameter groups an optimizer is constructed with."""
        size = len(parameters) // self.groups
        return [
            {"params": list(parameters[i * size : (i + 1) * size]), **self._setting(i % self.settings)}
            for i in range(self.groups)
        ]

    def _setting(self, i: int) -> dict[str, float]:
        """Learning rates differ; every second setting has weight decay, as models that spare biases and norms do."""
        return {"lr": 1e-3 * (1 + i / self.settings), "weight_decay": 0.01 * (i % 2)} if self.settings > 1 else {}


@dataclass(frozen=True)
class Yardstick:
    """fastopt itself on other work, raced beside the case; `rule` and `workload` where they differ from the case's."""

    label: str
    rule: str | None = None
    workload: Workload | None = None


@dataclass(frozen=True)
class Goal:
    """`speedup` is over the fastest rival; `cost` (time) and `rate` (bytes per second) relate to the yardstick, `share`
    (bytes per second) to a ceiling; `time` is in microseconds."""

    measure: Measure
    sign: Literal["≥", "≤"]
    value: float

    def __str__(self) -> str:
        return f"{self.sign} {self.value:g} µs" if self.measure == "time" else f"{self.sign} {self.value:g}x"


@dataclass(frozen=True)
class Case:
    """One race. `seconds` bounds its timed rounds; a round is `steps_per_round` steps of each contender, one contender
    after the other; `sittings` rebuilds all tensors that many times, so that no contender keeps a lucky placement in
    memory."""

    name: str
    table: str
    size: str
    rule: str
    workload: Workload
    rivals: Literal["fused", "torch", "peers", "same", "gpu", "compiled", "none"]
    yardstick: Yardstick | None = None
    goals: tuple[Goal, ...] = ()
    hyper: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 6.0
    warm_up: int = 4
    least_rounds: int = 8
    steps_per_round: int = 1
    sittings: int = 1

    def goal(self, measure: Measure) -> Goal | None:
        return next((goal for goal in self.goals if goal.measure == measure), None)

    @property
    def memory_bound(self) -> bool:
        """Large enough for bytes per second to be the measure: far beyond any cache."""
        return self.workload.numel >= 10_000_000


def tensors(count: int, numel: int) -> tuple[tuple[int, ...], ...]:
    return ((numel,),) * count


TINY = Workload(tensors(1000, 64))
SMALL = Workload(tensors(1000, 1000))
MEDIUM = Workload(tensors(1000, 50_000))
HUGE = Workload(tensors(1, 50_000_000), gradients="rewritten")

# Ranger's eps of 1e-5 would compare eps conventions, not speed: optimi divides it by the bias correction, ranger.py
# does not.
RANGER = {"lr": 1e-3, "betas": (0.95, 0.999), "eps": 1e-8, "k": 6, "alpha": 0.5}


def _adam(size: str, workload: Workload, faster: float, seconds: float) -> Case:
    goals = (Goal("speedup", "≥", faster),)
    return Case(f"adam {size}", "adam", size, "Adam", workload, "fused", goals=goals, seconds=seconds, sittings=2)


def _rule(rule: str) -> list[Case]:
    """Against torch's for-loop and foreach; at 50 million parameters, also as fast per byte as fastopt's own Adam."""
    own_adam = Yardstick("fastopt Adam", rule="Adam")
    faster, per_byte = Goal("speedup", "≥", 4.5), Goal("rate", "≥", 1.0)
    small, large = "1000x64", "1x50,000,000"
    on_tiny = Case(f"{rule.lower()} {small}", "rules", small, rule, TINY, "torch", None, (Goal("speedup", "≥", 50),))
    on_huge = Case(f"{rule.lower()} {large}", "rules", large, rule, HUGE, "torch", own_adam, (faster, per_byte))
    return [replace(on_tiny, seconds=5), replace(on_huge, seconds=16, warm_up=2)]


def _ranger() -> list[Case]:
    """Lookahead pulls back every k steps: a round is a whole cycle."""
    on_tiny, on_huge = (replace(case, rivals="peers", hyper=RANGER, steps_per_round=6) for case in _rule("Ranger"))
    return [replace(on_tiny, seconds=8, warm_up=2), replace(on_huge, seconds=50, warm_up=1, least_rounds=4)]


def _structure(name: str, size: str, workload: Workload, yardstick: Yardstick) -> Case:
    goals = (Goal("cost", "≤", 1.5),)
    return Case(name, "structure", size, "Adam", workload, "fused", yardstick, goals, seconds=4)


def _grouped(settings: int) -> Case:
    shapes = tensors(800, 64)
    size = f"400 groups of 2x64, settings: {settings}"
    one_group = Yardstick("fastopt, one group", workload=Workload(shapes))
    return _structure(f"groups 400x2x64, {settings} settings", size, Workload(shapes, 400, settings), one_group)


def _half_absent() -> Case:
    workload = Workload(TINY.shapes, absent=0.5)
    all_present = Yardstick("fastopt, all gradients", workload=TINY)
    return _structure("absent 1000x64, half", "1000x64, half without a gradient", workload, all_present)


def _noise(size: str, workload: Workload, seconds: float) -> Case:
    return Case(f"noise {size}", "noise", size, "Adam", workload, "same", seconds=seconds, sittings=2)


CASES: tuple[Case, ...] = (
    _adam("1000x64", TINY, faster=30, seconds=4),
    _adam("1000x1000", SMALL, faster=12, seconds=6),
    _adam("1000x50,000", MEDIUM, faster=1.3, seconds=20),
    _adam("1x50,000,000", HUGE, faster=1.05, seconds=20),
    *(case for rule in ("RAdam", "NAdam", "Adamax", "RMSprop") for case in _rule(rule)),
    *_ranger(),
    *map(_grouped, (1, 4, 28)),
    _half_absent(),
    _noise("1000x64", TINY, seconds=3),
    _noise("1x50,000,000", HUGE, seconds=6),
)


def matches(name: str, pattern: str | None) -> bool:
    """Whether `--only PATTERN` selects the name: its beginning, or a shell pattern."""
    return pattern is None or fnmatch(name, f"{pattern}*")
