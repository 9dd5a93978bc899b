"""Runs many random programs and reports how many, from which seed, and what they did.

PYTHONPATH=tests python -m fuzz --cases 10000 --seed 1
PYTHONPATH=tests python -m fuzz --cases 1000 --triton
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import seed as seeded

from fastopt import routing
from fastopt.backends import native
from fuzz.program import Program
from fuzz.strategies import programs

BATCH = 250  # hypothesis remembers what it tried; a new seed every so often keeps that small


class Tally:
    def __init__(self) -> None:
        self.cases, self.done, self.kinds = 0, Counter[str](), Counter[str]()

    def run(self, program: Program) -> None:
        self.done += program.run()
        self.cases += 1
        self.kinds[program.backend] += 1
        self.kinds[f"{program.threads} threads" if program.threads > 1 else "1 thread"] += 1


def batch(count: int, seed: int, tally: Tally) -> None:
    @seeded(seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(programs())
    def check(program: Program) -> None:
        note(f"\n{program}.run()\n")
        tally.run(program)

    check()


def sanitized() -> bool:
    """Whether the extension was compiled with AddressSanitizer, and its runtime is here."""
    module = native.extension()
    assert module is not None
    return b"__asan_report_load" in Path(str(module.__file__)).read_bytes() and hasattr(
        ctypes.CDLL(None), "__asan_init"
    )


def interpret() -> None:
    """Triton's kernels take CPU tensors, and that CPU is the device where steps may be counted."""
    import triton_interpreter  # noqa: F401 for what it changes

    warnings.filterwarnings("ignore", module=r"triton\.")  # of numpy, which finds zeros to divide by

    why_not = routing.why_not_setting
    routing.why_not_setting = lambda setting, p, _=False: why_not(setting, p, True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sanitized", action="store_true", help="insist on an extension built with sanitizers")
    parser.add_argument("--triton", action="store_true", help="of Triton's kernels, in its interpreter")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.triton:
        interpret()
    if options.sanitized and not sanitized():
        raise SystemExit("this is not a sanitized build: run `make sanitize`")
    tally, failures, start, at = Tally(), 0, time.monotonic(), 0
    while tally.cases < options.cases:
        try:
            batch(min(BATCH, options.cases - tally.cases), options.seed * 1_000_003 + at, tally)
        except Exception:
            failures += 1
            traceback.print_exc(limit=-3)
        at += 1
        print(
            f"{tally.cases} cases, {failures} failures, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True
        )
    kinds = ", ".join(f"{name} {n}" for name, n in sorted((tally.kinds + tally.done).items()))
    print(f"{tally.cases} programs from seed {options.seed}: {failures} failures, {time.monotonic() - start:.0f} s")
    print(f"sanitized: {'yes' if sanitized() else 'no'}; {kinds}")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
