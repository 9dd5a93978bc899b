"""`info`: versions, devices, and which backend serves which device, or why not."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass

import torch

from fastopt import backends
from fastopt.backends import native, reference
from fastopt.report import table


@dataclass(frozen=True)
class Info:
    """The answer of `info`; ``str()`` lays it out."""

    versions: dict[str, str]
    devices: dict[str, str]
    backends: dict[tuple[str, str], str]
    """(device, backend) -> why it cannot run there, empty if it can."""
    chosen: dict[str, str]
    """device -> the backend that serves it, "torch" for torch's own code, "none" where what was asked for cannot."""
    refused: tuple[str, ...] = ()
    """What the environment asks for and cannot have, and what to do."""

    def __str__(self) -> str:
        lines = ["  ".join(f"{name} {version}" for name, version in self.versions.items()), ""]
        lines += [f"{device}: {text}" for device, text in self.devices.items()]
        rows = [
            (device, name, "chosen" if self.chosen.get(device) == name else "available" if not reason else "no", reason)
            for (device, name), reason in self.backends.items()
        ]
        lines += ["", table(("device", "backend", "", "why not, and what to do"), rows, left=4)]
        for device, name in self.chosen.items():
            if name == "torch":
                lines += [
                    "",
                    f"On {device}, classes that torch has run torch.optim's code; the others, the reference backend.",
                ]
        lines += ["", *self.refused] if self.refused else []
        return "\n".join(lines)


def info() -> Info:
    """Versions, devices, and which backend serves which device; where one is missing, why and what to do.

    Example:
        >>> import fastopt
        >>> print(fastopt.info())  # doctest: +SKIP
    """
    devices = {"cpu": _cpu()}
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        devices["cuda"] = f"{names}, {_cuda_kernels()}"
    elif torch.version.cuda:
        devices["cuda"] = f"none that torch can use, though it was built for CUDA {torch.version.cuda}"
    places = [place for device in devices for place in _places(device)]
    reasons = {(place, name): backends.why_not(name, place) for place in places for name in backends.NAMES}
    usable = [place for place in places if place == "cpu" or torch.cuda.is_available()]
    chosen: dict[str, str] = {}
    refused: list[str] = []
    for device in usable:
        try:
            chosen[device] = backends.choose(device, backends.wish(None)) or "torch"
        except (backends.BackendError, ValueError) as error:
            chosen[device] = "none"
            refused.append(
                f"FASTOPT_BACKEND is set, and on {device} every optimizer without a backend= of its own raises: {error}"
            )
    return Info(_versions(), devices, reasons, chosen, tuple(dict.fromkeys(refused)))


def _places(device: str) -> list[str]:
    """GPUs one by one if it is not the same of all that can be said of them."""
    each = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if device == "cuda" else []
    said = {tuple(backends.why_not(name, place) for name in backends.NAMES) for place in each}
    return each if len(said) > 1 else [device]


def _versions() -> dict[str, str]:
    from fastopt import __version__

    versions = {"fastopt": __version__, "torch": torch.__version__, "python": platform.python_version()}
    try:
        versions["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        versions["triton"] = "absent"
    return versions


def _cuda_kernels() -> str:
    module = native.extension()
    archs = module.cuda_archs() if module else ""
    return f"kernels for sm_{archs.replace(';', ', sm_')}" if archs else "no compiled kernels"


def _cpu() -> str:
    module = native.extension()
    try:
        kernels = f"kernels for {module.instruction_set()}" if module else "no kernels"
    except ValueError as error:  # FASTOPT_ISA names what this processor or this build does not have
        kernels = f"no kernels ({error})"
    fused = "" if all(reference.fma_is_fused().values()) else "not "
    threads = torch.get_num_threads()
    return f"{platform.machine()}, {threads} threads, {kernels}, torch's multiply-add is {fused}fused"
