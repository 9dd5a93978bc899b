"""The Triton backend: every chain on a GPU without a compiler, in one launch per device, chain and mix of dtypes.

Works without the compiled extension, and lets that do the host's work where it is. Triton is imported by the first
function that needs it: without it this backend is missing, and nothing else. In the order of who may import whom, the
last first:

- compiled.py, plan.py: the host's work in a step, by the compiled plan or in Python;
- launch.py: the block of bytes that a step sends, and how kernels are started;
- rows.py: the kernel that makes the coefficients of steps that a device counts, and what it is told;
- tables.py: what the kernels read beside the tensors;
- kernels.py: the kernels of the chains.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from fastopt.backends import native
from fastopt.backends.triton import compiled, plan
from fastopt.setting import Setting
from fastopt.turns import Turns

OLDEST = (3, 6)


def make_plan(names: native.Names, setting_of: Callable[[Mapping[str, Any]], Setting], turns: Turns) -> plan.TritonPlan:
    """The plan of an optimizer, by whoever can do the host's work; `names` as for the native plan, `turns` those of
    steps."""
    if compiled.ENABLED and not native.why_not():
        return compiled.CompiledPlan(setting_of, names, turns)
    return plan.TritonPlan(setting_of)


def why_not(device: str = "cpu") -> str:
    """Why Triton cannot serve a device, or a kind of devices; on the CPU only its interpreter can, for tests."""
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    if device == "cpu":
        if not interpreting:
            return "Triton compiles for GPUs (its interpreter runs on a CPU, for tests: set TRITON_INTERPRET=1)"
        return _why_not_triton() or _why_not_interpreter()
    if not device.startswith("cuda"):
        return f"the Triton backend has no {device} kernels"
    if interpreting:
        return "TRITON_INTERPRET=1 is set, which runs Triton's kernels on the CPU: unset it"
    # In this order, or Triton is imported where it has nothing to do.
    return native.of_gpu(device, _why_not_gpu) or _why_not_triton()


@cache
def _why_not_triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: `pip install triton` (it comes with CUDA builds of torch for Linux)"
    try:
        import triton
    except Exception as error:  # a broken installation can raise anything
        return f"Triton does not load ({type(error).__name__}: {error}): reinstall it"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST:
        return f"Triton {triton.__version__} is too old: `pip install 'triton>={'.'.join(map(str, OLDEST))}'`"
    return ""


def _why_not_interpreter() -> str:
    import triton.language

    if type(triton.language.cdiv).__name__ != "InterpretedFunction":
        return "TRITON_INTERPRET=1 was set after Triton was imported: set it before"
    return ""


@cache
def _why_not_gpu(index: int) -> str:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.hip:
        return "the Triton backend was never run on ROCm"
    if torch.cuda.get_device_capability(index) < (8, 0):
        return f"CUDA device {index} ({torch.cuda.get_device_name(index)}) is older than compute capability 8.0"
    return ""
