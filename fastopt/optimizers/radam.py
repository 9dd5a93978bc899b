"""RAdam."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fastopt import stages
from fastopt.chain import Stage
from fastopt.optimizers.base import Fused
from fastopt.rule import Condition, Hyper, Number, Rule, Slot, flag, select


class RAdamRule(Rule):
    hyper: Sequence[str] = ("lr", "betas", "eps", "decoupled_weight_decay")
    optional: Sequence[str] = ("decoupled_weight_decay",)
    decouples = True

    def update(self, h: Hyper) -> tuple[Stage, ...]:
        return (stages.radam,)

    def slots(self, h: Hyper) -> dict[str, Slot]:
        return {"m": Slot("exp_avg"), "v": Slot("exp_avg_sq")}

    def threshold(self, h: Hyper) -> Number:
        return 5.0

    def rectification(self, h: Hyper, t: Number) -> Number:
        """r_t, or 0 while the approximated length of the moving average is at or below the threshold."""
        bc2 = 1 - h.beta2**t
        rho_inf = 2 / (1 - h.beta2) - 1
        rho = rho_inf - 2 * t * (h.beta2**t) / bc2
        return select(
            rho > self.threshold(h),
            lambda: ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) ** 0.5,
            0.0,
        )

    def waits(self, h: Hyper, t: Number) -> Condition:
        return self.patient(h) and self.rectification(h, t) == 0

    def coefficients(self, h: Hyper, t: Number, carry: Number) -> tuple[Number, ...]:
        rect = self.rectification(h, t)
        return stages.radam.row(
            w1=1 - h.beta1,
            beta2=h.beta2,
            w2=1 - h.beta2,
            eps=h.eps,
            bc1=1 - h.beta1**t,
            lr=h.lr,
            sqrt_bc2=(1 - h.beta2**t) ** 0.5,
            rectified=flag(rect > 0),
            rect=rect,
        )

    def twin(self, h: Hyper) -> tuple[str, dict[str, Number]]:
        hyper = {"lr": h.lr, "beta1": h.beta1, "beta2": h.beta2, "eps": h.eps}
        return "radam", hyper | {"threshold": self.threshold(h), "waits": self.patient(h)}


class RAdam(Fused, torch.optim.RAdam):
    r"""Adam whose adaptive step is rectified for the variance of its denominator, and waits until that is finite.

    .. math::
        m &\leftarrow \beta_1 m + (1-\beta_1) g, \qquad v \leftarrow \beta_2 v + (1-\beta_2) g^2, \qquad
        \hat m = m / (1-\beta_1^t) \\
        \rho_\infty &= \tfrac{2}{1-\beta_2} - 1, \qquad \rho_t = \rho_\infty - 2 t \beta_2^t / (1-\beta_2^t), \qquad
        r_t = \sqrt{\tfrac{(\rho_t-4)(\rho_t-2)\rho_\infty}{(\rho_\infty-4)(\rho_\infty-2)\rho_t}} \\
        p &\leftarrow p - \gamma \hat m\, r_t \sqrt{1-\beta_2^t} / (\sqrt v + \epsilon) \quad \text{if } \rho_t > 5,
        \qquad p - \gamma \hat m \quad \text{otherwise}

    Implementations differ. Threshold: the paper rectifies above 4, the authors' code from 5 on, torch and this class
    above 5; for β2 = 0.999 that is from step 6. Before it: the paper, torch and this class take a momentum step, the
    authors' code none by default (:class:`Ranger` has the option). eps is added to the uncorrected root, so it weighs
    more in early steps than Adam's; for β2 ≤ 2/3 the step is never rectified. The authors decouple weight decay and
    apply it only on steps that update.

    Same signature, numbers, state and checkpoints as ``torch.optim.RAdam``.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate γ (default: 1e-3).
        betas: Decay rates of the two moments, in [0, 1) (default: (0.9, 0.999)).
        eps: Added to the denominator, in the unit of the gradient (default: 1e-8).
        weight_decay: λ, coupled unless ``decoupled_weight_decay`` (default: 0).
        decoupled_weight_decay: :math:`p \leftarrow (1-\gamma\lambda) p` instead (default: False).
        foreach, maximize, capturable, differentiable: As in torch.
        backend: "native", "triton" or "reference" to insist on one; None chooses (default: None).

    Shapes:
        State per parameter: ``step`` (0-dim float32), ``exp_avg`` and ``exp_avg_sq`` shaped like the parameter.

    Raises:
        ValueError: A hyper-parameter is out of range.
        RuntimeError: ``backend`` is not available here, or a gradient is sparse.

    Example:
        >>> import torch, fastopt
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = fastopt.RAdam(model.parameters(), lr=1e-2)
        >>> model(torch.ones(3, 4)).sum().backward()
        >>> optimizer.step()

    References:
        Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", ICLR 2020, arXiv:1908.03265.
    """

    if TYPE_CHECKING:  # what torch's constructor takes, which does the work, and backend

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = 1e-3,
            betas: tuple[float, float] = (0.9, 0.999),
            eps: float = 1e-8,
            weight_decay: float = 0,
            decoupled_weight_decay: bool = False,
            *,
            foreach: bool | None = None,
            maximize: bool = False,
            capturable: bool = False,
            differentiable: bool = False,
            backend: str | None = None,
        ) -> None: ...

    rule = RAdamRule()
