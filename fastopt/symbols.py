"""Formulas written down instead of computed: how a rule's coefficients become the text of a kernel.

Where steps are counted on a device, nobody else knows the step. A rule's formulas are then called with symbols, which
answer arithmetic by noting it on their `Tape`, one line for each operation and none twice; a backend compiles the lines
(backends/triton/rows.py). What a line may say is `+ - * /`, comparisons, ``&``, and calls of `FUNCTIONS`; everything is
float64 or a truth value.

Hyper-parameters become symbols too, so that their values are not part of the text. They still decide which formulas
are called: a symbol that stands for a number the host knows can be asked, as in ``if h.momentum == 0``.
"""

from __future__ import annotations

import math
import operator
import re
import struct
from collections.abc import Callable, Iterable
from operator import attrgetter
from types import SimpleNamespace
from typing import Any, TypeAlias

from torch import Tensor

FUNCTIONS = ("number", "power", "root", "remainder", "to_single", "select", "opposite")
"""number(x): a constant | power(a, b) | root(x), correctly rounded | remainder(a, b), with b's sign as Python's |
to_single(x): rounded to float32 | select(condition, a, b) | opposite(condition)"""

HYPER = "h_"
"""How the names of inputs begin that are hyper-parameters."""

Value: TypeAlias = "Callable[[Any], Any] | None"
"""What a symbol is worth to the host, from the hyper-parameters; None: only the device knows."""


class Symbol:
    """A number or a truth value that a kernel will compute, by its name on a tape."""

    def __init__(self, tape: Tape, name: str, value: Value = None) -> None:
        self.tape, self.name, self.value = tape, name, value

    def __bool__(self) -> bool:
        return bool(self._decided(bool))

    def __float__(self) -> float:
        """The value becomes part of the text: another value is another kernel. So do not ask for what changes."""
        return self._decided(float)

    def __int__(self) -> int:
        return int(self._decided(int))

    __index__ = __int__

    def _decided(self, kind: Callable[[Any], float]) -> float:
        if self.value is None:
            raise TypeError(
                f"`{self.tape.lines.get(self.name, self.name)}` is not known to the host, which must not wait for the "
                "device: write the formula with arithmetic, `select` and `flag` (fastopt/rule.py)"
            )
        value = self.value
        result = kind(value(self.tape.h))
        self.tape.decisions.append((lambda h: kind(value(h)), result))
        return result

    def _infix(self, sign: str, other: Any, function: Callable[[Any, Any], Any], swap: bool = False) -> Symbol:
        a, b = (other, self) if swap else (self, other)
        return self.tape.note(f"{self.tape.name(a)} {sign} {self.tape.name(b)}", _applied(function, a, b))

    def __add__(self, other: Any) -> Symbol:
        return self._infix("+", other, operator.add)

    def __radd__(self, other: Any) -> Symbol:
        return self._infix("+", other, operator.add, swap=True)

    def __sub__(self, other: Any) -> Symbol:
        return self._infix("-", other, operator.sub)

    def __rsub__(self, other: Any) -> Symbol:
        return self._infix("-", other, operator.sub, swap=True)

    def __mul__(self, other: Any) -> Symbol:
        return self._infix("*", other, operator.mul)

    def __rmul__(self, other: Any) -> Symbol:
        return self._infix("*", other, operator.mul, swap=True)

    def __truediv__(self, other: Any) -> Symbol:
        return self._infix("/", other, operator.truediv)

    def __rtruediv__(self, other: Any) -> Symbol:
        return self._infix("/", other, operator.truediv, swap=True)

    def __neg__(self) -> Symbol:
        return self * -1.0  # 0 - x, which some languages mean by -x, has another zero

    def __abs__(self) -> Symbol:
        return (self < 0).select(-self, self)

    def __pow__(self, other: Any) -> Symbol:
        if isinstance(other, float) and other == 0.5:
            return self.tape.call("root", self, function=lambda x: x**0.5)
        return self.tape.call("power", self, other, function=operator.pow)

    def __rpow__(self, other: Any) -> Symbol:
        return self.tape.call("power", other, self, function=operator.pow)

    def __mod__(self, other: Any) -> Symbol:
        return self.tape.call("remainder", self, other, function=operator.mod)

    def __lt__(self, other: Any) -> Symbol:
        return self._infix("<", other, operator.lt)

    def __le__(self, other: Any) -> Symbol:
        return self._infix("<=", other, operator.le)

    def __gt__(self, other: Any) -> Symbol:
        return self._infix(">", other, operator.gt)

    def __ge__(self, other: Any) -> Symbol:
        return self._infix(">=", other, operator.ge)

    def __eq__(self, other: object) -> Symbol:  # type: ignore[override]
        return self._infix("==", other, operator.eq)

    def __ne__(self, other: object) -> Symbol:  # type: ignore[override]
        return self._infix("!=", other, operator.ne)

    __hash__ = None  # type: ignore[assignment]

    def __and__(self, other: Symbol | bool) -> Symbol | bool:
        if isinstance(other, Symbol):
            return self.both(other)
        return self if other else False

    __rand__ = __and__

    def __or__(self, other: Symbol | bool) -> Symbol | bool:
        if isinstance(other, Symbol):
            return ~(~self).both(~other)
        return True if other else self

    __ror__ = __or__

    def __invert__(self) -> Symbol:
        return self.tape.call("opposite", self, function=operator.not_)

    def both(self, other: Symbol) -> Symbol:
        return self._infix("&", other, operator.and_)

    def select(self, a: Any, b: Any) -> Symbol:
        """a where this holds, b elsewhere."""
        return self.tape.call("select", self, a, b, function=lambda condition, x, y: x if condition else y)

    def to_single(self) -> Symbol:
        return self.tape.call("to_single", self, function=lambda x: struct.unpack("f", struct.pack("f", x))[0])


def _applied(function: Callable[..., Any], *arguments: Any) -> Value:
    """The value of a function of symbols and numbers."""
    values = [a.value if isinstance(a, Symbol) else _constant(a) for a in arguments]
    known = [value for value in values if value is not None]
    return None if len(known) < len(values) else lambda h: function(*(value(h) for value in known))


def _constant(x: Any) -> Callable[[Any], Any]:
    return lambda h: x


class Tape:
    """The lines that symbols have noted, by the name of what each one computes."""

    def __init__(self, h: Any) -> None:
        self.h = h
        self.lines: dict[str, str] = {}
        self.decisions: list[tuple[Callable[[Any], Any], Any]] = []
        """What the host was asked about hyper-parameters, and what it said: for others that say the same, the lines
        are the same."""
        self._symbols: dict[str, Symbol] = {}
        self._leaves: list[str] = []

    def leaf(self, name: str, value: Value = None) -> Symbol:
        """An input."""
        self._leaves.append(name)
        return Symbol(self, name, value)

    def hyper(self) -> SimpleNamespace:
        """The hyper-parameters with leaves, named after them, for numbers and tensors."""
        own = vars(self.h)
        symbols = {
            k: self.leaf(f"{HYPER}{k}", None if isinstance(v, Tensor) else attrgetter(k))
            for k, v in own.items()
            if is_number(v)
        }
        rest = {k: v for k, v in own.items() if k not in symbols}
        if "betas" in rest:
            rest["betas"] = symbols["beta1"], symbols["beta2"]
        return SimpleNamespace(**symbols, **rest)

    def note(self, text: str, value: Value = None) -> Symbol:
        symbol = self._symbols.get(text)
        if symbol is None:
            symbol = self._symbols[text] = Symbol(self, f"x{len(self.lines)}", value)
            self.lines[symbol.name] = text
        return symbol

    def call(self, name: str, *arguments: Any, function: Callable[..., Any] | None = None) -> Symbol:
        value = _applied(function, *arguments) if function else None
        return self.note(f"{name}({', '.join(map(self.name, arguments))})", value)

    def needed(self, outputs: Iterable[str]) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
        """The inputs and the lines that these outputs need."""
        wanted = {word for output in outputs for word in _WORD.findall(output)}
        lines = []
        for name, text in reversed(self.lines.items()):
            if name in wanted:
                wanted.update(_WORD.findall(text))
                lines.append((name, text))
        return tuple(name for name in self._leaves if name in wanted), tuple(reversed(lines))

    @staticmethod
    def name(value: Any) -> str:
        """What stands for a symbol, or for a number of the host, in a line."""
        if isinstance(value, Symbol):
            return value.name
        number = float(value)
        return f"number({number!r})" if math.isfinite(number) else f"number(float('{number}'))"


_WORD = re.compile(r"[A-Za-z_]\w*")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float, Tensor)) and not isinstance(value, bool)
