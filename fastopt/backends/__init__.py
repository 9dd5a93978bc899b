"""Backends: who runs a chain on which device.

Each backend module has `why_not(device)`, empty when it can run there. `choose` picks the fastest that can, or the one
asked for; an explicit request that cannot be met raises and says why.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from fastopt.backends import native, reference, triton

NAMES = ("native", "triton", "reference")
_WHY_NOT: dict[str, Callable[[str], str]] = {
    "native": native.why_not,
    "triton": triton.why_not,
    "reference": reference.why_not,
    "emulated": native.why_not_emulated,
}


class BackendError(RuntimeError):
    """A backend was asked for that cannot run where it would have to."""


def why_not(name: str, device: str = "cpu") -> str:
    """Why backend `name` cannot run on `device`, and what to do; empty if it can.

    A device is one as torch spells it, "cpu" or "cuda:1", or "cuda": any of the GPUs that torch sees.
    """
    return _WHY_NOT[checked(name)](device)


def unusable(name: str) -> str:
    """Why backend `name` can run on no device that torch sees; empty if it can on one."""
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    reasons = [why_not(name, device) for device in devices]
    return reasons[0] if all(reasons) else ""


def available(name: str, device: str = "cpu") -> bool:
    """Whether backend `name` can run on `device`, as for `why_not`."""
    return not why_not(name, device)


def checked(name: str, source: str = "backend", otherwise: str = "") -> str:
    if name not in _WHY_NOT:
        raise ValueError(f"{source}={name!r}: accepted are {', '.join(map(repr, NAMES))}{otherwise}")
    return name


def wish(explicit: str | None) -> str | None:
    """The backend that was asked for: by argument, else by the environment variable FASTOPT_BACKEND."""
    if explicit is not None:
        return checked(explicit, otherwise=", or None to choose automatically")
    name = os.environ.get("FASTOPT_BACKEND") or None
    return name and checked(name, "FASTOPT_BACKEND", "; unset it to choose automatically")


def choose(device: str, asked: str | None) -> str | None:
    """The backend for `device`, as for `why_not`; None where torch's own code is the best there is.

    The reference backend is an oracle: correct everywhere, but slower than torch's own code, so it is never chosen
    over it.
    """
    if asked is not None:
        if reason := why_not(asked, device):
            raise BackendError(f"backend {asked!r} was asked for on device {device!r}: {reason}")
        return asked
    if available("native", device):
        return "native"
    return "triton" if device.startswith("cuda") and available("triton", device) else None
