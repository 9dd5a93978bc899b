"""`materialize_state`: all of an optimizer's state at once, without a step."""

from __future__ import annotations

from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from fastopt import memory
from fastopt.optimizers.base import Fused
from fastopt.optimizers.lookahead import SLOW, Lookahead
from fastopt.plan import check_state, missing_state
from fastopt.setting import Settings


def materialize_state(optimizer: Optimizer) -> None:
    """Create the state that parameters lack, as their first step would, without taking one.

    State comes into being with a parameter's first gradient, so a checkpoint lacks parameters that never had one, and
    loaders that want every parameter (``torch.distributed.checkpoint``, FSDP) fail on it. torch's way out is a step on
    zero gradients with ``lr=0``, which only happens while there is no state at all and counts as a step ever after.
    Call this instead, before saving and before loading. Training goes on with the same bits as without it, with one
    exception: SGD takes a parameter's first gradient undamped because there is no buffer yet, so with ``dampening``
    a first gradient that is still to come counts ``1 - dampening`` times afterwards (as after torch's way out).

    What is there already stays as it is, and frozen parameters (``requires_grad=False``) stay without state.

    Args:
        optimizer: One of ours, or a :class:`fastopt.Lookahead` around one.

    Raises:
        TypeError: Not one of ours: when a foreign optimizer creates which state only its own step knows.
        ValueError: Existing state does not fit its parameter. Nothing is changed then.

    Example:
        >>> import torch, fastopt
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = fastopt.Adam(model.parameters())
        >>> fastopt.materialize_state(optimizer)
        >>> len(optimizer.state_dict()["state"])
        2
    """
    wraps = isinstance(optimizer, Lookahead)
    inner = optimizer.optimizer if isinstance(optimizer, Lookahead) else optimizer
    if not isinstance(inner, Fused):
        raise TypeError(
            f"optimizer is a {type(inner).__module__}.{type(inner).__name__}, whose state only its own step can make; "
            "fastopt.convert(optimizer) makes one of ours from torch.optim's"
        )
    settings = Settings(inner.rule)
    pending: list[tuple[Tensor, dict[str, Tensor]]] = []
    for i, group in enumerate(inner.param_groups):
        setting = settings.of(group)
        for k, p in enumerate(group["params"]):
            if is_lazy(p):  # what it will need depends on the shape that it does not have yet
                continue
            own = inner.state.get(p, {})
            check_state(setting, p, own, f"parameter {k} of group {i}")
            new = missing_state(setting, p, own) if p.requires_grad else {}
            if wraps and p.requires_grad and own.get(SLOW) is None:
                new[SLOW] = memory.copy_of(p)
            if new:
                pending.append((p, new))
    for p, new in pending:
        inner.state[p].update(new)
