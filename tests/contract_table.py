"""The contract as a table: what each optimizer keeps of it on each backend. A pytest plugin, enabled in conftest.py.

A test names the items it belongs to; its parameters say for which optimizer and backend. What they do not say may be
said in the marker, of which the one nearest to the test counts:

    pytestmark = pytest.mark.contract("schedulers")
    @pytest.mark.contract("numbers", "live", optimizers="all", backend="native")
    @pytest.mark.contract("checkpoints", difference="shapes of loaded states")  # a section of docs/differences.md

`--contract-table FILE` writes the table of a run. Processes of pytest that tests start add to it.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import TORCH_NAMES, Case

import fastopt

DIFFERENCES = Path(__file__).resolve().parents[1] / "docs" / "differences.md"
NOTES = "FASTOPT_CONTRACT_NOTES"  # the folder where a process of pytest within a test leaves its outcomes
ANY = "any"
RESULTS = pytest.StashKey["Results"]()


@dataclass(frozen=True)
class Item:
    """`gaps` says why a table may have nothing here for an optimizer."""

    key: str
    title: str
    promise: str
    page: str = ""
    gaps: str = ""


ITEMS = (
    Item(
        "numbers",
        "Numbers",
        "Parameters and every state equal torch.optim's for-loop bit for bit: all sizes, layouts, hyper-parameters, "
        "special values, numbers of steps and threads.",
        "numbers.md",
    ),
    Item(
        "low precision",
        "bfloat16, float16",
        "Computed in float32 and rounded once.",
        "numbers.md#low-precision",
    ),
    Item(
        "construction",
        "Constructor and errors",
        "Signatures, defaults, keys of param groups; what torch refuses is refused with torch's error and text, "
        "torch's own database of errors included; flags mean what they mean in torch.",
    ),
    Item(
        "database",
        "torch's own tests",
        "Every input of torch's database of optimizers (`optim_db`) through what torch's test suite asserts.",
    ),
    Item(
        "state",
        "State and checkpoints",
        "torch's keys, order, dtypes and strides; checkpoints load in both directions in mid-run, keep every dtype, "
        "and continue to the same bits, those of earlier versions too.",
        "checkpoints.md",
    ),
    Item(
        "import",
        "Changing over in mid-run",
        "`convert` from a live torch optimizer, `import_state` from checkpoints of other libraries.",
        "checkpoints.md",
        "torch has no Lookahead to convert from; checkpoints are imported where no backend is named",
    ),
    Item(
        "live",
        "Changes between steps",
        "Whatever is now in groups, state, `.data` and `.grad` is what the next step uses: hyper-parameters, tensors "
        "exchanged, moved or cast, parameters and groups added, removed and replaced, gradients absent or late.",
    ),
    Item(
        "schedulers",
        "Schedulers, SWA, EMA",
        "Every scheduler of torch.optim.lr_scheduler, those that cycle momentum included; AveragedModel, SWALR.",
    ),
    Item(
        "amp",
        "GradScaler, clipping",
        "Unscaling, overflows, growth, clipping in between, autocast; unscaled in the kernel exactly where "
        "`fused=True` was asked for.",
    ),
    Item(
        "hooks",
        "Hooks, closures, compile",
        "All kinds of hooks fire once and in order; closures; names in the profiler; a training step under "
        "torch.compile.",
    ),
    Item(
        "wrappers",
        "Trainers, copies, threads",
        "Accelerate, Lightning, Hugging Face's Trainer, and what DeepSpeed and others do to an optimizer; deepcopy, "
        "pickle; threads, fork and spawn.",
    ),
    Item(
        "layouts",
        "Layouts, mixed dtypes",
        "Strided, expanded, misaligned, shared and lazy tensors; gradients and states of another dtype than the "
        "parameter's; several dtypes in one group.",
    ),
    Item(
        "fallback",
        "What torch's code does",
        "Sparse and complex gradients, `differentiable=True`, meta and fake tensors, subclasses: torch's own numbers "
        "and errors, parameter by parameter.",
        "backends.md",
    ),
    Item(
        "device",
        "Steps counted on a device",
        "`capturable=True` and `fused=True`: nothing read back, the same numbers, one launch for all groups.",
        "gpu.md",
        "on a CPU only the emulated device and Triton's interpreter have this",
    ),
    Item(
        "distributed",
        "DTensor, FSDP2, DDP, ZeRO",
        "Two processes: sharded parameters step through their local tensors to the bits of one process; distributed "
        "checkpoints resume and reshard; gradients as views of buckets.",
    ),
    Item(
        "lookahead",
        "Lookahead",
        "The paper's numbers around any optimizer, ours or torch's, and all that a real optimizer must do.",
        "optimizers/lookahead.md",
        "tests of Lookahead alone, the inner optimizer whatever it is",
    ),
    Item(
        "ranger",
        "Ranger",
        "The published optimizer without its published faults.",
        "optimizers/ranger.md",
        "tests of Ranger alone",
    ),
    Item(
        "faults",
        "torch's faults are absent",
        "Each silent fault of torch's fused optimizers is shown in torch, and that it is not here.",
        "differences.md#faults-of-torch-that-are-not-reproduced",
        "the faults are those of optimizers with `fused=True` or `capturable=True`; Lookahead has neither of its own",
    ),
    Item(
        "fuzz",
        "Random programs",
        "Random shapes, groups, gradients, hyper-parameters, edits, checkpoints and copies, compared after every step "
        "with torch: one test is 150 programs that draw from all optimizers and backends, one is 100 on Triton's "
        "interpreter (`make fuzz` runs ten thousand and one thousand), the others are programs that once failed.",
    ),
    Item(
        "memory",
        "Memory",
        "Steps allocate nothing, nothing grows or is kept alive; a step that fails, for want of memory too, "
        "changes nothing.",
    ),
)
BY_KEY = {item.key: item for item in ITEMS}
BACKENDS = {
    "native": ("Native", "The C++ kernels on the CPU."),
    "reference": ("Reference", "The same rules as torch code."),
    "emulated": ("Emulated", "The CUDA kernels' source, run lane by lane on the CPU."),
    "triton": (
        "Triton",
        "The Triton kernels in its interpreter on the CPU, which is slow: all optimizers' numbers, the rest for some.",
    ),
    ANY: (
        "No backend named",
        "Tests that name none: what does not depend on it, or whatever is chosen by default.",
    ),
}
UNCONCERNED = {"square-roots": {"SGD"}}  # by a difference that a test for all optimizers asserts: it takes no root


def optimizers() -> list[str]:
    """The columns: torch's order, then what torch does not have."""
    values = {name: getattr(fastopt, name) for name in fastopt.__all__}
    public = {n for n, value in values.items() if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)}
    return [*TORCH_NAMES, *sorted(public - {*TORCH_NAMES})]


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def differences() -> dict[str, str]:
    """The sections of docs/differences.md by their anchors."""
    headings = [line[3:] for line in DIFFERENCES.read_text().splitlines() if line.startswith("## ")]
    return {anchor(heading): heading for heading in headings}


@dataclass(frozen=True)
class Placed:
    """Where in the tables a test counts."""

    items: Sequence[str]
    optimizers: Sequence[str]
    backends: Sequence[str]
    differences: Sequence[str] = ()

    def cells(self) -> Iterator[tuple[str, str, str]]:
        return ((b, i, o) for b in self.backends for i in self.items for o in self.optimizers)


def place(marker: pytest.Mark, params: dict[str, Any], test_id: str) -> Placed:
    """Raises ValueError for what does not exist."""
    given = dict(marker.kwargs)
    names, backend, difference = (given.pop(key, None) for key in ("optimizers", "backend", "difference"))
    if given or not marker.args:
        raise ValueError(f"contract{marker.args}{given or ''}: items, optimizers=, backend=, difference=")
    placed = Placed(
        marker.args,
        _optimizers(params, test_id) if names is None else _listed(names, optimizers()),
        [params.get("backend", ANY)] if backend is None else _listed(backend, _here()),
        [anchor(text) for text in _listed(difference or (), [])],
    )
    for what, used, known in (
        ("item", placed.items, BY_KEY),
        ("optimizer", placed.optimizers, [*optimizers(), ANY]),
        ("backend", placed.backends, BACKENDS),
        ("difference", placed.differences, differences()),
    ):
        if unknown := [name for name in used if name not in known]:
            raise ValueError(f"unknown {what} {unknown[0]!r}; there are {', '.join(map(repr, known))}")
    return placed


def _listed(given: str | Iterable[str], everything: list[str]) -> list[str]:
    if given == "all":
        return everything
    return [given] if isinstance(given, str) else list(given)


def _here() -> list[str]:
    """The backends that a test which goes through all of them meets."""
    return [name for name in ("native", "reference", "emulated") if fastopt.backends.available(name)]


def _optimizers(params: dict[str, Any], test_id: str) -> list[str]:
    """Of the cases among the parameters, else of the words of the test's id, such as sgd-momentum-native."""
    cases = [value for value in params.values() if isinstance(value, Case)]
    words = {case.name for case in cases} | {"Lookahead" for case in cases if case.lookahead}
    words = {word.lower() for word in words or test_id.split("-")}
    return [name for name in optimizers() if name.lower() in words] or [ANY]


@dataclass
class Cell:
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    differences: set[str] = field(default_factory=set)

    def text(self, numbers: dict[str, int]) -> str:
        if self.failed:
            return f"**FAILED** ({self.failed})"
        if not self.passed:
            return "skipped" if self.skipped else "–"
        links = ", ".join(f"[{n}]" for n in sorted(numbers[d] for d in self.differences))
        return f"{self.passed}{'*' if self.skipped else ''}{f' <sup>{links}</sup>' if links else ''}"


@dataclass
class Results:
    """What became of the tests, by their ids."""

    placed: dict[str, Placed] = field(default_factory=dict)
    outcomes: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def note(self, test: str, placed: Placed | None, outcome: str, reason: str = "") -> None:
        """One of the reports on a test: setup, call, teardown. Failed outweighs skipped, which outweighs passed."""
        if placed:
            self.placed[test] = placed
        if placed or outcome == "failed":
            both = (outcome, self.outcomes.get(test))
            self.outcomes[test] = next(o for o in ("failed", "skipped", "passed") if o in both)
        if reason:
            self.reasons[test] = reason

    def cells(self) -> dict[tuple[str, str, str], Cell]:
        found: dict[tuple[str, str, str], Cell] = defaultdict(Cell)
        for test, placed in self.placed.items():
            outcome = self.outcomes[test]
            for key in placed.cells():
                setattr(found[key], outcome, getattr(found[key], outcome) + 1)
                if outcome == "passed":
                    found[key].differences.update(d for d in placed.differences if key[2] not in UNCONCERNED.get(d, ()))
        return found

    def dump(self) -> str:
        return json.dumps(
            [
                (test, test in self.placed and asdict(self.placed[test]), outcome, self.reasons.get(test, ""))
                for test, outcome in self.outcomes.items()
            ]
        )

    def add(self, dumped: str, process: str) -> None:
        for test, placed, outcome, reason in json.loads(dumped):
            self.note(f"{process} {test}", Placed(**placed) if placed else None, outcome, reason)


def render(results: Results) -> str:
    numbers = {key: n for n, key in enumerate(differences(), 1)}
    parts = [HEAD, *_tables(results, numbers), _items(), _differences(results, numbers), _skips(results)]
    failed = sorted(test for test, outcome in results.outcomes.items() if outcome == "failed")
    if failed:
        parts.insert(1, "**FAILED:**\n\n" + "\n".join(f"- `{test}`" for test in failed))
    return "\n\n".join(part for part in parts if part) + "\n"


HEAD = """\
# The contract, tested

Written by `make contract`, which runs these tests (`pytest -m contract`). A number counts the tests that passed: one
parametrisation is one test, and a test may count for several optimizers. A raised number leads to a deliberate
[difference from torch](differences.md) that some of these tests assert; * means that others were skipped, and
[why](#skipped).

AMSGrad counts as Adam or AdamW, an optimizer inside Lookahead for both. The column *any* has what does not depend on
the optimizer. An empty cell (–) has no test of its own: what does not depend on the backend is tested on one of them,
or where none is named; why an item leaves out an optimizer is said [below](#items). Tests on a GPU (`make gpu`) are not
among these."""


def _tables(results: Results, numbers: dict[str, int]) -> Iterator[str]:
    cells, columns = results.cells(), [ANY, *optimizers()]
    for backend, (title, text) in BACKENDS.items():
        present = {key[1] for key in cells if key[0] == backend}
        rows = [
            [item.title, *(cells.get((backend, item.key, column), Cell()).text(numbers) for column in columns)]
            for item in ITEMS
            if item.key in present
        ]
        absent = [item.title for item in ITEMS if item.key not in present]
        yield f"## {title}\n\n{text}"
        if rows:
            yield _table(["", *columns], rows)
        if absent:
            yield "Nothing here: " + "; ".join(absent) + "."


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def _items() -> str:
    lines = []
    for item in ITEMS:
        more = f" [More]({item.page})" if item.page else ""
        gaps = f" Empty cells: {item.gaps}." if item.gaps else ""
        lines.append(f"- **{item.title}.** {item.promise}{more}{gaps}")
    return "## Items\n\n" + "\n".join(lines)


def _differences(results: Results, numbers: dict[str, int]) -> str:
    tests = Counter(
        d for test, p in results.placed.items() if results.outcomes[test] == "passed" for d in set(p.differences)
    )
    lines = [
        f"{numbers[key]}. [{title}](differences.md#{key}), asserted by {tests[key]} test{'s' * (tests[key] != 1)}"
        for key, title in differences().items()
    ]
    links = [f"[{n}]: differences.md#{key}" for key, n in numbers.items()]
    return "## Deliberate differences\n\n" + "\n".join(lines) + "\n\n" + "\n".join(links)


def _skips(results: Results) -> str:
    counts = Counter(
        (results.reasons.get(test, "no reason given"), item)
        for test, placed in results.placed.items()
        if results.outcomes[test] == "skipped"
        for item in placed.items
    )
    reasons: dict[str, list[str]] = defaultdict(list)
    for (reason, item), n in sorted(counts.items()):
        reasons[reason].append(f"{n} of {BY_KEY[item].title}")
    lines = [f"- {reason}: {', '.join(where)}" for reason, where in reasons.items()] or ["Nothing."]
    return "## Skipped\n\n" + "\n".join(lines)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--contract-table", metavar="FILE", help="write the table of the contract")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "contract(*items, optimizers=, backend=, difference=): see contract_table.py")
    if hasattr(config, "workerinput"):  # the controller gets the reports too
        return
    if config.option.contract_table:
        folder = tempfile.TemporaryDirectory()
        before = os.environ.get(NOTES)
        os.environ[NOTES] = folder.name
        config.add_cleanup(folder.cleanup)
        config.add_cleanup(lambda: os.environ.pop(NOTES) if before is None else os.environ.update({NOTES: before}))
    if NOTES in os.environ:
        config.stash[RESULTS] = Results()
        config.pluginmanager.register(_Recorder(config))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if marker := item.get_closest_marker("contract"):
            call = getattr(item, "callspec", None)
            try:
                placed = place(marker, call.params if call else {}, call.id if call else "")
            except ValueError as error:
                raise pytest.UsageError(f"{item.nodeid}: {error}") from None
            item.user_properties.append(("contract", asdict(placed)))


class _Recorder:
    def __init__(self, config: pytest.Config) -> None:
        self.config, self.results = config, config.stash[RESULTS]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        placed = dict(report.user_properties).get("contract")
        reason = ""
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        self.results.note(
            report.nodeid, Placed(**placed) if placed else None, report.outcome, reason.removeprefix("Skipped: ")
        )

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:  # the tests of that module are missing
            self.results.note(report.nodeid, None, report.outcome)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            return  # interrupted, or nothing ran
        notes, path = Path(os.environ[NOTES]), self.config.option.contract_table
        if not path:
            (notes / str(os.getpid())).write_text(self.results.dump())
            return
        for file in sorted(notes.iterdir()):
            self.results.add(file.read_text(), file.name)
        Path(path).write_text(render(self.results))
