"""The study's pictures, drawn from its rows."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from .design import EQUAL_SIZE, OBJECTIVES, RANKS, STORAGE, STORAGES, TYING  # noqa: E402
from .methods import FULL, LORA, LORA_XS, TINYLORA, Method  # noqa: E402
from .rollouts import NUMBERS, SOURCES  # noqa: E402
from .scaling import REAL, Reading, crossing  # noqa: E402
from .summary import GREEDY, METRICS, SAMPLED, Result, base_accuracy, fitted, results  # noqa: E402

COLORS = {"grpo": "C0", "sft-own": "C2", "sft-foreign": "C3"}
TITLES = {"grpo": "GRPO", "sft-own": "SFT, own correct samples", "sft-foreign": "SFT, foreign style"}
MARKERS = {TINYLORA: "o", LORA_XS: "s", LORA: "^", FULL: "D"}


def curve(rows: Sequence[dict], of: set[str], model: str, path: Path) -> None:
    """Accuracy against trained numbers, greedy and sampled; ``of``: the methods on the curve."""
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for axis, metric in zip(axes, METRICS, strict=True):
        found = [result for result in results(rows, metric) if result.method in of]
        for objective in OBJECTIVES:
            own = sorted((r for r in found if r.objective == objective), key=lambda r: r.numbers)
            line = [r for r in own if r.kind == TINYLORA]
            axis.plot([r.numbers for r in line], [100 * r.mean for r in line], color=COLORS[objective], lw=1)
            for result in own:
                with_spread(axis, result.numbers, result, COLORS[objective], MARKERS[result.kind])
        for result in fitted(rows, metric):
            if result.method in of:
                with_spread(axis, result.numbers, result, COLORS["sft-foreign"], MARKERS[result.kind], hollow=True)
        axis.axhline(100 * base_accuracy(rows, metric), color="0.4", ls=":")
        axis.set(xscale="log", xlabel="trained numbers", ylim=(0, 102))
        axis.set_title(f"{model}, {metric}", fontsize=10)
    axes[0].set_ylabel("test accuracy, %")
    handles = [pyplot.Line2D([], [], color=COLORS[name], label=TITLES[name]) for name in OBJECTIVES]
    handles += [
        pyplot.Line2D([], [], color="0.3", ls="", marker=marker, label="all weights" if kind == FULL else kind)
        for kind, marker in MARKERS.items()
    ]
    hollow = dict(color=COLORS["sft-foreign"], ls="", marker="o", mfc="white")
    handles.append(pyplot.Line2D([], [], label="foreign style, fitted best", **hollow))
    handles.append(pyplot.Line2D([], [], color="0.4", ls=":", label="base model"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    finish(figure, axes, path)


def ablations(rows: Sequence[dict], path: Path) -> None:
    """Frozen rank, groups at equal size, tying, storage: GRPO, greedy and sampled."""
    figure, axes = pyplot.subplots(
        1, 4, figsize=(13, 3.6), sharey=True, layout="constrained", width_ratios=(4, 4, 2, 5)
    )
    colors = {GREEDY: "0.55", SAMPLED: "C0"}
    for metric, color in colors.items():
        found = {r.method: r for r in results(rows, metric) if r.objective == "grpo"}
        spread_of(axes[0], RANKS, [str(m.rank) for m in RANKS], found, color)
        spread_of(axes[1], EQUAL_SIZE, [f"{42 // m.u} x {m.u}" for m in EQUAL_SIZE], found, color)
        spread_of(axes[2], TYING, ["tiled", "structured"], found, color)
    axes[0].set(xlabel="frozen rank r, 13 numbers", ylabel="test accuracy, %", ylim=(0, 102))
    axes[1].set(xlabel="42 numbers: groups x u")
    axes[2].set(xlabel="14 numbers, 7 groups")
    sampled = {r.method: r for r in results(rows, SAMPLED) if r.objective == "grpo"}
    for storage, color in zip(STORAGES, ("C0", "C1", "C4"), strict=True):
        own = [sampled[m.label] for m in STORAGE if m.storage == storage]
        axes[3].plot([r.bytes for r in own], [100 * r.mean for r in own], color=color, lw=1, label=storage)
        for result in own:
            with_spread(axes[3], result.bytes, result, color, "o")
    axes[3].set(xscale="log", xlabel="bytes of v (4, 13, 49 numbers), sampled")
    axes[3].legend(fontsize=8, frameon=False)
    handles = [pyplot.Line2D([], [], color=color, marker="o", ls="", label=m) for m, color in colors.items()]
    axes[0].legend(handles=handles, fontsize=8, frameon=False, loc="lower right")
    finish(figure, axes, path)


def rollout_sources(rows: Sequence[dict], path: Path) -> None:
    """Sampled accuracy of the exact and of the merged model against the rate, for every source of rollouts."""
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    panels = {"test_sampled": "served exactly", "test_merged_sampled": "served from merged bfloat16 weights"}
    for axis, (column, title) in zip(axes, panels.items(), strict=True):
        for source, color, marker in zip(SOURCES, ("C0", "C3", "C1", "C2"), "osv^", strict=True):
            own = [row for row in rows if row["rollouts"] == source]
            rates = sorted({float(row["lr"]) for row in own})
            scores = [[100 * float(row[column]) for row in own if float(row["lr"]) == rate] for rate in rates]
            axis.plot(rates, list(map(mean, scores)), color=color, marker=marker, ms=4, label=f"rollouts: {source}")
            axis.fill_between(rates, list(map(min, scores)), list(map(max, scores)), color=color, alpha=0.12, lw=0)
        axis.set(xscale="log", xlabel="learning rate", ylim=(0, 102))
        axis.set_title(title, fontsize=10)
    axes[0].set_ylabel("sampled test accuracy, %")
    axes[0].legend(fontsize=8, frameon=False, loc="lower left")
    finish(figure, axes, path)


def scaling(found: Sequence[Reading], path: Path) -> None:
    """Numbers that reach 95% of the best sampled gain against the model's size, and the curves they are read from."""
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    found = [one for one in found if one.metric == SAMPLED]
    for one in found:
        if one.needed is None:
            continue
        needed, low, high = one.told(crossing)
        real = one.model in REAL
        axes[0].errorbar(
            one.parameters * (1.03 if one.objective == "grpo" else 0.97), needed,
            [[needed - min(low, needed)], [max(high, needed) - needed]],
            color=COLORS[one.objective], marker="D" if real else "o", ms=6, lw=1, capsize=2,
            mfc="white" if real else COLORS[one.objective],
        )  # fmt: skip
    axes[0].set(xscale="log", yscale="log", xlabel="parameters of the model")
    axes[0].set_ylabel("trained numbers for 95% of the best gain")
    handles = [pyplot.Line2D([], [], color=COLORS[o], marker="o", ls="", label=TITLES[o]) for o in COLORS if o in {
        one.objective for one in found}]  # fmt: skip
    hollow = dict(color="0.3", marker="D", mfc="white", ls="")
    handles.append(pyplot.Line2D([], [], label="SmolLM2-135M-Instruct, another task", **hollow))
    axes[0].legend(handles=handles, fontsize=8, frameon=False)
    own = [one for one in found if one.objective == "grpo"]
    for index, one in enumerate(own):
        millions = f"{one.parameters / 1e6:.{0 if one.model in REAL else 2}f}M"
        sizes, best = sorted(one.gains), one.gains[one.best]
        axes[1].plot(
            sizes, [100 * one.gains[size] / best for size in sizes], marker="o", ms=4, lw=1.2,
            color=pyplot.get_cmap("viridis")(0.9 * index / max(1, len(own) - 1)),
            label=f"{one.model}, {millions}", ls="--" if one.model in REAL else "-",
        )  # fmt: skip
    axes[1].axhline(95, color="0.4", ls=":")
    axes[1].set(xscale="log", xlabel="trained numbers", ylabel="% of the best gain, GRPO, sampled")
    axes[1].legend(fontsize=8, frameon=False, loc="lower right")
    finish(figure, axes, path)


def rounding(rows: Sequence[dict], trained: dict[str, Iterable[float]], path: Path) -> None:
    """What survives a merge against |v|; ``trained``: |v| of trained runs of each model, shaded."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = pyplot.subplots(
        1, len(models), figsize=(5 * len(models), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, model in zip(axes[0], models, strict=True):
        for dtype, color in (("bfloat16", "C3"), ("float16", "C0")):
            own = [row for row in rows if row["model"] == model and row["dtype"] == dtype]
            sizes = sorted({float(row["size"]) for row in own})
            for column, style in (("survived", "-"), ("error", "--")):
                values = [mean(float(row[column]) for row in own if float(row["size"]) == size) for size in sizes]
                axis.plot(sizes, values, style, color=color, label=f"{dtype}: {column}")
        norms = [norm for norm in trained.get(model, ()) if norm > 0]
        if norms:
            axis.axvspan(min(norms), max(norms), color="0.9", zorder=0, label="|v| of trained runs")
        axis.set(xscale="log", xlabel=f"|v|, {NUMBERS} numbers", ylim=(0, 1.6))
        axis.set_title(model, fontsize=10)
    axes[0][0].set_ylabel("of the update")
    axes[0][0].legend(fontsize=8, frameon=False)
    finish(figure, axes[0], path)


def spread_of(
    axis: Axes, methods: Sequence[Method], names: Sequence[str], found: dict[str, Result], color: str
) -> None:
    """One point a method, in order."""
    for x, method in enumerate(methods):
        with_spread(axis, x, found[method.label], color, "o")
    axis.set_xticks(range(len(methods)), names)
    axis.set_xlim(-0.5, len(methods) - 0.5)


def with_spread(axis: Axes, x: float, result: Result, color: str, marker: str, hollow: bool = False) -> None:
    """The mean over seeds, and a line from the lowest to the highest."""
    low, high = result.mean - min(result.scores), max(result.scores) - result.mean
    axis.errorbar(
        x, 100 * result.mean, [[100 * low], [100 * high]], color=color, marker=marker, ms=5, lw=1, capsize=2,
        mfc="white" if hollow else color,
    )  # fmt: skip


def finish(figure, axes: Sequence[Axes], path: Path) -> None:
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
