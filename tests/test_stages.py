"""The stages' source: only arithmetic that is the same everywhere, and a C++ twin for each."""

from __future__ import annotations

import ast
import inspect
import pathlib
import re

import pytest
import torch
from cases import CASES

import fastopt
from fastopt import stages
from fastopt.chain import Stage

ALLOWED_CALLS = {"fma", "div_rn", "sqrt_rn", "maximum", "abs", "where"}
STAGES = {name: value for name, value in vars(stages).items() if isinstance(value, Stage)}
CSRC = pathlib.Path(fastopt.__file__).resolve().parents[1] / "csrc"


@pytest.mark.parametrize("name", STAGES)
def test_arithmetic_is_limited_to_what_rounds_alike_everywhere(name: str) -> None:
    """`/`, `**`, tl.sqrt and their like compile to approximations somewhere; branches and loops to other code."""
    tree = ast.parse(inspect.getsource(STAGES[name].function))
    (function,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    for node in ast.walk(ast.Module(function.body, [])):
        assert not isinstance(node, (ast.If, ast.IfExp, ast.For, ast.While, ast.BoolOp, ast.Lambda)), ast.dump(node)
        if isinstance(node, ast.BinOp):
            assert isinstance(node.op, (ast.Add, ast.Sub, ast.Mult)), ast.unparse(node)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called == "lerp2" or called.removeprefix("tl.") in ALLOWED_CALLS, ast.unparse(node)


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_is_short(name: str) -> None:
    body = inspect.getsource(STAGES[name].function).splitlines()
    assert len([line for line in body if line.strip() and not line.strip().startswith(("@", "def", '"""'))]) <= 7


@pytest.mark.skipif(not (CSRC / "stages").is_dir(), reason="an installed package without its C++ sources")
@pytest.mark.parametrize("name", STAGES)
def test_every_stage_has_a_twin_in_cpp(name: str) -> None:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (CSRC / "stages").glob("*.h"))
    assert re.search(rf"\b{name}\b", sources), f"csrc/stages/*.h does not define {name}"


def test_the_table_of_cases_covers_every_public_optimizer() -> None:
    """A new optimizer needs no new test, but it does need its row in tests/cases.py."""
    exported = {name: getattr(fastopt, name) for name in fastopt.__all__}
    public = {name for name, cls in exported.items() if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer)}
    assert len(public) >= 10
    assert public == {case.name for case in CASES} | {"Lookahead" for case in CASES if case.lookahead}
