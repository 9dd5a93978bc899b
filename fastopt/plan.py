"""State and work: what a step has to create, and the Python twin of the compiled Plan.

`missing_state` makes what a parameter lacks; the engine attaches it when all of it is there, so that running out of
memory leaves the optimizer as it was. `PythonPlan` answers to the same calls as ``_C.Plan`` (build, gather, launch, and
release, which lets go of everything) and drives backends that have no plan of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fastopt import routing
from fastopt.backends import reference
from fastopt.backends.amp import NONE, Amp
from fastopt.rule import to_single
from fastopt.setting import Counts, Flags, Groups, Row, Setting, State

SettingOf = Callable[[Mapping[str, Any]], Setting]


def counter_dtype(setting: Setting) -> torch.dtype:
    """The dtype torch gives to `step`: float64 only under a float64 default dtype, and never for fused."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 and not setting.h.fused else torch.float32


def create_counter(setting: Setting, p: Tensor, value: float) -> Tensor:
    device = p.device if setting.counts_on_device else "cpu"
    return torch.full((), float(value), dtype=counter_dtype(setting), device=device)


def missing_state(setting: Setting, p: Tensor, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state p lacks, key by key: counters first, then tensors, in the order torch creates them."""
    new: dict[str, Tensor] = {}
    for key, first in setting.rule.counters.items():
        if not isinstance(state.get(key), Tensor):
            new[key] = create_counter(setting, p, state.get(key, first))
    if state:  # counters that are all new are as they should be
        new |= mended_counters(setting, p, {**state, **new})
    for slot in setting.named_slots.values():
        if state.get(slot.key) is None:
            new[slot.key] = slot.create(p, setting.h)
    return new


def mended_counters(setting: Setting, p: Tensor, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Counters that go on in float32, and where ``step`` is: torch's loading casts NAdam's ``mu_product`` to the
    dtype of a 16-bit parameter, and takes it to the parameter's device while ``step`` stays behind. They all follow the
    parameter when its group was told later that the device counts."""
    floats, whole = (torch.float32, torch.float64), (torch.int32, torch.int64)
    kept = {key: floats + (whole if key == "step" else ()) for key in setting.rule.counters}  # no product is whole
    found = {key: value for key in setting.rule.counters if isinstance(value := state.get(key), Tensor)}
    home = next((value.device for value in found.values()), None)
    if setting.counts_on_device and home is not None and home.type == "cpu":
        home = p.device
    return {
        key: value.to(home, value.dtype if value.dtype in kept[key] else torch.float32)
        for key, value in found.items()
        if value.dtype not in kept[key] or value.device != home
    }


_RELEASED = "the storage of state {key!r} of {where} was released: fill it again before step()"


def check_state(setting: Setting, p: Tensor, state: Mapping[str, Any], where: str) -> None:
    for slot in setting.named_slots.values():
        tensor = state.get(slot.key)
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"state {slot.key!r} of {where} is a {type(tensor).__name__}; a tensor is expected")
        if routing.within(p) is p and type(tensor) is Tensor and _alike(tensor, p):
            pass  # the words below take 10 times as long
        elif (given := _kind(tensor)) != (wanted := _kind(p)):
            raise ValueError(
                f"state {slot.key!r} of {where} is {given}, the parameter is {wanted}: load a state that was saved for "
                "this model, or clear optimizer.state"
            )
        if tensor.layout != torch.strided:
            raise TypeError(f"state {slot.key!r} of {where} has layout {tensor.layout}; a dense tensor is expected")
        if routing.is_released(routing.within(tensor)):
            raise RuntimeError(_RELEASED.format(key=slot.key, where=where))
        if routing.overlaps_itself(routing.within(tensor)):
            raise RuntimeError(
                f"elements of state {slot.key!r} of {where} share memory and cannot be updated one by one: clone it"
            )
    for key in setting.rule.counters:
        counter = state.get(key)
        if isinstance(counter, Tensor) and routing.is_released(counter):
            raise RuntimeError(_RELEASED.format(key=key, where=where))


def fits(setting: Setting, p: Tensor, state: Mapping[str, Any]) -> bool:
    """Whether what there is of the state of p is such that plans can record it."""
    try:
        check_state(setting, p, state, "")
    except (TypeError, ValueError, RuntimeError):
        return False
    keys = [*(slot.key for slot in setting.named_slots.values()), *setting.rule.counters]
    return all(isinstance(t := state[key], Tensor) and routing.is_memory(t) for key in keys if key in state)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and a.shape == b.shape


def _kind(t: Tensor) -> str:
    """What a state shares with its parameter; the floating dtype it need not."""
    numbers = "complex" if t.is_complex() else "real" if t.is_floating_point() else str(t.dtype)
    placed = getattr(getattr(t, "_spec", None), "placements", None)
    where = t.device.type if placed is None else f"{t.device.type}, placed as {placed}"
    return f"{numbers} of shape {tuple(t.shape)} on {where}"


Reasons: TypeAlias = "tuple[str, str, torch.Size | None]"


@dataclass
class Work:
    """One parameter's update, ready to run."""

    p: Tensor
    grad: Tensor | None
    setting: Setting
    row: Row
    tensors: list[Tensor]
    rows: int
    counters: list[Tensor] = field(default_factory=list)


class PythonPlan:
    """The reference driver's plan: looks everything up again on every step and keeps nothing between steps."""

    def __init__(self, setting_of: SettingOf) -> None:
        self._setting_of = setting_of
        self._takes: dict[int, int] = {}
        self._reasons: dict[int, Reasons] = {}
        self._fresh: set[int] = set()
        self._repeated: set[int] = set()
        self._params: list[Tensor] = []
        self._layouts: list[object] = []
        self._work: list[Work] = []

    def build(self, groups: Groups, state: State, takes: Flags, rows: Counts, fresh: Flags) -> None:
        self._reasons = {}
        self._params = [p for group in groups for p in group["params"]]  # keeps ids from being reused
        self._layouts = [self._setting_of(group).layout for group in groups]
        flat = zip(
            self._params,
            (taken for group in takes for taken in group),
            (n for group in rows for n in group),
            (new for group in fresh for new in group),
            strict=True,
        )
        self._takes, self._fresh = {}, set()
        self._repeated = {name for name, n in Counter(map(id, self._params)).items() if n > 1}
        for p, taken, n, new in flat:
            if taken:
                self._takes[id(p)] = n
                self._reasons[id(p)] = _reasons(p)
            if new:
                self._fresh.add(id(p))

    def release(self) -> None:
        self._params, self._layouts, self._work = [], [], []

    def gather(self, groups: Groups, state: State, sync: Sequence[Any] | None) -> bool:
        """Collect this step's work; False when the plan does not fit what it finds."""
        self._work = []
        params = [p for group in groups for p in group["params"]]
        if len(groups) != len(self._layouts) or list(map(id, params)) != list(map(id, self._params)):
            return False
        for i, group in enumerate(groups):
            setting = self._setting_of(group)
            if setting.layout is not self._layouts[i]:
                return False
            for p in group["params"]:
                if id(p) not in self._takes:
                    continue
                asked = sync is not None and sync[i]
                if _reasons(p) != self._reasons[id(p)]:
                    return False
                own = state.get(p, {})
                slow = setting.rule.slow
                if p.grad is None and not (asked and slow and slow.key in own):
                    continue
                if missing_state(setting, p, own):
                    return False
                if p.grad is not None:
                    routing.check_placements(p)
                check_state(setting, p, own, f"a parameter of group {i}")
                self._work.append(self._item(p, setting, own, asked))
        return True

    def _item(self, p: Tensor, setting: Setting, state: Mapping[str, Any], asked: bool) -> Work:
        counters = [state[key] for key in setting.rule.counters]
        t: float | None = None
        carry, single = 0.0, True
        if p.grad is not None:
            t = _next(counters[0], counters[0].item()) if counters else 1.0 if id(p) in self._fresh else 2.0
            if len(counters) > 1:
                carry, single = counters[1].item(), counters[1].dtype == torch.float32
            # A parameter given twice takes its steps in turn; the counters advance only in launch.
            for earlier in (work for work in self._work if work.p is p) if id(p) in self._repeated else ():
                t, carry = _next(counters[0], t) if counters else t + 1, earlier.row.carry
        row = setting.at(t, carry, single, asked)
        used = ("slow",) if t is None else row.chain.state
        tensors = [state[setting.named_slots[name].key] for name in used]
        _check_writable((p, *tensors))
        if t is None:
            return Work(p, p.grad, setting, row, tensors, 0)
        return Work(p, p.grad, setting, row, tensors, self._takes[id(p)], counters)

    @torch.no_grad()
    def launch(self, amp: Amp = NONE) -> None:
        for work in self._work:
            p = routing.within(work.p)
            grad = p if work.grad is None else routing.within(work.grad)
            tensors = [routing.within(tensor) for tensor in work.tensors]
            reference.launch(work.row.chain, p, grad, tensors, work.row.coefficients, work.rows)
            if p is not work.p:
                torch.autograd.graph.increment_version(work.p)
            # What could not be computed was not counted.
            if work.counters:
                work.counters[0].add_(1)
            if len(work.counters) > 1:
                work.counters[1].fill_(work.row.carry)
            if work.grad is not None:
                self._fresh.discard(id(work.p))
        self._work = []


def _check_writable(tensors: Iterable[Tensor]) -> None:
    if not torch.is_inference_mode_enabled() and any(t.is_inference() for t in tensors):
        raise RuntimeError(
            "a parameter or state that was made under torch.inference_mode() cannot be updated outside it: clone it"
        )


def _next(counter: Tensor, t: float) -> float:
    """What a counter holds after t and one more step: a float32 stops at 2^24, as torch's ``step += 1`` does."""
    return float(to_single(t + 1)) if counter.dtype == torch.float32 else t + 1


def _reasons(p: Tensor) -> Reasons:
    """What speaks against p and its gradient, and its shape; a plan holds as long as that stays the same."""
    of_grad = "" if p.grad is None else routing.why_not_grad(p.grad, p.device)
    return routing.why_not_tensor(p), of_grad, None if is_lazy(p) else p.shape
