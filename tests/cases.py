"""The one table of optimizers x variants that the tests enumerate, and how it becomes pytest parameters.

A case is a public name and constructor arguments; it builds the fastopt optimizer, the oracle that defines its numbers
and the float64 textbook form. `parametrize()` gives ids such as `radam-decoupled-bf16-native` and skips a backend that
is unavailable.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import oracles
import pytest
import torch

import fastopt

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
BACKENDS = tuple(os.environ.get("FASTOPT_TEST_BACKENDS", "native reference emulated").split())
TORCH_NAMES = ("SGD", "RMSprop", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam")


@dataclass(frozen=True)
class Case:
    """One optimizer with one set of options. `lookahead` = (k, alpha) wraps it."""

    id: str
    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    lookahead: tuple[int, float] | None = None

    @property
    def interpolates_fully(self) -> bool:
        """Whether torch's lerp gets the weight 1, where its vector body and its tail disagree on signs of zeros."""
        alpha = self.lookahead[1] if self.lookahead else self.kwargs.get("alpha") if self.name == "Ranger" else None
        averages = self.name == "RMSprop" and self.kwargs.get("alpha") == 0  # the gradient, where a group is centered
        return alpha == 1 or self.kwargs.get("betas", (0.9,))[0] == 0 or averages

    def make(self, groups: Any, backend: str | None = None, **overrides: Any) -> Any:
        inner = getattr(fastopt, self.name)(groups, **{**self.kwargs, **overrides}, backend=backend)
        return fastopt.Lookahead(inner, *self.lookahead) if self.lookahead else inner

    def make_torch(self, groups: Any, **overrides: Any) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.name)(groups, **{**self.kwargs, **overrides})

    def oracle(self, groups: Any) -> Any:
        """The optimizer that computes the defined value; parameters must be contiguous fp32 or fp64."""
        if self.name == "Ranger":
            inner = oracles.Ranger(groups, **self.kwargs)
        else:
            inner = oracles.TorchLoop(self.name, groups, **self.kwargs)
        return oracles.Lookahead(inner, *self.lookahead) if self.lookahead else inner

    def low_precision_oracle(self, groups: Any) -> Any:
        """The same for bf16 and fp16 parameters: one pass, one rounding. Ranger inside Lookahead takes two passes."""
        if self.name == "Ranger" and self.lookahead:
            inner = oracles.LowPrecision(lambda shadows: oracles.Ranger(shadows, **self.kwargs), groups)
            return oracles.Lookahead(inner, *self.lookahead)
        return oracles.LowPrecision(self.oracle, groups)

    def textbook(self) -> oracles.Textbook:
        cls = oracles.Ranger if self.name == "Ranger" else getattr(torch.optim, self.name)
        defaults = {
            k: p.default
            for k, p in inspect.signature(cls).parameters.items()
            if p.default is not inspect.Parameter.empty
        }
        return oracles.Textbook(self.name, {**defaults, **self.kwargs}, self.lookahead)


def _variants(name: str, lr: float, /, **variants: dict[str, Any]) -> list[Case]:
    stem = name.lower()
    plain = Case(stem, name, {"lr": lr})
    return [plain, *(Case(f"{stem}-{v.replace('_', '-')}", name, {"lr": lr, **kw}) for v, kw in variants.items())]


_BETAS = {"betas0": {"betas": (0.0, 0.0)}, "betas03": {"betas": (0.3, 0.3)}, "betas05": {"betas": (0.5, 0.5)}}

PLAIN = [
    *_variants(
        "SGD",
        0.1,
        coupled={"weight_decay": 0.03},
        momentum={"momentum": 0.9},
        dampening={"momentum": 0.9, "dampening": 0.3},
        nesterov={"momentum": 0.8, "nesterov": True},
        maximize={"maximize": True},
        everything={"momentum": 0.9, "nesterov": True, "weight_decay": 0.03, "maximize": True},
    ),
    *_variants(
        "RMSprop",
        0.01,
        coupled={"weight_decay": 0.03},
        momentum={"momentum": 0.9},
        centered={"centered": True},
        alpha0={"alpha": 0.0},
        alpha03={"alpha": 0.3, "centered": True},
        maximize={"maximize": True},
        everything={"momentum": 0.7, "centered": True, "weight_decay": 0.03, "maximize": True, "eps": 1e-3},
    ),
    *_variants(
        "Adagrad",
        0.05,
        coupled={"weight_decay": 0.03},
        lr_decay={"lr_decay": 0.1},
        initial={"initial_accumulator_value": 0.1},
        maximize={"maximize": True},
        everything={"lr_decay": 0.1, "weight_decay": 0.03, "initial_accumulator_value": 0.3, "maximize": True},
    ),
    *_variants(
        "Adam",
        0.01,
        coupled={"weight_decay": 0.03},
        decoupled={"weight_decay": 0.03, "decoupled_weight_decay": True},
        amsgrad={"amsgrad": True},
        eps={"eps": 0.1},
        maximize={"maximize": True},
        everything={"amsgrad": True, "weight_decay": 0.03, "maximize": True, "betas": (0.4, 0.99)},
        **_BETAS,
    ),
    *_variants(
        "AdamW",
        0.01,
        nodecay={"weight_decay": 0.0},
        amsgrad={"amsgrad": True, "weight_decay": 0.1},
        maximize={"maximize": True},
    ),
    *_variants("Adamax", 0.01, coupled={"weight_decay": 0.03}, maximize={"maximize": True}, **_BETAS),
    *_variants(
        "NAdam",
        0.01,
        coupled={"weight_decay": 0.03},
        decoupled={"weight_decay": 0.03, "decoupled_weight_decay": True},
        psi0={"momentum_decay": 0.0},
        psi2={"momentum_decay": 0.2},
        maximize={"maximize": True, "weight_decay": 0.03},
        **_BETAS,
    ),
    *_variants(
        "RAdam",
        0.01,
        coupled={"weight_decay": 0.03},
        decoupled={"weight_decay": 0.03, "decoupled_weight_decay": True},
        eps={"eps": 1e-3},
        maximize={"maximize": True, "weight_decay": 0.03},
        beta2_07={"betas": (0.9, 0.7)},
        **_BETAS,
    ),
    *_variants(
        "Ranger",
        0.01,
        decay={"weight_decay": 0.03},
        nogc={"use_gc": False},
        convgc={"gc_conv_only": True},
        threshold4={"n_sma_threshold": 4},
        undegenerate={"degenerated_to_sgd": False},
        maximize={"maximize": True, "weight_decay": 0.03},
        k1={"k": 1},
        alpha0={"alpha": 0.0, "k": 3},
        alpha1={"alpha": 1.0, "k": 3},
        alpha03={"alpha": 0.3, "k": 2, "betas": (0.3, 0.99)},
    ),
]

WRAPPED = [
    Case("lookahead-sgd", "SGD", {"lr": 0.1}, (3, 0.5)),
    Case("lookahead-sgd-nesterov", "SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}, (2, 0.8)),
    Case("lookahead-rmsprop", "RMSprop", {"lr": 0.01, "centered": True, "momentum": 0.9}, (3, 0.3)),
    Case("lookahead-adagrad", "Adagrad", {"lr": 0.05}, (4, 0.5)),
    Case("lookahead-adam", "Adam", {"lr": 0.01}, (5, 0.5)),
    Case("lookahead-adam-amsgrad", "Adam", {"lr": 0.01, "amsgrad": True, "weight_decay": 0.03}, (3, 0.5)),
    Case("lookahead-adamw", "AdamW", {"lr": 0.01}, (1, 0.4)),
    Case("lookahead-adamax", "Adamax", {"lr": 0.01}, (3, 0.0)),
    Case("lookahead-nadam", "NAdam", {"lr": 0.01}, (2, 0.6)),
    Case("lookahead-radam", "RAdam", {"lr": 0.01}, (4, 1.0)),
    Case("lookahead-ranger", "Ranger", {"lr": 0.01, "k": 3}, (2, 0.7)),
]

CASES = PLAIN + WRAPPED
TORCH_CASES = [c for c in PLAIN if c.name in TORCH_NAMES]


def by_id(*ids: str) -> list[Case]:
    """The cases with these ids."""
    index = {c.id: c for c in CASES}
    return [index[i] for i in ids]


@functools.cache
def one_for_each_kernel() -> list[Case]:
    """The first of the cases that take the same chains: the others give the same kernels other coefficients."""
    found: dict[Any, Case] = {}
    for case in CASES:
        optimizer = case.make([torch.zeros(2)])
        setting = optimizer.engine().settings.of(optimizer.param_groups[0])  # type: ignore[attr-defined]
        found.setdefault(tuple(setting.chains), case)
    return list(found.values())


def backends(names: Iterable[str] = BACKENDS) -> list[Any]:
    """The backends as pytest parameters; an unavailable one is skipped with the reason it gives itself."""
    return [pytest.param(b, id=b, marks=_unless_available(b)) for b in names]


def _unless_available(backend: str) -> list[Any]:
    reason = fastopt.backends.why_not(backend)
    return [pytest.mark.skip(reason=f"{backend}: {reason}")] if reason else []


def parametrize(
    cases: Iterable[Case] = CASES, dtypes: Iterable[str] = ("fp32", "fp64"), names: Iterable[str] = BACKENDS
) -> Callable[[Any], Any]:
    """Parametrise a test over case, dtype and backend: ids read `radam-decoupled-bf16-native`."""
    rows = [
        pytest.param(case, DTYPES[d], b, id=f"{case.id}-{d}-{b}", marks=_unless_available(b))
        for case in cases
        for d in dtypes
        for b in names
    ]
    return pytest.mark.parametrize(("case", "dtype", "backend"), rows)


def parametrize_cases(cases: Iterable[Case] = CASES) -> Callable[[Any], Any]:
    """Parametrise a test over cases alone."""
    return pytest.mark.parametrize("case", [pytest.param(c, id=c.id) for c in cases])


each_name = pytest.mark.parametrize("name", TORCH_NAMES)
each_backend = pytest.mark.parametrize("backend", backends())


def both(name: str) -> tuple[Any, Any]:
    """Our class and torch's."""
    return getattr(fastopt, name), getattr(torch.optim, name)


def accepts(name: str, *options: str) -> bool:
    """Whether torch's constructor of this name has all of these options."""
    return set(options) <= set(inspect.signature(getattr(torch.optim, name)).parameters)
