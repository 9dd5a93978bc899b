"""What is measured on a GPU, the most telling first: a run that ends early has what matters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from bench.cases import RANGER, Case, Goal, Workload, Yardstick, tensors
from bench.gpu_streams import Streams

BF16, FP32 = torch.bfloat16, torch.float32
MIXES = {"fp32": (FP32, FP32), "bf16, fp32 states": (BF16, FP32), "bf16": (BF16, BF16)}


@dataclass(frozen=True)
class GpuRule:
    """An optimizer as a line of a table. `slow` is how often per step slow weights are read and written; `foreach` the
    bytes per fp32 parameter that torch's foreach step moves: inputs and outputs of every operation it dispatches, torch
    2.13. (For Ranger, that of the stand-in in peers.)"""

    label: str
    name: str
    states: int
    hyper: Mapping[str, Any] = field(default_factory=dict)
    foreach: float | None = None
    slow: float = 0.0

    def streams(self, mix: str) -> Streams:
        parameter, state = MIXES[mix]
        return Streams(self.states, parameter, state)

    def bytes_per_element(self, mix: str) -> float:
        return self.streams(mix).bytes_per_element + 2 * self.slow * MIXES[mix][1].itemsize

    @property
    def traffic(self) -> float | None:
        """How many times the bytes of one pass torch's foreach step moves, all in fp32."""
        return self.foreach / self.bytes_per_element("fp32") if self.foreach else None


FOREACH_RANGER = 71.3  # a sixth of the steps pull back

RULES = {
    rule.label: rule
    for rule in (
        GpuRule("Adam", "Adam", 2, foreach=76),
        GpuRule("AMSGrad", "Adam", 3, {"amsgrad": True}, foreach=88),
        GpuRule("AdamW", "AdamW", 2, foreach=84),
        GpuRule("SGD", "SGD", 0, {"lr": 1e-3}, foreach=12),
        GpuRule("SGD, momentum", "SGD", 1, {"lr": 1e-3, "momentum": 0.9}, foreach=32),
        GpuRule("Adagrad", "Adagrad", 1, foreach=56),
        GpuRule("RMSprop", "RMSprop", 1, {"lr": 1e-3}, foreach=56),
        GpuRule("RMSprop, centered, momentum", "RMSprop", 3, {"lr": 1e-3, "centered": True, "momentum": 0.9}),
        GpuRule("Adamax", "Adamax", 2, foreach=64),
        GpuRule("NAdam", "NAdam", 2, foreach=92),
        GpuRule("RAdam", "RAdam", 2, foreach=92),
        GpuRule("Ranger", "Ranger", 2, RANGER, foreach=FOREACH_RANGER, slow=1 / 6),
    )
}


@dataclass(frozen=True)
class GpuCase(Case):
    """`clock` is the one that the case's times and ratios are taken by; see gpu_clocks. `mix` says how parameters and
    states are stored; gradients are stored as parameters are."""

    kind: GpuRule = RULES["Adam"]
    mix: str = "fp32"
    clock: Literal["device", "wall"] = "device"
    most_rounds: int = 60
    stripped: bool = True
    host: bool = False


LARGE = 200_000_000  # elements: 3.2 GB of an Adam in fp32, 1.6 GB in bf16, at least ten times the largest L2 cache
ROOF = (Goal("rate", "≥", 0.95), Goal("share", "≥", 0.9))


def _workload(count: int, numel: int, mix: str) -> Workload:
    return Workload(tensors(count, numel), gradients="shared", dtype=MIXES[mix][0])


def _hyper(kind: GpuRule, mix: str) -> dict[str, Any]:
    """In bf16 a step of 1e-3 is lost in the rounding of most parameters, and equal results would prove nothing."""
    return {**kind.hyper, "lr": 2e-2} if MIXES[mix][0] == BF16 else dict(kind.hyper)


def _device(table: str, kind: str, count: int, numel: int, mix: str, *goals: Goal, **changes: Any) -> GpuCase:
    """Times by the device's clock; five steps back to back in a turn, or a whole cycle of the slow weights."""
    rule = RULES[kind]
    size = f"{count:,}x{numel:,}"
    case = GpuCase(
        name=f"{table} {kind.lower()} {size} {mix}",
        table=f"gpu {table}",
        size=size,
        rule=rule.name,
        workload=_workload(count, numel, mix),
        rivals="none" if mix == "bf16, fp32 states" else "peers" if kind == "Ranger" else "gpu",
        goals=(*goals, *ROOF),
        hyper=_hyper(rule, mix),
        seconds=1.5,
        least_rounds=30,
        steps_per_round=round(1 / rule.slow) if rule.slow else 5,
        kind=rule,
        mix=mix,
    )
    return replace(case, **changes)


def _small(count: int, numel: int, *goals: Goal, **changes: Any) -> GpuCase:
    """Times with the wait for the device, gradients new in every step."""
    size = f"{count:,}x{numel:,}"
    case = GpuCase(
        name=f"small adam {size}",
        table="gpu small",
        size=size,
        rule="Adam",
        workload=_workload(count, numel, "fp32"),
        rivals="gpu",
        goals=(*goals, Goal("speedup", "≥", 1)),
        seconds=2.0,
        least_rounds=30,
        most_rounds=200,
        clock="wall",
        stripped=False,
        host=True,
    )
    return replace(case, **changes)


def _groups(settings: int) -> GpuCase:
    shapes = tensors(930, 1000)
    size = f"465 groups of 2x1,000, settings: {settings}"
    return _small(
        930,
        1000,
        Goal("cost", "≤", 1.3),
        name=f"groups adam 465x2x1,000, {settings} settings",
        table="gpu groups",
        size=size,
        workload=Workload(shapes, 465, settings, gradients="shared"),
        rivals="none" if settings == 1 else "fused",
        yardstick=Yardstick("fastopt, one group", workload=Workload(shapes, gradients="shared")),
    )


def _fused(kind: str, mix: str, faster: float) -> GpuCase:
    return _device("fused", kind, 200, 1_000_000, mix, Goal("speedup", "≥", faster))


def _rule(kind: str, mix: str) -> GpuCase:
    """Torch has no fused step for it: nine tenths of what the bytes alone promise."""
    traffic = RULES[kind].traffic
    goals = (Goal("speedup", "≥", round(0.9 * traffic, 2)),) if traffic and mix != "bf16, fp32 states" else ()
    return _device("rules", kind, 200, 1_000_000, mix, *goals)


def _huge(kind: str, count: int, numel: int, mix: str) -> GpuCase:
    return _device("roof", kind, count, numel, mix, least_rounds=12, seconds=4.0)


def _compiled(kind: str) -> GpuCase:
    """Few tensors, for compiling takes time in proportion to them."""
    goal = Goal("speedup", "≥", 1)
    return _device("compiled", kind, 20, 10_000_000, "fp32", goal, rivals="compiled", warm_up=6, seconds=12.0)


UNFUSED = ("RAdam", "NAdam", "Adamax", "RMSprop", "Ranger")
MIXED, ALL_BF16 = "bf16, fp32 states", "bf16"

GPU_CASES: tuple[GpuCase, ...] = (
    _small(1000, 1000, Goal("time", "≤", 150)),
    _fused("Adam", "fp32", 1.1),
    _fused("Adam", ALL_BF16, 1.25),
    _fused("AMSGrad", "fp32", 1.25),
    _fused("AMSGrad", ALL_BF16, 1.25),
    *(_rule(kind, "fp32") for kind in UNFUSED),
    _small(10_000, 64, Goal("time", "≤", 1000), seconds=3.0),
    _groups(28),
    _rule("Adam", MIXED),
    _huge("Adam", 200, 5_000_000, "fp32"),
    _device("noise", "Adam", 200, 1_000_000, "fp32", rivals="same", stripped=False),
    _huge("Adam", 1, 1_000_000_000, "fp32"),
    _compiled("RAdam"),
    _fused("AdamW", "fp32", 1.0),
    _fused("SGD, momentum", "fp32", 1.0),
    _fused("SGD", "fp32", 1.0),
    _fused("Adagrad", "fp32", 1.0),
    *(_rule(kind, mix) for mix in (ALL_BF16, MIXED) for kind in UNFUSED),
    _compiled("Adam"),
    _rule("RMSprop, centered, momentum", "fp32"),
    _rule("AMSGrad", MIXED),
    _small(1000, 50_000),
    *(_fused(kind, ALL_BF16, 1.0) for kind in ("AdamW", "SGD, momentum", "Adagrad")),
    _huge("Adam", 200, 5_000_000, MIXED),
    _huge("Adam", 200, 5_000_000, ALL_BF16),
    _groups(1),
    *(_rule(kind, MIXED) for kind in ("AdamW", "SGD, momentum", "Adagrad")),
    _huge("Adam", 1000, 1_000_000, "fp32"),
    _small(1, 1000),
    _small(100, 10_000),
)
