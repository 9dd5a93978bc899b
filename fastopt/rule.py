"""What an optimizer class tells the engine: its stages, its state, and its coefficients at step t.

A `Rule` is the host side of an optimizer, without tensors and without a device. A `Setting` is a rule together with
the hyper-parameters of a parameter group; groups whose hyper-parameters are equal share one, and each of its
coefficient rows is computed once however many parameters need it.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType, SimpleNamespace
from typing import Any

from torch import Tensor

from fastopt import memory, stages
from fastopt.chain import Chain, Stage

Hyper = Any
"""The hyper-parameters of a group as attributes, tensors resolved to numbers; `betas` also as `beta1` and `beta2`."""

FLAGS = ("capturable", "differentiable", "fused", "maximize", "weight_decay")
"""Group keys that matter whatever the rule; a group without one counts as having it off."""


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
    """The host side of one optimizer; everything computed here is float64 and rounded once, by the kernels."""

    hyper: Sequence[str] = ()
    """Keys of the parameter groups that the rule reads, beside `FLAGS`."""
    counters: Mapping[str, float] = MappingProxyType({"step": 0.0})
    """0-dim state: its keys and first values. The first counts steps; a second one is carried from step to step."""
    decouples = False
    """Whether ``decoupled_weight_decay`` may turn weight decay into a factor on the parameter."""
    slow: Slot | None = None
    """Where the slow weights live, for rules that have them."""

    @abstractmethod
    def update(self, h: Hyper, t: float) -> tuple[Stage, ...]:
        """The stages of the rule itself at step t, without scaling, decay and slow weights; their state is the same."""

    @abstractmethod
    def slots(self, h: Hyper) -> dict[str, Slot]:
        """The state tensors by the names the stages use, in the order torch creates them."""

    @abstractmethod
    def coefficients(self, h: Hyper, t: float, carry: float) -> tuple[float, ...]:
        """The coefficients of `update` at step t = 1, 2, ...; `carry` is what `carried` returned for this step."""

    def carried(self, h: Hyper, t: float, carry: float, single: bool) -> float:
        """The second counter after step t; `single` says that it is stored in float32."""
        return carry

    def decay(self, h: Hyper, t: float) -> tuple[tuple[Stage, ...], tuple[float, ...]]:
        """Weight decay as a stage and its coefficient."""
        if self.decouples and (h.decoupled_weight_decay or h.weight_decay == 0):
            return (stages.shrink,), stages.shrink.row(factor=1 - h.lr * h.weight_decay)
        if h.weight_decay == 0:
            return (), ()
        return (stages.l2,), stages.l2.row(weight_decay=h.weight_decay)

    def alpha(self, h: Hyper) -> float:
        """The step of the slow weights."""
        return 1.0

    def synchronises(self, h: Hyper, t: float, asked: bool) -> bool:
        """Whether step t ends at the slow weights; `asked` says that the whole group does."""
        return asked

    def rows(self, h: Hyper, p: Tensor) -> int:
        """Over how many leading slices of p the gradient is centralised, 0 for none."""
        return 0

    def structure(self, h: Hyper) -> tuple[Any, ...]:
        """Hyper-parameters that decide what a plan records, beside the state: a change of one rebuilds the plan."""
        return bool(h.capturable), bool(h.differentiable), bool(h.fused)


@dataclass(frozen=True)
class Row:
    """What one step does to one parameter: a chain, its coefficients, and the second counter afterwards."""

    chain: Chain
    coefficients: tuple[float, ...]
    carry: float


class Setting:
    """A rule with fixed hyper-parameters. `layout` is equal, by identity, between settings that use the same state."""

    def __init__(self, rule: Rule, h: Hyper, chain_index: Callable[[Chain], int]) -> None:
        self.rule, self.h, self._index = rule, h, chain_index
        self.named_slots = rule.slots(h)
        if rule.slow is not None:
            self.named_slots["slow"] = rule.slow
        self.chain = self._chain(1.0, False)
        order = (*self.chain.state, *(("slow",) if rule.slow else ()))
        self.slots: tuple[str, ...] = tuple(self.named_slots[name].key for name in order)
        self.layout = _shared(("layout", self.slots, *rule.structure(h)))

    def _chain(self, t: float, synchronised: bool) -> Chain:
        """One object for each sequence of stages, so that chains can be told apart by identity."""
        tail = (stages.lookahead,) if synchronised else ()
        return _chain((stages.scale, *self.rule.decay(self.h, t)[0], *self.rule.update(self.h, t), *tail))

    def at(self, t: float, carry: float, single: bool, sync: bool) -> Row:
        """The row at step t; t = 0 stands for a parameter without a gradient whose slow weights synchronise."""
        h, rule = self.h, self.rule
        if t == 0:
            return Row(PULL, stages.lookahead.row(alpha=rule.alpha(h)), carry)
        carry = rule.carried(h, t, carry, single)
        values = (-1.0 if h.maximize else 1.0, *rule.decay(h, t)[1], *rule.coefficients(h, t, carry))
        if rule.slow is not None and rule.synchronises(h, t, sync):
            return Row(self._chain(t, True), (*values, *stages.lookahead.row(alpha=rule.alpha(h))), carry)
        return Row(self._chain(t, False), values, carry)

    def row(self, t: float, carry: float, single: bool, sync: bool) -> tuple[int, int, int, tuple[float, ...], float]:
        """`at` for the compiled plan: chain index, first slot, number of slots, coefficients, second counter."""
        row = self.at(t, carry, single, sync)
        used = len(row.chain.state)
        first = len(self.slots) - 1 if row.chain is PULL else 0
        return self._index(row.chain), first, used, row.coefficients, row.carry


@cache
def _chain(sequence: tuple[Stage, ...]) -> Chain:
    return Chain(sequence)


PULL = _chain((stages.lookahead,))
"""What happens to a parameter without a gradient when the slow weights synchronise."""


class Settings:
    """Makes settings from parameter groups, one for each distinct set of values."""

    def __init__(self, rule: Rule, chain_index: Callable[[Chain], int]) -> None:
        self.rule, self._index = rule, chain_index
        self.keys = tuple(dict.fromkeys((*rule.hyper, *FLAGS)))
        self._known: dict[tuple[Any, ...], Setting] = {}

    def of(self, group: Mapping[str, Any]) -> Setting:
        values = tuple(_number(group.get(key)) for key in self.keys)
        setting = self._known.get(values)
        if setting is None:
            if len(self._known) > 1024:  # a schedule that never repeats a value must not grow this for ever
                self._known.clear()
            setting = self._known[values] = Setting(self.rule, self._hyper(values), self._index)
        return setting

    def _hyper(self, values: tuple[Any, ...]) -> Hyper:
        h = SimpleNamespace(**dict(zip(self.keys, values, strict=True)))
        if "betas" in self.keys:
            h.beta1, h.beta2 = h.betas
        h.weight_decay = h.weight_decay or 0
        return h


def _number(value: Any) -> Any:
    """Tensors as Python numbers and lists as tuples: what can be compared by value."""
    if isinstance(value, Tensor):
        return value.item()
    if isinstance(value, (list, tuple)):
        return tuple(_number(item) for item in value)
    return value


_layouts: dict[tuple[Any, ...], tuple[Any, ...]] = {}


def _shared(layout: tuple[Any, ...]) -> tuple[Any, ...]:
    return _layouts.setdefault(layout, layout)


def to_single(x: float) -> float:
    """x rounded to float32."""
    rounded: float = struct.unpack("f", struct.pack("f", x))[0]
    return rounded
