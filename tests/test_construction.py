"""torch.optim's constructors under the eight torch names: signatures, defaults, groups, and what they reject."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import pathlib
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import TORCH_NAMES, accepts, both, each_name
from harness import ROOT, outcome, param
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

import fastopt

pytestmark = pytest.mark.contract("construction")


@each_name
def test_signature_is_torchs_plus_backend(name: str) -> None:
    ours, theirs = (inspect.signature(cls).parameters for cls in both(name))
    *shared, backend = ours.values()
    assert [(p.name, p.kind, p.default) for p in shared] == [(p.name, p.kind, p.default) for p in theirs.values()]
    assert (backend.name, backend.kind, backend.default) == ("backend", inspect.Parameter.KEYWORD_ONLY, None)


@each_name
def test_type_checkers_see_the_same_signature(name: str) -> None:
    """It stands in the class for them alone; torch's constructor is the one that runs."""
    cls = getattr(fastopt, name)
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    (written,) = [
        f for node in definition.body if isinstance(node, ast.If) for f in node.body if isinstance(f, ast.FunctionDef)
    ]
    arguments = written.args
    found = [a.arg for a in arguments.args[1:]] + [a.arg for a in arguments.kwonlyargs]
    defaults = [ast.literal_eval(d) for d in (*arguments.defaults, *arguments.kw_defaults) if d]
    real = list(inspect.signature(cls).parameters.values())
    assert (written.name, found) == ("__init__", [p.name for p in real])
    assert [a.arg for a in arguments.kwonlyargs] == [p.name for p in real if p.kind is p.KEYWORD_ONLY]
    assert defaults == [p.default for p in real if p.default is not p.empty]


@pytest.mark.skipif(not importlib.util.find_spec("mypy"), reason="mypy is not installed")
def test_a_type_checker_finds_the_usual_mistakes(tmp_path: pathlib.Path) -> None:
    mistakes = (
        "fastopt.SGD([p], lr='0.1')",
        "fastopt.AdamW([p], lrr=0.1)",
        "fastopt.RAdam(3)",
        "fastopt.Adam([p], k=5)",
    )
    right = "fastopt.Adam([p], 1e-3, (0.9, 0.99), amsgrad=True, backend='native')"
    lines = ["import torch, fastopt", "p = torch.nn.Parameter(torch.ones(1))", right, *mistakes]
    (file := tmp_path / "use.py").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", str(file)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert sorted({int(line.split(":")[1]) for line in said.splitlines() if "error" in line}) == [4, 5, 6, 7], said


@each_name
def test_class_is_a_subclass_of_the_torch_class_under_its_name(name: str) -> None:
    ours, theirs = both(name)
    assert issubclass(ours, theirs)
    assert (ours.__name__, ours.__qualname__) == (name, name)
    assert ours.__module__.startswith("fastopt")
    assert ours.__doc__ != theirs.__doc__


@pytest.mark.contract("construction", optimizers="AdamW")
def test_adamw_is_an_adam() -> None:
    assert issubclass(fastopt.AdamW, fastopt.Adam)


@each_name
def test_defaults_and_groups_are_torchs(name: str) -> None:
    p = param(3)
    ours, theirs = (cls([p]) for cls in both(name))
    assert ours.defaults == theirs.defaults
    assert list(ours.param_groups[0].items()) == list(theirs.param_groups[0].items())
    assert repr(ours) == repr(theirs)


@each_name
def test_positional_arguments_mean_what_they_do_in_torch(name: str) -> None:
    positional = [
        p.default
        for p in list(inspect.signature(getattr(torch.optim, name)).parameters.values())[1:]
        if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    p = param(3)
    ours, theirs = (cls([p], *positional) for cls in both(name))
    assert ours.param_groups == theirs.param_groups


@each_name
def test_backend_is_no_hyper_parameter(name: str) -> None:
    optimizer = getattr(fastopt, name)([param(3)], backend="reference")
    assert "backend" not in optimizer.defaults
    assert "backend" not in optimizer.param_groups[0]
    assert "backend" not in optimizer.state_dict()["param_groups"][0]


def test_unknown_backend_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"native.*reference|reference.*native") as error:
        fastopt.Adam([param(3)], backend="vulkan")
    assert "vulkan" in str(error.value)


def test_environment_chooses_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTOPT_BACKEND", "reference")
    p = param(3)
    p.grad = torch.ones(3)
    optimizer = fastopt.Adam([p])
    optimizer.step()
    assert "reference" in str(fastopt.explain(optimizer))
    made = fastopt.Adam([p])
    monkeypatch.setenv("FASTOPT_BACKEND", "vulkan")
    for use in (lambda: fastopt.Adam([p]), made.step):
        with pytest.raises(ValueError, match="FASTOPT_BACKEND='vulkan': accepted are"):
            use()
    monkeypatch.setitem(fastopt.backends._WHY_NOT, "reference", lambda device: "of a test")
    monkeypatch.setenv("FASTOPT_BACKEND", "reference")
    with pytest.raises(fastopt.backends.BackendError, match="FASTOPT_BACKEND='reference' was asked for, but of a test"):
        fastopt.Adam([p])


def test_named_parameters() -> None:
    model = torch.nn.Linear(3, 2)
    ours, theirs = (cls(model.named_parameters()) for cls in both("Adam"))
    assert ours.param_groups[0]["param_names"] == ["weight", "bias"]
    assert ours.state_dict()["param_groups"] == theirs.state_dict()["param_groups"]
    model(torch.ones(1, 3)).sum().backward()
    ours.step()
    assert len(ours.state) == 2


def _error_inputs() -> list[Any]:
    rows = []
    for info in optim_db:
        if info.name in TORCH_NAMES:
            for i, error in enumerate(info.optim_error_inputs_func("cpu", torch.float32)):
                desc = error.optimizer_error_input.desc.replace(" ", "-") or str(i)
                rows.append(pytest.param(info.name, error, id=f"{info.name}-{desc}"))
    return rows


@pytest.mark.parametrize(("name", "error"), _error_inputs())
def test_torchs_own_error_inputs(name: str, error: Any) -> None:
    """The error database torch tests its own optimizers with."""
    assert error.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    given = error.optimizer_error_input
    params = [param(2, 2)] if given.params is None else given.params
    ours, theirs = (outcome(lambda cls=cls: cls(params, **given.kwargs)) for cls in both(name))
    assert ours == theirs
    assert ours is not None
    assert issubclass(ours[0], error.error_type)


BAD = [
    {"lr": -1.0},
    {"lr": float("nan")},
    {"lr": torch.tensor([0.1, 0.2])},
    {"lr": torch.tensor(0.1), "foreach": True},
    {"eps": -1e-8},
    {"eps": float("nan")},
    {"betas": (1.0, 0.9)},
    {"betas": (0.9, 1.0)},
    {"betas": (-0.1, 0.9)},
    {"betas": (0.9, float("nan"))},
    {"betas": (0, 0.9)},
    {"betas": (torch.tensor(0.9), 0.99)},
    {"betas": (torch.tensor([0.9, 0.8]), torch.tensor(0.99))},
    {"weight_decay": -0.1},
    {"weight_decay": float("nan")},
    {"momentum": -0.9},
    {"alpha": -0.1},
    {"lr_decay": -0.1},
    {"initial_accumulator_value": -0.1},
    {"momentum_decay": -0.1},
    {"nesterov": True},
    {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
    {"fused": True, "foreach": True},
    {"fused": True, "differentiable": True},
]


def _bad_rows() -> list[Any]:
    def text(kwargs: dict[str, Any]) -> str:
        return "-".join(f"{k}={v}" for k, v in kwargs.items()).replace(" ", "")

    return [pytest.param(n, kw, id=f"{n}-{text(kw)}") for n in TORCH_NAMES for kw in BAD if accepts(n, *kw)]


@pytest.mark.parametrize(("name", "kwargs"), _bad_rows())
def test_what_torch_rejects_is_rejected_alike(name: str, kwargs: dict[str, Any]) -> None:
    """Same type, same message; and what torch accepts (such as a NaN lr in SGD) is accepted."""
    ours, theirs = (outcome(lambda cls=cls: cls([param(2, 2)], **kwargs)) for cls in both(name))
    assert ours == theirs


@each_name
def test_unknown_option_is_named(name: str) -> None:
    with pytest.raises(TypeError, match="no_such_option"):
        getattr(fastopt, name)([param(2)], no_such_option=1)


BAD_PARAMS: dict[str, Callable[[], Any]] = {
    "tensor": lambda: torch.ones(2),
    "empty": list,
    "not-a-tensor": lambda: [1.0],
    "non-leaf": lambda: [param(2) * 2],
    "group-of-a-set": lambda: [{"params": {torch.nn.Parameter(torch.zeros(()))}}],
    "no-params-key": lambda: [{"lr": 0.1}],
    "string": lambda: "weights",
    "empty-group": lambda: [{"params": []}],
    "group-with-unknown-option": lambda: [{"params": [torch.nn.Parameter(torch.zeros(()))], "mine": 3}],
}


@each_name
@pytest.mark.parametrize("what", BAD_PARAMS)
def test_bad_parameters_are_rejected_alike(name: str, what: str) -> None:
    params = BAD_PARAMS[what]()
    ours, theirs = (outcome(lambda cls=cls: cls(params)) for cls in both(name))
    assert ours == theirs
