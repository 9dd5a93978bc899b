"""NAdam."""

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
from fastopt.rule import Hyper, Number, Rule, Slot, to_single


class NAdamRule(Rule):
    hyper: Sequence[str] = ("lr", "betas", "eps", "momentum_decay", "decoupled_weight_decay")
    optional: Sequence[str] = ("decoupled_weight_decay",)
    counters: Mapping[str, float] = MappingProxyType({"step": 0.0, "mu_product": 1.0})
    decouples = True

    def update(self, h: Hyper) -> tuple[Stage, ...]:
        return (stages.nadam,)

    def slots(self, h: Hyper) -> dict[str, Slot]:
        return {"m": Slot("exp_avg"), "v": Slot("exp_avg_sq")}

    def mu(self, h: Hyper, t: Number) -> Number:
        mu: Number = h.beta1 * (1.0 - 0.5 * (0.96 ** (t * h.momentum_decay)))
        return mu

    def carried(self, h: Hyper, t: Number, carry: Number, single: bool) -> Number:
        # torch multiplies its 0-dim float32 tensor by a Python number, which it rounds to float32 first.
        return to_single(carry * to_single(self.mu(h, t))) if single else carry * self.mu(h, t)

    def coefficients(self, h: Hyper, t: Number, carry: Number) -> tuple[Number, ...]:
        mu, mu_next = self.mu(h, t), self.mu(h, t + 1)
        return stages.nadam.row(
            w1=1 - h.beta1,
            beta2=h.beta2,
            w2=1 - h.beta2,
            eps=h.eps,
            bc2=1 - h.beta2**t,
            c_g=-h.lr * (1.0 - mu) / (1.0 - carry),
            c_m=(-h.lr * mu_next) / (1.0 - carry * mu_next),
        )

    def twin(self, h: Hyper) -> tuple[str, dict[str, Number]]:
        hyper = {"lr": h.lr, "beta1": h.beta1, "beta2": h.beta2, "eps": h.eps}
        return "nadam", hyper | {"momentum_decay": h.momentum_decay}


class NAdam(Fused, torch.optim.NAdam):
    r"""Adam with Nesterov momentum under a warm-up schedule of the momentum.

    .. math::
        \mu_t &= \beta_1 \big(1 - \tfrac12\, 0.96^{t\psi}\big), \qquad P \leftarrow P \mu_t \\
        m &\leftarrow \beta_1 m + (1-\beta_1) g, \qquad v \leftarrow \beta_2 v + (1-\beta_2) g^2, \qquad
        d = \sqrt{v/(1-\beta_2^t)} + \epsilon \\
        p &\leftarrow p - \gamma \frac{1-\mu_t}{1-P}\,\frac{g}{d} - \gamma \frac{\mu_{t+1}}{1-P\mu_{t+1}}\,\frac{m}{d}

    m decays with β1, not with μ. P is kept in float32 as torch keeps it. Some implementations have no schedule (they
    behave differently), and the workshop paper has a further factor β2 that every library drops.

    Same signature, numbers, state and checkpoints as ``torch.optim.NAdam``.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate γ (default: 2e-3).
        betas: Decay rates of the two moments, in [0, 1) (default: (0.9, 0.999)).
        eps: Added to the denominator, in the unit of the gradient (default: 1e-8).
        weight_decay: λ, coupled unless ``decoupled_weight_decay`` (default: 0).
        momentum_decay: ψ (default: 4e-3).
        decoupled_weight_decay: :math:`p \leftarrow (1-\gamma\lambda) p` instead (default: False).
        foreach, maximize, capturable, differentiable: As in torch.
        backend: "native", "triton" or "reference" to insist on one; None chooses (default: None).

    Shapes:
        State per parameter: ``step`` and ``mu_product`` (0-dim float32), ``exp_avg`` and ``exp_avg_sq`` shaped like it.

    Raises:
        ValueError: A hyper-parameter is out of range.
        RuntimeError: ``backend`` is not available here, or a gradient is sparse.

    Example:
        >>> import torch, fastopt
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = fastopt.NAdam(model.parameters())
        >>> model(torch.ones(3, 4)).sum().backward()
        >>> optimizer.step()

    References:
        Dozat, "Incorporating Nesterov Momentum into Adam", ICLR 2016 workshop, openreview OM0jvwB8jIp57ZJjtNEZ.
    """

    if TYPE_CHECKING:  # what torch's constructor takes, which does the work, and backend

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = 2e-3,
            betas: tuple[float, float] = (0.9, 0.999),
            eps: float = 1e-8,
            weight_decay: float = 0,
            momentum_decay: float = 0.004,
            decoupled_weight_decay: bool = False,
            *,
            foreach: bool | None = None,
            maximize: bool = False,
            capturable: bool = False,
            differentiable: bool = False,
            backend: str | None = None,
        ) -> None: ...

    rule = NAdamRule()
