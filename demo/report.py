"""What the demo says when it is done: a table within 100 columns, verdicts, a plot, and the same as JSON."""
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .evaluation import Evaluation, Score, mcnemar_p

WIDTH = 100
TARGET_POINTS, TARGET_P = 30.0, 0.01  # how far above a control a trained adapter has to be


@dataclass
class Row:
    """One line of the table."""

    label: str
    numbers: int
    evaluation: Evaluation
    seconds: float = 0.0
    rewards: Sequence[float] = ()

    @property
    def bytes(self) -> int:
        return 4 * self.numbers  # float32


@dataclass
class RandomControl:
    """Adapters with random v of the trained norm."""

    numbers: int
    norm: float
    evaluations: list[Evaluation]
    seconds: float = 0.0

    def best(self) -> Evaluation:
        return max(self.evaluations, key=lambda e: e.greedy.accuracy)

    def mean(self, kind: str) -> float:
        return sum(getattr(e, kind).accuracy for e in self.evaluations) / len(self.evaluations)


def table(rows: Sequence[Row], control: RandomControl | None, temperature: float) -> str:
    """The table; the random control's two lines follow the other rows."""
    sampled = f"at T={temperature:g} [95% CI]"
    header = f"{'':<34}{'trained':>7}{'bytes':>7}   {'greedy [95% CI]':<21}{sampled:<21}{'time':>7}"
    lines = [header, "-" * len(header)]
    for row in rows:
        scores = _score(row.evaluation.greedy), _score(row.evaluation.sampled)
        lines.append(_line(row.label, row.numbers, row.bytes, *scores, row.seconds))
    if control is not None:
        draws, best = len(control.evaluations), control.best()
        size = control.numbers, 4 * control.numbers
        label = f"random v, same norm: best of {draws}"
        lines.append(_line(label, *size, _score(best.greedy), _score(best.sampled), control.seconds))
        means = [f"{100 * control.mean(kind):5.1f}%" for kind in ("greedy", "sampled")]
        lines.append(_line(f"random v, same norm: mean of {draws}", *size, *means, 0.0))
    return "\n".join(lines)


def _line(label: str, numbers: int, size: int, greedy: str, sampled: str, seconds: float) -> str:
    time = f"{seconds:5.0f} s" if seconds else ""
    return f"{label:<34}{numbers:>7,}{size:>7,}   {greedy:<21}{sampled:<21}{time:>7}".rstrip()


def _score(score: Score) -> str:
    low, high = (100 * bound for bound in score.interval)
    return f"{100 * score.accuracy:5.1f}% [{low:4.1f}, {high:5.1f}]"


def verdict(trained: Evaluation, control: Evaluation, name: str) -> str:
    """How far the trained adapter is above a control, greedy and sampled, with exact p-values."""
    parts, met = [], True
    for kind in ("greedy", "sampled"):
        a, b = getattr(trained, kind), getattr(control, kind)
        points, p = 100 * (a.accuracy - b.accuracy), mcnemar_p(a, b)
        met = met and points >= TARGET_POINTS and p < TARGET_P
        parts.append(f"{points:+.1f} points {kind} (p = {p:.1g})")
    outcome = "clear" if met else "NOT clear"
    return f"  over {name}: {', '.join(parts)}: {outcome} by {TARGET_POINTS:.0f}"


def fresh_process(adapter: Path, trained: Evaluation, found: dict) -> str:
    """Whether the file gives another process the same answers."""
    same = sum(a == b for a, b in zip(trained.replies, found["replies"], strict=True))
    return (
        f"{adapter} ({adapter.stat().st_size:,} bytes) in a fresh process: greedy {100 * found['greedy']:.1f}%, "
        f"sampled {100 * found['sampled']:.1f}%;\n  {same} of {len(trained.replies)} greedy replies are identical"
    )


def plot(rows: Sequence[Row], control: RandomControl | None, title: str, path: Path) -> None:
    """Reward of every training step as a PNG, the curve smoothed over five steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=140)
    for row in rows:
        if len(row.rewards) == 0:
            continue
        steps = range(1, len(row.rewards) + 1)
        (line,) = axes.plot(steps, _smoothed(row.rewards), label=row.label, linewidth=2)
        axes.plot(steps, row.rewards, color=line.get_color(), alpha=0.25, linewidth=1)
    if control is not None:
        level = control.mean("sampled")
        axes.axhline(level, color="0.4", linestyle=":", label="random v, same norm: mean (held out)")
    axes.set(xlabel="optimizer step", ylabel="mean reward of the sampled batch", ylim=(0, 1.05), title=title)
    axes.legend(loc="upper left", fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _smoothed(values: Sequence[float], window: int = 5) -> list[float]:
    """Mean of the last ``window`` values, fewer at the start."""
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def write_json(path: Path, rows: Sequence[Row], control: RandomControl | None, facts: dict) -> None:
    """Everything the table shows, per problem too."""
    document = {
        "facts": facts,
        "rows": [{**asdict(row), "bytes": row.bytes} for row in rows],
        "random_control": None if control is None else asdict(control),
    }
    path.write_text(json.dumps(document, indent=1))
