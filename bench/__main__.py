"""`cpu` measures on this machine's CPU, `gpu` on its GPU, `compare` this tree against another commit; `report` turns
the records into the tables and plots of README and docs."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import commits, gpu
from bench.cpu import Job, UnableError, jobs
from bench.cpu_tables import markdown
from bench.gpu_tables import gpu_markdown
from bench.records import ROOT, Environment, Row, append
from bench.report import pages, write
from bench.tables import headline

RESULTS = ROOT / "bench" / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    return int(options.command(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="cpu | gpu | compare | report")
    cpu = commands.add_parser("cpu", help="race on the CPU; print the tables and append to the CSV")
    cpu.add_argument(
        "--quick",
        action="store_true",
        help="a smoke: small tensors, few rounds, nothing recorded unless --csv is given",
    )
    cpu.add_argument(
        "--only",
        metavar="PATTERN",
        help="cases whose name begins so, shell patterns and several of them allowed: 'adam', '*1x50;groups'",
    )
    cpu.add_argument("--csv", type=Path, help="where to append (default: bench/results/cpu.csv)")
    cpu.add_argument("--no-csv", action="store_true", help="print only")
    cpu.add_argument("--threads", type=int, default=2, help="threads torch and fastopt may use (default: 2)")
    cpu.set_defaults(command=_cpu)
    on_gpu = commands.add_parser("gpu", help="race on the GPU; print the tables and append to the CSV")
    on_gpu.add_argument("--only", metavar="PATTERN", help="as for cpu")
    on_gpu.add_argument("--out", type=Path, default=RESULTS, help="the folder of gpu.csv (default: bench/results)")
    on_gpu.add_argument("--seconds", type=float, default=600, help="begin no case that would end later (default: 600)")
    on_gpu.add_argument("--no-csv", action="store_true", help="print only")
    on_gpu.add_argument("--dry", action="store_true", help="a rehearsal on small CPU tensors; records nothing")
    on_gpu.add_argument(
        "--warm", action="store_true", help="only compile the ceilings' kernels and the compiled rivals"
    )
    on_gpu.add_argument("--after", metavar="CASE", help="go on after this case: how a run restarts itself")
    on_gpu.add_argument("--failed", action="append", default=[], metavar="CASE", help="failed before the restart")
    on_gpu.set_defaults(command=_gpu)
    compared = commands.add_parser("compare", help="race this tree against another commit; 1 if this one is slower")
    compared.add_argument("revision", nargs="?", default="HEAD", help="a commit, as git spells it (default: HEAD)")
    compared.add_argument("--quick", action="store_true", help="a smoke of two minutes, most of it building")
    compared.add_argument("--report-only", action="store_true", help="say what is slower, and end with 0 all the same")
    compared.add_argument("--threads", type=int, default=2, help="threads that each may use (default: 2)")
    compared.set_defaults(command=_compare)
    report = commands.add_parser("report", help="write the tables of the CSVs into README and docs, and the plots")
    report.add_argument("--csv", type=Path, default=RESULTS / "cpu.csv")
    report.add_argument("--gpu-csv", type=Path, default=RESULTS / "gpu.csv")
    report.add_argument("--root", type=Path, default=ROOT, help="where README.md and docs/ are")
    report.add_argument("--plots", type=Path, default=RESULTS, help="the folder of the plots (default: bench/results)")
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


def _gpu(options: argparse.Namespace) -> int:
    begun = time.perf_counter()
    if not options.dry and not torch.cuda.is_available():
        print("torch sees no CUDA device; `python -m bench gpu --dry` rehearses without one", file=sys.stderr)
        return 2
    if options.warm:
        gpu.warm()
        return 0
    selected = gpu.jobs(options.only, options.dry)
    names = [job.name for job in selected]
    if options.after in names:  # the ceilings are measured again: shares are of the process's own
        selected = [
            job for job in selected if job.name == gpu.CEILINGS or names.index(job.name) > names.index(options.after)
        ]
    environment = Environment.of_this_machine(gpu=not options.dry)
    csv = None if options.dry or options.no_csv else options.out / "gpu.csv"
    try:
        rows, failed = _run(selected, environment, csv, options.seconds)
    except gpu.ContextLostError as error:
        return _restart(options, str(error), options.seconds - (time.perf_counter() - begun))
    if options.dry:
        print(f"a rehearsal: {len(rows)} rows of {len({row.case for row in rows})} cases, none of them a measurement")
    else:
        print(gpu_markdown(rows))
    failed = [*options.failed, *failed]
    for name in failed:
        print(f"failed, see above: {name}", file=sys.stderr)
    return 1 if failed else 0


def _restart(options: argparse.Namespace, case: str, seconds: float) -> int:
    """In a process of its own, with a CUDA context that works, after the case that lost this one's."""
    kept = [f"--out={options.out}", *(["--only", options.only] if options.only else []), *["--no-csv"] * options.no_csv]
    failed = [f"--failed={name}" for name in (*options.failed, case)]
    print(f"{case} lost the CUDA context; going on after it in a new process", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "bench", "gpu", *kept, *failed, f"--after={case}", f"--seconds={seconds:.0f}"]
    os.execv(sys.executable, command)


def _run(
    selected: Sequence[Job], environment: Environment, csv: Path | None, seconds: float = math.inf
) -> tuple[list[Row], list[str]]:
    """Every job in turn, recorded as soon as it is done; a job that fails is reported and the others still run."""
    rows: list[Row] = []
    failed: list[str] = []
    begun = time.perf_counter()
    kept = sum(job.seconds for job in selected if job.last)
    for number, job in enumerate(selected, 1):
        if time.perf_counter() - begun + job.seconds > seconds - (0 if job.last else kept):
            print(f"[{number}/{len(selected)}] {job.name}: left out, no time", file=sys.stderr, flush=True)
            continue
        try:
            measurements = job.run()
        except gpu.ContextLostError as error:
            traceback.print_exc()
            raise gpu.ContextLostError(job.name) from error
        except UnableError as error:
            print(f"{job.name}: {error}", file=sys.stderr)
            failed.append(job.name)
            measurements = error.measured
        except Exception:
            traceback.print_exc()
            failed.append(job.name)
            continue
        measured = [Row.of(environment, job.name, *measurement) for measurement in measurements]
        rows += measured
        if csv:
            append(csv, measured)
        elapsed = time.perf_counter() - begun
        said = headline(measured, job.shown)
        print(f"[{number}/{len(selected)}, {elapsed:.0f} s] {job.name}: {said}", file=sys.stderr, flush=True)
    return rows, failed


def _compare(options: argparse.Namespace) -> int:
    _warn_of_company()
    try:
        outcomes = commits.compare(options.revision, options.quick, options.threads)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    print(commits.markdown(outcomes, options.revision))
    return int(any(outcome.slower for outcome in outcomes) and not options.report_only)


def _report(options: argparse.Namespace) -> int:
    if not options.csv.exists():
        print(
            f"{options.csv} does not exist: run `python -m bench cpu` first, or name another file with --csv",
            file=sys.stderr,
        )
        return 2
    for path in write(options.csv, options.gpu_csv, pages(options.root), options.plots):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
