"""Shared fixtures. Tensors are small: one thread per test process, unless a test asks for more."""

from __future__ import annotations

import pytest
import torch

pytest_plugins = ["contract_table"]
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
