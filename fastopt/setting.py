"""A rule with the hyper-parameters of a parameter group, and the coefficients that the two make.

Groups whose hyper-parameters are equal share one `Setting`, and each of its coefficient rows is computed once however
many parameters need it. Where the step lives on a device, so do the rows: `Setting.at` makes one row from Python
floats, `Setting.formulas` writes down how a kernel makes them. Compiled code does both from `Setting.on_device`
(csrc/rows.h), on the host to the same doubles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastopt import stages
from fastopt.chain import Chain, Stage
from fastopt.rule import FLAGS, ROW_RULES, SYMBOLIC, Condition, Hyper, Number, Rule, select
from fastopt.symbols import HYPER, Symbol, Tape, is_number

State = Mapping[Tensor, dict[str, Any]]
Groups = Sequence[Mapping[str, Any]]
"""What an optimizer holds: `state` and `param_groups`."""
Flags = Sequence[Sequence[bool]]
Counts = Sequence[Sequence[int]]
"""What a plan is told of every parameter, group by group."""

DECAYS = (None, stages.l2, stages.shrink)
"""Weight decays, in the order of csrc/rows.h."""


@dataclass(frozen=True)
class Row:
    """What one step does to one parameter: a chain, its coefficients, and the second counter afterwards."""

    chain: Chain
    coefficients: tuple[float, ...]
    carry: float


@dataclass(frozen=True)
class Path:
    """One of the things that a step may do to a parameter, in the words of a `Formulas`."""

    chain: Chain
    first_slot: int
    active: str
    """Whether it does."""
    values: tuple[str, ...]
    """The coefficients."""


@dataclass(frozen=True, eq=False)
class Formulas:
    """What one step does to a parameter whose steps a device counts: text that a backend compiles (symbols.py)."""

    inputs: tuple[str, ...]
    """Those of the hyper-parameters, see `Setting.input`, and of `DUE` that are used. Beside them there are ``t``, the
    step, ``carry``, the second counter, and ``stepped``, whether there is a gradient."""
    lines: tuple[tuple[str, str], ...]
    paths: tuple[Path, ...]
    """One for each chain that may occur: one for most rules. Each parameter takes one of them at most."""
    carried: str | None
    """The second counter after the step."""
    texts: dict[Any, str] = field(default_factory=dict)
    """What a backend has made of them."""


Written: TypeAlias = "tuple[list[tuple[Callable[[Hyper], Any], Any]], Formulas]"
"""Formulas, and what was asked of the hyper-parameters when they were written down."""
MOST_WRITTEN = 64
"""Formulas for the same chains that are remembered: a rule may decide anew for every number."""
DUE = ("due_step", "due_period")
"""Inputs of a group whose device decides whether it synchronises: the steps taken, and every how many it does."""


class OnDevice(NamedTuple):
    """A setting for csrc/rows.h: `RowSetting` there says what each field is."""

    rule: int
    decay: int
    maximize: bool
    slow: bool
    weight_decay: float
    alpha: float
    period: float
    hyper: tuple[float | Tensor, ...]
    """A tensor is float32 or float64 with one element, and is read where it is, at every step anew."""
    chains: tuple[int, ...]
    """Of an update, one that ends at the slow weights, a step that waits, one that ends there too, and `PULL`."""


class Setting:
    """A rule with fixed hyper-parameters. `layout` is equal, by identity, between settings that use the same state."""

    def __init__(
        self, rule: Rule, h: Hyper, chain_index: Callable[[Chain], int], written: dict[Any, list[Written]] | None = None
    ) -> None:
        """`written`: formulas that other settings of the rule have been asked for."""
        self.rule, self.h, self._index = rule, h, chain_index
        self._written: dict[Any, list[Written]] = {} if written is None else written
        self.counts_on_device = bool(h.capturable or h.fused)
        """Whether torch keeps the counters of such a group on the parameter's device."""
        self.tensors = tuple(value for value in vars(h).values() if isinstance(value, Tensor))
        """Hyper-parameters that stay on their device."""
        self.symbolic = bool(self.tensors)
        self.named_slots = rule.slots(h)
        if rule.slow is not None:
            self.named_slots["slow"] = rule.slow
        self.chain = self._chain(False, False)
        order = (*self.chain.state, *(("slow",) if rule.slow else ()))
        self.slots: tuple[str, ...] = tuple(self.named_slots[name].key for name in order)
        # Without counters, tensors decide where the rows are made.
        where = () if rule.counters else (self.symbolic,)
        self.layout = _shared(("layout", self.slots, *rule.structure(h), *where))

    def _chain(self, waits: bool, synchronised: bool) -> Chain:
        """One object for each sequence of stages, so that chains can be told apart by identity."""
        tail = (stages.lookahead,) if synchronised else ()
        if waits:
            return _chain((stages.scale, stages.moments, *tail))
        decay = self.rule.decay(self.h)
        return _chain((stages.scale, *((decay,) if decay else ()), *self.rule.update(self.h), *tail))

    def _values(self, h: Hyper, t: Number, carry: Number, waits: bool) -> tuple[Any, ...]:
        """The coefficients of `_chain`, without the slow weights'."""
        rule = self.rule
        scale = -1.0 if h.maximize else 1.0
        if waits:
            return scale, *stages.moments.row(w1=1 - h.beta1, beta2=h.beta2, w2=1 - h.beta2)
        return scale, *_decay_row(rule.decay(h), h), *rule.coefficients(h, t, carry)

    def _slow_values(self, h: Hyper, synchronised: bool) -> tuple[Any, ...]:
        return stages.lookahead.row(alpha=self.rule.alpha(h)) if synchronised else ()

    def _synchronises(self, h: Hyper, t: Number, asked: Condition) -> Condition:
        if self.rule.slow is None:
            return False
        period: Any = self.rule.period(h)
        return t % period == 0 if period else asked

    def _numbers(self) -> Hyper:
        """The hyper-parameters, those that live on a device as they are now."""
        if not self.symbolic:
            return self.h
        return SimpleNamespace(**{k: v.item() if isinstance(v, Tensor) else v for k, v in vars(self.h).items()})

    def at(self, t: float | None, carry: float, single: bool, sync: bool) -> Row:
        """The row at step t; None stands for a parameter without a gradient whose slow weights synchronise."""
        h, rule = self._numbers(), self.rule
        if t is None:
            return Row(PULL, self._slow_values(h, True), carry)
        carried: Any = rule.carried(h, t, carry, single)
        waits, synchronised = bool(rule.waits(h, t)), bool(self._synchronises(h, t, sync))
        values = (*self._values(h, t, carried, waits), *self._slow_values(h, synchronised))
        return Row(self._chain(waits, synchronised), values, carried)

    def row(
        self, t: float | None, carry: float, single: bool, sync: bool
    ) -> tuple[int, int, int, tuple[float, ...], float]:
        """`at` for the compiled plan: chain index, first slot, number of slots, coefficients, second counter."""
        row = self.at(t, carry, single, sync)
        return self._index(row.chain), self.first_slot(row.chain), len(row.chain.state), row.coefficients, row.carry

    def first_slot(self, chain: Chain) -> int:
        """Where in `slots` the states begin that a chain takes."""
        return len(self.slots) - 1 if chain is PULL else 0

    def formulas(self, single: bool, asked: bool | None) -> Formulas:
        """`at` in words, for steps that are counted on a device; written once for all settings that ask for the same.

        Args:
            single: Whether the second counters are stored in float32.
            asked: Whether the group synchronises; None: its device decides, from `DUE`.
        """
        known = self._written.setdefault((single, asked, self._kinds, self.slots, *self.chains), [])
        for decisions, formulas in known:
            if all(value(self.h) == was for value, was in decisions):
                return formulas
        tape = Tape(self.h)
        formulas = self._write(tape, single, asked)
        if len(known) >= MOST_WRITTEN:
            known.clear()
        known.append((tape.decisions, formulas))
        return formulas

    @cached_property
    def _kinds(self) -> tuple[Any, ...]:
        """What formulas are written for, beside what they ask of numbers: all that is no number."""
        return tuple(
            (k, None if is_number(v) else v, isinstance(v, Tensor)) for k, v in vars(self.h).items() if k != "betas"
        )

    def _write(self, tape: Tape, single: bool, asked: bool | None) -> Formulas:
        rule, h = self.rule, tape.hyper()
        t, carry, stepped = map(tape.leaf, given := ("t", "carry", "stepped"))
        step, period = map(tape.leaf, DUE)
        due: Condition = (step + 1) % period == 0 if asked is None else asked
        carried = rule.carried(h, t, carry, single)
        waiting, syncing = rule.waits(h, t), self._synchronises(h, t, due)
        found: list[tuple[Chain, Symbol, tuple[Number, ...]]] = []
        for waits in (False, True):
            if (taken := _both(stepped, _is(waiting, waits))) is None:
                continue
            values = self._values(h, t, carried, waits)
            for synchronised in (False, True):
                if (active := _both(taken, _is(syncing, synchronised))) is not None:
                    row = (*values, *self._slow_values(h, synchronised))
                    found.append((self._chain(waits, synchronised), active, row))
        if self.rule.slow is not None and not rule.period(h) and (active := _both(~stepped, syncing)) is not None:
            found.append((PULL, active, self._slow_values(h, True)))
        paths = [Path(c, self.first_slot(c), a.name, tuple(map(tape.name, row))) for c, a, row in found]
        after = tape.name(carried) if len(rule.counters) > 1 else None
        outputs = [word for path in paths for word in (path.active, *path.values)]
        inputs, lines = tape.needed([*outputs, after or ""])
        return Formulas(tuple(name for name in inputs if name not in given), lines, tuple(paths), after)

    def input(self, name: str) -> float | Tensor:
        """The hyper-parameter that formulas call so."""
        value: float | Tensor = getattr(self.h, name.removeprefix(HYPER))
        return value

    @cached_property
    def chains(self) -> list[Chain | None]:
        """Of an update, one that ends at the slow weights, a step that waits, one that ends there too, and `PULL`; None
        where there is none."""
        slow, patient = self.rule.slow is not None, self.rule.patient(self.h)
        possible = (True, slow, patient, slow and patient)
        chains = [self._chain(bool(way & 2), bool(way & 1)) if ok else None for way, ok in enumerate(possible)]
        return [*chains, PULL if slow and not self.rule.period(self.h) else None]

    def on_device(self) -> OnDevice | None:
        """What compiled code needs to make the rows; None where the rule has no twin there."""
        h, rule = self.h, self.rule
        twin = rule.twin(h)
        if twin is None:
            return None
        name, hyper = twin
        if name not in ROW_RULES:
            raise ValueError(
                f"{type(rule).__name__}.twin() says {name!r}, and ROW_RULES in fastopt/rule.py lists "
                f"{', '.join(ROW_RULES)}: add it there, in the place that RowRules in csrc/rows.h gives it"
            )
        return OnDevice(
            rule=ROW_RULES.index(name),
            decay=DECAYS.index(rule.decay(h)),
            maximize=bool(h.maximize),
            slow=rule.slow is not None,
            weight_decay=_number("weight_decay", h.weight_decay),
            alpha=_number("alpha", rule.alpha(h)),
            period=_number("k", rule.period(h)),
            hyper=tuple(x if isinstance(x, Tensor) else _number(key, x) for key, x in hyper.items()),
            chains=tuple(-1 if chain is None else self._index(chain) for chain in self.chains),
        )


def _number(key: str, x: Any) -> float:
    """A float. What is no number, such as a string of one, is a TypeError, as in torch."""
    try:
        number: float = 1.0 * x
    except TypeError:
        raise TypeError(f"a group's {key} is {x!r}; a number, or a tensor with one element, is expected") from None
    return number


def _check_numbers(rule: Rule, h: Hyper) -> None:
    """As compiled code does when it is handed them; here for backends that would notice in the midst of a step."""
    _, hyper = rule.twin(h) or ("", {})
    for key, x in {"weight_decay": h.weight_decay, **hyper}.items():
        if not isinstance(x, Tensor):
            _number(key, x)


def _decay_row(stage: Stage | None, h: Hyper) -> tuple[Number, ...]:
    if stage is None:
        return ()
    if stage is stages.l2:
        return (h.weight_decay,)
    return (select(h.weight_decay != 0, lambda: 1 - h.lr * h.weight_decay, 1.0),)  # lr may be infinite


def _is(condition: Condition, value: bool) -> Condition:
    """Whether the condition has this value."""
    if isinstance(condition, Symbol):
        return condition if value else ~condition
    return condition == value


def _both(a: Symbol, b: Condition) -> Symbol | None:
    """Where both hold; None if b is known not to."""
    if isinstance(b, Symbol):
        return a.both(b)
    return a if b else None


@cache
def _chain(sequence: tuple[Stage, ...]) -> Chain:
    return Chain(sequence)


def chain_named(name: str) -> Chain:
    """The chain of stages whose names, joined by a plus, are this."""
    return _chain(tuple(getattr(stages, part) for part in name.split("+")))


PULL = _chain((stages.lookahead,))
"""What happens to a parameter without a gradient when the slow weights synchronise."""


class Settings:
    """Makes settings from parameter groups, one for each distinct set of values."""

    def __init__(
        self,
        rule: Rule,
        chain_index: Callable[[Chain], int] = lambda chain: -1,
        flags: Collection[str] = (),
        checked: bool = False,
    ) -> None:
        """`flags`: which of `FLAGS` the optimizer's groups have. `checked`: whether steps will be taken with them."""
        self._checked = checked
        self.rule, self._index = rule, chain_index
        self.keys = tuple(dict.fromkeys((*rule.hyper, *FLAGS)))
        self._needed = {*rule.hyper, *flags}
        self._known: dict[tuple[Any, ...], Setting] = {}
        self._written: dict[Any, list[Written]] = {}
        self.room = 1024
        """How many are remembered; more than there are groups, or each look would make them all anew."""

    def of(self, group: Mapping[str, Any]) -> Setting:
        given = {key: group[key] if key in self._needed else group.get(key) for key in self.keys}  # KeyError, as torch
        values = tuple(_value(key, value, group) for key, value in given.items())
        setting = self._known.get(values)
        if setting is None:
            if len(self._known) > self.room:  # a schedule that never repeats a value must not grow this for ever
                self._known.clear()
            h = self._hyper(values)
            if self._checked:
                self.rule.check(h)
                _check_numbers(self.rule, h)
            setting = self._known[values] = Setting(self.rule, h, self._index, self._written)
        return setting

    def _hyper(self, values: tuple[Any, ...]) -> Hyper:
        h = SimpleNamespace(**dict(zip(self.keys, map(_released, values), strict=True)))
        if "betas" in self.keys:
            h.beta1, h.beta2 = h.betas
        h.weight_decay = h.weight_decay or 0
        return h


class _Held:
    """A tensor compared by identity: its value is read where it lives, when it is needed."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held) and self.tensor is other.tensor

    def __hash__(self) -> int:
        return id(self.tensor)


def stays(tensor: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether a hyper-parameter stays on its device: it must not be waited for in a group whose steps live there."""
    on_device = bool(group.get("capturable") or group.get("fused"))
    return on_device and tensor.device.type != "cpu" and tensor.dtype in (torch.float32, torch.float64)


_PLAIN = frozenset((float, int, bool, type(None)))
_MINUS_ZERO = object()
"""Stands for -0.0, which equals 0.0 and is another number."""


def _value(key: str, value: Any, group: Mapping[str, Any]) -> Any:
    """What can be compared by value: tensors as Python numbers unless they stay on a device, and lists as tuples."""
    if type(value) in _PLAIN:
        return _MINUS_ZERO if value == 0 and math.copysign(1, value) < 0 else value
    if isinstance(value, Tensor) and value.numel() == 1:
        return _Held(value) if key in SYMBOLIC and stays(value, group) else _value(key, value.item(), group)
    if getattr(value, "size", None) == 1 and hasattr(value, "item"):  # numpy's, an array of one number too
        return _value(key, value.item(), group)
    if hasattr(value, "tolist"):  # betas as one tensor or array
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return tuple(_value(key, item, group) for item in value)
    return value


def _released(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_released, value))
    if value is _MINUS_ZERO:
        return -0.0
    return value.tensor if isinstance(value, _Held) else value


_layouts: dict[tuple[Any, ...], tuple[Any, ...]] = {}


def _shared(layout: tuple[Any, ...]) -> tuple[Any, ...]:
    return _layouts.setdefault(layout, layout)
