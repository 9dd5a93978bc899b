"""Shared by the tests of Lookahead: inner optimizers of ours and of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import ramp

import fastopt

# name -> makes the inner optimizer. Ours run fused with Lookahead; the rest is foreign code, lazily initialised or not.
INNER: dict[str, Callable[[Any], Any]] = {
    "ours-sgd": lambda ps: fastopt.SGD(ps, lr=0.1, momentum=0.9),
    "ours-adam": lambda ps: fastopt.Adam(ps, lr=0.05),
    "ours-nadam-reference": lambda ps: fastopt.NAdam(ps, lr=0.05, backend="reference"),
    "ours-ranger": lambda ps: fastopt.Ranger(ps, lr=0.05, k=3),
    "torch-sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "torch-plain-sgd": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "torch-adam": lambda ps: torch.optim.Adam(ps, lr=0.05),
    "torch-fused-adam": lambda ps: torch.optim.Adam(ps, lr=0.05, fused=True),
    "torch-rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.05),
    "torch-adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.05),
    "torch-adadelta": lambda ps: torch.optim.Adadelta(ps, lr=0.5),
    "torch-asgd": lambda ps: torch.optim.ASGD(ps, lr=0.05),
    "torch-rprop": lambda ps: torch.optim.Rprop(ps, lr=0.05),
}  # fmt: skip
each_inner = pytest.mark.parametrize("inner", INNER)


def params() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(ramp(9)), torch.nn.Parameter(ramp(12).reshape(3, 4))]


def plain_sgd(value: float = 0.0, k: int = 5, alpha: float = 0.5, **kwargs: Any) -> tuple[Any, Any]:
    p = torch.nn.Parameter(torch.tensor([value]))
    return p, fastopt.Lookahead(fastopt.SGD([p], lr=1.0, **kwargs), k=k, alpha=alpha)


def watch_checkpoints(optimizer: Any, calls: list[str]) -> None:
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("save pre"))
    optimizer.register_state_dict_post_hook(lambda o, d: calls.append("save post"))
    optimizer.register_load_state_dict_pre_hook(lambda o, d: calls.append("load pre"))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("load post"))
