"""Steps that cannot be taken: they say so, nothing has moved or was counted, and the repeated step is the true one."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from cases import Case, backends, by_id, each_backend, parametrize
from harness import difference, python, ramp, wave

import fastopt
from fastopt.backends import reference

native_only = pytest.mark.parametrize("backend", backends(["native"]))


def _spoil(p: torch.nn.Parameter, state: dict[str, Any], what: str) -> None:
    key = "exp_avg"
    if what == "state shorter":
        state[key] = torch.zeros(5)
    elif what == "state shrunk in place":
        state[key].resize_(5)
    elif what == "state on meta":
        state[key] = torch.zeros(1024, device="meta")
    elif what == "state no tensor":
        state[key] = 0.0
    elif what == "state missing":
        del state[key]
    elif what == "state complex":
        state[key] = torch.zeros(1024, dtype=torch.complex64)
    elif what == "state released":
        state[key].untyped_storage().resize_(0)
    elif what == "state with too little storage":
        state[key].untyped_storage().resize_(400)
    elif what == "step released":
        state["step"].untyped_storage().resize_(0)
    elif what == "parameter longer":
        p.grad, p.data = None, ramp(1300)
    elif what == "parameter view":
        p.grad, p.data = None, p.data[:100]
    elif what == "parameter reshaped":
        p.grad, p.data = None, p.data.reshape(32, 32)
    elif what == "step as a vector":
        state["step"] = torch.zeros(1024)
    else:
        raise AssertionError(what)


@pytest.mark.contract("memory", difference="failing steps")
@pytest.mark.parametrize("what", [
    "state shorter", "state shrunk in place", "state on meta", "state no tensor", "state missing", "state complex",
    "state released", "state with too little storage", "step released",
    "parameter longer", "parameter view", "parameter reshaped", "step as a vector",
])  # fmt: skip
@pytest.mark.parametrize("name", ["Adam", "RAdam"])
@each_backend
def test_state_that_does_not_fit_raises_and_nothing_else_is_touched(name: str, what: str, backend: str) -> None:
    """A kernel that trusted an old size would write past the end: neighbours in memory must stay as they are.

    A missing state is created; everything else raises, as it does in torch.
    """
    p, other = torch.nn.Parameter(ramp(1024)), torch.nn.Parameter(ramp(8))
    optimizer = getattr(fastopt, name)([p, other], backend=backend)
    for q in (p, other):
        q.grad = torch.ones_like(q)
    optimizer.step()
    _spoil(p, optimizer.state[p], what)
    guards = [torch.full((1024,), 7.0) for _ in range(64)]
    before, step = other.detach().clone(), optimizer.state[other]["step"].clone()
    p.grad, other.grad = torch.ones_like(p), torch.ones_like(other)
    try:
        optimizer.step()
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        assert torch.equal(other.detach(), before), "the other parameter has moved"
        assert torch.equal(optimizer.state[other]["step"], step), "the other parameter's step was counted"
    else:
        assert what == "state missing"
    assert all((g == 7.0).all() for g in guards)


@pytest.mark.contract("memory", optimizers="SGD")
@pytest.mark.parametrize("size", [50, 5000], ids=["shorter", "longer"])
@pytest.mark.parametrize("what", ["parameter", "gradient"])
@each_backend
def test_gradient_of_another_size_raises(what: str, size: int, backend: str) -> None:
    """p.data (or p.grad.data) was exchanged and the other is the old one: torch raises, and so must we."""
    p = torch.nn.Parameter(ramp(1000))
    optimizer = fastopt.SGD([p], lr=0.1, backend=backend)
    p.grad = torch.ones(1000)
    optimizer.step()
    (p if what == "parameter" else p.grad).data = ramp(size)
    before = p.detach().clone()
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert torch.equal(p.detach(), before)


class _OutOfMemory:
    """Fails the k-th allocation of state, wherever torch or we ask for one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int, backend: str) -> None:
        self.calls, self.fail_at = 0, fail_at
        # The reference backend's arithmetic makes tensors of its own, which no step can take back.
        names = ("zeros_like", "empty_like", "full_like", "clone", "zeros")
        for name in (*names, "tensor") if backend == "native" else names:
            monkeypatch.setattr(torch, name, self._counting(getattr(torch, name)))
        monkeypatch.setattr(torch.Tensor, "clone", self._counting(torch.Tensor.clone))

    def _counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.fail_at:
                raise torch.OutOfMemoryError("injected")
            return function(*args, **kwargs)

        return call


STATEFUL = by_id("sgd-momentum", "rmsprop-everything", "adam-amsgrad", "nadam", "radam", "ranger", "lookahead-adam")


@pytest.mark.contract("memory", difference="failing steps")
@parametrize(STATEFUL, ("fp32",))
def test_out_of_memory_at_every_allocation_of_state(case: Case, dtype: torch.dtype, backend: str) -> None:
    """The step fails at its k-th allocation, for every k; nothing has moved, and the repeated step is the true one."""
    fail_at = 0
    while True:
        fail_at += 1
        assert fail_at < 60, "no step ever succeeded"
        ours, theirs = ([torch.nn.Parameter(ramp(n)) for n in (9, 5, 12)] for _ in range(2))
        optimizer, oracle = case.make(ours, backend), case.oracle(theirs)
        for params, o in ((ours, optimizer), (theirs, oracle)):
            params[0].grad = wave((9,), 0)  # this one has its state already
            o.step()
            for i, p in enumerate(params):
                p.grad = wave(p.shape, i)
        before = [p.detach().clone() for p in ours]
        with pytest.MonkeyPatch.context() as patch:
            memory = _OutOfMemory(patch, fail_at, backend)
            try:
                optimizer.step()
            except torch.OutOfMemoryError:
                failed = True
            else:
                failed = False
        if failed:
            assert all(torch.equal(p.detach(), q) for p, q in zip(ours, before, strict=True))
            if "step" in optimizer.state[ours[0]]:
                assert optimizer.state[ours[0]]["step"] == 1
            optimizer.step()
        elif memory.calls >= fail_at:
            raise AssertionError("an allocation failed unnoticed")
        oracle.step()
        for step in (1, 2):
            for p, q in zip(ours, theirs, strict=True):
                assert not difference(p.detach(), q.detach())
                states, expected = optimizer.state[p], oracles.states_of(oracle, q)
                assert all(torch.equal(states[k], v) for k, v in expected.items())
                p.grad, q.grad = wave(p.shape, step), wave(p.shape, step)
            optimizer.step()
            oracle.step()
        if not failed:
            break
    assert fail_at > 2


@pytest.mark.contract("memory", difference="failing steps")
@native_only
def test_real_memory_runs_out(backend: str) -> None:
    """An address-space limit instead of a patched function: whatever allocates the state, in Python or in C++."""
    script = """
        import resource, torch, fastopt
        torch.set_num_threads(1)
        params = [torch.nn.Parameter(torch.full((n,), 0.5)) for n in (1000, 1 << 24, 1 << 24)]
        optimizer = fastopt.Adam(params, lr=0.1, backend="native")
        params[0].grad = torch.ones(1000)
        optimizer.step()
        for p in params:
            p.grad = torch.ones_like(p)
        pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages + (150 << 20), hard))
        value = params[0].detach().clone()
        try:
            optimizer.step()
        except (RuntimeError, MemoryError) as error:
            message = str(error)
        else:
            raise SystemExit("256 MB of state fitted into 150 MB")
        assert torch.equal(params[0].detach(), value) and (params[1] == 0.5).all()
        assert optimizer.state[params[0]]["step"] == 1
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        optimizer.step()
        assert [int(optimizer.state[p]["step"]) for p in params] == [2, 1, 1]
        assert ((params[1] - 0.4).abs() < 1e-6).all() and torch.equal(params[1], params[2])
        print("repeated:", message)
    """
    assert "repeated:" in python(script)


@pytest.mark.contract("memory")
@native_only
@pytest.mark.parametrize("size", [10, 1 << 21], ids=["small", "large"])
def test_unknown_instruction_set_is_refused_and_nothing_is_counted(size: int, backend: str) -> None:
    """Whatever fails inside the driver: an exception, never a crash, and no step that was counted but not taken."""
    script = f"""
        import torch, fastopt
        p = torch.nn.Parameter(torch.zeros({size}))
        p.grad = torch.ones({size})
        optimizer = fastopt.Adam([p])
        try:
            optimizer.step()
        except (ValueError, RuntimeError) as error:
            assert "FASTOPT_ISA=nonsense" in str(error), error
        else:
            raise SystemExit("FASTOPT_ISA=nonsense was accepted")
        assert not p.any()
        assert p not in optimizer.state or optimizer.state[p]["step"] == 0
    """
    python(script, FASTOPT_ISA="nonsense")


def _sparse(value: float) -> torch.Tensor:
    return torch.sparse_coo_tensor(torch.tensor([[0]]), torch.tensor([value]), (2,))


def _refused(make: Callable[[Any], Any]) -> tuple[torch.nn.Parameter, Any]:
    """After a first step that torch's code refused, for the gradient of another parameter, which is gone now."""
    p, other = (torch.nn.Parameter(torch.tensor([0.0, 0.0])) for _ in range(2))
    optimizer = make([{"params": [p]}, {"params": [other], "weight_decay": 0.1}])
    p.grad, other.grad = torch.ones(2), _sparse(1.0)
    with pytest.raises(RuntimeError, match=r"[Ss]parse|sparse"):
        optimizer.step()
    other.grad = None
    return p, optimizer


@pytest.mark.contract("memory", difference="failing steps", optimizers="SGD")
@each_backend
def test_a_refused_step_leaves_no_state(backend: str) -> None:
    """Else a checkpoint would have a momentum of zero, which damps what is the first gradient."""
    p, optimizer = _refused(lambda groups: fastopt.SGD(groups, lr=1.0, momentum=0.5, dampening=0.5, backend=backend))
    assert not optimizer.state.get(p)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert torch.equal(p.detach(), torch.full((2,), -1.0))


@pytest.mark.contract("memory", difference="failing steps", optimizers="Lookahead")
@each_backend
def test_a_refused_step_leaves_no_slow_weights(backend: str) -> None:
    """They are the parameters before the first step that was taken, which may have been loaded since."""
    p, optimizer = _refused(
        lambda groups: fastopt.Lookahead(fastopt.SGD(groups, lr=0.0, backend=backend), k=1, alpha=0.0)
    )
    with torch.no_grad():
        p.fill_(5.0)
    optimizer.step()
    assert torch.equal(p.detach(), torch.full((2,), 5.0))


@pytest.mark.contract("memory", "amp", difference="failing steps", optimizers="SGD")
@each_backend
def test_a_refused_step_leaves_gradients_scaled(backend: str) -> None:
    p, other = (torch.nn.Parameter(torch.tensor([0.0, 0.0])) for _ in range(2))
    groups: list[Any] = [{"params": [p]}, {"params": [other], "weight_decay": 0.1}]
    optimizer = fastopt.SGD(groups, lr=1.0, fused=True, backend=backend)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)  # type: ignore[attr-defined]
    p.grad, other.grad = torch.full((2,), 8.0), _sparse(8.0)
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert p.grad[0] == 8
    assert other.grad.to_dense()[0] == 8
    other.grad = None
    optimizer.step()
    assert torch.equal(p.detach(), torch.full((2,), -1.0))


@pytest.mark.contract("memory", optimizers="Adam")
@each_backend
def test_a_gradient_of_another_shape_is_torchs_to_judge(backend: str) -> None:
    """What can be broadcast it takes, and of the rest it says which sizes do not match."""
    results = []
    for make in (oracles.TorchLoop, lambda name, ps, **kw: fastopt.Adam(ps, backend=backend, **kw)):
        p = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        p.grad = torch.ones(3)
        p.data = torch.tensor([1.0, 2.0, 3.0, 4.0])
        with pytest.raises(RuntimeError, match=r"size of tensor a \(4\) must match the size of tensor b \(3\)"):
            make("Adam", [p], lr=0.1).step()
        q = torch.nn.Parameter(torch.tensor([1.0]))
        q.grad = torch.ones(1)
        q.data = torch.tensor([1.0, 2.0, 3.0, 4.0])
        optimizer = make("Adam", [q], lr=0.1)
        optimizer.step()
        results.append(q.detach())
    assert torch.equal(*results)


@pytest.mark.contract("memory", difference="failing steps")
@each_backend
def test_a_step_after_one_that_could_not_be_prepared(backend: str) -> None:
    """What was decided for that one must not be done beside the plans of those before: twice for some parameters."""
    memory = torch.ones(8)
    p, q, r = (torch.nn.Parameter(t) for t in (memory[:4], memory[2:6], torch.ones(4)))
    optimizer = fastopt.SGD([p], lr=1.0, momentum=0.5, backend=backend)
    for each in (p, q, r):
        each.grad = torch.ones(4)
    optimizer.step()
    optimizer.add_param_group({"params": [q, r]})
    optimizer.state[r]["momentum_buffer"] = torch.ones(7)
    with pytest.raises(ValueError, match=r"'momentum_buffer' .*shape \(7,\)"):
        optimizer.step()
    optimizer.param_groups.pop()
    del optimizer.state[r]
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(before - p.detach(), torch.full((4,), 1.5))


@pytest.mark.contract("memory", difference="failing steps")
@each_backend
def test_what_cannot_be_written_is_noticed_before_anything_is(backend: str) -> None:
    p = torch.nn.Parameter(torch.ones(4))
    with torch.inference_mode():
        q = torch.nn.Parameter(torch.ones(4))
        q.grad = torch.ones(4)
    p.grad = torch.ones(4)
    optimizer = fastopt.Ranger([p, q], lr=1.0, backend=backend)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="inference_mode"):
            optimizer.step()
        assert torch.equal(p, torch.ones(4))
        assert not optimizer.state
    with torch.inference_mode():
        p.grad = torch.ones(4)
        optimizer.step()
        assert optimizer.state[p]["step"] == optimizer.state[q]["step"] == 1


@pytest.mark.contract("live")
@each_backend
@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adagrad", "AdamW", "Adamax", "NAdam", "RAdam", "Ranger"])
def test_hyper_parameters_that_are_no_numbers(name: str, backend: str) -> None:
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    optimizer = getattr(fastopt, name)([p], backend=backend)
    for key in {"lr", "eps", "weight_decay"} & optimizer.param_groups[0].keys():
        group = optimizer.param_groups[0]
        before, group[key] = group[key], "0.1"
        with pytest.raises(TypeError, match=f"a group's {key} is '0.1'; a number"):
            optimizer.step()
        assert torch.equal(p, torch.ones(4))
        assert optimizer.state[p].get("step", 0) == 0
        group[key] = before
    optimizer.step()
    assert not torch.equal(p, torch.ones(4))


@pytest.mark.contract("memory", difference="failing steps")
@each_backend
def test_a_failed_step_lets_go_of_gradients(backend: str) -> None:
    p, q = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer = fastopt.Adam([p, q], backend=backend)
    for each in (p, q):
        each.grad = torch.ones(4)
    optimizer.step()
    freed = weakref.ref(p.grad)
    q.grad = torch.eye(4).to_sparse()[0]
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    p.grad = None
    assert freed() is None


def test_memory_that_runs_out_says_nothing_about_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("of a test")

    reference.has_float64.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", fails)
        with pytest.raises(torch.OutOfMemoryError):
            reference.has_float64("cpu")
    assert reference.has_float64("cpu")
