"""Other people's optimizers that do the work of ours, each only where it is installed and runs; `peers.txt` names the
releases that `make bench` looks for. Where there is no package with a Ranger, a transcription of ranger.py in foreach
operations stands in.

All are configured to do the work of fastopt's rule: torch's defaults, momentum steps before RAdam's threshold,
decoupled decay, and no gradient centralisation in Ranger (optimi has none; the raced tensors are one-dimensional, where
it does not apply). Whether they did is measured after each race. Where they cannot, `different` says why.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
import logging
import math
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
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


@dataclass(frozen=True)
class Peer:
    """A class of another package for one of our rules; a Lookahead wraps torch's foreach Adam. `takes`: the
    hyper-parameters it has, by torch's names; `fixed`: what makes it do the same work; `device`: where it runs, "" for
    everywhere; `needs`: what has to be asked of it."""

    label: str
    rule: str
    module: str
    name: str
    takes: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    device: str = ""
    different: str = ""
    needs: str = ""

    def factory(self, settings: Mapping[str, Any]) -> Factory:
        cls = getattr(load(self.module), self.name)
        given = {key: settings[key] for key in self.takes.split() if key in settings}
        if self.rule == "Lookahead":
            slow, adam = split({key: settings[key] for key in self.takes.split() if key in settings})
            return lambda groups: cls(torch.optim.Adam(groups, foreach=True, **adam), **slow, **self.fixed)
        return lambda groups: cls(groups, **given, **self.fixed)

    def can(self, hyper: Mapping[str, Any]) -> bool:
        here = "cuda" if torch.cuda.is_available() else "cpu"
        return (
            self.device in ("", here)
            and {*self.needs.split()} <= {*hyper} <= {*self.takes.split()}
            and installed(self.module)
        )


ADAM = "lr betas eps weight_decay"
OPTIMI = {"foreach": True, "triton": False}
OPTIMI_TRITON = {"foreach": False, "triton": True}
UNQUANTISED = {"quantize": False, "compress_state_dict": False, "master_weight_bits": None, "fused": False}
PLAIN_RANGER = {"degenerated_to_sgd": True, "use_gc": False}

PEERS = (
    *(
        Peer(label, name, "optimi", name, takes, fixed, device)
        for label, fixed, device in (("optimi foreach", OPTIMI, ""), ("optimi triton", OPTIMI_TRITON, "cuda"))
        for name, takes in (
            ("SGD", "lr momentum weight_decay"),
            *((name, ADAM) for name in ("Adam", "AdamW", "RAdam")),
            ("Ranger", f"{ADAM} k alpha"),
        )
    ),
    Peer("pytorch_optimizer", "RAdam", "pytorch_optimizer", "RAdam", ADAM, {"degenerated_to_sgd": True}),
    Peer("pytorch_optimizer", "Adamax", "pytorch_optimizer", "AdaMax", ADAM),
    Peer("pytorch_optimizer", "Ranger", "pytorch_optimizer", "Ranger", f"{ADAM} k alpha", PLAIN_RANGER),
    *(
        Peer(label, "Lookahead", module, "Lookahead", "k alpha lr", different=different)
        for label, module, different in (
            ("pytorch_optimizer", "pytorch_optimizer", ""),
            ("timm", "timm.optim.lookahead", "its slow weights begin at the first synchronisation, not before"),
        )
    ),
    Peer("timm", "AdamW", "timm.optim.adamw", "AdamWLegacy", f"{ADAM} amsgrad", {"foreach": True}),
    Peer("timm", "RAdam", "timm.optim.radam", "RAdamLegacy", ADAM),
    Peer(
        "timm (TF)",
        "RMSprop",
        "timm.optim.rmsprop_tf",
        "RMSpropTF",
        "lr alpha eps momentum centered",
        different="TensorFlow's rule: eps under the root, the mean square begins at 1",
    ),
    *(
        Peer("bitsandbytes 32-bit", name, "bitsandbytes.optim", f"{name}32bit", takes, needs=needs)
        for name, takes, needs in (
            ("Adam", ADAM, ""),
            ("AdamW", ADAM, ""),
            ("SGD", "lr momentum weight_decay", "momentum"),
            ("RMSprop", "lr alpha eps weight_decay", ""),
            ("Adagrad", "lr eps", ""),
        )
    ),
    *(Peer("flashoptim", name, "flashoptim", f"Flash{name}", ADAM, UNQUANTISED) for name in ("Adam", "AdamW")),
    Peer("flashoptim", "SGD", "flashoptim", "FlashSGD", "lr momentum weight_decay", UNQUANTISED),
    Peer("torchao", "AdamW", "torchao.optim", "_AdamW", f"{ADAM} amsgrad"),
    *(
        Peer(label, name, module, "FusedAdam", ADAM, {"adam_w_mode": name == "AdamW"}, "cuda")
        for label, module in (
            ("apex", "apex.optimizers"),
            ("TransformerEngine", "transformer_engine.pytorch.optimizers"),
        )
        for name in ("Adam", "AdamW")
    ),
    *(
        Peer(label, "SGD", module, "FusedSGD", "lr momentum weight_decay", device="cuda")
        for label, module in (
            ("apex", "apex.optimizers"),
            ("TransformerEngine", "transformer_engine.pytorch.optimizers"),
        )
    ),
    Peer("apex", "Adagrad", "apex.optimizers", "FusedAdagrad", "lr eps", device="cuda"),
)


def split(hyper: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of Lookahead itself, and those of the Adam inside."""
    own = {key: value for key, value in hyper.items() if key in ("k", "alpha")}
    return own, {key: value for key, value in hyper.items() if key not in own}


def of(rule: str, hyper: Mapping[str, Any]) -> dict[str, Factory]:
    """Label -> factory of every installed class that has all of `hyper`; a stand-in for Ranger if there is none."""
    settings = {**defaults(rule), **hyper}
    found = {peer.label: peer.factory(settings) for peer in PEERS if peer.rule == rule and peer.can(hyper)}
    if rule == "Ranger" and not found:
        return {"ranger.py as foreach (stand-in)": lambda groups: ForeachRanger(groups, **hyper)}
    return found


TAILS = "(updates only what fills no vector of the processor, pytorch#191763)"
FLOAT32 = "(its counter and so its coefficients are float32 tensors)"


def rounds_otherwise(label: str, rule: str) -> str:
    """What the contender rounds otherwise, the same way in every step, if that is what its results are apart by."""
    return "the decay" if (label, rule) == ("torch fused", "AdamW") else ""


def why_different(label: str, rule: str, mix: str = "fp32") -> str:
    """Why the contender does other work, in parentheses; empty if it is meant to do the same."""
    if (label, rule, mix) == ("torch fused", "SGD", "bf16"):
        return TAILS
    if label == "torch.compile":
        return FLOAT32
    return next(
        (f"({peer.different})" for peer in PEERS if peer.different and (peer.label, peer.rule) == (label, rule)), ""
    )


def defaults(rule: str) -> dict[str, Any]:
    """Of fastopt's class, which are torch's; other packages have others."""
    import fastopt

    parameters = inspect.signature(getattr(fastopt, rule)).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def installed(module: str) -> bool:
    """Whether it is, and can be imported."""
    try:
        load(module)
    except Exception:  # a package built for another torch may raise anything
        return False
    return True


def load(module: str) -> Any:
    """Import it without what it says while importing. timm imports torchvision, which its optimizers do not need."""
    quiet = io.StringIO()
    if module.startswith("timm.optim") and "timm" not in sys.modules:
        spec = importlib.util.find_spec("timm")
        if spec is None or spec.origin is None:
            raise ImportError("timm is not installed")
        for package, path in (("timm", Path(spec.origin).parent), ("timm.optim", Path(spec.origin).parent / "optim")):
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [str(path)]
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        logging.disable(logging.WARNING)
        try:
            return importlib.import_module(module)
        finally:
            logging.disable(logging.NOTSET)
