"""Save a training run, kill it, resume it: the weights end up the same to the last bit as without the interruption.

Ranger is the hard case: moments, slow weights and counters must all come back. The first run is really killed.
"""

import os
import signal
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

import torch

import fastopt
from fastopt.tools import tasks

STEPS, SAVE_EVERY, KILLED_AT = 60, 10, 33


def train(checkpoint: Path | None = None, killed_at: int | None = None) -> dict[str, torch.Tensor]:
    """Train to the last step, from the checkpoint where there is one, and return the weights."""
    task = tasks.get("chars")
    model = task.make_model(seed=0)
    optimizer = fastopt.Ranger(model.parameters(), lr=1e-2)
    done = 0
    if checkpoint and checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["done"]
        print(f"resuming after step {done}")
    for step, batch in enumerate(islice(task.batches(seed=0), done, STEPS), done + 1):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
        if step == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if checkpoint and step % SAVE_EVERY == 0:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": step}, checkpoint)
    return model.state_dict()


if len(sys.argv) > 1:
    train(Path(sys.argv[1]), killed_at=KILLED_AT)
else:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint.pt"
        victim = subprocess.run([sys.executable, __file__, str(checkpoint)])
        print(f"a run that saves every {SAVE_EVERY} steps ended at step {KILLED_AT}, exit status {victim.returncode}")
        resumed = train(checkpoint)
    uninterrupted = train()
    same = all(torch.equal(resumed[name], uninterrupted[name]) for name in uninterrupted)
    print(f"resumed and uninterrupted weights after {STEPS} steps are {'the same bits' if same else 'DIFFERENT'}")
    sys.exit(not same)
