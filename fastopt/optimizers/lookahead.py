"""Lookahead around any optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from threading import get_ident
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastopt import memory
from fastopt.chain import Stage
from fastopt.engine import Due, Engine, capturing, is_due, pull_back
from fastopt.optimizers.base import Fused, entry, hide, torch_step
from fastopt.optimizers.slow import OF_LOOKAHEAD, SlowWeights, check_slow
from fastopt.rule import Condition, Hyper, Number, Rule, Slot, copy_of
from fastopt.turns import Turns

_OUR_STEP = inspect.unwrap(Fused.step)
K, ALPHA, STEP, SLOW = "lookahead_k", "lookahead_alpha", "lookahead_step", OF_LOOKAHEAD


def _due(group: dict[str, Any]) -> Due:
    """Whether the group synchronises at this step, or what its device counts by."""
    step, k = group[STEP], group[K]
    return (step, k) if isinstance(step, Tensor) else bool((step + 1) % k == 0)


class LookaheadRule(Rule):
    """Another rule with a slow copy of each parameter, which the group as a whole synchronises."""

    def __init__(self, inner: Rule) -> None:
        self.inner = inner
        self.hyper = (*inner.hyper, ALPHA)
        self.counters: Mapping[str, float] = inner.counters
        self.optional = inner.optional
        self.decouples = inner.decouples
        self.slow = Slot(SLOW, copy_of)

    def update(self, h: Hyper) -> tuple[Stage, ...]:
        return self.inner.update(h)

    def slots(self, h: Hyper) -> dict[str, Slot]:
        return self.inner.slots(h)

    def coefficients(self, h: Hyper, t: Number, carry: Number) -> tuple[Number, ...]:
        return self.inner.coefficients(h, t, carry)

    def twin(self, h: Hyper) -> tuple[str, dict[str, Number]] | None:
        return self.inner.twin(h)

    def carried(self, h: Hyper, t: Number, carry: Number, single: bool) -> Number:
        return self.inner.carried(h, t, carry, single)

    def patient(self, h: Hyper) -> bool:
        return self.inner.patient(h)

    def waits(self, h: Hyper, t: Number) -> Condition:
        return self.inner.waits(h, t)

    def decay(self, h: Hyper) -> Stage | None:
        return self.inner.decay(h)

    def alpha(self, h: Hyper) -> Number:
        alpha: Number = h.lookahead_alpha
        return alpha

    def check(self, h: Hyper) -> None:
        self.inner.check(h)

    def rows(self, h: Hyper, p: Tensor) -> int:
        return self.inner.rows(h, p)

    @property
    def centralises(self) -> bool:
        return self.inner.centralises

    def structure(self, h: Hyper) -> tuple[Any, ...]:
        return self.inner.structure(h)


class Lookahead(SlowWeights, Optimizer):
    r"""k steps of any optimizer, then one step of slow weights towards where it arrived; it restarts there.

    .. math::
        \phi \leftarrow \phi + \alpha\,(\theta_k - \phi), \quad \theta \leftarrow \phi \; \text{every } k \text{ steps}

    The paper's semantics: the slow weights φ start as the parameters before the first step and the first pull-back is
    at step k. (Several wrappers start them after the first inner step or at the first synchronisation, which delays
    the first pull-back to step k + 1 or 2k.) Steps are counted per parameter group, and parameters without a gradient
    are pulled back too. ``alpha=1`` is the inner optimizer bit for bit. Around one of ours the synchronisation is a
    stage of the same single pass; around any other optimizer it is torch code.

    ``param_groups``, ``state`` and ``defaults`` are the inner optimizer's own, so schedulers, `add_param_group`, AMP
    and checkpoints work as on any optimizer. The state dict is flat and also loads a checkpoint of the inner optimizer
    alone: the slow weights then start as the parameters at the next step.

    Args:
        optimizer: The inner optimizer, ours or any ``torch.optim.Optimizer``.
        k: Steps between synchronisations, at least 1 (default: 5).
        alpha: Step of the slow weights, in [0, 1] (default: 0.5). The paper's experiments use 0.5 and 0.8.

    Shapes:
        Adds ``slow_param``, shaped like the parameter, to the state of each parameter that was updated, and the keys
        ``lookahead_k``, ``lookahead_alpha`` and ``lookahead_step`` to each group, where they may be edited.

    Raises:
        TypeError: ``optimizer`` is not an optimizer, or is a Lookahead itself, or a ZeroRedundancyOptimizer.
        ValueError: ``k < 1`` or ``alpha`` outside [0, 1].

    Example:
        >>> import torch, fastopt
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = fastopt.Lookahead(fastopt.Adam(model.parameters(), lr=1e-3), k=5, alpha=0.5)
        >>> model(torch.ones(3, 4)).sum().backward()
        >>> optimizer.step()

    References:
        Zhang, Lucas, Hinton and Ba, "Lookahead Optimizer: k Steps Forward, 1 Step Back", NeurIPS 2019,
        arXiv:1907.08610.
    """

    slow_key = SLOW

    def __init__(self, optimizer: Optimizer, k: int = 5, alpha: float = 0.5) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if isinstance(optimizer, Lookahead):
            raise TypeError("Lookahead around Lookahead would share its state keys: wrap the innermost optimizer once")
        if any(base.__name__ == "ZeroRedundancyOptimizer" for base in type(optimizer).__mro__):
            raise TypeError(
                "Lookahead around ZeroRedundancyOptimizer could not be saved, for each process has the states of some "
                "parameters only: make Lookahead inside, as optimizer_class=lambda params, **settings: "
                "fastopt.Lookahead(fastopt.AdamW(params, **settings))"
            )
        check_slow(k, alpha)
        self.optimizer = optimizer
        self._defaults = {K: k, ALPHA: alpha}
        for group in optimizer.param_groups:
            self._complete(group)
        hide()
        super().__setstate__({})  # hooks and the profiled step, without a second set of groups

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.optimizer.defaults

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # A foreign optimizer would skip an overflow without our knowing: there the scaler unscales and skips itself.
        return self.fuses and bool(getattr(self.optimizer, "_step_supports_amp_scaling", False))

    @property
    def fuses(self) -> bool:
        """Whether the inner optimizer is one of ours, with its step as we wrote it and no slow weights of its own."""
        inner = self.optimizer
        return isinstance(inner, Fused) and inspect.unwrap(type(inner).step) is _OUR_STEP and inner.rule.slow is None

    def complete_groups(self) -> None:
        """Give groups that the inner optimizer was given, or loaded, what this one has in them."""
        for group in self.param_groups:
            self._complete(group)

    def _complete(self, group: dict[str, Any]) -> None:
        group.setdefault(K, self._defaults[K])
        group.setdefault(ALPHA, self._defaults[ALPHA])
        step = group.setdefault(STEP, 0)
        if isinstance(step, Tensor) and step.dtype != torch.float32:
            group[STEP] = int(step)  # somebody's edit; the kernels read their own
        check_slow(group[K], group[ALPHA])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):  # else torch says that it is none
            check_slow(param_group.get(K, self._defaults[K]), param_group.get(ALPHA, self._defaults[ALPHA]))
        self.optimizer.add_param_group(param_group)
        self._complete(self.optimizer.param_groups[-1])

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    @entry
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single step of the inner optimizer; every k-th one ends at the slow weights.

        Args:
            closure: Reevaluates the model and returns the loss.
        """
        if capturing():
            self._check_counts()
        return (self._step_ours if self.fuses else self._step_foreign)(closure)

    def _dues(self) -> list[Due]:
        """What each group does at this step: asked late, for a closure or a hook may have added groups."""
        self.complete_groups()
        return [_due(group) for group in self.param_groups]

    def _check_counts(self) -> None:
        """A graph that is captured decides at every replay what it decided now, unless its device counts."""
        if all(isinstance(g.get(STEP), Tensor) or g.get(K) == 1 for g in self.param_groups if g["params"]):
            return
        raise RuntimeError(
            "a CUDA graph is being captured, and this Lookahead counts its steps on the host, so replays would all "
            "synchronise or none would: wrap one of fastopt's optimizers that takes capturable=True, with that and the "
            "parameters of each group on one device, and run a step before capturing; or leave the optimizer's step "
            "out of the graph"
        )

    def _advance(self) -> None:
        """Count the step, on the device for groups whose steps are counted there: a replayed graph must count too."""
        counts = self.engine().counts if self.fuses else []
        on_device: dict[torch.device, list[Tensor]] = {}
        for i, group in enumerate(self.param_groups):
            if not (i < len(counts) and counts[i] and group["params"]):
                group[STEP] = int(group[STEP]) + 1
                continue
            if not isinstance(group[STEP], Tensor):
                where = group["params"][0].device
                group[STEP] = torch.full((), float(group[STEP]), dtype=torch.float32, device=where)
            on_device.setdefault(group[STEP].device, []).append(group[STEP])
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for device, steps in on_device.items():
            # Several processes or devices may have overflowed: it is their number then.
            taken: Any = 1.0 if found_inf is None else (found_inf == 0).to(device, torch.float32).reshape(())
            torch._foreach_add_(steps, taken)

    def _step_ours(self, closure: Callable[[], Any] | None) -> Any:
        """The inner step() itself, so that its hooks and schedulers see it, with our stage in the same pass."""

        def drive() -> None:
            with self._turn():  # to step and to count it is one thing for other threads
                if self.engine().step(self.optimizer, amp=self, sync=self._dues()):
                    self._advance()

        own, me = vars(self.optimizer), get_ident()
        with self._turn():
            own.setdefault("_drive", {})[me] = drive
        try:
            return self.optimizer.step(closure) if closure else self.optimizer.step()
        finally:
            with self._turn():
                del own["_drive"][me]
                if not own["_drive"]:
                    del own["_drive"]

    def _turn(self) -> Any:
        turns: Turns = vars(self).setdefault("_turns", Turns())  # the same for all threads, whoever comes first
        return turns()

    def engine(self) -> Engine:
        """The engine that runs the inner rule with slow weights appended."""
        inner = self.optimizer
        assert isinstance(inner, Fused)
        held: tuple[Optimizer, Engine] | None = vars(self).get("_held")
        if held is None or held[0] is not inner:
            rule = LookaheadRule(inner.rule)
            engine = Engine(rule, torch_step(inner), inner.backend, ignored=(STEP,), defaults=inner.defaults)
            self._held = held = (inner, engine)
        return held[1]

    def _step_foreign(self, closure: Callable[[], Any] | None) -> Any:
        # State of an optimizer that initialises lazily must not exist before its first step, so the copies of the
        # parameters wait outside. With a closure, gradients only appear inside the step.
        before: dict[Tensor, Tensor] = {}
        self.complete_groups()
        for group in self.param_groups:
            for p in group["params"]:
                if self.state.get(p, {}).get(SLOW) is None and (p.requires_grad if closure else p.grad is not None):
                    before[p] = memory.copy_of(p)
        loss = self.optimizer.step(closure) if closure else self.optimizer.step()
        for p, slow in before.items():
            if p.grad is not None:
                self.state[p][SLOW] = slow
        for group, due in zip(self.param_groups, self._dues(), strict=True):
            if is_due(due):
                for p in group["params"]:
                    pull_back(p, self.state.get(p, {}).get(SLOW), float(group[ALPHA]))
        self._advance()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's own, with what it adds to it; groups and states hold the slow weights."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        self.complete_groups()
        state_dict = self.optimizer.state_dict()
        for group in state_dict["param_groups"]:
            group[STEP] = int(group[STEP])
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class, or of the inner optimizer alone.

        Raises:
            ValueError: The groups or the shapes do not match; nothing is changed then.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        self.complete_groups()
        own = [{key: group[key] for key in (K, ALPHA)} for group in self.param_groups]
        for group in state_dict["param_groups"]:
            check_slow(group.get(K, 1), group.get(ALPHA, 1.0))
        self.optimizer.load_state_dict(self._detached(state_dict))
        for group, kept in zip(self.param_groups, own, strict=True):
            for key, value in kept.items():
                group.setdefault(key, value)
            self._complete(group)
        if (held := vars(self).get("_held")) is not None:
            held[1].renew()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _detached(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The dict with slow weights of its own, their shapes checked. Our optimizers copy them, torch's would share
        the caller's tensors."""
        copies = isinstance(self.optimizer, Fused)
        saved = {name: dict(value) for name, value in state_dict["state"].items()}
        for i, (group, ours) in enumerate(zip(state_dict["param_groups"], self.param_groups, strict=False)):
            for name, p in zip(group["params"], ours["params"], strict=False):
                slow = saved.get(name, {}).get(SLOW)
                if slow is None:
                    continue
                if slow.shape != p.shape:
                    raise ValueError(
                        f"{SLOW} for parameter {name} in group {i} has shape {tuple(slow.shape)}, the parameter has "
                        f"{tuple(p.shape)}: load a state that was saved for this model"
                    )
                if not copies and self.state.get(p, {}).get(SLOW) is not slow:
                    saved[name][SLOW] = slow.detach().clone()
        return state_dict | {"state": saved}

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "_defaults": self._defaults}

    def __setstate__(self, state: dict[str, Any]) -> None:
        hide()
        super().__setstate__(state)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"
