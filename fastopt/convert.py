"""Turning a live optimizer into one of ours, or handing its parameters over to another rule."""

from __future__ import annotations

import inspect
import warnings
from typing import Any, TypeVar, overload

import torch
from torch.optim import Optimizer

from fastopt.optimizers.adagrad import Adagrad
from fastopt.optimizers.adam import Adam, AdamW
from fastopt.optimizers.adamax import Adamax
from fastopt.optimizers.base import Fused
from fastopt.optimizers.lookahead import ALPHA, STEP, K, Lookahead
from fastopt.optimizers.nadam import NAdam
from fastopt.optimizers.radam import RAdam
from fastopt.optimizers.ranger import Ranger
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
_DECOUPLED = "decoupled_weight_decay"
# What schedulers and Lookahead put into groups for themselves.
_FLEETING = {"initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum", K, ALPHA, STEP}

AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)


@overload
def convert(optimizer: Optimizer, cls: None = None, **overrides: Any) -> Optimizer: ...
@overload
def convert(optimizer: Optimizer, cls: type[AnyOptimizer], **overrides: Any) -> AnyOptimizer: ...
def convert(optimizer: Optimizer, cls: type[Optimizer] | None = None, **overrides: Any) -> Optimizer:
    """Turn a live optimizer into one of ours, or hand its parameters over to another rule.

    Without `cls`, the class of the same name takes over mid-run: parameters, groups, every hyper-parameter and the
    state, whose tensors are shared and not copied. Drop the old optimizer, and attach schedulers to the new one.

    With `cls`, a new optimizer of that class starts on the same parameter groups. Of each group are kept: weight decay,
    decoupled if it was and if `cls` can do that, ``maximize``, and whatever keys you have put there yourself.
    Everything else (the learning rate above all) means something different under another rule and comes from
    `overrides` or the defaults of `cls`; state starts afresh.

    Hooks stay with the old optimizer: register them on the new one.

    Args:
        optimizer: The optimizer to convert, from torch.optim or ours.
        cls: The class to hand over to; None for the class of the same name.
        **overrides: Hyper-parameters for all groups, such as ``lr``; and ``backend``.

    Returns:
        The new optimizer. `optimizer` itself when it is one of ours already and nothing is asked for.

    Raises:
        TypeError: There is no class of that name here, the class of `optimizer` has a ``step`` of its own, which ours
            would not perform, or `cls` does not know a hyper-parameter.

    Warns:
        UserWarning: Weight decay acts on the parameter under one of the two rules and on the gradient under the other,
            so that the same number means something else.

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
    if cls is not None and not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise TypeError(f"convert() wants a class of optimizers, such as fastopt.SGD, to hand over to; got {cls!r}")
    if cls is not None and issubclass(cls, Lookahead):
        raise TypeError("Lookahead wraps an optimizer instead of replacing it: fastopt.Lookahead(optimizer)")
    if cls is None and twin(optimizer):
        _check_step(optimizer)
    same_rule = cls is None or cls is type(optimizer) or cls is twin(optimizer)
    cls = cls or twin(optimizer)
    if cls is None:
        known = ", ".join(sorted(twin.__name__ for twin in _TWINS))
        raise TypeError(
            f"{type(optimizer).__name__} has no counterpart in fastopt; accepted are torch.optim's {known}. To go on "
            "with another rule, name it: fastopt.convert(optimizer, fastopt.Adam, lr=...)"
        )
    accepted = _accepted(cls)
    if unknown := sorted(set(overrides) - accepted):
        raise TypeError(
            f"{cls.__name__} has no hyper-parameter {', '.join(unknown)}; it has {', '.join(sorted(accepted))}"
        )
    if not same_rule:
        return _handed_over(optimizer, cls, overrides, accepted)
    kept = {key for group in optimizer.param_groups for key in group}
    defaults = {key: value for key, value in optimizer.defaults.items() if key in accepted}
    converted: Any = cls(_groups(optimizer, kept - overrides.keys()), **(defaults | overrides))
    for p, state in optimizer.state.items():  # beside the parameters' there may be what the user put there
        converted.state[p] = dict(state) if isinstance(state, dict) else state
    return converted  # type: ignore[no-any-return]


def twin(optimizer: Optimizer) -> type[Fused] | None:
    """Our class for an optimizer, its own if it is one of ours."""
    if isinstance(optimizer, Fused):
        return type(optimizer)
    return next((_TWINS[base] for base in type(optimizer).__mro__ if base in _TWINS), None)


def _accepted(cls: type) -> set[str]:
    """The hyper-parameters of a constructor, with those of the class above if it hands on what it does not name."""
    found: set[str] = set()
    for base in cls.__mro__:
        parameters = inspect.signature(base).parameters.values()
        found |= {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            break
    return found - {"params"}


def _check_step(optimizer: Optimizer) -> None:
    """A subclass of a torch class that only adds to it converts; one that steps in another way does not."""
    cls = type(optimizer)
    base = next((base for base in cls.__mro__ if base in _TWINS), cls)
    if isinstance(optimizer, Fused) or inspect.unwrap(cls.step) is inspect.unwrap(base.step):
        return
    name = _TWINS[base].__name__
    raise TypeError(
        f"{cls.__name__} has a step() of its own, which fastopt.{name} would not perform. If {name} is what you want, "
        f"say so: fastopt.convert(optimizer, fastopt.{name})"
    )


def _handed_over(
    optimizer: Optimizer, cls: type[Optimizer], overrides: dict[str, Any], accepted: set[str]
) -> Optimizer:
    """Another rule on the same groups."""
    own = {key for group in optimizer.param_groups for key in group} - optimizer.defaults.keys() - _FLEETING - accepted
    kept = own | (set(_SHARED) & (accepted | {"param_names"}))
    groups = _groups(optimizer, kept - overrides.keys())
    if _DECOUPLED in accepted and _DECOUPLED not in overrides:
        for old, new in zip(optimizer.param_groups, groups, strict=True):
            new[_DECOUPLED] = bool(_decouples(optimizer, old))
    converted = cls(groups, **overrides)
    if "weight_decay" not in overrides:
        _compare_decay(optimizer, converted)
    return converted


def _compare_decay(old: Optimizer, new: Optimizer) -> None:
    does = {True: "a factor on the parameter (decoupled)", False: "a part of the gradient (L2)"}
    for i, (before, after) in enumerate(zip(old.param_groups, new.param_groups, strict=True)):
        was, is_ = _decouples(old, before), _decouples(new, after)
        if after.get("weight_decay") and was is not None and is_ is not None and was != is_:
            warnings.warn(
                f"weight_decay={after['weight_decay']} of group {i} was {does[was]} under {type(old).__name__} and is "
                f"{does[is_]} under {type(new).__name__}, so the same number means something else: give weight_decay=",
                stacklevel=4,
            )
            return


def _decouples(optimizer: Optimizer, group: dict[str, Any]) -> bool | None:
    """Whether weight decay is a factor on the parameter instead of a part of the gradient; None: who knows."""
    if _DECOUPLED in group:
        return bool(group[_DECOUPLED])
    if isinstance(optimizer, (torch.optim.AdamW, Ranger)):
        return True
    return False if twin(optimizer) else None


def _groups(optimizer: Optimizer, kept: set[str]) -> list[dict[str, Any]]:
    """The groups with these of their keys, and named parameters in the form that constructors accept."""
    groups = []
    for old in optimizer.param_groups:
        group = {key: value for key, value in old.items() if key in kept}
        group["params"] = list(old["params"])
        names = group.pop("param_names", None)
        if names is not None:
            group["params"] = list(zip(names, group["params"], strict=True))
        groups.append(group)
    return groups
