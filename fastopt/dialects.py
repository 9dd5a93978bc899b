"""What checkpoints of other libraries mean in our terms.

A `Source` is one library: the marks by which its checkpoints are recognised, and two functions that translate a
parameter group and a parameter's states. Where going on would follow another rule they refuse; what is lost or will
differ they write into the `ImportReport`. The facts are those of the versions named at each source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastopt.optimizers.lookahead import ALPHA, SLOW, STEP, K
from fastopt.rule import Rule
from fastopt.setting import Setting, Settings

Group = dict[str, Any]
States = dict[str, Any]
StateDict = dict[str, Any]

_FLAGGED = ("Adam", "NAdam", "RAdam")  # decay as the group's decoupled_weight_decay says
_DECOUPLED = ("AdamW", "Ranger")


@dataclass
class ImportReport:
    """What became of a checkpoint of another library. ``print`` it."""

    source: str
    """The library, by the name that `fastopt.import_state` takes."""
    parameters: int = 0
    """Parameters whose state was carried over."""
    dropped: dict[str, str] = field(default_factory=dict)
    """States that have no counterpart here, and what follows from that."""
    differs: list[str] = field(default_factory=list)
    """Where the continued run is not the one that the other library would have made, rounding apart."""
    assumed: dict[str, Any] = field(default_factory=dict)
    """Hyper-parameters that the library does not save: those of the optimizer imported into."""

    def __str__(self) -> str:
        lines = [f"state of {self.parameters} parameters, from a checkpoint of {self.source}"]
        lines += [f"dropped: {key}, {why}" for key, why in self.dropped.items()]
        lines += [f"differs: {text}" for text in self.differs]
        if self.assumed:
            values = ", ".join(f"{key}={value}" for key, value in self.assumed.items())
            lines.append(f"not in the checkpoint, as the optimizer had it: {values}")
        return "\n".join(lines)


@dataclass
class Job:
    """One import: what the optimizer is, where in the checkpoint we are, and the report."""

    kind: str
    """The name of our class, inside Lookahead that of the inner optimizer."""
    rule: Rule
    wraps: bool
    """Whether the optimizer is a Lookahead."""
    report: ImportReport
    at: int = 0
    own: Mapping[str, Any] = field(default_factory=dict)
    """The optimizer's group there. Keys that it has too say nothing about who saved the other."""

    def refuse(self, text: str) -> ValueError:
        return ValueError(f"group {self.at} of the checkpoint of {self.report.source}: {text}")

    def differs(self, text: str) -> None:
        if text not in self.report.differs:
            self.report.differs.append(text)

    def decay(self, group: Group, decoupled: bool) -> None:
        """Write in our terms whether the parameter itself decays or, coupled, the gradient."""
        if self.kind in _FLAGGED:
            group["decoupled_weight_decay"] = decoupled
        elif group["weight_decay"] != 0 and decoupled != (self.kind in _DECOUPLED):
            which = "the parameter itself" if decoupled else "the gradient"
            raise self.refuse(
                f"weight_decay={group['weight_decay']} acts on {which}, which {self.kind} cannot do: import into a "
                "class that can, or set it to 0 in the checkpoint to go on without"
            )

    def setting(self, group: Group) -> Setting:
        return Settings(self.rule).of(group)

    def unrectified(self, group: Group, t: float) -> bool:
        """Whether RAdam's step t is below the threshold."""
        return bool(self.rule.rectification(self.setting(group).h, t) == 0)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Source:
    """One library whose checkpoints are understood."""

    name: str
    marked: Callable[[StateDict], bool]
    """Whether the checkpoint bears marks that only this library leaves."""
    group: Callable[[Job, Group], Group]
    """A saved group in our terms; what it does not say is taken from the optimizer."""
    state: Callable[[Job, Group, Group, States], States]
    """A parameter's states in our terms, from the saved group, the translated one and the saved states."""
    counterparts: Mapping[str, frozenset[str]] | None = None
    """Our classes that continue its own ones, by group keys that those save; None: it is torch.optim itself."""
    outside: tuple[str, ...] = ()
    """Hyper-parameters of ours that its checkpoints lack."""
    flat: Callable[[StateDict], StateDict] = lambda state_dict: state_dict
    """Its checkpoint in the structure of torch's."""

    def check(self, job: Job, saved: Group) -> None:
        """Refuse a group that was saved by another class than the optimizer's counterpart."""
        if self.counterparts is None or is_torchs(saved):
            return
        wanted = self.counterparts.get(job.kind)
        if wanted is None:
            raise job.refuse(f"{job.kind} has no counterpart there; accepted: {', '.join(self.counterparts)}")
        _check_keys(job, saved, wanted, self.counterparts)


def _check_keys(job: Job, saved: Group, wanted: frozenset[str], counterparts: Mapping[str, frozenset[str]]) -> None:
    others = frozenset[str]().union(*counterparts.values()) - wanted
    if (missing := wanted - saved.keys()) or (foreign := others & saved.keys() - job.own.keys()):
        what = f"lacks {listed(missing)}" if missing else f"has {listed(foreign)}"
        raise job.refuse(f"it was not saved by a {job.kind}, for it {what}")


def is_torchs(group: Group) -> bool:
    """Whether a class of torch.optim saved the group: several libraries wrap those or hand them out."""
    return {"foreach", "maximize"} <= group.keys() and "caution" not in group


def listed(keys: Iterable[str]) -> str:
    return ", ".join(sorted(map(str, keys))) or "nothing"


def _without(group: Group, *keys: str) -> Group:
    return {key: value for key, value in group.items() if key not in keys}


def _any_group(state_dict: StateDict, *keys: str) -> bool:
    return any(set(keys) <= group.keys() for group in state_dict.get("param_groups", []))


def _unchanged(job: Job, saved: Group, group: Group, states: States) -> States:
    return states


def _torch_marked(state_dict: StateDict) -> bool:
    known = _any_group(state_dict, "n_sma_threshold") or any(map(is_torchs, state_dict.get("param_groups", [])))
    return known and not any(source.marked(state_dict) for source in SOURCES.values() if source.counterparts)


_TORCH_KEYS = {
    "SGD": frozenset({"dampening"}),
    "RMSprop": frozenset({"alpha"}),
    "Adagrad": frozenset({"lr_decay"}),
    "Adam": frozenset({"betas", "amsgrad"}),
    "AdamW": frozenset({"betas", "amsgrad"}),
    "Adamax": frozenset({"betas"}),
    "NAdam": frozenset({"betas", "momentum_decay"}),
    "RAdam": frozenset({"betas"}),
    "Ranger": frozenset({"betas", "alpha", "k", "n_sma_threshold"}),
}
"""By which the groups of a class are known among those of torch's classes and ours, from torch 0.4 on."""


def _torch_group(job: Job, group: Group) -> Group:
    """Of a class of torch.optim or ours, in any library's hands."""
    if job.kind in _TORCH_KEYS:  # a class of one's own may inherit from none of them
        _check_keys(job, group, _TORCH_KEYS[job.kind], _TORCH_KEYS)
    if STEP in group and not job.wraps:
        raise job.refuse(f"a Lookahead saved it: import it into fastopt.Lookahead(fastopt.{job.kind}(...))")
    if job.kind in ("Adam", "AdamW") and "decoupled_weight_decay" in group:  # older versions do not say
        job.decay(group, decoupled=bool(group["decoupled_weight_decay"]))
    return group


TORCH = Source("torch", _torch_marked, _torch_group, _unchanged)
"""torch.optim, and fastopt itself."""


def _ranger_group(job: Job, group: Group) -> Group:
    new = _without(group, "step_counter", "N_sma_threshhold")
    fixed = {"n_sma_threshold": group["N_sma_threshhold"], "degenerated_to_sgd": True, "maximize": False}
    return new | fixed


def _ranger2020_group(job: Job, group: Group) -> Group:
    if group["weight_decay"] != 0:
        raise job.refuse(
            f"weight_decay={group['weight_decay']}: ranger2020.py scales decay by the rectified step and, before "
            "rectification, adds it to the moment; fastopt.Ranger decays as ranger.py does. To go on with that, import "
            "with source='ranger'; to go on without decay, set it to 0 in the checkpoint"
        )
    return _ranger_group(job, group)


_RANGER_KEYS = {"Ranger": frozenset({"N_sma_threshhold", "alpha", "k", "betas", "eps", "weight_decay"})}
RANGER = Source(
    "ranger",
    lambda state_dict: _any_group(state_dict, "N_sma_threshhold"),
    _ranger_group,
    _unchanged,
    _RANGER_KEYS,
    ("use_gc", "gc_conv_only"),
)
"""ranger.py v20.4.11, and pytorch-ranger 0.1.1 (which torch_optimizer 0.3.0 hands out), without centralisation."""
RANGER2020 = Source(
    "ranger2020",
    lambda state_dict: any(
        g.get("weight_decay") and "N_sma_threshhold" in g for g in state_dict.get("param_groups", [])
    ),
    _ranger2020_group,
    _unchanged,
    _RANGER_KEYS,
    ("use_gc", "gc_conv_only"),
)
"""ranger2020.py v2020.9.4; without weight decay it is ranger.py. gc_loc=True is assumed."""


def _timm_marked(state_dict: StateDict) -> bool:
    states = [own for own in state_dict.get("state", {}).values() if isinstance(own, Mapping)]
    if any("lookahead_slow_buff" in own for own in states) or _any_group(state_dict, "caution"):
        return True
    stepped = any(group.get(STEP, 0) for group in state_dict.get("param_groups", []))
    return bool(stepped and states and not any(SLOW in own for own in states))


def _timm_group(job: Job, group: Group) -> Group:
    for key in ("caution", "corrected_weight_decay", "clipping_threshold"):
        if group.get(key):
            raise job.refuse(f"{key}={group[key]} makes it another rule than {job.kind}'s")
    if STEP in group and not job.wraps:
        raise job.refuse(f"a Lookahead saved it: import it into fastopt.Lookahead(fastopt.{job.kind}(...))")
    if is_torchs(group):
        return _torch_group(job, group)
    new = _without(group, "caution", "corrected_weight_decay", "max_lr_snapshot", "clipping_threshold")
    job.decay(new, decoupled=True)
    return new


def _timm_state(job: Job, saved: Group, group: Group, states: States) -> States:
    slow = states.pop("lookahead_slow_buff", None)
    if slow is not None:
        states[SLOW] = slow
    elif saved.get(STEP, 0) >= saved.get(K, 1):
        job.differs(
            "timm starts the slow weights of a parameter when its group synchronises while it has a gradient; those of "
            "parameters for which that was yet to come start with the next step"
        )
    elif saved.get(STEP, 0):
        job.differs(
            f"timm's first synchronisation, at step {saved[K]}, only starts the slow weights; here they start with the "
            "next step, and that synchronisation pulls back"
        )
    return states


TIMM = Source(
    "timm",
    _timm_marked,
    _timm_group,
    _timm_state,
    {
        "RAdam": frozenset({"betas", "eps"}),
        "Adam": frozenset({"betas", "eps", "amsgrad"}),
        "AdamW": frozenset({"betas", "eps", "amsgrad"}),
    },
)
"""timm 1.0.31: Lookahead around its RAdamLegacy and AdamWLegacy or any class of torch, and those two themselves."""


def _kozistr_flat(state_dict: StateDict) -> StateDict:
    """Lookahead keeps the slow weights beside the inner checkpoint, under (group, place) or the parameter itself."""
    if "base_optimizer" not in state_dict:
        return state_dict
    base, slow = state_dict["base_optimizer"], dict(state_dict["lookahead_state"])
    names = {(i, k): name for i, group in enumerate(base["param_groups"]) for k, name in enumerate(group["params"])}
    if slow and all(isinstance(key, Tensor) for key in slow) and len(slow) == len(names):  # in the groups' order
        slow = dict(zip(names, slow.values(), strict=True))
    if slow.keys() != names.keys():
        raise ValueError("lookahead_state does not name the parameters of base_optimizer: the checkpoint is damaged")
    # A parameter that the inner optimizer has never updated still is its slow weight.
    state = {name: {**base["state"][name], **slow[at]} for at, name in names.items() if base["state"].get(name)}
    return {"state": state, "param_groups": base["param_groups"]}


def _kozistr_group(job: Job, group: Group) -> Group:
    if "counter" in group and not job.wraps:
        raise job.refuse(f"a Lookahead saved it: import it into fastopt.Lookahead(fastopt.{job.kind}(...))")
    new = _without(group, "counter") | ({STEP: group["counter"]} if "counter" in group else {})
    if is_torchs(group):
        return _torch_group(job, new)
    for key in ("adanorm", "adam_debias", *(("fixed_decay",) if group["weight_decay"] else ())):
        if group.get(key):
            raise job.refuse(f"{key}={group[key]} makes it another rule than {job.kind}'s")
    if job.kind == "RAdam" and group["weight_decay"] and not group["weight_decouple"]:
        raise job.refuse(
            f"weight_decay={group['weight_decay']} with weight_decouple=False: 4.1.0 does not decay then, whatever was "
            "meant. Set weight_decay to 0 or weight_decouple to True in the checkpoint"
        )
    job.decay(new, decoupled=group["weight_decouple"])
    own = ("weight_decouple", "fixed_decay", "foreach", "step", "step_counter", "adanorm", "adanorm_r", "adam_debias")
    return _without(new, *own)


def _kozistr_state(job: Job, saved: Group, group: Group, states: States) -> States:
    if "backup_params" in states:
        raise job.refuse("saved while the model held the slow weights: save after clear_and_load_backup()")
    if "slow_momentum" in states:
        raise job.refuse("pullback_momentum='pullback' interpolates momentum, which fastopt.Lookahead does not do")
    if "slow_params" in states:
        states[SLOW] = states.pop("slow_params")
        if saved["counter"] >= group[K]:
            raise job.refuse(f"it has counted {saved['counter']} steps, k was larger: construct Lookahead with that k")
    if is_torchs(saved):
        return states
    if job.unrectified(group, saved["step"] + 1) and not group.get("degenerated_to_sgd"):
        job.differs(
            "with degenerated_to_sgd=False, which is its default, pytorch_optimizer's Ranger ascends until the step is "
            "rectified; here the parameters wait"
            if job.kind == "Ranger"
            else "until the step is rectified pytorch_optimizer's RAdam waits, unless it has degenerated_to_sgd=True, "
            "which is not saved; here it takes momentum steps"
        )
    return {"step": torch.tensor(float(saved["step"]), device="cpu")} | states


_KOZISTR_KEYS = frozenset({"betas", "eps", "weight_decay", "weight_decouple", "fixed_decay", "step"})
KOZISTR = Source(
    "pytorch_optimizer",
    lambda state_dict: "base_optimizer" in state_dict or _any_group(state_dict, "weight_decouple", "fixed_decay"),
    _kozistr_group,
    _kozistr_state,
    {"RAdam": _KOZISTR_KEYS, "Ranger": _KOZISTR_KEYS | {"alpha", "k"}},
    ("maximize", "n_sma_threshold", "degenerated_to_sgd", "use_gc", "gc_conv_only", K, ALPHA),
    _kozistr_flat,
)
"""pytorch_optimizer 4.1.0: RAdam, Ranger, and Lookahead around those or any class of torch."""


def _optimi_group(job: Job, group: Group) -> Group:
    own = ("decouple_wd", "decouple_lr", "max_lr", "kahan_sum", "torch_init", "foreach", "triton", "gradient_release")
    new = _without(group, *own, "setup", "step", "beta1", "beta2")
    if "beta1" in group:
        new["betas"] = (group["beta1"], group["beta2"])
    else:
        new["dampening"] = group["momentum"] if group["dampening"] else 0
    if group["decouple_lr"] and group["weight_decay"]:
        new["weight_decay"] = group["weight_decay"] / group["max_lr"]
    job.decay(new, decoupled=bool(group["decouple_wd"] or group["decouple_lr"]))
    if job.kind == "Ranger":
        new |= {"use_gc": False, "n_sma_threshold": 5, "degenerated_to_sgd": True}
    return new | ({"nesterov": False} if job.kind == "SGD" else {"amsgrad": False} if "Adam" in job.kind[:4] else {})


def _optimi_state(job: Job, saved: Group, group: Group, states: States) -> States:
    """Its moments are those of torch divided by their bias corrections."""
    states.pop("group", None)  # gradient release keeps the group itself there
    compensation = states.pop("kahan_comp", None)
    if isinstance(compensation, Tensor) and compensation.is_floating_point():  # Triton's kernels get a dummy of bytes
        job.report.dropped["kahan_comp"] = (
            "the compensation of low-precision parameters: each goes on from its rounded value, and updates below half "
            "of its last place are lost from now on"
        )
    if job.kind == "SGD":
        return {"momentum_buffer": states.pop("exp_avg"), **states} if "exp_avg" in states else states
    t = int(states.pop("step", saved.get("step", 0)))
    corrections = {key: 1 - beta**t for key, beta in zip(("exp_avg", "exp_avg_sq"), group["betas"], strict=True)}
    for key, correction in corrections.items():
        if isinstance(states.get(key), Tensor):
            states[key] = (states[key].double() * correction).to(states[key].dtype)
    if "la_param" in states:
        states["slow_buffer"] = states.pop("la_param")
    if t > 0 and job.kind in ("RAdam", "Ranger"):
        job.differs(
            "optimi adds eps to the bias-corrected root, here it is added to the uncorrected one: it weighs "
            f"{corrections['exp_avg_sq'] ** -0.5:.3g} times as much at step {t}, and the same later on"
        )
    return {"step": torch.tensor(float(t), device="cpu")} | states


_OPTIMI_KEYS = frozenset({"beta1", "beta2", "eps", "weight_decay", "decouple_wd", "decouple_lr", "max_lr"})
OPTIMI = Source(
    "optimi",
    lambda state_dict: _any_group(state_dict, "decouple_lr", "max_lr"),
    _optimi_group,
    _optimi_state,
    {
        "SGD": frozenset({"momentum", "dampening", "weight_decay", "decouple_wd", "decouple_lr", "max_lr"}),
        "Adam": _OPTIMI_KEYS,
        "AdamW": _OPTIMI_KEYS,
        "RAdam": _OPTIMI_KEYS,
        "Ranger": _OPTIMI_KEYS | {"k", "alpha"},
    },
)
"""torch-optimi 0.3.3."""

SOURCES = {source.name: source for source in (TORCH, RANGER, RANGER2020, TIMM, KOZISTR, OPTIMI)}
