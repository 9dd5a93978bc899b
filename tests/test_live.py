"""What counts is what lies in the groups, in the state and in memory *now*: nothing remembered may survive a change.

Also: steps that fail half-way, other builds of torch, compiled training steps.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import pathlib
import subprocess
import sys
import textwrap
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from cases import Case, backends, by_id, parametrize
from harness import difference

import fastopt

pytestmark = pytest.mark.contract("live")

LIVE = by_id("sgd-momentum", "adam-everything", "nadam", "adagrad", "ranger", "lookahead-adam")
native_only = pytest.mark.parametrize("backend", backends(["native"]))
each_backend = pytest.mark.parametrize("backend", backends())


def ramp(n: int) -> torch.Tensor:
    return torch.linspace(-1, 1, n)


def wave(shape: Any, step: int) -> torch.Tensor:
    n = torch.Size(shape).numel()
    return torch.cos(torch.arange(n) * 0.7 + step).reshape(shape)


class Twins:
    """Ours and the oracle on equal parameters. `change(i, p, state)` is applied to both sides between steps."""

    def __init__(self, case: Case, backend: str, sizes: tuple[int, ...] = (33, 8)) -> None:
        self.ours, self.theirs = ([torch.nn.Parameter(ramp(n)) for n in sizes] for _ in range(2))
        self.optimizer, self.oracle, self.t = case.make(self.ours, backend), case.oracle(self.theirs), 0

    def states(self, p: torch.Tensor) -> dict[str, Any]:
        return self.optimizer.state[p] if any(p is q for q in self.ours) else oracles.states_of(self.oracle, p)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            for params, optimizer in ((self.ours, self.optimizer), (self.theirs, self.oracle)):
                for i, p in enumerate(params):
                    p.grad = wave(p.shape, self.t + i)
                optimizer.step()
            self.t += 1
            for p, q in zip(self.ours, self.theirs, strict=True):
                assert not (text := difference(p.detach(), q.detach())), f"step {self.t}: {text}"


@parametrize(LIVE, ("fp32",))
def test_parameter_data_swapped(case: Case, dtype: torch.dtype, backend: str) -> None:
    """p.data = other memory (Module.to, weight averaging, FSDP): the new memory moves, the old one does not."""
    twins = Twins(case, backend)
    twins.step(3)
    p, old = twins.ours[0], twins.ours[0].data
    kept = old.clone()
    p.data = p.data.clone()
    twins.step(3)
    assert torch.equal(old, kept)
    p.data = p.data.clone().as_strided((33,), (1,))
    twins.step(2)


@parametrize(LIVE, ("fp32",))
def test_parameter_data_swapped_every_step(case: Case, dtype: torch.dtype, backend: str) -> None:
    twins = Twins(case, backend)
    for _ in range(6):
        twins.ours[0].data = twins.ours[0].data.clone()
        twins.ours[1].grad = None
        twins.step()


@parametrize(LIVE, ("fp32",))
def test_parameter_moved_within_one_buffer(case: Case, dtype: torch.dtype, backend: str) -> None:
    """The same storage at another offset: what was there before must stay."""
    twins, flat = Twins(case, backend), torch.full((200,), 7.0)
    p = twins.ours[0]
    for at in (0, 40, 41, 120):
        values = p.detach().clone()
        flat.fill_(7.0)
        flat[at : at + 33] = values
        p.data = flat[at : at + 33]
        twins.step(2)
        assert (flat == 7.0).sum() >= 200 - 33
        assert (flat[:at] == 7.0).all()
        assert (flat[at + 33 :] == 7.0).all()


@parametrize(LIVE, ("fp32",))
def test_state_tensors_rebound(case: Case, dtype: torch.dtype, backend: str) -> None:
    """optimizer.state[p][key] = another tensor, for every key: that one is read and written from then on."""
    twins = Twins(case, backend)
    twins.step(3)
    for p in twins.ours:
        old = dict(twins.optimizer.state[p])
        kept = {k: v.clone() for k, v in old.items()}
        for key in old:
            twins.optimizer.state[p][key] = old[key].clone()
        twins.step(2)
        assert all(torch.equal(old[k], kept[k]) for k in old)


@parametrize(LIVE, ("fp32",))
def test_state_values_edited_in_place(case: Case, dtype: torch.dtype, backend: str) -> None:
    twins = Twins(case, backend)
    twins.step(3)
    for p in (twins.ours[0], twins.theirs[0]):
        for key, value in twins.states(p).items():
            value.mul_(2) if key == "step" else value.mul_(0.5)
    twins.step(6)


@parametrize(by_id("adam-everything", "nadam", "ranger", "sgd-momentum"), ("fp32",))
def test_state_discarded(case: Case, dtype: torch.dtype, backend: str) -> None:
    """The usual reset: state.clear(), `del state[p]`, or a new dict altogether. The rule starts again at step one."""
    resets: list[Callable[[Any, Any], Any]] = [
        lambda o, p: o.state.pop(p),
        lambda o, p: o.state[p].clear(),
        lambda o, p: o.state.clear(),
        lambda o, p: setattr(o, "state", type(o.state)(dict) if isinstance(o.state, defaultdict) else {}),
    ]
    twins = Twins(case, backend)
    for reset in resets:
        twins.step(3)
        reset(twins.optimizer, twins.ours[0])
        inner = getattr(twins.oracle, "inner", twins.oracle)
        reset(inner, twins.theirs[0])
        twins.oracle.state = inner.state
    twins.step(8)


@parametrize(by_id("adam-everything", "sgd-momentum", "ranger"), ("fp32",))
def test_strides_changed_at_the_same_address(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Neither address, size nor contiguity tells; only the strides do."""
    flat, shape = torch.zeros(54), (3, 3, 3)
    p, q = torch.nn.Parameter(flat.as_strided(shape, (1, 3, 9))), torch.nn.Parameter(torch.zeros(shape))
    optimizer, oracle = case.make([p], backend), case.oracle([q])
    for step, strides in enumerate([(1, 3, 9), (1, 3, 9), (3, 1, 9), (9, 3, 1), (1, 9, 3), (2, 6, 18), (18, 6, 2)]):
        values, moved = p.detach().clone(), flat.as_strided(shape, strides)
        flat.zero_()
        p.data = moved.copy_(values)
        p.grad, q.grad = wave(shape, step), wave(shape, step)
        optimizer.step()
        oracle.step()
        assert not difference(p.detach().contiguous(), q.detach()), f"strides {strides}"
        assert flat.count_nonzero() <= 27


@parametrize(by_id("adam-everything", "sgd-momentum"), ("fp32",))
@pytest.mark.parametrize("what", ["parameter", "state"])
def test_storage_moved_behind_the_tensor(case: Case, dtype: torch.dtype, backend: str, what: str) -> None:
    """FSDP frees a storage and fills it again: the same storage object, its memory elsewhere."""
    twins = Twins(case, backend, (1000, 8))
    twins.step(2)
    p = twins.ours[0]
    for _ in range(3):
        t = p if what == "parameter" else next(v for v in twins.optimizer.state[p].values() if v.dim())
        values, storage, size = t.detach().clone(), t.untyped_storage(), t.untyped_storage().nbytes()
        storage.resize_(0)
        taken = torch.full((1000,), 7.0)  # likely where the values were
        storage.resize_(size)
        with torch.no_grad():
            t.copy_(values)
        twins.step(2)
        assert (taken == 7.0).all()


@parametrize(by_id("adam-everything", "ranger"), ("fp32",))
def test_shared_memory(case: Case, dtype: torch.dtype, backend: str) -> None:
    """share_memory_() moves a parameter into memory that other processes see."""
    twins = Twins(case, backend)
    twins.step(2)
    for p in twins.ours:
        p.share_memory_()
    twins.step(2)
    assert all(p.is_shared() for p in twins.ours)


@pytest.mark.contract("live", "hooks")
@parametrize(by_id("adam-everything", "ranger", "lookahead-adam"), ("fp32",))
def test_steps_inside_backward(case: Case, dtype: torch.dtype, backend: str) -> None:
    """One optimizer per parameter, each stepping as soon as its gradient is there, which is freed at once."""
    results = []
    for inside in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        optimizers = {p: case.make([p], backend) for p in model.parameters()}

        def finish(p: Any, optimizers: Any = optimizers) -> None:
            optimizers[p].step()
            optimizers[p].zero_grad()

        if inside:
            for p in model.parameters():
                p.register_post_accumulate_grad_hook(finish)
        for step in range(8):
            model(wave((3, 5), step)).pow(2).sum().backward()
            assert all((p.grad is None) == inside for p in model.parameters())
            if not inside:
                for p in model.parameters():
                    finish(p)
        results.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


@parametrize(by_id("adam-everything", "sgd-momentum", "ranger"), ("fp32",))
def test_parameters_replaced_in_the_group(case: Case, dtype: torch.dtype, backend: str) -> None:
    """group["params"] edited in place, replaced and reordered; a newcomer starts its own state."""
    twins = Twins(case, backend)
    twins.step(2)
    for params, optimizer in ((twins.ours, twins.optimizer), (twins.theirs, twins.oracle)):
        params[0] = torch.nn.Parameter(ramp(12))
        optimizer.param_groups[0]["params"][0] = params[0]
    twins.step(2)
    for params, optimizer in ((twins.ours, twins.optimizer), (twins.theirs, twins.oracle)):
        params.reverse()
        optimizer.param_groups[0]["params"] = list(params)
    twins.step(2)
    for params, optimizer in ((twins.ours, twins.optimizer), (twins.theirs, twins.oracle)):
        params.append(torch.nn.Parameter(ramp(5)))
        optimizer.param_groups[0]["params"].append(params[-1])
    twins.step(2)
    for params, optimizer in ((twins.ours, twins.optimizer), (twins.theirs, twins.oracle)):
        del params[0]
        optimizer.param_groups[0]["params"].pop(0)
    twins.step(6)


@parametrize(by_id("adam-everything", "sgd-momentum"), ("fp32",))
def test_group_removed_and_moved(case: Case, dtype: torch.dtype, backend: str) -> None:
    twins = Twins(case, backend)
    for params, optimizer in ((twins.ours, twins.optimizer), (twins.theirs, twins.oracle.inner)):
        params += [torch.nn.Parameter(ramp(6)), torch.nn.Parameter(ramp(3))]
        optimizer.add_param_group({"params": params[2:3], "lr": 0.3})
        optimizer.add_param_group({"params": params[3:], "lr": 0.001})
    twins.step(3)
    for optimizer in (twins.optimizer, twins.oracle.inner):
        optimizer.param_groups.reverse()
    twins.step(2)
    for params, optimizer in ((twins.ours, twins.optimizer), (twins.theirs, twins.oracle.inner)):
        optimizer.param_groups.pop(0)
        params.pop()
    twins.step(2)


@parametrize(by_id("adam-everything", "sgd-momentum"), ("fp32",))
def test_swapped_tensors(case: Case, dtype: torch.dtype, backend: str) -> None:
    """torch.utils.swap_tensors keeps the Python object and exchanges everything behind it."""
    twins = Twins(case, backend)
    twins.step(2)
    for p in (twins.ours[0], twins.theirs[0]):
        p.grad = None
        torch.utils.swap_tensors(p, torch.nn.Parameter(p.detach().flip(0).clone()))
    gc.collect()
    twins.step(3)


@pytest.mark.contract("live", "wrappers")
@pytest.mark.skipif(not hasattr(torch.optim, "swap_in_optimizer_params_and_state"), reason="added in torch 2.13")
@native_only
def test_swapped_in_parameters_and_state(backend: str) -> None:
    """torch 2.13's functional step exchanges parameters, group values and state for the time of a call."""
    p, q = torch.nn.Parameter(ramp(9)), torch.nn.Parameter(ramp(9) * 2)
    optimizer, oracle = fastopt.Adam([p], lr=0.1, backend=backend), oracles.TorchLoop("Adam", [q], lr=0.1)
    p.grad = wave((9,), 0)
    optimizer.step()
    kept = p.detach().clone(), {k: v.clone() for k, v in optimizer.state[p].items()}
    group, state, params = optimizer.param_groups[0], optimizer.state, optimizer.param_groups[0]["params"]
    other = torch.nn.Parameter(ramp(9) * 2)
    group["params"], optimizer.state = [other], defaultdict(dict)
    for step in range(3):
        other.grad, q.grad = wave((9,), step), wave((9,), step)
        optimizer.step()
        oracle.step()
    group["params"], optimizer.state = params, state
    assert not difference(other.detach(), q.detach())
    assert torch.equal(p.detach(), kept[0])
    assert all(torch.equal(v, kept[1][k]) for k, v in optimizer.state[p].items())


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


@pytest.mark.contract("live", "layouts")
@parametrize(by_id("adam", "sgd-momentum", "ranger"), ("fp32",))
def test_model_cast_in_mid_run(case: Case, dtype: torch.dtype, backend: str) -> None:
    """model.double() after some steps: an error as in torch, or float64 arithmetic on the old states. Never misread."""
    p = torch.nn.Parameter(ramp(33))
    optimizer = case.make([p], backend)
    for step in range(3):
        p.grad = wave((33,), step)
        optimizer.step()
    values = p.detach().clone()
    p.grad, p.data = None, p.data.double()
    p.grad = wave((33,), 3).double()
    try:
        optimizer.step()
    except RuntimeError:
        assert torch.equal(p.detach().float(), values)
    else:
        assert p.dtype == torch.float64
        assert 0 < (p.detach() - values).abs().max() < 0.5


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
    result = _python(script)
    assert result.returncode == 0, result.stderr
    assert "repeated:" in result.stdout


@pytest.mark.contract("wrappers")
def test_steps_of_two_optimizers_in_two_threads() -> None:
    """Nothing is shared between optimizers: each trajectory is the one it has alone."""
    case = by_id("adam-everything")[0]
    size = 1 << 21  # large enough for the kernels to let other Python threads run

    def run(seed: int, results: dict[int, torch.Tensor]) -> None:
        p = torch.nn.Parameter(ramp(size) * seed)
        optimizer = case.make([p])
        for step in range(5):
            p.grad = torch.full((size,), 0.1 * seed + step)
            optimizer.step()
        results[seed] = p.detach()

    alone: dict[int, torch.Tensor] = {}
    together: dict[int, torch.Tensor] = {}
    for seed in (1, 2, 3):
        run(seed, alone)
    threads = [threading.Thread(target=run, args=(seed, together)) for seed in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (1, 2, 3):
        assert torch.equal(alone[seed], together[seed])


def _python(script: str, **env: str) -> subprocess.CompletedProcess[str]:
    root = pathlib.Path(fastopt.__file__).resolve().parents[1]
    variables = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=variables, capture_output=True, text=True, timeout=120
    )


@pytest.mark.contract("fallback")
@native_only
def test_extension_built_for_another_torch_is_reported_not_loaded(backend: str) -> None:
    script = """
        import sys, warnings
        import torch
        torch.__version__ = "9.9.9+other"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import fastopt
            reason = fastopt.backends.why_not("native")
            assert not fastopt.backends.available("native")
        assert "9.9.9+other" in reason and "built" in reason, reason
        assert "fastopt._C" not in sys.modules
        assert any("9.9.9+other" in str(w.message) for w in caught)
        p = torch.nn.Parameter(torch.ones(3))
        try:
            fastopt.Adam([p], backend="native")
        except RuntimeError as error:
            assert "9.9.9+other" in str(error)
        else:
            raise SystemExit("an explicit request was ignored")
        for cls in (fastopt.Adam, fastopt.Ranger):
            p.grad = torch.ones(3)
            before = p.detach().clone()
            optimizer = cls([p])
            optimizer.step()
            assert (p < before).all()
        assert "9.9.9+other" in str(fastopt.info())
        assert "9.9.9+other" in str(fastopt.explain(optimizer))
    """
    result = _python(script)
    assert result.returncode == 0, result.stderr


@pytest.mark.contract("fallback")
def test_without_an_extension_the_package_works() -> None:
    """No compiler at install time: torch's own code for the classes torch has, the reference backend for the rest."""
    script = """
        import importlib.util, sys
        real = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *a: None if name == "fastopt._C" else real(name, *a)
        sys.modules["fastopt._C"] = None
        import torch, fastopt
        assert "compiler" in fastopt.backends.why_not("native")
        for name in ("SGD", "RMSprop", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Ranger"):
            p, q = torch.nn.Parameter(torch.linspace(-1, 1, 9)), torch.nn.Parameter(torch.linspace(-1, 1, 9))
            ours = getattr(fastopt, name)([p], lr=0.1)
            theirs = getattr(torch.optim, name, fastopt.Ranger)([q], lr=0.1)
            for t in range(9):
                if t == 4:
                    ours.load_state_dict(ours.state_dict())
                    theirs.load_state_dict(theirs.state_dict())
                p.grad, q.grad = torch.ones(9), torch.ones(9)
                ours.step(); theirs.step()
            assert torch.equal(p, q), name
        for overflow, scale, expected in ((0.0, 4.0, -0.1), (1.0, 4.0, 0.0)):
            p = torch.nn.Parameter(torch.zeros(1))
            scaled = fastopt.SGD([p], lr=0.1, momentum=0.9, fused=True)
            p.grad = torch.full((1,), scale)
            scaled.grad_scale, scaled.found_inf = torch.tensor(scale), torch.tensor(overflow)
            scaled.step()
            assert abs(p.item() - expected) < 1e-7, (overflow, p)
        lookahead = fastopt.Lookahead(fastopt.Adam([p]), k=2)
        lookahead.step(); lookahead.step()
        assert "torch" in str(fastopt.explain(ours)) or "reference" in str(fastopt.explain(ours))
        print(fastopt.info())
    """
    result = _python(script)
    assert result.returncode == 0, result.stderr
    assert "compiler" in result.stdout


@pytest.mark.contract("hooks", difference="compiled steps")
@pytest.mark.skipif(importlib.util.find_spec("torch._dynamo") is None, reason="torch without dynamo")
@pytest.mark.filterwarnings("error:Dynamo detected")
@parametrize(by_id("sgd-momentum", "adam-amsgrad", "radam", "ranger", "lookahead-adam"), ("fp32",))
def test_compiled_training_step_gives_the_same_numbers(case: Case, dtype: torch.dtype, backend: str) -> None:
    """The step itself stays outside the compiled graph."""
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 4)
        optimizer = case.make(model.parameters(), backend)
        x = torch.randn(8, 6)

        def train(model: Any = model, optimizer: Any = optimizer, x: Any = x) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).pow(2).mean()
            loss.backward()
            optimizer.step()
            return loss

        torch._dynamo.reset()
        step = torch.compile(train, backend="eager") if compiled else train
        losses = [step().item() for _ in range(8)]
        results.append((losses, [p.detach().clone() for p in model.parameters()]))
    torch._dynamo.reset()
    assert results[0][0] == results[1][0]
    assert all(torch.equal(p, q) for p, q in zip(results[0][1], results[1][1], strict=True))


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
    result = _python(script, FASTOPT_ISA="nonsense")
    assert result.returncode == 0, result.stderr or f"exit status {result.returncode}"


@pytest.mark.contract("hooks", difference="compiled steps")
@native_only
def test_compiled_step_method(backend: str) -> None:
    p, q = torch.nn.Parameter(ramp(9)), torch.nn.Parameter(ramp(9))
    optimizer, oracle = fastopt.Adam([p], backend=backend), oracles.TorchLoop("Adam", [q])
    step = torch.compile(optimizer.step, backend="eager")
    for t in range(4):
        p.grad, q.grad = wave((9,), t), wave((9,), t)
        step()
        oracle.step()
    torch._dynamo.reset()
    assert not difference(p.detach(), q.detach())


@pytest.mark.contract("memory")
@native_only
def test_long_runs_do_not_grow(backend: str) -> None:
    """Schedules that never repeat a value, gradients that come and go: memory after 9,000 steps is that after 4,000."""
    script = """
        import gc, resource, torch, fastopt
        params = [torch.nn.Parameter(torch.zeros(1 + i % 7)) for i in range(60)]
        optimizer = fastopt.Ranger(params, backend="native")
        def run(start, stop):
            for t in range(start, stop):
                optimizer.param_groups[0]["lr"] = 1e-3 / (1 + t)
                for i, p in enumerate(params):
                    p.grad = torch.ones_like(p) if (t + i) % 3 else None
                optimizer.step()
            gc.collect()
            return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
        first, last = run(0, 4000), run(4000, 9000)
        print(last - first)
        assert last - first < 3 << 20, (first, last)
    """
    result = _python(script)
    assert result.returncode == 0, result.stderr
