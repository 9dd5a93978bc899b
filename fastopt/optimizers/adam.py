"""Adam and AdamW, AMSGrad included."""

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


class AdamRule(Rule):
    hyper: Sequence[str] = ("lr", "betas", "eps", "amsgrad", "decoupled_weight_decay")
    optional: Sequence[str] = ("amsgrad", "decoupled_weight_decay")
    decouples = True

    def update(self, h: Hyper) -> tuple[Stage, ...]:
        return (stages.amsgrad,) if h.amsgrad else (stages.adam,)

    def slots(self, h: Hyper) -> dict[str, Slot]:
        slots = {"m": Slot("exp_avg"), "v": Slot("exp_avg_sq")}
        return slots | {"vmax": Slot("max_exp_avg_sq")} if h.amsgrad else slots

    def coefficients(self, h: Hyper, t: Number, carry: Number) -> tuple[Number, ...]:
        bc1, bc2 = 1 - h.beta1**t, 1 - h.beta2**t
        return stages.adam.row(
            w1=1 - h.beta1, beta2=h.beta2, w2=1 - h.beta2, eps=h.eps, sqrt_bc2=bc2**0.5, step_size=h.lr / bc1
        )

    def twin(self, h: Hyper) -> tuple[str, dict[str, Number]]:
        return "adam", {"lr": h.lr, "beta1": h.beta1, "beta2": h.beta2, "eps": h.eps}


class Adam(Fused, torch.optim.Adam):
    r"""Adam: gradient moments with bias correction; AMSGrad with ``amsgrad=True``.

    .. math::
        m &\leftarrow \beta_1 m + (1-\beta_1) g, \qquad v \leftarrow \beta_2 v + (1-\beta_2) g^2 \\
        p &\leftarrow p - \frac{\gamma}{1-\beta_1^t}\, m \,\Big/ \Big(\sqrt{v}\,/\sqrt{1-\beta_2^t} + \epsilon\Big)

    with :math:`g \leftarrow g + \lambda p` first when ``weight_decay`` is set, or
    :math:`p \leftarrow (1-\gamma\lambda) p` with ``decoupled_weight_decay=True``. AMSGrad divides by the running
    maximum of the raw v; the paper has no bias correction and no eps, and other libraries correct before the maximum.

    Same signature, numbers, state and checkpoints as ``torch.optim.Adam``.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate γ per step; a number or a one-element tensor (default: 1e-3).
        betas: Decay rates of the two moments, in [0, 1) (default: (0.9, 0.999)).
        eps: Added to the denominator, in the unit of the gradient (default: 1e-8).
        weight_decay: λ (default: 0).
        amsgrad: Keep the largest v ever seen in the denominator (default: False).
        foreach, fused, capturable, differentiable: As in torch, for where ``step`` lives and what is checked; the
            kernels are the same.
        maximize: Ascend instead of descend (default: False).
        decoupled_weight_decay: Decay the parameter instead of the gradient (default: False).
        backend: "native", "triton" or "reference" to insist on one; None chooses (default: None).

    Shapes:
        State per parameter: ``step`` (0-dim float32), ``exp_avg`` and ``exp_avg_sq`` shaped like the parameter, and
        ``max_exp_avg_sq`` for AMSGrad.

    Raises:
        ValueError: A hyper-parameter is out of range.
        RuntimeError: ``backend`` is not available here, or a gradient is sparse.

    Example:
        >>> import torch, fastopt
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = fastopt.Adam(model.parameters(), lr=1e-3)
        >>> model(torch.ones(3, 4)).sum().backward()
        >>> optimizer.step()

    References:
        Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, arXiv:1412.6980.
        Reddi, Kale and Kumar, "On the Convergence of Adam and Beyond", ICLR 2018, arXiv:1904.09237.
    """

    if TYPE_CHECKING:  # what torch's constructor takes, which does the work, and backend

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = 1e-3,
            betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
            eps: float = 1e-8,
            weight_decay: float = 0,
            amsgrad: bool = False,
            *,
            foreach: bool | None = None,
            maximize: bool = False,
            capturable: bool = False,
            differentiable: bool = False,
            fused: bool | None = None,
            decoupled_weight_decay: bool = False,
            backend: str | None = None,
        ) -> None: ...

    rule = AdamRule()


class AdamW(Adam, torch.optim.AdamW):
    r"""Adam with decoupled weight decay.

    .. math::
        p \leftarrow (1-\gamma\lambda)\, p, \qquad \text{then Adam with the gradient as it is}

    The paper scales λ by the schedule alone; here, as in torch, by the learning rate γ.

    Same signature, numbers, state and checkpoints as ``torch.optim.AdamW``.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate γ (default: 1e-3).
        betas: Decay rates of the two moments (default: (0.9, 0.999)).
        eps: Added to the denominator (default: 1e-8).
        weight_decay: λ (default: 1e-2).
        amsgrad: Keep the largest v ever seen in the denominator (default: False).
        maximize, foreach, capturable, differentiable, fused, backend: As for :class:`Adam`.

    Raises:
        ValueError: A hyper-parameter is out of range.
        RuntimeError: ``backend`` is not available here, or a gradient is sparse.

    Example:
        >>> import torch, fastopt
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = fastopt.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        >>> model(torch.ones(3, 4)).sum().backward()
        >>> optimizer.step()

    References:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, arXiv:1711.05101.
    """

    if TYPE_CHECKING:  # what torch's constructor takes, which does the work, and backend

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = 1e-3,
            betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
            eps: float = 1e-8,
            weight_decay: float = 0.01,
            amsgrad: bool = False,
            *,
            maximize: bool = False,
            foreach: bool | None = None,
            capturable: bool = False,
            differentiable: bool = False,
            fused: bool | None = None,
            backend: str | None = None,
        ) -> None: ...
