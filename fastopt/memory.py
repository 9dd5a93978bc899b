"""Allocating state tensors.

A step streams through all of a parameter's state, so large state wants huge pages: fewer address translations. They
are asked for here, before the memory is first touched; where the system refuses, nothing changes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastopt.backends import native

LARGE = 8 << 20  # bytes: four huge pages, below which alignment would waste what they save


def zeros_like(p: Tensor) -> Tensor:
    """Zeros in the layout of p."""
    return (
        _empty_like(p, p.device).zero_() if _is_large(p) else torch.zeros_like(p, memory_format=torch.preserve_format)
    )


def copy_of(t: Tensor, device: torch.device | None = None) -> Tensor:
    """A copy of t in its own layout and dtype, on `device` or where it is."""
    t = t.detach()
    device = device or t.device
    if _is_large(t) and device.type == "cpu":
        return _empty_like(t, device).copy_(t)
    return t.to(device=device, copy=True, memory_format=torch.preserve_format)


def _is_large(t: Tensor) -> bool:
    return t.device.type == "cpu" and type(t) in (Tensor, torch.nn.Parameter) and t.numel() * t.element_size() >= LARGE


def _empty_like(t: Tensor, device: torch.device) -> Tensor:
    new = torch.empty_like(t, device=device, memory_format=torch.preserve_format, requires_grad=False)
    native.advise_huge_pages(new)
    return new
