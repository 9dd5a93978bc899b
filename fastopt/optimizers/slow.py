"""Slow weights: where Lookahead and Ranger keep them, and how to evaluate on them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

if TYPE_CHECKING:
    _Base = Optimizer
else:
    _Base = object


OF_LOOKAHEAD = "slow_param"
"""The state that a Lookahead adds to those of the optimizer inside it."""


def check_slow(k: Any, alpha: Any) -> None:
    """Reject what no slow weights can be run with, before anything is changed."""
    if not isinstance(k, Integral) or isinstance(k, bool) or k < 1:
        raise ValueError(f"Invalid k value: {k}; the steps between synchronisations are an integer of at least 1")
    if not isinstance(alpha, (Real, Tensor)) or not 0.0 <= alpha <= 1.0:  # type: ignore[operator]
        raise ValueError(f"Invalid alpha value: {alpha}; the step of the slow weights is in [0, 1]")


def _refuse(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    raise RuntimeError("step() inside slow_weights(): the update would be undone at the end of the block; step outside")


def _reshard(model: Module | None) -> None:
    """Have FSDP2's modules let go of the whole parameters that they keep from a forward pass to the next."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # where it was not imported it shards nothing
    for module in model.modules() if model is not None and fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):  # type: ignore[union-attr]
            module.reshard()


def _put_back(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Writes every value that can be written, and then raises what was wrong with the first of the others."""
    wrong: list[RuntimeError] = []
    with torch.no_grad():
        for p, value in zip(params, values, strict=True):
            try:
                p.copy_(value)
            except RuntimeError as error:
                wrong.append(error)
    if wrong:
        raise wrong[0]


class SlowWeights(_Base):
    """Mixin of optimizers whose state holds a slow copy of each parameter under `slow_key`."""

    slow_key: ClassVar[str]

    @contextmanager
    def slow_weights(self, model: Module | None = None) -> Iterator[None]:
        """Put the slow weights into the parameters for the duration of a ``with`` block, then the fast ones back.

        The published results of Lookahead are those of the slow weights. A parameter that was never updated keeps its
        value: that is its slow weight. Buffers are the model's own: running statistics of batch normalisation stay
        those of the fast weights.

        Args:
            model: The model that the parameters are of, if FSDP2's ``fully_shard`` has been at it: after a forward pass
                it may go on with parameters that it has gathered, and has to gather these.

        Raises:
            RuntimeError: ``step()`` is called inside the block, whose end would undo it.

        Example:
            >>> import torch, fastopt
            >>> model = torch.nn.Linear(4, 2)
            >>> optimizer = fastopt.Lookahead(fastopt.SGD(model.parameters(), lr=0.1))
            >>> model(torch.ones(3, 4)).sum().backward()
            >>> optimizer.step()
            >>> with optimizer.slow_weights():
            ...     loss = model(torch.ones(3, 4)).sum()
        """
        _reshard(model)
        pairs = [
            (p, slow)
            for group in self.param_groups
            for p in group["params"]
            if p in self.state and (slow := self.state[p].get(self.slow_key)) is not None
        ]
        wrapped: Optimizer | None = getattr(self, "optimizer", None)
        refusals = [one.register_step_pre_hook(_refuse) for one in (self, wrapped) if one is not None]
        fast: list[Tensor] = []
        try:
            with torch.no_grad():
                fast += [p.detach().clone() for p, _ in pairs]  # all of them before any is written: memory may run out
                for p, slow in pairs:
                    p.copy_(slow)
            yield
        finally:
            for refusal in refusals:
                refusal.remove()
            try:
                _reshard(model)
            finally:
                _put_back([p for p, _ in pairs[: len(fast)]], fast)
