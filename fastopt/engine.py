"""From param_groups to one launch.

An `Engine` belongs to one optimizer object and holds its plan. A step gathers (the plan re-validates everything and
reads the gradients), prepares again if the plan no longer fits (creates missing state, decides who takes which
parameter), lets torch's own code update what the kernels do not take, and launches. Until the launch, nothing but
freshly created state has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, compress, islice
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from fastopt import backends, routing
from fastopt.backends import native, reference, triton
from fastopt.backends.amp import NONE, Amp
from fastopt.plan import PythonPlan, check_state, fits, mended_counters, missing_state
from fastopt.rule import Rule
from fastopt.setting import PULL, Setting, Settings
from fastopt.turns import Turns

TorchStep = Callable[[Optimizer], object]
Due: TypeAlias = "bool | tuple[Tensor, int]"
"""Whether a group synchronises at this step; on a device, the steps it has taken and those between."""
_AMP = {"grad_scale", "found_inf"}


def is_due(due: Due) -> bool:
    """The answer, waiting for a device if it must."""
    return due if isinstance(due, bool) else (int(due[0].item()) + 1) % due[1] == 0


def capturing() -> bool:
    """Whether the current stream's work goes into a CUDA graph."""
    in_use: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return in_use and torch.cuda.is_current_stream_capturing()


SHARES = "its memory overlaps another parameter's, or it was given twice"


@dataclass(frozen=True)
class Route:
    """Who updates a parameter: a backend, or torch's own code ("torch"), and why not a faster one."""

    backend: str
    reason: str = ""
    passing: bool = False  # the reason may be gone at the next step
    device: bool = False  # kernels of a device, which read a loss scale and an overflow where they lie
    lent: bool = False  # to the reference, for torch's code would fail


class Routes(dict[int, Route]):
    """Who takes each parameter, by its id, and which of them are plain memory, as nearly all are."""

    def __init__(self, routes: Iterable[tuple[int, Route]] = (), ordinary: Iterable[int] = ()) -> None:
        super().__init__(routes)
        self.ordinary = frozenset(ordinary)

    def different(self) -> list[Route]:
        return list({id(route): route for route in self.values()}.values())

    def __missing__(self, name: int) -> Route:
        raise RuntimeError("parameters were added while the step was being prepared; call step() again")


class Engine:
    def __init__(
        self,
        rule: Rule,
        torch_step: TorchStep | None,
        backend: str | None = None,
        ignored: tuple[str, ...] = (),
        defaults: Collection[str] = (),
    ) -> None:
        self.rule, self.torch_step = rule, torch_step
        self.asked = backends.wish(backend)
        self._rest = "torch" if torch_step else "reference"  # which stands in for torch's code where it has no twin
        self.idle_route = Route(self._rest, "it has no gradient, and its state does not fit")
        self.ignored = ignored
        index = {"chain_index": native.chain_index} if backends.available("native") else {}
        # Others of these torch adds to defaults, and not to groups.
        self.settings = Settings(rule, flags={"maximize", "weight_decay"} & set(defaults), checked=True, **index)
        self._made: dict[str, Any] = {}  # for good: captured graphs read tables that their plan keeps
        self._plans: dict[str, Any] = {}  # those of them that take part in steps as the last one
        self._routes = Routes()
        self._on_devices = False  # all of them are taken by kernels of devices
        self._torch: dict[int, Tensor] = {}  # what goes to torch's code; held, so that no id is used again
        self._fresh: dict[Tensor, Tensor] = {}
        self._created: list[tuple[Tensor, dict[str, Tensor]]] = []  # for this step, until the kernels begin
        self._lent: set[int] = set()  # what the reference takes instead of torch's code
        self._idle: list[Tensor] = []  # without a gradient, and with a state that no step could be taken with
        self._distributed: list[Tensor] = []
        self._misplaced: dict[Tensor, Tensor] = {}  # gradients as they were before this step redistributed them
        self._redistributes = False
        self._unusual = False  # what the parameters and states are in
        self._watched = False  # by a mode that wants to see torch's operators
        self.whole_step: Callable[[dict[str, Any]], bool] | None = None
        """A step like the last one in a single call, if one plan does it all: see `native.Plan.whole_step`."""
        self._run: Callable[..., bool] | None = None  # likewise, with the groups, state and `sync`: `native.Plan.run`
        self._turns = Turns()
        self.counts: list[bool] = []  # by group, whether its steps are counted on a device, where nobody waits for them

    def release(self) -> None:
        """Let go of what belonged to the last step: state that was replaced must not stay allocated until the next."""
        self.whole_step = self._run = None
        turn = self._turns()
        if not turn.acquire(blocking=False):
            # A step of another thread is under way, which shall not go on with them. Compiled plans know what to do.
            self._turns.disturbed = True
            for name in ("native", "emulated"):
                if name in self._made:
                    self._made[name].release()
            return
        try:
            self._turns.disturbed = False
            self._torch, self._lent, self._idle, self._distributed, self._plans = {}, set(), [], [], {}
            for plan in self._made.values():
                plan.release()
        finally:
            turn.release()

    def renew(self) -> None:
        """The state is another: loaded, and so not that of a first step, even if tensors of it are those that were."""
        self._fresh = {}
        self.release()

    def step(self, optimizer: Optimizer, amp: Any = None, sync: Sequence[Due] | None = None) -> bool:
        """One step of everything that has a gradient; False if an overflow was found and nothing happened.

        `amp` carries ``grad_scale`` and ``found_inf`` when a GradScaler left the gradients scaled; `sync` says for
        each group whether its slow weights synchronise at this step, or what its device counts by.
        """
        scaler: dict[str, Any] = {} if amp is None else vars(amp)
        given = Amp(scaler.get("grad_scale"), scaler.get("found_inf")) if scaler.keys() & _AMP else NONE
        with self._turns():
            watched = bool(routing.operations_are_watched())
            if watched != self._watched or self._turns.disturbed:
                self._watched = watched
                self.release()
            try:
                if self._distributed:
                    self._place_gradients()
                return self._step(optimizer, given, sync)
            finally:
                # A gradient that was unscaled where it lies stays: its old one is still scaled.
                for p, grad in self._misplaced.items() if given.scale is None else ():
                    p.grad = grad
                self._misplaced.clear()
                if self._turns.disturbed:
                    self.release()

    def _step(self, optimizer: Optimizer, given: Amp, sync: Sequence[Due] | None) -> bool:
        run = self._run if given is NONE else None
        if run is not None and run(optimizer.param_groups, optimizer.state, sync):
            return True
        self._created = []
        try:
            scaled = self._until_launch(optimizer, given, sync)
        except BaseException:
            self._forget(optimizer)
            if not capturing():  # of gradients, too; and plans of routes that were never taken would fit again one day
                self.release()
            raise
        if scaled is None:
            self._forget(optimizer)
            return False
        self._created = []
        for plan in self._plans.values():
            plan.launch(scaled)
        if self._fresh:
            self._fresh = {p: tensor for p, tensor in self._fresh.items() if p.grad is None}
        alone = len(self._plans) == 1 and not (self._torch or self._fresh or self._redistributes)
        if self.whole_step is None and alone:
            (plan,) = self._plans.values()
            self.whole_step, self._run = getattr(plan, "whole_step", None), getattr(plan, "run", None)
        return True

    def _until_launch(self, optimizer: Optimizer, given: Amp, sync: Sequence[Due] | None) -> Amp | None:
        """All of a step but the kernels'; None if an overflow was found."""
        scaled = self._settled(given)
        if scaled is None:
            return None
        if any(self._wakes(optimizer, p) for p in self._idle) or self._outdated(optimizer):
            self.prepare(optimizer)
            sync = self._decided(sync)
        for attempt in range(3):
            if self._plans and self._gather(optimizer, sync) and not self._turns.disturbed:
                break
            if attempt == 2:
                raise RuntimeError(
                    "parameters, gradients or state changed while the step was being prepared; call step() again"
                )
            self._turns.disturbed = False  # what there is now is looked at
            self.prepare(optimizer)
            sync = self._decided(sync)
        plans = self._plans
        scaled = self._settled(scaled)  # again: what was prepared meanwhile may not be the kernels' alone
        if scaled is None:
            return None
        ours, theirs = self._to_unscale(optimizer) if scaled.scale is not None else ([], [])
        if self._turns.disturbed or self._plans is not plans:
            raise RuntimeError("another thread has changed this optimizer during step()")
        for plan in plans.values():
            if isinstance(plan, triton.plan.TritonPlan):  # whose kernels may have to be compiled
                plan.bind(scaled)
        if self._torch:
            with _unscaled(theirs, scaled.scale):
                self._step_torch(optimizer, sync)
        _unscale(ours, scaled.scale)
        return scaled

    def _forget(self, optimizer: Optimizer) -> None:
        """Takes away the state that was made for a step which then did nothing."""
        for p, new in self._created:
            own = optimizer.state.get(p, {})
            for key, tensor in new.items():
                if own.get(key) is tensor:
                    del own[key]
            if not own:
                optimizer.state.pop(p, None)
            self._fresh.pop(p, None)
        self._created = []

    def _place_gradients(self) -> None:
        """For this step, place gradients as their parameters are: replicated parameters of sequence parallelism have
        partial sums. torch's operators do so one by one; here it is one exchange, in every process the same."""
        for p in self._distributed:
            if (placed := routing.redistributed(p)) is not None:
                assert p.grad is not None
                self._misplaced[p], p.grad = p.grad, placed
                self._redistributes, self.whole_step, self._run = True, None, None

    def _settled(self, scaled: Amp) -> Amp | None:
        """`scaled` without an overflow that cannot be left to the kernels; None if there was one."""
        if scaled.found_inf is None or self._defers():
            return scaled
        return None if scaled.found_inf.item() else Amp(scaled.scale)

    def _defers(self) -> bool:
        """Whether all that an overflow must leave alone is in the hands of kernels that look for it themselves."""
        if not self._on_devices or self._fresh:
            return False
        return all(self.counts) if self.rule.counters else self.rule.slow is None

    def _decided(self, sync: Sequence[Due] | None) -> list[Due] | None:
        """`sync` without counters on a device for groups that the device alone does not serve."""
        if sync is None:
            return None
        dues = zip(sync, self.counts, strict=True)
        return [due if on_device or isinstance(due, bool) else is_due(due) for due, on_device in dues]

    def _gather(self, optimizer: Optimizer, sync: Sequence[Due] | None) -> bool:
        return all(plan.gather(optimizer.param_groups, optimizer.state, sync) for plan in self._plans.values())

    def prepare(self, optimizer: Optimizer) -> None:
        """Decide who takes which parameter, create the state that this step needs, and build the plans."""
        if capturing():
            raise RuntimeError(
                "a CUDA graph is being captured, and this step has to make state or tables (parameters, state or "
                "gradients are not what they were): run a step on the same tensors before capturing"
            )
        groups: list[dict[str, Any]] = list(optimizer.param_groups)  # to which another thread may add
        self.whole_step = self._run = None
        self.settings.room = max(self.settings.room, 2 * len(groups))
        self._unusual = bool(routing.why_not_containers(optimizer))
        settings = list(map(self.settings.of, groups))
        members: list[list[Tensor]] = [list(group["params"]) for group in groups]
        routes = self._routes = self.routes(optimizer, members, settings)
        params = list(chain.from_iterable(members))
        strange = [p for p in params if id(p) not in routes.ordinary] if len(routes.ordinary) < len(params) else []
        self._distributed = [p for p in strange if routing.within(p) is not p]
        self._place_gradients()
        self._idle = self._create_state(optimizer, members, settings)
        routes.update((id(p), self.idle_route) for p in self._idle)
        different = routes.different()
        takers = {route.backend for route in different}
        self._on_devices = bool(params) and all(route.device or route is self.idle_route for route in different)
        self._torch = {id(p): p for p in params if routes[id(p)].backend == "torch"} if "torch" in takers else {}
        self._lent = {name for name, route in routes.items() if route.lent} if "reference" in takers else set()
        self.counts = [self._counts(optimizer, *each) for each in zip(members, settings, strict=True)]
        used = takers - {"torch"} or {"reference"}
        self._made |= {name: self._make_plan(name) for name in used - self._made.keys()}
        for name in self._plans.keys() - used:
            self._plans[name].release()
        self._plans = {name: self._made[name] for name in sorted(used)}
        rows = [
            [self._rows(setting, p) for p in own] if self.rule.centralises else [0] * len(own)
            for own, setting in zip(members, settings, strict=True)
        ]
        fresh = [[self._is_fresh(optimizer, p) for p in own] if self._fresh else [False] * len(own) for own in members]
        for name, plan in self._plans.items():
            takes = [
                [True] * len(own) if takers == {name} else [routes[id(p)].backend == name for p in own]
                for own in members
            ]
            plan.build(groups, optimizer.state, takes, rows, fresh)

    def _counts(self, optimizer: Optimizer, params: Sequence[Tensor], setting: Setting) -> bool:
        """Whether all counters of a group are where a device's kernels advance them."""
        if not self.rule.counters or not setting.counts_on_device:
            return False
        as_one = self.rule.slow is not None and not self.rule.period(setting.h)
        if as_one and len({p.device for p in params}) > 1:
            return False  # its own counter lies on one device, which the kernels of others must not read
        for p in params:
            route = self._routes[id(p)]
            if route is self.idle_route:
                continue
            own = (optimizer.state.get(p, {}).get(key) for key in self.rule.counters)
            there = all(counter is None or counter.device == p.device for counter in own)
            if not (route.device and there):
                return False
        return True

    def _rows(self, setting: Setting, p: Tensor) -> int:
        """Over how many leading slices of its memory the gradient of p is centralised."""
        if id(p) in self._routes.ordinary:
            return self.rule.rows(setting.h, p)
        if is_lazy(p):
            return 0
        local = routing.within(p)
        rows = self.rule.rows(setting.h, p) and self.rule.rows(setting.h, local)
        if rows and local is not p and not routing.has_whole_slices(p):
            raise ValueError(
                f"gradients are centralised over all dimensions but the first, and a parameter is sharded over others "
                f"({p._spec.placements}): shard it over dimension 0, or switch centralisation off for its group"  # type: ignore[attr-defined]
            )
        return rows

    def _make_plan(self, name: str) -> Any:
        names = self.settings.keys, tuple(self.rule.counters), self.ignored
        if name in ("native", "emulated"):
            return native.make_plan(names, self.settings.of, emulate=name == "emulated")
        if name == "triton":
            return triton.make_plan(names, self.settings.of, self._turns)
        return PythonPlan(self.settings.of)

    def routes(self, optimizer: Optimizer, members: Sequence[Sequence[Tensor]], settings: Sequence[Setting]) -> Routes:
        """Who takes each parameter of the optimizer's groups, by its id, as things stand now."""
        if reason := routing.why_not_containers(optimizer):
            return Routes((id(p), Route(self._rest, reason, passing=True)) for own in members for p in own)
        if reason := routing.operations_are_watched():
            found = Routes((id(p), Route(self._rest, reason, passing=True)) for own in members for p in own)
        else:
            found = self._routes_by_kind(members, settings)
        if any(route.backend == "torch" for route in found.different()):
            self._lend(optimizer, found, members, settings)
        return found

    def _lend(
        self, optimizer: Optimizer, found: Routes, members: Sequence[Sequence[Tensor]], settings: Sequence[Setting]
    ) -> None:
        """To the reference, what torch's code would fail at; with it all that overlap, for they are updated in turn."""
        mixed = [
            p
            for setting, own in zip(settings, members, strict=True)
            for p in own
            if found[id(p)].backend == "torch" and _is_mixed(setting, p, optimizer.state.get(p, {}))
        ]
        if any(found[id(p)].reason == SHARES for p in mixed):
            mixed += [p for own in members for p in own if found[id(p)].reason == SHARES]
        for name in set(map(id, mixed)):
            reason = f"{found[name].reason}; torch's code wants states and gradients of the same dtype"
            found[name] = Route("reference", reason, lent=True)

    def _routes_by_kind(self, members: Sequence[Sequence[Tensor]], settings: Sequence[Setting]) -> Routes:
        params = list(chain.from_iterable(members))
        kinds, apart = native.find_ordinary(params)
        sharing = set() if apart else routing.sharing(params)
        found = Routes(ordinary=compress(map(id, params), kinds))
        known: dict[tuple[Any, ...], Route] = {}

        def route(setting: Setting, p: Tensor, kind: int) -> Route:
            shares = id(p) in sharing
            if not kind:
                return self._route(setting, p, shares)
            centralised = self.rule.centralises and self.rule.rows(setting.h, p) > 0
            case = id(setting), kind, centralised, shares  # all that an ordinary parameter's route depends on
            if case not in known:
                known[case] = self._route(setting, p, shares)
            return known[case]

        rest_of_kinds = iter(kinds)
        for setting, own in zip(settings, members, strict=True):
            own_kinds = bytes(islice(rest_of_kinds, len(own)))
            if apart and not self.rule.centralises and len(set(own_kinds)) == 1:
                found.update(dict.fromkeys(map(id, own), route(setting, own[0], own_kinds[0])))
            else:
                found.update((id(p), route(setting, p, kind)) for p, kind in zip(own, own_kinds, strict=True))
        return found

    def _route(self, setting: Setting, p: Tensor, shares: bool) -> Route:
        rest = self._rest
        reason = routing.why_not_setting(setting, p, self.asked == "emulated") or routing.why_not_tensor(p)
        if not reason and shares:
            reason = SHARES
        if reason and setting.h.capturable and not self.torch_step:
            raise RuntimeError(f"capturable=True, but the kernels do not take a parameter on {p.device}: {reason}")
        if reason:
            return Route(rest, reason, passing=reason == routing.RELEASED)
        if type(p).grad is not Tensor.grad:
            return Route(rest, f"{type(p).__name__} has a grad of its own")
        routing.check_grad_kind(p)
        if p.grad is not None and (reason := routing.why_not_grad(p.grad, p.device)):
            return Route(rest, reason, passing=True)
        if p.grad is not None and p.grad.shape != p.shape:  # torch's code broadcasts it, or says why not
            return Route(rest, "its gradient has another shape", passing=True)
        chosen = backends.choose(where := str(p.device), self.asked)
        if chosen is None:
            return Route(rest, backends.why_not("native", where))
        kind = "emulated" if chosen == "emulated" else p.device.type
        centralised = chosen in ("native", "emulated") and self.rule.rows(setting.h, routing.within(p)) > 0
        if chosen == "native" and self.asked is None and (reason := native.lacks(setting, kind, centralised)):
            # Not to torch's code: what it does is another rule.
            if p.device.type != "cuda" or not backends.available("triton", where):
                return Route("reference", reason)
            chosen = "triton"
        elif centralised and (reason := native.lacks(setting, kind, centralised)):
            raise RuntimeError(f"backend={chosen!r} was asked for, but {reason}")
        device = chosen != "reference" and (chosen, p.device.type) != ("native", "cpu")
        if device and p.dim() > routing.MOST_DIMS:
            return Route(rest, f"{p.dim()} dimensions; the kernels of a device take up to {routing.MOST_DIMS}")
        return Route(chosen, device=device)

    def _left(self, optimizer: Optimizer) -> list[list[Tensor]]:
        """The parameters of each group, as the groups are now, that torch's code takes."""
        return [[p for p in group["params"] if id(p) in self._torch] for group in optimizer.param_groups]

    def _outdated(self, optimizer: Optimizer) -> bool:
        """Whether the reason is gone why torch's code, or the reference in its place, took a parameter, or torch's code
        would fail by now."""
        if not self._torch and not self._lent:
            return False
        if self._unusual:
            return not routing.why_not_containers(optimizer)
        lent = False
        for group in optimizer.param_groups:
            setting = self.settings.of(group)
            for p in group["params"]:
                if id(p) not in self._torch and id(p) not in self._lent:
                    continue
                route, mixed = self._routes[id(p)], _is_mixed(setting, p, optimizer.state.get(p, {}))
                if id(p) in self._lent:
                    lent = lent or mixed
                elif route is self.idle_route:
                    continue
                elif mixed or (not self._watched and route.passing and not self._route(setting, p, False).reason):
                    return True
        return bool(self._lent) and not lent

    def _create_state(
        self, optimizer: Optimizer, members: Sequence[Sequence[Tensor]], settings: Sequence[Setting]
    ) -> list[Tensor]:
        """All of it, or on an error none of it: a step that ran out of memory can be repeated. Returned are those that
        are idle."""
        pending: list[tuple[Tensor, dict[str, Tensor]]] = []
        idle: list[Tensor] = []
        complete = native.find_complete(list(zip(settings, members, strict=True)), optimizer.state)
        if complete and all(complete) and len(self._routes.ordinary) == len(complete):
            return idle
        is_complete = iter(complete)
        for i, (setting, params) in enumerate(zip(settings, members, strict=True)):
            for k, p in enumerate(params):
                if next(is_complete, 0) and id(p) in self._routes.ordinary:
                    continue
                if self._routes[id(p)].backend == "torch":
                    continue
                own = optimizer.state.get(p, {})
                if self.is_idle(setting, p, own):
                    idle.append(p)
                    continue
                if own:
                    check_state(setting, p, own, f"parameter {k} of group {i}")
                if p.grad is not None and p.grad.layout != torch.strided:
                    raise RuntimeError(f"{type(optimizer).__name__} does not support sparse gradients")
                needs = missing_state if p.grad is not None or self._has_slow(own) else mended_counters
                if new := needs(setting, p, own):
                    pending.append((p, new))
        for p, new in pending:
            own = [tensor for key, tensor in new.items() if self.rule.slow is None or key != self.rule.slow.key]
            if own and not self.rule.counters:
                self._fresh[p] = own[0]
            there = optimizer.state[p]
            self._created.append((p, {key: tensor for key, tensor in new.items() if there.get(key) is None}))
            there.update(new)
        return idle

    def is_idle(self, setting: Setting, p: Tensor, own: Mapping[str, Any]) -> bool:
        """Whether nothing is asked of a parameter, for it has no gradient, and its state is none for a plan: it may be
        parked elsewhere, in 8 bits, of another shape."""
        return bool(own) and p.grad is None and not self._has_slow(own) and not fits(setting, p, own)

    def _has_slow(self, own: Mapping[str, Any]) -> bool:
        """Whether a parameter with this state is pulled back to slow weights, with a gradient or without."""
        return self.rule.slow is not None and self.rule.slow.key in own

    def _wakes(self, optimizer: Optimizer, p: Tensor) -> bool:
        """Whether an idle parameter has a gradient again, or slow weights."""
        return p.grad is not None or self._has_slow(optimizer.state.get(p, {}))

    def _is_fresh(self, optimizer: Optimizer, p: Tensor) -> bool:
        tensor = self._fresh.get(p) if self._fresh else None
        return tensor is not None and any(tensor is value for value in optimizer.state[p].values())

    def _to_unscale(self, optimizer: Optimizer) -> tuple[list[Tensor], list[Tensor]]:
        """The gradients that no device's kernels unscale: those of our kernels' parameters, and of torch's."""
        ours: list[Tensor] = []
        theirs: list[Tensor] = []
        if self._on_devices:
            return ours, theirs
        devices: list[Tensor] = []  # whose kernels would notice when torch's code has stepped
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if p.grad is not None:
                route = self._routes[id(p)]
                (devices if route.device else theirs if id(p) in self._torch else ours).append(p.grad)
        routing.refuse_shared_memory([*ours, *theirs, *devices])
        if not torch.is_inference_mode_enabled() and any(grad.is_inference() for grad in (*ours, *theirs)):
            raise RuntimeError(
                "a scaled gradient that was made under torch.inference_mode() cannot be unscaled outside it: clone it"
            )
        return ours, theirs

    def _step_torch(self, optimizer: Optimizer, sync: Sequence[Due] | None) -> None:
        """torch's own code for the parameters the kernels do not take, then their slow weights."""
        assert self.torch_step is not None
        slow, left = self.rule.slow, self._left(optimizer)
        before: dict[Tensor, Tensor] = {}
        if slow is not None:
            for p in (p for params in left for p in params):
                if p.grad is not None and optimizer.state.get(p, {}).get(slow.key) is None:
                    before[p] = slow.create(p, None)
        with _only(optimizer.param_groups, left), _without_amp(optimizer):
            self.torch_step(optimizer)
        if slow is None:
            return
        for p, tensor in before.items():
            optimizer.state[p][slow.key] = tensor
        for i, (group, params) in enumerate(zip(optimizer.param_groups, left, strict=True)):
            if sync is not None and any(self._has_slow(optimizer.state.get(p, {})) for p in params) and is_due(sync[i]):
                alpha = float(self.rule.alpha(self.settings.of(group).h))
                for p in params:
                    pull_back(p, optimizer.state.get(p, {}).get(slow.key), alpha)


def _is_mixed(setting: Setting, p: Tensor, own: Mapping[str, Any]) -> bool:
    """Whether a parameter that the kernels could take has a state or gradient of another dtype, as they could too, and
    torch's code fails at that, with the step counted: it moves a first moment by lerp_, which wants one dtype."""
    slots = [slot.key for slot in setting.named_slots.values()]
    grad, states = p.grad, [own.get(key) for key in slots]
    if "exp_avg" not in slots or not any(isinstance(t, Tensor) and t.dtype != p.dtype for t in (grad, *states)):
        return False
    if type(p).grad is not Tensor.grad or routing.why_not_setting(setting, p) or routing.why_not_tensor(p):
        return False
    return grad is None or not (routing.why_not_grad(grad, p.device) or grad.shape != p.shape)


def _unscale(grads: list[Tensor], scale: Tensor | None) -> None:
    """Divide gradients by the loss scale and write them back, as torch's fused kernels and those of devices do."""
    if scale is None:
        return
    there = {device: scale.to(device) for device in {grad.device for grad in grads}}
    with torch.no_grad():
        for grad in grads:
            grad.div_(there[grad.device])


@contextmanager
def _unscaled(grads: list[Tensor], scale: Tensor | None) -> Iterator[None]:
    """Unscale gradients for a block; if it fails they are what they were, and the step can be repeated."""
    before = [grad.clone() for grad in grads]
    try:
        _unscale(grads, scale)
        yield
    except BaseException:
        with torch.no_grad():
            for grad, value in zip(grads, before, strict=True):
                grad.copy_(value)
        raise


def pull_back(p: Tensor, slow: Tensor | None, alpha: float) -> None:
    """Synchronise one parameter with its slow weights in torch code."""
    if slow is not None:
        local = routing.within(p)
        reference.launch(PULL, local, local, [routing.within(slow)], (alpha,), 0)


@contextmanager
def _only(groups: list[dict[str, Any]], kept: list[list[Tensor]]) -> Iterator[None]:
    """The groups with just these parameters in them.

    torch's fused kernels misread memory that is shared or not dense, so a group whose parameters they would accept all
    the same goes through the for-loop; one that they refuse keeps its flag and gets torch's own error.
    """
    before = [(group, group["params"], group.get("fused")) for group in groups]
    try:
        for group, params in zip(groups, kept, strict=True):
            group["params"] = params
            if group.get("fused") and all(_fused_takes(p) for p in params):
                group["fused"] = False
        yield
    finally:
        for group, params, fused in before:
            group["params"] = params
            if "fused" in group:
                group["fused"] = fused


def _fused_takes(p: Tensor) -> bool:
    """Whether torch's fused kernels would accept p."""
    strided = p.grad is None or p.grad.layout == torch.strided
    return p.dtype in routing.DTYPES and p.device.type != "meta" and strided


@contextmanager
def _without_amp(optimizer: Optimizer) -> Iterator[None]:
    """Gradients were unscaled already: torch's code must not do it again."""
    names = ("grad_scale", "found_inf")
    hidden: dict[str, Any] = {name: vars(optimizer).pop(name) for name in names if name in vars(optimizer)}
    try:
        yield
    finally:
        vars(optimizer).update(hidden)
