"""The compiled extension: kernels of every chain for the CPU and, where nvcc was there, for CUDA devices; its Plan."""

from __future__ import annotations

import ctypes
import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastopt.backends.amp import NONE, Amp
from fastopt.chain import Chain
from fastopt.setting import PULL, Groups, Setting, State

Names: TypeAlias = "tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]"
"""Keys of a group that make a setting, state keys of counters, and keys of a group that mean nothing here."""
_REBUILD = (
    "install again from fastopt's source tree, with `pip install --no-build-isolation --force-reinstall --no-deps .` "
    "(-v shows why it was not compiled; for the tree's own environment, `make build`)"
)


@cache
def _load() -> tuple[ModuleType | None, str]:
    """The extension, or why there is none; one built for another torch may crash, so its stamp is read first."""
    spec = importlib.util.find_spec("fastopt._C")
    if spec is None or spec.origin is None:
        return _warned(
            "the compiled extension is not installed (it needs torch, ninja and a C++20 compiler at install time): "
            "install what was missing, then " + _REBUILD
        )
    built_for = _stamp(spec.origin)
    if built_for not in (None, torch.__version__):
        return _warned(f"the extension was built for torch {built_for}, this is torch {torch.__version__}: {_REBUILD}")
    try:
        module = importlib.import_module("fastopt._C")
    except ImportError as error:
        return _warned(f"the compiled extension does not load ({error}): {_REBUILD}")
    return module, ""


def _warned(reason: str) -> tuple[None, str]:
    """Said once in a process: on a CPU, what is left is no faster than torch.optim."""
    warnings.warn(f"fastopt runs without its native backend: {reason}", RuntimeWarning, stacklevel=_level_of_user())
    return None, reason


def _level_of_user() -> int:
    """Of the caller's caller, counted as `warnings.warn` does: the innermost frame outside this package and torch."""
    level, frame = 2, sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("fastopt", "torch"):
        level, frame = level + 1, frame.f_back
    return level


def _stamp(path: str) -> str | None:
    """The torch version an extension was built for, read from the file without loading it."""
    mark = b"fastopt built for torch "
    _, found, rest = Path(path).read_bytes().partition(mark)
    return rest.partition(b"\0")[0].decode() if found else None


def extension() -> ModuleType | None:
    return _load()[0]


def why_not(device: str = "cpu") -> str:
    module, reason = _load()
    if module is None or device == "cpu":
        return reason
    if not device.startswith("cuda"):
        return f"the native backend has no {device} kernels"
    if not module.has_cuda():
        if not torch.cuda.is_available():
            return "torch sees no CUDA device (and the compiled extension was built without CUDA kernels)"
        return (
            "the compiled extension was built without CUDA kernels: put nvcc on PATH (or set CUDA_HOME), set "
            "FASTOPT_CUDA=1, then " + _REBUILD
        )
    return of_gpu(device, _why_not_gpu)


def of_gpu(device: str, why_not_gpu: Callable[[int], str]) -> str:
    """What is against "cuda:1", or against all GPUs there are: of "cuda" one that can be served is enough."""
    index = device.partition(":")[2]
    reasons = [why_not_gpu(i) for i in ([int(index)] if index else range(max(1, torch.cuda.device_count())))]
    return reasons[0] if all(reasons) else ""


@cache
def _why_not_gpu(index: int) -> str:
    """What the driver and the device have against the kernels that were built."""
    module = extension()
    assert module is not None
    reason: str = module.cuda_why_not(index)
    return reason or ("" if torch.cuda.is_available() else "this torch was built without CUDA")


def why_not_emulated(device: str = "cpu") -> str:
    """The GPU kernels' source run on the CPU, lane by lane: for tests, never chosen automatically."""
    module, reason = _load()
    if module is None or module.has_emulator():
        return reason if device == "cpu" else "the emulated device is the CPU"
    return "the compiled extension was built without the emulator: set FASTOPT_EMULATOR=1, then " + _REBUILD


@cache
def _indices() -> dict[str, int]:
    module = extension()
    return {} if module is None else {name: index for index, name in enumerate(module.chain_names())}


def chain_index(chain: Chain) -> int:
    """The compiled kernel of a chain."""
    try:
        return _indices()[chain.name]
    except KeyError:
        raise RuntimeError(
            f"the chain {chain.name} is not compiled into fastopt._C: add its rule to csrc/chains.h and rebuild"
        ) from None


@cache
def _centralised() -> frozenset[str]:
    module = extension()
    return frozenset() if module is None else frozenset(module.centralised_chain_names())


def lacks(setting: Setting, device: str = "cpu", centralised: bool = False) -> str:
    """What of a setting was not compiled, for rules that the extension does not know; empty if it has all.

    `centralised`: whether the gradient is, for which the kernels of a device are others.
    """
    pulls = setting.rule.slow is not None and not setting.rule.period(setting.h)
    chains = [chain for chain in setting.chains if chain is not None and (chain is not PULL or pulls)]
    unknown = [chain.name for chain in chains if chain.name not in _indices()]
    if unknown:
        return f"the extension has no kernel for {unknown[0]} (csrc/chains.h)"
    if centralised and device != "cpu" and (unknown := [c.name for c in chains if c.name not in _centralised()]):
        return f"the extension has no kernel for {unknown[0]} with centralised gradients on a device (csrc/chains.h)"
    counts_there = device != "cpu" and setting.counts_on_device and setting.rule.counters
    if counts_there and setting.on_device() is None:
        return "its steps are counted on the device, and the extension does not have its coefficients (csrc/rows.h)"
    return ""


def find_ordinary(params: Sequence[Tensor]) -> tuple[bytes, bool]:
    """For each parameter 0 where a closer look is needed; else nothing that `fastopt.routing` looks for can be the
    matter with it or its gradient, and no backend tells those of the same number apart. And whether there is no 0, and
    none shares memory with another."""
    module = extension()
    if module is None:
        return bytes(len(params)), False
    found: tuple[bytes, bool] = module.find_ordinary(params)
    return found


def find_complete(groups: Sequence[tuple[Setting, Sequence[Tensor]]], state: dict[Tensor, Any]) -> bytes:
    """For each parameter 1 if all of its state is there and as it should be, and 0, or nothing, where a closer look is
    needed."""
    module = extension()
    if module is None or not isinstance(state, dict):
        return b""
    told = [
        (params, [slot.key for slot in s.named_slots.values()], list(s.rule.counters), s.counts_on_device)
        for s, params in groups
    ]
    found: bytes = module.find_complete(told, state)
    return found


def drop_gradients(groups: Sequence[dict[str, Any]]) -> list[Tensor] | None:
    """Set ``p.grad = None`` for all parameters but those returned, which are no plain torch tensors; None: for none."""
    module = extension()
    if module is None:
        return None
    left: list[Tensor] = module.drop_gradients(groups)
    return left


def advise_huge_pages(t: Tensor) -> None:
    """Ask for huge pages behind a tensor that was allocated but not yet written to."""
    module = extension()
    if module is not None and t.layout == torch.strided:
        module.advise_huge_pages(t.data_ptr(), t.untyped_storage().nbytes())


def pinned(host: Tensor, device: torch.device) -> Tensor:
    """Host memory that can be copied to a device without waiting for what that is doing. (When it is let go of, torch
    gives it to others only after the copies.)"""
    return host if device.type == "cpu" else host.pin_memory()


class DeviceMemory:
    """Memory for the tables of a plan, from torch's allocator.

    The compiled plan holds what it uses now. What kernels in flight, or a captured graph, may still read is held here.
    """

    def __init__(self, emulate: bool) -> None:
        self._device = "cpu" if emulate else "cuda:{}"
        self._newest: dict[int, Tensor] = {}
        self._streams: dict[int, int] = {}  # each was allocated on
        self._captured: list[Tensor] = []

    def name(self, device: int) -> str:
        return self._device.format(device)

    def allocate(self, device: int, nbytes: int) -> Tensor:
        self._newest[device] = torch.empty(nbytes, dtype=torch.uint8, device=self.name(device))
        self._streams[device] = self.stream(device)
        return self._newest[device]

    def upload(self, to: Tensor, address: int, nbytes: int) -> None:
        host = torch.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype=torch.uint8)
        to[:nbytes].copy_(pinned(host, to.device), non_blocking=True)

    def stream(self, device: int) -> int:
        """The current one, as its raw handle."""
        return 0 if self._device == "cpu" else torch._C._cuda_getCurrentRawStream(device)

    def streams(self, devices: Sequence[int]) -> list[int]:
        """Those that the tables of devices were allocated on."""
        return [self._streams[device] for device in devices]

    def used(self, device: int, stream: int) -> None:
        """Kernels on the current stream, as its raw handle, are about to read the tables of a device."""
        tables = self._newest.get(device)
        if tables is None or self._device == "cpu":
            return
        if stream != self._streams[device]:
            # The allocator gives freed memory to the stream it was allocated on without asking the others.
            tables.record_stream(torch.cuda.current_stream(device))
        if torch.cuda.is_current_stream_capturing() and not any(tables is kept for kept in self._captured):
            self._captured.append(tables)


class Plan:
    """The compiled plan, told on which streams to run and where a loss scale lies."""

    def __init__(self, core: Any, memory: DeviceMemory) -> None:
        self._core, self._memory = core, memory
        self.build, self.gather, self.release = core.build, core.gather, core.release

    def launch(self, amp: Amp) -> None:
        self._core.launch([self._step(device, amp) for device in self._core.devices()])

    def run(self, groups: Groups, state: State, sync: Sequence[Any] | None) -> bool:
        """`gather` and `launch` in one, for which nothing has to be kept alive in between: of a thousand small tensors
        that takes longer than the rest. False if the plan has to be built anew, and then nothing has changed."""
        steps = [self._step(device, NONE) for device in self._core.devices()]
        return bool(self._core.run(groups, state, sync, steps))

    @property
    def whole_step(self) -> Callable[[dict[str, Any]], bool]:
        """The step of an optimizer that this plan serves alone, given its ``__dict__``, while no graph is captured.

        It answers False, and has changed nothing, when there is more to do: new tables, hooks, a loss scale.
        """
        devices: list[int] = self._core.devices()
        step: Callable[[dict[str, Any]], bool] = self._core.step
        return partial(self._step_on, devices, self._memory.streams(devices)) if devices else step

    def _step_on(self, devices: list[int], own_streams: list[int], optimizer: dict[str, Any]) -> bool:
        streams = list(map(self._memory.stream, devices))
        # On another stream, the tables' memory must be told of it.
        return streams == own_streams and self._core.step(optimizer, *streams)

    @property
    def launches(self) -> int:
        """How many kernels the last step launched on devices."""
        return int(self._core.device_launches())

    def _step(self, device: int, amp: Amp) -> tuple[int, int, int]:
        stream = self._memory.stream(device)
        self._memory.used(device, stream)
        return stream, *amp.addresses(self._memory.name(device))


def make_core(names: Names, intern: Any, memory: DeviceMemory | None, kernels: str) -> Any:
    """The compiled Plan. `kernels`: whose run on a device: "cuda", "emulated", or "external", somebody else's."""
    module = extension()
    assert module is not None, why_not()
    return module.Plan(*names, intern, memory, kernels)


def make_plan(names: Names, intern: Any, emulate: bool = False) -> Plan:
    memory = DeviceMemory(emulate)
    core = make_core(names, intern, memory, "emulated" if emulate else "cuda")
    return Plan(core, memory)
