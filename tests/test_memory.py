"""Nothing grows: memory after thousands of steps, each different from all before, is what it was after the first ones.

Learning rates and betas never repeat, gradients come and go in changing memory, groups are added and removed,
checkpoints loaded, optimizers copied, storages swapped. Caches fill and are emptied meanwhile, so the lowest mark of a
thousand steps is compared with that of the next thousand. Run as a script, this file is one run.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import pathlib
import resource
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator

import pytest
import torch
from cases import Case, backends, by_id

pytestmark = pytest.mark.contract("memory")

STEPS = 1100  # more than any cache holds settings (1,024)
CHUNK = 32  # bytes: the smallest that the C library hands out, so one lost at every step shows
OBJECT = 16  # bytes: the same of Python
FRAGMENTS = 1 << 20  # bytes of resident memory that the system's allocator may take and keep without a leak


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
    )]  # fmt: skip


def heap() -> int:
    """Bytes that C and C++ hold, torch's tensors among them; 0 where the C library does not say (glibc before 2.33)."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return 0
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


def resident() -> int:
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def held() -> dict[str, int]:
    gc.collect()
    tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    return {"heap": heap(), "resident": resident(), "python": tracemalloc.get_traced_memory()[0], "tensors": tensors}


def steps(case: Case, backend: str) -> Iterator[int]:
    """Endless training steps; no two are alike."""
    params = [torch.nn.Parameter(torch.zeros(1 + 5 * (i % 7))) for i in range(12)]
    optimizer = case.make([{"params": params[:8]}, {"params": params[8:]}], backend)
    t = 0
    while True:
        t += 1
        group = optimizer.param_groups[t % 2]
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(1e-3 / (1 + t))
        else:
            group["lr"] = torch.tensor(1e-3 / t, dtype=torch.float64) if t % 101 == 0 else 1e-3 / t
        if "betas" in group:
            group["betas"] = (0.9 - 1e-6 * t, 0.99 + 1e-7 * t)
        params = [p for g in optimizer.param_groups for p in g["params"]]
        for i, p in enumerate(params):
            p.grad = None if (t * i) % 3 == 1 else torch.full((len(p) + t % 4,), 1.0 / t)[t % 4 :]
        optimizer.step()
        if t % 7 == 0:
            params[t % 8].data = params[t % 8].data.clone()
        if t % 10 == 0:
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(t % 50))], "lr": 1.0 / t})
        elif t % 10 == 5 and len(optimizer.param_groups) > 2:
            for p in optimizer.param_groups.pop()["params"]:
                optimizer.state.pop(p, None)
        if t % 20 == 9:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if t % 50 == 49:
            optimizer = copy.deepcopy(optimizer)
        if t % 10 == 6:
            yield t


def lowest(run: Iterator[int]) -> dict[str, int]:
    """The lowest mark of each measure over the next `STEPS` steps."""
    low: dict[str, int] = {}
    for t in run:
        low = {key: min(value, low.get(key, value)) for key, value in held().items()}
        if t % STEPS == 1096:
            break
    return low


def grown(run: Iterator[int], allowed: dict[str, int]) -> list[str]:
    """What grows by more than is allowed over `STEPS` steps."""
    for _ in range(2):  # caches fill, and the interpreter's pools of free objects
        lowest(run)
    first, second = lowest(run), lowest(run)
    for key in allowed:
        print(f"{key}: {first[key]:,} and then {second[key]:,}, {(second[key] - first[key]) / STEPS:+.2f} a step")
    return [key for key, most in allowed.items() if second[key] - first[key] > most]


def main(name: str, backend: str) -> None:
    torch.set_num_threads(1)
    run = steps(by_id(name)[0], backend)
    next(run)
    gc.freeze()  # what was imported is not looked through again
    found = grown(run, {"heap": CHUNK * STEPS, "resident": FRAGMENTS, "tensors": 0})
    tracemalloc.start()  # after the others: its records are on the heap
    found += grown(run, {"python": OBJECT * STEPS})
    assert not found, f"grows: {', '.join(found)}"


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        pytest.param(*by_id(name), *backend.values, id=f"{name}-{backend.id}", marks=backend.marks)
        for name, where in (("nadam", ["emulated"]), ("lookahead-adam", ["native"]))
        for backend in backends(where)
    ],
)
def test_memory_does_not_grow(case: Case, backend: str) -> None:
    here = pathlib.Path(__file__).resolve()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (here.parents[1], here.parent)))}
    result = subprocess.run(
        [sys.executable, str(here), case.id, backend], env=env, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr


if __name__ == "__main__":
    main(*sys.argv[1:])
