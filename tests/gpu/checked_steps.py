"""A few steps of everything, small, for a memory checker to watch: python tests/gpu/checked_steps.py BACKEND"""

from __future__ import annotations

import sys

import torch

import fastopt

SIZES = (0, 1, 7, 33, 255, 1000, 4097)


def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Aligned ones, a misaligned view and a transposed one, each at the very end of its allocation."""
    dense = [torch.nn.Parameter(torch.ones(n, dtype=dtype, device="cuda")) for n in SIZES]
    misaligned = torch.nn.Parameter(torch.ones(130, dtype=dtype, device="cuda")[1:])
    transposed = torch.nn.Parameter(torch.ones(5, 13, dtype=dtype, device="cuda").t())
    rows = torch.nn.Parameter(torch.ones(7, 4099, dtype=dtype, device="cuda"))
    return [*dense, misaligned, transposed, rows]


def main(backend: str) -> None:
    for name, kwargs in (
        ("Adam", {"amsgrad": True}),
        ("Adam", {"capturable": True}),
        ("Ranger", {"k": 2}),
        ("SGD", {}),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            params = parameters(dtype)
            optimizer = getattr(fastopt, name)(params, lr=1e-3, backend=backend, **kwargs)
            for step in range(3):
                for i, p in enumerate(params):
                    p.grad = None if (step + i) % 5 == 4 else torch.ones_like(p)
                optimizer.step()
            torch.cuda.synchronize()
            assert all(p.isfinite().all() for p in params)
    print("steps done")


if __name__ == "__main__":
    main(sys.argv[1])
