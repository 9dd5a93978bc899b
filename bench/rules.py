"""The lines of every table that goes through all optimizers, and how their numbers may be stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

BF16, FP32 = torch.bfloat16, torch.float32
MIXES = {"fp32": (FP32, FP32), "bf16, fp32 states": (BF16, FP32), "bf16": (BF16, BF16)}
"""Parameters and gradients, states."""

# Ranger's eps of 1e-5 would compare eps conventions, not speed: optimi divides it by the bias correction, ranger.py
# does not.
RANGER = {"lr": 1e-3, "betas": (0.95, 0.999), "eps": 1e-8, "k": 6, "alpha": 0.5}


@dataclass(frozen=True)
class Streams:
    """What a step touches per element: p is read and written, g read, each of the states read and written."""

    states: int
    parameter: torch.dtype = torch.float32
    state: torch.dtype = torch.float32

    @property
    def bytes_per_element(self) -> int:
        return 3 * self.parameter.itemsize + 2 * self.states * self.state.itemsize

    def __str__(self) -> str:
        names = [str(dtype).removeprefix("torch.") for dtype in (self.parameter, self.state)]
        kinds = names[0] if not self.states or names[0] == names[1] else f"{names[0]} with {names[1]} states"
        return f"{2 + self.states} read, {1 + self.states} written, {kinds}"


@dataclass(frozen=True)
class Kind:
    """An optimizer as a line of a table. `slow` is how often per step slow weights are read and written; `foreach` the
    bytes per fp32 parameter that torch's foreach step moves: inputs and outputs of every operation it dispatches, torch
    2.13. (For Ranger, that of the stand-in in peers.) Lookahead wraps an Adam, whose is the lr."""

    label: str
    name: str
    states: int
    hyper: Mapping[str, Any] = field(default_factory=dict)
    foreach: float | None = None
    slow: float = 0.0

    def streams(self, mix: str) -> Streams:
        parameter, state = MIXES[mix]
        return Streams(self.states, parameter, state)

    def bytes_per_element(self, mix: str = "fp32") -> float:
        """What a step must move at least."""
        return self.streams(mix).bytes_per_element + 2 * self.slow * MIXES[mix][1].itemsize

    def hyper_for(self, mix: str) -> dict[str, Any]:
        """In bf16 a step of 1e-3 is lost in the rounding of most parameters, and equal results would prove nothing."""
        return {**self.hyper, "lr": 0.1} if MIXES[mix][0] == BF16 else dict(self.hyper)

    @property
    def cycle(self) -> int:
        """Steps after which all that a step can do was done once."""
        return round(1 / self.slow) if self.slow else 1

    @property
    def traffic(self) -> float | None:
        """How many times the bytes of one pass torch's foreach step moves, all in fp32."""
        return self.foreach / self.bytes_per_element("fp32") if self.foreach else None


FOREACH_RANGER = 71.3  # a sixth of the steps pull back

RULES = {
    kind.label: kind
    for kind in (
        Kind("Adam", "Adam", 2, foreach=76),
        Kind("AMSGrad", "Adam", 3, {"amsgrad": True}, foreach=88),
        Kind("AdamW", "AdamW", 2, foreach=84),
        Kind("SGD", "SGD", 0, {"lr": 1e-3}, foreach=12),
        Kind("SGD, momentum", "SGD", 1, {"lr": 1e-3, "momentum": 0.9}, foreach=32),
        Kind("Adagrad", "Adagrad", 1, foreach=56),
        Kind("RMSprop", "RMSprop", 1, {"lr": 1e-3}, foreach=56),
        Kind("RMSprop, centered, momentum", "RMSprop", 3, {"lr": 1e-3, "centered": True, "momentum": 0.9}),
        Kind("Adamax", "Adamax", 2, foreach=64),
        Kind("NAdam", "NAdam", 2, foreach=92),
        Kind("RAdam", "RAdam", 2, foreach=92),
        Kind("Lookahead, Adam", "Lookahead", 2, {"k": 5, "alpha": 0.5}, slow=1 / 5),
        Kind("Ranger", "Ranger", 2, RANGER, foreach=FOREACH_RANGER, slow=1 / 6),
    )
}
