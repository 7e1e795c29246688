"""Instructions that the aarch64 kernels execute, by instruction set, counted under qemu-user: no times.

    make wheels WHEELS=cpu-aarch64 && python -m bench.instructions      writes bench/results/instructions.csv

The objects are those of the wheel. A count is that of two calls less that of one: a call, and nothing around it.
"""
from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
OBJECTS = ROOT / "build/wheels/objects-cpu-aarch64/CMakeFiles/tinylora.dir/csrc/cpu"
RESULTS = ROOT / "bench/results/instructions.csv"
COLUMNS = ("kernel", "dtype", "N", "D", "rank_or_vectors", "isa", "instructions", "per_element", "portable_over_this")
ISAS = ("portable", "neon", "neon_bf16", "sve256")
CPU = "max,sve-default-vector-length=32"  # has all of them
DTYPES = ("float32", "bfloat16", "float16", "float64")  # in the order of the library
ROWS, WIDTHS, RANKS = 64, (576, 1000, 2048), (1, 2, 3, 4, 8)
WEIGHT, VECTORS = (256, 1024), (4, 8)


def build(folder: Path, objects: Path) -> list[str]:
    """The command that counts, up to the kernel's arguments."""
    plugin, program = folder / "count.so", folder / "kernels"
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", HERE / "count.c", "-o", plugin], check=True)
    compiled = [objects / f"{name}.cpp.o" for name in ("isa", *ISAS)]
    options = ["-std=c++17", "-O2", "-static", "-w", f"-I{ROOT / 'csrc'}"]
    subprocess.run(
        ["aarch64-linux-gnu-g++", *options, HERE / "kernels.cpp", *compiled, "-o", program], check=True
    )  # fmt: skip
    return ["qemu-aarch64", "-cpu", CPU, "-plugin", str(plugin), str(program)]


def count(command: list[str], isa: str, kernel: str, dtype: str, *shape: int) -> int:
    """Instructions of one call."""
    arguments = [isa, kernel, str(DTYPES.index(dtype)), *map(str, shape)]
    once, twice = (
        int(subprocess.run([*command, *arguments, repeats], check=True, capture_output=True, text=True).stderr)
        for repeats in ("1", "2")
    )
    return twice - once


def main() -> int:
    rows = []
    calls = [("rows", dtype, ROWS, width, rank) for dtype in DTYPES for width in WIDTHS for rank in RANKS]
    calls += [("products", dtype, *WEIGHT, vectors) for dtype in DTYPES[:3] for vectors in VECTORS]
    with tempfile.TemporaryDirectory() as folder:
        command = build(Path(folder), Path(sys.argv[1]) if sys.argv[1:] else OBJECTS)
        for kernel, dtype, count_rows, width, rank in calls:
            portable = None  # has no products
            for isa in ISAS if kernel == "rows" else ISAS[1:]:
                found = count(command, isa, kernel, dtype, count_rows, width, rank)
                portable = found if isa == "portable" else portable
                shape = {"N": count_rows, "D": width, "rank_or_vectors": rank}
                rows.append({
                    "kernel": kernel, "dtype": dtype, **shape, "isa": isa, "instructions": found,
                    "per_element": f"{found / count_rows / width:.3f}",
                    "portable_over_this": f"{portable / found:.2f}" if portable else "",
                })  # fmt: skip
                print("  ".join(map(str, rows[-1].values())), flush=True)
    with RESULTS.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
