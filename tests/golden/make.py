"""Writes the checkpoints beside it: `python tests/golden/make.py own` or `... peers`, from the root of the repository.

own     fastopt-VERSION.pt.gz and .json: every optimizer in mid-run, and digests of the steps that follow. A new version
        gets new files; the old ones stay, because checkpoints of every version load in all later ones.
peers   SOURCE.pt.gz: checkpoints that other libraries saved and the parameters of their next steps (see peers.py). Only
        what can be imported here is rewritten.
"""

from __future__ import annotations

import gzip
import io
import json
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

import torch  # noqa: E402
from peers import PEERS, advance, available, in_groups, parameters, read  # noqa: E402
from test_golden import OWN, SAVED_AFTER, digests  # noqa: E402

import fastopt  # noqa: E402


def own() -> None:
    saved: dict[str, Any] = {}
    after: dict[str, list[str]] = {}
    for name, (make, dtype) in OWN.items():
        params = parameters(dtype)
        optimizer = make(in_groups(params, {"lr": 0.02, "weight_decay": 0.1}), None)
        advance(optimizer, params, 0, SAVED_AFTER)
        saved[name] = {"params": [p.detach().clone() for p in params], "state_dict": deepcopy(optimizer.state_dict())}
        after[name] = digests(optimizer, params)
    write(saved, HERE / f"fastopt-{fastopt.__version__}.pt.gz")
    (HERE / f"fastopt-{fastopt.__version__}.json").write_text(json.dumps(after, indent=1) + "\n")


def peers() -> None:
    for source in {peer.source for peer in PEERS}:
        path = HERE / f"{source}.pt.gz"
        records = read(path) if path.exists() else {}
        for peer in PEERS:
            if peer.source == source and available(peer.needs):
                records[peer.id] = peer.run()
        write({peer.id: records[peer.id] for peer in PEERS if peer.id in records}, path)
        print(path.name, ", ".join(records))


def write(records: dict[str, Any], path: Path) -> None:
    """Compressed, because most of a file of small tensors is padding."""
    buffer = io.BytesIO()
    torch.save(records, buffer)
    path.write_bytes(gzip.compress(buffer.getvalue(), 9, mtime=0))


if __name__ == "__main__":
    {"own": own, "peers": peers}[sys.argv[1]]()
