"""`cpu` measures on this machine's CPU; `report` turns the records into the README's tables and a plot."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.cpu import Job, jobs
from bench.records import ROOT, Environment, Row, append
from bench.report import write
from bench.tables import headline, markdown

RESULTS = ROOT / "bench" / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    return int(options.command(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="cpu | report")
    cpu = commands.add_parser("cpu", help="race on the CPU; print the tables and append to the CSV")
    cpu.add_argument(
        "--quick",
        action="store_true",
        help="a smoke: small tensors, few rounds, nothing recorded unless --csv is given",
    )
    cpu.add_argument(
        "--only", metavar="PATTERN", help="cases whose name begins so, shell patterns allowed: 'adam', '*1x50'"
    )
    cpu.add_argument("--csv", type=Path, help="where to append (default: bench/results/cpu.csv)")
    cpu.add_argument("--no-csv", action="store_true", help="print only")
    cpu.add_argument("--threads", type=int, default=2, help="threads torch and fastopt may use (default: 2)")
    cpu.set_defaults(command=_cpu)
    report = commands.add_parser("report", help="write the tables of the CSV into the README, and the plot")
    report.add_argument("--csv", type=Path, default=RESULTS / "cpu.csv")
    report.add_argument("--readme", type=Path, default=ROOT / "README.md")
    report.add_argument("--plot", type=Path, default=RESULTS / "cpu.png")
    report.set_defaults(command=_report)
    return parser


def _cpu(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    environment = Environment.of_this_machine()
    selected = jobs(options.only, options.quick)
    if not selected:
        names = ", ".join(job.name for job in jobs(quick=options.quick))
        print(f"no case matches {options.only!r}; the cases are: {names}", file=sys.stderr)
        return 2
    _warn_of_company()
    csv = None if options.no_csv else options.csv or (None if options.quick else RESULTS / "cpu.csv")
    rows, failed = _run(selected, environment, csv)
    print(markdown(rows))
    for name in failed:
        print(f"failed, see above: {name}", file=sys.stderr)
    return 1 if failed else 0


def _warn_of_company() -> None:
    """Interleaving makes median ratios robust against other work on the machine; not times, and not the spread."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        print(
            f"the machine is busy with something else (load average {load:.1f}): expect slower times and a wide spread",
            file=sys.stderr,
        )


def _run(selected: Sequence[Job], environment: Environment, csv: Path | None) -> tuple[list[Row], list[str]]:
    """Every job in turn, recorded as soon as it is done; a job that fails is reported and the others still run."""
    rows: list[Row] = []
    failed: list[str] = []
    begun = time.perf_counter()
    for number, job in enumerate(selected, 1):
        try:
            measured = [Row.of(environment, job.name, *measurement) for measurement in job.run()]
        except Exception:
            traceback.print_exc()
            failed.append(job.name)
            continue
        rows += measured
        if csv:
            append(csv, measured)
        elapsed = time.perf_counter() - begun
        print(
            f"[{number}/{len(selected)}, {elapsed:.0f} s] {job.name}: {headline(measured)}", file=sys.stderr, flush=True
        )
    return rows, failed


def _report(options: argparse.Namespace) -> int:
    if not options.csv.exists():
        print(
            f"{options.csv} does not exist: run `python -m bench cpu` first, or name another file with --csv",
            file=sys.stderr,
        )
        return 2
    write(options.csv, options.readme, options.plot)
    print(f"wrote the tables into {options.readme} and the plot {options.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
