"""The one CSV format of every benchmark, for ever: a row is one metric of one contender in one case, with where and
when it was measured.

`commit` ends in "+" when the working tree had changes. A metric that compares names what it is relative to after a
slash:
    us_per_step               microseconds of one step; on a GPU one of several back to back, by the device's clock, or
                              one with the wait for the device, as the case has it (gpu_cases)
    host_us                   microseconds until step() returns, the device still at work
    speedup/<rival>           time of the rival in units of the contender's, round by round
    cost/<yardstick>          time of the contender in units of the yardstick's, round by round
    gb_per_s                  bytes that the rule must move at least, over the time
    rate/<yardstick>          gb_per_s in units of the yardstick's, round by round
    share/<ceiling>           gb_per_s in units of a ceiling's, measured earlier in the same run
    launches copies           kernels, and copies and fills of memory, that one step starts on a GPU
    operators                 operators of torch that one step calls on the host
    bytes_per_step            bytes that the rule must move at least
    first_step_us             of an optimizer that has no state yet; what compiles does it here
    peak_extra_bytes          the most that a step takes from torch's allocator at once, beyond what it found
    rms_error max_error       distance from a run in float64 after as many steps as study.py says, in ulps
    training_us               a whole training step: forward, backward, optimizer
    part_of_training          share of the optimizer in it
    final_loss                mean of the last training losses
    rms_ulp/<rival> max_ulp/<rival> same_work/<rival>     agreement of the results after the race (same_work: 1 or 0)
    rounds                    rounds raced
    torch_allocations         blocks taken from torch's allocator in one step
    heap_bytes                growth of the C heap in bytes per step, over many steps
p20 and p80 are the 20th and 80th percentile; all three values are equal where only one was measured.
"""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from bench.race import Spread

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Environment:
    """Where and when a run was made; `driver` and `triton` are empty where there are none."""

    commit: str
    date: str
    device: str
    driver: str
    torch: str
    triton: str
    python: str
    threads: int

    @classmethod
    def of_this_machine(cls, gpu: bool = False) -> Environment:
        processor = f"{_processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
        return cls(
            commit=_commit(),
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            device=_gpu() if gpu else processor,
            driver=_driver() if gpu else "",
            torch=torch.__version__,
            triton=_version("triton"),
            python=platform.python_version(),
            threads=torch.get_num_threads(),
        )


@dataclass(frozen=True)
class Row(Environment):
    case: str
    contender: str
    metric: str
    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, environment: Environment, case: str, contender: str, metric: str, value: Spread | float) -> Row:
        spread = value if isinstance(value, Spread) else Spread(value, value, value)
        return cls(**asdict(environment), case=case, contender=contender, metric=metric, **asdict(spread))

    @property
    def environment(self) -> Environment:
        return Environment(*astuple(self)[: len(fields(Environment))])


COLUMNS = tuple(field.name for field in fields(Row))


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to the file, six significant digits each; the header is written when the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(COLUMNS)
        writer.writerows(
            [f"{value:.6g}" if isinstance(value, float) else value for value in astuple(row)] for row in rows
        )


def read(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        header = tuple(next(reader, ()))
        if header != COLUMNS:
            raise ValueError(
                f"{path} starts with {','.join(header)!r}; a benchmark CSV starts with {','.join(COLUMNS)!r}"
            )
        return [_row(line) for line in reader]


def _row(line: Sequence[str]) -> Row:
    known: dict[str, Any] = dict(zip(COLUMNS, line, strict=True))
    numbers = {"threads": int(known["threads"]), **{column: float(known[column]) for column in ("p20", "p50", "p80")}}
    return Row(**{**known, **numbers})


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    if given := os.environ.get("FASTOPT_COMMIT"):  # for a copy of the tree without its history
        return given
    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    """The model's name; Linux tells it in a file, others through platform."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpu() -> str:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    memory = properties.total_memory / 2**30
    return f"{properties.name}, {properties.multi_processor_count} multiprocessors, {memory:.0f} GiB"


def _driver() -> str:
    """The driver's version, and the CUDA that torch was built for."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        version = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        version = "unknown"
    return f"{version}, CUDA {torch.version.cuda}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
