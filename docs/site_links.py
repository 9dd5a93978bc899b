"""The links of the site that `make docs` builds.

Pages are written for the source tree, where docs/index.md links to ../README.md and docs/numbers.md to
../fastopt/stages.py. Whatever a page links to outside docs/ becomes part of the site, Markdown as a page and anything
else as it is, and every link is rewritten to where its target is there. A link that leads to no file is left alone:
mkdocs reports it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\(([^)#:\s]+)(#[^)]*)?\)")
"""A link to a file of the tree, and where in it."""


def linked(page: Path) -> list[Path]:
    return [(page.parent / target).resolve() for target, _ in LINK.findall(page.read_text(encoding="utf-8"))]


def place(source: Path) -> str:
    """Where a file of the tree is in the site. README.md at its root would replace docs/index.md."""
    if source.is_relative_to(ROOT / "docs"):
        return source.relative_to(ROOT / "docs").as_posix()
    path = source.relative_to(ROOT).as_posix()
    return path.lower() if source.parent == ROOT and source.suffix == ".md" else path


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    known = {Path(file.abs_src_path) for file in files if file.abs_src_path}
    waiting = [Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path]
    while waiting:
        for target in linked(waiting.pop()):
            if target in known or not target.is_file():
                continue
            known.add(target)
            files.append(File.generated(config, place(target), abs_src_path=str(target)))
            if target.suffix == ".md":
                waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    assert page.file.abs_src_path
    source = Path(page.file.abs_src_path)
    here = Path(place(source)).parent

    def moved(link: re.Match[str]) -> str:
        target = (source.parent / link[1]).resolve()
        return f"]({os.path.relpath(place(target), here)}{link[2] or ''})" if target.is_file() else link[0]

    return LINK.sub(moved, markdown)
