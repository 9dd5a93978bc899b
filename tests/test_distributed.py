"""Two processes over gloo: FSDP2 and its checkpoints, DDP, ZeroRedundancyOptimizer."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch.distributed as dist
from distributed_steps import run

distributed = functools.partial(pytest.mark.contract, "distributed")
pytestmark = [
    distributed(optimizers="all", backend="all"),
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"),
]


@pytest.mark.parametrize(
    "task",
    [
        "fsdp",
        pytest.param("placements", marks=distributed(optimizers=("Adam", "Ranger"), backend="all")),
        pytest.param("large", marks=distributed(optimizers=("SGD", "AdamW"), backend="native")),
        pytest.param("sequence", marks=distributed(optimizers=("SGD", "RMSprop", "AdamW"))),
        pytest.param("freed", marks=distributed(optimizers=("SGD", "AdamW", "Ranger"), backend="all")),
        pytest.param("slow", marks=distributed(optimizers=("Ranger", "Lookahead"))),
        "flattened",
        "ddp",
        pytest.param("zero", marks=distributed(optimizers=("SGD", "Adam", "AdamW", "RAdam", "Ranger"))),
    ],
)
def test_two_processes(task: str, tmp_path: Path) -> None:
    run(task, tmp_path)


@pytest.mark.contract("distributed", "state", optimizers="all")
def test_distributed_checkpoints(tmp_path: Path) -> None:
    """Resumed to the same bits, sharded as before and not sharded at all."""
    run("resume", tmp_path)
    run("reshard", tmp_path)
