"""Every chain that a public optimizer can ask for, found without the compiled extension."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap

import torch
from cases import CASES, Case

from fastopt import stages
from fastopt.chain import Chain, Stage
from fastopt.setting import PULL


@functools.cache
def chains() -> dict[str, Chain]:
    """By name: every case, with and without weight decay, alone and inside Lookahead, early and late in a run."""
    found = {PULL.name: PULL}
    for case in CASES:
        for decay in ({}, {"weight_decay": 0.03}):
            for lookahead in {case.lookahead, (2, 0.5)}:
                optimizer = Case(case.id, case.name, {**case.kwargs, **decay}, lookahead).make([torch.zeros(2)])
                engine = optimizer.engine()
                setting = engine.settings.of(optimizer.param_groups[0])
                for t in (*range(1, 13), 1000):
                    for sync in (False, True):
                        chain = setting.at(float(t), 1.0, True, sync).chain
                        found[chain.name] = chain
    return found


def calls(stage: Stage, name: str) -> int:
    """How often a stage calls a function of the language, helpers included."""
    return _calls(stage.function, name)


def _calls(function: object, name: str) -> int:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))  # type: ignore[arg-type]
    called = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    helpers = [vars(stages)[c] for c in called if inspect.isfunction(vars(stages).get(c)) and c != "stage"]
    return called.count(f"tl.{name}") + sum(_calls(helper, name) for helper in helpers)
