"""What is measured: every case is data, the goals of the speed tables included.

A `Workload` is a set of tensors, how they are dealt into parameter groups, and how gradients arrive. A `Case` races
fastopt's `rule` on a workload against a family of rivals (see `contenders.rivals`), and where it has a `Yardstick`
also against fastopt itself on simpler work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any, Literal

import torch
from torch import Tensor

from bench.models import MODELS, scaled
from bench.rules import MIXES, RULES, Kind

Measure = Literal["speedup", "cost", "rate", "share", "time"]
Family = Literal["fused", "torch", "peers", "everyone", "same", "fast", "compiled", "none"]


@dataclass(frozen=True)
class Workload:
    """Tensors, groups and gradients.

    `groups` deals the tensors into that many equal consecutive groups, which share `settings` distinct hyper-parameter
    settings in turn. `absent` is the share of tensors without a gradient, drawn anew each step. `gradients`: "fresh"
    allocates every gradient anew each step, "rewritten" refills two alternating buffers behind new tensor objects (for
    sizes at which allocation would be most of the run), "shared" hands all contenders the same memory behind new tensor
    objects (for sizes at which the copies would not fit, and only to those that leave gradients as they are: optimi
    does not). `misaligned` tensors begin one element after a multiple of 16
    bytes, as views into a flat buffer do. `scheduled`: every step has another learning rate. `moved`: every step finds
    the parameters in other memory, as `p.data = ...` leaves them. `cleared`: zero_grad() after a step is part of it.
    `sharded`: parameters and gradients are DTensors, as FSDP2 makes them, in a group of one process. `channels_last`:
    parameters lie so, and their gradients do not.
    """

    shapes: tuple[tuple[int, ...], ...]
    groups: int = 1
    settings: int = 1
    absent: float = 0.0
    gradients: Literal["fresh", "rewritten", "shared"] = "fresh"
    dtype: torch.dtype = torch.float32
    misaligned: bool = False
    scheduled: bool = False
    moved: bool = False
    cleared: bool = False
    sharded: bool = False
    channels_last: bool = False

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
    """fastopt itself on other work, raced beside the case; `kind` and `workload` where they differ from the case's."""

    label: str
    kind: Kind | None = None
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
    """One race of the optimizer `kind`. `mix` says how parameters and states are stored; gradients are stored as
    parameters are. `seconds` bounds the timed rounds; a round is `steps_per_round` steps of each contender, one
    contender after the other; `sittings` rebuilds all tensors that many times, so that no contender keeps a lucky
    placement in memory. `studied`: what study.py measures of each contender is added. `x` is where the case lies on a
    curve."""

    name: str
    table: str
    size: str
    workload: Workload
    rivals: Family
    kind: Kind = RULES["Adam"]
    mix: str = "fp32"
    yardstick: Yardstick | None = None
    goals: tuple[Goal, ...] = ()
    seconds: float = 6.0
    warm_up: int = 4
    least_rounds: int = 8
    most_rounds: int = 300
    steps_per_round: int = 1
    sittings: int = 1
    studied: bool = False
    x: int = 0

    @property
    def hyper(self) -> dict[str, Any]:
        return self.kind.hyper_for(self.mix)

    def goal(self, measure: Measure) -> Goal | None:
        return next((goal for goal in self.goals if goal.measure == measure), None)

    @property
    def memory_bound(self) -> bool:
        """Large enough for bytes per second to be the measure: far beyond any cache."""
        return self.workload.numel >= 10_000_000

    @property
    def least_bytes(self) -> float:
        """What a step must move."""
        return self.kind.bytes_per_element(self.mix) * self.workload.numel


def tensors(count: int, numel: int) -> tuple[tuple[int, ...], ...]:
    return ((numel,),) * count


TINY = Workload(tensors(1000, 64))
SMALL = Workload(tensors(1000, 1000))
MEDIUM = Workload(tensors(1000, 50_000))
HUGE = Workload(tensors(1, 50_000_000), gradients="rewritten")
MANY = Workload(tensors(10_000, 64), gradients="shared")
LARGE = Workload(tensors(20, 5_000_000), gradients="shared")


def _adam(size: str, workload: Workload, faster: float, seconds: float) -> Case:
    goals = (Goal("speedup", "≥", faster),)
    # What small tensors cost depends most on where they were put: a process's first ones lie side by side.
    sittings = 4 if len(workload.shapes) > 1 and workload.numel <= SMALL.numel else 2
    return Case(f"adam {size}", "adam", size, workload, "fused", goals=goals, seconds=seconds, sittings=sittings)


def _rule(label: str, rivals: Family = "torch") -> list[Case]:
    """Against torch's for-loop and foreach; at 50 million parameters, also as fast per byte as fastopt's own Adam."""
    kind = RULES[label]
    own_adam = Yardstick("fastopt Adam", kind=RULES["Adam"])
    faster, per_byte = Goal("speedup", "≥", 4.5), Goal("rate", "≥", 1.0)

    def case(size: str, workload: Workload, *goals: Goal, **changes: Any) -> Case:
        name = f"{label.lower()} {size}"
        return Case(
            name, "rules", size, workload, rivals, kind, goals=goals, steps_per_round=kind.cycle, warm_up=2, **changes
        )

    return [
        case("1000x64", TINY, Goal("speedup", "≥", 50), seconds=5, sittings=4),
        case("1x50,000,000", HUGE, faster, per_byte, yardstick=own_adam, seconds=16, least_rounds=4),
    ]


def _lookahead() -> Case:
    """Around our Adam, whose step then makes the slow weights too; the others' goes around torch's foreach step."""
    kind = RULES["Lookahead, Adam"]
    name, cycle = "lookahead, adam 1000x64", kind.cycle
    return Case(name, "rules", "1000x64", TINY, "peers", kind, steps_per_round=cycle, warm_up=2, seconds=5)


def _structure(name: str, size: str, workload: Workload, yardstick: Yardstick) -> Case:
    goals = (Goal("cost", "≤", 1.5),)
    return Case(name, "structure", size, workload, "fused", yardstick=yardstick, goals=goals, seconds=4)


def _grouped(count: int, numel: int, settings: int) -> Case:
    shapes = tensors(2 * count, numel)
    size = f"{count} groups of 2x{numel:,}, settings: {settings}"
    one_group = Yardstick("fastopt, one group", workload=Workload(shapes))
    return _structure(
        f"groups {count}x2x{numel}, {settings} settings", size, Workload(shapes, count, settings), one_group
    )


def _half_absent() -> Case:
    workload = Workload(TINY.shapes, absent=0.5)
    all_present = Yardstick("fastopt, all gradients", workload=TINY)
    return _structure("absent 1000x64, half", "1000x64, half without a gradient", workload, all_present)


def _scheduled() -> Case:
    constant = Yardstick("fastopt, one learning rate", workload=TINY)
    size = "1000x64, another learning rate in every step"
    return _structure("scheduled 1000x64", size, replace(TINY, scheduled=True), constant)


def _cleared() -> Case:
    kept = Yardstick("fastopt, the step alone", workload=TINY)
    size, workload, goals = "1000x64, with zero_grad", replace(TINY, cleared=True), (Goal("speedup", "≥", 1),)
    return Case("cleared 1000x64", "structure", size, workload, "fast", yardstick=kept, goals=goals, seconds=4)


def _moved() -> Case:
    """As sharpness-aware minimisation, and swapping weights in and out, leave parameters."""
    stays = Yardstick("fastopt, memory that stays", workload=TINY)
    size, workload, goals = "1000x64, other memory in every step", replace(TINY, moved=True), (Goal("speedup", "≥", 1),)
    return Case("moved 1000x64", "structure", size, workload, "fast", yardstick=stays, goals=goals, seconds=4)


def _channels_last() -> Case:
    """As flat buffers of gradients leave them, and in their states checkpoints of models that were not. (torch's fused
    step gives elements the gradients of others there.)"""
    like = Workload(((256, 256, 3, 3),) * 16, gradients="rewritten")
    size, workload, goals = (
        "16x256x256x3x3, channels_last",
        replace(like, channels_last=True),
        (Goal("speedup", "≥", 1),),
    )
    yardstick = Yardstick("fastopt, all contiguous", workload=like)
    return Case(
        "channels_last 16x589,824", "structure", size, workload, "torch", yardstick=yardstick, goals=goals, seconds=4
    )


def _misaligned() -> Case:
    aligned = Yardstick("fastopt, aligned", workload=MEDIUM)
    size = "1000x50,000, misaligned"
    return _structure("misaligned 1000x50,000", size, replace(MEDIUM, misaligned=True), aligned)


def _sharded(size: str, workload: Workload) -> Case:
    """As fully_shard leaves parameters and gradients."""
    plain = Yardstick("fastopt, plain tensors", workload=workload)
    sharded = replace(workload, sharded=True)
    return Case(
        f"sharded adamw {size}", "sharded", size, sharded, "fast", RULES["AdamW"], yardstick=plain, seconds=5, warm_up=2
    )


def _noise(size: str, workload: Workload, seconds: float) -> Case:
    return Case(f"noise {size}", "noise", size, workload, "same", seconds=seconds, sittings=2)


def _model(name: str, divisor: int = 1) -> Case:
    shapes = scaled(MODELS[name](), divisor)
    size = f"{name}, widths / {divisor}" if divisor > 1 else name
    workload = Workload(shapes, gradients="shared")
    return Case(f"model {name.lower()}", "models", size, workload, "fused", RULES["AdamW"], seconds=4, least_rounds=6)


def _mix(label: str, mix: str) -> Case:
    """Torch has no step for states of another dtype than the parameter's."""
    kind, count, numel = RULES[label], 20, 1_000_000
    workload = Workload(tensors(count, numel), gradients="rewritten", dtype=MIXES[mix][0])
    rivals: Family = (
        "none" if MIXES[mix][0] != MIXES[mix][1] else "fast" if hasattr(torch.optim, kind.name) else "peers"
    )
    size = f"{count}x{numel:,}"
    name = f"mix {label.lower()} {size} {mix}"
    return Case(name, "mixes", size, workload, rivals, kind, mix, seconds=1.2, warm_up=1, steps_per_round=kind.cycle)


def _curve(of: str, x: int, count: int, numel: int, groups: int = 1) -> Case:
    name = f"curve {of} {x:,}"
    workload = Workload(tensors(count, numel), groups, gradients="shared")
    return Case(name, f"curve {of}", f"{count:,}x{numel:,}", workload, "fast", seconds=1.0, most_rounds=100, x=x)


CURVES = {"tensors": "of 1,000 elements", "elements": "in each of 20 tensors", "groups": "of 1000 tensors x 64"}


def _curves() -> list[Case]:
    """How a step's cost grows with the number of tensors, with their size and with the number of groups."""
    return [
        *(_curve("tensors", n, n, 1000) for n in (1, 10, 100, 1000, 10_000)),
        *(_curve("elements", n, 20, n) for n in (1, 100, 10_000, 1_000_000)),
        *(_curve("groups", n, 1000, 64, n) for n in (1, 10, 100, 1000)),
    ]


def _everyone(label: str, count: int, numel: int, **changes: Any) -> Case:
    kind = RULES[label]
    workload = Workload(tensors(count, numel), gradients="rewritten")
    size = f"{count}x{numel:,}"
    name = f"everyone {label.lower()} {size}"
    case = Case(
        name,
        "everyone",
        size,
        workload,
        "everyone",
        kind,
        seconds=2.5,
        warm_up=1,
        least_rounds=5,
        steps_per_round=kind.cycle,
    )
    return replace(case, **changes)


def _compiled(label: str) -> Case:
    """Few tensors, for compiling takes time in proportion to them."""
    workload = Workload(tensors(10, 1_000_000), gradients="rewritten")
    size = "10x1,000,000"
    name = f"compiled {label.lower()} {size}"
    return Case(name, "compiled", size, workload, "compiled", RULES[label], seconds=1.5, studied=True)


UNFUSED = ("RAdam", "NAdam", "Adamax", "RMSprop")

CASES: tuple[Case, ...] = (
    _adam("1000x64", TINY, faster=30, seconds=4),
    _adam("1000x1000", SMALL, faster=12, seconds=6),
    _adam("1000x50,000", MEDIUM, faster=1.3, seconds=16),
    _adam("1x50,000,000", HUGE, faster=1.05, seconds=16),
    *(case for label in UNFUSED for case in _rule(label)),
    *_rule("Ranger", "peers"),
    _lookahead(),
    *(_grouped(400, 64, settings) for settings in (1, 4, 28)),
    _grouped(465, 1000, 28),
    _half_absent(),
    _scheduled(),
    _moved(),
    _cleared(),
    _misaligned(),
    _channels_last(),
    _sharded("1000x64", TINY),
    _sharded("300x10,000", Workload(tensors(300, 10_000))),
    Case("many 10,000x64", "models", "10,000x64", MANY, "fused", RULES["AdamW"], seconds=5),
    Case("large 20x5,000,000", "models", "20x5,000,000", LARGE, "fused", RULES["AdamW"], seconds=5, least_rounds=6),
    _model("ResNet-50"),
    _model("GPT-2"),
    _model("ViT-L", divisor=2),
    _model("Llama-7B", divisor=8),
    *(_mix(label, mix) for label in RULES for mix in MIXES),
    *_curves(),
    *(_everyone(label, 100, 1000, studied=True) for label in RULES),
    *(_everyone(label, 4, 5_000_000) for label in ("Adam", "AdamW", "RAdam", "Ranger")),
    *map(_compiled, ("Adam", "RAdam")),
    _noise("1000x64", TINY, seconds=3),
    _noise("1x50,000,000", HUGE, seconds=6),
)


def matches(name: str, pattern: str | None) -> bool:
    """Whether `--only PATTERN` selects the name: its beginning, or a shell pattern, or several of them between ";"."""
    return pattern is None or any(fnmatch(name, f"{each}*") for each in pattern.split(";"))
