"""How many trained numbers reach 95% of the best gain, against the size of the model: make study SCALING=1.

One task and one corpus at several sizes of the decoder, each trained here (demo/pretrain_tiny.py), and real models on
a task where they have signal. A model's best gain is the highest mean over seeds, less the base model, of everything
that was tried on it, LoRA included. The curve of gains is read between two sizes on a logarithmic axis.

An interval is a bootstrap over seeds: every size's scores are drawn again, with replacement, and the whole is read
anew. With four seeds that is rough, and too narrow by a seventh.
"""
from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import mean

from bench.grid import table
from demo import pretrain_tiny, tiny

from . import runner, transfer
from .design import WIDTHS, scaling
from .runner import BASE
from .summary import COLUMN_OF, METRICS, base_accuracy, results

OBJECTIVES = ("grpo", "sft-own")
SHARE = 0.95  # as in the paper
HALF = 0.5  # where a curve is steep, and so is read more exactly
DRAWS = 2000
MOST = 84  # numbers of the widest vector, whose share of the best gain is told beside
LENGTH_OF = dict(zip(METRICS, ("length", "length_sampled"), strict=True))
DECODERS = {"tiny" if width == tiny.WIDTH else f"tiny-{width}": width for width in WIDTHS}
REAL = {"smollm2": 134_515_008}  # parameters
MODELS = (*DECODERS, *REAL)

Curve = dict[int, list[float]]  # trained numbers -> gain of each seed, smallest size first


@dataclass(frozen=True)
class Reading:
    """What one model's curve says.

    Attributes:
        gains: mean over seeds by trained numbers.
        draws: the same of every draw of the bootstrap that has a gain.
    """

    model: str
    parameters: int
    objective: str
    metric: str
    base: float
    gains: dict[int, float]
    seeds: int
    draws: tuple[dict[int, float], ...]

    @property
    def best(self) -> int:
        """Trained numbers of the best gain."""
        return max(self.gains, key=self.gains.__getitem__)

    @property
    def needed(self) -> float | None:
        """Numbers that reach SHARE of the best gain; None where nothing is gained."""
        return crossing(self.gains)

    def told(self, of: Callable[[dict[int, float]], float]) -> tuple[float, float, float]:
        """A number that is read from gains, and its interval."""
        return of(self.gains), *interval([of(draw) for draw in self.draws])


def crossing(gains: dict[int, float], share: float = SHARE) -> float | None:
    """Numbers at which the curve first reaches that share of its best, linear in their logarithm between two sizes."""
    sizes, best = sorted(gains), max(gains.values())
    if best <= 0:
        return None
    target = share * best
    upper = next(i for i, size in enumerate(sizes) if gains[size] >= target)
    if upper == 0:
        return float(sizes[0])
    low, high = sizes[upper - 1], sizes[upper]
    # log n = log low + (log high - log low) (target - g_low) / (g_high - g_low)
    return low * (high / low) ** ((target - gains[low]) / (gains[high] - gains[low]))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The middle 95% of the draws; not a number where there are none."""
    ordered = sorted(values) or [math.nan]
    cut = int(0.025 * len(ordered))
    return ordered[cut], ordered[-1 - cut]


def redrawn(curve: Curve, rng: random.Random) -> dict[int, float]:
    """Mean gains of seeds drawn with replacement."""
    return {size: sum(rng.choices(scores, k=len(scores))) / len(scores) for size, scores in curve.items()}


def half(gains: dict[int, float]) -> float | None:
    return crossing(gains, HALF)


def share_at(gains: dict[int, float], size: int = MOST) -> float:
    """Of the best gain, at so many numbers; not a number where these were not tried, or nothing is gained."""
    best = max(gains.values())
    return gains.get(size, math.nan) / best if best > 0 else math.nan


def read(model: str, parameters: int, rows: list[dict], objective: str, metric: str) -> Reading:
    """A model's curve for one objective and metric, out of its rows; of two methods of one size the better."""
    base = base_accuracy(rows, metric)
    found = sorted((r for r in results(rows, metric) if r.objective == objective), key=lambda r: (r.numbers, r.mean))
    curve: Curve = {result.numbers: [score - base for score in result.scores] for result in found}
    gains = {size: mean(scores) for size, scores in curve.items()}
    rng = random.Random(0)
    drawn = [draw for draw in (redrawn(curve, rng) for _ in range(DRAWS)) if max(draw.values()) > 0]
    return Reading(model, parameters, objective, metric, base, gains, max(map(len, curve.values())), tuple(drawn))


def slope(readings: Sequence[Reading], of: Callable[[dict[int, float]], float]) -> tuple[float, float, float]:
    """By which power of the model's size the numbers grow, and its interval: log n = a + b log N, least squares."""
    sizes = [math.log(reading.parameters) for reading in readings]
    centred = [size - mean(sizes) for size in sizes]

    def fit(needed: Sequence[float]) -> float:
        return sum(x * math.log(n) for x, n in zip(centred, needed, strict=True)) / sum(x * x for x in centred)

    drawn = zip(*(map(of, reading.draws) for reading in readings), strict=False)
    return fit([of(reading.gains) for reading in readings]), *interval(list(map(fit, drawn)))


def spearman(pairs: Sequence[tuple[float, float]]) -> float:
    """Rank correlation (Spearman 1904), ties at their mean rank; not a number where one side never changes."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [sum(other < one for other in values) + sum(other == one for other in values) / 2 for one in values]

    x, y = (ranks(values) for values in zip(*pairs, strict=True))
    mx, my = mean(x), mean(y)
    covariance = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    scale = math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))
    return covariance / scale if scale else math.nan


def run(models: Sequence[str], out: Path, processes: int, until: float) -> None:
    """What is missing of these models' rows; a decoder that is not there is trained first."""
    for model in models:
        if time.monotonic() > until:
            return
        if model in DECODERS and not (path := tiny.checkpoint(DECODERS[model])).is_file():
            pretrain_tiny.write_checkpoint(path, width=DECODERS[model])
        runner.run(scaling(model), out / f"{model}.csv", processes, until)


def rows_by_model(out: Path) -> dict[str, list[dict]]:
    """The base model's row and those of every objective that is complete, of every model that has one."""
    found: dict[str, list[dict]] = {}
    for model in MODELS:
        plan = scaling(model)
        there = runner.rows_there(plan, out / f"{model}.csv")
        wanted = Counter(row["objective"] for row in runner.rows_of(plan))
        complete = {name for name, count in Counter(row["objective"] for row in there).items() if count == wanted[name]}
        if complete & set(OBJECTIVES):
            found[model] = [row for row in there if row["objective"] in complete]
    return found


def readings(rows: dict[str, list[dict]]) -> list[Reading]:
    return [
        read(model, parameters_of(model), own, objective, metric)
        for metric in METRICS for objective in OBJECTIVES for model, own in rows.items()
        if any(row["objective"] == objective for row in own)
    ]  # fmt: skip


def parameters_of(model: str) -> int:
    if model in REAL:
        return REAL[model]
    return sum(p.numel() for p in tiny.TinyDecoder(DECODERS[model]).parameters())


READ = {"needed": crossing, "half": half, f"share_at_{MOST}": share_at}  # from gains
COLUMNS = [
    "model", "parameters", "objective", "metric", "seeds", "base", "best", "best_numbers",
    *(f"{name}{bound}" for name in READ for bound in ("", "_low", "_high")),
]  # fmt: skip


def described(reading: Reading) -> dict:
    """A line of scaling.csv; a cell is empty where nothing was gained or nothing tried."""
    values = [
        reading.model, reading.parameters, reading.objective, reading.metric, reading.seeds, reading.base,
        reading.base + reading.gains[reading.best], reading.best,
    ]  # fmt: skip
    if reading.needed:
        values += [None if math.isnan(value) else value for of in READ.values() for value in reading.told(of)]
    return dict(zip_longest(COLUMNS, values))


def text(found: list[Reading], rows: dict[str, list[dict]]) -> str:
    """The table of the page: numbers needed, their trend, and the length of replies."""
    parts = []
    for metric in METRICS:
        lines = [
            f"{metric} accuracy",
            f"{'':10}{'parameters':>12}{'objective':>11}{'base':>7}{'best':>7}{'  of':>9}"
            f"{'95% of the gain':>24}{'50% of the gain':>21}{f'gain at {MOST}':>16}",
        ]
        for one in (one for one in found if one.metric == metric):
            cells = ["nothing gained", "-", "-"]
            if one.needed:
                cells = ["{:,.0f} [{:,.0f}, {:,.0f}]".format(*one.told(of)) for of in (crossing, half)]
                share = "{:.0f}% [{:.0f}, {:.0f}]".format(*(100 * value for value in one.told(share_at)))
                cells.append(share if MOST in one.gains else "-")
            lines.append(
                f"{one.model:10}{one.parameters:12,}{one.objective:>11}{100 * one.base:7.1f}"
                f"{100 * (one.base + one.gains[one.best]):7.1f}{one.best:9,}{cells[0]:>24}{cells[1]:>21}{cells[2]:>16}"
            )
        for objective in OBJECTIVES:
            decoders = [
                o for o in found if (o.metric, o.objective) == (metric, objective) and o.model in DECODERS and o.needed
            ]
            if len(decoders) > 2:
                powers = ["{:.2f} [{:.2f}, {:.2f}]".format(*slope(decoders, of)) for of in (crossing, half)]
                lines.append(f"{objective}, decoders: numbers as parameters ^ {powers[0]} for 95%, {powers[1]} for 50%")
        parts.append("\n".join(lines))
    parts.append(lengths(rows))
    parts.append(
        f"of: the trained numbers of the best; 95%, 50% of the gain: numbers that reach it; gain at {MOST}: its share\n"
        "of the best; in brackets the middle 95% of a bootstrap over seeds"
    )
    return "\n\n".join(parts)


def lengths(rows: dict[str, list[dict]]) -> str:
    """Whether longer replies are better ones: over the runs of a model, and from the base model to its best run."""
    lines = [
        "sampled replies under GRPO: tokens and accuracy",
        f"{'':10}{'base':>16}{'best run':>18}{'rank correlation over runs':>30}",
    ]
    accuracy, length = COLUMN_OF["sampled"][1], LENGTH_OF["sampled"]
    for model, own in rows.items():
        runs = [row for row in own if row["objective"] == "grpo" and row[length]]
        (base,) = [row for row in own if row["method"] == BASE]
        if not runs:  # measured before lengths were kept
            continue
        best = max(runs, key=lambda row: float(row[COLUMN_OF["sampled"][0]]))
        cells = [
            f"{float(row[length]):.1f}: {100 * float(row[accuracy]):.1f}%" if row[length] else "-"
            for row in (base, best)
        ]
        rank = spearman([(float(row[length]), float(row[accuracy])) for row in runs])
        lines.append(f"{model:10}{cells[0]:>16}{cells[1]:>18}{f'{rank:.2f} of {len(runs)}':>30}")
    return "\n".join(lines)


def study(models: Sequence[str], out: Path, processes: int, until: float = math.inf) -> None:
    """Run what is missing, then read and draw what is complete."""
    from . import figures

    if unknown := set(models) - set(MODELS):
        raise ValueError(f"models: expected some of {', '.join(MODELS)}, found {', '.join(sorted(unknown))}")
    run(models, out, processes, until)
    moved = transfer.run(out, processes, until) if "smollm2" in models else []
    rows = rows_by_model(out)
    found = readings(rows)
    path = out / "scaling.csv"
    path.unlink(missing_ok=True)
    table.append(path, COLUMNS, [described(one) for one in found])
    (out / "scaling.txt").write_text(text(found, rows) + "\n")
    print(text(found, rows))
    figures.scaling(found, out / "scaling.png")
    if len(moved) == len(transfer.ADAPTERS) * len(transfer.TASKS):
        (out / "transfer.txt").write_text(transfer.text(moved) + "\n")
        print("\n" + transfer.text(moved))
