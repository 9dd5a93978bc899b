"""Coefficient rows that the Triton backend makes on a GPU, where powers are CUDA's."""

from __future__ import annotations

import pytest
from cases import Case
from counted_rows import Counted
from gpu_support import needs_cuda
from test_device_steps import COUNTED


@needs_cuda
@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("case", COUNTED, ids=lambda case: case.id)
def test_rows_of_counted_steps(case: Case, asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """libm's powers are within 1 ulp of the exact ones, CUDA's within 2 (CUDA C++ Programming Guide)."""
    built = Counted(case, "cuda", asked)
    built.check(built.step(monkeypatch), reach=2)
