"""Who races: a label and a factory from parameter groups to an optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from bench import peers

OURS = "fastopt"
NOISE_LABELS = ("torch fused", "torch fused again")


@dataclass(frozen=True)
class Contender:
    label: str
    make: Callable[[list[dict[str, Any]]], Any]


def ours(rule: str, hyper: Mapping[str, Any], label: str = OURS, backend: str = "native") -> Contender:
    """fastopt on the kernels named; raises with the reason where they are missing, so nothing else is timed."""
    import fastopt

    if rule == "Lookahead":
        slow, adam = peers.split(hyper)
        return Contender(label, lambda groups: fastopt.Lookahead(fastopt.Adam(groups, backend=backend, **adam), **slow))
    return Contender(label, lambda groups: getattr(fastopt, rule)(groups, backend=backend, **hyper))


def public_rules() -> list[str]:
    """Every optimizer fastopt exports that is constructed from parameters; Lookahead takes an optimizer."""
    import fastopt

    exported = {name: getattr(fastopt, name) for name in fastopt.__all__}
    rules = [name for name, value in exported.items() if isinstance(value, type) and issubclass(value, Optimizer)]
    return [name for name in rules if name != "Lookahead"]


def rivals(family: str, rule: str, hyper: Mapping[str, Any]) -> list[Contender]:
    """`fused`: torch's fused step. `torch`: its for-loop and foreach steps. `fast`: its fused and foreach steps, those
    that it has. `peers`: other packages. `everyone`: all of these. `same`: one contender twice, for the noise.
    `compiled`: torch's foreach step as torch.compile makes it. `none`: nobody else does this work."""
    families: dict[str, Callable[[], list[Contender]]] = {
        "fused": lambda: [_torch(rule, "torch fused", hyper, fused=True)],
        "torch": lambda: [*_looped(rule, hyper), *_foreach(rule, hyper)],
        "fast": lambda: [*_fused(rule, hyper), *_foreach(rule, hyper)],
        "peers": lambda: [Contender(label, make) for label, make in peers.of(rule, hyper).items()],
        "everyone": lambda: [*_fused(rule, hyper), *rivals("torch", rule, hyper), *rivals("peers", rule, hyper)],
        "same": lambda: [_torch(rule, label, hyper, fused=True) for label in NOISE_LABELS],
        "compiled": lambda: [*_fused(rule, hyper), _compiled(_torch(rule, "torch.compile", hyper, foreach=True))],
        "none": list,
    }
    if family not in families:
        raise ValueError(f"no family of rivals named {family!r}: use {', '.join(map(repr, families))}")
    return families[family]()


def _looped(rule: str, hyper: Mapping[str, Any]) -> list[Contender]:
    return [_torch(rule, "torch for-loop", hyper, foreach=False)] if hasattr(torch.optim, rule) else []


def _foreach(rule: str, hyper: Mapping[str, Any]) -> list[Contender]:
    return [_torch(rule, "torch foreach", hyper, foreach=True)] if hasattr(torch.optim, rule) else []


def _fused(rule: str, hyper: Mapping[str, Any]) -> list[Contender]:
    return [_torch(rule, "torch fused", hyper, fused=True)] if _has_fused(rule) else []


def _has_fused(rule: str) -> bool:
    cls = getattr(torch.optim, rule, None)
    return cls is not None and "fused" in inspect.signature(cls).parameters


class _Compiled:
    """An optimizer whose step torch.compile has taken apart and put together again."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.state, self.param_groups = optimizer.state, optimizer.param_groups
        self.step = torch.compile(lambda: optimizer.step(), fullgraph=False)


def _compiled(contender: Contender) -> Contender:
    return Contender(contender.label, lambda groups: _Compiled(contender.make(groups)))


def _torch(rule: str, label: str, hyper: Mapping[str, Any], **implementation: bool) -> Contender:
    cls = getattr(torch.optim, rule)
    missing = implementation.keys() - inspect.signature(cls).parameters.keys()
    if missing:
        raise ValueError(
            f"torch.optim.{rule} has no {', '.join(sorted(missing))} implementation: choose another family of rivals"
        )
    return Contender(label, lambda groups: cls(groups, **{**hyper, **implementation}))
