"""Which parameters the kernels take, and for every other one the reason why not.

What they do not take goes to torch's own code, parameter by parameter: nothing is silently wrong, and nothing that
torch accepts is refused.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from fastopt.setting import Setting

RELEASED = "its storage was released"
MOST_DIMS = 8
"""Dimensions of a tensor that the kernels of a device can walk (csrc/device.h)."""
MOST_HOST_DIMS = 64
"""And those of the host (csrc/cpu_driver.h)."""
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_USUAL = (torch.nn.Parameter, Tensor)


def why_not_setting(setting: Setting, p: Tensor, emulated: bool = False) -> str:
    """Why the kernels do not take p because of its group's hyper-parameters; empty if they do."""
    if setting.h.differentiable:
        return "differentiable=True needs torch operations that autograd can record"
    if setting.h.capturable and p.device.type == "cpu" and not emulated:
        return "capturable=True on a CPU parameter is an error, which torch's own code reports"
    if any(tensor.device != p.device for tensor in setting.tensors) and not emulated:
        return f"a hyper-parameter lives on another device than the parameter, which is on {p.device}"
    return ""


def operations_are_watched() -> str:
    """Why no kernel may take a step now: a mode is active that wants to see, record or replace every operator, as
    `torch.autograd.graph.allow_mutation_on_saved_tensors` and tracing do; empty if there is none."""
    if active_modes():
        return "a TorchDispatchMode is active, which sees torch's operators only"
    if forward_ad._current_level >= 0:
        return "inside a dual_level, where torch's operators carry tangents along"
    return ""


active_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack


def why_not_containers(optimizer: Optimizer) -> str:
    """Why an optimizer's parameters cannot be walked by the plans; empty if they can."""
    groups, state = optimizer.param_groups, optimizer.state
    found: list[tuple[str, object, bool]] = [
        ("param_groups", groups, isinstance(groups, list)),
        ("state", state, isinstance(state, dict)),
        *(
            ("a group", group, isinstance(group, dict) and type(group).__getitem__ is dict.__getitem__)
            for group in groups
        ),
        *(("params of a group", ps, type(ps) in (list, tuple)) for ps in (group["params"] for group in groups)),
        *(("the state of a parameter", own, isinstance(own, dict)) for own in state.values()),
    ]
    return next((f"{name} is a {type(value).__name__}" for name, value, plain in found if not plain), "")


def within(t: Tensor) -> Tensor:
    """The tensor whose memory t stands for: the local shard of a DTensor, or t itself."""
    if type(t) in _USUAL:
        return t
    local = getattr(t, "_local_tensor", None) if intercepts(t) else None
    return t if local is None else local


def has_whole_slices(p: Tensor) -> bool:
    """Whether the local shard of a DTensor is made of whole leading slices."""
    return all(getattr(placement, "dim", 0) == 0 for placement in p._spec.placements)  # type: ignore[attr-defined]


def check_placements(p: Tensor) -> None:
    """Reject a gradient placed otherwise than its parameter: it has other elements in its local tensor."""
    spec, other = getattr(p, "_spec", None), getattr(p.grad, "_spec", None)
    if spec is None or spec is other:
        return
    theirs = None if other is None else other.placements
    if theirs != spec.placements:
        raise ValueError(f"a parameter is placed as {spec.placements} and its gradient as {theirs}")


def redistributed(p: Tensor) -> Tensor | None:
    """The gradient of p placed as p is, for which processes exchange their shares; None if it is placed so."""
    spec, other = getattr(p, "_spec", None), getattr(p.grad, "_spec", None)
    if spec is None or other is None or spec is other or spec.placements == other.placements:
        return None
    placed: Tensor = p.grad.redistribute(spec.mesh, spec.placements)  # type: ignore[union-attr]
    return placed


def check_grad_kind(p: Tensor) -> None:
    """Reject a distributed gradient of a parameter that is not distributed."""
    if p.grad is not None and within(p.grad) is not p.grad and within(p) is p:
        raise RuntimeError(
            f"the gradient of a {type(p).__name__} of shape {tuple(p.shape)} is a {type(p.grad).__name__}, whose local "
            "tensor is only a part of it: give p.grad.full_tensor(), or distribute the parameter too"
        )


def why_not_tensor(p: Tensor) -> str:
    """Why the kernels do not take a parameter; empty if they do."""
    if is_lazy(p):
        return "a lazy module has not made it yet"
    if type(p) not in _USUAL and _has_functions(type(p)):
        return f"tensor subclass {type(p).__name__} with a __torch_function__ of its own"
    p = within(p)
    if p.layout != torch.strided:
        return f"layout {p.layout}"
    if intercepts(p):
        return f"tensor subclass {type(p).__name__} that intercepts torch operations"
    if p.dtype not in DTYPES:
        return f"dtype {str(p.dtype).removeprefix('torch.')}"
    if p.dim() > MOST_HOST_DIMS:
        return f"{p.dim()} dimensions; the kernels take up to {MOST_HOST_DIMS}"
    if p.is_inference():
        return "inference tensor"
    if p.is_neg():
        return "negated view"
    if is_released(p):
        return RELEASED
    if overlaps_itself(p):
        return "elements share memory"
    return ""


def why_not_grad(g: Tensor, device: torch.device | None = None) -> str:
    """Why the kernels do not take a gradient of a parameter on `device`; empty if they do."""
    g = within(g)
    if device not in (None, g.device):
        return f"gradient on {g.device}"
    if g.layout != torch.strided:
        return f"gradient of layout {str(g.layout).removeprefix('torch.')}"
    if intercepts(g):
        return f"gradient of tensor subclass {type(g).__name__} that intercepts torch operations"
    if g.dtype not in DTYPES:
        return f"gradient of dtype {str(g.dtype).removeprefix('torch.')}"
    if g.is_neg() or g.is_conj() or g._is_zerotensor():
        return "gradient is a lazy view"
    if is_released(g):
        return "storage of the gradient was released"
    return ""


_KEYS = torch._C.DispatchKey
_INTERCEPTING = functools.reduce(
    operator.or_,
    map(
        torch._C.DispatchKeySet,
        (_KEYS.Python, _KEYS.FuncTorchGradWrapper, _KEYS.FuncTorchBatched, _KEYS.Functionalize),
    ),
)


def _has_functions(kind: type[Tensor]) -> bool:
    """Whether a class wants to be asked about torch's functions, those of an optimizer among them."""
    own, usual = (getattr(f, "__func__", f) for f in (kind.__torch_function__, Tensor.__torch_function__))
    return own not in (usual, torch._C._disabled_torch_function_impl)


def intercepts(t: Tensor) -> bool:
    """Whether operations on t are dispatched to Python or transformed, so that its memory is not the whole truth."""
    return bool((torch._C._dispatch_keys(t) & _INTERCEPTING).raw_repr()) or t.device.type == "meta"


def is_memory(t: Tensor) -> bool:
    """Whether a tensor, or what it stands for, is what lies in its memory."""
    local = within(t)
    return local.layout == torch.strided and not intercepts(local) and not local.is_neg() and not local.is_conj()


def is_released(t: Tensor) -> bool:
    """Whether the storage of a strided tensor has no room for its elements any more."""
    return t.layout == torch.strided and t.numel() > 0 and _storage_end(t) > t.untyped_storage().nbytes()


def _storage_end(t: Tensor) -> int:
    if t.is_contiguous():
        return (int(t.storage_offset()) + t.numel()) * t.element_size()
    last = int(t.storage_offset()) + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size()


def overlaps_itself(t: Tensor) -> bool:
    """Whether two elements may share memory; exact for views made by torch, cautious otherwise."""
    if t.is_contiguous():
        return False
    reach = 1
    for stride, n in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n > 1):
        if stride < reach:
            return True
        reach += stride * (n - 1)  # one more than the furthest element so far
    return False


def refuse_shared_memory(grads: Iterable[Tensor]) -> None:
    """For gradients that are about to be divided in place."""
    if any(grad.layout == torch.strided and overlaps_itself(grad) for grad in grads):
        raise RuntimeError(
            "a scaled gradient whose elements share memory cannot be unscaled in place: give p.grad memory of its own"
        )


def sharing(params: Iterable[Tensor]) -> set[int]:
    """Ids of parameters given twice, or whose memory extents overlap another's: torch updates those in turn."""
    extents: list[tuple[int, int, int]] = []
    found: set[int] = set()
    seen: set[int] = set()
    for given in params:
        name = id(given)
        if name in seen:
            found.add(name)
        seen.add(name)
        p = within(given)
        if is_lazy(p):
            continue
        if p.layout == torch.strided and not intercepts(p) and p.numel():
            start = p.data_ptr()
            extents.append((start, start - int(p.storage_offset()) * p.element_size() + _storage_end(p), name))
    extents.sort()
    end, owner = -1, -1
    for start, stop, name in extents:
        if start < end and name != owner:
            found |= {owner, name}
        if stop > end:
            end, owner = stop, name
    return found
