"""CSV files that a run appends to, case by case, so that it can be stopped and taken up again.

Compressed where the name says so.
"""
from __future__ import annotations

import csv
import gzip
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    with _open(path, "r") as stream:
        return list(csv.DictReader(stream))


def append(path: Path, columns: list[str], rows: Iterable[dict]) -> None:
    """Add rows; the header goes before the first. A file with other columns is refused rather than mixed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.is_file()
    if not fresh:
        with _open(path, "r") as stream:
            found = next(csv.reader(stream), [])
        if found != columns:
            raise ValueError(f"{path}: expected the columns {columns}, found {found}; move the file away")
    with _open(path, "a") as stream:
        writer = csv.DictWriter(stream, columns)
        if fresh:
            writer.writeheader()
        writer.writerows({name: _text(value) for name, value in row.items()} for row in rows)


def _open(path: Path, mode: str) -> TextIO:
    return gzip.open(path, mode + "t", newline="") if path.suffix == ".gz" else path.open(mode, newline="")


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)
