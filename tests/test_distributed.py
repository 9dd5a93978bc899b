"""Two processes over gloo: FSDP2 and its checkpoints, DDP, ZeroRedundancyOptimizer."""

from __future__ import annotations

import functools
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

distributed = functools.partial(pytest.mark.contract, "distributed")
pytestmark = [
    distributed(optimizers="all", backend="all"),
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"),
]
SCRIPT = Path(__file__).with_name("distributed_steps.py")


def run(task: str, folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), task, str(rank), port, str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0, text


@pytest.mark.parametrize(
    "task",
    [
        "fsdp",
        pytest.param("placements", marks=distributed(optimizers=("Adam", "Ranger"), backend="all")),
        pytest.param("large", marks=distributed(optimizers=("SGD", "AdamW"), backend="native")),
        pytest.param("sequence", marks=distributed(optimizers=("SGD", "RMSprop", "AdamW"))),
        pytest.param("freed", marks=distributed(optimizers=("SGD", "AdamW", "Ranger"), backend="all")),
        pytest.param("slow", marks=distributed(optimizers=("Ranger", "Lookahead"))),
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
