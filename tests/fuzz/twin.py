"""The defined numbers for any mix of dtypes, and for state that users save, load, drop and edit.

Each parameter has a contiguous shadow of its compute dtype (float32, or float64 for float64) inside one oracle of
tests/oracles.py; after every step parameters and states are rounded to the dtypes they are stored in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import oracles
import torch
from cases import Case
from torch import Tensor

INITIAL = {"mu_product": 1.0}
SLOW = ("slow_param", "slow_buffer")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(eq=False)
class Member:
    """One parameter: its shadow, and the dtypes in which it and its states are stored."""

    shadow: torch.nn.Parameter
    dtype: torch.dtype
    stored: dict[str, torch.dtype] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)
    """State keys that were deleted; the next gradient brings them back."""

    @classmethod
    def of(cls, p: Tensor) -> Member:
        value = p.detach().to(compute_dtype(p.dtype)).clone(memory_format=torch.contiguous_format)
        return cls(torch.nn.Parameter(value), p.dtype)

    def kind(self, key: str) -> torch.dtype | None:
        """The dtype a state is stored in; None for counters, which the oracle keeps as torch does."""
        if key in oracles.SCALAR_STATES:
            return self.stored.get(key)
        return self.stored.get(key, self.dtype)


@dataclass
class Saved:
    """What a checkpoint holds."""

    groups: list[dict[str, Any]]
    members: list[list[tuple[dict[str, Tensor], dict[str, torch.dtype], set[str]]]]
    steps: list[int]

    def fits(self, groups: list[list[Member]]) -> bool:
        return [len(g) for g in self.members] == [len(g) for g in groups]


class _RoundedInner:
    """Two optimizers one after the other: what the first one stores is what the second one finds."""

    def __init__(self, inner: Any, finish: Any) -> None:
        self.inner, self.param_groups, self.finish = inner, inner.param_groups, finish

    @property
    def state(self) -> Any:
        return self.inner.state

    def step(self) -> None:
        self.inner.step()
        self.finish()


class Twin:
    def __init__(self, case: Case, groups: list[dict[str, Any]]) -> None:
        self.case = case
        self.groups = [[Member.of(p) for p in group["params"]] for group in groups]
        self.inner = self._make(groups, self.groups)
        inner = _RoundedInner(self.inner, self.round) if case.name == "Ranger" and case.lookahead else self.inner
        self.oracle = oracles.Lookahead(inner, *case.lookahead) if case.lookahead else self.inner
        self.round()

    def _make(self, groups: list[dict[str, Any]], members: list[list[Member]]) -> Any:
        slow = dict(zip(("lookahead_k", "lookahead_alpha"), self.case.lookahead or (), strict=False))
        shadows = [{**slow, **g, "params": [m.shadow for m in own]} for g, own in zip(groups, members, strict=True)]
        if self.case.name == "Ranger":
            return oracles.Ranger(shadows, **self.case.kwargs)
        return oracles.TorchLoop(self.case.name, shadows, **self.case.kwargs)

    @property
    def members(self) -> list[Member]:
        return [member for group in self.groups for member in group]

    def hyper(self, group: int) -> dict[str, Any]:
        hyper: dict[str, Any] = self.inner.param_groups[group]
        return hyper

    def states(self, member: Member) -> dict[str, Tensor]:
        """As they are stored."""
        found = oracles.states_of(self.oracle, member.shadow)
        return {k: v if (kind := member.kind(k)) is None else oracles.rounded(v, kind) for k, v in found.items()}

    def step(self, grads: list[Tensor | None]) -> None:
        for member, grad in zip(self.members, grads, strict=True):
            dtype = compute_dtype(member.dtype)
            grad = None if grad is None else grad.to(dtype)
            member.shadow.grad = grad.contiguous() if grad is not None and grad.layout == torch.strided else grad
            if grad is not None:
                member.dropped.clear()
                self._begin(member)
                if compute_dtype(member.dtype) != member.dtype:  # a counter goes on in float32
                    member.stored.pop("mu_product", None)
        # Slow weights begin with a parameter's first gradient, and until then nothing pulls it.
        waiting = [m for m in self.members if m.shadow.grad is None and m.shadow not in self._slow]
        values = [m.shadow.detach().clone() for m in waiting]
        self.oracle.step()
        for member, value in zip(waiting, values, strict=True):
            member.shadow.data.copy_(value)
            self._slow.pop(member.shadow, None)
        self.round()

    def _begin(self, member: Member) -> None:
        """The one state that does not start at zero exists, and is rounded, before the first step."""
        if self.case.name == "Adagrad" and not self.inner.state.get(member.shadow):
            first = torch.full_like(member.shadow, self._accumulated, requires_grad=False)
            self.inner.state[member.shadow] = {"step": torch.tensor(0.0), "sum": first.to(member.dtype).to(first.dtype)}

    @property
    def _accumulated(self) -> float:
        value: float = self.hyper(0)["initial_accumulator_value"]
        return value

    @property
    def _slow(self) -> dict[Tensor, Tensor]:
        slow: dict[Tensor, Tensor] = getattr(self.oracle, "slow", {})
        return slow

    @torch.no_grad()
    def round(self) -> None:
        for member in self.members:
            member.shadow.copy_(member.shadow.to(member.dtype))
            for key, value in oracles.states_of(self.oracle, member.shadow).items():
                if (kind := member.kind(key)) is not None:
                    value.copy_(oracles.rounded(value, kind))

    def add_group(self, group: dict[str, Any]) -> None:
        self.groups.append([Member.of(p) for p in group["params"]])
        self.inner.param_groups.append(self._make([group], self.groups[-1:]).param_groups[0])

    def replace(self, index: int, p: Tensor) -> None:
        """Another parameter in the place of one, without state."""
        self.drop(self.members[index])
        for own, group in zip(self.groups, self.inner.param_groups, strict=True):
            if index < len(own):
                own[index] = Member.of(p)
                group["params"][index] = own[index].shadow
                return
            index -= len(own)

    def cast(self) -> None:
        """What torch's load_state_dict does: everything but `step` takes the parameter's dtype."""
        for member in self.members:
            member.stored.clear()
            state = self.inner.state.get(member.shadow, {})
            if "mu_product" in state:
                state["mu_product"] = state["mu_product"].to(compute_dtype(member.dtype))
                member.stored["mu_product"] = member.dtype
        self.round()

    def drop(self, member: Member) -> None:
        self.inner.state.pop(member.shadow, None)
        self._slow.pop(member.shadow, None)
        member.stored.clear()
        member.dropped.clear()

    def drop_key(self, member: Member, key: str) -> None:
        """A state that was deleted begins again; without a momentum buffer SGD is at its first step."""
        state = self.inner.state[member.shadow]
        member.stored.pop(key, None)
        if self.case.name == "SGD":
            del state[key]
            return
        first = self._accumulated if key == "sum" else INITIAL.get(key, 0)
        state[key] = torch.full_like(state[key], first)
        member.dropped.add(key)
        self.round()

    def save(self) -> Saved:
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.inner.param_groups]
        members = [
            [
                (
                    {k: v.detach().clone() for k, v in oracles.states_of(self.oracle, m.shadow).items()},
                    dict(m.stored),
                    set(m.dropped),
                )
                for m in own
            ]
            for own in self.groups
        ]
        return Saved(groups, members, list(getattr(self.oracle, "steps", ())))

    def load(self, saved: Saved) -> None:
        for group, values in zip(self.inner.param_groups, saved.groups, strict=True):
            group.update(values)
        if isinstance(self.oracle, oracles.Lookahead):
            self.oracle.steps = list(saved.steps)
        for own, members in zip(self.groups, saved.members, strict=True):
            for member, (states, stored, dropped) in zip(own, members, strict=True):
                self.drop(member)
                member.stored, member.dropped = dict(stored), set(dropped)
                states = {k: v.clone() for k, v in states.items()}
                if "slow_param" in states:
                    self._slow[member.shadow] = states.pop("slow_param")
                if states:
                    self.inner.state[member.shadow] = states
