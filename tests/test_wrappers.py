"""What other code does to an optimizer: hooks, a replaced `step`, wrappers that rebind groups, state and memory,
torch.compile, threads and processes.

The wrappers of large trainers (Accelerate, Lightning, DeepSpeed, FSDP2's preparation, composer) are played by a few
lines that do to the optimizer what they do. After each of them the numbers are those of an oracle that was left alone.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import pathlib
import pickle
import textwrap
import threading
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import TORCH_NAMES, Case, by_id, parametrize
from harness import difference, python
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fastopt

pytestmark = pytest.mark.contract("wrappers")

EVERY = by_id("sgd-momentum", "rmsprop-centered", "adagrad", "adam-amsgrad", "adamw", "adamax", "nadam", "radam")
EVERY += by_id("ranger", "lookahead-adam", "lookahead-ranger")
SOME = by_id("sgd-momentum", "adam-amsgrad", "nadam", "ranger", "lookahead-adam")


def wave(p: torch.Tensor, step: int) -> torch.Tensor:
    return torch.cos(torch.arange(float(p.numel())) * 0.7 + step).reshape(p.shape)


class Twins:
    """Ours, and an oracle with the same gradients that nobody touches."""

    def __init__(self, case: Case, backend: str | None) -> None:
        self.ours, self.theirs = ([torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (33, 8, 5)] for _ in range(2))
        self.optimizer = case.make([{"params": self.ours[:2]}, {"params": self.ours[2:], "lr": 0.02}], backend)
        self.oracle = case.oracle([{"params": self.theirs[:2]}, {"params": self.theirs[2:], "lr": 0.02}])
        self.t = 0

    def step(self, count: int = 1, step: Callable[[], Any] | None = None) -> None:
        for _ in range(count):
            for ps in (self.ours, self.theirs):
                for i, p in enumerate(ps):
                    p.grad = wave(p, self.t + i)
            (step or self.optimizer.step)()
            self.oracle.step()
            self.t += 1
            self.compare()

    def compare(self) -> None:
        for p, q in zip(self.ours, self.theirs, strict=True):
            assert not (text := difference(p.detach(), q.detach())), f"after step {self.t}: {text}"


def watch(optimizer: Any, calls: list[str]) -> list[Any]:
    """All kinds of hooks, two of each that can be put first; what they are given is checked."""

    def note(name: str, *given: Any) -> None:
        assert given[0] is optimizer
        calls.append(name)

    return [
        optimizer.register_step_pre_hook(lambda *given: note("step pre", *given)),
        optimizer.register_step_post_hook(lambda *given: note("step post", *given)),
        optimizer.register_state_dict_pre_hook(lambda *given: note("save pre", *given)),
        optimizer.register_state_dict_pre_hook(lambda *given: note("save first", *given), prepend=True),
        optimizer.register_state_dict_post_hook(lambda *given: note("save post", *given)),
        optimizer.register_load_state_dict_pre_hook(lambda *given: note("load pre", *given)),
        optimizer.register_load_state_dict_pre_hook(lambda *given: note("load first", *given), prepend=True),
        optimizer.register_load_state_dict_post_hook(lambda *given: note("load post", *given)),
        optimizer.register_load_state_dict_post_hook(lambda *given: note("load post first", *given), prepend=True),
    ]


STEP = ["step pre", "step post"]
SAVE = ["save first", "save pre", "save post"]
LOAD = ["load first", "load pre", "load post first", "load post"]


@pytest.mark.contract("hooks")
@parametrize(EVERY, ["fp32"])
def test_every_kind_of_hook_fires_once_and_in_order(case: Case, dtype: torch.dtype, backend: str) -> None:
    """In a run of steps, saves and loads; also where the torch class's own step has been wrapped before."""
    if hasattr(torch.optim, case.name):
        case.make_torch([torch.nn.Parameter(torch.ones(1))]).step()
    twins, calls = Twins(case, backend), []
    twins.step()
    handles = watch(twins.optimizer, calls)
    twins.step(2)
    saved = twins.optimizer.state_dict()
    twins.optimizer.load_state_dict(saved)
    twins.step()
    assert calls == STEP * 2 + SAVE + LOAD + STEP
    for handle in handles:
        handle.remove()
    twins.step()
    twins.optimizer.load_state_dict(twins.optimizer.state_dict())
    assert len(calls) == 3 * len(STEP) + len(SAVE) + len(LOAD)


@pytest.mark.contract("hooks", "wrappers")
@parametrize(EVERY, ["fp32"])
def test_step_hooks_under_everything_that_replaces_step(case: Case, dtype: torch.dtype, backend: str) -> None:
    """A scheduler wraps step as an attribute of the instance, a closure is given, a profiler runs: still once."""
    twins, calls = Twins(case, backend), []
    watch(twins.optimizer, calls)
    handles = [
        register_optimizer_step_pre_hook(lambda o, *_: calls.append("global pre") if o is twins.optimizer else None),
        register_optimizer_step_post_hook(lambda o, *_: calls.append("global post") if o is twins.optimizer else None),
    ]
    try:
        torch.optim.lr_scheduler.ConstantLR(twins.optimizer, factor=1.0)
        assert "step" in vars(twins.optimizer)
        twins.step(step=lambda: twins.optimizer.step(lambda: 1.0))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            twins.optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["global pre", "step pre", "step post", "global post"] * 2
    label = f"Optimizer.step#{type(twins.optimizer).__name__}.step"
    assert [e.count for e in profile.key_averages() if e.key == label] == [1]


@parametrize(by_id("sgd-momentum", "adam", "ranger"), ["fp32"])
def test_subclass_that_calls_our_step(case: Case, dtype: torch.dtype, backend: str) -> None:
    """A user's class with a step of its own: hooks fire once, and what it adds happens."""
    base: Any = getattr(fastopt, case.name)

    class Mine(base):
        def step(self, closure: Any = None) -> Any:
            calls.append("mine")
            return super().step(closure)

    twins, calls = Twins(case, backend), []
    ours = twins.optimizer
    twins.optimizer = Mine(ours.param_groups, backend=backend)
    watch(twins.optimizer, calls)
    twins.step(3)
    assert calls == ["step pre", "mine", "step post"] * 3


@pytest.mark.contract("hooks")
def test_load_hooks_may_exchange_the_dict() -> None:
    """A pre-hook returns another dict, a state-dict post-hook too: theirs count."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = fastopt.Adam([p])
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.register_state_dict_post_hook(lambda o, d: {**d, "mine": 7})
    assert optimizer.state_dict()["mine"] == 7

    def replaced(o: Any, d: Any) -> Any:
        d = copy.deepcopy({k: v for k, v in d.items() if k != "mine"})
        d["state"][0]["exp_avg"].fill_(5)
        return d

    optimizer.register_load_state_dict_pre_hook(replaced)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[p]["exp_avg"].tolist() == [5.0] * 3


@pytest.mark.contract("hooks", "wrappers")
@parametrize(EVERY, ["fp32"])
def test_step_as_an_attribute_of_the_instance(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Accelerate and schedulers put a step there; the original is called through it, and comes back when it goes."""
    twins, calls = Twins(case, backend), []
    original = twins.optimizer.step

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    assert original.__func__ is type(twins.optimizer).step
    twins.optimizer.step = types.MethodType(patched, twins.optimizer)
    twins.step(2)
    twins.optimizer.step = lambda closure=None: patched(None, closure)
    twins.step(2)
    other = copy.deepcopy(twins.optimizer)
    assert "step" not in vars(other)
    del twins.optimizer.step
    twins.step(2)
    assert calls == [(), (), (None,), (None,)]


class Accelerated:
    """accelerate.optimizer.AcceleratedOptimizer: loads the empty state moved to a device, then stands in front."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.called = optimizer, False
        optimizer.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
        self._step, optimizer.step = optimizer.step, types.MethodType(self._patched, optimizer)

    def _patched(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        self.called = True
        return self._step(*args, **kwargs)

    def step(self, closure: Any = None) -> None:
        amp = torch.amp.GradScaler("cpu", enabled=False)
        amp.step(self.optimizer, closure) if closure else amp.step(self.optimizer)

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        accepted = "set_to_none" in inspect.signature(self.optimizer.zero_grad).parameters
        assert accepted
        self.optimizer.zero_grad(set_to_none=set_to_none)


@parametrize(SOME, ["fp32"])
def test_accelerate(case: Case, dtype: torch.dtype, backend: str) -> None:
    twins = Twins(case, backend)
    wrapper = Accelerated(twins.optimizer)
    twins.step(4, wrapper.step)
    assert wrapper.called
    wrapper.zero_grad(True)
    assert all(p.grad is None for p in twins.ours)


@parametrize(SOME, ["fp32"])
def test_lightning(case: Case, dtype: torch.dtype, backend: str) -> None:
    """A class made at run time from the wrapper and our class, on our instance's __dict__, steps with a closure."""
    twins = Twins(case, backend)
    inner = twins.optimizer

    class Wrapper:
        def __init__(self, optimizer: Any) -> None:
            vars(self).update({k: v for k, v in vars(optimizer).items() if k not in ("step", "__del__")})
            self.__class__ = type("Lightning" + type(optimizer).__name__, (Wrapper, type(optimizer)), {})
            self._optimizer = optimizer

        def step(self, closure: Any = None, **kwargs: Any) -> Any:
            return self._optimizer.step(closure or (lambda: None), **kwargs)

    wrapper: Any = Wrapper(inner)
    assert isinstance(wrapper, type(inner))
    assert wrapper.param_groups is inner.param_groups
    twins.step(3, wrapper.step)
    state = wrapper.state_dict()
    inner.load_state_dict(state)
    # A device move, as before every resumed run: every state but `step` becomes another tensor.
    for states in inner.state.values():
        for key, value in states.items():
            if isinstance(value, torch.Tensor) and key != "step":
                states[key] = value.clone()
    twins.step(3, wrapper.step)
    wrapper.zero_grad()
    assert all(p.grad is None for p in twins.ours)


@parametrize(SOME, ["fp32"])
def test_deepspeed_steps_one_group_at_a_time(case: Case, dtype: torch.dtype, backend: str) -> None:
    """ZeRO 1 and 2: param_groups is a list of one group for the time of a step, and there are as many steps."""
    twins = Twins(case, backend)

    def step() -> None:
        groups = twins.optimizer.param_groups
        for group in groups:
            twins.optimizer.param_groups = [group]
            twins.optimizer.step()
        twins.optimizer.param_groups = groups

    twins.step(5, step)


@parametrize([case for case in SOME if not case.lookahead], ["fp32"])
def test_deepspeed_empties_the_groups_between_steps(case: Case, dtype: torch.dtype, backend: str) -> None:
    """ZeRO 3: a group has one flat parameter during its step and none otherwise; the states must outlive that.

    Lookahead is not among them: it counts the steps of a group, and here a group steps once for each parameter.
    """
    twins = Twins(case, backend)
    kept = [list(group["params"]) for group in twins.optimizer.param_groups]

    def step() -> None:
        for group in twins.optimizer.param_groups:
            group["params"] = []
        for group, params in zip(twins.optimizer.param_groups, kept, strict=True):
            for p in params:
                group["params"] = [p]
                twins.optimizer.step()
                group["params"] = []

    twins.step(5, step)
    assert len(twins.optimizer.state) == 3


class Placeholder(torch.Tensor):
    """What Accelerate's FSDP2 preparation leaves in a group for a while: its data_ptr is a number, not a method."""


@parametrize(SOME, ["fp32"])
def test_fsdp2_preparation_exchanges_the_parameters(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Before the first step: placeholders, then other parameters; nothing may have been kept of the first ones."""
    twins = Twins(case, backend)
    for group in twins.optimizer.param_groups:
        for i in range(len(group["params"])):
            placeholder = torch.empty(1).as_subclass(Placeholder)
            placeholder.data_ptr = group["params"][i].data_ptr()
            group["params"][i] = placeholder
    repr(twins.optimizer)
    twins.optimizer.zero_grad()
    twins.ours = [torch.nn.Parameter(p.detach().clone()) for p in twins.ours]
    rest = iter(twins.ours)
    for group in twins.optimizer.param_groups:
        group["params"] = [next(rest) for _ in group["params"]]
    if case.name == "Adagrad":
        twins.optimizer.state.clear()
    twins.step(4)


@parametrize(SOME, ["fp32"])
def test_composer_clears_everything_and_adds_the_groups_again(case: Case, dtype: torch.dtype, backend: str) -> None:
    twins = Twins(case, backend)
    groups = [{k: v for k, v in group.items() if k != "params"} for group in twins.optimizer.param_groups]
    twins.step()
    twins = Twins(case, backend)
    twins.optimizer.state.clear()
    twins.optimizer.param_groups.clear()
    rest = iter(twins.ours)
    for group, count in zip(groups, (2, 1), strict=True):
        twins.optimizer.add_param_group({**group, "params": [next(rest) for _ in range(count)]})
    twins.step(4, lambda: twins.optimizer.step(closure=lambda: None))


@pytest.mark.contract("live", "wrappers")
@parametrize(SOME, ["fp32"])
def test_offloading_swaps_the_memory_of_states(case: Case, dtype: torch.dtype, backend: str) -> None:
    """The tensors stay, their data goes away after each step and comes back elsewhere."""
    twins = Twins(case, backend)

    def step() -> None:
        for states in twins.optimizer.state.values():
            for value in states.values():
                if isinstance(value, torch.Tensor):
                    value.data = value.data.clone()
        for p in twins.ours:
            p.data = p.data.clone()
        twins.optimizer.step()

    twins.step(6, step)


@pytest.mark.contract("live", "wrappers")
@parametrize(SOME, ["fp32"])
def test_the_state_is_another_dict(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Rebuilt with other inner dicts, another order of keys and another type of dict."""
    twins = Twins(case, backend)
    twins.step(2)
    rebuilt: Any = defaultdict(dict)
    for p in reversed(list(twins.optimizer.state)):
        rebuilt[p] = dict(reversed(list(twins.optimizer.state[p].items())))
    twins.optimizer.state = rebuilt
    twins.step(2)
    twins.optimizer.param_groups = [dict(reversed(list(g.items()))) for g in twins.optimizer.param_groups]
    twins.step(2)


@contextlib.contextmanager
def swapped(optimizer: Any, params: list[Any], state_dict: Any) -> Iterator[None]:
    with torch.optim.swap_in_optimizer_params_and_state(optimizer, dict(enumerate(params)), state_dict):
        yield


needs_swap = pytest.mark.skipif(
    not hasattr(torch.optim, "swap_in_optimizer_params_and_state"), reason="added in torch 2.13"
)


@pytest.mark.contract("live", "wrappers")
@needs_swap
@parametrize(EVERY, ["fp32"])
def test_swapped_in_parameters_and_states(case: Case, dtype: torch.dtype, backend: str) -> None:
    """torch's context for functional steps: what is swapped in is updated, in place, and what was there is not."""
    twins, other = Twins(case, backend), Twins(case, backend)
    twins.step(2)
    other.step(2)
    before = [p.detach().clone() for p in twins.ours]
    states = copy.deepcopy(twins.optimizer.state_dict())
    swapped_in = [torch.nn.Parameter(p.detach().clone()) for p in other.ours]
    saved = copy.deepcopy(other.optimizer.state_dict())
    # Only tensors come out of the context: Lookahead's counter, a number in the group, is where it was after one step.
    for step in range(2, 3 if case.lookahead else 5):
        with swapped(twins.optimizer, swapped_in, saved):
            for i, p in enumerate(swapped_in):
                p.grad = wave(p, step + i)
            twins.optimizer.step()
        other.step()
    assert all(not difference(p.detach(), q.detach()) for p, q in zip(swapped_in, other.ours, strict=True))
    assert all(torch.equal(p.detach(), q) for p, q in zip(twins.ours, before, strict=True))
    for i, saved_states in states["state"].items():
        for key, value in saved_states.items():
            assert torch.equal(twins.optimizer.state_dict()["state"][i][key], value)
    twins.step()


@pytest.mark.contract("fallback")
@needs_swap
@pytest.mark.parametrize("name", TORCH_NAMES)
def test_a_step_can_be_traced_with_fake_tensors(name: str) -> None:
    """make_fx over fake parameters and states: the operations that torch's class records, and nothing real touched."""
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils import _pytree

    def trace(cls: Any) -> Any:
        p = torch.nn.Parameter(torch.linspace(-1, 1, 9))
        optimizer = cls([p], **({"momentum": 0.9} if name == "SGD" else {}))
        p.grad = torch.ones(9)
        optimizer.step()
        before, states = p.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = [mode.from_tensor(p.detach().clone()), mode.from_tensor(torch.ones(9))]
            saved = _pytree.tree_map_only(torch.Tensor, mode.from_tensor, optimizer.state_dict())

        def step(params: Any, state_dict: Any) -> Any:
            params[0].grad = params[1]
            with swapped(optimizer, params[:1], state_dict):
                optimizer.step()
            return params, state_dict

        try:
            graph = make_fx(step)(fakes, saved)
        except Exception as error:  # a rule that reads its step counter as a number cannot be traced
            result = type(error).__name__
        else:
            names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
            result = [name for name in names if not name.startswith("profiler.")]
        assert torch.equal(p.detach(), before)
        assert all(torch.equal(v, optimizer.state[p][k]) for k, v in states[0].items())
        return result

    assert trace(getattr(fastopt, name)) == trace(getattr(torch.optim, name))


@pytest.mark.contract("hooks", difference="compiled steps")
@pytest.mark.filterwarnings("error:Dynamo detected")
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "case", by_id("sgd-nesterov", "adamw", "nadam", "ranger", "lookahead-adam"), ids=lambda c: c.id
)
def test_compiled_training_with_a_scheduler_and_hooks(case: Case, compiler: str) -> None:
    """Model, loss, backward and step in one compiled function; lr changes between calls and recompiles nothing."""

    def train(compiled: bool) -> tuple[list[torch.Tensor], int, list[str]]:
        torch.manual_seed(0)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model, calls = torch.nn.Linear(6, 4), []
        optimizer = case.make(model.parameters())
        watch(optimizer, calls)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=20)

        def step(x: torch.Tensor) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).pow(2).mean()
            loss.backward()
            optimizer.step()
            return loss

        run = torch.compile(step, backend=compiler) if compiled else step
        graphs = []
        for _ in range(8):
            run(torch.randn(8, 6))
            scheduler.step()
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return [p.detach() for p in model.parameters()], graphs[-1] - graphs[2], calls

    (ours, recompiled, calls), (plain, _, _) = train(True), train(False)
    torch._dynamo.reset()
    assert all(torch.equal(p, q) for p, q in zip(ours, plain, strict=True))
    assert recompiled == 0
    assert calls == STEP * 8


def test_eight_optimizers_in_eight_threads() -> None:
    """Each its own class, groups, scheduler and hooks; trajectories are those of the same work done in turn."""
    cases = by_id(
        "sgd-momentum", "rmsprop-centered", "adagrad", "adam-amsgrad", "nadam", "radam", "ranger", "lookahead-adam"
    )
    start = threading.Barrier(len(cases))

    def work(case: Case, together: bool) -> list[torch.Tensor]:
        params = [torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (1, 33, 70_000)]
        optimizer, calls = case.make([{"params": params[:1]}, {"params": params[1:], "lr": 0.02}]), []
        watch(optimizer, calls)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        if together:
            start.wait(30)
        for step in range(40):
            for i, p in enumerate(params):
                p.grad = None if (step + i) % 5 == 4 else wave(p, step + i)
            optimizer.step()
            scheduler.step()
            if step == 20:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert calls.count("step post") == 40
        return [p.detach() for p in params]

    results: dict[str, Any] = {}

    def run(case: Case) -> None:
        results[case.id] = work(case, together=True)

    threads = [threading.Thread(target=run, args=(case,)) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for case in cases:
        assert all(torch.equal(p, q) for p, q in zip(results[case.id], work(case, together=False), strict=True))


def test_one_step_in_another_thread_each_time() -> None:
    """Backward hooks run in autograd's threads: one optimizer, never two threads at once, always another one."""
    twins = Twins(by_id("adam-amsgrad")[0], None)

    def step() -> None:
        thread = threading.Thread(target=twins.optimizer.step)
        thread.start()
        thread.join()

    twins.step(6, step)


PROCESSES = """
    import multiprocessing, pickle
    import torch, fastopt
    torch.set_num_threads(1)

    def make():
        params = [torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (33, 5)]
        return params, [fastopt.AdamW(params[:1], lr=0.1), fastopt.Lookahead(fastopt.NAdam(params[1:], lr=0.1), k=2)]

    def advance(work, count):
        params, optimizers = work
        for step in range(count):
            for p in params:
                p.grad = torch.cos(torch.arange(float(p.numel())) + step)
            for optimizer in optimizers:
                optimizer.step()
        return [p.detach().tolist() for p in params]

    def child(queue, work):
        queue.put(advance(work if not isinstance(work, bytes) else pickle.loads(work), 4))
"""


def test_forked_process_steps_on() -> None:
    """The optimizer has stepped before the fork, on one thread (OpenMP's threads do not survive a fork).

    Nor would a CUDA context, so neither import nor step may make one.
    """
    script = textwrap.dedent(PROCESSES) + textwrap.dedent("""
        work = make()
        advance(work, 3)
        queue = multiprocessing.get_context("fork").Queue()
        process = multiprocessing.get_context("fork").Process(target=child, args=(queue, work))
        process.start()
        theirs = queue.get(timeout=60)
        process.join(60)
        assert theirs == advance(work, 4)
        assert process.exitcode == 0
        data = torch.utils.data.DataLoader(list(range(8)), num_workers=1, multiprocessing_context="fork")
        for batch in data:
            advance(work, 1)
        fastopt.info(), fastopt.explain(work[1][0])
        assert not torch.cuda.is_initialized()
        print("same")
    """)
    assert "same" in python(script, CUDA_VISIBLE_DEVICES="")


def test_spawned_process_steps_on(tmp_path: pathlib.Path) -> None:
    """A fresh interpreter gets parameters and optimizer pickled together."""
    script = tmp_path / "spawned.py"
    script.write_text(
        textwrap.dedent(PROCESSES)
        + textwrap.dedent("""
        if __name__ == "__main__":
            work = make()
            advance(work, 3)
            context = multiprocessing.get_context("spawn")
            queue = context.Queue()
            process = context.Process(target=child, args=(queue, pickle.dumps(work)))
            process.start()
            theirs = queue.get(timeout=60)
            process.join(60)
            assert theirs == advance(work, 4)
            print("same")
    """)
    )
    assert "same" in python(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')")
