"""Several threads at one optimizer, and a fork in the midst of a step: memory stays whole, and a step is a whole one or
says why it is none. What would be a crash is tried in a process of its own."""

from __future__ import annotations

import copy
import os
import sys
import threading

import pytest
import torch
from cases import backends, each_backend
from harness import python
from torch import nn

import fastopt

pytestmark = pytest.mark.contract("wrappers", difference="threads")

NATIVE = pytest.mark.parametrize("backend", backends(["native"]))


@pytest.mark.parametrize("n", [100, 2_000_000])
def test_two_threads_step_one_optimizer(n: int) -> None:
    """They wait for one another; every step is a whole one."""
    p = nn.Parameter(torch.zeros(n))
    p.grad = torch.ones(n)
    optimizer = fastopt.SGD([p], lr=1.0, momentum=0.0)
    optimizer.step()
    errors: list[Exception] = []

    def work() -> None:
        try:
            for _ in range(20):
                optimizer.step()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert (p == -41).all()


@each_backend
@pytest.mark.parametrize("name", ["Adam", "Ranger"])
def test_threads_take_turns_whoever_steps(name: str, backend: str) -> None:
    """With a hook, and with an overlapping parameter, which torch's code takes where there is one."""
    memory = torch.ones(6)
    params = [nn.Parameter(t) for t in (torch.ones(4), memory[:4], memory[2:])]
    for p in params:
        p.grad = torch.ones(4)
    optimizer = getattr(fastopt, name)(params, backend=backend)
    optimizer.register_step_post_hook(lambda *_: None)
    optimizer.step()
    interval, failed = sys.getswitchinterval(), list[Exception]()

    def work() -> None:
        try:
            for _ in range(50):
                optimizer.step()
        except Exception as error:
            failed.append(error)

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failed
    assert {optimizer.state[p]["step"].item() for p in params} == {151}


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("n", [100, 1_500_000])
def test_a_checkpoint_loaded_while_another_thread_steps(n: int, hooked: bool) -> None:
    """Whoever does that wants it; nothing is read that was freed, and a step is a whole one or says why it is none."""
    p = nn.Parameter(torch.zeros(n))
    p.grad = torch.ones(n)
    optimizer = fastopt.SGD([p], lr=1.0, momentum=0.5)
    if hooked:
        optimizer.register_step_pre_hook(lambda *_: None)
    optimizer.step()
    saved, done = copy.deepcopy(optimizer.state_dict()), threading.Event()
    failed: list[str] = []

    def work() -> None:
        while not done.is_set():
            try:
                optimizer.step()
            except RuntimeError as error:
                failed.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(30):
        optimizer.load_state_dict(saved)
        torch.ones(10_000).sum()
    done.set()
    thread.join()
    assert all("another thread" in text or "call step() again" in text for text in failed)
    optimizer.load_state_dict(saved)
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p, before - 1.5)


@pytest.mark.parametrize("backend", backends(["native"]))
def test_states_exchanged_while_another_thread_waits_for_its_step(backend: str) -> None:
    """One thread steps, another waits for it, a third replaces optimizer.state: the waiting one has to live with it.

    Memory that was freed is overwritten there, so that reading it is a crash."""
    python(
        f"""
        import collections, threading, time, torch, fastopt
        torch.set_num_threads(1)
        p = torch.zeros(20_000_000, requires_grad=True)
        p.grad = torch.ones_like(p)
        optimizer = fastopt.SGD([p], lr=0.1, backend={backend!r})
        for _ in range(4):
            optimizer.state = collections.defaultdict(dict)
            optimizer.step()
            optimizer.step()
            threads = [threading.Thread(target=optimizer.step) for _ in range(2)]
            for thread in threads:
                thread.start()
                time.sleep(0.003)
            optimizer.state = collections.defaultdict(dict)
            for thread in threads:
                thread.join()
        assert (p < 0).all()
        """,
        PYTHONMALLOC="debug",
    )


# Python code that runs in the midst of a step lets other threads run: here it waits for them. A learning rate that is
# no plain number is asked for its value, so a class of them can tell when that is.
WAITING = """
import copy, threading, torch, fastopt
inside, done, calls, at = threading.Event(), threading.Event(), [0], [0]
class Lr(float):
    def tolist(self):
        calls[0] += 1
        if calls[0] == at[0]:
            inside.set()
            done.wait(20)
        return float(self)
def meanwhile(nth, change):
    def work():
        inside.wait(20)
        change()
        done.set()
    calls[0], at[0] = 0, nth
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread
def finish(thread, optimizer):
    # The step during which it is to happen; after which, if that asks less often.
    try:
        optimizer.step()
    except RuntimeError as error:
        assert "call step() again" in str(error), error
    done.set()
    inside.set()
    thread.join()
def parameters(n):
    ps = [torch.nn.Parameter(torch.zeros(4)) for _ in range(n)]
    for p in ps: p.grad = torch.ones(4)
    return ps
"""


@NATIVE
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_checkpoint_loaded_while_a_step_asks_for_hyper_parameters(backend: str, nth: int) -> None:
    python(
        WAITING
        + f"""
ps = parameters(40)
optimizer = fastopt.SGD([{{"params": [p]}} for p in ps], lr=0.25, momentum=0.5, backend={backend!r})
optimizer.step()
saved = copy.deepcopy(optimizer.state_dict())
for group in optimizer.param_groups: group["lr"] = Lr(0.25)
optimizer.step()
thread = meanwhile({nth}, lambda: optimizer.load_state_dict(saved))
try:
    optimizer.step()
except RuntimeError as error:
    assert "another thread" in str(error) or "call step() again" in str(error), error
thread.join()
assert done.is_set() and calls[0] >= {nth}
optimizer.load_state_dict(saved)
before = [p.detach().clone() for p in ps]
optimizer.step()
assert all(torch.equal(p, b - 0.25 * 1.5) for p, b in zip(ps, before))
""",
        PYTHONMALLOC="debug",
    )


@NATIVE
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_checkpoint_loaded_while_a_step_of_a_lookahead_asks_for_hyper_parameters(backend: str, nth: int) -> None:
    """Its count and those of the optimizer inside stay together."""
    python(
        WAITING
        + f"""
ps = parameters(3)
optimizer = fastopt.Lookahead(fastopt.Adam(ps, backend={backend!r}), k=100)
optimizer.step()
saved = copy.deepcopy(optimizer.state_dict())
for _ in range(3): optimizer.step()
(group,) = optimizer.param_groups
group["lr"] = Lr(0.1)
optimizer.step()
optimizer.step()
thread = meanwhile({nth}, lambda: optimizer.load_state_dict(saved))
finish(thread, optimizer)
(group,) = optimizer.param_groups
assert {{int(optimizer.state[p]["step"]) for p in ps}} == {{group["lookahead_step"]}}, (optimizer.state, group)
""",
        PYTHONMALLOC="debug",
    )


@NATIVE
@pytest.mark.parametrize("nth", [1, 2, 3, 4, 5])
def test_groups_added_while_a_step_is_prepared(backend: str, nth: int) -> None:
    python(
        WAITING
        + f"""
ps, more = parameters(3), parameters(40)
optimizer = fastopt.SGD([{{"params": [p]}} for p in ps], lr=0.25, momentum=0.5, backend={backend!r})
optimizer.param_groups[2]["lr"] = Lr(0.25)
thread = meanwhile({nth}, lambda: [optimizer.add_param_group({{"params": [p]}}) for p in more])
finish(thread, optimizer)
before = [p.detach().clone() for p in (*ps, *more)]
optimizer.step()
assert all((p < b).all() for p, b in zip((*ps, *more), before))
""",
        PYTHONMALLOC="debug",
    )


@NATIVE
@pytest.mark.parametrize("nth", range(1, 7))
def test_states_replaced_while_a_plan_is_made(backend: str, nth: int) -> None:
    """The next steps go on with those that are there, and not with those that were."""
    python(
        WAITING
        + f"""
ps = parameters(3)
optimizer = fastopt.SGD([{{"params": [p]}} for p in ps], lr=0.25, momentum=0.5, backend={backend!r})
optimizer.step()
optimizer.step()
old = [optimizer.state[p]["momentum_buffer"] for p in ps]
kept = [t.clone() for t in old]
def replace():
    for p in ps: optimizer.state[p]["momentum_buffer"] = torch.full((4,), 8.0)
optimizer.param_groups[2]["lr"] = Lr(0.25)
ps[2].data = torch.zeros(5)[1:]  # makes the tables anew
thread = meanwhile({nth}, replace)
finish(thread, optimizer)
now = [optimizer.state[p]["momentum_buffer"] for p in ps]
values = [t.clone() for t in now]
ends = [t.clone() for t in old]
optimizer.step()
assert all(optimizer.state[p]["momentum_buffer"] is t for p, t in zip(ps, now))
assert all(torch.equal(t, 0.5 * v + 1) for t, v in zip(now, values)), (now, values)
assert all(torch.equal(t, e) for t, e in zip(old, ends)), (old, ends)
""",
        PYTHONMALLOC="debug",
    )


@NATIVE
@pytest.mark.parametrize("nth", [1, 2])
def test_groups_that_go_while_a_step_asks_for_hyper_parameters(backend: str, nth: int) -> None:
    python(
        WAITING
        + f"""
ps = parameters(30)
optimizer = fastopt.SGD([{{"params": [p]}} for p in ps], lr=0.25, momentum=0.5, backend={backend!r})
optimizer.step()
optimizer.param_groups[0]["lr"] = Lr(0.25)
optimizer.step()
groups = list(optimizer.param_groups)
thread = meanwhile({nth}, optimizer.param_groups.clear)
finish(thread, optimizer)
optimizer.param_groups.extend(groups)
before = [p.detach().clone() for p in ps]
optimizer.step()
assert all((p < b).all() for p, b in zip(ps, before))
""",
        PYTHONMALLOC="debug",
    )


EDITS = {
    "states replaced": "own = optimizer.state[p]; key = next(iter(own)); own[key] = own[key].clone()",
    "states taken": "optimizer.state.pop(p, None)",
    "checkpoints loaded": "optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))",
    "hyper-parameters": "optimizer.param_groups[0]['weight_decay'] = random.random() * 1e-3",
    "groups replaced": "optimizer.param_groups[0] = dict(optimizer.param_groups[0])",
    "groups added": "optimizer.add_param_group({'params': [torch.nn.Parameter(torch.ones(4))]}) "
    "if len(optimizer.param_groups) < 3 else optimizer.param_groups.pop()",
}


@NATIVE
@pytest.mark.parametrize("edit", EDITS)
def test_edits_at_any_time(edit: str, backend: str) -> None:
    """Two threads step and one edits, and the interpreter changes between them as often as it can."""
    python(
        f"""
import copy, random, sys, threading, time, torch, fastopt
torch.set_num_threads(1)
sys.setswitchinterval(1e-5)
ps = [torch.nn.Parameter(torch.ones(10)) for _ in range(6)]
for p in ps: p.grad = torch.ones(10)
optimizer = fastopt.Adam(ps, lr=1e-3, backend={backend!r})
end, taken = time.monotonic() + 1.0, [0, 0]
def work(k):
    while time.monotonic() < end:
        try:
            optimizer.step()
            taken[k] += 1
        except Exception:  # of Python's: what it walks has changed
            pass
failed, edited = [], [0]
def guarded(f, *args):
    try: f(*args)
    except BaseException as error: failed.append(error)
def edits():
    while time.monotonic() < end:
        p = random.choice(ps)
        try:
            exec(edit)
            edited[0] += 1
        except Exception:  # what it edits has changed
            pass
        time.sleep(0.0005)
edit = {EDITS[edit]!r}
threads = [threading.Thread(target=guarded, args=(work, k)) for k in range(2)]
threads.append(threading.Thread(target=guarded, args=(edits,)))
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not failed, failed
assert min(taken) > 0 and edited[0] > 0
before = [p.detach().clone() for p in ps]
optimizer.step()
assert all(optimizer.state[p]["exp_avg"].shape == p.shape and (p < b).all() for p, b in zip(ps, before))
"""
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@NATIVE
def test_a_fork_while_another_thread_steps(backend: str) -> None:
    """In the child that thread does not exist, and nobody waits for it."""
    python(
        f"""
import os, threading, time, torch, fastopt
torch.set_num_threads(1)
p = torch.nn.Parameter(torch.zeros(4_000_000))
p.grad = torch.ones_like(p)
optimizer = fastopt.SGD([p], lr=1.0, momentum=0.5, backend={backend!r})
optimizer.step()
stop = threading.Event()
def work():
    while not stop.is_set(): optimizer.step()
thread = threading.Thread(target=work)
thread.start()
for _ in range(3):
    time.sleep(0.01)
    child = os.fork()
    if child == 0:
        optimizer.step()
        os._exit(0)
    for _ in range(200):
        found, status = os.waitpid(child, os.WNOHANG)
        if found: break
        time.sleep(0.05)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        stop.set()
        raise AssertionError("the child waits")
    assert status == 0
stop.set()
thread.join()
"""
    )


def test_two_threads_step_one_lookahead() -> None:
    """What one of them has stepped it has counted before the other steps."""
    p = nn.Parameter(torch.zeros(3))
    p.grad = -torch.ones(3)
    optimizer = fastopt.Lookahead(fastopt.SGD([p], lr=1.0), k=10**9)
    interval = sys.getswitchinterval()
    failed: list[Exception] = []

    def work() -> None:
        try:
            for _ in range(500):
                optimizer.step()
        except Exception as error:
            failed.append(error)

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failed
    assert p[0] == 1000
    assert optimizer.param_groups[0]["lookahead_step"] == 1000
    assert "_drive" not in vars(optimizer.optimizer)
