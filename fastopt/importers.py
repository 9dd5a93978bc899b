"""`import_state`: a checkpoint of another library goes on here.

The whole checkpoint is translated and checked first (fastopt/dialects.py says what it means), then handed to
`load_state_dict`, which checks shapes before it changes anything. So an import happens completely or not at all.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from fastopt.convert import twin
from fastopt.dialects import SOURCES, Group, ImportReport, Job, Source, StateDict, States, listed
from fastopt.optimizers.base import Fused
from fastopt.optimizers.lookahead import ALPHA, SLOW, STEP, K, Lookahead


def import_state(optimizer: Optimizer, state_dict: Mapping[str, Any], source: str | None = None) -> ImportReport:
    """Load a checkpoint that another library's optimizer saved, and continue its run.

    Construct the optimizer as the other one was constructed (some libraries do not save ``k``, ``use_gc`` and the
    like), load the model, then import. Whatever hyper-parameters the checkpoint holds come from there, as with
    ``load_state_dict``; tensors are copied and keep their dtype.

    Args:
        optimizer: One of ours, the counterpart of the one that was saved; for a saved Lookahead a
            :class:`fastopt.Lookahead` around the counterpart of its inner optimizer.
        state_dict: What the other optimizer's ``state_dict()`` returned.
        source: Where it comes from: "torch", "ranger" (the original ranger.py and ports of it), "ranger2020", "timm",
            "pytorch_optimizer" or "optimi". None recognises it where the checkpoint shows it (default: None).

    Returns:
        What was carried over, what was not, and what was taken from `optimizer` because the checkpoint lacks it. When
        something is lost or will differ, that is a UserWarning as well.

    Raises:
        TypeError: `optimizer` is not one of ours, or `state_dict` not a dict.
        ValueError: The library cannot be told, or the checkpoint follows a rule that `optimizer` cannot continue, or
            does not fit its parameters. Nothing is changed then.

    Example:
        >>> import torch, fastopt
        >>> model = torch.nn.Linear(4, 2)
        >>> saved = torch.optim.RAdam(model.parameters(), lr=1e-2).state_dict()
        >>> optimizer = fastopt.RAdam(model.parameters())
        >>> report = fastopt.import_state(optimizer, saved)
        >>> optimizer.param_groups[0]["lr"]
        0.01
    """
    wraps = isinstance(optimizer, Lookahead)
    cls = twin(optimizer.optimizer if isinstance(optimizer, Lookahead) else optimizer)
    if cls is None or not (wraps or isinstance(optimizer, Fused)):
        raise TypeError(
            f"optimizer is a {type(optimizer).__module__}.{type(optimizer).__name__}; checkpoints are imported into "
            "optimizers of fastopt (and Lookahead around one, or around a torch.optim class that has a counterpart)"
        )
    kind = next(c.__name__ for c in cls.__mro__ if c.__module__.startswith("fastopt.optimizers."))
    checkpoint = _checked(state_dict)
    found = _source(checkpoint, source)
    job = Job(kind, cls.rule, wraps, ImportReport(found.name))
    translated = _translated(job, found, _checked(found.flat(checkpoint)), optimizer.param_groups)
    if job.report.dropped or job.report.differs:
        warnings.warn(str(job.report), stacklevel=2)  # before it is loaded: a filter may make an error of it
    optimizer.load_state_dict(translated)
    return job.report


def _checked(state_dict: Any) -> StateDict:
    """The dict, if it has the structure of an optimizer's checkpoint."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict is a {type(state_dict).__name__}, not what an optimizer's state_dict() returns")
    if "slow_state" in state_dict:
        raise ValueError(
            "slow_state, in which old versions of timm and torch_optimizer kept Lookahead's slow weights, names "
            "parameters by addresses in a process that is gone. To import the inner optimizer alone and start the slow "
            "weights afresh, rename fast_state to state and remove slow_state"
        )
    if {"lookahead_state", "base_optimizer"} <= state_dict.keys():
        _checked(state_dict["base_optimizer"])
        return dict(state_dict)
    if not (isinstance(state_dict.get("param_groups"), Sequence) and isinstance(state_dict.get("state"), Mapping)):
        inside = [key for key, value in state_dict.items() if isinstance(value, Mapping) and "param_groups" in value]
        hint = f". There is one under {inside[0]!r}" if inside else ""
        raise ValueError(
            f"an optimizer's checkpoint has the keys state and param_groups, this has {listed(state_dict)}{hint}"
        )
    return dict(state_dict)


def _source(state_dict: StateDict, name: str | None) -> Source:
    choices = ", ".join(map(repr, SOURCES))
    if name is not None:
        if name not in SOURCES:
            raise ValueError(f"source={name!r} is not known; accepted are {choices}")
        return SOURCES[name]
    found = [source for source in SOURCES.values() if source.marked(state_dict)]
    if len(found) == 1:
        return found[0]
    if found:
        which = " or ".join(repr(source.name) for source in found)
        raise ValueError(f"the checkpoint could be of several sources, which differ: say source={which}")
    raise ValueError(f"the checkpoint does not show which library wrote it: say source=, one of {choices}")


def _translated(job: Job, source: Source, checkpoint: StateDict, ours: list[Group]) -> StateDict:
    saved_groups = checkpoint["param_groups"]
    sizes = [[len(group["params"]) for group in groups] for groups in (saved_groups, ours)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the checkpoint's groups have {sizes[0]} parameters, the optimizer's {sizes[1]}")
    groups: list[Group] = []
    state: dict[Any, States] = {}
    for job.at, (saved, own) in enumerate(zip(saved_groups, ours, strict=True)):
        job.own = own
        source.check(job, saved)
        if source.counterparts is None and (missing := job.rule.lacking(saved)):
            raise job.refuse(f"it has no {listed(missing)}, which {job.kind} needs: another optimizer saved it")
        group = _completed(job, source, source.group(job, dict(saved)), own)
        groups.append(group)
        saved_states = {name: checkpoint["state"].get(name) for name in saved["params"]}
        for name, states in saved_states.items():
            if held := {key: value for key, value in (states or {}).items() if value is not None}:
                state[name] = source.state(job, saved, group, held)
                _check_states(job, source, group, state[name])
        to_come = [p.requires_grad for p, name in zip(own["params"], saved_states, strict=True) if name not in state]
        _note_steps_per_group(job, saved, sum(to_come))
    job.report.parameters = len(state)
    return {"state": state, "param_groups": groups}


def _note_steps_per_group(job: Job, saved: Group, to_come: int) -> None:
    if to_come and int(saved.get("step", 0)) > 0:
        job.differs(
            f"{to_come} parameters of group {job.at} had no gradient yet: {job.report.source} would correct the bias "
            "of their first update by the steps of the group, here every parameter counts its own"
        )


def _completed(job: Job, source: Source, group: Group, own: Group) -> Group:
    """The group in the optimizer's order of keys, with what it does not say taken from there."""
    for key in source.outside:
        if key in own and key not in group and (key not in (K, ALPHA) or STEP in group):
            job.report.assumed[key] = own[key]
    order = {key: value for key, value in own.items() if key in group or key not in (STEP, "param_names")}
    return order | group


def _check_states(job: Job, source: Source, group: Group, states: States) -> None:
    slots = {slot.key for name, slot in job.setting(group).named_slots.items() if name != "slow"}
    needed = slots | set(job.rule.counters)
    if missing := needed - states.keys():
        raise job.refuse(f"states {listed(states)} are another optimizer's: {job.kind} needs {listed(missing)} too")
    known = needed | ({job.rule.slow.key} if job.rule.slow else set()) | {SLOW}
    if source.counterparts is not None and (unknown := states.keys() - known):
        raise job.refuse(f"states {listed(unknown)} are another optimizer's: {job.kind} has no use for them")
    for key in slots:
        if not isinstance(states[key], Tensor):
            raise job.refuse(f"state {key!r} is a {type(states[key]).__name__}, not a tensor")
