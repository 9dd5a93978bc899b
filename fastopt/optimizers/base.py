"""`Fused`: the mixin that turns a torch.optim class into ours.

It owns `step`, loading, pickling and the ``backend`` argument; everything else is the torch class's. Placed first among
the bases, it needs no constructor in the class itself::

    class RAdam(Fused, torch.optim.RAdam):
        rule = RAdamRule()

(The eight classes of torch write torch's signature out once more for type checkers, with ``backend``: types can pass on
the arguments of another function, but not add a keyword to them. tests/test_construction.py holds them to torch's.)
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import wraps
from threading import get_ident
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import torch
import torch.optim.optimizer as torch_optimizer
from torch import Tensor
from torch.autograd import forward_ad
from torch.optim import Optimizer

from fastopt import backends, memory
from fastopt.backends import native
from fastopt.engine import Engine
from fastopt.optimizers.slow import OF_LOOKAHEAD
from fastopt.plan import create_counter
from fastopt.routing import active_modes
from fastopt.rule import FLAGS, Rule
from fastopt.setting import Settings

if TYPE_CHECKING:
    _Base = Optimizer
else:
    _Base = object


Method = TypeVar("Method", bound=Callable[..., Any])


# torch's own objects, bound here because every look-up is a cache miss in a training's step.
_pre_hooks, _post_hooks = torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks
_profiler_enabled: Callable[[], bool] = torch._C._autograd._profiler_enabled
_function_modes: Callable[[], int] = torch._C._len_torch_function_stack


def _always() -> bool:
    return True


_ACCELERATORS: tuple[tuple[Callable[[], bool], Callable[[], bool]], ...] = tuple(
    (module.is_initialized, capturing)
    for module, built, capturing in (
        (
            torch.cuda,
            torch.version.cuda or torch.version.hip,
            getattr(torch._C, "_cuda_isCurrentStreamCapturing", _always),
        ),
        (torch.xpu, getattr(torch.version, "xpu", None), _always),  # not every torch can tell
    )
    if built
)
"""For each kind of device that captures graphs and that this torch was built for: whether it is in use, and whether its
current stream is being captured."""


def _capturing() -> bool:
    return any(in_use() and capturing() for in_use, capturing in _ACCELERATORS)


class _Entry:
    """The three ways into one `step`: as it is, inside torch's hooks and profiling, and hidden from dynamo."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.plain = method
        self.hooked: Callable[..., Any] = Optimizer.profile_hook_step(method)
        self.hidden: Callable[..., Any] = self.hooked  # until `hide`


_entries: list[_Entry] = []


def entry(method: Method) -> Method:
    """A `step` that takes the shortest way in.

    torch wraps every step in hooks and a profiler record, which costs more than our host code; they are entered only
    when there is a hook or a profiler. (The attribute ``hooked`` tells torch not to wrap again.) torch.compile runs the
    step as it is instead of tracing it.

    Where one plan does all the work, it is called from here: after a backward pass little of Python is left in the
    caches, and every function in between costs microseconds.
    """
    ways = _Entry(method)
    _entries.append(ways)

    @wraps(method)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:  # hooks are shown what was given, and how
        if torch.compiler.is_dynamo_compiling():
            return ways.hidden(self, *args, **kwargs)
        own = self.__dict__
        if (
            not kwargs
            and (not args or (len(args) == 1 and args[0] is None))
            and (engine := own.get("_engine")) is not None
            and (whole_step := engine.whole_step) is not None
        ):
            elsewhere = (
                _pre_hooks
                or _post_hooks
                or _profiler_enabled()
                or active_modes()
                or forward_ad._current_level >= 0
                or (_ACCELERATORS and _capturing())
            )
            if not elsewhere and whole_step(own):
                return None
        if _watched(self) and inspect.unwrap(type(self).step) is method:
            return ways.hooked(self, *args, **kwargs)
        return ways.plain(self, *args, **kwargs)

    step.hooked = True  # type: ignore[attr-defined]
    return cast(Method, step)


def _watched(self: Any) -> bool:
    """Whether anyone would notice that torch's wrapper is missing."""
    own = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
    return bool(own or _pre_hooks or _post_hooks or _profiler_enabled())


def hide() -> None:
    """Make the ways in that torch.compile takes.

    Called when an optimizer is made, because ``torch.compiler.disable`` imports dynamo, which takes a second and which
    torch's own constructor does as well.
    """
    for ways in _entries[:]:
        ways.hidden = torch.compiler.disable(ways.hooked)  # type: ignore[no-untyped-call]
        with suppress(ValueError):  # another thread has been here
            _entries.remove(ways)


class Fused(_Base):
    """Cooperative base of every optimizer here that has a rule."""

    rule: ClassVar[Rule]
    __signature__: ClassVar[inspect.Signature]
    torch_class: ClassVar[type[Optimizer] | None] = None
    """The torch.optim class that does what the kernels do not take."""
    _backend: str | None = None  # for who goes round our constructor

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        torch_classes = (c for c in cls.__mro__ if c.__module__.startswith("torch.optim.") and c is not Optimizer)
        cls.torch_class = next(torch_classes, None)
        if "__init__" in vars(cls):
            cls.__signature__ = _without_self(cls.__init__)
        elif cls.torch_class is not None:
            cls.__signature__ = _with_backend(_without_self(cls.torch_class.__init__))

    def __init__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> None:
        if (asked := backends.wish(backend)) and (reason := backends.unusable(asked)):
            source = "FASTOPT_BACKEND" if backend is None else "backend"
            raise backends.BackendError(f"{source}={asked!r} was asked for, but {reason}")
        self._backend = backend
        hide()
        super().__init__(*args, **kwargs)

    @property
    def backend(self) -> str | None:
        """The backend that was asked for; None: chosen automatically."""
        return self._backend

    @entry
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step.

        Args:
            closure: Reevaluates the model and returns the loss.
        """
        if "capturable" in self.defaults:
            _check_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        drives = vars(self).get("_drive")
        if drives and (drive := drives.get(get_ident())):  # a wrapper that appends its own stage to ours (lookahead.py)
            drive()
        else:
            self.engine().step(self, amp=self)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Let go of the gradients of all parameters, or fill them with zeros.

        Args:
            set_to_none: Let go of them, so that the next step leaves alone what has got no new one.
        """
        # torch's own makes a Python object of every gradient before it lets go of it, which takes longer than a step.
        watched = torch.compiler.is_dynamo_compiling() or _profiler_enabled() or _function_modes()
        left = None if watched or not set_to_none else native.drop_gradients(self.param_groups)
        if left is None:
            super().zero_grad(set_to_none)
            return
        for p in left:
            p.grad = None

    def engine(self) -> Engine:
        """The engine of this optimizer, made on first use and again after unpickling."""
        engine: Engine | None = vars(self).get("_engine")
        if engine is None:
            engine = self._engine = Engine(self.rule, torch_step(self), self._backend, defaults=self.defaults)
        return engine

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, ours or torch.optim's.

        Unlike torch's, this copies every tensor that is not this optimizer's own, keeps its dtype, and rejects a state
        whose shapes do not fit before anything is changed.

        Raises:
            ValueError: The groups or the shapes do not match this optimizer's parameters.
        """
        loaded: dict[str, Any] = {}
        # Registered last, so that it sees what the user's hooks made of the dict.
        handle = self.register_load_state_dict_pre_hook(lambda _, final: loaded.update(final))
        self._loaded = loaded
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self.__dict__.pop("_loaded", None)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_backend", "_step_supports_amp_scaling")
        state: dict[str, Any] = super().__getstate__()
        return state | {name: vars(self)[name] for name in kept if name in vars(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        loaded = self.__dict__.pop("_loaded", None)
        if loaded is not None:
            _check_checkpoint(type(self).__name__, self.rule, loaded)
            state = state | {"state": _faithful(self.rule, state, loaded, self.state)}
        _complete_counters(self.rule, state)
        hide()
        super().__setstate__(state)
        if (engine := vars(self).get("_engine")) is not None:
            engine.renew()


def _check_capture(optimizer: Any) -> None:
    """torch's own check of CUDA graph capture, under the name it has in this version."""
    if not any(in_use() for in_use, _ in _ACCELERATORS):
        return
    name = "_accelerator_graph_capture_health_check"
    getattr(optimizer, name if hasattr(optimizer, name) else "_cuda_graph_capture_health_check")()


def torch_step(optimizer: Fused) -> Callable[[Optimizer], object] | None:
    """The torch class's step without the hooks that torch wraps around it: ours has fired them already."""
    if optimizer.torch_class is None:
        return None
    step: Any = optimizer.torch_class.step
    unhooked: Callable[[Optimizer], object] = step.__wrapped__ if getattr(step, "hooked", False) else step
    return unhooked


def _check_checkpoint(name: str, rule: Rule, loaded: dict[str, Any]) -> None:
    """Refuse what another optimizer saved, and this one cannot go on from."""
    settings = Settings(rule)
    for i, group in enumerate(loaded["param_groups"]):
        if missing := rule.lacking(group):
            raise ValueError(
                f"group {i} of the checkpoint has no {', '.join(missing)}, which {name} needs: another optimizer saved "
                "it. To go on with another rule, start this one afresh, or see fastopt.convert"
            )
        slots = {slot.key for slot in settings.of(_completed(rule, group)).named_slots.values()}
        own = {*slots, *rule.counters, "step", OF_LOOKAHEAD}
        needed = slots - {rule.slow.key if rule.slow else None}
        for k, key in enumerate(group["params"]):
            saved = loaded["state"].get(key)
            if not isinstance(saved, dict) or not rule.counters.keys() <= saved.keys():
                continue  # nothing that a step has left
            found = {name for name, value in saved.items() if isinstance(value, Tensor)}
            if (foreign := found - own) and (missing := sorted(needed - found)):
                raise ValueError(
                    f"parameter {k} of group {i} of the checkpoint has no state {', '.join(missing)}, which {name} "
                    f"needs, but {', '.join(sorted(foreign))}: another optimizer saved it"
                )


def _completed(rule: Rule, group: dict[str, Any]) -> dict[str, Any]:
    """With what old checkpoints lack, switched off: torch's classes add it only when the state is loaded."""
    return dict.fromkeys((*rule.optional, *FLAGS), 0) | group


def _faithful(
    rule: Rule, state: dict[str, Any], loaded: dict[str, Any], own: Mapping[Any, Any]
) -> defaultdict[Any, dict[str, Any]]:
    """The state as it was saved: torch casts every tensor to its parameter's dtype and shares the caller's memory.

    What is in `own` stays what it is: a distributed checkpoint is read into the state that there is, and there may be
    no memory for another.
    """
    result: defaultdict[Any, dict[str, Any]] = defaultdict(dict, state["state"])
    groups = zip(loaded["param_groups"], state["param_groups"], strict=True)
    settings = Settings(rule)
    for i, (saved_group, group) in enumerate(groups):
        slots = {slot.key for slot in settings.of(_completed(rule, group)).named_slots.values()}
        for k, (name, p) in enumerate(zip(saved_group["params"], group["params"], strict=True)):
            saved = loaded["state"].get(name)
            if not isinstance(saved, dict):
                continue
            for key, value in saved.items():
                if isinstance(value, str):  # torch takes a string apart as it does any iterable
                    result[p][key] = value
                if not isinstance(value, Tensor):
                    continue
                if key == "step":  # where it lives follows from the flags of the loaded group
                    result[p][key] = result[p][key].clone()
                    continue
                if key in slots and value.shape != p.shape:
                    raise ValueError(
                        f"state {key!r} for parameter {k} of group {i} has shape {tuple(value.shape)}, the parameter "
                        f"has {tuple(p.shape)}: load a state that was saved for this model"
                    )
                device = result[p][key].device if key in rule.counters else p.device
                mine = own.get(p, {}).get(key) is value and value.device == device
                result[p][key] = value if mine else memory.copy_of(value, device)
    return result


def _complete_counters(rule: Rule, state: dict[str, Any]) -> None:
    """Counters as tensors, where old checkpoints hold numbers, and also in states that somebody only began to fill."""
    settings = Settings(rule)
    for group in state.get("param_groups", []):
        for p in group["params"]:
            own = state.get("state", {}).get(p)
            for key in rule.counters if own else ():
                if not isinstance(own.get(key), Tensor):
                    own[key] = create_counter(settings.of(_completed(rule, group)), p, own.get(key, rule.counters[key]))


def _without_self(init: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(init)
    return signature.replace(
        parameters=list(signature.parameters.values())[1:], return_annotation=inspect.Signature.empty
    )


def _with_backend(signature: inspect.Signature) -> inspect.Signature:
    backend = inspect.Parameter("backend", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="str | None")
    return signature.replace(parameters=[*signature.parameters.values(), backend])
