"""The documentation is true where a program can tell: examples run, commands exist, signatures are real, links lead
somewhere, and the site shows what the pages say without loading anything from elsewhere."""

from __future__ import annotations

import ast
import inspect
import operator
import os
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import fastopt
from fastopt.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = [page for where in ("*.md", "examples/*.md", "docs/**/*.md") for page in sorted(ROOT.glob(where))]
OPTIMIZER_PAGES = sorted(ROOT.glob("docs/optimizers/*.md"))
LANGUAGES = {"python": "run", "py": "the signature", "sh": "commands", "text": "no code"}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_is_of_a_kind_that_is_tested(page: Path) -> None:
    fences = [line for line in page.read_text().splitlines() if line.lstrip().startswith("```")]
    assert {fence.removeprefix("```") for fence in fences[::2]} <= LANGUAGES.keys()
    assert set(fences[1::2]) <= {"```"}
    assert len(fences) % 2 == 0


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    session = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        exec(compile(block, name(page), "exec"), session)


def commands() -> dict[str, str]:
    """Every command that the pages tell the reader to run, and the page of its last mention."""
    found: dict[str, str] = {}
    for page in PAGES:
        lines = "".join(blocks(page, "sh")).splitlines()
        inline = re.findall(r"`((?:make|pip|python|fastopt) [a-z-][^`]*)`", " ".join(prose(page).split()))
        for line in (*lines, *inline):
            if words := shlex.split(line, comments=True):
                found[shlex.join(words)] = name(page)
    return found


COMMANDS = commands()
# Options that win over those before them: the command is the documented one, but little work.
SHORTER = {"info": [], "compare": ["--lrs=1e-2", "--seeds=1", "--steps=3"], "demo": ["--steps=2"]}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_work(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command)
    if words[:2] == ["python", "-m"]:
        words = words[2:]
    match words:
        case ["fastopt", tool, *_]:
            monkeypatch.chdir(tmp_path)
            assert main([*words[1:], *SHORTER[tool]]) == 0
        case ["bench", *arguments]:  # runs for minutes and writes into the pages; tests/test_bench.py runs it small
            from bench.__main__ import _parser

            _parser().parse_args(arguments)
        case ["pytest", path]:
            run = [sys.executable, "-m", "pytest", "-q", "--benchmark-disable", "-p", "no:cacheprovider", path]
            assert subprocess.run(run, cwd=ROOT, check=False).returncode == 0
        case ["make", target, *settings]:
            check_make(target, settings)
        case ["pip", "install", *what]:  # into an environment of its own: what `make` and the packagers' tests do
            check_requirements(what)
        case ["python", script] if script.endswith(".py"):  # tests/test_examples.py runs all there are
            assert (ROOT / script).exists()
        case _:
            pytest.fail(f"{COMMANDS[command]}: no test knows how to check {command!r}")


def check_make(target: str, settings: list[str]) -> None:
    """The target exists and does something, and every variable that is set reaches what it does."""
    if shutil.which("make") is None:
        pytest.skip("no make here")
    values = {setting.partition("=")[0]: f"value-{number}" for number, setting in enumerate(settings)}
    planned = subprocess.run(
        ["make", "--dry-run", "--always-make", target, *("=".join(pair) for pair in values.items())],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.strip()
    assert [variable for variable, value in values.items() if value not in planned.stdout] == []


def check_requirements(what: list[str]) -> None:
    """This project, from its sources or by its name, and extras that it has."""
    project = (ROOT / "pyproject.toml").read_text()
    known = re.search(r"^\[project\.optional-dependencies\]\n(.*?)^\[", project, re.MULTILINE | re.DOTALL)
    assert known
    extras = set(re.findall(r"^(\w+) = \[", known[1], re.MULTILINE))
    for requirement in what:
        asked = re.fullmatch(r"(\.|[\w-]+)(?:\[([\w,]+)\])?", requirement)
        assert asked, requirement
        assert asked[1] in (".", "fastopt")
        assert set(filter(None, (asked[2] or "").split(","))) <= extras


SIGNATURES = [
    pytest.param(*found, id=found[0])
    for page in (*OPTIMIZER_PAGES, ROOT / "docs" / "api.md")
    for block in blocks(page, "py")
    for found in re.findall(r"^([\w.]+)\((.*?)\)$", block, re.MULTILINE | re.DOTALL)
]


def test_signatures_are_found() -> None:
    """One for each optimizer, each other function that the package exports, and more."""
    results = {"Comparison", "ImportReport"}
    assert {f"fastopt.{name}" for name in fastopt.__all__ if name not in results} <= {s.id for s in SIGNATURES}


@pytest.mark.parametrize(("name", "arguments_written"), SIGNATURES)
def test_signatures_are_the_real_ones(name: str, arguments_written: str) -> None:
    written = ast.parse(f"def f({arguments_written}): ...").body[0]
    assert isinstance(written, ast.FunctionDef)
    owner, _, path = name.partition(".")
    roots = {"fastopt": fastopt, "optimizer": fastopt.Lookahead(fastopt.SGD([torch.ones(1)]))}
    real = inspect.signature(operator.attrgetter(path)(roots[owner])).parameters
    arguments = written.args
    rest = [arguments.kwarg] if arguments.kwarg else []
    assert [a.arg for a in (*arguments.args, *arguments.kwonlyargs, *rest)] == list(real)
    assert [a.arg for a in arguments.kwonlyargs] == [k for k, v in real.items() if v.kind is v.KEYWORD_ONLY]
    defaults = [ast.literal_eval(d) for d in (*arguments.defaults, *filter(None, arguments.kw_defaults))]
    assert defaults == [v.default for v in real.values() if v.default is not v.empty]


@pytest.mark.parametrize("page", OPTIMIZER_PAGES, ids=lambda page: page.stem)
def test_optimizer_pages_answer_the_same_questions(page: Path) -> None:
    headings = re.findall(r"^## (.*)$", page.read_text(), re.MULTILINE)
    assert {"Update rule", "Where implementations differ", "When to use it", "Measured cost", "References"} <= {
        *headings
    }
    assert "State" in headings or "Arguments and state" in headings


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_places_for_measurements_are_closed(page: Path) -> None:
    markers = re.findall(r"^<!-- (/?)bench:(.*) -->$", page.read_text(), re.MULTILINE)
    assert [slash for slash, _ in markers] == ["", "/"] * (len(markers) // 2)
    assert [place for _, place in markers[::2]] == [place for _, place in markers[1::2]]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text())
    assert [t for t in targets if not (page.parent / t).is_file()] == []


def test_every_optimizer_has_a_page() -> None:
    classes = {
        n
        for n in fastopt.__all__
        if inspect.isclass(cls := getattr(fastopt, n)) and issubclass(cls, torch.optim.Optimizer)
    }
    assert {n.lower() for n in classes} == {page.stem for page in OPTIMIZER_PAGES}


def test_figures_are_drawings_without_a_background() -> None:
    for path in ROOT.glob("docs/*.svg"):
        figure = ElementTree.parse(path).getroot()
        assert figure.get("viewBox"), path
        assert not any("href" in attribute for element in figure.iter() for attribute in element.attrib), path


class Shown(HTMLParser):
    """What a page of the site has: elements of each kind inside its article, and what it loads from elsewhere."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.items = self.rows = 0
        self.foreign: list[str] = []
        self._inside = False
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._inside |= tag == "article"
        self.items += self._inside and tag == "li"
        self.rows += self._inside and tag == "tr"
        if tag != "a":
            loaded = [value or "" for key, value in attributes if key in ("src", "href", "srcset", "data", "style")]
            self.foreign += [value for value in loaded if "//" in value]

    def handle_endtag(self, tag: str) -> None:
        self._inside &= tag != "article"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("material") is None or find_spec("mkdocs") is None:
        pytest.skip('no mkdocs-material here: pip install "fastopt[docs]"')
    folder = tmp_path_factory.mktemp("site")
    # Not --quiet: it drops warnings before --strict counts them.
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(
        build, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def in_site(page: Path) -> Path:
    """The pages outside docs/ keep their names, in lower case at the root; READMEs of folders are their indices."""
    path = page.relative_to(ROOT / "docs" if page.is_relative_to(ROOT / "docs") else ROOT)
    path = path if page.parent != ROOT else Path(path.name.lower())
    return path.with_suffix(".html") if path.name != "README.md" else path.with_name("index.html")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_site_shows_the_page(site: Path, page: Path) -> None:
    """Python's Markdown and GitHub's differ in what makes a list or a table; here the two must agree."""
    shown = Shown((site / in_site(page)).read_text())
    text = prose(page)
    assert shown.items == len(re.findall(r"^ *(?:[-*]|\d+\.) ", text, re.MULTILINE))
    assert shown.rows == len(re.findall(r"^\|(?! *:?-)", text, re.MULTILINE))


def test_site_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = {path.name: Shown(path.read_text()).foreign for path in site.rglob("*.html")}
    assert {page: foreign for page, foreign in pages.items() if foreign} == {}
    styles = [
        path.name
        for path in site.rglob("*.css")
        if re.search(r"(?:url\(|@import\s*)[\"']?(?:https?:)?//", path.read_text())
    ]
    assert styles == []
    # The theme's script fetches a renderer for these from a CDN.
    assert [path.name for path in site.rglob("*.html") if 'class="mermaid"' in path.read_text()] == []
