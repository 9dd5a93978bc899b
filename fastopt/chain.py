"""Stages and chains: how an update rule is written once and run by every Python backend.

A *stage* is a pure function on values, ``(p, g, *state, *coefficients) -> (p, g, *state)``. Its body may use `+ - *`
and the handful of functions reached through the global name ``tl``; nothing else, so that the arithmetic is the same
IEEE arithmetic wherever it runs. What ``tl`` means is decided by the backend: `bind` copies a stage with ``tl``
rebound, to a few torch functions for the reference backend and to ``triton.language`` for Triton.

A *chain* is a tuple of stages applied one after the other to the same element: the whole update of a parameter.
"""

from __future__ import annotations

import inspect
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from types import FunctionType
from typing import Any


class _Unbound:
    """Stands where a backend's language goes, so that a stage that was not bound says so."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"tl.{name} was called on an unbound stage: backends bind stages (fastopt.chain.bind)")


tl: Any = _Unbound()


@dataclass(frozen=True, eq=False)
class Stage:
    """One update rule on values: its function, the names of its state and of its coefficients."""

    function: Callable[..., Any]
    state: tuple[str, ...]
    coefficients: tuple[str, ...]
    row: Callable[..., tuple[float, ...]] = field(repr=False)
    """Builds this stage's coefficients by name: ``adam.row(w1=..., beta2=..., ...)``."""

    @property
    def name(self) -> str:
        return self.function.__name__


def stage(state: str = "") -> Callable[[Callable[..., Any]], Stage]:
    """Declare a stage; `state` names the arguments after ``p, g`` that live in optimizer state, the rest is the row."""

    def declare(function: Callable[..., Any]) -> Stage:
        p, g, *names = inspect.signature(function).parameters
        slots = tuple(state.split())
        assert (p, g, *names[: len(slots)]) == ("p", "g", *slots), f"{function.__name__}(p, g, {state}, ...)"
        coefficients = tuple(names[len(slots) :])
        row = namedtuple(f"{function.__name__}_row", coefficients)  # type: ignore[misc]  # noqa: PYI024 names known at run time
        return Stage(function, slots, coefficients, row)

    return declare


@dataclass(frozen=True)
class Chain:
    """Stages applied in order to each element; state and coefficients are theirs, concatenated."""

    stages: tuple[Stage, ...]

    @cached_property
    def name(self) -> str:
        return "+".join(stage.name for stage in self.stages)

    @cached_property
    def state(self) -> tuple[str, ...]:
        return tuple(name for stage in self.stages for name in stage.state)

    @cached_property
    def coefficients(self) -> tuple[str, ...]:
        return tuple(f"{stage.name}.{name}" for stage in self.stages for name in stage.coefficients)

    def __hash__(self) -> int:
        return hash(self.stages)


def bind(
    function: Callable[..., Any],
    language: Any,
    cache: dict[str, Any] | None = None,
    wrap: Callable[[FunctionType], Any] = lambda copy: copy,
) -> Any:
    """Copy `function`, and the helpers it calls from its own module, with the global ``tl`` meaning `language`.

    `wrap` is applied to every copy, helpers first.
    """
    assert isinstance(function, FunctionType)
    cache = {} if cache is None else cache
    names: dict[str, Any] = {"tl": language, "__builtins__": __builtins__, "__name__": function.__module__}
    for name in function.__code__.co_names:
        helper = function.__globals__.get(name)
        if isinstance(helper, FunctionType) and helper.__module__ == function.__module__:
            if name not in cache:
                cache[name] = bind(helper, language, cache, wrap)
            names[name] = cache[name]
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__annotations__ = function.__annotations__
    return wrap(copy)
