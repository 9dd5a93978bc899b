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
    make: Callable[[list[dict[str, Any]]], Optimizer]


def ours(rule: str, hyper: Mapping[str, Any], label: str = OURS) -> Contender:
    """fastopt on its native kernels; raises with the reason where they are missing, so nothing else is timed."""
    import fastopt

    return Contender(label, lambda groups: getattr(fastopt, rule)(groups, backend="native", **hyper))


def public_rules() -> list[str]:
    """Every optimizer fastopt exports that is constructed from parameters; Lookahead takes an optimizer."""
    import fastopt

    exported = {name: getattr(fastopt, name) for name in fastopt.__all__}
    rules = [name for name, value in exported.items() if isinstance(value, type) and issubclass(value, Optimizer)]
    return [name for name in rules if name != "Lookahead"]


def rivals(family: str, rule: str, hyper: Mapping[str, Any]) -> list[Contender]:
    """`fused`: torch's fused step. `torch`: its for-loop and foreach steps. `peers`: other packages. `same`: one
    contender twice, for the noise."""
    if family == "fused":
        return [_torch(rule, "torch fused", hyper, fused=True)]
    if family == "torch":
        return [
            _torch(rule, "torch for-loop", hyper, foreach=False),
            _torch(rule, "torch foreach", hyper, foreach=True),
        ]
    if family == "peers":
        return [Contender(label, make) for label, make in peers.rangers(hyper).items()]
    if family == "same":
        return [_torch(rule, label, hyper, fused=True) for label in NOISE_LABELS]
    raise ValueError(f"no family of rivals named {family!r}: use 'fused', 'torch', 'peers' or 'same'")


def _torch(rule: str, label: str, hyper: Mapping[str, Any], **implementation: bool) -> Contender:
    cls = getattr(torch.optim, rule)
    missing = implementation.keys() - inspect.signature(cls).parameters.keys()
    if missing:
        raise ValueError(
            f"torch.optim.{rule} has no {', '.join(sorted(missing))} implementation: choose another family of rivals"
        )
    return Contender(label, lambda groups: cls(groups, **implementation, **hyper))
