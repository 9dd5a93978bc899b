"""What the kernels do not take goes to torch's own code, parameter by parameter; the rest still goes to the kernels."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from cases import BACKENDS, TORCH_CASES, Case, by_id, each_backend, each_name, parametrize
from harness import difference, ramp, wave
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

import fastopt
from fastopt import routing

pytestmark = pytest.mark.contract("fallback")

ONE_OF_EACH = by_id("sgd-momentum", "rmsprop-everything", "adagrad", "adam-everything", "adamw", "adamax", "nadam")
ONE_OF_EACH += by_id("radam-coupled")


def parameter(values: Any, **kwargs: Any) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.as_tensor(values, **kwargs))


def matches(ours: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> bool:
    """Equal to torch's loop as it is, or to it with correctly rounded square roots (the kernels took it after all)."""
    tensors = (t.to_dense() if t.is_sparse else t for t in (ours, plain, exact))
    ours, plain, exact = (torch.view_as_real(t) if t.is_complex() else t for t in tensors)
    return not difference(ours, plain) or not difference(ours, exact)


def run_three(
    case: Case, backend: str, make: Callable[[], list[Any]], grads: Callable[[list[Any], int], None], steps: int = 8
) -> list[Any]:
    """The same parameters through ours, torch's loop, and torch's loop with exact roots; compared after every step."""
    ours, plain, exact = (make() for _ in range(3))
    flags = {"foreach": False}
    optimizers = [case.make(ours, backend), case.make_torch(plain, **flags), case.oracle(exact)]
    for step in range(steps):
        for params, optimizer in zip((ours, plain, exact), optimizers, strict=True):
            grads(params, step)
            optimizer.step()
        for i, (p, q, r) in enumerate(zip(ours, plain, exact, strict=True)):
            assert matches(p.detach(), q.detach(), r.detach()), f"parameter {i} after step {step + 1}"
            states = [o.state.get(t, {}) for o, t in zip(optimizers, (p, q, r), strict=True)]
            assert list(states[0]) == list(states[1])
            for key, value in states[0].items():
                assert matches(value, states[1][key], states[2][key]), f"{key} of {i} after step {step + 1}"
    return [ours, *optimizers]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@parametrize(by_id("sgd", "sgd-momentum", "adagrad", "adagrad-lr-decay"), ("fp32",))
def test_sparse_gradients_beside_dense_ones(case: Case, dtype: torch.dtype, backend: str) -> None:
    """An embedding: rows that were looked up, some twice (uncoalesced)."""

    def grads(params: list[Any], step: int) -> None:
        params[0].grad = wave((7,), step)
        rows = torch.tensor([[step % 5, 3, 3]])
        params[1].grad = torch.sparse_coo_tensor(rows, wave((3, 4), step), (5, 4), check_invariants=True)
        params[2].grad = wave((3, 3), step)

    def make() -> list[Any]:
        return [parameter(ramp(7)), parameter(ramp(20).reshape(5, 4)), parameter(ramp(9).reshape(3, 3))]

    *_, optimizer, _, _ = run_three(case, backend, make, grads)
    explanation = str(fastopt.explain(optimizer))
    assert "sparse" in explanation
    assert backend in explanation


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@parametrize(by_id("sgd-momentum", "adagrad"), ("fp32",))
def test_gradients_that_are_sparse_at_some_steps_only(case: Case, dtype: torch.dtype, backend: str) -> None:
    def grads(params: list[Any], step: int) -> None:
        params[0].grad = None if step == 4 else wave((7,), step)
        dense = wave((5, 4), step)
        params[1].grad = dense.to_sparse() if step % 3 == 1 else None if step == 3 else dense

    run_three(case, backend, lambda: [parameter(ramp(7)), parameter(ramp(20).reshape(5, 4))], grads, steps=10)


@parametrize(ONE_OF_EACH, ("fp32",))
def test_complex_parameters_beside_real_ones(case: Case, dtype: torch.dtype, backend: str) -> None:
    def make() -> list[Any]:
        return [parameter(ramp(7)), parameter(torch.complex(ramp(9), -ramp(9))), parameter(ramp(6).reshape(2, 3))]

    def grads(params: list[Any], step: int) -> None:
        params[0].grad = wave((7,), step)
        params[1].grad = torch.complex(wave((9,), step), wave((9,), step + 2))
        params[2].grad = wave((2, 3), step)

    run_three(case, backend, make, grads)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "loaded": lambda o: o.load_state_dict(copy.deepcopy(o.state_dict())),
    "lr edited": lambda o: o.param_groups[0].update(lr=0.2),
    "group added": lambda o: o.add_param_group({"params": [parameter(ramp(4) * 1j)]}),
    "group replaced": lambda o: o.param_groups.__setitem__(0, dict(o.param_groups[0])),
    "group prepended": lambda o: o.param_groups.insert(0, {**o.param_groups[0], "params": [parameter(ramp(2))]}),
    "groups swapped": lambda o: o.param_groups.reverse(),
    "list replaced": lambda o: o.param_groups[0].update(params=list(o.param_groups[0]["params"])),
    "parameter replaced": lambda o: o.param_groups[0]["params"].__setitem__(0, parameter(ramp(5) * 1j)),
    "parameter appended": lambda o: o.param_groups[0]["params"].append(parameter(ramp(2) * 1j)),
    "parameter removed": lambda o: o.param_groups[0]["params"].pop(),
    "state cleared": lambda o: o.state.clear(),
    "maximize": lambda o: o.param_groups[0].update(maximize=True),
}  # fmt: skip


def _complex_groups() -> list[dict[str, Any]]:
    return [
        {"params": [parameter(torch.complex(ramp(3), ramp(3))), parameter(torch.complex(ramp(6), -ramp(6)))]},
        {"params": [parameter(torch.complex(ramp(7), ramp(7)))], "lr": 0.02},
    ]


@pytest.mark.contract("fallback", "live")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("beside", ["nothing", "a real parameter"])
@parametrize(by_id("sgd-momentum", "adam", "lookahead-adam"), ("fp32",))
def test_changes_reach_what_falls_back(case: Case, dtype: torch.dtype, backend: str, beside: str, change: str) -> None:
    """Groups, parameters and state exchanged between steps, where torch's code takes all of them or some."""

    def run(make: Callable[[Any], Any]) -> Any:
        groups = _complex_groups()
        if beside != "nothing":
            groups[1]["params"].append(parameter(ramp(9)))
        optimizer = make(groups)
        for step in range(8):
            if step == 4:
                CHANGES[change](optimizer)
            for group in optimizer.param_groups:
                for i, p in enumerate(group["params"]):
                    g = wave(p.shape, step + i)
                    p.grad = torch.complex(g, -g) if p.is_complex() else g
            optimizer.step()
        return [p.detach() for group in optimizer.param_groups for p in group["params"]]

    def reference(groups: Any) -> Any:
        inner = case.make_torch(groups)
        return fastopt.Lookahead(inner, *case.lookahead) if case.lookahead else inner

    for p, q in zip(run(lambda groups: case.make(groups, backend)), run(reference), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@each_name
@each_backend
def test_differentiable_steps(name: str, backend: str) -> None:
    """A hyper-gradient: the loss after two steps, differentiated with respect to the first gradient's scale."""

    def hyper_gradient(cls: Any, **kwargs: Any) -> Any:
        scale = torch.tensor(1.5, requires_grad=True, dtype=torch.float64)
        p = (ramp(5).double() + 2).requires_grad_().clone()
        optimizer = cls([p], lr=0.1, differentiable=True, **kwargs)
        for step in range(2):
            p.grad = scale * wave((5,), step, torch.float64)
            optimizer.state.get(p, {}).get("step", torch.zeros(())).requires_grad_(False)
            optimizer.step()
        try:
            p.pow(2).sum().backward()
        except RuntimeError as error:  # torch's own Adamax overwrites what its backward needs
            return str(error)
        assert scale.grad is not None
        return scale.grad.item()

    ours, theirs = hyper_gradient(getattr(fastopt, name), backend=backend), hyper_gradient(getattr(torch.optim, name))
    assert theirs != 0
    assert ours == theirs


class Logged(torch.Tensor):
    """A subclass that is seen by __torch_function__ but stores its numbers as any tensor does."""


def _subclass(values: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(values.clone().as_subclass(Logged))


@parametrize(ONE_OF_EACH, ("fp32",))
def test_subclasses_with_memory_of_their_own(case: Case, dtype: torch.dtype, backend: str) -> None:
    def grads(params: list[Any], step: int) -> None:
        for p in params:
            p.grad = wave(p.shape, step).as_subclass(type(p)) if isinstance(p, Logged) else wave(p.shape, step)

    ours, optimizer, *_ = run_three(case, backend, lambda: [parameter(ramp(7)), _subclass(ramp(9))], grads)
    assert isinstance(ours[1], Logged)
    assert isinstance(optimizer.param_groups[0]["params"][1], Logged)


class NonNegative(torch.Tensor):
    """A subclass that has a say in what torch's functions do to it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            result = func(*args, **(kwargs or {}))
            if func.__name__.endswith("_") and not func.__name__.endswith("__") and isinstance(args[0], cls):
                args[0].clamp_(min=0)
        return result


@parametrize(ONE_OF_EACH, ("fp32",))
def test_subclasses_with_functions_of_their_own(case: Case, dtype: torch.dtype, backend: str) -> None:
    if case.lookahead or case.name == "Ranger":
        pytest.skip("torch has no optimizer that would show the class what it does")

    def make() -> list[Any]:
        return [parameter(ramp(7)), ramp(9).as_subclass(NonNegative).requires_grad_()]

    def grads(params: list[Any], step: int) -> None:
        for p in params:
            p.grad = wave(p.shape, step)

    ours, plain = make(), make()
    optimizer, theirs = case.make(ours, backend), case.make_torch(plain, foreach=False)
    for step in range(5):
        for params, o in ((ours, optimizer), (plain, theirs)):
            grads(params, step)
            o.step()
        assert not difference(ours[1].detach().as_subclass(torch.Tensor), plain[1].detach().as_subclass(torch.Tensor))
    assert "NonNegative with a __torch_function__" in str(fastopt.explain(optimizer))


@parametrize(ONE_OF_EACH, ("fp32",))
def test_wrapper_subclasses_without_memory(case: Case, dtype: torch.dtype, backend: str) -> None:
    """The wrapper's own data pointer is null: the kernels must never see it. (Quantised tensors, DTensor.)"""

    def make(wrapped: bool) -> list[Any]:
        second = TwoTensor(ramp(9), ramp(9) * 2) if wrapped else ramp(9)
        return [parameter(ramp(7)), torch.nn.Parameter(second)]

    ours, plain, doubled = make(True), make(False), [parameter(ramp(7)), parameter(ramp(9) * 2)]
    optimizer, first, second = case.make(ours, backend), case.make_torch(plain), case.make_torch(doubled)
    for step in range(7):
        g = wave((9,), step)
        for p in (ours[0], plain[0], doubled[0]):
            p.grad = wave((7,), step)
        ours[1].grad, plain[1].grad, doubled[1].grad = TwoTensor(g.clone(), g.clone() * 3), g.clone(), g.clone() * 3
        for o in (optimizer, first, second):
            o.step()
    assert not difference(ours[1].detach().a, plain[1].detach())
    assert not difference(ours[1].detach().b, doubled[1].detach())
    exact = case.oracle(other := [parameter(ramp(7))])
    for step in range(7):
        other[0].grad = wave((7,), step)
        exact.step()
    assert not difference(ours[0].detach(), other[0].detach())


@pytest.mark.contract("layouts")
@parametrize(ONE_OF_EACH, ("fp32",))
def test_parameters_that_share_memory(case: Case, dtype: torch.dtype, backend: str) -> None:
    """torch updates them in turn, so the shared elements move twice; a parallel pass would race."""

    def make() -> list[Any]:
        base = ramp(40)
        return [parameter(base[:20]), parameter(ramp(5)), parameter(base[10:30]), parameter(base[35:])]

    def grads(params: list[Any], step: int) -> None:
        for i, p in enumerate(params):
            p.grad = wave(p.shape, step + i)

    run_three(case, backend, make, grads)


@pytest.mark.contract("layouts")
@parametrize(by_id("sgd-momentum", "adam-everything"), ("fp32",))
def test_interleaved_parameters_of_one_buffer(case: Case, dtype: torch.dtype, backend: str) -> None:
    """base[0::2] and base[1::2]: extents overlap, elements do not. Whoever takes them, both must be right."""

    def make() -> list[Any]:
        base = ramp(64)
        return [parameter(base[0::2]), parameter(base[1::2])]

    def grads(params: list[Any], step: int) -> None:
        for i, p in enumerate(params):
            p.grad = wave(p.shape, step + i)

    run_three(case, backend, make, grads)


@pytest.mark.contract("layouts")
@parametrize(by_id("sgd-momentum", "adam-everything"), ("fp32",), names=["native"])
def test_the_same_parameter_twice(case: Case, dtype: torch.dtype, backend: str) -> None:
    """torch warns, and then updates it twice a step."""
    p, q = parameter(ramp(9)), parameter(ramp(9))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = case.make([p, p], backend)
    oracle = case.oracle([q])
    oracle.param_groups[0]["params"] = [q, q]
    for step in range(4):
        p.grad, q.grad = wave((9,), step), wave((9,), step)
        optimizer.step()
        oracle.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.contract("layouts")
@each_name
@each_backend
def test_parameter_whose_elements_share_memory_raises_as_in_torch(name: str, backend: str) -> None:
    def message(cls: Any, **kwargs: Any) -> str:
        p = torch.nn.Parameter(torch.ones(1).expand(6))
        p.grad = torch.ones(6)
        with pytest.raises(RuntimeError) as error:
            cls([p], **kwargs).step()
        return str(error.value)

    assert message(getattr(fastopt, name), backend=backend) == message(getattr(torch.optim, name))


LAZY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "negated": torch._neg_view,
    "imaginary-part-of-a-conjugate": lambda g: torch.complex(g * 0, g).conj().imag,
    "zero": lambda g: torch._efficientzerotensor(g.shape),
}


@pytest.mark.contract("layouts")
@pytest.mark.parametrize("lazy", LAZY)
@parametrize(ONE_OF_EACH, ("fp32",))
def test_lazy_gradients_are_resolved(case: Case, dtype: torch.dtype, backend: str, lazy: str) -> None:
    """Their memory does not hold their values: reading it raw flips signs or follows a null pointer."""
    p, q = parameter(ramp(33)), parameter(ramp(33))
    optimizer, oracle = case.make([p], backend), case.oracle([q])
    for step in range(7):
        g = LAZY[lazy](wave((33,), step)) if step != 3 else wave((33,), step)
        p.grad, q.grad = g, g.resolve_neg().clone() if lazy != "zero" or step == 3 else torch.zeros(33)
        optimizer.step()
        oracle.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.contract("layouts")
def test_negated_parameter() -> None:
    p, q = torch.nn.Parameter(torch._neg_view(ramp(9))), parameter(-ramp(9))
    ours, theirs = fastopt.SGD([p], lr=0.1), oracles.TorchLoop("SGD", [q], lr=0.1)
    for step in range(3):
        p.grad, q.grad = wave((9,), step), wave((9,), step)
        ours.step()
        theirs.step()
    assert not difference(p.detach().resolve_neg(), q.detach())


@pytest.mark.contract("layouts")
@parametrize(by_id("sgd-momentum", "adam", "nadam", "adagrad", "rmsprop"), ("fp32",))
def test_gradient_that_is_the_parameter_itself(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Weight decay written by hand, p.grad = p.data: the same memory is read and written in one pass."""
    p, q = parameter(ramp(37)), parameter(ramp(37))
    optimizer, oracle = case.make([p], backend), case.oracle([q])
    for _ in range(4):
        p.grad, q.grad = p.detach(), q.detach().clone()
        optimizer.step()
        oracle.step()
    assert not difference(p.detach(), q.detach())


@pytest.mark.contract("layouts", difference="mixed dtypes")
@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no Tensor.grad_dtype")
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@each_name
@each_backend
def test_gradients_of_another_dtype(name: str, dtype: torch.dtype, grad_dtype: torch.dtype, backend: str) -> None:
    """Where torch raises, raising is right, and so is taking it; a result must be the rule on the gradient's values."""
    p, q = parameter(ramp(33).to(dtype)), parameter(ramp(33).to(dtype))
    case = Case("x", name, {"lr": 0.05})
    optimizer, before = case.make([p], backend), p.detach().clone()
    oracle = oracles.LowPrecision(case.oracle, [q]) if dtype == torch.bfloat16 else case.oracle([q])
    for step in range(7):
        p.grad_dtype = q.grad_dtype = None
        p.grad = wave((33,), step, grad_dtype)
        q.grad = p.grad.to(torch.float32 if dtype == torch.bfloat16 else dtype)
        try:
            optimizer.step()
        except RuntimeError:
            q.grad = p.grad
            reference = case.make_torch([q])
            with pytest.raises(RuntimeError):
                reference.step()
            assert torch.equal(p.detach(), before)
            return
        oracle.step()
    # bf16: torch's own code rounds after every operation.
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


@pytest.mark.contract("layouts", optimizers="Adam", difference="mixed dtypes")
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16], ids=str)
@each_backend
def test_states_of_another_dtype(param_dtype: torch.dtype, state_dtype: torch.dtype, backend: str) -> None:
    """Put there by hand or by a hook. Never misread: either an error, or Adam to the accuracy of the narrowest type."""
    p, q = parameter(ramp(33).to(param_dtype)), parameter(ramp(33).to(param_dtype).float())
    optimizer, oracle = fastopt.Adam([p], lr=0.05, backend=backend), oracles.TorchLoop("Adam", [q], lr=0.05)
    optimizer.state[p].update(
        step=torch.tensor(0.0),
        exp_avg=torch.zeros(33, dtype=state_dtype),
        exp_avg_sq=torch.zeros(33, dtype=state_dtype),
    )
    before = p.detach().clone()
    for step in range(7):
        p.grad = wave((33,), step, param_dtype)
        q.grad = p.grad.float()
        try:
            optimizer.step()
        except RuntimeError:
            assert torch.equal(p.detach(), before)
            return
        oracle.step()
    assert optimizer.state[p]["exp_avg"].dtype == state_dtype
    torch.testing.assert_close(p.float(), q, rtol=3e-2, atol=3e-2)


@each_name
@each_backend
def test_meta_parameters(name: str, backend: str) -> None:
    """No memory at all: a step creates states and touches nothing, as in torch."""
    p = torch.nn.Parameter(torch.ones(3, device="meta"))
    p.grad = torch.ones_like(p)
    q = parameter(ramp(5))
    q.grad = torch.ones(5)
    optimizer = (
        getattr(fastopt, name)([p, q], backend=backend) if backend == "native" else getattr(fastopt, name)([p, q])
    )
    optimizer.step()
    assert p.device.type == "meta"
    assert not torch.equal(q.detach(), ramp(5))


@each_name
def test_fake_tensors(name: str) -> None:
    """What torch.compile and model inspection step with: no numbers, and no pointer that may be followed."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=False):
        p = torch.nn.Parameter(torch.ones(4, 3))
        p.grad = torch.ones(4, 3)
        optimizer = getattr(fastopt, name)([p])
        optimizer.step()
    assert isinstance(p.data, FakeTensor)


@each_name
@each_backend
def test_dtypes_without_kernels_do_what_torch_does(name: str, backend: str) -> None:
    def result(cls: Any, **kwargs: Any) -> Any:
        p = torch.nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn))
        p.grad = torch.ones(4).to(torch.float8_e4m3fn)
        try:
            cls([p], **kwargs).step()
        except Exception as error:
            return type(error)
        return p.detach().float().tolist()

    assert result(getattr(fastopt, name), backend=backend) == result(getattr(torch.optim, name))


@pytest.mark.contract("live")
@parametrize(by_id("adam", "ranger"), ("fp32",))
def test_storage_released_and_restored(case: Case, dtype: torch.dtype, backend: str) -> None:
    """FSDP frees a parameter's storage between uses and fills it again, often at another address."""
    p, q = parameter(ramp(4096)), parameter(ramp(4096))
    optimizer, oracle = case.make([p], backend), case.oracle([q])
    for step in range(6):
        p.grad, q.grad = wave((4096,), step), wave((4096,), step)
        optimizer.step()
        oracle.step()
        values, size = p.detach().clone(), p.untyped_storage().nbytes()
        p.untyped_storage().resize_(0)
        p.grad = None
        optimizer.step()  # nothing to do, and nothing may be followed
        p.untyped_storage().resize_(size)
        with torch.no_grad():
            p.copy_(values)
    assert not difference(p.detach(), q.detach())


@pytest.mark.contract("distributed")
@parametrize([c for c in TORCH_CASES if c.name in ("Adam", "SGD")][:4], ("fp32",))
def test_dtensor_parameters(case: Case, dtype: torch.dtype, backend: str) -> None:
    """One process, one shard: its local tensor is the parameter, but only DTensor's own code may know that."""
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    started = not torch.distributed.is_initialized()
    if started:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        p = torch.nn.Parameter(distribute_tensor(ramp(12), mesh, [Shard(0)]))
        q = parameter(ramp(12))
        optimizer, reference = case.make([p], backend), case.make_torch([q])
        for step in range(4):
            p.grad = distribute_tensor(wave((12,), step), mesh, [Shard(0)])
            q.grad = wave((12,), step)
            optimizer.step()
            reference.step()
        torch.testing.assert_close(p.detach().to_local(), q.detach(), rtol=1e-6, atol=1e-6)
        for value in optimizer.state[p].values():
            assert type(value) is type(p.data) or value.dim() == 0
    finally:
        if started:
            torch.distributed.destroy_process_group()


def test_fallback_is_per_parameter() -> None:
    """One odd parameter must not slow the others down: explain says so, with the reason."""
    params = [parameter(ramp(7)), parameter(torch.complex(ramp(3), ramp(3))), parameter(ramp(9))]
    optimizer = fastopt.Adam(params, backend="native" if fastopt.backends.available("native") else None)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    text = str(fastopt.explain(optimizer))
    assert "complex64" in text
    assert "torch" in text
    if fastopt.backends.available(BACKENDS[0]):
        assert "native" in text


def test_model_of_everything_at_once() -> None:
    """Dense, bf16, sparse, complex, shared, frozen and unused parameters in one SGD with groups, against torch."""

    def make() -> list[Any]:
        base = ramp(30)
        return [
            parameter(ramp(17)),
            parameter(ramp(20).reshape(5, 4)),
            parameter(torch.complex(ramp(3), ramp(3))),
            parameter(base[:20]),
            parameter(base[15:]),
            parameter(ramp(6).double()),
            torch.nn.Parameter(ramp(4), requires_grad=False),
        ]

    runs = []
    for cls in (fastopt.SGD, torch.optim.SGD):
        params = make()
        groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.02, "momentum": 0.5, "nesterov": True}]
        optimizer = cls(groups, lr=0.1, momentum=0.9)
        for step in range(6):
            for i, p in enumerate(params[:-1]):
                p.grad = wave(p.shape, step + i, p.dtype) if i != 1 else wave((5, 4), step).to_sparse()
            params[0].grad = params[0].grad if step % 2 else None
            optimizer.step()
        runs.append(copy.copy(params))
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@each_backend
@pytest.mark.parametrize("why", ["watched", "shared"])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "RAdam", "NAdam", "Adamax"])
def test_states_of_another_dtype_are_not_for_torchs_code(name: str, why: str, backend: str) -> None:
    """It would fail, with the step counted; the reference takes them, to the bits of steps that the kernels take."""
    results = []
    for way in ("", why):
        torch.manual_seed(0)
        memory = torch.randn(90).to(torch.bfloat16)
        p = torch.nn.Parameter(memory[:60])
        optimizer = getattr(fastopt, name)([p], lr=0.1, backend=backend)
        p.grad = torch.randn(60).to(torch.bfloat16)
        optimizer.step()
        optimizer.state[p].update({k: t.float() for k, t in optimizer.state[p].items() if t.dim()})
        if way == "shared":
            optimizer.add_param_group({"params": [torch.nn.Parameter(memory[50:])]})
        for step in range(4):
            with FlopCounterMode(display=False) if way == "watched" and step in (1, 2) else contextlib.nullcontext():
                optimizer.step()
        assert optimizer.state[p]["step"] == 5
        assert {t.dtype for t in optimizer.state[p].values()} == {torch.float32}
        if way == "shared":  # with one that has no gradient
            assert "of the same dtype" in str(fastopt.explain(optimizer))
        results.append(p.detach())
    assert torch.equal(*results)


def test_overlap_is_seen_where_it_is() -> None:
    """Every second column of an odd number of them has none."""
    memory = torch.zeros(200)
    for shape, strides, expected in (
        ((4, 3), (5, 2), False), ((4, 3), (4, 2), True), ((3, 4), (2, 7), False), ((3, 4), (2, 4), True),
        ((2, 2, 3), (9, 4, 2), True), ((2, 2, 3), (10, 5, 2), False), ((5,), (0,), True), ((1, 5), (0, 1), False),
    ):  # fmt: skip
        view = memory.as_strided(shape, strides)
        assert routing.overlaps_itself(view) == expected, (shape, strides)


@each_backend
def test_overlapping_parameters_are_updated_in_turn_whatever_their_dtypes(backend: str) -> None:
    """One of them with moments of another dtype takes the others along to the reference."""
    memory = torch.arange(1.0, 9.0).to(torch.bfloat16)
    params = [torch.nn.Parameter(memory[:5]), torch.nn.Parameter(memory[3:])]
    optimizer = fastopt.Adam(params, lr=0.5, weight_decay=0.5, backend=backend)
    for p in params:
        p.grad = torch.full((5,), 4.0).to(torch.bfloat16)
    optimizer.step()
    for mixed in (True, False):
        for name in ("exp_avg", "exp_avg_sq"):
            own = optimizer.state[params[1]]
            own[name] = own[name].to(torch.float32 if mixed else torch.bfloat16)
        optimizer.step()
        routes = optimizer.engine()._routes
        assert {routes[id(p)].backend for p in params} == {"reference" if mixed else "torch"}


@each_backend
def test_gradients_that_cannot_be_unscaled_are_noticed_first(backend: str) -> None:
    memory = torch.ones(9)
    for bad in (lambda: torch.ones(9).as_strided((3, 3), (1, 1)), _made_in_inference_mode):
        if bad is _made_in_inference_mode and backend == "emulated":
            continue  # its kernels write where torch's operators would not
        p, q, r = (torch.nn.Parameter(t) for t in (torch.ones(3, 3), memory[:5], memory[3:]))
        optimizer = fastopt.Adam([p, q, r], fused=True, backend=backend)
        p.grad, q.grad, r.grad = bad(), torch.ones(5), torch.ones(6)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)  # type: ignore[attr-defined]
        for _ in range(2):
            with pytest.raises(RuntimeError, match="cannot be unscaled"):
                optimizer.step()
            assert (q.grad == 1).all()
            assert (p == 1).all()
            assert (q == 1).all()


def _made_in_inference_mode() -> torch.Tensor:
    with torch.inference_mode():
        return torch.ones(3, 3)
