"""Two pictures of a run: every contender's ratio to the frozen layer, and our update beside the physical limit."""
from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  after the choice of backend
from matplotlib.colors import LogNorm  # noqa: E402

from .adapters import BANK, COUNTS, INFERENCE, PEFT, SEPARATE, TARGET  # noqa: E402
from .contenders import FROZEN, NAMES, OURS  # noqa: E402
from .report import by_case, ratio  # noqa: E402
from .shapes import TOKENS  # noqa: E402
from .timing import geometric_mean  # noqa: E402


def write(times: list[dict], out: Path) -> None:
    _ratios(times, out / "ratio.png")
    _roofline(times, out / "roofline.png")


def _ratios(times: list[dict], path: Path) -> None:
    """Forward + backward: geometric mean of each contender against tokens; our single layers as dots."""
    cases = by_case(times, "both")
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    for axis, dtype in zip(axes, ("fp32", "bf16"), strict=True):
        for color, name in enumerate(NAMES[2:]):
            points = []
            for tokens in TOKENS:
                found = [ratio(c[name]) for k, c in cases.items() if k[2:4] == (str(tokens), dtype) and name in c]
                if found:
                    points.append((tokens, geometric_mean(found)))
                if name == OURS:
                    axis.scatter([tokens] * len(found), found, s=10, color="black", alpha=0.35, linewidths=0)
            if points:
                style = {"color": "black", "lw": 2.5} if name == OURS else {"color": f"C{color}", "lw": 1.2, "ls": "--"}
                axis.plot(*zip(*points, strict=True), marker="o", ms=4, label=name, **style)
                axis.legend(fontsize=8)
        axis.axhline(1, color="grey", lw=0.8)
        axis.set(xscale="log", yscale="log", title=dtype, xlabel="tokens", xticks=TOKENS, xticklabels=TOKENS)
        axis.set_yticks([1, 1.1, 1.25, 1.5, 2, 3, 5, 10], labels=["1", "1.1", "1.25", "1.5", "2", "3", "5", "10"])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("time / frozen nn.Linear, forward + backward with dx")
    figure.suptitle(_caption(times), fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _roofline(times: list[dict], path: Path) -> None:
    """Time our update adds to a layer, against one read and one write of y at stream bandwidth."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    for axis, phase in zip(axes, ("forward", "backward"), strict=True):
        lowest, highest = float("inf"), 0.0
        for marker, dtype in (("o", "fp32"), ("s", "bf16")):
            points = []
            for key, contenders in by_case(times, phase).items():
                if key[3] == dtype and OURS in contenders:
                    mine, frozen = contenders[OURS], contenders[FROZEN]
                    added = (ratio(mine) - 1) * float(frozen["p50_us"])
                    points.append((float(mine["limit_us"]), max(added, 0.1), int(key[2])))
            if points:
                limits, added, tokens = zip(*points, strict=True)
                lowest, highest = min(lowest, *limits), max(highest, *limits)
                dots = axis.scatter(
                    limits, added, c=tokens, cmap="viridis", norm=LogNorm(TOKENS[0], TOKENS[-1]),
                    marker=marker, s=22, label=dtype,
                )  # fmt: skip
        axis.plot([lowest, highest], [lowest, highest], color="red", lw=1, label="the limit: one read, one write of y")
        axis.set(xscale="log", yscale="log", title=phase, xlabel="limit, us")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("added to the frozen layer, us (at 0.1: nothing above noise)")
    bar = figure.colorbar(dots, ax=axes, ticks=TOKENS, label="tokens")
    bar.ax.set_yticklabels(TOKENS)
    figure.suptitle(_caption(times), fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write_adapters(rows: list[dict], out: Path) -> None:
    """K adapters in a batch over one adapter: the bank and its alternatives, a line for each layer and batch."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    cases = sorted({(row["layer"], int(row["rows"])) for row in rows if row["workload"] == "layer"})
    for axis, dtype in zip(axes, ("fp32", "bf16"), strict=True):
        for contender, color in ((PEFT, "C1"), (SEPARATE, "C0"), (BANK, "black")):
            for layer, count in cases:
                found = [
                    (int(row["adapters"]), ratio(row))
                    for row in rows
                    if (row["layer"], row["rows"], row["dtype"]) == (layer, str(count), dtype)
                    and (row["contender"], row["phase"]) == (contender, INFERENCE)
                ]
                label = contender if (layer, count) == cases[0] else None
                if found:
                    axis.plot(*zip(*found, strict=True), marker="o", ms=3, lw=1, color=color, alpha=0.8, label=label)
        axis.axhline(TARGET, color="red", lw=0.8, ls=":", label=f"target {TARGET:g}")
        axis.set(xscale="log", yscale="log", title=dtype, xlabel="adapters in the batch", xticks=COUNTS)
        axis.set_xticklabels(COUNTS)
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("time of a layer / the same rows under one adapter")
    figure.suptitle(f"16, 64 and 512 rows; {_caption(rows)}", fontsize=9)
    figure.savefig(out / "adapters.png", dpi=130)
    plt.close(figure)


def _caption(times: list[dict]) -> str:
    row = times[-1]
    versions = f"torch {row['torch']}, PEFT {row['peft']}, commit {row['commit']}"
    return f"{row['cpu']}, {row['isa']}, {row['threads']} threads, {versions}"
