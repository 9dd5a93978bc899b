"""What counts is what lies in the groups, in the state and in memory *now*: nothing remembered may survive a change."""

from __future__ import annotations

import gc
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from cases import Case, backends, by_id, parametrize
from harness import difference, python, ramp, wave

import fastopt

pytestmark = pytest.mark.contract("live")

LIVE = by_id("sgd-momentum", "adam-everything", "nadam", "adagrad", "ranger", "lookahead-adam")
native_only = pytest.mark.parametrize("backend", backends(["native"]))


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
    python(script)
