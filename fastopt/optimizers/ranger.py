"""Ranger."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from fastopt import stages
from fastopt.chain import Stage
from fastopt.optimizers.base import Fused
from fastopt.optimizers.radam import RAdamRule
from fastopt.optimizers.slow import SlowWeights, check_slow
from fastopt.rule import Hyper, Number, Slot, copy_of

SLOW = "slow_buffer"


class RangerRule(RAdamRule):
    hyper: Sequence[str] = (
        "lr",
        "alpha",
        "k",
        "n_sma_threshold",
        "betas",
        "eps",
        "use_gc",
        "gc_conv_only",
        "degenerated_to_sgd",
    )
    optional: Sequence[str] = ("alpha", "k", "n_sma_threshold", "use_gc", "gc_conv_only", "degenerated_to_sgd")
    slow = Slot(SLOW, copy_of)

    def check(self, h: Hyper) -> None:
        check_slow(h.k, h.alpha)

    def threshold(self, h: Hyper) -> Number:
        threshold: Number = h.n_sma_threshold
        return threshold

    def patient(self, h: Hyper) -> bool:
        return not h.degenerated_to_sgd

    def decay(self, h: Hyper) -> Stage:
        return stages.shrink

    def alpha(self, h: Hyper) -> Number:
        alpha: Number = h.alpha
        return alpha

    def period(self, h: Hyper) -> Number:
        period: Number = h.k
        return period

    def rows(self, h: Hyper, p: Tensor) -> int:
        return p.shape[0] if h.use_gc and p.numel() and p.dim() > (3 if h.gc_conv_only else 1) else 0

    def structure(self, h: Hyper) -> tuple[Any, ...]:
        return (*super().structure(h), bool(h.use_gc), bool(h.gc_conv_only))


class Ranger(Fused, SlowWeights, Optimizer):
    r"""RAdam, Lookahead and gradient centralisation in one pass.

    .. math::
        g &\leftarrow g - \operatorname{mean}_{1\ldots}(g) \quad \text{where p has rows, if } \texttt{use\_gc} \\
        p &\leftarrow \text{RAdam}(p, g), \quad \text{after } p \leftarrow (1 - \gamma\lambda) p \\
        \phi &\leftarrow \phi + \alpha (p - \phi), \quad p \leftarrow \phi \qquad \text{if } t \bmod k = 0

    The semantics of the original ``ranger.py`` (v20.4.11): the gradient is centralised over all dimensions but the
    first; t, and with it the synchronisation, is counted per parameter; φ starts as the parameter before its first
    update; decay is decoupled. ``ranger2020.py`` scales the decay by the rectified step and can centralise the final
    direction instead; that is not done here. Ten defects of the published code are absent: ``use_gc=False`` is
    honoured; decay is never written into a moment; groups with other betas do not share a cached step size; no ascent
    before rectification; a closure is called; gradients are left as they were; copies and pickles are complete;
    ``alpha`` and the threshold are per group; nothing is printed; no stale direction is used. The mean is summed
    without error in float64 and rounded once. ``alpha=1, use_gc=False`` is :class:`RAdam` with decoupled decay, bit
    for bit.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate γ (default: 1e-3). Before rectification and with slow weights, effective steps are much
            smaller than Adam's: short trainings want 10 to 100 times its learning rate.
        alpha: Step of the slow weights, in [0, 1] (default: 0.5).
        k: Steps between synchronisations, at least 1 (default: 6).
        n_sma_threshold: The step is rectified while ρ exceeds this; at least 4, below which the rectification is
            undefined (default: 5). The original's spelling ``N_sma_threshhold`` is accepted too.
        betas: Decay rates of the two moments, in [0, 1) (default: (0.95, 0.999)).
        eps: Added to the uncorrected root, in the unit of the gradient (default: 1e-5).
        weight_decay: λ, decoupled (default: 0).
        use_gc: Centralise gradients of parameters with more than one dimension (default: True).
        gc_conv_only: Centralise only those with more than three (default: False).
        degenerated_to_sgd: Take momentum steps until the step is rectified; False waits instead, as the RAdam authors'
            code does (default: True).
        maximize: Ascend instead of descend (default: False).
        capturable: Keep ``step`` on the parameter's device, as in torch, for CUDA graphs (default: False).
        backend: "native", "triton" or "reference" to insist on one; None chooses (default: None).

    Shapes:
        State per parameter: ``step`` (0-dim float32), ``exp_avg``, ``exp_avg_sq`` and ``slow_buffer`` shaped like it.

    Raises:
        ValueError: A hyper-parameter is out of range.
        RuntimeError: ``backend`` is not available here, or a gradient is sparse.

    Example:
        >>> import torch, fastopt
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = fastopt.Ranger(model.parameters(), lr=1e-2)
        >>> model(torch.ones(3, 4)).sum().backward()
        >>> optimizer.step()
        >>> with optimizer.slow_weights():
        ...     loss = model(torch.ones(3, 4)).sum()

    References:
        Wright, "Ranger", 2019, github.com/lessw2020/Ranger-Deep-Learning-Optimizer.
        Liu et al., arXiv:1908.03265; Zhang et al., arXiv:1907.08610; Yong et al., "Gradient Centralization",
        ECCV 2020, arXiv:2004.01461.
    """

    rule = RangerRule()
    slow_key = SLOW

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        alpha: float = 0.5,
        k: int = 6,
        n_sma_threshold: float = 5,
        betas: tuple[float, float] = (0.95, 0.999),
        eps: float = 1e-5,
        weight_decay: float = 0,
        use_gc: bool = True,
        gc_conv_only: bool = False,
        *,
        degenerated_to_sgd: bool = True,
        maximize: bool = False,
        capturable: bool = False,
        backend: str | None = None,
        N_sma_threshhold: float | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "k": k,
            "n_sma_threshold": n_sma_threshold if N_sma_threshhold is None else N_sma_threshhold,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "use_gc": use_gc,
            "gc_conv_only": gc_conv_only,
            "degenerated_to_sgd": degenerated_to_sgd,
            "maximize": maximize,
            "capturable": capturable,
        }
        _check(defaults)
        super().__init__(params, defaults, backend=backend)
        _warn_of_lost_rows([p for group in self.param_groups if group["use_gc"] for p in group["params"]])

    def __setstate__(self, state: dict[str, Any]) -> None:
        for group in state.get("param_groups", []):  # a checkpoint of the original lacks our keys and misspells one
            if "N_sma_threshhold" in group:
                group["n_sma_threshold"] = group.pop("N_sma_threshhold")
            for key, value in (state.get("defaults") or self.defaults).items():
                if key != "differentiable":  # torch adds it to every optimizer's defaults, not to the groups
                    group.setdefault(key, value)
            _check(group)
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # again: no argument of ours

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):  # else torch says that it is none
            if "N_sma_threshhold" in param_group:
                param_group = dict(param_group)
                param_group["n_sma_threshold"] = param_group.pop("N_sma_threshhold")
            _check(self.defaults | param_group)
        super().add_param_group(param_group)


def _warn_of_lost_rows(params: Sequence[Tensor]) -> None:
    """FSDP1 makes parameters parts of one flat tensor, which has no rows to centralise."""
    flat = [p for p in params if getattr(p, "_fsdp_flattened", False)]  # torch's mark
    if flat and not any(p.dim() > 1 for p in flat):
        warnings.warn(
            "FullyShardedDataParallel took the shapes off the parameters, so their gradients cannot be centralised: "
            "use fully_shard (FSDP2), which keeps them, or say use_gc=False",
            stacklevel=3,
        )


def _check(group: dict[str, Any]) -> None:
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")
    check_slow(group["k"], group["alpha"])
    if not group["n_sma_threshold"] >= 4:
        raise ValueError(
            f"Invalid n_sma_threshold value: {group['n_sma_threshold']}; at least 4, else rectification is undefined"
        )
    if not group["eps"] >= 0.0:
        raise ValueError(f"Invalid epsilon value: {group['eps']}")
    for index in (0, 1):
        if not 0.0 <= betas[index] < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {betas[index]}")
    if not group["weight_decay"] >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")
