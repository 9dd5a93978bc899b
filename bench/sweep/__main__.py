"""Builds the kernel sweep with nvcc for the GPU that is there, runs it, and prints which shapes were fastest."""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SOURCE = HERE / "sweep.cu"
DEFAULT_ARCH = "90"
SHOWN = 4


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))


def architecture() -> str:
    """The compute capability of the first GPU, without its point; that of an H200 where none is seen."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError):
        found = []
    return found[0].replace(".", "") if found else DEFAULT_ARCH


def build(folder: Path) -> Path:
    """The program, compiled again only if something it includes is newer."""
    compiler = nvcc()
    if compiler is None:
        raise SystemExit("the sweep needs nvcc: put it on PATH or set CUDA_HOME")
    arch = architecture()
    program = folder / f"sweep-sm_{arch}"
    sources = [SOURCE, *(ROOT / "csrc").rglob("*.h")]
    if program.exists() and program.stat().st_mtime > max(source.stat().st_mtime for source in sources):
        return program
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++20", "-O3", f"-arch=sm_{arch}", "-fmad=false", "--threads=0", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(program)], check=True)
    return program


def run(program: Path, path: Path, seconds: float) -> int:
    """Every row goes to the file as soon as the program has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        child = subprocess.Popen([str(program), f"{seconds:.0f}"], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        for line in child.stdout:
            file.write(line)
            file.flush()
        return child.wait()


def summary(rows: Iterable[dict[str, str]]) -> str:
    """For every chain and way of storing the fastest shapes, and the fastest without arithmetic; then the host's."""
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    host = []
    for row in rows:
        if row["ms_p50"]:
            groups.setdefault((row["mix"], row["chain"]), []).append(row)
        elif row["host_us"]:
            host.append(f"{row['chain']:<28} {row['shape']:<36} {row['host_us']} us")
    text = []
    for (mix, chain), found in groups.items():
        text.append(f"{chain}, {mix}")
        for row in sorted(found, key=lambda row: float(row["ms_p50"]))[:SHOWN]:
            text.append(
                f"  {row['ms_p50']:>9} ms {row['gb_per_s']:>8} GB/s  {row['shape']}, hints {row['hints']}, "
                f"{row['registers']} registers, {row['blocks_per_sm']} blocks"
            )
    return "\n".join([*text, *host])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sweep", description=__doc__)
    parser.add_argument("--csv", type=Path, default=ROOT / "build" / "sweep" / "sweep.csv", help="where rows go")
    parser.add_argument("--seconds", type=float, default=40, help="begin no group after that time (default: 40)")
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("--dry", action="store_true", help="build, do not run: a rehearsal without a GPU")
    options = parser.parse_args(arguments)
    program = build(ROOT / "build" / "sweep")
    if options.build_only or options.dry:
        print(f"built {program}")
        return 0
    status = run(program, options.csv, options.seconds)
    with options.csv.open(encoding="utf-8", newline="") as file:
        print(summary(csv.DictReader(file)))
    if status:
        print(f"the sweep ended with status {status}; the rows before are in {options.csv}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
