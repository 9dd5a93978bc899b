"""The plugin that writes docs/contract.md, and that the page is not older than what it is about."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import contract_table
import pytest
from contract_table import ANY, BACKENDS, ITEMS, NOTES, Placed, Results, optimizers

pytest_plugins = ["pytester"]
HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "contract.md"
Run = Callable[..., tuple[pytest.RunResult, str]]


def rows(text: str, backend: str) -> dict[str, dict[str, str]]:
    """A backend's table: title of the item -> optimizer -> cell."""
    section = text.split(f"## {BACKENDS[backend][0]}\n")[1].split("\n## ")[0]
    header, _, *lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"
    ] or [[], []]
    return {line[0]: dict(zip(header, line, strict=True)) for line in lines}


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.delenv(NOTES, raising=False)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parent)]))

    def with_options(code: str, *options: str) -> tuple[pytest.RunResult, str]:
        pytester.makepyfile(f"import os, sys, pytest\nfrom cases import CASES, by_id\nmark = pytest.mark\n{code}")
        run = pytester.runpytest_subprocess if options else pytester.runpytest_inprocess
        result = run("-p", "contract_table", "--contract-table", "table.md", *options)
        page = pytester.path / "table.md"
        return result, page.read_text() if page.exists() else ""

    return with_options


SUITE = """
pytestmark = mark.contract("numbers")

@mark.parametrize("backend", ["native", "reference"])
@mark.parametrize("case", by_id("sgd", "adam-amsgrad", "lookahead-radam"), ids=lambda c: c.id)
def test_cases(case, backend): pass

@mark.contract("amp", "hooks", difference="low precision")
@mark.parametrize("name", ["AdamW", "adamw-fused"])
def test_names(name): pass

@mark.contract("state", optimizers="all", backend="native")
def test_all(): pass

@mark.contract("live", backend="native")
def test_neither(): pass

@mark.contract("live", backend="native")
def test_fails(): assert False

@mark.contract("memory", backend="native")
@mark.parametrize("name", ["SGD", "Adam"])
def test_skips(name):
    if name == "Adam": pytest.skip("no memory")

@mark.contract("fuzz", backend="native")
@mark.parametrize("name", ["SGD", "Adam"])
@mark.skip(reason="no dice")
def test_skipped_by_a_mark(name): pass

@pytest.fixture
def broken():
    yield
    assert False

@mark.contract("schedulers", backend="native", optimizers="Ranger")
def test_whose_end_fails(broken): pass
"""


def assert_suite(result: pytest.RunResult, page: str) -> None:
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    native, named = rows(page, "native"), rows(page, ANY)
    numbers = native["Numbers"]
    assert [o for o, cell in numbers.items() if cell == "1"] == ["SGD", "Adam", "RAdam", "Lookahead"]
    assert set(rows(page, "reference")["Numbers"].values()) == {"Numbers", "1", "–"}
    assert list(numbers) == ["", ANY, *optimizers()]
    assert named["GradScaler, clipping"]["AdamW"] == named["Hooks, closures, compile"]["AdamW"] == "2 <sup>[2]</sup>"
    assert "\n[2]: differences.md#low-precision\n" in page
    assert "2. [Low precision](differences.md#low-precision), asserted by 2 tests\n" in page
    assert {native["State and checkpoints"][o] for o in optimizers()} == {"1"}
    assert native["State and checkpoints"][ANY] == "–"
    assert native["Changes between steps"][ANY] == "**FAILED** (1)"
    assert native["Schedulers, SWA, EMA"]["Ranger"] == "**FAILED** (1)"
    assert "::test_fails`\n" in page.split("\n## ")[0]
    assert (native["Memory"]["SGD"], native["Memory"]["Adam"]) == ("1", "skipped")
    assert page.endswith("## Skipped\n\n- no dice: 2 of Random programs\n- no memory: 1 of Memory\n")
    assert rows(page, "triton") == {}


def test_outcomes_of_a_run(run: Run) -> None:
    assert_suite(*run(SUITE))


def test_outcomes_of_a_worker_process(run: Run) -> None:
    assert_suite(*run(SUITE, "-p", "xdist", "-n", "1"))


def test_modules_that_cannot_be_imported_are_named(run: Run, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_broken="import no_such_module")
    result, page = run("def test_it(): pass", "--continue-on-collection-errors")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert "**FAILED:**\n\n- `test_broken.py`\n\n## Native" in page


@pytest.mark.parametrize(
    ("marker", "said"),
    [
        ('"no such item"', "unknown item 'no such item'; there are 'numbers', "),
        ('"amp", optimizers="Lion"', "unknown optimizer 'Lion'"),
        ('"amp", backend="vulkan"', "unknown backend 'vulkan'"),
        ('"amp", difference="taste"', "unknown difference 'taste'; there are 'square-roots', "),
        ('"amp", backends="native"', "items, optimizers=, backend=, difference="),
        ("", "items, optimizers=, backend=, difference="),
    ],
)
def test_what_does_not_exist_ends_the_run(run: Run, marker: str, said: str) -> None:
    result, page = run(f"@mark.contract({marker})\ndef test_it(): pass")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*test_it: *{said.replace('[', '[[]')}*"])
    assert not page


def test_processes_that_tests_start_are_counted(run: Run, pytester: pytest.Pytester) -> None:
    """As the Triton interpreter's: one fails, and is not written over by the other's success."""
    pytester.makefile(
        ".txt",
        inner="""
import os, pytest
@pytest.mark.contract("numbers", backend="triton", optimizers=("Adam", "Ranger"))
def test_inner(): assert os.environ["INNER"] == "1"
""",
    )
    result, page = run("""
import pathlib, subprocess
@mark.contract("numbers", backend="triton")
@mark.parametrize("inner", ["0", "1"])
def test_outer(inner, tmp_path):
    (tmp_path / "test_inner.py").write_text(pathlib.Path("inner.txt").read_text())
    command = [sys.executable, "-m", "pytest", "-q", "-p", "contract_table", str(tmp_path)]
    env = {**os.environ, "INNER": inner}
    assert subprocess.run(command, env=env).returncode == 1 - int(inner)
""")
    assert result.ret == pytest.ExitCode.OK
    cells = rows(page, "triton")["Numbers"]
    assert cells[ANY] == "2"
    assert cells["Adam"] == cells["Ranger"] == "**FAILED** (1)"


def test_failures_outweigh_and_differences_concern_whom_they_can() -> None:
    results, placed = Results(), Placed(["numbers"], ["SGD", "Adam"], ["native"], ["square-roots"])
    for test, outcomes in {"a": ("passed", "skipped"), "b": ("passed",), "c": ("passed", "passed", "failed")}.items():
        for outcome in outcomes:
            results.note(test, placed, outcome)
    results.note("not of the contract", None, "passed")
    results.note("a crashed worker's", None, "failed")
    cell = results.cells()["native", "numbers", "Adam"]
    assert (cell.passed, cell.skipped, cell.failed, cell.differences) == (1, 1, 1, {"square-roots"})
    assert not results.cells()["native", "numbers", "SGD"].differences
    assert "- `a crashed worker's`\n- `c`\n" in contract_table.render(results)
    other = Results()
    other.add(results.dump(), "process")
    assert other.cells() == results.cells()
    cell.failed = 0
    assert cell.text({"square-roots": 1}) == "1* <sup>[1]</sup>"


def test_the_page_is_of_today() -> None:
    """`make contract` writes it."""
    text = PAGE.read_text()
    tables = {backend: rows(text, backend) for backend in BACKENDS}
    assert all(list(cells) == ["", ANY, *optimizers()] for table in tables.values() for cells in table.values())
    assert {title for table in tables.values() for title in table} == {item.title for item in ITEMS}
    assert contract_table._items() in text
    assert contract_table.HEAD in text
    assert all(f"## {title}\n\n{said}\n" in text for title, said in BACKENDS.values())
    assert re.findall(r"^\d+\. \[(.*)\]", text, re.MULTILINE) == list(contract_table.differences().values())
    assert "FAILED" not in text
    assert "asserted by 0 tests" not in text
    for title, cells in tables["native"].items():
        (item,) = (item for item in ITEMS if item.title == title)
        assert item.gaps or not [o for o in optimizers() if cells[o] == "–"], f"{title}: why is there nothing?"


def _mentions_a_backend(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name.startswith("test") and "backend" in ast.dump(node.args)


@pytest.mark.parametrize("path", sorted(HERE.glob("test_*.py")), ids=lambda path: path.stem)
def test_modules_with_a_backend_are_part_of_the_contract(path: Path) -> None:
    text = path.read_text()
    if any(map(_mentions_a_backend, ast.parse(text).body)):
        assert "pytest.mark.contract" in text


def test_the_command_of_the_makefile_is_understood() -> None:
    if shutil.which("make") is None:
        pytest.skip("no make here")
    planned = subprocess.run(["make", "--dry-run", "contract"], cwd=HERE.parent, capture_output=True, text=True)
    (line,) = (line for line in planned.stdout.splitlines() if "--contract-table" in line)
    _, *arguments = shlex.split(line)
    told = subprocess.run(
        [sys.executable, *arguments, "--markers"], cwd=HERE.parent, capture_output=True, text=True, timeout=120
    )
    assert told.returncode == 0, told.stderr
    assert "@pytest.mark.contract" in told.stdout
