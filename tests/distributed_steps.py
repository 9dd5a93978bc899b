"""What each process of a group does, two over gloo or, on a GPU, one over NCCL: `distributed_steps.py TASK FOLDER`.

RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are as torchrun sets them, FASTOPT_TEST_DEVICE is "cpu" or "cuda"; `run`
starts such a group.
"""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastopt

DEVICE = os.environ.get("FASTOPT_TEST_DEVICE", "cpu")
WORLD = int(os.environ.get("WORLD_SIZE", "2"))
STEPS = 7
RULES: dict[str, Callable[[Any, str | None], Any]] = {
    "sgd": lambda ps, b: fastopt.SGD(ps, lr=0.1, momentum=0.9, backend=b),
    "rmsprop": lambda ps, b: fastopt.RMSprop(ps, lr=0.01, momentum=0.5, centered=True, backend=b),
    "adagrad": lambda ps, b: fastopt.Adagrad(ps, lr=0.1, backend=b),
    "adam": lambda ps, b: fastopt.Adam(ps, lr=0.01, amsgrad=True, backend=b),
    "adamw": lambda ps, b: fastopt.AdamW(ps, lr=0.01, weight_decay=0.1, backend=b),
    "adamax": lambda ps, b: fastopt.Adamax(ps, lr=0.01, backend=b),
    "nadam": lambda ps, b: fastopt.NAdam(ps, lr=0.01, backend=b),
    "radam": lambda ps, b: fastopt.RAdam(ps, lr=0.01, backend=b),
    "ranger": lambda ps, b: fastopt.Ranger(ps, lr=0.05, k=3, backend=b),
    "lookahead": lambda ps, b: fastopt.Lookahead(fastopt.Adam(ps, lr=0.01, backend=b), k=3),
}
KERNELS = ("native", "reference", "emulated") if DEVICE == "cpu" else ("native", "triton")
BACKENDS = [name for name in KERNELS if fastopt.backends.available(name, DEVICE)]


def run(task: str, folder: Path, device: str = "cpu", world: int = 2) -> None:
    """The task in a process for each rank; what one of them says is told when it fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # Loopback, for a machine may have no network.
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "FASTOPT_TEST_DEVICE": device,
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }
    with ExitStack() as files:
        # Not pipes: one that nobody reads from yet fills up, and its process waits while the others wait for it.
        said = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(world)]
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, task, str(folder)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**environment, "RANK": str(rank)},
            )
            for rank, file in enumerate(said)
        ]
        try:
            for process in processes:
                process.wait(timeout=300)
        finally:
            for process in processes:
                process.kill()
        for process, file in zip(processes, said, strict=True):
            file.seek(0)
            assert process.returncode == 0, file.read()


def model() -> nn.Sequential:
    """Odd sizes: shards are uneven, and the last layer's bias leaves rank 1 with an empty one."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3), nn.Linear(3, 1)).to(DEVICE)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 5, generator=generator).to(DEVICE), torch.randn(8, 1, generator=generator).to(DEVICE)


def train(net: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()


def full(p: torch.Tensor) -> torch.Tensor:
    return p.full_tensor() if hasattr(p, "full_tensor") else p.detach()  # type: ignore[operator]


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, device=DEVICE)


def plain(make: Any, steps: int = STEPS) -> list[torch.Tensor]:
    """The same training in one process, every rank with the same batch."""
    net = model()
    train(net, make(net.parameters(), None), range(steps))
    return [p.detach() for p in net.parameters()]


def sharded() -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    net = model()
    for layer in net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(net)


def fsdp(folder: Path) -> None:
    """FSDP2 averages equal gradients, so every rule must take the single process's values bit for bit."""
    from torch.distributed.tensor import DTensor

    for name, make in RULES.items():
        want = plain(make)
        for backend in BACKENDS:
            net = sharded()
            optimizer = make(net.parameters(), backend)
            train(net, optimizer, range(STEPS))
            for p, w in zip(net.parameters(), want, strict=True):
                assert torch.equal(full(p), w), (name, backend, full(p), w)
                states = optimizer.state[p]
                assert states, f"{name}: a shard without state"
                for key, value in states.items():
                    if value.shape == p.shape and value.dim():
                        assert isinstance(value, DTensor), (name, key)
                        assert value.placements == p.placements
            explained = str(fastopt.explain(optimizer))
            assert "torch" not in explained.split("chain")[-1], explained


def resume(folder: Path) -> None:
    """Saved half-way by the distributed checkpoint, nested or flat (as torchtitan does), loaded into a fresh model and
    optimizer: the same bits."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    for name, make in RULES.items():
        for way, options in {
            "": StateDictOptions(),
            "-flat": StateDictOptions(flatten_optimizer_state_dict=True),
        }.items():
            net = sharded()
            optimizer = make(net.parameters(), None)
            train(net, optimizer, range(3))
            model_state, optimizer_state = get_state_dict(net, optimizer, options=options)
            state = {"model": model_state, "optimizer": optimizer_state}
            dcp.save(state, checkpoint_id=str(folder / f"{name}{way}"))
            train(net, optimizer, range(3, STEPS))

            again = sharded()
            other = make(again.parameters(), None)
            model_state, optimizer_state = get_state_dict(again, other, options=options)
            loaded = {"model": model_state, "optimizer": optimizer_state}
            dcp.load(loaded, checkpoint_id=str(folder / f"{name}{way}"))
            set_state_dict(
                again,
                other,
                model_state_dict=loaded["model"],
                optim_state_dict=loaded["optimizer"],
                options=options,
            )
            train(again, other, range(3, STEPS))
            for p, q in zip(net.parameters(), again.parameters(), strict=True):
                assert torch.equal(full(p), full(q)), (name, way)


def reshard(folder: Path) -> None:
    """A checkpoint of two shards loads into an unsharded model: what `resume` saved, read by each rank alone."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    for name, make in RULES.items():
        net = model()
        optimizer = make(net.parameters(), None)
        model_state, optimizer_state = get_state_dict(net, optimizer)
        loaded = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(loaded, checkpoint_id=str(folder / name))
        set_state_dict(
            net,
            optimizer,
            model_state_dict=loaded["model"],
            optim_state_dict=loaded["optimizer"],
            options=StateDictOptions(),
        )
        train(net, optimizer, range(3, STEPS))
        for p, w in zip(net.parameters(), plain(make), strict=True):
            assert torch.equal(p.detach(), w), name


def placements(folder: Path) -> None:
    """A gradient placed otherwise than its parameter has other elements in its shard, or not their sum. It is
    redistributed for the step, as torch's operators do, and left as it was."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh(DEVICE, (WORLD,))

    def gradient(whole: torch.Tensor, placement: Any) -> torch.Tensor:
        if isinstance(placement, Partial):
            return DTensor.from_local(whole / WORLD, mesh, [placement])
        return distribute_tensor(whole, mesh, [placement])

    pairs = ((Shard(0), Replicate()), (Replicate(), Partial()), (Shard(0), Shard(1)))
    for name, make in RULES.items():
        for backend in BACKENDS:
            for own, other in pairs:
                p = nn.Parameter(distribute_tensor(ones(4, 6), mesh, [own]))
                alike = nn.Parameter(distribute_tensor(ones(5), mesh, [Shard(0)]))
                q, r = nn.Parameter(ones(4, 6)), nn.Parameter(ones(5))
                ours, theirs = make([p, alike], backend), make([q, r], None)
                for step in range(STEPS):
                    q.grad, r.grad = torch.linspace(-1, 1, 24, device=DEVICE).reshape(4, 6) + step, ones(5)
                    p.grad = given = gradient(q.grad, own if step == 3 else other)
                    alike.grad = gradient(r.grad, Shard(0))
                    ours.step()
                    theirs.step()
                    assert p.grad is given
                assert torch.equal(full(p), q), (name, backend, own, other)
                assert torch.equal(full(alike), r), (name, backend)
    for backend in BACKENDS:
        columns = nn.Parameter(distribute_tensor(ones(4, 6), mesh, [Shard(1)]))
        columns.grad = distribute_tensor(torch.arange(24.0, device=DEVICE).reshape(4, 6), mesh, [Shard(1)])
        with pytest.raises(ValueError, match="dimension 0"):  # the mean of half a row is not the row's
            fastopt.Ranger([columns], backend=backend).step()
        fastopt.Ranger([columns], use_gc=False, lr=1.0, backend=backend).step()
        assert not torch.equal(full(columns), ones(4, 6))
        for cls in (torch.optim.Adam, fastopt.Adam):
            whole = nn.Parameter(ones(4, 6))
            whole.grad = columns.grad
            with pytest.raises(RuntimeError, match="DTensor"):
                cls([whole]).step()
        columns.grad = None
        row = fastopt.explain(fastopt.Adam([columns], backend=backend)).groups[0]
        assert (row.parameters, row.parameter_bytes) == (24, 24 * 4 // WORLD)


def freed(folder: Path) -> None:
    """What is taken out of the state of a sharded model, to offload it, and its gradients are freed at once."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh(DEVICE, (WORLD,))
    for name in ("sgd", "adamw", "ranger"):
        for backend in BACKENDS:
            p = nn.Parameter(distribute_tensor(ones(6, 4), mesh, [Shard(0)]))
            optimizer = RULES[name]([p], backend)
            for _ in range(3):
                # Not scattered: gloo's threads may hold what they sent a little longer.
                p.grad = DTensor.from_local(ones(6 // WORLD, 4), mesh, [Shard(0)])
                optimizer.step()
            state = optimizer.state[p]
            keys = [key for key, value in state.items() if value.dim()]
            held = [weakref.ref(t._local_tensor) for t in (p.grad, *(state[key] for key in keys))]
            p.grad = None
            state.update({key: state[key].clone() for key in keys})
            assert keys
            assert not [ref for ref in held if ref() is not None], (name, backend)


def sequence(folder: Path) -> None:
    """Sequence parallelism: the parameters of a norm are replicated, their gradients partial sums."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8)).to(DEVICE)

    mesh = init_device_mesh(DEVICE, (WORLD,))
    plan = {
        "0": SequenceParallel(),
        "1": ColwiseParallel(input_layouts=Shard(1)),
        "3": RowwiseParallel(output_layouts=Replicate()),
    }
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for name, of_torch in (("AdamW", torch.optim.AdamW), ("SGD", torch.optim.SGD), ("RMSprop", torch.optim.RMSprop)):
        both = [parallelize_module(net(), mesh, plan) for _ in range(2)]
        optimizers = [getattr(fastopt, name)(both[0].parameters(), lr=0.01), of_torch(both[1].parameters(), lr=0.01)]
        for _ in range(4):
            for module, optimizer in zip(both, optimizers, strict=True):
                optimizer.zero_grad()
                module(x).square().mean().backward()
                optimizer.step()
        for p, q in zip(both[0].parameters(), both[1].parameters(), strict=True):
            # Each of torch's steps may differ from the for-loop's by its root and by foreach's order of operations, a
            # last place or two of what is added to parameters of order one.
            error = 4 * 2 * torch.finfo(torch.float32).eps
            torch.testing.assert_close(full(p), full(q), rtol=error, atol=error)


def large(folder: Path) -> None:
    """Shards of which the native backend lets other Python threads run meanwhile."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, n = init_device_mesh(DEVICE, (WORLD,)), 1 << 22
    for name in ("sgd", "adamw"):
        p, q = nn.Parameter(distribute_tensor(ones(n), mesh, [Shard(0)])), nn.Parameter(ones(n))
        ours, theirs = RULES[name]([p], None), RULES[name]([q], None)
        for step in range(3):
            q.grad = torch.linspace(-1, 1, n, device=DEVICE) + step
            p.grad = distribute_tensor(q.grad, mesh, [Shard(0)])
            ours.step()
            theirs.step()
        assert torch.equal(full(p), q), name


def ddp(folder: Path) -> None:
    """Gradients that are views of DDP's buckets, at whatever offset."""
    from torch.nn.parallel import DistributedDataParallel

    for name, make in RULES.items():
        for backend in BACKENDS:
            net = DistributedDataParallel(model(), gradient_as_bucket_view=True)
            train(net, make(net.parameters(), backend), range(STEPS))
            for p, w in zip(net.parameters(), plain(make), strict=True):
                assert torch.equal(p.detach(), w), (name, backend)


def slow(folder: Path) -> None:
    """Slow weights of a model whose root keeps, after an evaluation, the whole parameters that it gathered for it; and
    back from them to the fast ones, to train on."""

    def evaluated(net: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            result: torch.Tensor = net(batch(99)[0])
        return result

    from torch.distributed.fsdp import fully_shard

    for name in ("ranger", "lookahead"):
        nets = [model(), fully_shard(model())]
        optimizers = [RULES[name](net.parameters(), None) for net in nets]
        for steps in (range(4), range(4, 5)):
            results = []
            for net, optimizer in zip(nets, optimizers, strict=True):
                train(net, optimizer, steps)
                fast = evaluated(net)
                with optimizer.slow_weights(net):
                    results.append((fast, evaluated(net)))
            (fast, slow), others = results
            for result, other in zip(results[0], others, strict=True):
                assert torch.allclose(result, other, rtol=1e-5, atol=1e-6), name
            assert not torch.allclose(fast, slow, rtol=1e-3), name


def flattened(folder: Path) -> None:
    """FSDP1, whose shards are parts of one flat tensor: the values of a single process, resumed to the same bits by
    the distributed checkpoint and by FSDP1's own dicts; slow weights; Ranger says that it finds no rows there."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import FullyShardedDataParallel

    def whole(net: nn.Module) -> torch.Tensor:
        with FullyShardedDataParallel.summon_full_params(net):
            return flat(net.parameters())

    def flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
        return torch.cat([t.detach().flatten() for t in tensors])

    def made(keep_names: bool) -> nn.Module:
        return FullyShardedDataParallel(model(), use_orig_params=keep_names, device_id=torch.device(DEVICE))

    rules = {**RULES, "ranger": lambda ps, b: fastopt.Ranger(ps, lr=0.05, k=3, use_gc=False, backend=b)}
    for keep_names in (False, True):
        with pytest.warns(UserWarning, match="took the shapes off"):
            fastopt.Ranger(made(keep_names).parameters())
        for name, make in rules.items():
            want = flat(plain(make))
            net = made(keep_names)
            optimizer = make(net.parameters(), None)
            train(net, optimizer, range(4))
            saved = copy.deepcopy(get_state_dict(net, optimizer))
            own = copy.deepcopy((net.state_dict(), FullyShardedDataParallel.optim_state_dict(net, optimizer)))
            train(net, optimizer, range(4, STEPS))
            again = made(keep_names)
            other = make(again.parameters(), None)
            set_state_dict(again, other, model_state_dict=saved[0], optim_state_dict=saved[1])
            train(again, other, range(4, STEPS))
            nets = [net, again]
            if not keep_names:  # else what torch 2.13 saves is not what it was given, torch.optim's moments likewise
                nets.append(third := made(keep_names))
                last = make(third.parameters(), None)
                third.load_state_dict(own[0])
                last.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(third, last, own[1]))
                train(third, last, range(4, STEPS))
            for result in nets:
                assert torch.equal(whole(result), want), (name, keep_names)
            if name in ("ranger", "lookahead"):
                with optimizer.slow_weights(net):
                    slow = whole(net)
                single = model()
                alone = make(single.parameters(), None)
                train(single, alone, range(STEPS))
                with alone.slow_weights():
                    assert torch.equal(slow, flat(single.parameters())), (name, keep_names)


def zero(folder: Path) -> None:
    """Each rank steps its share of the parameters and broadcasts it."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    for name in ("SGD", "Adam", "AdamW", "RAdam", "Ranger"):
        cls = getattr(fastopt, name)
        net = model()
        train(net, ZeroRedundancyOptimizer(net.parameters(), optimizer_class=cls, lr=0.01), range(STEPS))
        for p, w in zip(net.parameters(), plain(lambda ps, b, cls=cls: cls(ps, lr=0.01)), strict=True):
            assert torch.equal(p.detach(), w), name
    with pytest.raises(TypeError, match="make Lookahead inside"):
        fastopt.Lookahead(ZeroRedundancyOptimizer(model().parameters(), optimizer_class=fastopt.Adam, lr=0.01))


if __name__ == "__main__":
    task, folder = sys.argv[1:]
    torch.set_num_threads(1)
    if DEVICE == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    globals()[task](Path(folder))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    # gloo's threads may let go of tensors while the interpreter ends, which now and then aborts it (pytorch#190489).
    os._exit(0)
