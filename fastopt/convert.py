"""Turning a live optimizer into one of ours, or handing its parameters over to another rule."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar, overload

import torch
from torch.optim import Optimizer

from fastopt.optimizers.adagrad import Adagrad
from fastopt.optimizers.adam import Adam, AdamW
from fastopt.optimizers.adamax import Adamax
from fastopt.optimizers.base import Fused
from fastopt.optimizers.lookahead import Lookahead
from fastopt.optimizers.nadam import NAdam
from fastopt.optimizers.radam import RAdam
from fastopt.optimizers.rmsprop import RMSprop
from fastopt.optimizers.sgd import SGD

_TWINS: dict[type[Optimizer], type[Fused]] = {
    torch.optim.SGD: SGD,
    torch.optim.RMSprop: RMSprop,
    torch.optim.Adagrad: Adagrad,
    torch.optim.Adam: Adam,
    torch.optim.AdamW: AdamW,
    torch.optim.Adamax: Adamax,
    torch.optim.NAdam: NAdam,
    torch.optim.RAdam: RAdam,
}

# What means the same under every rule and belongs to the parameters rather than to the rule: which of them decay.
_SHARED = ("params", "param_names", "weight_decay", "maximize")

AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)


@overload
def convert(optimizer: Optimizer, cls: None = None, **overrides: Any) -> Optimizer: ...
@overload
def convert(optimizer: Optimizer, cls: type[AnyOptimizer], **overrides: Any) -> AnyOptimizer: ...
def convert(optimizer: Optimizer, cls: type[Optimizer] | None = None, **overrides: Any) -> Optimizer:
    """Turn a live optimizer into one of ours, or hand its parameters over to another rule.

    Without `cls`, the class of the same name takes over mid-run: parameters, groups, every hyper-parameter and the
    state, whose tensors are shared and not copied. Drop the old optimizer, and attach schedulers to the new one.

    With `cls`, a new optimizer of that class starts on the same parameter groups. Weight decay and ``maximize`` of each
    group are kept, everything else (the learning rate above all) means something different under another rule and
    comes from `overrides` or the defaults of `cls`; state starts afresh.

    Args:
        optimizer: The optimizer to convert, from torch.optim or ours.
        cls: The class to hand over to; None for the class of the same name.
        **overrides: Hyper-parameters for all groups, such as ``lr``; and ``backend``.

    Returns:
        The new optimizer. `optimizer` itself when it is one of ours already and nothing is asked for.

    Raises:
        TypeError: There is no class of that name here, or `cls` does not know a hyper-parameter.

    Example:
        >>> import torch, fastopt
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = fastopt.convert(torch.optim.Adam(model.parameters(), lr=1e-3))
        >>> optimizer = fastopt.convert(optimizer, fastopt.SGD, lr=0.1, momentum=0.9)
    """
    if cls is None and isinstance(optimizer, (Fused, Lookahead)) and not overrides:
        return optimizer
    if cls is None and isinstance(optimizer, Lookahead):
        raise TypeError("a Lookahead has no hyper-parameters to override here: edit its param_groups")
    if cls is not None and issubclass(cls, Lookahead):
        raise TypeError("Lookahead wraps an optimizer instead of replacing it: fastopt.Lookahead(optimizer)")
    same_rule = cls is None or cls is type(optimizer) or cls is twin(optimizer)
    cls = cls or twin(optimizer)
    if cls is None:
        known = ", ".join(sorted(twin.__name__ for twin in _TWINS))
        raise TypeError(
            f"{type(optimizer).__name__} has no counterpart in fastopt; accepted are torch.optim's {known}. To go on "
            "with another rule, name it: fastopt.convert(optimizer, fastopt.Adam, lr=...)"
        )
    accepted = set(inspect.signature(cls).parameters)
    if unknown := sorted(set(overrides) - accepted):
        raise TypeError(
            f"{cls.__name__} has no hyper-parameter {', '.join(unknown)}; it has {', '.join(sorted(accepted))}"
        )
    kept = (
        {key for group in optimizer.param_groups for key in group}
        if same_rule
        else set(_SHARED) & (accepted | {"param_names"})
    )
    groups = [
        {key: value for key, value in group.items() if key in kept and key not in overrides}
        for group in optimizer.param_groups
    ]
    base = optimizer.defaults if same_rule else {}
    defaults = {key: value for key, value in base.items() if key in accepted}
    converted: Any = cls([_with_names(group) for group in groups], **(defaults | overrides))
    if same_rule:
        for p, state in optimizer.state.items():
            converted.state[p] = dict(state)
    return converted  # type: ignore[no-any-return]


def twin(optimizer: Optimizer) -> type[Fused] | None:
    """Our class for an optimizer, its own if it is one of ours."""
    if isinstance(optimizer, Fused):
        return type(optimizer)
    return next((_TWINS[base] for base in type(optimizer).__mro__ if base in _TWINS), None)


def _with_names(group: dict[str, Any]) -> dict[str, Any]:
    """Named parameters in the form that constructors accept."""
    group = dict(group, params=list(group["params"]))
    names = group.pop("param_names", None)
    if names is not None:
        group["params"] = list(zip(names, group["params"], strict=True))
    return group
