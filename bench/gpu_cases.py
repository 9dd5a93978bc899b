"""What is measured on a GPU, the most telling first: a run that ends early has what matters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from bench.cases import CASES, Case, Goal, Workload, Yardstick, tensors
from bench.models import MODELS, scaled
from bench.rules import MIXES, RULES


@dataclass(frozen=True)
class GpuCase(Case):
    """`clock` is the one that the case's times and ratios are taken by; see gpu_clocks."""

    clock: Literal["device", "wall", "rested"] = "device"
    most_rounds: int = 60
    stripped: bool = True
    host: bool = False


LARGE = 200_000_000  # elements: 3.2 GB of an Adam in fp32, 1.6 GB in bf16, at least ten times the largest L2 cache
ROOF = (Goal("rate", "≥", 0.95), Goal("share", "≥", 0.9))


def _workload(count: int, numel: int, mix: str, gradients: Literal["shared", "rewritten"] = "shared") -> Workload:
    return Workload(tensors(count, numel), gradients=gradients, dtype=MIXES[mix][0])


def _device(table: str, kind: str, count: int, numel: int, mix: str, *goals: Goal, **changes: Any) -> GpuCase:
    """Times by the device's clock; five steps back to back in a turn, or a whole cycle of the slow weights."""
    rule = RULES[kind]
    size, own = f"{count:,}x{numel:,}", hasattr(torch.optim, rule.name)
    case = GpuCase(
        name=f"{table} {kind.lower()} {size} {mix}",
        table=f"gpu {table}",
        size=size,
        workload=_workload(count, numel, mix, "shared" if own else "rewritten"),
        rivals="none" if mix == "bf16, fp32 states" else "fast" if own else "peers",
        goals=(*goals, *ROOF),
        seconds=1.5,
        least_rounds=30,
        steps_per_round=rule.cycle if rule.slow else 5,
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
        workload=_workload(count, numel, "fp32"),
        rivals="fast",
        goals=(*goals, Goal("speedup", "≥", 1)),
        seconds=2.0,
        least_rounds=30,
        most_rounds=200,
        clock="wall",
        stripped=False,
        host=True,
    )
    return replace(case, **changes)


def _rested(count: int, numel: int, *goals: Goal) -> GpuCase:
    size = f"{count:,}x{numel:,}"
    changes = {
        "name": f"rested adam {size}",
        "table": "gpu rested",
        "clock": "rested",
        "rivals": "fused",
        "host": False,
    }
    return _small(count, numel, *goals, seconds=4.0, warm_up=2, **changes)


def _counted(count: int, numel: int) -> GpuCase:
    """Ours with `fused=True` too, which keeps the steps on the device: a kernel makes the coefficients there first."""
    adam = RULES["Adam"]
    size = f"{count:,}x{numel:,}"
    changes = {"name": f"counted adam {size}", "table": "gpu counted", "rivals": "fused"}
    return _small(count, numel, kind=replace(adam, hyper={**adam.hyper, "fused": True}), **changes)


def _sharded(count: int, numel: int) -> GpuCase:
    workload = replace(_workload(count, numel, "fp32"), sharded=True)
    changes = {"name": f"sharded adamw {count:,}x{numel:,}", "table": "gpu sharded", "kind": RULES["AdamW"]}
    return _small(count, numel, workload=workload, seconds=4.0, least_rounds=12, **changes)


def _lookahead(count: int, numel: int) -> GpuCase:
    kind = RULES["Lookahead, Adam"]
    name = f"small lookahead, adam {count:,}x{numel:,}"
    return _small(count, numel, name=name, kind=kind, rivals="peers", steps_per_round=kind.cycle, seconds=3.0)


def _moved(count: int, numel: int) -> GpuCase:
    """The tables on the device are made and sent anew in every step."""
    workload = replace(_workload(count, numel, "fp32"), moved=True)
    size = f"{count:,}x{numel:,}"
    return _small(count, numel, name=f"moved adam {size}", table="gpu moved", workload=workload, least_rounds=12)


def _cleared(count: int, numel: int) -> GpuCase:
    workload = replace(_workload(count, numel, "fp32"), cleared=True)
    return _small(count, numel, name=f"cleared adam {count:,}x{numel:,}", table="gpu cleared", workload=workload)


def _misaligned(mix: str) -> GpuCase:
    workload = replace(_workload(200, 1_000_000, mix), misaligned=True)
    return _device("misaligned", "Adam", 200, 1_000_000, mix, workload=workload, goals=(Goal("speedup", "≥", 1),))


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
    """Without torch's foreach step, whose temporaries and tensors would take it over the 80 GB of an H100."""
    rivals = "none" if mix == MIXED else "fused"
    return _device("roof", kind, count, numel, mix, least_rounds=12, seconds=4.0, rivals=rivals)


def _model(name: str, divisor: int = 1) -> GpuCase:
    shapes = scaled(MODELS[name](), divisor)
    size = f"{name}, widths / {divisor}" if divisor > 1 else name
    workload = Workload(shapes, gradients="shared")
    return _device(
        "models",
        "AdamW",
        1,
        1,
        "fp32",
        Goal("speedup", "≥", 1),
        name=f"model {name.lower()}",
        size=size,
        workload=workload,
        stripped=False,
        clock="wall",
        host=True,
    )


def _curve(case: Case) -> GpuCase:
    """A point of a curve that the CPU's run has too."""
    count, numel = len(case.workload.shapes), case.workload.shapes[0][0]
    return _small(
        count,
        numel,
        name=case.name,
        table=f"gpu {case.table}",
        size=case.size,
        workload=case.workload,
        goals=(),
        seconds=0.7,
        x=case.x,
    )


def _study(kind: str) -> GpuCase:
    """Not raced: see study.py."""
    workload = Workload(tensors(100, 1000), gradients="rewritten")
    own = hasattr(torch.optim, RULES[kind].name)
    return _device(
        "study",
        kind,
        100,
        1000,
        "fp32",
        workload=workload,
        rivals="fast" if own else "peers",
        goals=(),
    )


def _compiled(kind: str) -> GpuCase:
    """Few tensors, for compiling takes time in proportion to them."""
    goal = Goal("speedup", "≥", 1)
    return _device("compiled", kind, 20, 10_000_000, "fp32", goal, rivals="compiled", warm_up=6, seconds=12.0)


UNFUSED = ("RAdam", "NAdam", "Adamax", "RMSprop", "Ranger", "Lookahead, Adam")
MIXED, ALL_BF16 = "bf16, fp32 states", "bf16"

GPU_CASES: tuple[GpuCase, ...] = (
    _small(1000, 1000, Goal("time", "≤", 150)),
    _fused("Adam", "fp32", 1.1),
    _fused("Adam", ALL_BF16, 1.25),
    _fused("AMSGrad", "fp32", 1.25),
    _fused("AMSGrad", ALL_BF16, 1.25),
    *(_rule(kind, "fp32") for kind in UNFUSED),
    _small(10_000, 64, Goal("time", "≤", 1000), seconds=3.0, least_rounds=12),
    _groups(28),
    _rested(1000, 1000, Goal("time", "≤", 150)),
    _rested(10_000, 64),
    _counted(1000, 1000),
    _counted(10, 1000),
    _sharded(300, 10_000),
    _lookahead(1000, 1000),
    _cleared(1000, 1000),
    _moved(300, 10_000),
    _rule("Adam", MIXED),
    _model("ResNet-50"),
    _model("GPT-2"),
    _huge("Adam", 200, 5_000_000, "fp32"),
    *(_misaligned(mix) for mix in MIXES),
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
    _model("ViT-L"),
    _model("Llama-7B", divisor=3),
    *(_curve(case) for case in CASES if case.table.startswith("curve ")),
)

STUDIES = tuple(map(_study, RULES))
