"""Checkpoints of every released version load and continue to the same bits, on every backend."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import backends
from peers import advance, in_groups, parameters, read

import fastopt

GOLDEN = Path(__file__).resolve().parent / "golden"
VERSIONS = sorted(path.name.removesuffix(".pt.gz") for path in GOLDEN.glob("fastopt-*.pt.gz"))
SAVED_AFTER, STEPS = 8, 6
Make = Callable[[Any, Any], torch.optim.Optimizer]


def _of(name: str, **kwargs: Any) -> Make:
    return lambda groups, backend: getattr(fastopt, name)(groups, **{"lr": 0.01, **kwargs}, backend=backend)


def _in_lookahead(make: Make, **kwargs: Any) -> Make:
    return lambda groups, backend: fastopt.Lookahead(make(groups, backend), **kwargs)


FP32, BF16 = torch.float32, torch.bfloat16
OWN: dict[str, tuple[Make, torch.dtype]] = {
    "sgd": (_of("SGD", momentum=0.9, dampening=0.1), FP32),
    "rmsprop": (_of("RMSprop", momentum=0.9, centered=True), FP32),
    "adagrad": (_of("Adagrad", lr_decay=0.01), FP32),
    "adam": (_of("Adam"), FP32),
    "adam-amsgrad": (_of("Adam", amsgrad=True), FP32),
    "adamw": (_of("AdamW"), FP32),
    "adamw-bf16": (_of("AdamW"), BF16),
    "adamax": (_of("Adamax"), FP32),
    "nadam": (_of("NAdam"), FP32),
    "radam": (_of("RAdam", decoupled_weight_decay=True), FP32),
    "ranger": (_of("Ranger"), FP32),
    "ranger-bf16": (_of("Ranger", k=4), BF16),
    "lookahead-sgd": (_in_lookahead(_of("SGD", momentum=0.9, nesterov=True), k=5, alpha=0.8), FP32),
    "lookahead-adam": (_in_lookahead(_of("Adam")), FP32),
}


def digests(optimizer: torch.optim.Optimizer, params: Sequence[torch.Tensor]) -> list[str]:
    """Of the parameters and all states after each of the next steps."""
    result = []
    for step in range(SAVED_AFTER, SAVED_AFTER + STEPS):
        advance(optimizer, params, step, step + 1)
        digest = hashlib.sha256()
        for p in params:
            for tensor in (p.detach(), *optimizer.state.get(p, {}).values()):
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        result.append(digest.hexdigest()[:16])
    return result


@pytest.mark.contract("state", optimizers="all")
@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("version", VERSIONS)
def test_checkpoints_of_every_version_continue_to_the_same_bits(version: str, backend: str) -> None:
    """Into optimizers of the default hyper-parameters: everything that matters is in the checkpoint."""
    saved = read(GOLDEN / f"{version}.pt.gz")
    want = json.loads((GOLDEN / f"{version}.json").read_text())
    assert list(saved) == list(want)
    for name, record in saved.items():
        make, dtype = OWN[name]
        params = [torch.nn.Parameter(p) for p in record["params"]]
        assert params[0].dtype == dtype
        optimizer = make(in_groups(params, {}), backend)
        optimizer.load_state_dict(record["state_dict"])
        assert digests(optimizer, params) == want[name], name


def test_the_current_version_is_among_them_and_every_optimizer_in_it() -> None:
    """`python tests/golden/make.py own` writes it."""
    assert f"fastopt-{fastopt.__version__}" in VERSIONS
    saved = read(GOLDEN / f"fastopt-{fastopt.__version__}.pt.gz")
    assert list(saved) == list(OWN)
    classes = {c.lower() for c in fastopt.__all__ if issubclass_of_optimizer(getattr(fastopt, c))}
    assert classes == {name.split("-")[0] for name in saved}


def issubclass_of_optimizer(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, torch.optim.Optimizer)


@pytest.mark.contract("state", optimizers="all")
def test_what_was_saved_is_what_is_saved_today() -> None:
    """The same run saves the same checkpoint again: keys, their order, dtypes and bits."""
    saved = read(GOLDEN / f"fastopt-{fastopt.__version__}.pt.gz")
    for name, (make, dtype) in OWN.items():
        params = parameters(dtype)
        optimizer = make(in_groups(params, {"lr": 0.02, "weight_decay": 0.1}), None)
        advance(optimizer, params, 0, SAVED_AFTER)
        today, then = optimizer.state_dict(), saved[name]["state_dict"]
        assert [list(g) for g in today["param_groups"]] == [list(g) for g in then["param_groups"]], name
        assert today["param_groups"] == then["param_groups"], name
        for i, states in then["state"].items():
            assert list(today["state"][i]) == list(states), name
            assert all(v.dtype == states[k].dtype and torch.equal(v, states[k]) for k, v in today["state"][i].items())


def test_they_are_small() -> None:
    assert sum(path.stat().st_size for path in GOLDEN.iterdir() if path.is_file()) < 100_000
