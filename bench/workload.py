"""From a `Workload` to tensors: parameters, gradients that every contender sees alike, the step that is timed."""

from __future__ import annotations

import atexit
import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from bench.cases import Workload
from bench.contenders import Contender

VALUE_SETS = 3
# A prime number of random values, tiled: drawing 50 million of them takes longer than racing them, and no kernel's
# time depends on them.
TILE = 1_000_003


class Tensors:
    """Initial parameters and gradients, functions of the step alone: contenders that do the same work end alike."""

    def __init__(self, workload: Workload, device: str = "cpu") -> None:
        self.workload, self.device = workload, device
        self._initial = self._values(0)
        self._gradients = [self._values(1 + i) for i in range(VALUE_SETS)]
        self._buffers = [
            self._pieces(torch.empty(workload.numel, dtype=workload.dtype, device=device))
            for _ in range(self._rewritten * 2)
        ]

    def parameters(self) -> list[Parameter]:
        values = map(self._copy, self._initial)
        if self.workload.channels_last:
            values = (value.contiguous(memory_format=torch.channels_last) for value in values)
        return [Parameter(shard(value) if self.workload.sharded else value) for value in values]

    def _copy(self, value: Tensor) -> Tensor:
        if not self.workload.misaligned:
            return value.clone()
        return torch.empty(value.numel() + 1, dtype=value.dtype, device=value.device)[1:].view_as(value).copy_(value)

    @property
    def initial(self) -> Sequence[Tensor]:
        return self._initial

    def give_gradients(self, parameters: Sequence[Parameter], step: int) -> None:
        """What zero_grad and backward would have left at this step: new tensors, at addresses that change."""
        for p in parameters:
            p.grad = None
        values, absent = self._gradients[step % VALUE_SETS], self._absent(step)
        for i, p in enumerate(parameters):
            if i not in absent:
                gradient = self._gradient(values[i], step, i)
                p.grad = shard(gradient, p) if self.workload.sharded else gradient

    def _gradient(self, value: Tensor, step: int, i: int) -> Tensor:
        if self.workload.gradients == "shared":
            return value.detach()
        return self._buffers[step % 2][i].copy_(value).detach() if self._rewritten else self._copy(value)

    @property
    def _rewritten(self) -> bool:
        return self.workload.gradients == "rewritten"

    def _absent(self, step: int) -> frozenset[int]:
        """None at the first step, so that lazily created state is not part of what is timed later."""
        count = len(self.workload.shapes)
        chosen = random.Random(step).sample(range(count), round(count * self.workload.absent)) if step else ()
        return frozenset(chosen)

    def _values(self, seed: int) -> list[Tensor]:
        numel, dtype = self.workload.numel, self.workload.dtype
        tile = torch.randn(min(numel, TILE), generator=torch.Generator().manual_seed(seed)).to(dtype)
        flat = tile.to(self.device).repeat(-(-numel // tile.numel()))[:numel]
        return self._pieces(self._copy(flat) if self.workload.misaligned else flat)

    def _pieces(self, flat: Tensor) -> list[Tensor]:
        shapes = self.workload.shapes
        return [
            piece.view(shape)
            for piece, shape in zip(torch.split(flat, [torch.Size(s).numel() for s in shapes]), shapes, strict=True)
        ]


class OptimizerRunner:
    """A contender at work on its own copy of the tensors. With `state`, what it keeps per element is stored so: made by
    a first step, then converted."""

    def __init__(self, contender: Contender, tensors: Tensors, state: torch.dtype | None = None) -> None:
        self.label = contender.label
        self.tensors = tensors
        self.parameters = tensors.parameters()
        self.optimizer = contender.make(tensors.workload.deal(self.parameters))
        if state is not None and state != tensors.workload.dtype:
            self.prepare(0)
            self.run()
            widen(self.optimizer, state)

    @property
    def values(self) -> list[Tensor]:
        """What the parameters hold."""
        return [getattr(p, "_local_tensor", p) for p in self.parameters]

    def prepare(self, step: int) -> None:
        for p in self.parameters if self.tensors.workload.moved else ():
            p.data = p.data.clone()
        self.tensors.give_gradients(self.parameters, step)
        if self.tensors.workload.scheduled:
            for group in self.optimizer.param_groups:
                group["lr"] = 1e-3 / (1 + step / 1000)

    def run(self) -> None:
        self.optimizer.step()
        if self.tensors.workload.cleared:
            self.optimizer.zero_grad()


def shard(value: Tensor, parameter: Tensor | None = None) -> Tensor:
    """The whole of it as one process's shard, on the first axis as FSDP2's; a gradient by its parameter's own
    placement, which is what FSDP2 makes it with."""
    from torch.distributed.tensor import DTensor, Shard

    if parameter is not None:
        return DTensor(value, parameter._spec, requires_grad=False)  # type: ignore[attr-defined, call-arg]
    sharded: Tensor = DTensor.from_local(value, _mesh(value.device.type), [Shard(0)], run_check=False)
    return sharded


@cache
def _mesh(device: str) -> Any:
    """A group of one, which has nobody to talk to."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if not dist.is_initialized():
        library = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(library, store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(leave_group)
    return init_device_mesh(device, (1,))


def leave_group() -> None:
    """A process can be in one at a time."""
    import torch.distributed as dist

    if _mesh.cache_info().currsize and dist.is_initialized():
        dist.destroy_process_group()
    _mesh.cache_clear()


def widen(optimizer: Any, dtype: torch.dtype) -> None:
    for p, own in optimizer.state.items():
        own.update({k: v.to(dtype) for k, v in own.items() if isinstance(v, Tensor) and v.shape == p.shape and v.dim()})
