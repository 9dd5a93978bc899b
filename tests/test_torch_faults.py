"""Silent faults of torch's own optimizers, most of them in the fused kernels, and that ours do not have them.

For each fault one test shows it in torch, so that what our documentation says of torch stays true, and one tests ours
on every backend. All were seen in torch 2.13 on a CPU; where another version has mended one, its test says so and is
skipped. The faults, with torch's issues, are listed in docs/differences.md.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import oracles
import pytest
import torch
from cases import Case, by_id, each_backend, parametrize
from harness import Spec, difference, outside, place
from torch import Tensor

import fastopt

faults = functools.partial(pytest.mark.contract, "faults", difference="faults of torch that are not reproduced")
pytestmark = faults()

SEEN_IN = (2, 13)
FUSED = ("SGD", "Adagrad", "Adam", "AdamW")
each_fused = pytest.mark.parametrize("name", FUSED)


def stock(name: str, params: Any, **kwargs: Any) -> Any:
    return getattr(torch.optim, name)(params, **kwargs)


def assert_fault(shown: bool, what: str) -> None:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if not shown and version != SEEN_IN:
        pytest.skip(f"torch {torch.__version__} does not show the fault: {what}")
    assert shown, f"torch {torch.__version__} does not show the fault any more: {what}"


def ones(n: int, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Parameter, Tensor]:
    p = torch.nn.Parameter(torch.zeros(n, dtype=dtype))
    p.grad = torch.ones_like(p)
    return p, p.grad


low = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@faults(optimizers="SGD")
@low
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_torch_sgd_in_low_precision_moves_only_the_tail(dtype: torch.dtype, momentum: float) -> None:
    """pytorch#191763: of 1003 elements those 11 that no vector holds."""
    p, _ = ones(1003, dtype)
    stock("SGD", [p], lr=1.0, momentum=momentum, fused=True).step()
    assert_fault(bool((p == 0).any()), "SGD(fused=True) on a CPU skips whole vectors of bf16 and fp16")
    assert 0 < (p != 0).sum() < 64  # the rest of a division by the width of a vector


@faults(optimizers="SGD")
@low
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@each_backend
def test_sgd_in_low_precision_moves_every_element(dtype: torch.dtype, momentum: float, backend: str) -> None:
    for n in (1003, 1, 31, 32, 64):
        p, _ = ones(n, dtype)
        fastopt.SGD([p], lr=1.0, momentum=momentum, fused=True, backend=backend).step()
        assert (p == -1).all()


@each_fused
def test_torch_writes_into_the_neighbours_of_a_strided_parameter(name: str) -> None:
    """A parameter that is every other element of a buffer: half of it is not updated, half of the rest is."""
    base = torch.zeros(50, 2)
    p = torch.nn.Parameter(base[:, 0])
    p.grad = torch.ones(50)
    stock(name, [p], lr=1.0, fused=True).step()
    assert_fault(bool(base[:, 1].any()), f"{name}(fused=True) on a CPU takes every parameter for a dense one")
    assert (base[:, 0] == 0).any()


@each_fused
def test_torch_pairs_elements_by_address_when_strides_differ(name: str) -> None:
    """A transposed parameter with a contiguous gradient: elements get the gradients of others."""
    results = []
    for fused in (True, False):
        p = torch.nn.Parameter(torch.zeros(6, 5).t())
        p.grad = torch.arange(30.0).reshape(5, 6) - 15
        stock(name, [p], lr=1.0, fused=fused).step()
        results.append(p.detach())
    worst = (results[0] - results[1]).abs().max().item()
    assert_fault(worst > 1, f"{name}(fused=True) on a CPU ignores that strides differ")


STRIDED = [
    Spec((50,), "every_other", "contiguous"),
    Spec((5, 6), "transposed", "contiguous"),
    Spec((5, 6), "contiguous", "transposed"),
    Spec((5, 6), "gaps", "contiguous"),
    Spec((2, 3, 4, 5), "channels_last", "contiguous"),
    Spec((50,), "contiguous", "every_other"),
    Spec((4, 7), "contiguous", "expanded"),
]


@pytest.mark.parametrize("spec", STRIDED, ids=lambda s: f"{s.layout}-{s.grad_layout}")
@each_fused
@each_backend
def test_strides_are_followed_and_neighbours_left_alone(name: str, spec: Spec, backend: str) -> None:
    start = torch.linspace(-1, 1, torch.Size(spec.shape).numel()).reshape(spec.shape)
    view, base = place(start, spec.layout)
    p, q = torch.nn.Parameter(view), torch.nn.Parameter(start.clone())
    optimizer = getattr(fastopt, name)([p], lr=0.5, fused=True, backend=backend)
    oracle = oracles.TorchLoop(name, [q], lr=0.5)
    for step in range(3):
        g = torch.cos(torch.arange(float(start.numel())) + step).reshape(spec.shape)
        p.grad = place(g, spec.grad_layout)[0]
        q.grad = p.grad.contiguous().clone()
        optimizer.step()
        oracle.step()
        assert not difference(p.detach().contiguous(), q.detach())
    assert (outside(p.detach(), base) == 7.0).all()


def unfreeze(optimizer: Any, first: Tensor, second: Tensor) -> None:
    """A step with a gradient for the first parameter alone, then two with both."""
    first.grad = torch.ones(3)
    optimizer.step()
    second.grad = torch.ones(3)
    optimizer.step()
    optimizer.step()


@faults(optimizers="SGD")
def test_torch_sgd_cannot_unfreeze_a_parameter() -> None:
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    optimizer, error = stock("SGD", params, lr=1.0, momentum=0.9, fused=True), ""
    try:
        unfreeze(optimizer, *params)
    except TypeError as raised:
        error = str(raised)
    assert_fault("NoneType" in error, "SGD(fused=True, momentum) fails on a gradient that comes late")


@faults(optimizers="SGD")
@each_backend
def test_sgd_unfreezes_a_parameter(backend: str) -> None:
    params, twins = ([torch.nn.Parameter(torch.zeros(3)) for _ in range(2)] for _ in range(2))
    unfreeze(fastopt.SGD(params, lr=1.0, momentum=0.9, dampening=0.5, fused=True, backend=backend), *params)
    unfreeze(oracles.TorchLoop("SGD", twins, lr=1.0, momentum=0.9, dampening=0.5), *twins)
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


@pytest.fixture
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """So that it shows; torch fills what `empty` returns only while algorithms must be deterministic."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def overflow_first(optimizer: Any, p: Tensor) -> None:
    for found in (1.0, 0.0):
        optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(found)
        optimizer.step()


@faults(optimizers="SGD")
@pytest.mark.usefixtures("_uninitialised_memory_is_nan")
def test_torch_sgd_uses_uninitialised_momentum_after_an_overflow() -> None:
    """The first step is skipped, but leaves a momentum_buffer that nobody has written to."""
    p, _ = ones(3)
    overflow_first(stock("SGD", [p], lr=1.0, momentum=0.9, fused=True), p)
    assert_fault(not torch.equal(p, -torch.ones(3)), "SGD(fused=True, momentum) after an overflow in its first step")


@faults(optimizers="SGD")
@pytest.mark.usefixtures("_uninitialised_memory_is_nan")
@pytest.mark.parametrize("kwargs", [{}, {"nesterov": True}, {"dampening": 0.5}], ids=["plain", "nesterov", "damped"])
@each_backend
def test_sgd_has_no_momentum_before_its_first_step(backend: str, kwargs: dict[str, Any]) -> None:
    (p, _), (q, _) = ones(3), ones(3)
    overflow_first(fastopt.SGD([p], lr=1.0, momentum=0.9, fused=True, backend=backend, **kwargs), p)
    oracles.TorchLoop("SGD", [q], lr=1.0, momentum=0.9, **kwargs).step()
    assert torch.equal(p, q)


@each_fused
def test_torch_does_not_bump_versions(name: str) -> None:
    """So that backward through what the step has overwritten gives a wrong gradient instead of an error."""
    w, _ = ones(4)
    w.data.fill_(1)
    loss = (w * w).sum()
    stock(name, [w], lr=1.0, fused=True).step()
    w.grad = None
    with contextlib.suppress(RuntimeError):
        loss.backward()
    assert_fault(w.grad is not None, f"{name}(fused=True) changes parameters behind autograd's back")
    assert not torch.equal(w.grad, torch.full((4,), 2.0))


@each_fused
@each_backend
def test_versions_are_bumped(name: str, backend: str) -> None:
    w, _ = ones(4)
    loss = (w * w).sum()
    optimizer = getattr(fastopt, name)([w], lr=1.0, fused=True, backend=backend)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    tensors = [w, *(v for v in optimizer.state[w].values() if v.dim())]
    before = [t._version for t in tensors]
    optimizer.step()
    assert all(t._version > v for t, v in zip(tensors, before, strict=True))


def checkpoint_step(optimizer: Any, p: Tensor) -> Tensor:
    """The step by which torch.distributed.checkpoint creates states: nothing may move."""
    p.grad = torch.zeros_like(p)
    optimizer.step()
    return p.detach()


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_torch_capturable_step_of_lr_zero_is_nan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """0 / -0. Capturable steps are for GPUs; the same Python code runs on a CPU once it is let."""
    module = vars(inspect.getmodule(torch.optim.Adam))
    monkeypatch.setitem(module, "_get_capturable_supported_devices", lambda *args, **kwargs: ["cpu"])
    p, _ = ones(3)
    moved = checkpoint_step(stock(name, [p], lr=0.0, capturable=True, foreach=False), p)
    assert_fault(bool(moved.isnan().all()), f"{name}(capturable=True, foreach=False) with lr=0 on fresh states")


CAPTURABLE = ("Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Ranger")


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
@pytest.mark.parametrize("name", CAPTURABLE)
@each_backend
def test_step_of_lr_zero_moves_nothing(name: str, backend: str, lr: Any) -> None:
    """Capturable where a device is, or is emulated."""
    p = torch.nn.Parameter(torch.linspace(-1, 1, 9))
    before = p.detach().clone()
    optimizer = getattr(fastopt, name)([p], lr=lr, capturable=backend == "emulated", backend=backend)
    assert torch.equal(checkpoint_step(optimizer, p), before)
    assert all(v.isfinite().all() for v in optimizer.state[p].values())


@pytest.fixture
def mesh() -> Iterator[Any]:
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    from torch.distributed.device_mesh import init_device_mesh

    started = not torch.distributed.is_initialized()
    if started:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    if started:
        torch.distributed.destroy_process_group()


def sharded(mesh: Any, n: int = 12) -> Tensor:
    from torch.distributed.tensor import Shard, distribute_tensor

    p = torch.nn.Parameter(distribute_tensor(torch.zeros(n), mesh, [Shard(0)]))
    p.grad = distribute_tensor(torch.ones(n), mesh, [Shard(0)])
    return p


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_torch_has_no_fused_step_for_dtensors(name: str, mesh: Any) -> None:
    error = ""
    try:
        stock(name, [sharded(mesh)], fused=True).step()
    except NotImplementedError as raised:
        error = str(raised)
    assert_fault("sharding strategy" in error, f"{name}(fused=True) on a DTensor")


@each_fused
@each_backend
def test_dtensors_step_with_fused(name: str, backend: str, mesh: Any) -> None:
    p, (q, _) = sharded(mesh), ones(12)
    optimizer = getattr(fastopt, name)([p], lr=0.5, fused=True, backend=backend)
    reference = stock(name, [q], lr=0.5, foreach=False)
    for _ in range(3):
        optimizer.step()
        reference.step()
    torch.testing.assert_close(p.detach().to_local(), q.detach(), rtol=1e-6, atol=1e-7)


def reloaded_product(module: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """NAdam's mu_product of a bf16 parameter, and the same after saving and loading."""
    p, _ = ones(3, torch.bfloat16)
    optimizer = module.NAdam([p], **kwargs)
    for _ in range(2):
        optimizer.step()
    product = optimizer.state[p]["mu_product"].clone()
    optimizer.load_state_dict(optimizer.state_dict())
    return product, optimizer.state[p]["mu_product"]


@faults(optimizers="NAdam")
def test_torch_rounds_mu_product_on_loading() -> None:
    """Not a fused kernel's, but as silent: a product of factors close to one, to the three digits of bf16."""
    before, after = reloaded_product(torch.optim)
    assert_fault(after.dtype == torch.bfloat16, "load_state_dict casts NAdam's mu_product to the parameter's dtype")
    assert before != after


@faults(optimizers="NAdam")
@each_backend
def test_mu_product_survives_loading(backend: str) -> None:
    before, after = reloaded_product(fastopt, backend=backend)
    assert not difference(after, before)


LATE: list[Case] = by_id("sgd-momentum", "sgd-nesterov", "adagrad", "adam-amsgrad", "adamw")


@parametrize(LATE, ["fp32", "bf16"])
def test_all_at_once(case: Case, dtype: torch.dtype, backend: str) -> None:
    """fused=True, a first overflow, strides, low precision and a late gradient in one optimizer: as without fused."""

    def run(make: Callable[[Any], Any], fused: bool) -> list[Tensor]:
        params = [
            torch.nn.Parameter(torch.linspace(-1, 1, 30, dtype=dtype).reshape(6, 5).t()),
            torch.nn.Parameter(torch.linspace(-1, 1, 67, dtype=dtype)),
        ]
        optimizer = make(params)
        for step in range(-1, 6):
            for i, p in enumerate(params[: 1 if step < 2 else 2]):
                p.grad = torch.cos(torch.arange(float(p.numel())) + step + i).reshape(p.shape).to(dtype)
            if fused:
                optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(float(step < 0))
            if fused or step >= 0:
                optimizer.step()
        return [p.detach() for p in params]

    ours = run(lambda ps: case.make(ps, backend, fused=True), fused=True)
    plain = run(lambda ps: case.make(ps, backend), fused=False)
    assert all(not difference(p, q) for p, q in zip(ours, plain, strict=True))
