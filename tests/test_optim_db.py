"""torch's own database of optimizers run against ours: every input of `optim_db`, on every backend.

Each test asserts what a test of torch's suite (TestOptimRenewed) asserts and has its name. Where that suite compares
torch with itself within a tolerance, these compare with torch.optim's for-loop bit for bit, square roots correctly
rounded. Ranger and Lookahead, which torch does not have, go through the same tests.

`DIFFERENCES` names what we deliberately do otherwise; each has a test here and its section in docs/differences.md.
Of torch's tests some have no counterpart: what needs a second device (test_*_cross_device, test_*_multigpu,
test_cpu_load_state_dict, test_*_large_tensor, test_peak_memory_foreach) belongs to tests/gpu; LBFGS is not ours.
"""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import harness
import oracles
import pytest
import torch
from cases import BACKENDS, DTYPES, TORCH_NAMES, Case, backends, by_id, each_backend, parametrize
from harness import Scenario, Spec, difference
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, get_error_inputs_for_all_optims, optim_db

import fastopt

pytestmark = pytest.mark.contract("database")

INFO = {info.name: info for info in optim_db if info.name in TORCH_NAMES}
FUSED = [name for name in TORCH_NAMES if "fused" in INFO[name].supported_impls]

DIFFERENCES = {
    "square roots": "torch's CPU sqrt is an ulp off for a sixth of all values",
    "tensor hyper-parameters": "a tensor lr is the number it holds; torch rounds intermediate scalars to float32",
    "low precision": "one rounding per step and value; torch rounds after every operation",
    "implementation flags": "foreach= and fused= say where step lives and what is checked, not which code runs",
    "options switched on late": "take effect, as every other edit of a group; torch raises KeyError",
    "dtypes of loaded states": "kept; torch casts them to the parameter's",
    "ownership of loaded states": "copied; torch shares the caller's tensors",
    "shapes of loaded states": "checked; torch loads any and fails, or broadcasts, in the step",
    "mixed dtypes": "gradients and states of another dtype than the parameter's are taken; torch raises",
    "failing steps": "change nothing; torch has updated the groups before the bad one",
    "copies": "keep the flag by which GradScaler leaves unscaling to the optimizer; torch's lose it",
    "compiled steps": "run as they are, outside the graph of torch.compile",
}
_tested: set[str] = set()


def differs(name: str) -> Callable[[Any], Any]:
    """Marks the test of a difference."""
    _tested.add(name)
    return pytest.mark.contract("database", difference=name)


def plain(value: Any) -> Any:
    """A hyper-parameter as numbers."""
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    return value.item() if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class Entry(Case):
    """One input of the database. Schedulers write into a tensor lr, so each optimizer gets its own."""

    def _copied(self, **kwargs: Any) -> Case:
        return Case(self.id, self.name, copy.deepcopy({**self.kwargs, **kwargs}), self.lookahead)

    def make(self, groups: Any, backend: str | None = None, **overrides: Any) -> Any:
        return self._copied(**overrides).make(groups, backend)

    def make_torch(self, groups: Any, **overrides: Any) -> torch.optim.Optimizer:
        return self._copied(**overrides).make_torch(groups)

    def oracle(self, groups: Any) -> Any:
        numbers = {k: plain(v) for k, v in self.kwargs.items() if k not in ("capturable", "foreach", "fused")}
        return Case(self.id, self.name, numbers, self.lookahead).oracle(groups)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def entries(device: str, dtype: torch.dtype = torch.float32, **flags: bool) -> list[Entry]:
    """The database's inputs for a device, with flags added where the class has them."""
    found = {}
    for name, info in INFO.items():
        if all(flag in info.supported_impls for flag in flags):
            for i, given in enumerate(info.optim_inputs_func(device, dtype)):
                text = "-".join([name.lower(), _slug(given.desc or str(i)), *flags])
                found[text] = Entry(text, name, {**given.kwargs, **flags})
    return list(found.values())


ON_CPU = entries("cpu")
CAPTURABLE = [e for e in entries("cuda") if e.kwargs.get("capturable")]  # on a CPU: the emulated device alone has it
STOCK = [next(e for e in ON_CPU if e.name == name) for name in TORCH_NAMES]
WRAPPED = [Entry(f"lookahead-{e.name.lower()}", e.name, e.kwargs, (3, 0.5)) for e in STOCK]
OURS = [*by_id("ranger", "ranger-decay", "ranger-maximize", "lookahead-ranger"), *WRAPPED]
DEFAULTS = [*STOCK, *by_id("ranger", "lookahead-adam")]


def rows(cases: Iterable[Case], names: Iterable[str] = BACKENDS) -> list[Any]:
    return parametrize(cases, ["fp32"], names).args[1]  # type: ignore[attr-defined]


def _without_dtype(given: list[Any]) -> list[Any]:
    return [pytest.param(p.values[0], p.values[2], id=p.id.replace("-fp32-", "-"), marks=p.marks) for p in given]


each = pytest.mark.parametrize(
    ("case", "backend"), _without_dtype([*rows([*ON_CPU, *OURS]), *rows(CAPTURABLE, ["emulated"])])
)
# For what does not depend on the backend: every input once.
each_once = pytest.mark.parametrize(
    ("case", "backend"),
    _without_dtype(
        [*rows([*ON_CPU, *OURS], BACKENDS[:1]), *rows(STOCK, BACKENDS[1:]), *rows(CAPTURABLE, ["emulated"])]
    ),
)
each_default = pytest.mark.parametrize(("case", "backend"), _without_dtype(rows(DEFAULTS)))
each_of_torchs = pytest.mark.parametrize(("case", "backend"), _without_dtype(rows(ON_CPU)))


class Regression:
    """torch's test problem, (W x + b)^2, on ours; a twin takes the same gradients through the oracle."""

    def __init__(self, case: Case, backend: str, strided: bool = False, split: dict[str, Any] | None = None) -> None:
        if strided:
            values = [torch.randn(10, 5, 2)[..., 0], torch.randn(10, 2)[..., 0]]
        else:
            values = [torch.randn(10, 5), torch.randn(10)]
        self.case, self.x = case, torch.randn(5)
        self.params = [torch.nn.Parameter(v) for v in values]
        self.twins = [torch.nn.Parameter(v.clone(memory_format=torch.contiguous_format)) for v in values]
        self.optimizer = case.make(self.groups(self.params, split), backend)
        self.oracle = case.oracle(self.groups(self.twins, split))

    @staticmethod
    def groups(params: list[Any], split: dict[str, Any] | None) -> list[dict[str, Any]]:
        return [{"params": params}] if split is None else [{"params": params[:1]}, {"params": params[1:], **split}]

    def loss(self) -> Tensor:
        self.optimizer.zero_grad()
        weight, bias = self.params
        loss = (weight.mv(self.x) + bias).pow(2).sum()
        loss.backward()
        return loss

    def step(self) -> float:
        """One step on both sides with the hyper-parameters that ours has now; returns the loss before it."""
        for ours, theirs in zip(self.optimizer.param_groups, self.oracle.param_groups, strict=True):
            theirs.update({k: plain(ours[k]) for k in theirs if k in ours and k not in _NO_NUMBERS})
        loss = self.optimizer.step(self.loss)
        for p, q in zip(self.params, self.twins, strict=True):
            q.grad = p.grad.clone(memory_format=torch.contiguous_format)
        self.oracle.step()
        for p, q in zip(self.params, self.twins, strict=True):
            assert not (text := difference(p.detach().contiguous(), q.detach())), text
        return loss.item()


_NO_NUMBERS = {"params", "foreach", "fused", "capturable", "differentiable"}


def trained(case: Case, backend: str, steps: int = 3) -> Regression:
    problem = Regression(case, backend)
    for _ in range(steps):
        problem.step()
    return problem


def assert_right_direction(case: Case, first: float, last: float) -> None:
    assert last > first if case.kwargs.get("maximize") else last < first


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


def assert_equal_dicts(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["param_groups"] == b["param_groups"]
    assert list(a["state"]) == list(b["state"])
    for i, states in a["state"].items():
        assert list(states) == list(b["state"][i])
        for key, value in states.items():
            other = b["state"][i][key]
            assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, key


def outcome(action: Callable[[], Any]) -> tuple[type, str] | None:
    try:
        action()
    except Exception as error:
        return type(error), str(error)
    return None


def _errors() -> list[Any]:
    found = [
        (name, error) for name, info in INFO.items() for error in info.optim_error_inputs_func("cpu", torch.float32)
    ]
    shared = get_error_inputs_for_all_optims("cpu", torch.float32)
    found += [(name, error) for name in ("Ranger", "Lookahead") for error in shared]
    return [
        pytest.param(name, error, id=f"{name}-{_slug(error.optimizer_error_input.desc)}-{i}")
        for i, (name, error) in enumerate(found)
    ]


@pytest.mark.contract("database", "construction")
@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(("name", "error"), _errors())
@each_backend
def test_errors(name: str, error: Any, backend: str) -> None:
    """What torch's optimizers must refuse, when they are made or when they step, with torch's type and text."""
    given = error.optimizer_error_input
    params = [torch.nn.Parameter(torch.randn(2, 3))] if given.params is None else given.params

    def make() -> Any:
        if name == "Lookahead":
            return fastopt.Lookahead(fastopt.RAdam(params, **given.kwargs, backend=backend))
        return getattr(fastopt, name)(params, **given.kwargs, backend=backend)

    optimizer = None if error.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR else make()
    with pytest.raises(error.error_type, match=error.error_regex):
        optimizer.step() if optimizer else make()


@each_of_torchs
def test_step_counter_that_requires_grad_is_refused(case: Case, backend: str) -> None:
    """The one error of a step that the database does not list: `step` cannot be differentiated through."""

    def result(make: Callable[[Any], Any]) -> Any:
        p = torch.ones(3, requires_grad=True).clone()
        optimizer = make([p])
        for _ in range(2):
            p.grad = torch.ones(3)
            found = outcome(optimizer.step)
            if "step" in optimizer.state.get(p, {}):
                optimizer.state[p]["step"].requires_grad_()
        return found

    ours = result(lambda ps: case.make(ps, backend, differentiable=True))
    assert ours == result(lambda ps: case.make_torch(ps, differentiable=True))
    assert (ours is None) == (case.name == "SGD")


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@each
def test_forloop_goes_right_direction(case: Case, backend: str, strided: bool) -> None:
    problem = Regression(case, backend, strided)
    losses = [problem.step() for _ in range(9)]  # past RAdam's first rectified step and every synchronisation
    assert_right_direction(case, losses[0], problem.loss().item())


def _scheduled() -> list[Any]:
    """Every combination of schedulers for the default input of a class; the other inputs take one each, in turn."""
    found = []
    for n, param in enumerate(each.args[1]):
        case, backend = param.values
        inputs = list(enumerate(INFO[case.name if case.name in INFO else "RAdam"].scheduler_inputs))
        for i, makers in inputs if case in DEFAULTS else inputs[n % len(inputs) :][:1]:
            found.append(pytest.param(case, makers, backend, id=f"{param.id}-{i}", marks=param.marks))
    return found


def step_all(schedulers: list[Any], loss: float) -> None:
    for scheduler in schedulers:
        scheduler.step(loss) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()


@pytest.mark.contract("database", "schedulers")
@pytest.mark.parametrize(("case", "makers", "backend"), _scheduled())
def test_param_group_with_lrscheduler_goes_right_direction(case: Case, makers: Any, backend: str) -> None:
    """Two groups with learning rates of their own, under each of the database's combinations of schedulers."""
    problem = Regression(case, backend, split={"lr": 0.02})
    schedulers = [make(problem.optimizer) for make in makers]
    losses = []
    for _ in range(12):
        losses.append(problem.step())
        step_all(schedulers, losses[-1])
    assert_right_direction(case, losses[0], problem.loss().item())


@differs("tensor hyper-parameters")
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@each_default
def test_tensor_lr(case: Case, backend: str, shape: tuple[int, ...]) -> None:
    """Exactly the step of the float that the tensor holds; torch's own tensor lr is some ulps away from that."""
    lr, runs = torch.full(shape, 0.01), []
    makers = [lambda ps: case.make(ps, backend, lr=lr), lambda ps: case.make(ps, backend, lr=lr.item())]
    if case.name in INFO and not case.lookahead:
        makers.append(lambda ps: case.make_torch(ps, lr=lr))
    for make in makers:
        p = torch.nn.Parameter(torch.linspace(-1, 1, 19))
        optimizer = make([p])
        for step in range(5):
            p.grad = torch.cos(torch.arange(19.0) + step)
            optimizer.step()
        runs.append(p.detach())
    assert not difference(runs[0], runs[1])
    assert all(torch.allclose(runs[0], run, rtol=1.3e-6, atol=1e-5) for run in runs[2:])  # torch.testing's for float32


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("name", [name for name in TORCH_NAMES if INFO[name].supports_sparse])
@each_backend
def test_rosenbrock_sparse(name: str, backend: str) -> None:
    """Uncoalesced sparse gradients: torch's own trajectory exactly, and that of dense gradients."""
    kwargs, schedulers = INFO[name].metadata_for_sparse

    def run(cls: Any, dense: bool, **more: Any) -> Tensor:
        p = torch.nn.Parameter(torch.tensor([1.5, 1.5]))
        optimizer = cls([p], **kwargs, **more)
        running = [make(optimizer) for make in schedulers]
        for i in range(300):
            x, y = p.detach()
            slopes = torch.stack((-400 * x * (y - x**2) - 2 * (1 - x), 200 * (y - x**2)))
            at = i % 2  # one coordinate at a time, its entry given in two parts
            parts = torch.stack((slopes[at] / 4, slopes[at] - slopes[at] / 4))
            sparse = torch.sparse_coo_tensor([[at, at]], parts, (2,))
            p.grad = sparse.to_dense() if dense else sparse
            optimizer.step()
            step_all(running, float((1 - x) ** 2 + 100 * (y - x**2) ** 2))
        return p.detach()

    ours = run(getattr(fastopt, name), dense=False, backend=backend)
    assert torch.equal(ours, run(getattr(torch.optim, name), dense=False))
    torch.testing.assert_close(ours, run(getattr(fastopt, name), dense=True, backend=backend), rtol=5e-6, atol=5e-6)
    assert (1 - ours[0]) ** 2 + 100 * (ours[1] - ours[0] ** 2) ** 2 < 0.5**2 + 100 * 0.75**2


@each_of_torchs
def test_complex(case: Case, backend: str) -> None:
    """A complex parameter: torch's own numbers exactly, and those of its real and imaginary parts as one real one."""
    start = torch.randn(5, 5, dtype=torch.complex64)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    real = torch.nn.Parameter(torch.view_as_real(start).clone())
    optimizers = [case.make([ours], backend), case.make_torch([theirs], foreach=False), case.make([real], backend)]
    for _ in range(3):
        g = torch.randn_like(start)
        ours.grad, theirs.grad, real.grad = g, g.clone(), torch.view_as_real(g).clone()
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(torch.view_as_real(ours.detach()), real.detach())


@each_of_torchs
def test_complex_2d(case: Case, backend: str) -> None:
    """A function of a complex parameter and of its parts, each differentiated by autograd."""
    z = torch.nn.Parameter(torch.randn(2, dtype=torch.complex64))
    parts = [torch.nn.Parameter(part.detach().clone()) for part in (z.real, z.imag)]
    whole, apart = case.make([z], backend), case.make(parts, backend)
    for _ in range(10):
        for optimizer, value in ((whole, z), (apart, torch.complex(*parts))):
            optimizer.zero_grad()
            ((1 - value[0]).abs() ** 2 + 4 * (value[1] - value[0] ** 2).abs()).backward()
            optimizer.step()
        torch.testing.assert_close(z.detach(), torch.complex(*parts).detach())


@pytest.mark.contract("database", "state", optimizers=("Adam", "AdamW"))
def test_adamw_serialization() -> None:
    """AdamW is Adam with one flag: their checkpoints load into each other, and AdamW stays AdamW."""

    def rules(module: Any) -> list[Any]:
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        decoupled, adam, adamw = module.Adam([p], decoupled_weight_decay=True), module.Adam([p]), module.AdamW([p])
        found = [decoupled.state_dict()["param_groups"][0]["decoupled_weight_decay"]]
        for source, target in itertools.permutations((decoupled, adam, adamw), 2):
            source.step()
            target.load_state_dict(source.state_dict())
            found.append(target.param_groups[0]["decoupled_weight_decay"])
        return [*found, outcome(lambda: module.AdamW([p], decoupled_weight_decay=True))]

    assert rules(fastopt)[:-1] == rules(torch.optim)[:-1]
    assert rules(fastopt)[-1][0] is rules(torch.optim)[-1][0] is TypeError


# As torch's: parameters of 6, 3, 3 and 1 elements, a step without any gradient, two with half of the model frozen, and
# a 0-dim parameter whose only gradient comes in the first step.
MODEL = Scenario(
    "model",
    (
        Spec((3, 2), absent=frozenset({2})),
        Spec((3,), absent=frozenset({2})),
        Spec((1, 3), absent=frozenset({2, 3, 4})),
        Spec((1,), absent=frozenset({2, 3, 4})),
        Spec((), absent=frozenset(range(1, 7))),
    ),
    steps=7,
)


@parametrize(entries("cpu", foreach=True), ["fp64"])
def test_foreach_matches_forloop(case: Case, dtype: torch.dtype, backend: str) -> None:
    harness.check(case, MODEL, dtype, backend)


@parametrize(entries("cpu", torch.float16, fused=True), ["fp64", "fp32", "bf16", "fp16"])
def test_fused_matches_forloop(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Bit for bit also in low precision, where torch allows 5e-3; and so test_fused_cpu_matches_device is implied."""
    harness.check(case, MODEL, dtype, backend)


@each_of_torchs
def test_differentiable_matches_forloop(case: Case, backend: str) -> None:
    def run(make: Callable[[Any], Any]) -> list[Tensor]:
        params = [torch.linspace(-1, 1, n, requires_grad=True).clone() for n in (6, 3)]
        optimizer = make(params)
        for step in range(4):
            for i, p in enumerate(params):
                p.grad = torch.cos(torch.arange(float(p.numel())) + step + i)
            optimizer.step()
        return params

    ours = run(lambda ps: case.make(ps, backend, differentiable=True))
    theirs = run(lambda ps: case.make_torch(ps, differentiable=True))
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


@pytest.fixture
def _float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_float64_by_default")
@pytest.mark.parametrize("flag", ["foreach", "fused", "neither"])
@each_default
def test_set_default_dtype_works_with_foreach(case: Case, backend: str, flag: str) -> None:
    """`step` is float64 under a float64 default, but float32 for fused whatever the default."""
    if case.name not in INFO or (flag != "neither" and flag not in INFO[case.name].supported_impls):
        return

    def dtypes(make: Callable[..., Any]) -> list[Any]:
        p = torch.nn.Parameter(torch.randn(5, dtype=torch.float32))
        p.grad = torch.randn_like(p)
        optimizer = make([p], **({} if flag == "neither" else {flag: True}))
        optimizer.step()
        return [(k, v.dtype) for k, v in optimizer.state[p].items() if k != "slow_param"]

    assert dtypes(lambda ps, **kw: case.make(ps, backend, **kw)) == dtypes(case.make_torch)


@pytest.mark.parametrize("how", ["same objects", "new objects"])
@pytest.mark.parametrize("name", FUSED)
@each_backend
def test_fused_error_on_params_on_meta(name: str, backend: str, how: str) -> None:
    """Parameters without memory are refused by name; once they have some, the same optimizer steps."""
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 1))
    optimizer = getattr(fastopt, name)(model.parameters(), fused=True, backend=backend)
    for p in model.parameters():
        p.grad = torch.rand_like(p)
    with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating point Tensors"):
        optimizer.step()
    optimizer.zero_grad()
    model.to_empty(device="cpu")
    if how == "new objects":
        optimizer = getattr(fastopt, name)(model.parameters(), fused=True, backend=backend)
    else:
        optimizer.param_groups[0]["params"] = list(model.parameters())
        optimizer.state.clear()
    for p in model.parameters():
        p.data.fill_(1)
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all((p < 1).all() for p in model.parameters())


@pytest.mark.contract("database", "amp")
@pytest.mark.parametrize("name", FUSED)
@each_backend
def test_fused_does_not_step_if_foundinf(name: str, backend: str) -> None:
    params = [torch.nn.Parameter(torch.ones(1)) for _ in range(5)]
    for p in params:
        p.grad = torch.full((1,), float("inf"))
    optimizer = getattr(fastopt, name)(params, lr=1.0, fused=True, backend=backend)
    for found in (True, False):
        optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(float(found))
        optimizer.step()
        for p in params:
            assert (p.item() == 1.0) == found
            if "step" in optimizer.state[p]:
                assert optimizer.state[p]["step"] == (0 if found else 1)


@each
def test_param_groups_weight_decay(case: Case, backend: str) -> None:
    """Decay of one group alone, torch's numbers; the other group of zero gradients does not move."""
    problem = Regression(case, backend, split={"weight_decay": 0.3})
    problem.optimizer.param_groups[0]["weight_decay"] = 0.0
    problem.x.zero_()  # W has a gradient of zeros, b one of its own
    weight = problem.params[0].detach().clone()
    for _ in range(7):
        problem.step()
    assert torch.equal(problem.params[0].detach(), weight)


@each
def test_param_groups_lr(case: Case, backend: str) -> None:
    """A group whose learning rate is 1e-28 stays exactly where it is while the other one learns."""
    problem = Regression(case, backend, split={"lr": 1e-28})
    bias = problem.params[1].detach().clone()
    losses = [problem.step() for _ in range(7)]
    assert torch.equal(problem.params[1].detach(), bias)
    assert_right_direction(case, losses[0], problem.loss().item())


@each
def test_step_is_noop_when_params_have_no_grad(case: Case, backend: str) -> None:
    params = [torch.nn.Parameter(torch.randn(2, 3)) for _ in range(2)]
    before = [p.detach().clone() for p in params]
    optimizer = case.make(params, backend)
    states = copy.deepcopy(optimizer.state_dict()["state"])
    for _ in range(6):
        optimizer.step()
    assert all(torch.equal(p.detach(), q) for p, q in zip(params, before, strict=True))
    assert_equal_dicts({"param_groups": [], "state": states}, {**optimizer.state_dict(), "param_groups": []})


@each
def test_step_is_noop_for_zero_grads(case: Case, backend: str) -> None:
    """Unless the weights decay, which they do exactly as in torch."""
    p, q = (torch.nn.Parameter(torch.linspace(-1, 1, 9)) for _ in range(2))
    optimizer, oracle, before = case.make([p], backend), case.oracle([q]), p.detach().clone()
    for _ in range(7):
        p.grad, q.grad = torch.zeros(9), torch.zeros(9)
        optimizer.step()
        oracle.step()
    assert not difference(p.detach(), q.detach())
    if not optimizer.param_groups[0]["weight_decay"]:
        assert torch.equal(p.detach(), before)


@each
def test_grads_are_never_inplaced_into(case: Case, backend: str) -> None:
    params = [torch.nn.Parameter(torch.randn(2, 3)), torch.nn.Parameter(torch.randn(3, 4).t())]
    optimizer = case.make(params, backend)
    for _ in range(7):
        for p in params:
            p.grad = torch.rand(p.shape)
        grads = [(p.grad, p.grad.clone(), p.grad._version) for p in params]
        optimizer.step()
        for p, (grad, value, version) in zip(params, grads, strict=True):
            assert p.grad is grad
            assert grad._version == version
            assert torch.equal(grad, value)


@each_once
def test_optimizer_can_be_printed(case: Case, backend: str) -> None:
    params = [torch.nn.Parameter(torch.randn(2, 3))]
    text = repr(case.make(params, backend))
    if case.name in INFO and not case.lookahead:
        assert text == repr(case.make_torch(params))
    assert "lr: " in text


NAMED = pytest.mark.parametrize("named", list(itertools.product((False, True), repeat=2)), ids=["xx", "xn", "nx", "nn"])


def _with_names(params: list[Any], named: bool) -> list[Any]:
    return list(zip(("weight", "bias"), params, strict=True)) if named else params


@NAMED
@each_default
def test_state_dict_deterministic(case: Case, backend: str, named: tuple[bool, bool]) -> None:
    """A state dict loaded into a clone: the same steps to the same bits, and the dict itself is left as it was."""
    problem = trained(case, backend, 4)
    source = case.make(_with_names(problem.params, named[0]), backend)
    source.load_state_dict(problem.optimizer.state_dict())
    saved = source.state_dict()
    params = [torch.nn.Parameter(p.detach().clone()) for p in problem.params]
    clone = case.make(_with_names(params, named[1]), backend)
    clone.load_state_dict(saved)
    assert_same_steps(source, problem.params, clone, params)
    for group in clone.param_groups:
        assert group.get("param_names") == (["weight", "bias"] if any(named) else None)
    a, b = source.state_dict(), clone.state_dict()
    for group in (*a["param_groups"], *b["param_groups"]):
        group.pop("param_names", None)
    assert_equal_dicts(a, b)
    clone.param_groups.extend(clone.param_groups)
    groups = clone.state_dict()["param_groups"]
    assert groups[0] == groups[-1]


def assert_same_steps(first: Any, params: list[Any], second: Any, others: list[Any]) -> None:
    for step in range(7):
        for p, q in zip(params, others, strict=True):
            p.grad = torch.cos(torch.arange(float(p.numel())) + step).reshape(p.shape)
            q.grad = p.grad.clone()
        first.step()
        second.step()
        assert all(not difference(p.detach(), q.detach()) for p, q in zip(params, others, strict=True))


@each_once
def test_loaded_dict_gives_the_same_steps_and_stays_as_it_was(case: Case, backend: str) -> None:
    problem = trained(case, backend, 4)
    saved = problem.optimizer.state_dict()
    kept = copy.deepcopy(saved)
    params = [torch.nn.Parameter(p.detach().clone()) for p in problem.params]
    clone = case.make(params, backend)
    clone.load_state_dict(kept)
    assert_equal_dicts(kept, saved)
    saved = copy.deepcopy(saved)
    assert_same_steps(problem.optimizer, problem.params, clone, params)
    assert_equal_dicts(kept, saved)
    assert_equal_dicts(problem.optimizer.state_dict(), clone.state_dict())


@each_once
def test_can_load_older_state_dict(case: Case, backend: str) -> None:
    """Written before the flags existed that torch has added over the years."""
    problem = trained(case, backend)
    saved = copy.deepcopy(problem.optimizer.state_dict())
    flags = INFO[case.name].not_og_supported_flags if case.name in INFO else ("maximize", "capturable")
    for group in saved["param_groups"]:
        for flag in flags:
            group.pop(flag, None)
    problem.optimizer.load_state_dict(saved)
    for flag in flags:
        if flag in problem.optimizer.defaults:
            assert problem.optimizer.param_groups[0][flag] in (None, False, problem.optimizer.defaults[flag])
    before = [p.detach().clone() for p in problem.params]
    problem.optimizer.step(problem.loss)
    assert not any(torch.equal(p.detach(), q) for p, q in zip(problem.params, before, strict=True))


@NAMED
@each_default
def test_can_load_from_to_named_state_dict(case: Case, backend: str, named: tuple[bool, bool]) -> None:
    """Names are kept as torch keeps them, and a pre-hook may make the names that a checkpoint lacks."""
    problem = trained(case, backend)
    saved = problem.optimizer.state_dict()
    if named[0]:
        for group in saved["param_groups"]:
            group["param_names"] = ["other", "names"]
    target = case.make(_with_names(problem.params, named[1]), backend)
    target.register_load_state_dict_pre_hook(lambda _, d: d["param_groups"][0].update(seen=True))
    target.load_state_dict(saved)
    want = ["other", "names"] if named[0] else ["weight", "bias"] if named[1] else None
    assert [group.get("param_names") for group in target.param_groups] == [want]
    problem.optimizer = target
    problem.step()


@each_once
def test_save_load_equality_with_weights_only(case: Case, backend: str) -> None:
    problem = trained(case, backend)
    state_dict = problem.optimizer.state_dict()
    assert_equal_dicts(through_a_file(state_dict), state_dict)
    problem.optimizer.load_state_dict(through_a_file(state_dict))
    problem.step()


@each_once
def test_load_nontensor_step(case: Case, backend: str) -> None:
    """`step` as old torch saved it: a Python number."""
    problem = trained(case, backend)
    saved = copy.deepcopy(problem.optimizer.state_dict())
    for states in saved["state"].values():
        if "step" in states:
            states["step"] = states["step"].item()
    problem.optimizer.load_state_dict(saved)
    for states in problem.optimizer.state.values():
        assert isinstance(states.get("step", torch.zeros(())), Tensor)
    problem.step()


@each_once
def test_deepcopy_copies_all_public_attrs(case: Case, backend: str) -> None:
    problem = trained(case, backend)
    optimizer = problem.optimizer
    optimizer.register_step_post_hook(lambda *_: None)
    other = copy.deepcopy(optimizer)
    for a, b in ((optimizer, other), (optimizer.__class__, other.__class__)):
        assert {k for k in vars(a) if k[0] != "_"} == {k for k in vars(b) if k[0] != "_"}
    assert_equal_dicts(optimizer.state_dict(), other.state_dict())
    other.step()


@each_once
def test_non_empty_state(case: Case, backend: str) -> None:
    """A parameter that is listed in the state has something there: DCP's flattening relies on it."""
    problem = trained(case, backend, 1)
    for states in problem.optimizer.state_dict()["state"].values():
        assert states
        assert all(isinstance(value, (Tensor, int, float)) for value in states.values())


BF16_STATES = [
    Case(f"{n.lower()}{'-amsgrad' * a}", n, {"amsgrad": a}) for n in ("Adam", "AdamW") for a in (False, True)
]


def _bf16_states(optimizer: Any, args: Any, kwargs: Any) -> None:
    """A step pre-hook that creates states in bfloat16 before the optimizer does, as large trainers register."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and not optimizer.state[p]:
                keys = ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"][: 3 if group["amsgrad"] else 2]
                optimizer.state[p]["step"] = torch.zeros(())
                optimizer.state[p].update({key: torch.zeros_like(p, dtype=torch.bfloat16) for key in keys})


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@parametrize(BF16_STATES, ["fp32"])
def test_fused_mixed_precision(case: Case, dtype: torch.dtype, backend: str, fused: bool) -> None:
    """The hook's states are used and keep their dtype; numbers of the float32 rule with states rounded once a step."""
    p, q = (torch.nn.Parameter(torch.linspace(-1, 1, 140).reshape(20, 7)) for _ in range(2))
    optimizer, oracle = case.make([p], backend, fused=fused), case.oracle([q])
    optimizer.register_step_pre_hook(_bf16_states)
    held: dict[str, Tensor] = {}
    for step in range(6):
        p.grad = torch.cos(torch.arange(140.0) + step).reshape(20, 7)
        q.grad = p.grad.clone()
        optimizer.step()
        oracle.step()
        for key, value in oracle.state[q].items():
            ours = optimizer.state[p][key]
            if key != "step":
                value.copy_(value.bfloat16())
                assert ours.dtype == torch.bfloat16
            assert not difference(ours.to(value.dtype), value), key
        assert not difference(p.detach(), q.detach())
        held = dict(optimizer.state[p]) if step == 0 else held
        assert all(value is held[key] for key, value in optimizer.state[p].items()), "the hook's tensors were replaced"


@each_of_torchs
def test_mixed_device_dtype(case: Case, backend: str) -> None:
    """The dtypes of it: float64, float32, bfloat16 and float16 in one group are as each dtype alone."""
    starts = [torch.linspace(-1, 1, 12, dtype=torch.float64).to(dtype) for dtype in DTYPES.values()]
    together = [torch.nn.Parameter(t.clone()) for t in starts]
    alone = [torch.nn.Parameter(t.clone()) for t in starts]
    optimizer, others = case.make(together, backend), [case.make([p], backend) for p in alone]
    for step in range(4):
        for p, q in zip(together, alone, strict=True):
            p.grad = torch.cos(torch.arange(12.0) + step).to(p.dtype)
            q.grad = p.grad.clone()
        for o in (optimizer, *others):
            o.step()
    assert all(not difference(p.detach(), q.detach()) for p, q in zip(together, alone, strict=True))


def adam(backend: str | None = None, module: Any = fastopt, **kwargs: Any) -> tuple[Any, Any]:
    """A parameter with a gradient, and its Adam: ours on a backend, or torch's."""
    p = torch.nn.Parameter(torch.zeros(1000))
    p.grad = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    return p, module.Adam([p], **kwargs, **({"backend": backend} if backend else {}))


@differs("square roots")
@each_backend
def test_square_roots_are_all_that_differs(backend: str) -> None:
    (p, ours), (q, theirs), (r, _) = adam(backend), adam(module=torch.optim), adam()
    for optimizer in (ours, theirs, oracles.TorchLoop("Adam", [r])):
        optimizer.step()
    assert torch.equal(p, r)
    x = ours.state[p]["exp_avg_sq"]
    assert torch.equal(p, q) == torch.equal(x.sqrt(), oracles.rounded_sqrt(x))
    # One ulp of the root, then three operations that may each round to the other side: four ulps of a step from zero.
    torch.testing.assert_close(p, q, rtol=4 * torch.finfo(torch.float32).eps, atol=0)


@differs("low precision")
@each_backend
def test_low_precision_is_rounded_once(backend: str) -> None:
    """The float32 step rounded to float16, where torch divides zero by an eps that has become zero."""
    runs = []
    for make in (lambda p: fastopt.Adam([p], lr=0.1, backend=backend), lambda p: torch.optim.Adam([p], lr=0.1)):
        p = torch.nn.Parameter(torch.linspace(0.5, 1, 1000).half())
        p.grad = torch.cos(torch.arange(1000.0)).half()
        p.grad[0] = 0
        make(p).step()
        runs.append(p.detach())
    q = torch.nn.Parameter(torch.linspace(0.5, 1, 1000).half().float())
    q.grad = torch.cos(torch.arange(1000.0)).half().float()
    q.grad[0] = 0
    oracles.TorchLoop("Adam", [q], lr=0.1).step()
    assert torch.equal(runs[0], q.detach().half())
    assert runs[1][0].isnan()


@differs("implementation flags")
@each_backend
def test_implementation_flags_do_not_choose_the_code(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's test_defaults_changed_to_foreach has no counterpart: there is no foreach here to change to."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("foreach")

    monkeypatch.setitem(vars(inspect.getmodule(torch.optim.Adam)), "_multi_tensor_adam", refuse)
    with pytest.raises(NotImplementedError):
        adam(module=torch.optim, foreach=True)[1].step()
    p, optimizer = adam(backend, foreach=True)
    optimizer.step()
    assert p.any()


@differs("options switched on late")
@each_backend
def test_options_switched_on_late(backend: str) -> None:
    (p, ours), (_, theirs) = adam(backend), adam(module=torch.optim)
    for optimizer in (ours, theirs):
        optimizer.step()
        optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(KeyError):
        theirs.step()
    ours.step()
    assert list(ours.state[p]) == ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]


@differs("dtypes of loaded states")
@each_backend
def test_dtypes_of_loaded_states(backend: str) -> None:
    """float32 moments of a bfloat16 parameter: torch rounds them away on loading."""
    dtypes = []
    for module, given in ((fastopt, backend), (torch.optim, None)):
        p, source = adam(given, module)
        source.step()
        value = source.state[p]["exp_avg"].clone()
        q = torch.nn.Parameter(p.detach().bfloat16())
        target = module.Adam([q], **({"backend": given} if given else {}))
        target.load_state_dict(source.state_dict())
        dtypes.append(target.state[q]["exp_avg"].dtype)
        assert torch.equal(target.state[q]["exp_avg"], value.to(dtypes[-1]))
    assert dtypes == [torch.float32, torch.bfloat16]


@differs("ownership of loaded states")
@each_backend
def test_ownership_of_loaded_states(backend: str) -> None:
    shared = []
    for module, given in ((fastopt, backend), (torch.optim, None)):
        p, source = adam(given, module)
        source.step()
        q, target = adam(given, module)
        target.load_state_dict(source.state_dict())
        target.step()
        shared.append(source.state[p]["exp_avg"] is target.state[q]["exp_avg"])
        assert source.state[p]["step"].item() == (2 if shared[-1] else 1)
    assert shared == [False, True]


@differs("shapes of loaded states")
@each_backend
def test_shapes_of_loaded_states(backend: str) -> None:
    (_, ours), (_, theirs) = adam(backend), adam(module=torch.optim)
    theirs.step()
    saved = copy.deepcopy(theirs.state_dict())
    saved["state"][0]["exp_avg"] = torch.zeros(7)
    theirs.load_state_dict(saved)
    with pytest.raises(RuntimeError):
        theirs.step()
    with pytest.raises(ValueError, match=r"exp_avg.*\(7,\).*\(1000,\)"):
        ours.load_state_dict(saved)
    ours.step()


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no Tensor.grad_dtype")
@differs("mixed dtypes")
@each_backend
def test_gradients_of_another_dtype(backend: str) -> None:
    (p, ours), (q, theirs) = adam(backend), adam(module=torch.optim)
    r, like = adam(backend)
    for t in (p, q):
        t.grad_dtype, t.grad = None, t.grad.bfloat16()
    r.grad = p.grad.float()
    with pytest.raises(RuntimeError):
        theirs.step()
    ours.step()
    like.step()
    assert torch.equal(p, r)


@differs("failing steps")
@each_backend
def test_failing_steps_change_nothing(backend: str) -> None:
    moved = []
    for module, given in ((fastopt, {"backend": backend}), (torch.optim, {})):
        params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
        params[0].grad, params[1].grad = torch.ones(3), torch.ones(3).to_sparse()
        optimizer = module.Adam([{"params": [p]} for p in params], **given)
        with pytest.raises(RuntimeError, match="does not support sparse gradients"):
            optimizer.step()
        moved.append(not torch.equal(params[0], torch.ones(3)))
    assert moved == [False, True]


@differs("copies")
@each_backend
def test_copies_know_of_amp(backend: str) -> None:
    flags = []
    for module, given in ((fastopt, {"backend": backend}), (torch.optim, {})):
        optimizer = copy.deepcopy(module.SGD([torch.nn.Parameter(torch.ones(3))], fused=True, **given))
        flags.append(getattr(optimizer, "_step_supports_amp_scaling", False))
    assert flags == [True, False]


def graphs_of(step: Callable[[], Any]) -> int:
    """How many graphs torch.compile makes of a step."""
    count = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal count
        count += 1
        return graph.forward

    torch._dynamo.reset()
    torch.compile(step, backend=backend)()
    torch._dynamo.reset()
    return count


@differs("compiled steps")
def test_compiled_steps_are_not_traced() -> None:
    for name in (param.values[0] for param in backends() if not param.marks):
        p, optimizer = adam(name)
        assert graphs_of(optimizer.step) == 0
        assert p.any()
    assert graphs_of(adam(module=torch.optim)[1].step) > 0


def test_every_difference_is_tested_and_documented() -> None:
    page = pathlib.Path(__file__).resolve().parents[1] / "docs" / "differences.md"
    headings = {line.removeprefix("## ").lower() for line in page.read_text().splitlines() if line.startswith("## ")}
    assert _tested == set(DIFFERENCES)
    assert headings >= set(DIFFERENCES)
