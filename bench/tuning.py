"""What was tried on a GPU while kernels and host code were tuned, one thing at a time: CSVs -> Markdown.

bench/results/tuning.csv holds medians that scripts of the day printed, bench/results/sweep.csv what `bench.sweep` did.
Unlike the records of `bench gpu` these are no races against others: each says which of our own ways is faster.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.tables import NONE, table

HINTS = ("none", "loads", "states", "both")
Record = Mapping[str, str]


def read(path: Path) -> list[Record]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def tuning_markdown(tried: Sequence[Record], swept: Sequence[Record]) -> str:
    names = dict.fromkeys(row["measured"] for row in tried)
    parts = [_tried(name, [row for row in tried if row["measured"] == name]) for name in names]
    updates = [row for row in swept if row["ms_p50"] and "wanted" in row["shape"]]
    parts += [_shapes([row for row in updates if row["hints"] == "none"]), _hints(updates)]
    return "\n\n".join(part for part in parts if part)


def _tried(name: str, rows: Sequence[Record]) -> str:
    known: dict[str, dict[str, str]] = {}
    for row in rows:
        known.setdefault(row["case"], {})[row["variant"]] = f"{float(row['microseconds']):,.0f} µs"
    return table(name, _crossed("case", known))


def _shapes(rows: Sequence[Record]) -> str:
    """With as many resident blocks as were wanted first; what others make of it is in the CSV."""
    known: dict[str, dict[str, str]] = {}
    for row in rows:
        if not row["chain"].startswith("none"):
            known.setdefault(_short(row["shape"]), {}).setdefault(_rule(row), row["gb_per_s"])
    return table("The sweep, GB/s: who takes how many vectors, without cache hints", _crossed("shape", known))


def _hints(rows: Sequence[Record]) -> str:
    """Of the shapes that were tried with all of them."""
    known: dict[str, dict[str, str]] = {}
    for row in rows:
        known.setdefault(f"{_rule(row)}; {_short(row['shape'])}", {})[f"hints: {row['hints']}"] = row["gb_per_s"]
    wanted = [f"hints: {h}" for h in HINTS]
    tried = {what: {h: found[h] for h in wanted} for what, found in known.items() if set(wanted) <= set(found)}
    return table("The sweep, GB/s: cache hints", _crossed("rule and shape", tried))


def _short(shape: str) -> str:
    return shape.partition(", blocks wanted")[0]


def _rule(row: Record) -> str:
    return f"{row['chain']}, {row['mix']}"


def _crossed(key: str, known: Mapping[str, Mapping[str, str]]) -> list[dict[str, str]]:
    columns = dict.fromkeys(column for found in known.values() for column in found)
    return [{key: name, **{column: found.get(column, NONE) for column in columns}} for name, found in known.items()]
