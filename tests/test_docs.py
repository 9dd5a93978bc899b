"""The documentation is true where a program can tell: examples run, signatures are real, links lead somewhere."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch

import fastopt

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    page for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))) if page.exists()
]
OPTIMIZER_PAGES = sorted(ROOT.glob("docs/optimizers/*.md"))


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for block in blocks(page, "python"):
        exec(compile(block, name(page), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", OPTIMIZER_PAGES, ids=lambda page: page.stem)
def test_signatures_are_the_real_ones(page: Path) -> None:
    (block,) = blocks(page, "py")
    called = re.fullmatch(r"fastopt\.(\w+)\((.*)\)\s*", block, re.DOTALL)
    assert called, block
    written = ast.parse(f"def f({called[2]}): ...").body[0]
    assert isinstance(written, ast.FunctionDef)
    real = inspect.signature(getattr(fastopt, called[1])).parameters
    arguments = written.args
    assert [a.arg for a in (*arguments.args, *arguments.kwonlyargs)] == list(real)
    assert [a.arg for a in arguments.kwonlyargs] == [k for k, v in real.items() if v.kind is v.KEYWORD_ONLY]
    defaults = [ast.literal_eval(d) for d in (*arguments.defaults, *filter(None, arguments.kw_defaults))]
    assert defaults == [v.default for v in real.values() if v.default is not v.empty]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text())
    assert [t for t in targets if not (page.parent / t).exists()] == []


def test_every_optimizer_has_a_page() -> None:
    classes = {
        n
        for n in dir(fastopt)
        if inspect.isclass(cls := getattr(fastopt, n)) and issubclass(cls, torch.optim.Optimizer)
    }
    assert {n.lower() for n in classes} == {page.stem for page in OPTIMIZER_PAGES}
