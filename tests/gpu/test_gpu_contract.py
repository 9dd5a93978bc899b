"""What a training loop on a GPU relies on: streams, devices, versions, AMP, checkpoints, launches."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, by_id
from gpu_support import (
    CPU,
    DEVICE,
    assert_equal,
    each_backend,
    needs_cuda,
    no_waiting,
    parametrize,
    ramp,
    tensors_of,
    wave,
)

import fastopt
from bench.gpu import is_copy, launches

FUSED = [
    Case(f"{c.id}-fused", c.name, {**c.kwargs, "fused": True})
    for c in by_id("sgd", "sgd-momentum", "sgd-nesterov", "adam-coupled", "adam-everything", "adamw")
]
SCALE = 2.0**10
CHECKER_SECONDS = 60
SIZES = (33, 1000, 5001)


@needs_cuda
@each_backend
@pytest.mark.parametrize("capturable", [False, True])
def test_step_runs_on_the_current_stream(capturable: bool, backend: str) -> None:
    """Gradients arrive late on a side stream: a step launched anywhere else would read what was there before."""
    p, q = ramp(100_000), ramp(100_000)
    lr: Any = torch.tensor(2.0**-6, device="cuda") if capturable else 2.0**-6
    optimizer = fastopt.Adam([p], lr=lr, capturable=capturable, backend=backend)
    expected = fastopt.Adam([q], lr=2.0**-6, backend=backend)
    p.grad = torch.full_like(p, 7.0)
    optimizer.step()
    q.grad = torch.full_like(q, 7.0)
    expected.step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    source = wave(p.numel(), 1)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # about a tenth of a second
        p.grad.copy_(source)
        optimizer.step()
        result = p.detach().clone()
    side.synchronize()
    q.grad.copy_(source)
    expected.step()
    torch.cuda.synchronize()
    assert_equal([result], [q])


@needs_cuda
@each_backend
def test_a_default_device_moves_no_tables(backend: str) -> None:
    """What a plan makes on the host is made there: pinned memory cannot be asked of a GPU."""
    (p, q), (first, second) = ([ramp(33), ramp(5001)] for _ in range(2))
    ours, plain = (fastopt.RAdam(ps, backend=backend) for ps in ((p, q), (first, second)))
    for step in range(3):
        for t in (p, q, first, second):
            t.grad = wave(t.numel(), step)
        with torch.device("cuda"):
            ours.step()
        plain.step()
    assert_equal(tensors_of(ours), tensors_of(plain))


@each_backend
def test_cpu_and_cuda_parameters_in_one_optimizer(backend: str) -> None:
    """One launch for each device; `backend` is asked of both, so only a backend that serves both is."""
    devices = [DEVICE, "cpu", DEVICE, "cpu"]
    params = [ramp(n, device=d) for n, d in zip((33, 33, 4097, 4097), devices, strict=True)]
    optimizer = fastopt.RAdam(params, lr=0.01, backend=None if backend == "triton" else backend)
    for step in range(8):
        for p in params:
            p.grad = wave(p.numel(), step, device=p.device.type)
        optimizer.step()
    for on_gpu, on_cpu in ((0, 1), (2, 3)):
        assert_equal([params[on_gpu]], [params[on_cpu]])


@needs_cuda
@each_backend
def test_every_device_gets_its_own_launch(backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    params = [ramp(1000, device=f"cuda:{i}") for i in range(2)]
    optimizer = fastopt.Adam(params, lr=0.01, backend=backend)
    for step in range(4):
        for p in params:
            p.grad = wave(1000, step, device=str(p.device))
        optimizer.step()
    assert_equal([params[0]], [params[1]])


@each_backend
def test_moving_parameters_between_steps(backend: str) -> None:
    """`p.data = ...` keeps the object and changes the memory; the old memory must stay as it was."""
    p, q = ramp(3000), ramp(3000)
    optimizer, expected = (fastopt.Adam([t], lr=0.01, backend=backend) for t in (p, q))
    for step in range(6):
        if step == 3:
            old = p.data
            untouched = old.clone()
            p.data = p.data.clone()
        for t in (p, q):
            t.grad = wave(3000, step)
        optimizer.step()
        expected.step()
    assert torch.equal(old, untouched)
    assert_equal([p], [q])


@each_backend
def test_moving_all_parameters_in_every_step(backend: str) -> None:
    """Tables are then made and sent anew: without waiting for a busy device, and before the kernels that read them."""
    sizes = [1 + 37 * i for i in range(200)]
    params, others = ([ramp(n) for n in sizes] for _ in range(2))
    optimizer, expected = (fastopt.Adam(ps, lr=0.01, backend=backend) for ps in (params, others))
    for step in range(8):
        for p, q in zip(params, others, strict=True):
            p.data = p.data.clone()
            p.grad, q.grad = wave(p.numel(), step), wave(q.numel(), step)
        if DEVICE != "cpu":
            torch.cuda._sleep(20_000_000)
        # In the first steps kernels may be loaded.
        with contextlib.nullcontext() if DEVICE == "cpu" or step < 2 else no_waiting():
            optimizer.step()
        expected.step()
    assert_equal(params, others)


@parametrize(by_id("sgd-momentum", "adam-everything", "nadam", "ranger", "lookahead-adam"))
def test_versions_are_bumped_and_gradients_left_alone(case: Case, dtype: torch.dtype, backend: str) -> None:
    p = ramp(1037)
    optimizer = case.make([p], backend)
    p.grad = wave(1037, 0)
    grad, values = p.grad, p.grad.clone()
    for _ in range(6):
        resting = ("slow_buffer", "slow_param")  # slow weights are written at the steps that synchronise
        tensors = [p, *(v for k, v in optimizer.state.get(p, {}).items() if v.shape == p.shape and k not in resting)]
        versions = [tensor._version for tensor in tensors]
        optimizer.step()
        assert all(tensor._version > old for tensor, old in zip(tensors, versions, strict=True))
    assert p.grad is grad
    assert grad._version == 0
    assert torch.equal(grad, values)


@each_backend
@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adam", "NAdam", "Ranger"])
def test_a_checkpoint_travels_between_devices(name: str, backend: str) -> None:
    """Half of the steps on the CPU, the other half on the GPU, and the other way round."""
    runs = []
    for devices, names in (
        ((DEVICE, "cpu"), (backend, CPU)),
        (("cpu", DEVICE), (CPU, backend)),
        (("cpu",) * 2, (CPU,) * 2),
    ):
        params = [ramp(n, device=devices[0]) for n in SIZES]
        optimizer = getattr(fastopt, name)(params, lr=0.01, backend=names[0])
        for step in range(10):
            if step == 5:
                params = [torch.nn.Parameter(p.detach().to(devices[1])) for p in params]
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = getattr(fastopt, name)(params, lr=0.01, backend=names[1])
                optimizer.load_state_dict(saved)
            for p in params:
                p.grad = wave(p.numel(), step, device=p.device.type)
            optimizer.step()
        runs.append(tensors_of(optimizer))
    assert_equal(runs[0], runs[2])
    assert_equal(runs[1], runs[2])


@pytest.mark.parametrize("bad", [{0}, {2}, {0, 1, 4}, set()], ids=["first", "middle", "several", "never"])
@parametrize([*FUSED, *by_id("radam", "nadam", "ranger", "lookahead-adam")])
def test_steps_with_an_overflow_did_not_happen(case: Case, dtype: torch.dtype, backend: str, bad: set[int]) -> None:
    """Parameters and states, the counters included, are those of a CPU run over the finite steps alone."""
    params, expected = ([ramp(n, device=d) for n in SIZES] for d in (DEVICE, "cpu"))
    plain = Case(case.id, case.name, {k: v for k, v in case.kwargs.items() if k != "fused"}, case.lookahead)
    optimizer, reference = case.make(params, backend), plain.make(expected, CPU)
    amp = torch.amp.GradScaler(DEVICE, init_scale=SCALE, growth_interval=1000, backoff_factor=0.5)
    for step in range(7):
        scale = amp.get_scale()
        amp.scale(torch.zeros(1, device=DEVICE))
        for p in params:
            p.grad = wave(p.numel(), step) * scale
        if step in bad:
            params[-1].grad[7] = float("inf") if step % 2 else float("nan")
        amp.step(optimizer)
        amp.update()
        assert amp.get_scale() == (scale / 2 if step in bad else scale)
        if step in bad:
            continue
        if case.kwargs.get("fused"):
            assert_equal([p.grad for p in params], [wave(p.numel(), step) for p in params])
        for q in expected:
            q.grad = wave(q.numel(), step, device="cpu")
        reference.step()
    assert_equal(tensors_of(optimizer), tensors_of(reference))


@needs_cuda
@parametrize(FUSED)
def test_an_overflow_is_found_without_waiting(case: Case, dtype: torch.dtype, backend: str) -> None:
    params = [ramp(n) for n in SIZES]
    optimizer = case.make(params, backend)
    for p in params:
        p.grad = wave(p.numel(), 0)
    for _ in range(3):
        optimizer.step()
    before = [t.clone() for t in tensors_of(optimizer)]
    grads = [p.grad.clone() for p in params]
    optimizer.found_inf, optimizer.grad_scale = torch.ones((), device="cuda"), torch.tensor(SCALE, device="cuda")
    torch.cuda.synchronize()
    with no_waiting():
        optimizer.step()
    assert_equal(tensors_of(optimizer), before)
    assert_equal([p.grad for p in params], grads)


@needs_cuda
@each_backend
@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "RAdam", "Ranger"])
def test_training_under_autocast(name: str, backend: str) -> None:
    """The whole recipe with a scale that overflows at first: the loss falls and nothing turns NaN."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).cuda()
    x = torch.randn(64, 8).cuda()
    y = x[:, :1] * 5
    optimizer = getattr(fastopt, name)(model.parameters(), lr=0.05, backend=backend)
    amp = torch.amp.GradScaler("cuda", init_scale=2.0**30, backoff_factor=2.0**-6)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = torch.nn.functional.mse_loss(model(x).float(), y)
        amp.scale(loss).backward()
        amp.step(optimizer)
        amp.update()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.isfinite().all() for p in model.parameters())


@needs_cuda
@each_backend
@pytest.mark.parametrize(
    ("name", "kwargs", "most"),
    [
        ("SGD", {"momentum": 0.9}, 1),
        ("Adagrad", {}, 1),
        ("Adam", {}, 1),
        ("RAdam", {}, 1),
        ("Adam", {"capturable": True}, 2),
        ("RMSprop", {"capturable": True}, 2),
    ],
    ids=str,
)
def test_launches_of_a_step(name: str, kwargs: dict[str, Any], most: int, backend: str) -> None:
    """500 aligned fp32 tensors in 5 groups of different settings: one kernel, two where counters live on the device."""
    params = [ramp(4 * n) for n in range(1, 501)]
    groups = [{"params": params[i::5], "lr": 2.0 ** -(5 + i)} for i in range(5)]
    optimizer = getattr(fastopt, name)(groups, backend=backend, **kwargs)
    for p in params:
        p.grad = wave(p.numel(), 0)
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()
    names = launches(optimizer.step)
    copies = [name for name in names if is_copy(name)]
    assert names, "the profiler saw no kernel: it cannot be used here"
    assert len(names) - len(copies) <= most, names
    assert len(copies) <= 1, names


@needs_cuda
@each_backend
def test_memory_checker_finds_nothing(backend: str, tmp_path: Path) -> None:
    checker = shutil.which("compute-sanitizer")
    if checker is None:
        pytest.skip("compute-sanitizer is not installed")
    script = Path(__file__).with_name("checked_steps.py")
    command = [checker, "--tool", "memcheck", "--error-exitcode", "66", sys.executable, str(script), backend]
    # Every tensor an allocation of its own: inside one of the caching allocator's blocks nothing would be noticed.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    # A process group of its own: stopped alone, the checker would leave what it watches running on the device.
    run = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    try:
        output, _ = run.communicate(timeout=CHECKER_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
        pytest.skip(f"compute-sanitizer was not done after {CHECKER_SECONDS} seconds")
    if "Device not supported" in output:
        pytest.skip("compute-sanitizer does not support this device")
    assert run.returncode == 0, output[-4000:]
    assert "steps done" in output, output[-4000:]
