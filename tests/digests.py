"""Prints a digest per case and dtype of all that the native backend computes: run under FASTOPT_ISA by test_numbers."""

from __future__ import annotations

import hashlib

import conftest  # noqa: F401  (one thread)
import torch
from cases import CASES, DTYPES
from harness import Built, Scenario, Spec, trace

SCENARIO = Scenario(
    "digest",
    (Spec((1027,)), Spec((33,), "offset1"), Spec((6, 11), "transposed", "contiguous"), Spec((400,), kind="special")),
    steps=7,
)


def digests() -> dict[str, str]:
    """Case and dtype -> digest of parameters and states after every step; NaNs count as one value."""
    result = {}
    for case in CASES:
        for name, dtype in DTYPES.items():
            built, digest = Built(SCENARIO, case, dtype), hashlib.sha256()
            for snapshot in trace(case.make(built.groups, "native"), built):
                for p, states in snapshot:
                    for tensor in (p, *states.values()):
                        tensor = torch.where(tensor.isnan(), torch.nan, tensor).contiguous()
                        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
            result[f"{case.id}-{name}"] = digest.hexdigest()[:16]
    return result


if __name__ == "__main__":
    for key, value in digests().items():
        print(key, value)
