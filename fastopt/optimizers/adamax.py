"""Adamax."""

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


class AdamaxRule(Rule):
    hyper: Sequence[str] = ("lr", "betas", "eps")

    def update(self, h: Hyper) -> tuple[Stage, ...]:
        return (stages.adamax,)

    def slots(self, h: Hyper) -> dict[str, Slot]:
        return {"m": Slot("exp_avg"), "u": Slot("exp_inf")}

    def coefficients(self, h: Hyper, t: Number, carry: Number) -> tuple[Number, ...]:
        return stages.adamax.row(w1=1 - h.beta1, beta2=h.beta2, eps=h.eps, step_size=h.lr / (1 - h.beta1**t))

    def twin(self, h: Hyper) -> tuple[str, dict[str, Number]]:
        return "adamax", {"lr": h.lr, "beta1": h.beta1, "beta2": h.beta2, "eps": h.eps}


class Adamax(Fused, torch.optim.Adamax):
    r"""Adam with the infinity norm of past gradients in the denominator.

    .. math::
        m &\leftarrow \beta_1 m + (1-\beta_1) g, \qquad u \leftarrow \max(\beta_2 u,\; |g| + \epsilon) \\
        p &\leftarrow p - \frac{\gamma}{1-\beta_1^t}\, m / u

    The paper has no eps; torch, and so this class, adds it to :math:`|g|` inside the maximum, Keras to the denominator.
    Arithmetic on 16-bit parameters is in float32, so that eps does not vanish.

    Same signature, numbers, state and checkpoints as ``torch.optim.Adamax``.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate γ; no element moves by more than about γ in one step (default: 2e-3).
        betas: Decay rates of m and u, in [0, 1) (default: (0.9, 0.999)).
        eps: Keeps u positive, in the unit of the gradient (default: 1e-8).
        weight_decay: λ, coupled: :math:`g \leftarrow g + \lambda p` (default: 0).
        foreach, maximize, differentiable, capturable: As in torch.
        backend: "native", "triton" or "reference" to insist on one; None chooses (default: None).

    Shapes:
        State per parameter: ``step`` (0-dim float32), ``exp_avg`` and ``exp_inf`` shaped like the parameter.

    Raises:
        ValueError: A hyper-parameter is out of range.
        RuntimeError: ``backend`` is not available here, or a gradient is sparse.

    Example:
        >>> import torch, fastopt
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = fastopt.Adamax(model.parameters())
        >>> model(torch.ones(3, 4)).sum().backward()
        >>> optimizer.step()

    References:
        Kingma and Ba, "Adam: A Method for Stochastic Optimization", section 7.1, ICLR 2015, arXiv:1412.6980.
    """

    if TYPE_CHECKING:  # what torch's constructor takes, which does the work, and backend

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = 2e-3,
            betas: tuple[float, float] = (0.9, 0.999),
            eps: float = 1e-8,
            weight_decay: float = 0,
            foreach: bool | None = None,
            *,
            maximize: bool = False,
            differentiable: bool = False,
            capturable: bool = False,
            backend: str | None = None,
        ) -> None: ...

    rule = AdamaxRule()
