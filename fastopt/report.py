"""What the command line shows: text tables and a progress bar; and the imports that only some commands need.

Nothing here imports more than the standard library until it is used, so ``import fastopt`` stays quick and needs no
extras.
"""

from __future__ import annotations

import importlib
import shutil
import sys
import time
from collections.abc import Sequence
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

REDRAW_SECONDS = 0.1


def need(module: str, purpose: str) -> ModuleType:
    """Import an optional module, or raise ModuleNotFoundError saying what it is for and how to get it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = {"sklearn": "scikit-learn"}.get(top := module.partition(".")[0], top)
        raise ModuleNotFoundError(
            f"{purpose} needs {package}, which is not installed; install it with: pip install {package}", name=top
        ) from error


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Lay out rows under headings, which may have several lines; the first ``left`` columns are flush left."""
    height = max(heading.count("\n") for heading in headings) + 1
    stacked = [("\n" * (height - 1 - heading.count("\n")) + heading).split("\n") for heading in headings]
    top = list(zip(*stacked, strict=True))
    widths = [max(len(line[i]) for line in (*top, *rows)) for i in range(len(headings))]

    def lay_out(cells: Sequence[str]) -> str:
        pairs = zip(cells, widths, strict=True)
        return "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(pairs)).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([*map(lay_out, top), rule, *map(lay_out, rows)])


class Progress:
    """A progress bar on stderr, counted in training steps.

    Drawn with rich where it is installed and stderr is a terminal, else with plain text: one line redrawn on a
    terminal, one line per tenth in a log. It redraws only inside ``advance``, never from a thread, so it cannot disturb
    a measurement.
    """

    def __init__(self, total: int, show: bool = True) -> None:
        self.total = total
        self.done = 0
        self._due = 0.0
        self._painter = _choose_painter(total) if show else None

    def advance(self, text: str = "", steps: int = 1) -> None:
        self.done += steps
        if self._painter is not None and (time.monotonic() >= self._due or self.done >= self.total):
            self._painter.draw(self.done, self.total, text)
            self._due = time.monotonic() + REDRAW_SECONDS

    def grow(self, steps: int) -> None:
        """Announce ``steps`` more steps than were planned (or fewer, when negative)."""
        self.total += steps

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._painter is not None:
            self._painter.close()


class _PlainPainter:
    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self.tenth = -1

    def draw(self, done: int, total: int, text: str) -> None:
        line = f"{100 * done // max(total, 1):3d}%  {done}/{total} steps  {text}"
        if self.live:
            columns = shutil.get_terminal_size().columns - 1
            print("\r" + line[:columns].ljust(columns), end="", file=sys.stderr, flush=True)
        elif (tenth := 10 * done // max(total, 1)) > self.tenth:
            self.tenth = tenth
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.live:
            print(file=sys.stderr)


class _RichPainter:
    def __init__(self, rich_progress: ModuleType, console: Any, total: int) -> None:
        columns: list[Any] = [
            rich_progress.BarColumn(bar_width=30),
            rich_progress.TaskProgressColumn(),
            rich_progress.TimeElapsedColumn(),
            rich_progress.TextColumn("{task.description}", markup=False),
        ]
        self.bar = rich_progress.Progress(*columns, console=console, auto_refresh=False)
        self.task = self.bar.add_task("", total=total)
        self.bar.start()

    def draw(self, done: int, total: int, text: str) -> None:
        self.bar.update(self.task, completed=done, total=total, description=text, refresh=True)

    def close(self) -> None:
        self.bar.stop()


def _choose_painter(total: int) -> _PlainPainter | _RichPainter:
    if sys.stderr.isatty():
        try:
            console = importlib.import_module("rich.console").Console(stderr=True)
            return _RichPainter(importlib.import_module("rich.progress"), console, total)
        except ImportError:
            pass
    return _PlainPainter()
