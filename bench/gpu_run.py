"""Everything there is to do on a machine with a GPU, within nine minutes: python -m bench.gpu_run FOLDER

Builds the extension in place for this interpreter, runs the GPU tests, the benchmark and the kernel sweep, and leaves
in the folder whatever was obtained: a log for each part, gpu.csv and sweep.csv, the environment, a summary. A part that
overruns its time is stopped, and what one leaves of it is the next one's. A part that fails is reported; the others
still run. Exit status 1 if anything failed. Needs nothing from a network and nothing but the standard library here, so
that it can say what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("build", "tests", "bench", "sweep")
SECONDS = {"build": 110, "tests": 160, "bench": 250, "sweep": 20}
# A test waits for a processor far longer than for the GPU; two processors are left for compilers and the driver.
SHARDS = max(2, min(14, (os.cpu_count() or 8) - 2))
CONTEXT_LOST = 67  # tests/gpu/conftest.py
TAIL = 25


@dataclass
class Process:
    """A command with its output in a file, in a process group of its own: it is stopped with all its children."""

    log: Path
    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    started: float = 0.0

    def start(self) -> Process:
        self.started = time.monotonic()
        file = self.log.open("ab")
        file.write(f"$ {' '.join(self.command)}\n".encode())
        file.flush()
        self.popen = subprocess.Popen(
            list(self.command),
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **self.environment},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_hear_interrupts,
        )
        file.close()
        return self

    def wait(self, until: float) -> int:
        """The exit status; 124 if it had to be stopped. First asked to stop, so that it can report what it has."""
        for number, grace in ((None, until - time.monotonic()), (signal.SIGINT, 8.0), (signal.SIGKILL, 5.0)):
            if number is not None:
                self.signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self.popen.wait(max(0.1, grace))
                return status if number is None else 124
        return 124

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, number)


def _hear_interrupts() -> None:
    """A shell's background jobs ignore them, and so would all their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass
class Outcome:
    part: str
    ok: bool
    seconds: float
    said: str

    def __str__(self) -> str:
        return f"{self.part:<6} {'ok' if self.ok else 'FAILED':<7} {self.seconds:6.1f} s  {self.said}"


class Run:
    def __init__(self, out: Path, seconds: dict[str, float], shards: int, dry: bool) -> None:
        self.out, self.seconds, self.shards, self.dry = out, seconds, shards, dry
        self.begun = time.monotonic()
        self.until = 0.0  # when the last part had to have ended: what it left of its time is the next one's
        self.beside: dict[str, Process] = {}

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.begun:5.0f} s] {text}", flush=True)

    def part(self, name: str) -> Outcome:
        started = time.monotonic()
        steps: dict[str, Callable[[float], tuple[bool, str]]] = {
            "build": self.build,
            "tests": self.tests,
            "bench": self.bench,
            "sweep": self.sweep,
        }
        self.until = (self.until or started) + self.seconds[name]
        self.say(f"{name}: at most {self.until - started:.0f} s")
        try:
            ok, said = steps[name](self.until)
        except Exception as error:
            ok, said = False, f"{type(error).__name__}: {error}"
        outcome = Outcome(name, ok, time.monotonic() - started, said)
        self.say(str(outcome))
        return outcome

    def build(self, until: float) -> tuple[bool, str]:
        """What else must be compiled is compiled beside it: the sweep's program, and kernels of the benchmark that are
        not ours, for the caches on disk."""
        if not self.dry:
            self._begin_beside("sweep", "bench.sweep", "--build-only")
            self._begin_beside("bench", "bench", "gpu", "--warm")
        flags = {"FASTOPT_EXT": "1", "FASTOPT_CUDA": "0" if self.dry else "1"}
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        process = Process(self.out / "build.log", command, flags).start()
        return self._finish(process, until, "fastopt._C is in place")

    def tests(self, until: float) -> tuple[bool, str]:
        """In several processes, for most of their time is the processor's; one that loses its CUDA context is replaced
        by another that takes the tests it had not come to."""
        logs = [self.out / f".tests-{i}.log" for i in range(self.shards)]
        running = {i: self._shard(i, log) for i, log in enumerate(logs)}
        statuses: dict[int, list[int]] = {i: [] for i in running}
        while running and time.monotonic() < until - 10:
            time.sleep(0.2)
            for i, process in list(running.items()):
                status = process.popen.poll()
                if status is None:
                    continue
                statuses[i].append(status)
                del running[i]
                if status == CONTEXT_LOST and len(statuses[i]) < 20 and time.monotonic() < until - 25:
                    running[i] = self._shard(i, logs[i])
        for process in running.values():  # all of them at once, then each its last words
            process.signal(signal.SIGINT)
        for i, process in running.items():
            process.wait(until - 5)
            statuses[i].append(124)
        return self._merged(logs, [s for found in statuses.values() for s in found])

    def _shard(self, i: int, log: Path) -> Process:
        options = [
            "-q",
            "-rfEs",
            "--tb=short",
            "-p",
            "no:cacheprovider",
            "-o",
            "faulthandler_timeout=90",
            "-o",
            "addopts=",
        ]
        environment = {
            # Other people's plugins take seconds to load, and one may break.
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "FASTOPT_SHARD": f"{i + 1}/{self.shards}",
            "FASTOPT_DONE": str(self.out / f".done-{i}"),
            "FASTOPT_REQUIRE_GPU": "0" if self.dry else "1",
        }
        command = [sys.executable, "-m", "pytest", "tests/gpu", *options]
        return Process(log, command, environment).start()

    def _merged(self, logs: Sequence[Path], statuses: Sequence[int]) -> tuple[bool, str]:
        """One log of all; pytest's exit status 5 says that a shard had no test."""
        with (self.out / "tests.log").open("wb") as merged:
            for log in logs:
                merged.write(log.read_bytes())
                log.unlink()
        for done in self.out.glob(".done-*"):
            done.unlink()
        text = (self.out / "tests.log").read_text(encoding="utf-8", errors="replace").splitlines()
        counts = [line for line in text if " in " in line and any(w in line for w in ("passed", "failed", "skipped"))]
        failures = [line for line in text if line.startswith(("FAILED", "ERROR"))]
        for line in failures[:TAIL]:
            print(f"    {line[:220]}")
        lost = sum(status == CONTEXT_LOST for status in statuses)
        stopped = sum(status == 124 for status in statuses)
        said = (
            _summed(counts)
            + (f", {lost} lost the device" if lost else "")
            + (f", {stopped} stopped" if stopped else "")
        )
        return not failures and all(status in (0, 5) for status in statuses), said

    def bench(self, until: float) -> tuple[bool, str]:
        if "bench" in self.beside:
            self.beside["bench"].wait(time.monotonic())
        seconds = until - time.monotonic() - 12
        command = [sys.executable, "-m", "bench", "gpu", f"--out={self.out}", f"--seconds={seconds:.0f}"]
        process = Process(self.out / "bench.log", [*command, *["--dry"] * self.dry]).start()
        return self._finish(process, until - 3, "tables at the end of bench.log")

    def sweep(self, until: float) -> tuple[bool, str]:
        seconds = until - time.monotonic() - 8
        command = [sys.executable, "-m", "bench.sweep", f"--csv={self.out / 'sweep.csv'}", f"--seconds={seconds:.0f}"]
        if "sweep" in self.beside:
            self.beside["sweep"].wait(until - 20)
        process = Process(self.out / "sweep.log", [*command, *["--dry"] * self.dry]).start()
        return self._finish(process, until - 3, "sweep.csv")

    def _begin_beside(self, part: str, *words: str) -> None:
        self.beside[part] = Process(self.out / f"{part}.log", [sys.executable, "-m", *words]).start()

    def _finish(self, process: Process, until: float, said: str) -> tuple[bool, str]:
        """Wait, with a line now and then of what it is doing."""
        told = time.monotonic()
        while process.popen.poll() is None and time.monotonic() < until - 5:
            time.sleep(0.2)
            if time.monotonic() - told > 15:
                told = time.monotonic()
                self.say(f"  ... {_last_line(process.log)[:150]}")
        status = process.wait(until)
        if status == 0:
            return True, said
        for line in _lines(process.log)[-TAIL:]:
            print(f"    {line[:220]}")
        return False, "stopped: it took too long" if status == 124 else f"exit status {status}, see {process.log.name}"


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def _last_line(path: Path) -> str:
    lines = _lines(path)
    return lines[-1] if lines else ""


def _summed(counts: Sequence[str]) -> str:
    """Pytest's last lines, added up: 7 passed, 1 skipped."""
    total: dict[str, int] = {}
    for line in counts:
        for piece in line.strip("= ").split(" in ")[0].split(", "):
            number, _, word = piece.partition(" ")
            if number.isdigit() and word in ("passed", "failed", "skipped", "error", "errors"):
                total[word] = total.get(word, 0) + int(number)
    return ", ".join(f"{number} {word}" for word, number in total.items()) or "no tests ran"


def environment(path: Path) -> None:
    """What this machine is: for whoever reads the figures."""
    script = (
        "import sys, platform, importlib.metadata as m\n"
        "print('python', platform.python_version(), sys.executable)\n"
        "for name in ('torch', 'triton', 'numpy', 'pytest', 'matplotlib', 'ninja', 'torch-optimi'):\n"
        "    try: print(name, m.version(name))\n"
        "    except m.PackageNotFoundError: print(name, 'absent')\n"
        "import torch\n"
        "print('torch', torch.__version__, 'cuda', torch.version.cuda, 'available', torch.cuda.is_available())\n"
        "[print(torch.cuda.get_device_properties(i)) for i in range(torch.cuda.device_count())]\n"
    )
    commands = [
        ["git", "log", "-1", "--format=%H %cI"],
        ["git", "status", "--short"],
        ["nvidia-smi"],
        ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu", "--format=csv"],
        ["nvcc", "--version"],
        ["g++", "--version"],
        [sys.executable, "-c", script],
        ["lscpu"],
    ]
    with path.open("w", encoding="utf-8") as file:
        for command in commands:
            file.write(f"$ {' '.join(command) if len(command[-1]) < 200 else 'versions'}\n")
            try:
                run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
                file.write(run.stdout + run.stderr + "\n")
            except (OSError, subprocess.TimeoutExpired) as error:
                file.write(f"{type(error).__name__}: {error}\n\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_run", description=__doc__)
    parser.add_argument("out", type=Path, help="the folder to leave everything in")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"which of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--shards", type=int, default=SHARDS, help=f"processes of the tests (default: {SHARDS})")
    parser.add_argument("--dry", action="store_true", help="a rehearsal without a GPU: nothing is measured")
    for part, seconds in SECONDS.items():
        parser.add_argument(f"--{part}-seconds", type=float, default=seconds, help=f"default: {seconds}")
    options = parser.parse_args()
    chosen = options.parts.split(",")
    if unknown := set(chosen) - set(PARTS):
        parser.error(
            f"--parts={options.parts}: there is no {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}"
        )
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in ("build.log", "tests.log", "bench.log", "sweep.log", "gpu.csv", "sweep.csv"):
        (out / name).unlink(missing_ok=True)
    run = Run(out, {part: getattr(options, f"{part}_seconds") for part in PARTS}, options.shards, options.dry)
    if not options.dry and shutil.which("nvidia-smi") is None:
        run.say("no nvidia-smi here: is there a GPU? `--dry` rehearses without one")
    environment(out / "environment.txt")
    outcomes = [run.part(name) for name in PARTS if name in chosen]
    summary = "\n".join(map(str, outcomes))
    (out / "summary.txt").write_text(summary + "\n", encoding="utf-8")
    print(f"\n{summary}\nin {out}: {', '.join(sorted(path.name for path in out.iterdir()))}", flush=True)
    return 0 if all(outcome.ok for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
