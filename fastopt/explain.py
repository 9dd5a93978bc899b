"""`explain`: what a step of an optimizer will do, as a table, without doing it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from fastopt import routing
from fastopt.engine import Engine, Route
from fastopt.optimizers.base import Fused
from fastopt.optimizers.lookahead import Lookahead
from fastopt.report import table
from fastopt.setting import Setting

_HIDDEN = ("params", "param_names", "foreach", "capturable", "differentiable", "fused")


@dataclass(frozen=True)
class GroupRow:
    """One parameter group."""

    index: int
    tensors: int
    parameters: int
    parameter_bytes: int
    state_bytes: int
    hyper: str


@dataclass(frozen=True)
class BackendRow:
    """What one backend takes on one device: tensors, launches, and bytes read and written per step."""

    backend: str
    device: str
    chain: str
    tensors: int
    launches: str
    bytes_per_step: int


@dataclass(frozen=True)
class FallbackRow:
    """Tensors that the kernels do not take, and why."""

    group: int
    positions: tuple[int, ...]
    backend: str
    reason: str


@dataclass(frozen=True)
class Explanation:
    """The answer of `explain`; ``str()`` lays it out as tables."""

    name: str
    groups: tuple[GroupRow, ...]
    backends: tuple[BackendRow, ...]
    fallbacks: tuple[FallbackRow, ...]

    def __str__(self) -> str:
        parts = [self.name, "", self._groups(), "", self._backends()]
        if self.fallbacks:
            parts += ["", "Not taken by the kernels:"]
            parts += [
                f"  group {row.group}, tensor {_ranges(row.positions)}: {row.backend}, because {row.reason}"
                for row in self.fallbacks
            ]
        return "\n".join(parts)

    def _groups(self) -> str:
        rows = [
            (str(g.index), str(g.tensors), f"{g.parameters:,}", _size(g.parameter_bytes), _size(g.state_bytes), g.hyper)
            for g in self.groups
        ]
        return table(("group", "tensors", "parameters", "size", "state", "hyper-parameters"), rows)

    def _backends(self) -> str:
        rows = [
            (b.backend, b.device, str(b.tensors), b.launches, _size(b.bytes_per_step), b.chain) for b in self.backends
        ]
        return table(("backend", "device", "tensors", "launches", "moved per step", "chain"), rows, left=2)


def explain(optimizer: Optimizer) -> Explanation:
    """Show, as a table, what a step of `optimizer` will do.

    Groups with their hyper-parameters and the bytes of parameters and state; which backend takes how many tensors in
    how many launches, and the bytes it reads and writes per step (slow weights counted at 1/k); which tensors fall back
    to other code, and why. State that does not exist yet is counted as it will be; of what is sharded, bytes are those
    of this process. Nothing is changed.

    Args:
        optimizer: One of ours.

    Raises:
        TypeError: `optimizer` is not one of ours; `fastopt.convert` makes it one.

    Example:
        >>> import torch, fastopt
        >>> print(fastopt.explain(fastopt.Adam(torch.nn.Linear(4, 2).parameters())))  # doctest: +SKIP
    """
    engine, owner, period = _engine(optimizer)
    settings = list(map(engine.settings.of, owner.param_groups))
    routes = engine.routes(owner, [group["params"] for group in owner.param_groups], settings)
    groups: list[GroupRow] = []
    chains: dict[tuple[Route, str, str], list[tuple[Tensor, Setting, int]]] = {}
    fallbacks: dict[tuple[int, str, str], list[int]] = {}
    for i, (group, setting) in enumerate(zip(owner.param_groups, settings, strict=True)):
        params: list[Tensor] = group["params"]
        groups.append(_group_row(i, group, setting, owner))
        for k, p in enumerate(params):
            idle = engine.is_idle(setting, p, owner.state.get(p, {}))
            route = engine.idle_route if idle else routes[id(p)]
            taker = Route(route.backend, device=route.device)
            chains.setdefault((taker, str(p.device), setting.chain.name), []).append((p, setting, period(group)))
            if route.reason:
                fallbacks.setdefault((i, route.backend, route.reason), []).append(k)
    return Explanation(
        f"{type(optimizer).__name__}" + (f"({type(owner).__name__})" if owner is not optimizer else ""),
        tuple(groups),
        tuple(_backend_row(*taker, taken, owner) for taker, taken in chains.items()),
        tuple(FallbackRow(i, tuple(at), backend, reason) for (i, backend, reason), at in fallbacks.items()),
    )


def _engine(optimizer: Optimizer) -> tuple[Engine, Optimizer, Any]:
    """The engine, the optimizer whose state it drives, and how many steps apart a group synchronises."""
    if isinstance(optimizer, Lookahead) and optimizer.fuses:
        optimizer.complete_groups()
        return optimizer.engine(), optimizer.optimizer, lambda group: group["lookahead_k"]
    if isinstance(optimizer, Fused):
        return optimizer.engine(), optimizer, lambda group: group.get("k", 1)
    if isinstance(optimizer, Lookahead):
        inner = type(optimizer.optimizer).__name__
        raise TypeError(
            f"this Lookahead runs as torch code around {inner}, whose step it cannot extend, so there is no plan to "
            "explain: wrap one of fastopt's optimizers that has no slow weights of its own (fastopt.convert(optimizer) "
            "makes one of torch.optim's, before Lookahead is put around it)"
        )
    raise TypeError(
        f"explain() needs an optimizer of fastopt, got {type(optimizer).__name__}; fastopt.convert(optimizer) makes it "
        "one if it has a counterpart"
    )


def _size_of(t: Tensor) -> int:
    """Bytes in this process."""
    t = routing.within(t)
    return 0 if is_lazy(t) else t.numel() * t.element_size()


def _state_bytes(p: Tensor, setting: Setting, owner: Optimizer) -> dict[str, int]:
    """Of each state tensor by its name in the rule, as it is stored or will be."""
    own = owner.state.get(p, {})
    return {
        name: _size_of(tensor if isinstance(tensor := own.get(slot.key), Tensor) else p)
        for name, slot in setting.named_slots.items()
    }


def _group_row(index: int, group: dict[str, Any], setting: Setting, owner: Optimizer) -> GroupRow:
    params: list[Tensor] = group["params"]
    hyper = ", ".join(
        f"{key}={_number(value)}" for key, value in group.items() if key not in _HIDDEN and value is not False
    )
    state = sum(sum(_state_bytes(p, setting, owner).values()) for p in params)
    counters = 4 * len(setting.rule.counters) * len(params)
    return GroupRow(
        index,
        len(params),
        sum(p.numel() for p in params if not is_lazy(p)),
        sum(map(_size_of, params)),
        state + counters,
        hyper,
    )


def _backend_row(
    route: Route, device: str, chain: str, taken: list[tuple[Tensor, Setting, int]], owner: Optimizer
) -> BackendRow:
    moved = 0.0
    for p, setting, period in taken:
        state = _state_bytes(p, setting, owner)
        gradient = _size_of(p if p.grad is None or p.grad.layout != torch.strided else p.grad)
        # Of g, p and the states, all are read and all but g written.
        moved += gradient + 2 * (_size_of(p) + sum(state[name] for name in setting.chain.state))
        if setting.rule.slow is not None:
            moved += 2 * state["slow"] / period
    code = chain if route.backend != "torch" else "torch.optim code"
    return BackendRow(route.backend, device, code, len(taken), _launches(route, taken, owner), round(moved))


def _launches(route: Route, taken: list[tuple[Tensor, Setting, int]], owner: Optimizer) -> str:
    """On a device one for each way of storing parameter and state, and one that makes the rows of counted tensors."""
    if not route.device:
        return {"native": "1 for all", "reference": "several a tensor"}.get(route.backend, "torch's own")
    stored = {
        (p.dtype, *(owner.state[p][key].dtype if key in owner.state.get(p, {}) else p.dtype for key in setting.slots))
        for p, setting, _ in taken
    }
    counted = any(setting.rule.counters and setting.counts_on_device for _, setting, _ in taken)
    return f"{len(stored)} + 1" if counted else str(len(stored))


def _number(value: Any) -> str:
    if not isinstance(value, Tensor):
        return str(value)
    return f"tensor({value.item():g})" if value.numel() == 1 else f"tensor of shape {tuple(value.shape)}"


def _size(n: int) -> str:
    amount = float(n)
    for unit in ("B", "KB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    raise AssertionError("unreachable")


def _ranges(positions: tuple[int, ...]) -> str:
    """1, 2, 3, 7 as 1-3, 7."""
    runs: list[list[int]] = []
    for at in positions:
        if runs and runs[-1][1] == at - 1:
            runs[-1][1] = at
        else:
            runs.append([at, at])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
