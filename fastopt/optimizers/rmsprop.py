"""RMSprop, plain and centered, with and without momentum."""

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


class RMSpropRule(Rule):
    hyper: Sequence[str] = ("lr", "alpha", "eps", "momentum", "centered")
    optional: Sequence[str] = ("momentum", "centered")

    def update(self, h: Hyper) -> tuple[Stage, ...]:
        if h.momentum > 0:
            return (stages.rmsprop_centered_momentum if h.centered else stages.rmsprop_momentum,)
        return (stages.rmsprop_centered if h.centered else stages.rmsprop,)

    def slots(self, h: Hyper) -> dict[str, Slot]:
        slots = {"v": Slot("square_avg")}
        if h.momentum > 0:
            slots["buf"] = Slot("momentum_buffer")
        if h.centered:
            slots["ga"] = Slot("grad_avg")
        return slots

    def coefficients(self, h: Hyper, t: Number, carry: Number) -> tuple[Number, ...]:
        plain = stages.rmsprop.row(alpha=h.alpha, w=1 - h.alpha, eps=h.eps, minus_lr=-h.lr)
        return (*plain, h.momentum) if h.momentum > 0 else plain

    def twin(self, h: Hyper) -> tuple[str, dict[str, Number]]:
        plain = {"lr": h.lr, "alpha": h.alpha, "eps": h.eps}
        return ("rmsprop_momentum", plain | {"momentum": h.momentum}) if h.momentum > 0 else ("rmsprop", plain)


class RMSprop(Fused, torch.optim.RMSprop):
    r"""Gradient divided by a running root mean square of itself.

    .. math::
        v &\leftarrow \alpha v + (1-\alpha) g^2, \qquad
        d = \sqrt{v} + \epsilon \quad\text{or, centered,}\quad
        \bar g \leftarrow \alpha \bar g + (1-\alpha) g,\;\; d = \sqrt{v - \bar g^2} + \epsilon \\
        p &\leftarrow p - \gamma\, g/d, \quad\text{with momentum: } b \leftarrow \mu b + g/d, p \leftarrow p - \gamma b

    No bias correction. TensorFlow 1 and timm's RMSpropTF differ: eps inside the root, v starting at one, γ inside the
    momentum. Centered, rounding can make :math:`v - \bar g^2` negative and the result NaN, as in torch.

    Same signature, numbers, state and checkpoints as ``torch.optim.RMSprop``.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate γ (default: 1e-2).
        alpha: Decay rate of v (default: 0.99).
        eps: Added to the denominator, in the unit of the gradient (default: 1e-8).
        weight_decay: λ, coupled: :math:`g \leftarrow g + \lambda p` (default: 0).
        momentum: μ (default: 0).
        centered: Divide by the deviation instead (default: False).
        capturable, foreach, maximize, differentiable: As in torch.
        backend: "native", "triton" or "reference" to insist on one; None chooses (default: None).

    Shapes:
        State per parameter: ``step`` (0-dim float32), ``square_avg``, and where used ``momentum_buffer`` and
        ``grad_avg``, shaped like the parameter.

    Raises:
        ValueError: A hyper-parameter is out of range.
        RuntimeError: ``backend`` is not available here, or a gradient is sparse.

    Example:
        >>> import torch, fastopt
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = fastopt.RMSprop(model.parameters(), lr=1e-3, momentum=0.9)
        >>> model(torch.ones(3, 4)).sum().backward()
        >>> optimizer.step()

    References:
        Hinton, "Neural Networks for Machine Learning", lecture 6, 2012.
        Graves, "Generating Sequences with Recurrent Neural Networks", 2013, arXiv:1308.0850.
    """

    if TYPE_CHECKING:  # what torch's constructor takes, which does the work, and backend

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = 1e-2,
            alpha: float = 0.99,
            eps: float = 1e-8,
            weight_decay: float = 0,
            momentum: float = 0,
            centered: bool = False,
            capturable: bool = False,
            foreach: bool | None = None,
            maximize: bool = False,
            differentiable: bool = False,
            *,
            backend: str | None = None,
        ) -> None: ...

    rule = RMSpropRule()
