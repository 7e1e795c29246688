"""What starting up costs: factorising the 196 projections of a Qwen2.5-7B, once and from the cache.

    python bench/startup.py            the whole model, and torch.linalg.svd on one matrix of each shape
    python bench/startup.py --quick    one layer of 28 and smaller decompositions, scaled up; under a minute

The weights are synthetic, in bf16: 128 singular values falling as i^-0.2 over Gaussian noise whose spectrum begins
where they end. They begin 1, 0.87, 0.80; a sample of SmolLM2-135M's projections ran from 1, 0.49, 0.42 to 1, 0.97,
0.96. One matrix is in memory at a time. What was scaled up rather than measured says so in the column `basis`:
28 layers have the same shapes; a full decomposition of [m, n], m >= n, costs 4 m n^2 + 22 n^3 operations (QR, SVD of
the triangle, product of the two; Golub and Van Loan, section 8.6); a matrix and its transpose cost the same.
"""
from __future__ import annotations

import argparse
import csv
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tinylora_kernels.factors import cache as factor_cache  # noqa: E402
from tinylora_kernels.factors.svd import factorize_many, truncated_svd, weight_fingerprint  # noqa: E402

LAYERS = 28
HIDDEN, KV, FFN = 3584, 512, 18944
SHAPES = {  # [out, in]
    "q_proj": (HIDDEN, HIDDEN), "k_proj": (KV, HIDDEN), "v_proj": (KV, HIDDEN), "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (FFN, HIDDEN), "up_proj": (FFN, HIDDEN), "down_proj": (HIDDEN, FFN),
}  # fmt: skip
RANK = 2
HEAD, DECAY = 128, 0.2
FIELDS = ["item", "shape", "matrices", "cpu_s", "wall_s", "gigabyte_per_s", "ratio", "basis",
          "mode", "cpu", "threads", "torch", "python", "commit"]  # fmt: skip


def noise(shape: tuple[int, int]) -> torch.Tensor:
    """The bulk of the spectrum, [m, n] bf16 with largest singular value about (HEAD + 1)^-DECAY."""
    m, n = shape
    level = (HEAD + 1) ** -DECAY / (m**0.5 + n**0.5)
    weight = torch.empty(shape, dtype=torch.bfloat16)
    for begin in range(0, m, 512):
        weight[begin : begin + 512] = level * torch.randn(len(weight[begin : begin + 512]), n)
    return weight


def add_head(weight: torch.Tensor, seed: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """weight plus HEAD triplets of its own: a new matrix of the same bulk, written to `out` where given."""
    m, n = weight.shape
    generator = torch.Generator().manual_seed(seed)
    strength = torch.arange(1, HEAD + 1) ** -DECAY
    left = torch.randn(m, HEAD, generator=generator) / m**0.5 * strength
    right = torch.randn(HEAD, n, generator=generator) / n**0.5
    result = torch.empty_like(weight) if out is None else out
    for begin in range(0, m, 512):
        result[begin : begin + 512] = weight[begin : begin + 512] + left[begin : begin + 512] @ right
    return result


class Clock:
    """CPU and wall seconds added up over `with` blocks."""

    def __init__(self):
        self.cpu = self.wall = 0.0

    def __enter__(self):
        self.started = time.process_time(), time.perf_counter()

    def __exit__(self, *error):
        self.cpu += time.process_time() - self.started[0]
        self.wall += time.perf_counter() - self.started[1]


def measure_ours(layers: int) -> list[dict]:
    """Factorise `layers` layers with the cache cold, then warm; rows for each shape and in total."""
    rows = []
    clocks = {stage: {} for stage in ("factorise", "hash", "warm")}
    byte_count = 0
    worst = 0.0
    for shape in dict.fromkeys(SHAPES.values()):
        kinds = [kind for kind, wanted in SHAPES.items() if wanted == shape]
        bulk = noise(shape)
        clock = {stage: clocks[stage].setdefault(shape, Clock()) for stage in clocks}
        for seed in range(layers * len(kinds)):
            weight = add_head(bulk, seed)
            byte_count += weight.numel() * weight.element_size()
            with clock["hash"]:
                weight_fingerprint(weight)
            with clock["factorise"]:
                ((_, factors),) = factorize_many([("weight", weight)], RANK)
            with clock["warm"]:
                truncated_svd(weight, RANK)
            worst = max(worst, factors.residual)
        print(f"  {shape}: {clock['factorise'].cpu / (layers * len(kinds)):.2f} CPU seconds a matrix", flush=True)
        rows.append(row("factorise, cache cold", shape, LAYERS * len(kinds), clock["factorise"], LAYERS / layers))
    assert worst < 1e-5, f"residual {worst:.1e}: the factors are wrong, and so is every number above"
    scale = LAYERS / layers
    matrices = LAYERS * len(SHAPES)
    total = {stage: added(by_shape.values()) for stage, by_shape in clocks.items()}
    rows.append(row("factorise, cache cold", "all", matrices, total["factorise"], scale))
    hashing = row("hash", "all", matrices, total["hash"], scale)
    hashing["gigabyte_per_s"] = f"{byte_count / total['hash'].wall / 1e9:.2f}"
    rows += [hashing, row("factorise, cache warm (hash and read)", "all", matrices, total["warm"], scale)]
    return rows


def measure_cached_reload() -> dict:
    """Read every entry of a whole model back from the disk cache, without the hash that names it."""
    paths = factor_cache.cache_directory().glob(f"*{factor_cache.SUFFIX}")
    entries = [(path.stem, path.stat().st_size) for path in paths]
    clock = Clock()
    for number in range(LAYERS * len(SHAPES)):
        key, size = entries[number % len(entries)]
        with clock:
            assert factor_cache.load(key, at_most=size) is not None
    note = "measured" if len(entries) == LAYERS * len(SHAPES) else f"{len(entries)} entries read again and again"
    return row("read factors from the cache", "all", LAYERS * len(SHAPES), clock, 1, note)


def measure_full_svd(samples: list[tuple[int, int]]) -> tuple[list[dict], dict[tuple[int, int], float]]:
    """torch.linalg.svd in fp32 on one thread (no thread waits for another): rows, and CPU seconds by shape."""
    rows, seconds = [], {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for shape in samples:
        weight = add_head(noise(shape), 0).float()
        clock = Clock()
        with clock:
            torch.linalg.svd(weight, full_matrices=False)
        seconds[shape] = clock.cpu
        print(f"  torch.linalg.svd {shape}: {clock.cpu:.1f} CPU seconds", flush=True)
        rows.append(row("torch.linalg.svd, 1 thread", shape, 1, clock, 1, "measured"))
    torch.set_num_threads(threads)
    return rows, seconds


def full_svd_total(seconds: dict[tuple[int, int], float]) -> float:
    """CPU seconds of torch.linalg.svd for the whole model."""

    def operations(shape):
        n, m = sorted(shape)
        return 4 * m * n**2 + 22 * n**3

    def estimate(shape):
        for same in (shape, shape[::-1]):
            if same in seconds:
                return seconds[same]
        nearest = min(seconds, key=lambda sample: abs(operations(sample) - operations(shape)))
        return seconds[nearest] * operations(shape) / operations(nearest)

    return LAYERS * sum(estimate(shape) for shape in SHAPES.values())


def measure_arpack(shape: tuple[int, int]) -> list[dict]:
    """scipy's svds at its own full accuracy, the usual alternative; no rows without scipy."""
    try:
        from scipy.sparse.linalg import svds
    except ImportError:
        return []
    weight = add_head(noise(shape), 0).float().numpy()
    clock = Clock()
    with clock:
        svds(weight, k=RANK, solver="arpack", random_state=0)
    return [row("scipy svds (ARPACK), fp32", shape, 1, clock, 1, "measured")]


def measure_memory() -> dict:
    """Peak extra memory of the largest matrix, in a process of its own, as a multiple of the bf16 weight."""
    out = subprocess.run([sys.executable, __file__, "--memory"], check=True, capture_output=True, text=True).stdout
    result = row("peak extra memory / bf16 weight", (FFN, HIDDEN), 1, Clock(), 1, "upper bound")
    return {**result, "cpu_s": "", "wall_s": "", "ratio": out.strip()}


def memory_child() -> None:
    truncated_svd(torch.randn(600, 700), RANK, cache=False)  # libraries and their pools
    weight = noise((FFN, HIDDEN))
    add_head(weight, 0, out=weight)
    # From what is resident now to the most there ever was: an upper bound, making the weight included. VmHWM belongs to
    # this process alone; getrusage's maximum starts at that of the process that started this one.
    now = memory("VmRSS")
    truncated_svd(weight, RANK)
    print(f"{(memory('VmHWM') - now) / (weight.numel() * weight.element_size()):.2f}")


def memory(name: str) -> int:
    """A line of Linux's /proc/self/status, in bytes."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


def row(item, shape, matrices, clock, scale, basis=None) -> dict:
    if basis is None:
        basis = "measured" if scale == 1 else f"{LAYERS / scale:g} of {LAYERS} layers measured"
    shape = shape if isinstance(shape, str) else "x".join(map(str, shape))
    return {"item": item, "shape": shape, "matrices": matrices, "basis": basis,
            "cpu_s": f"{clock.cpu * scale:.3f}", "wall_s": f"{clock.wall * scale:.3f}"}  # fmt: skip


def added(clocks) -> Clock:
    total = Clock()
    for clock in clocks:
        total.cpu += clock.cpu
        total.wall += clock.wall
    return total


def machine(mode: str) -> dict:
    model = platform.processor()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = f"{names[0]} x{len(names)}" if names else model
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {"mode": mode, "cpu": model, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "python": platform.python_version(), "commit": git.stdout.strip()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one layer and smaller decompositions, scaled up")
    parser.add_argument("--layers", type=int, default=LAYERS, help="layers to measure in full mode; the rest scaled up")
    parser.add_argument("--out", type=pathlib.Path, help="CSV (default: bench/results/startup.csv, full mode only)")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        memory_child()
        return
    torch.manual_seed(0)
    samples = [(KV, HIDDEN), (HIDDEN // 2, HIDDEN // 2)] if options.quick else list(dict.fromkeys(SHAPES.values()))[:3]
    with tempfile.TemporaryDirectory() as directory:
        os.environ["TINYLORA_CACHE"] = directory
        rows = measure_ours(1 if options.quick else options.layers)
        rows.append(measure_cached_reload())
        rows.append(measure_memory())
    rows += measure_arpack((HIDDEN, HIDDEN))
    svd_rows, seconds = measure_full_svd(samples)
    ours = next(float(r["cpu_s"]) for r in rows if r["item"] == "factorise, cache cold" and r["shape"] == "all")
    theirs = full_svd_total(seconds)
    rows += svd_rows
    rows.append({"item": "torch.linalg.svd / ours, CPU time", "shape": "all", "matrices": LAYERS * len(SHAPES),
                 "cpu_s": f"{theirs:.0f}", "ratio": f"{theirs / ours:.0f}", "basis": "scaled up from the samples"})
    report(rows, machine("quick" if options.quick else "full"), options)


def report(rows: list[dict], facts: dict, options) -> None:
    out = options.out or (None if options.quick else ROOT / "bench" / "results" / "startup.csv")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows({**entry, **facts} for entry in rows)
    widths = {"item": 38, "shape": 11, "matrices": 8, "cpu_s": 10, "wall_s": 10, "gigabyte_per_s": 14, "ratio": 6}
    print("  ".join(f"{field:>{width}}" for field, width in widths.items()) + "  basis")
    for entry in rows:
        cells = [f"{entry.get(field, ''):>{width}}" for field, width in widths.items()]
        print("  ".join(cells) + f"  {entry['basis']}")
    print(", ".join(f"{name} {value}" for name, value in facts.items()))


if __name__ == "__main__":
    main()
