"""Is this tree slower than another commit? Both are built, raced in turns, and what is beyond the noise is flagged.

Each tree works in a process of its own, for one process can import only one fastopt; they take turns within every
round, this tree's a second time as well: how far a tree differs from itself is the noise. All run this tree's cases and
this tree's `bench`; from the other commit only the package `fastopt` is taken, built as it builds itself.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

import fastopt
from bench.cases import MEDIUM, SMALL, TINY, Case, Workload, tensors
from bench.contenders import OURS, ours
from bench.race import Samples, Spread, race
from bench.records import ROOT
from bench.rules import RULES
from bench.tables import table
from bench.workload import OptimizerRunner, Tensors

NEW, AGAIN, OLD = "this tree", "this tree again", "the other commit"

CASES = (
    Case("adam 1000x64", "commits", "1000x64", TINY, "none"),
    Case("adam 1000x1000", "commits", "1000x1,000", SMALL, "none"),
    Case("adam 1000x50,000", "commits", "1000x50,000", MEDIUM, "none"),
    Case("adam 400 groups", "commits", "400 groups of 2x64", Workload(tensors(800, 64), 400, 28), "none"),
    Case("ranger 1000x64", "commits", "1000x64", TINY, "none", RULES["Ranger"], steps_per_round=6),
    Case("rmsprop 10x1,000,000", "commits", "10x1,000,000", Workload(tensors(10, 1_000_000)), "none", RULES["RMSprop"]),
)
QUICK = ("adam 1000x64", "adam 400 groups", "ranger 1000x64")


@dataclass(frozen=True)
class Outcome:
    """Times of the other tree's and of this tree's own second process, in units of this tree's, round by round."""

    case: Case
    seconds: Spread
    change: Spread
    noise: Spread

    @classmethod
    def of(cls, case: Case, samples: Samples) -> Outcome:
        return cls(case, samples.time(NEW), samples.ratio(NEW, OLD), samples.ratio(NEW, AGAIN))

    @property
    def slower(self) -> bool:
        """In most rounds by more than two processes of the same tree differ in most rounds, in either direction."""
        return self.change.p20 > max(self.noise.p80, 1 / self.noise.p20)

    @property
    def faster(self) -> bool:
        return self.change.p80 < min(self.noise.p20, 1 / self.noise.p80)

    @property
    def verdict(self) -> str:
        return "**slower**" if self.slower else "faster" if self.faster else "within the noise"


class Worker:
    """A tree's process, as a contender of a race. It times its own turns: what the pipe costs is not in them."""

    def __init__(self, label: str, package: Path, threads: int) -> None:
        self.label = label
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package), str(ROOT)])}
        command = [sys.executable, "-P", "-m", "bench.commits", str(threads), str(package)]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **request: object) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process of {self.label} ended with {self._process.wait()}; its errors are above")
        return float(answer)

    def close(self) -> None:
        self._process.stdin and self._process.stdin.close()
        self._process.wait(30)


def compare(revision: str, quick: bool, threads: int, seconds: float | None = None) -> list[Outcome]:
    """Build `revision`, race it. Raises RuntimeError where it is not known or cannot be built."""
    package = _checkout(revision, ROOT / "build" / "commits")
    cases = [case for case in CASES if not quick or case.name in QUICK]
    return [_race(case, package, threads, seconds or (4.0 if quick else 12.0)) for case in cases]


def _race(case: Case, package: Path, threads: int, seconds: float) -> Outcome:
    with ExitStack() as stack:
        workers = []
        for label, path in ((NEW, ROOT), (OLD, package), (AGAIN, ROOT)):
            worker = Worker(label, path, threads)
            stack.callback(worker.close)
            worker.ask(case=case.name)
            workers.append(worker)

        def turn(runner: Worker, first_step: int, steps: int) -> float:
            return runner.ask(step=first_step, steps=steps)

        samples = race(workers, seconds=seconds, steps_per_round=case.steps_per_round, turn=turn)
        return Outcome.of(case, samples)


def _checkout(revision: str, folder: Path) -> Path:
    """A folder with the commit's package, its extension built; kept for the next time."""
    asked = subprocess.run(["git", "rev-parse", "--short=12", f"{revision}^{{commit}}"], cwd=ROOT, capture_output=True,
                           text=True)  # fmt: skip
    if asked.returncode:
        raise RuntimeError(f"{revision!r} is no commit of this repository: {asked.stderr.strip()}")
    tree = folder / asked.stdout.strip() / "tree"
    if not tree.exists():
        archive = subprocess.run(["git", "archive", asked.stdout.strip()], cwd=ROOT, capture_output=True, check=True)
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
            files.extractall(tree, filter="data")
        (tree.parent / "fastopt").symlink_to(tree / "fastopt")  # alone in its folder: `bench` is this tree's
    print(f"building {revision} ({tree.parent.name})", file=sys.stderr, flush=True)
    environment = {**os.environ, "FASTOPT_EXT": "1", "FASTOPT_CUDA": "0", "FASTOPT_EMULATOR": "0"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    built = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if built.returncode:
        raise RuntimeError(f"{revision} cannot be built: {built.stdout[-1000:]}{built.stderr[-3000:]}")
    return tree.parent


def markdown(outcomes: Sequence[Outcome], revision: str) -> str:
    return table(
        f"This tree beside {revision}: its time in units of the other's",
        [
            {
                "rule": outcome.case.kind.label,
                "tensors": outcome.case.size,
                "time": f"{outcome.seconds.p50 * 1e6:,.0f} µs",
                "change": _spread(outcome.change),
                "noise": _spread(outcome.noise),
                "": outcome.verdict,
            }
            for outcome in outcomes
        ],
    )


def _spread(value: Spread) -> str:
    return f"{value.p50:.2f} ({value.p20:.2f}–{value.p80:.2f})"


@contextmanager
def _answers() -> Iterator[IO[str]]:
    """Standard output for answers alone; whatever else is printed goes to standard error."""
    answers, sys.stdout = sys.stdout, sys.stderr
    try:
        yield answers
    finally:
        sys.stdout = answers


def work(requests: IO[str]) -> None:
    """A worker's own process: a request a line, an answer a line."""
    runner: OptimizerRunner | None = None
    with _answers() as answers:
        for line in requests:
            request = json.loads(line)
            if "case" in request:
                case = next(case for case in CASES if case.name == request["case"])
                runner = OptimizerRunner(ours(case.kind.name, case.hyper, OURS), Tensors(case.workload))
                seconds = 0.0
            else:
                assert runner is not None
                first, steps = request["step"], request["steps"]
                once = race([runner], seconds=0, least_rounds=1, warm_up=0, steps_per_round=steps, first_step=first)
                seconds = once.time(OURS).p50
            print(repr(seconds), file=answers, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    if Path(fastopt.__file__).parent.parent != Path(sys.argv[2]):
        sys.exit(f"fastopt was to come from {sys.argv[2]}, and came from {fastopt.__file__}")
    work(sys.stdin)
