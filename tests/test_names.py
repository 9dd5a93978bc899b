"""`import fastopt as optim` does for a script that says `optim` throughout: what is not ours is torch's own."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch
from cases import both, each_name

import fastopt

PAGES = {"lr_scheduler": "StepLR", "swa_utils": "AveragedModel"}


@pytest.mark.parametrize("name", torch.optim.__all__)
def test_every_name_of_torchs_is_there(name: str) -> None:
    value, theirs = getattr(fastopt, name), getattr(torch.optim, name)
    assert name in dir(fastopt)
    if name in fastopt.__all__:
        assert issubclass(value, theirs)
        assert value is not theirs
    else:
        assert value is theirs


def test_no_other_name_is() -> None:
    with pytest.raises(AttributeError, match=r"^module 'fastopt' has no attribute 'AdamX'$"):
        fastopt.AdamX  # type: ignore[attr-defined] # noqa: B018
    assert not hasattr(fastopt, "_functional")
    assert set(fastopt.__all__) <= set(dir(fastopt))


@pytest.mark.parametrize("module", PAGES)
def test_its_modules_can_be_imported_from(module: str) -> None:
    """In a new process each, for an import also sets the package's attribute."""
    program = f"""
from fastopt.{module} import {PAGES[module]}
import fastopt, fastopt.{module}, torch
from fastopt import {module}
assert fastopt.{module} is {module} is torch.optim.{module}
assert {PAGES[module]} is torch.optim.{module}.{PAGES[module]}
assert fastopt.{module}.__name__ == "torch.optim.{module}"
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert importlib.import_module(f"fastopt.{module}") is getattr(torch.optim, module)


def test_a_whole_script() -> None:
    def train(optim: object) -> torch.Tensor:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)  # type: ignore[attr-defined]
        schedule = optim.lr_scheduler.StepLR(optimizer, 2)  # type: ignore[attr-defined]
        average = optim.swa_utils.AveragedModel(model)  # type: ignore[attr-defined]
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.ones(3)).square().sum().backward()
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
        return torch.cat([p.detach().flatten() for p in average.parameters()])

    assert torch.equal(train(fastopt), train(torch.optim))


@pytest.mark.contract("wrappers", difference="names")
@each_name
def test_what_our_classes_have_beside_torchs(name: str) -> None:
    p = torch.nn.Parameter(torch.ones(1))
    ours, theirs = (cls([p]) for cls in both(name))
    own = {key for key in set(dir(ours)) - set(dir(theirs)) if not key.startswith("_")}
    assert own == {"backend", "engine", "rule", "torch_class"}


@pytest.mark.parametrize("name", ["Ranger", "Lookahead", "Adam"])
def test_a_group_that_is_none(name: str) -> None:
    p = torch.nn.Parameter(torch.ones(1))
    optimizer = fastopt.Lookahead(fastopt.Adam([p])) if name == "Lookahead" else getattr(fastopt, name)([p])
    with pytest.raises(TypeError, match="param_group must be a dict"):
        optimizer.add_param_group([p])
