"""The GPU tests, run as far as a CPU allows with the CUDA driver's emulator: they must not rot between GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastopt

CHOSEN = "(native or emulated) and (adamw or dtypes or checkpoint or overflow or groups) and not as_on_the"


@pytest.mark.skipif(not fastopt.backends.available("emulated"), reason=fastopt.backends.why_not("emulated"))
def test_the_gpu_tests_pass_in_rehearsal() -> None:
    folder = Path(__file__).with_name("gpu")
    options = ["-q", "-p", "no:cacheprovider", "-n", "0", "-k", CHOSEN]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", str(folder), *options],
        env={**os.environ, "FASTOPT_TEST_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "passed" in run.stdout
