"""What tables are made of: the rows of a CSV by case, contender and metric, and the cells they become."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from bench.records import Environment, Row

NONE = "–"


class Results:
    """The latest run of every case, looked up by contender and metric; `read` says which cases were, for a table to say
    where its figures come from."""

    def __init__(self, rows: Iterable[Row]) -> None:
        latest: dict[str, list[Row]] = {}
        for row in rows:
            known = latest.setdefault(row.case, [])
            if known and row.date > known[0].date:
                known.clear()
            if not known or row.environment == known[0].environment:
                known.append(row)
        self.cases = {case: {(row.contender, row.metric): row for row in rows} for case, rows in latest.items()}
        self.read: set[str] = set()

    def get(self, case: str, contender: str, metric: str) -> Row | None:
        return self._of(case).get((contender, metric))

    def of(self, case: str, prefix: str) -> Iterator[Row]:
        """Rows of a case whose metric is `prefix`, or `prefix` relative to something."""
        return (row for row in self._of(case).values() if row.metric.partition("/")[0] == prefix)

    def environments(self, cases: Iterable[str]) -> list[Environment]:
        return sorted({row.environment for case in cases for row in self.cases[case].values()}, key=lambda e: e.date)

    def _of(self, case: str) -> dict[tuple[str, str], Row]:
        if case not in self.cases:
            return {}
        self.read.add(case)
        return self.cases[case]


def headline(rows: Sequence[Row], shown: Sequence[str]) -> str:
    """One line for a case that has just been measured."""
    ratios = [row for row in rows if row.metric.partition("/")[0] in shown]
    return ", ".join(f"{row.metric.replace('/', ' ')} {row.contender} {ratio_of(row)}" for row in ratios) or "done"


def table(title: str, lines: Sequence[dict[str, str]]) -> str:
    """A column that has nothing to say in any line is left out."""
    columns = [column for column in (lines[0] if lines else ()) if any(line[column] != NONE for line in lines)]
    if not columns:
        return ""
    cells = [columns, ["---"] * len(columns), *([line[column] for column in columns] for line in lines)]
    body = "\n".join(f"| {' | '.join(row)} |" for row in cells)
    return f"**{title}**\n\n{body}" if title else body


def provenance(results: Results) -> str:
    """Where the figures that were read come from."""
    runs = [
        f"commit {e.commit}, {e.date}: {e.device}; {e.threads} threads; torch {e.torch}, Python {e.python}"
        for e in results.environments(results.read)
    ]
    return (
        "Medians, in parentheses the 20th to 80th percentile of the rounds' ratios. Measured at "
        + "; and at ".join(runs)
        + "."
    )


def time_of(row: Row | None) -> str:
    if row is None:
        return NONE
    return f"{row.p50:.0f} µs" if row.p50 < 1000 else f"{row.p50 / 1000:.3g} ms"


def rate_of(row: Row | None) -> str:
    return f"{row.p50:.1f}" if row else NONE


def ratio_of(row: Row | None) -> str:
    if row is None:
        return NONE
    p20, p50, p80 = (f"{value:.1f}" if value >= 10 else f"{value:.2f}" for value in (row.p20, row.p50, row.p80))
    return f"{p50} ({p20}–{p80})"


def number_of(row: Row | None) -> str:
    return f"{row.p50:,.0f}" if row else NONE


def bytes_of(row: Row | None) -> str:
    if row is None:
        return NONE
    return f"{row.p50:,.0f} B" if row.p50 < 10_000 else f"{row.p50 / 1e6:,.3g} MB"
