"""Tables of the results for the terminal and for report.txt: at most 100 columns."""
from __future__ import annotations

from pathlib import Path

from . import adapters, breakdown, layers, table, whole_model
from .contenders import FROZEN, NAMES, OURS, RIVALS
from .shapes import TOKENS
from .timing import geometric_mean

WIDTH = 100
FILE = "report.txt"
NARROW = 1024  # widths below this are allowed a worse worst case

Case = tuple[str, str, str, str, str]  # model, kind, tokens, dtype, u


def write(out: Path) -> None:
    """Print every table there are results for, keep them in report.txt and the plots beside it."""
    times = table.read(out / layers.TIMES_FILE)
    sections = []
    if times:
        sections += [_source(times), _ratios(times), _targets(times), _memory(table.read(out / layers.MEMORY_FILE))]
    if rows := table.read(out / whole_model.FILE):
        sections.append(_model(rows))
    if rows := table.read(out / breakdown.FILE):
        sections.append(_breakdown(rows))
    many = table.read(out / adapters.FILE)
    if many:
        sections.append(adapters.describe(many))
    short = "\n\n".join(sections)
    (out / FILE).write_text("\n\n".join([short, *([_cases(times)] if times else [])]) + "\n")
    print(short)
    if times or many:
        try:
            from . import plots
        except ImportError as error:
            print(f"no plots: {error}; pip install matplotlib")
            return
    if times:
        plots.write(times, out)
    if many:
        plots.write_adapters(many, out)


def by_case(times: list[dict], phase: str) -> dict[Case, dict[str, dict]]:
    """(model, kind, tokens, dtype, u) -> contender -> row, for one phase."""
    found: dict[Case, dict[str, dict]] = {}
    for row in times:
        if row["phase"] == phase:
            found.setdefault(_case(row), {})[row["contender"]] = row
    return found


def _case(row: dict) -> Case:
    return row["model"], row["kind"], row["tokens"], row["dtype"], row["u"]


def ratio(row: dict) -> float:
    return float(row["ratio_p50"])


def _source(times: list[dict]) -> str:
    last = times[-1]
    commits = " ".join(dict.fromkeys(row["commit"] for row in times))
    bandwidths = [float(row["stream_gb_s"]) for row in times]
    versions = f"torch {last['torch']}, PEFT {last['peft']}"
    return (
        f"{last['cpu']}, {last['isa']}, {last['threads']} threads, {versions}, {last['date']}\n"
        f"commits {commits}; code {' '.join(dict.fromkeys(row['code'] for row in times))}\n"
        f"stream bandwidth {min(bandwidths):.1f} to {max(bandwidths):.1f} GB/s; {len(by_case(times, 'both'))} cases"
    )


def _ratios(times: list[dict]) -> str:
    """Geometric means of the ratio to frozen, for each contender, dtype and token count."""
    lines = []
    titles = {"both": "forward + backward with dx", "forward": "forward", "inference": "forward without autograd"}
    for phase, title in titles.items():
        cases = by_case(times, phase)
        lines += ["", f"Ratio to the frozen layer, {title}: geometric mean over the layers"]
        lines.append(f"{'':<24}" + "".join(f"{dtype:>9}{'':>26}" for dtype in ("fp32", "bf16")))
        lines.append(f"{'tokens':<24}" + "".join(f"{tokens:>7}" for tokens in TOKENS) * 2)
        for name in NAMES[1:]:
            cells = []
            for dtype in ("fp32", "bf16"):
                for tokens in TOKENS:
                    rows = [c[name] for key, c in cases.items() if key[2:4] == (str(tokens), dtype) and name in c]
                    cells.append(f"{geometric_mean([ratio(row) for row in rows]):>7.3f}" if rows else f"{'-':>7}")
            lines.append(f"{name:<24}" + "".join(cells))
    return "\n".join(lines[1:])


def _targets(times: list[dict]) -> str:
    """Each target of the project with what was found."""
    cases = by_case(times, "both")
    lines = [f"Targets, forward + backward with dx{'':<21}{'wanted':>9}{'found':>9}{'cases':>7}"]

    def line(text: str, wanted: float, values: list[float], *, worst: bool = False, at_least: bool = False) -> None:
        if not values:
            return
        found = max(values) if worst else geometric_mean(values)
        met = found >= wanted if at_least else found <= wanted
        verdict = "met" if met else f"missed by {abs(found / wanted - 1):.1%}"
        lines.append(f"{text:<56}{wanted:>9.2f}{found:>9.3f}{len(values):>7}  {verdict}")

    ours = {key: ratio(c[OURS]) for key, c in cases.items() if OURS in c}
    width = {key: int(c[OURS]["out_features"]) for key, c in cases.items() if OURS in c}
    many = {key: value for key, value in ours.items() if int(key[2]) >= 128}
    few = {key: value for key, value in ours.items() if int(key[2]) < 128}
    for dtype, wanted in (("fp32", 1.02), ("bf16", 1.03)):
        line(f"tokens >= 128, {dtype}, geometric mean", wanted, [v for k, v in many.items() if k[3] == dtype])
    line("tokens >= 128, worst, width >= 1024", 1.08, [v for k, v in many.items() if width[k] >= NARROW], worst=True)
    line("tokens >= 128, worst, width < 1024", 1.12, [v for k, v in many.items() if width[k] < NARROW], worst=True)
    line("tokens 1 and 8, geometric mean", 1.08, list(few.values()))
    line("tokens 1 and 8, worst", 1.12, list(few.values()), worst=True)

    def over(names: tuple[str, ...], keys: list[Case]) -> list[float]:
        """Their time over ours, the fastest of the names that ran."""
        found = [(min((ratio(cases[k][n]) for n in names if n in cases[k]), default=None), ours[k]) for k in keys]
        return [theirs / mine for theirs, mine in found if theirs is not None]

    fp32, bf16 = ([key for key in ours if key[3] == dtype] for dtype in ("fp32", "bf16"))
    peft = tuple(name for name in NAMES if name.startswith("peft"))
    line("PEFT as it comes / ours, bf16, geometric mean", 1.5, over(("peft",), bf16), at_least=True)
    line("PEFT at its best / ours, bf16, geometric mean", 1.15, over(peft, bf16), at_least=True)
    line("PEFT at its best / ours, fp32, geometric mean", 1.15, over(peft, fp32), at_least=True)
    rivals = {key: over(tuple(RIVALS), [key]) for key in ours}
    beaten = {key: found[0] for key, found in rivals.items() if found and found[0] < 1}
    lines.append(f"Cases where some rival is faster than ours: {len(beaten)} of {len(ours)}")
    for key, value in sorted(beaten.items(), key=lambda item: item[1])[:12]:
        fastest = min((ratio(row), name) for name, row in cases[key].items() if name in RIVALS)
        lines.append(f"  {' '.join(key):<50} ours {ours[key]:.3f}   {fastest[1]} {fastest[0]:.3f}   ({value:.3f})")
    return "\n".join(lines)


def _memory(rows: list[dict]) -> str:
    """Bytes a token, averaged over the layers, at the largest token count they were counted for."""
    counted = [row for row in rows if row["saved_bytes"]]
    if not counted:
        return "Memory: not counted"
    tokens = max(int(row["tokens"]) for row in counted)
    lines = [f"Memory of forward + backward at {tokens} tokens, mean over the layers, KiB"]
    lines.append(f"{'':<24}" + "".join(f"{dtype:>12}{'':>24}" for dtype in ("fp32", "bf16")))
    lines.append(f"{'':<24}" + f"{'saved':>12}{'peak':>12}{'written':>12}" * 2)
    for name in (FROZEN, *NAMES[2:]):
        cells = []
        for dtype in ("fp32", "bf16"):
            chosen = [r for r in counted if (r["contender"], r["dtype"], r["tokens"]) == (name, dtype, str(tokens))]
            for column in ("saved_bytes", "peak_bytes", "written_bytes"):
                values = [float(row[column]) for row in chosen if row[column]]
                cells.append(f"{sum(values) / len(values) / 1024:>12,.1f}" if values else f"{'-':>12}")
        lines.append(f"{name:<24}" + "".join(cells))
    return "\n".join(lines)


def _cases(times: list[dict]) -> str:
    """Ours, case by case, with the limit beside it and the fastest rival."""
    phases = {phase: by_case(times, phase) for phase in ("forward", "backward", "both")}
    lines = [
        "Every case: frozen forward + backward, our ratios, the ratio at the physical limit, fastest rival",
        f"{'layer':<27}{'tokens':>7}{'':>5}{'u':>3}{'frozen us':>11}{'fwd':>7}{'bwd':>7}{'both':>7}{'limit':>7}  rival",
    ]
    for key, contenders in phases["both"].items():
        if OURS not in contenders:
            continue
        mine, frozen = contenders[OURS], contenders[FROZEN]
        microseconds = float(frozen["p50_us"])
        limit = 1 + float(mine["limit_us"]) / microseconds
        rivals = [(ratio(row), name) for name, row in contenders.items() if name in RIVALS]
        rival = min(rivals, default=(float("nan"), "none"))
        forward, backward = (ratio(phases[phase][key][OURS]) for phase in ("forward", "backward"))
        lines.append(
            f"{key[0] + ' ' + key[1]:<27}{key[2]:>7}{key[3]:>5}{key[4]:>3}{microseconds:>11.1f}"
            f"{forward:>7.3f}{backward:>7.3f}{ratio(mine):>7.3f}{limit:>7.3f}  {rival[0]:.2f} {rival[1][:10]}"
        )
    return "\n".join(lines)


def _model(rows: list[dict]) -> str:
    modules = ", ".join(sorted({row["modules"] for row in rows}))
    lines = [f"Whole model: SmolLM2-135M's widths, {modules} adapted modules, 4 x 128 tokens; unit: frozen"]
    numbers = f"{'ms':>9}{'p20':>8}{'ratio':>8}{'p80':>8}{'bytes':>7}"
    lines.append(f"{'':<24}{'dtype':<10}{'contender':<14}{'phase':<10}{numbers}")
    for row in rows:
        held = row["adapter_bytes_per_token_and_module"] if row["contender"] != FROZEN else ""
        lines.append(
            f"{row['workload']:<24}{row['dtype']:<10}{row['contender']:<14}{row['phase']:<10}"
            f"{float(row['p50_us']) / 1e3:>9.2f}"
            f"{float(row['ratio_p20']):>8.3f}{ratio(row):>8.3f}{float(row['ratio_p80']):>8.3f}{held:>7}"
        )
    return "\n".join([*lines, "bytes: saved for backward beyond the frozen step's, for each token and adapted module"])


def _breakdown(rows: list[dict]) -> str:
    lines = ["Where adapter time goes (contraction is part of dispatch; shares: of the sum of the other parts)"]
    numbers = f"{'us a call':>10}{'calls':>7}{'ms a step':>11}{'share':>8}"
    lines.append(f"{'':<24}{'dtype':<10}{'direction':<11}{'part':<14}{numbers}")
    for row in rows:
        lines.append(
            f"{row['workload']:<24}{row['dtype']:<10}{row['direction']:<11}{row['part']:<14}"
            f"{float(row['us_per_call']):>10.2f}{row['calls']:>7}"
            f"{float(row['ms_per_step']):>11.3f}{float(row['share']):>8.1%}"
        )
    return "\n".join(lines)
