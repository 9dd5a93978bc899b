"""Every example runs as a user runs it, and prints what its page promises."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
PROMISES = {
    "batch_vs_minibatch.py": ["batch:", "stochastic:", "mini-batch:", "rows a step"],
    "adam_then_sgd.py": ["Adam stalled", "300 steps later: SGD", "Lower in the end"],
    "slow_weights.py": ["Lookahead(Adam)", "Ranger", "mean of the last"],
    "resume.py": ["ended at step 33, exit status -9", "resuming after step 30", "the same bits"],
}


def test_all_are_listed():
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert scripts == set(PROMISES)
    page = (EXAMPLES / "README.md").read_text()
    assert all(f"[{name}]({name})" in page for name in scripts)


@pytest.mark.parametrize("name", PROMISES)
def test_runs(name):
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / name)], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    assert [promise for promise in PROMISES[name] if promise not in run.stdout] == []
