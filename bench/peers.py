"""Other people's Ranger: the installed packages, or, where there is none, a transcription of ranger.py in foreach
operations.

All are configured to do the work of `fastopt.Ranger`: momentum steps before the rectification threshold, decoupled
decay, and no gradient centralisation (optimi has none; the raced tensors are one-dimensional, where it does not
apply).
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Factory = Callable[[list[dict[str, Any]]], Optimizer]


class ForeachRanger(Optimizer):
    """RAdam and Lookahead as lessw2020's ranger.py has them, on lists of tensors instead of one tensor after the other.

    The stand-in where no package with a Ranger is installed: what a careful user of torch would write. One counter per
    group.
    """

    def __init__(self, params: Any, *, lr: float, betas: tuple[float, float], eps: float, k: int, alpha: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "k": k, "alpha": alpha, "step": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            group["step"] += 1
            self._step_group(group, parameters, [p.grad for p in parameters])

    def _step_group(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        m, v, slow = (list(column) for column in zip(*map(self._state, parameters), strict=True))
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(m, gradients, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, gradients, gradients, 1 - beta2)
        step_size = group["lr"] / (1 - beta1 ** group["step"])
        rectification = rectify(group["step"], beta2)
        if rectification is None:
            torch._foreach_add_(parameters, m, alpha=-step_size)
        else:
            denominator = torch._foreach_sqrt(v)
            torch._foreach_add_(denominator, group["eps"])
            torch._foreach_addcdiv_(parameters, m, denominator, -step_size * rectification)
        if group["step"] % group["k"] == 0:
            torch._foreach_lerp_(slow, parameters, group["alpha"])
            torch._foreach_copy_(parameters, slow)

    def _state(self, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state = self.state[p]
        if not state:
            state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p), slow_buffer=p.clone())
        return state["exp_avg"], state["exp_avg_sq"], state["slow_buffer"]


def rectify(step: int, beta2: float) -> float | None:
    """RAdam's r_t times sqrt(1 - beta2^t), or None up to the threshold of 5."""
    decay = beta2**step
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * decay / (1 - decay)
    if length <= 5:
        return None
    variance = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return math.sqrt((1 - decay) * variance)


def rangers(hyper: Mapping[str, Any]) -> dict[str, Factory]:
    """Label -> factory of every installed Ranger, or of the stand-in."""
    found: dict[str, Factory] = {}
    if importlib.util.find_spec("optimi"):
        optimi = importlib.import_module("optimi")
        found["optimi foreach"] = lambda groups: optimi.Ranger(groups, foreach=True, triton=False, **hyper)
    if importlib.util.find_spec("pytorch_optimizer"):
        pytorch_optimizer = importlib.import_module("pytorch_optimizer")
        extra = {"degenerated_to_sgd": True, "use_gc": False}
        found["pytorch_optimizer"] = lambda groups: pytorch_optimizer.Ranger(groups, **extra, **hyper)
    return found or {"ranger.py as foreach (stand-in)": lambda groups: ForeachRanger(groups, **hyper)}
