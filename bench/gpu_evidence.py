"""Evidence about the CUDA kernels that needs no GPU: compiled code, counted traffic, physical bounds, caught mutants.

    python bench/gpu_evidence.py                all of it, into bench/results/gpu_*.csv and .md
    python bench/gpu_evidence.py traffic        one part: kernels, traffic, bounds or mutants; the pages are rewritten

kernels   NVRTC and nvcc for every architecture, element type and rank: registers, shared memory, spills, accesses.
traffic   the kernels executed from their PTX on the layers of real models: bytes and sectors, counted, not estimated.
bounds    the least time the published bandwidth and arithmetic rate of two cards allow. No time here was measured.
mutants   deliberate bugs in the kernels, each with the check that caught it and what it reported.
"""
from __future__ import annotations

import csv
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
sys.path.insert(0, str(ROOT))

from bench.grid.shapes import MODELS, RANK, layer  # noqa: E402
from tests.cases import Case, make_case, run_ops  # noqa: E402
from tests.part_cases import PartCase, make_part_case, run_parts  # noqa: E402
from tests.sim import compilers, static  # noqa: E402
from tests.sim.checks import MODE, look_for  # noqa: E402
from tests.sim.cuda_gpu import SimulatedCuda  # noqa: E402
from tests.sim.host import emulator  # noqa: E402
from tests.sim.host.plan import plan_rows, shape  # noqa: E402
from tests.sim.mutants import MUTANTS, PART_MUTANTS, edited_copy  # noqa: E402
from tests.sim.test_cuda_parts import look_for as look_for_parts  # noqa: E402

HEAD = 152064  # the output layer of Qwen2.5
USUAL_RANKS = (1, 2)
# NVIDIA's datasheets: H100 SXM5 80 GB, A100 SXM4 80 GB; dense bf16 operations and bytes of memory traffic a second.
CARDS = {"H100": (989.4e12, 3.35e12), "A100": (312e12, 2.039e12)}


def kernels() -> Iterator[dict]:
    """One row for every kernel of the method's usual ranks, element type, architecture and compiler."""
    for element, size in static.ELEMENTS.items():
        for architecture in static.ARCHITECTURES:
            for compiler in compilers.COMPILERS:
                for name, kernel in sorted(static.inspect(element, USUAL_RANKS, architecture, compiler).items()):
                    rank, tile, *ids = name.split()
                    if tile == "bank" and element != "float32":
                        continue  # the same kernel for every element type
                    counts = kernel.instructions
                    yield {
                        "element": element, "architecture": f"sm_{architecture}", "rank": rank[1:],
                        "kernel": " ".join([tile, *ids]), "compiler": compiler,
                        "threads": static.THREADS.get(tile) or shape(tile, size).threads,
                        "registers": kernel.registers, "stack_bytes": kernel.stack, "local_bytes": kernel.local,
                        "shared_bytes": kernel.shared, "instructions": counts["instructions"],
                        "row_loads": counts["LDG.64"] + counts["LDG.128"], "factor_loads": counts["LDG.128.CONSTANT"],
                        "row_stores": counts["STG.64"] + counts["STG.128"],
                        "local_accesses": sum(n for op, n in counts.items() if op.startswith(("LDL", "STL"))),
                    }  # fmt: skip


def widths() -> list[int]:
    """Every output width of the models of the benchmark, and one tied head."""
    found = {w for m in MODELS.values() for w in (m.hidden, m.key_value, m.intermediate)}
    return [*sorted(found), HEAD]


def traffic() -> Iterator[dict]:
    """Forward and backward of one layer for each width, and of the fused projections by their parts, executed from the
    PTX for compute_90.
    """
    for dtype in (torch.bfloat16, torch.float32):
        for features in widths():
            rows, gpu = 2 if features == HEAD else 4, SimulatedCuda(90)
            run_ops(gpu, make_case(Case(rows, features, RANK, numbers=13), dtype))
            yield from moved_by(gpu, dtype, rows, features, plan_rows(rows, features, dtype.itemsize).tile)
        for sizes in fused_sizes():
            rows, gpu = 4, SimulatedCuda(90)
            run_parts(gpu, make_part_case(PartCase(rows, sizes, (0,) * len(sizes), RANK, numbers=13), dtype))
            tile = plan_rows(rows, max(sizes), dtype.itemsize).tile
            yield from moved_by(gpu, dtype, rows, sum(sizes), f"{tile}, {len(sizes)} parts")


def fused_sizes() -> list[tuple[int, ...]]:
    """The parts of q, k, v and of gate, up, of the models of the benchmark."""
    found = {(m.hidden, m.key_value, m.key_value) for m in MODELS.values()}
    return sorted(found | {(m.intermediate, m.intermediate) for m in MODELS.values()})


def moved_by(gpu: SimulatedCuda, dtype: torch.dtype, rows: int, features: int, tile: str) -> Iterator[dict]:
    """What one forward and one backward launch moved."""
    forward, backward = gpu.launches
    for direction, launch, source, target in (("forward", forward, "y", "y"), ("backward", backward, "g", "g0")):
        seen, least = launch.traffic, rows * features * dtype.itemsize
        moved = seen.bytes_read(source) + seen.bytes_written(target)
        yield {
            "element": str(dtype).removeprefix("torch."), "columns": features, "rank": RANK,
            "direction": direction, "tile": tile,
            "row_bytes_moved": moved // rows, "row_bytes_least": 2 * least // rows,
            "ratio": round(moved / (2 * least), 4),
            "sectors_per_request": round(seen.of(source).sectors_per_request, 2),
            "excess_sectors": round(seen.of(source).excess, 4),
            "basis_bytes_a_row": seen.bytes_read("basis") // rows,
            "launches": 1,
        }  # fmt: skip


def bounds() -> Iterator[dict]:
    """The least time of the frozen layer and of the update beside it, from published rates alone. bf16, r = 2."""
    size = 2
    for model in MODELS:
        for kind in ("q", "k", "gate", "down"):
            s = layer(model, kind)
            for tokens in (1, 128, 2048, 8192):
                for card, (operations, bandwidth) in CARDS.items():
                    multiply = 2 * tokens * s.in_features * s.out_features / operations
                    moved = size * (s.in_features * s.out_features + tokens * (s.in_features + s.out_features))
                    frozen = max(multiply, moved / bandwidth)
                    basis, coefficients = 4 * RANK * s.out_features, 4 * RANK * tokens
                    forward = (2 * size * tokens * s.out_features + basis + coefficients) / bandwidth
                    backward = (2 * size * tokens * s.out_features + basis + 3 * coefficients) / bandwidth
                    yield {
                        "card": card, "model": model, "layer": kind, "out": s.out_features, "in": s.in_features,
                        "tokens": tokens, "frozen_us": round(frozen * 1e6, 3), "update_us": round(forward * 1e6, 3),
                        "update_backward_us": round(backward * 1e6, 3),
                        "update_over_frozen": round(forward / frozen, 4),
                    }  # fmt: skip


def repeatable(text: str) -> str:
    """What a check said, without addresses, process numbers and folders."""
    text = re.sub(r"==\d+==|\S*/(?=tests/|csrc/|cuda/)|( on)? address 0x.*| \(at \w+\)", "", text)
    return text.replace("|", "/")[:110]


def mutants() -> Iterator[dict]:
    """Each mutant under the check that is expected to catch it, on the host emulator."""
    for mutant in MUTANTS + PART_MUTANTS:
        mode = MODE.get(mutant.check, "plain")
        look = look_for if mutant in MUTANTS else look_for_parts
        with tempfile.TemporaryDirectory() as folder:
            sources = edited_copy(emulator.KERNELS, Path(folder) / "cuda", (mutant.edit,))
            executable = emulator.build(mode, kernels=sources, ranks=(2,), dtypes=(torch.bfloat16,))
            try:
                look(mutant, lambda run=executable, **options: emulator.Emulated(run, **options))
                report = "NOT CAUGHT"
            except (emulator.Fault, AssertionError, pytest.fail.Exception) as caught:
                report = str(caught).strip().split("\n")[0] or type(caught).__name__
        found = {"mutant": mutant.name, "file": mutant.file, "check": mutant.check, "build": mode}
        yield found | {"report": repeatable(report)}


PARTS = {"kernels": kernels, "traffic": traffic, "bounds": bounds, "mutants": mutants}


def table(header: list[str], rows: list[list]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]) + "\n"


def span(values: list[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def read(part: str) -> list[dict]:
    path = RESULTS / f"gpu_{part}.csv"
    return list(csv.DictReader(path.open())) if path.exists() else []


INTRODUCTION = """# CUDA kernels: evidence without a GPU

Written by `python bench/gpu_evidence.py`. Verified by compilation and simulation; not run on a GPU. No time on this
page was measured.
"""
COMPILED = """## Compiled code

{kernels} kernels for {architectures} by each of {compilers}; with spills or local memory: {spilled}. The wheels hold
those of the first. Ranges are over the architectures, r = 1 and 2.
"""
TRAFFIC = """## Traffic, counted in simulation

The PTX for compute_90 on the output widths of the benchmark's models, u = 13. Least: each row read once and written
once. Excess sectors 1.0 is perfect coalescing. Basis bytes are served by L1 and L2. A layer is one launch forward and
one backward.
"""
BOUNDS = """## Lower bounds on time (computed, not measured)

bf16, r = 2. Frozen layer: the larger of its operations over the published dense bf16 rate and its bytes over the
published bandwidth. Update: its bytes over the bandwidth, all of them from memory; what a cache still holds of the
output makes it less. {cards}. Every token count is in gpu_bounds.csv.
"""
MUTANTS_INTRODUCTION = """# Mutants of the CUDA kernels

Written by `python bench/gpu_evidence.py`. Each is one textual edit of csrc/cuda, run on the host emulator under the
check that is expected to find it (tests/sim/checks.py). budget: results within the error budget against float64.
schedule: the same bits in any order of execution. bounds, alignment: AddressSanitizer and UndefinedBehaviorSanitizer.
races: the race detector. {count} mutants, {missed} missed.
"""


def kernels_table(found: list[dict]) -> str:
    """Registers and instructions of each kernel, compiler beside compiler."""
    compiled = list(dict.fromkeys(r["compiler"] for r in found))
    groups = defaultdict(lambda: defaultdict(list))
    for r in found:
        groups[r["element"], r["kernel"], int(r["rank"]), r["threads"]][r["compiler"]].append(r)
    rows = []
    for key, group in groups.items():
        spans = [span([int(r[k]) for r in group[name]]) for k in ("registers", "instructions") for name in compiled]
        rows.append([*key, *spans])
    header = [f"{what}, {name}" for what in ("registers", "instructions") for name in compiled]
    return table(["type", "kernel", "r", "most threads", *header], rows)


def columns_table(found: list[dict], columns: list[str]) -> str:
    header = [c.replace("_us", ", us").replace("_", " ") for c in columns]
    return table(header, [[r[c] for c in columns] for r in found])


def page() -> str:
    """The page from the CSV files that exist."""
    out = [INTRODUCTION]
    if found := read("kernels"):
        spilled = sum(any(int(r[k]) for k in ("stack_bytes", "local_bytes", "local_accesses")) for r in found)
        architectures = ", ".join(sorted({r["architecture"] for r in found}, key=lambda a: int(a[3:])))
        names = list(dict.fromkeys(r["compiler"] for r in found))
        count = len(found) // len(names)
        text = COMPILED.format(
            kernels=count, architectures=architectures, compilers=" and ".join(names), spilled=spilled
        )
        out += [text, kernels_table(found)]
    if found := read("traffic"):
        columns = ["element", "columns", "direction", "tile", "row_bytes_moved", "row_bytes_least", "ratio",
                   "sectors_per_request", "excess_sectors", "basis_bytes_a_row", "launches"]  # fmt: skip
        out += [TRAFFIC, columns_table(found, columns)]
    if found := [r for r in read("bounds") if r["tokens"] in ("128", "2048")]:
        cards = "; ".join(f"{c}: {ops / 1e12:.0f} TFLOP/s, {rate / 1e12:.2f} TB/s" for c, (ops, rate) in CARDS.items())
        columns = ["card", "model", "layer", "out", "in", "tokens", "frozen_us", "update_us", "update_backward_us",
                   "update_over_frozen"]  # fmt: skip
        out += [BOUNDS.format(cards=cards), columns_table(found, columns)]
    return "\n".join(out)


def mutants_page() -> str:
    found = read("mutants")
    rows = [[f"{r['mutant']} (`{r['file']}`)", r["check"], r["build"], r["report"]] for r in found]
    introduction = MUTANTS_INTRODUCTION.format(count=len(rows), missed=sum(r["report"] == "NOT CAUGHT" for r in found))
    return introduction + "\n" + table(["mutant", "caught by", "build", "what it reported"], rows)


def main() -> None:
    wanted = sys.argv[1:] or list(PARTS)
    if unknown := [part for part in wanted if part not in PARTS]:
        sys.exit(f"gpu_evidence: expected parts out of {', '.join(PARTS)}, found {', '.join(unknown)}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    for part in wanted:
        path, writer = RESULTS / f"gpu_{part}.csv", None
        with path.open("w", newline="") as stream:
            for row in PARTS[part]():
                if writer is None:
                    writer = csv.DictWriter(stream, row, lineterminator="\n")
                    writer.writeheader()
                writer.writerow(row)
        print(f"wrote {path.relative_to(ROOT)}", flush=True)
    (RESULTS / "gpu_kernels.md").write_text(page())
    (RESULTS / "gpu_mutants.md").write_text(mutants_page())


if __name__ == "__main__":
    main()
