"""CSVs -> the tables between the markers of README and docs, and the plots. Writing them twice changes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from bench import cpu_tables, plots, tuning
from bench.gpu_tables import SHORT, UNMEASURED, gpu_markdown
from bench.records import read

GPU_BLOCKS = ("gpu", "gpu short", "tuning")
ELSEWHERE = "cpu elsewhere"  # the block "cpu" of another machine, whose records lie in a file of their own
OPENING, CLOSING = "<!-- bench:{name} -->", "<!-- /bench:{name} -->"
_BLOCK = re.compile(r"<!-- bench:(?P<name>[^>]+?) -->\n.*?<!-- /bench:(?P<end>[^>]+?) -->", re.DOTALL)


def pages(root: Path) -> list[Path]:
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def bodies(csv: Path, gpu_csv: Path) -> Callable[[str], str]:
    """What is between the markers of a name; what was measured elsewhere and tried on a GPU lies beside the two."""
    rows = read(csv)
    gpu_rows = read(gpu_csv) if gpu_csv.exists() else []
    tried, swept = (tuning.read(gpu_csv.with_name(name)) for name in ("tuning.csv", "sweep.csv"))
    other_csv = csv.with_name("cpu_elsewhere.csv")
    special: dict[str, Callable[[], str]] = {
        ELSEWHERE: lambda: cpu_tables.block("cpu", read(other_csv) if other_csv.exists() else []),
        "gpu": lambda: gpu_markdown(gpu_rows),
        "gpu short": lambda: gpu_markdown(gpu_rows, SHORT),
        "tuning": lambda: tuning.tuning_markdown(tried, swept) or UNMEASURED,
    }
    return lambda name: special[name]() if name in special else cpu_tables.block(name, rows)


def write(csv: Path, gpu_csv: Path, pages: Iterable[Path], folder: Path) -> list[Path]:
    """Fill every block of the pages and draw the plots; gives what was written."""
    body = bodies(csv, gpu_csv)
    rows, gpu_rows, written = read(csv), read(gpu_csv) if gpu_csv.exists() else [], []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        filled = with_blocks(text, body, str(page))
        if "<!-- bench:" in text:
            page.write_text(filled, encoding="utf-8")
            written.append(page)
    for draw, of, name in (
        (plots.speedups, rows, "cpu.png"),
        (plots.curves, rows, "curves.png"),
        (plots.gpu_speedups, gpu_rows, "gpu.png"),
        (plots.gpu_curves, gpu_rows, "gpu_curves.png"),
    ):
        if draw(of, folder / name):
            written.append(folder / name)
    return written


def with_blocks(text: str, body: Callable[[str], str], source: str = "the text") -> str:
    """The text with new bodies between its markers, whatever stood there before."""
    known = [*GPU_BLOCKS, ELSEWHERE, *cpu_tables.names()]

    def fill(found: re.Match[str]) -> str:
        name = found["name"]
        if name != found["end"] or name not in known:
            raise ValueError(
                f"{source} has a block from {OPENING.format(name=name)} to {CLOSING.format(name=found['end'])}: both"
                f" must have the same name, one of {', '.join(known)}"
            )
        return f"{OPENING.format(name=name)}\n{body(name)}\n{CLOSING.format(name=name)}"

    filled = _BLOCK.sub(fill, text)
    opened, closed = (len(re.findall(marker, text)) for marker in (r"<!-- bench:", r"<!-- /bench:"))
    if opened != closed or opened != len(_BLOCK.findall(text)):
        raise ValueError(f"{source} has a marker without its other: {opened} begin a block and {closed} end one")
    return filled
