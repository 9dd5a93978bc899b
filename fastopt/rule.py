"""What an optimizer class tells the engine: its stages, its state, and its coefficients at step t.

A `Rule` is the host side of an optimizer, without state and without a device. With the hyper-parameters of a parameter
group it becomes a `Setting` (setting.py). Where the step lives on a device, so do the coefficients: the functions of a
rule therefore take numbers or symbols (symbols.py).
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

from torch import Tensor

from fastopt import memory, stages
from fastopt.chain import Stage
from fastopt.symbols import Symbol

Hyper = Any
"""The hyper-parameters of a group as attributes, tensors resolved to numbers; `betas` also as `beta1` and `beta2`."""
Number: TypeAlias = "float | Symbol"
Condition: TypeAlias = "bool | Symbol"

FLAGS = ("capturable", "differentiable", "fused", "maximize", "weight_decay")
"""Group keys that matter whatever the rule; an optimizer whose groups lack one counts as having it off."""
SYMBOLIC = ("lr", "betas")
"""Group keys whose tensors may stay on a device: they decide values, never which stages run."""


def select(condition: Condition, a: Callable[[], Number], b: float) -> Number:
    """a() where the condition holds, b elsewhere. A number is only made where it is defined."""
    if isinstance(condition, Symbol):
        return condition.select(a(), b)
    return a() if condition else b


def flag(condition: Condition) -> Number:
    """1 where the condition holds, 0 elsewhere."""
    return condition.select(1.0, 0.0) if isinstance(condition, Symbol) else float(condition)


def to_single(x: Number) -> Number:
    """x rounded to float32."""
    if isinstance(x, Symbol):
        return x.to_single()
    rounded: float = struct.unpack("f", struct.pack("f", x))[0]
    return rounded


def zeros(p: Tensor, h: Hyper) -> Tensor:
    return memory.zeros_like(p)


def copy_of(p: Tensor, h: Hyper) -> Tensor:
    return memory.copy_of(p)


@dataclass(frozen=True)
class Slot:
    """One state tensor: its key in ``optimizer.state[p]`` and its value before the first step."""

    key: str
    create: Callable[[Tensor, Hyper], Tensor] = zeros


class Rule(ABC):
    """The host side of one optimizer; everything computed here is float64 and rounded once, by the kernels.

    What depends on t or on `SYMBOLIC` hyper-parameters is written with arithmetic, `select` and `flag`, so that it
    means the same for numbers and for symbols.
    """

    hyper: Sequence[str] = ()
    """Keys of the parameter groups that the rule reads, beside `FLAGS`."""
    optional: Sequence[str] = ()
    """Those of them that a checkpoint may lack, for it is older than they are; the class fills them in."""
    counters: Mapping[str, float] = MappingProxyType({"step": 0.0})
    """0-dim state: its keys and first values. The first counts steps; a second one is carried from step to step."""
    decouples = False
    """Whether ``decoupled_weight_decay`` may turn weight decay into a factor on the parameter."""
    slow: Slot | None = None
    """Where the slow weights live, for rules that have them."""

    def lacking(self, group: Mapping[str, Any]) -> list[str]:
        """Hyper-parameters without which a saved group is not one of this rule's."""
        return [key for key in self.hyper if key not in group and key not in self.optional]

    @abstractmethod
    def update(self, h: Hyper) -> tuple[Stage, ...]:
        """The stages of the rule itself, without scaling, decay and slow weights."""

    @abstractmethod
    def slots(self, h: Hyper) -> dict[str, Slot]:
        """The state tensors by the names the stages use, in the order torch creates them."""

    @abstractmethod
    def coefficients(self, h: Hyper, t: Number, carry: Number) -> tuple[Number, ...]:
        """The coefficients of `update` at step t = 1, 2, ...; `carry` is what `carried` returned for this step."""

    def twin(self, h: Hyper) -> tuple[str, dict[str, Number]] | None:
        """`coefficients` in compiled code: its name in `ROW_RULES` and what it reads, in its order and lr first.

        None: there is none. Then the compiled plan asks `coefficients` once a step.
        """
        return None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A rule with formulas of its own does not inherit the twin of others."""
        super().__init_subclass__(**kwargs)
        if "twin" not in vars(cls) and not vars(cls).keys().isdisjoint(("coefficients", "carried", "waits")):
            cls.twin = Rule.twin  # type: ignore[method-assign]

    def carried(self, h: Hyper, t: Number, carry: Number, single: bool) -> Number:
        """The second counter after step t; `single` says that it is stored in float32."""
        return carry

    def patient(self, h: Hyper) -> bool:
        """Whether there are steps that wait."""
        return False

    def waits(self, h: Hyper, t: Number) -> Condition:
        """Whether step t moves the moments alone, and leaves the parameter as it is, decay included."""
        return False

    def decay(self, h: Hyper) -> Stage | None:
        """Weight decay as a stage."""
        if self.decouples and (h.decoupled_weight_decay or h.weight_decay == 0):
            return stages.shrink
        return None if h.weight_decay == 0 else stages.l2

    def alpha(self, h: Hyper) -> Number:
        """The step of the slow weights."""
        return 1.0

    def period(self, h: Hyper) -> Number:
        """Every how many of its own steps a parameter synchronises with its slow weights; 0: when its group does."""
        return 0

    def check(self, h: Hyper) -> None:  # noqa: B027 no rule of torch has anything to say here
        """Raise for values, perhaps edited in a group, that no step can be taken with; torch's rules take any."""

    def rows(self, h: Hyper, p: Tensor) -> int:
        """Over how many leading slices of p the gradient is centralised, 0 for none."""
        return 0

    @property
    def centralises(self) -> bool:
        """Whether `rows` can say anything but 0."""
        return type(self).rows is not Rule.rows

    def structure(self, h: Hyper) -> tuple[Any, ...]:
        """Hyper-parameters that decide what a plan records, beside the state: a change of one rebuilds the plan."""
        return bool(h.capturable), bool(h.differentiable), bool(h.fused)


ROW_RULES = ("sgd", "momentum", "rmsprop", "rmsprop_momentum", "adagrad", "adam", "adamax", "nadam", "radam")
"""The twins of csrc/rows.h, in its order: a name's place is its number there."""
