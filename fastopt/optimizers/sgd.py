"""SGD with momentum and Nesterov momentum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fastopt import stages
from fastopt.chain import Stage
from fastopt.optimizers.base import Fused
from fastopt.rule import Hyper, Number, Rule, Slot, flag


class SGDRule(Rule):
    hyper: Sequence[str] = ("lr", "momentum", "dampening", "nesterov")
    optional: Sequence[str] = ("nesterov",)
    counters: Mapping[str, float] = MappingProxyType({})

    def update(self, h: Hyper) -> tuple[Stage, ...]:
        if h.momentum == 0:
            return (stages.sgd,)
        return (stages.nesterov if h.nesterov else stages.momentum, stages.sgd)

    def slots(self, h: Hyper) -> dict[str, Slot]:
        return {} if h.momentum == 0 else {"buf": Slot("momentum_buffer")}

    def coefficients(self, h: Hyper, t: Number, carry: Number) -> tuple[Number, ...]:
        descent = stages.sgd.row(minus_lr=-h.lr)
        if h.momentum == 0:
            return descent
        first = flag(t == 1)  # without a counter t is 1 on the first step of a parameter and 2 ever after
        return (*stages.momentum.row(first=first, mu=h.momentum, undamped=1 - h.dampening), *descent)

    def twin(self, h: Hyper) -> tuple[str, dict[str, Number]]:
        if h.momentum == 0:
            return "sgd", {"lr": h.lr}
        return "momentum", {"lr": h.lr, "momentum": h.momentum, "dampening": h.dampening}


class SGD(Fused, torch.optim.SGD):
    r"""Stochastic gradient descent, with momentum or Nesterov momentum.

    .. math::
        b &\leftarrow g \;\text{ on the first step of a parameter}, \qquad b \leftarrow \mu b + (1-\tau) g
        \;\text{ afterwards} \\
        p &\leftarrow p - \gamma\, b, \qquad\text{with Nesterov: } p \leftarrow p - \gamma\,(g + \mu b)

    and :math:`p \leftarrow p - \gamma g` for ``momentum=0``. The first gradient enters undamped. Sutskever et al. and
    Keras put γ inside the velocity: the same for a constant learning rate, different under a schedule.

    Same signature, numbers, state and checkpoints as ``torch.optim.SGD``.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate γ (default: 1e-3).
        momentum: μ (default: 0).
        dampening: τ (default: 0).
        weight_decay: λ, coupled: :math:`g \leftarrow g + \lambda p` (default: 0).
        nesterov: Needs momentum and no dampening (default: False).
        maximize, foreach, differentiable, fused: As in torch.
        backend: "native", "triton" or "reference" to insist on one; None chooses (default: None).

    Shapes:
        State per parameter: ``momentum_buffer`` shaped like the parameter, for momentum only; no ``step``.

    Raises:
        ValueError: A hyper-parameter is out of range.
        RuntimeError: ``backend`` is not available here.

    Example:
        >>> import torch, fastopt
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = fastopt.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        >>> model(torch.ones(3, 4)).sum().backward()
        >>> optimizer.step()

    References:
        Robbins and Monro, "A Stochastic Approximation Method", 1951.
        Polyak, "Some Methods of Speeding up the Convergence of Iteration Methods", 1964.
        Sutskever et al., "On the Importance of Initialization and Momentum in Deep Learning", ICML 2013.
    """

    if TYPE_CHECKING:  # what torch's constructor takes, which does the work, and backend

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = 1e-3,
            momentum: float = 0,
            dampening: float = 0,
            weight_decay: float | Tensor = 0,
            nesterov: bool = False,
            *,
            maximize: bool = False,
            foreach: bool | None = None,
            differentiable: bool = False,
            fused: bool | None = None,
            backend: str | None = None,
        ) -> None: ...

    rule = SGDRule()
