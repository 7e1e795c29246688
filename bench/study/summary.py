"""From rows to results: the best learning rate of each arm, its mean and spread over seeds, and the table of both."""
from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import mean

from .design import OBJECTIVES
from .runner import BASE

GREEDY, SAMPLED = METRICS = ("greedy", "sampled")
FITTED = "foreign, fitted"
COLUMN_OF = {GREEDY: ("validation", "test"), SAMPLED: ("validation_sampled", "test_sampled")}


@dataclass(frozen=True)
class Result:
    """One method and objective at its best rate.

    Attributes:
        rate: the one whose mean over seeds is best on the validation problems, by the same metric.
        scores: test accuracy of each seed at that rate.
        edge: the rate is the lowest or highest of its sweep, so a better one may lie outside.
    """

    method: str
    kind: str
    numbers: int
    bytes: int
    objective: str
    metric: str
    rate: float
    scores: tuple[float, ...]
    edge: str

    @property
    def mean(self) -> float:
        return mean(self.scores)


def base_accuracy(rows: Iterable[dict], metric: str) -> float:
    (row,) = [row for row in rows if row["method"] == BASE]
    return float(row[COLUMN_OF[metric][1]])


def results(rows: Iterable[dict], metric: str, chosen_by: str | None = None) -> list[Result]:
    """The best of every sweep, in the order of the rows; chosen by the metric on validation problems or by a column."""
    validation, test = COLUMN_OF[metric]
    validation = chosen_by or validation
    arms: dict[tuple[str, str], dict[float, list[dict]]] = {}
    for row in rows:
        if row["method"] != BASE:
            arms.setdefault((row["method"], row["objective"]), {}).setdefault(float(row["lr"]), []).append(row)
    found = []
    for (method, objective), by_rate in arms.items():
        best = max(by_rate, key=lambda rate: mean(float(row[validation]) for row in by_rate[rate]))
        rows_of_best = by_rate[best]
        edge = "" if len(by_rate) == 1 else "<" if best == min(by_rate) else ">" if best == max(by_rate) else ""
        first = rows_of_best[0]
        found.append(
            Result(
                method, first["kind"], int(first["numbers"]), int(first["bytes"]), objective, metric, best,
                tuple(float(row[test]) for row in rows_of_best), edge,
            )  # fmt: skip
        )
    return found


def fitted(rows: Iterable[dict], metric: str) -> list[Result]:
    """Fine-tuning in a foreign style at the rate that imitates it best, whatever becomes of the accuracy."""
    foreign = [row for row in rows if row["objective"] == "sft-foreign"]
    return [replace(result, objective=FITTED) for result in results(foreign, metric, chosen_by="reward_last5")]


def table(rows: list[dict], curve: Container[str]) -> str:
    """Accuracy in %, mean (lowest to highest) over seeds: the curve under every objective, then the other methods."""
    parts = []
    for metric in METRICS:
        every = results(rows, metric) + fitted(rows, metric)
        found = {(r.method, r.objective): r for r in every if r.method in curve}
        base = 100 * base_accuracy(rows, metric)
        columns = [name for name in (*OBJECTIVES, FITTED) if any(name == objective for _, objective in found)]
        parts.append(section(f"{metric} accuracy, %; base model {base:.1f}", found, columns))
    found = {(r.method, r.metric): r for metric in METRICS for r in results(rows, metric) if r.method not in curve}
    if found:
        parts.append(section("ablations, GRPO, %", found, METRICS))
    parts.append(
        "mean (lowest-highest) over seeds, at the rate that is best on validation problems; foreign, fitted: at the\n"
        "rate that imitates the demonstrations best; < and >: that rate is the lowest or the highest of its sweep"
    )
    return "\n\n".join(parts)


def section(title: str, found: dict[tuple[str, str], Result], columns: Sequence[str]) -> str:
    """Methods by size, a column for each objective or metric."""
    methods = {result.method: result for result in found.values()}
    width = max(map(len, methods))
    lines = [title, f"{'':{width}}  numbers" + "".join(f"  {name:>16}" for name in columns)]
    for method, first in sorted(methods.items(), key=lambda item: item[1].numbers):
        cells = [cell(found.get((method, column))) for column in columns]
        lines.append(f"{method:{width}}  {first.numbers:7d}" + "".join(f"  {text:>16}" for text in cells))
    return "\n".join(line.rstrip() for line in lines)


def cell(result: Result | None) -> str:
    if result is None:
        return "-"
    low, high = 100 * min(result.scores), 100 * max(result.scores)
    return f"{100 * result.mean:.1f} ({low:.0f}-{high:.0f}){result.edge or ' '}"
