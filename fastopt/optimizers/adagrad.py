"""Adagrad."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fastopt import stages
from fastopt.chain import Stage
from fastopt.optimizers.base import Fused
from fastopt.rule import Hyper, Number, Rule, Slot


def _initial(p: Tensor, h: Hyper) -> Tensor:
    return torch.full_like(p, h.initial_accumulator_value, memory_format=torch.preserve_format)


class AdagradRule(Rule):
    hyper: Sequence[str] = ("lr", "lr_decay", "eps", "initial_accumulator_value")

    def update(self, h: Hyper) -> tuple[Stage, ...]:
        return (stages.adagrad,)

    def slots(self, h: Hyper) -> dict[str, Slot]:
        return {"s": Slot("sum", _initial)}

    def coefficients(self, h: Hyper, t: Number, carry: Number) -> tuple[Number, ...]:
        return stages.adagrad.row(eps=h.eps, clr=h.lr / (1 + (t - 1) * h.lr_decay))

    def twin(self, h: Hyper) -> tuple[str, dict[str, Number]]:
        return "adagrad", {"lr": h.lr, "lr_decay": h.lr_decay, "eps": h.eps}


class Adagrad(Fused, torch.optim.Adagrad):
    r"""Gradient divided by the root of the sum of all its squares.

    .. math::
        s \leftarrow s + g^2, \qquad
        p \leftarrow p - \frac{\gamma}{1 + (t-1)\eta}\; g / (\sqrt{s} + \epsilon)

    A constant gradient moves the parameter by :math:`\gamma/\sqrt t`. Keras starts s at 0.1.

    Same signature, numbers, state and checkpoints as ``torch.optim.Adagrad``; sparse gradients go to torch's code.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate γ (default: 1e-2).
        lr_decay: η (default: 0).
        weight_decay: λ, coupled: :math:`g \leftarrow g + \lambda p` (default: 0).
        initial_accumulator_value: First value of s, in the unit of the squared gradient (default: 0).
        eps: Added to the denominator, in the unit of the gradient (default: 1e-10).
        foreach, maximize, differentiable, fused: As in torch.
        backend: "native", "triton" or "reference" to insist on one; None chooses (default: None).

    Shapes:
        State per parameter: ``step`` (0-dim float32) and ``sum`` shaped like the parameter, created with the optimizer.

    Raises:
        ValueError: A hyper-parameter is out of range.
        RuntimeError: ``backend`` is not available here, or a sparse gradient meets weight decay.

    Example:
        >>> import torch, fastopt
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = fastopt.Adagrad(model.parameters(), lr=0.1)
        >>> model(torch.ones(3, 4)).sum().backward()
        >>> optimizer.step()

    References:
        Duchi, Hazan and Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization",
        JMLR 12, 2011.
    """

    if TYPE_CHECKING:  # what torch's constructor takes, which does the work, and backend

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = 1e-2,
            lr_decay: float = 0,
            weight_decay: float = 0,
            initial_accumulator_value: float = 0,
            eps: float = 1e-10,
            foreach: bool | None = None,
            *,
            maximize: bool = False,
            differentiable: bool = False,
            fused: bool | None = None,
            backend: str | None = None,
        ) -> None: ...

    rule = AdagradRule()
