"""What needs a GPU: without one the modules here skip and say so, unless FASTOPT_REQUIRE_GPU=1 makes that a failure.

A run may be dealt over several processes (FASTOPT_SHARD=1/8, the first of eight); each notes the tests it has finished
in FASTOPT_DONE, and leaves out those noted there already. A kernel that faults takes the process's CUDA context with
it: the session then ends with exit status 67, so that whoever started it can start it again for the rest.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

CONTEXT_LOST = 67  # none of pytest's own
HERE = Path(__file__).parent
DONE = os.environ.get("FASTOPT_DONE")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if HERE in item.path.parents]
    finished = set(Path(DONE).read_text(encoding="utf-8").splitlines()) if DONE and Path(DONE).exists() else set()
    index, count = map(int, os.environ.get("FASTOPT_SHARD", "1/1").split("/"))
    dropped = {i for i in ours if _shard(i, count) != index - 1 or i.nodeid in finished}
    # Time may run out: Triton, which compiles for minutes, comes after all that is native, the slow reference last.
    parts = ("reference", "triton", "memory_checker", "test_gpu_numbers")
    items.sort(key=lambda item: [part in item.nodeid for part in parts])
    if dropped:
        config.hook.pytest_deselected(items=[item for item in items if item in dropped])
        items[:] = [item for item in items if item not in dropped]


def _shard(item: pytest.Item, count: int) -> int:
    """Backends are compared with one trace of the CPU: what differs in nothing but the backend stays together."""
    return zlib.crc32(re.sub(r"-?(native|triton|emulated)", "", item.nodeid).encode()) % count


@pytest.fixture(autouse=True)
def _plans_take_turns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton has two ways through the host: half of its tests get the one that needs no extension."""
    from fastopt.backends.triton import compiled

    monkeypatch.setattr(compiled, "ENABLED", zlib.crc32(request.node.nodeid.encode()) % 2 == 0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[Any]:
    if HERE not in item.path.parents:
        return (yield)
    if DONE:  # before it runs: a test that kills the process must not be tried for ever
        with Path(DONE).open("a", encoding="utf-8") as file:
            file.write(f"{item.nodeid}\n")
    result = yield
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"the CUDA context was lost in {item.nodeid}: {error}", returncode=CONTEXT_LOST)
    return result
