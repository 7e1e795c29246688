"""make gpu: what a machine with a GPU is asked first, in order of importance, within SECONDS; one table last.

    python -m bench.gpu --seconds 290 [--out DIR] [--before DIR] [--device cpu]

Nothing is installed and nothing fetched: the package is used as it lies here, with a library built here or elsewhere
(tinylora_kernels/libtinylora.so and _build_record.json beside it). One without code for the card compiles it in the
first parts, a module for each dtype and rank, and has that many seconds less for the rest: better is one built with
TINYLORA_CUDA_ARCHITECTURES, as `make gpu` builds it where there is none. The node of linear layers is compiled beside
the tests of the kernels, which run without it; no process looks for it before it is there, or the workers of one part
would disagree about which tests there are. Each part is a process of its own, since a crash of the GPU ends the
process; what they print is in DIR/log.txt as it comes, and every figure in DIR/figures.jsonl.

Args:
    --out: a directory for results; default: $OUT, or bench/results/gpu/latest.
    --before: another checkout with a library of its own, whose ops are timed beside ours.
    --device cpu: all of it on the CPU, to try it.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
TESTS = ["-q", "-p", "no:cacheprovider", "--maxfail=25", "--tb=short"]
NO_NODE = {"TINYLORA_NODE": "0"}


class Part(NamedTuple):
    """One process: at most so many seconds, however many are left."""

    name: str
    seconds: float
    arguments: list[str]
    environment: dict[str, str] = {}


def parts(device: str, before: Path | None) -> list[Part]:
    """The first needs no node in C++, the second is about it: what is newest comes before what a card has seen."""
    on = ["--device", device]
    tests = ["-m", "pytest", *TESTS, *(["-n", "8"] if device == "cuda" and has_xdist() else [])]
    ours, theirs = ("cuda", "triton") if device == "cuda" else ("cpu", "cpu")
    products = [str(Path(__file__).with_name("products.py")), *on]
    main_cases = ["q8192", "gate8192", "q2048", "gate2048", "down8192", "kv8192", "q1", "gate1"]
    ops = "tests/ops/test_backends.py"
    found = [
        Part("kernels", 40, [*tests, "tests/gpu/test_ops.py", "-k", "not triton"], NO_NODE),
        # the backend whose node it is: the others run the one in Python, here as there
        Part("layers, node in C++", 75, [*tests, "tests/gpu", "-k", f"(cpp and {device}-{ours}) or test_direct"]),
        Part("layers", 60, [*tests, "tests/gpu/test_layers.py", "-k", "not triton"], NO_NODE),
        Part("products", 50, [*products, "--backend", ours]),
        Part("block", 60, ["-m", "bench.gpu.block", *on, "--backends", *dict.fromkeys((ours, theirs))]),
        Part("products, triton", 30, [*products, "--backend", theirs, "--label", "triton", "--cases", *main_cases]),
        Part("ops", 60, [*tests, ops, "-k", "not triton"], NO_NODE | {"TINYLORA_REPEATS": "30"}),
        # each of its variants is compiled for seconds
        Part("triton", 60, [*tests, "tests/gpu", ops, "-k", "triton"], NO_NODE | {"TINYLORA_REPEATS": "30"}),
    ]
    if before is not None:
        command = [*products, "--backend", ours, "--label", "before", "--cases", *main_cases]
        found.insert(-2, Part("products, before", 30, command, {"PYTHONPATH": str(before)}))
    # What the package does not have yet, where there is time for it: variants/README.md.
    families = ("persistent", "skinny", "cutlass") if device == "cuda" else ("persistent",)
    for family in families:
        found.append(Part(f"variants, {family}", 60, ["-m", "bench.gpu.variants", *on, "--families", family]))
    return found


def has_xdist() -> bool:
    return subprocess.run([PYTHON, "-c", "import xdist"], capture_output=True).returncode == 0


class Results:
    """What the parts print, kept as it comes."""

    def __init__(self, out: Path) -> None:
        self.rows: list[dict] = []  # figures
        self.figures, self.log = (out / "figures.jsonl").open("a"), (out / "log.txt").open("a")

    def read(self, stream: IO[str], said: list[str]) -> None:
        for line in stream:
            is_figure = line.startswith("@{")
            if is_figure:
                self.rows.append(json.loads(line[1:]))
            elif line.strip():
                said.append(line.rstrip())
            file = self.figures if is_figure else self.log
            file.write(line[is_figure:])
            file.flush()


def run(part: Part, seconds: float, results: Results) -> str:
    """Its process until it ends or its time does; what it came to, and the last of what it said."""
    ours = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    begun, said = time.time(), [""]
    results.log.write(f"\n-- {part.name}\n")
    process = subprocess.Popen(
        [PYTHON, *part.arguments], cwd=ROOT, env=os.environ | ours | part.environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    reader = threading.Thread(target=results.read, args=(process.stdout, said), daemon=True)
    reader.start()
    try:
        end = f"exit {process.wait(seconds)}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        end = "out of time"
    reader.join(5)
    telling = [line for line in said if line.startswith(("FAILED", "ERROR", "WRONG", "E  "))]
    return "\n".join([f"-- {part.name}: {end}, {time.time() - begun:.0f} s", *telling[-30:], *said[-4:]])


def device_code() -> str:
    """What the library that lies here has for the card, as its build has it."""
    try:
        built = json.loads((ROOT / "tinylora_kernels/_build_record.json").read_text())["device_code"]
    except (OSError, ValueError, KeyError):
        return "no record says what the library has"
    return f"in the library, by {built}" if built else (
        "none in the library: what is not in the cache is compiled in the first parts, up to 9 modules "
        "of some seconds; one built with TINYLORA_CUDA_ARCHITECTURES compiles none"
    )  # fmt: skip


def table(rows: list[dict]) -> str:
    lines = []
    for part in dict.fromkeys(row["part"] for row in rows):
        mine = [row for row in rows if row["part"] == part]
        cases, names = (list(dict.fromkeys(row[key] for row in mine)) for key in ("case", "name"))
        unit = "microseconds" if part.endswith("host") else "time over frozen; frozen and parts in microseconds"
        width = max(len(case) for case in cases) + 2
        lines += ["", f"{part}: {unit}", " " * 30 + "".join(f"{case:>{width}}" for case in cases)]
        for name in names:
            cells = {row["case"]: row for row in mine if row["name"] == name}
            texts = (text_of(cells[case]) if case in cells else "" for case in cases)
            lines.append(f"{name:30}" + "".join(f"{text:>{width}}" for text in texts))
    return "\n".join(lines)


def text_of(row: dict) -> str:
    return f"{row['us']:.1f}" if row["ratio"] is None else f"{row['ratio']:.3f}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=290)
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT") or ROOT / "bench/results/gpu/latest")
    parser.add_argument("--before", type=Path)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = parser.parse_args()
    begun, out = time.time(), Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    results = Results(out)

    def left() -> float:
        return options.seconds - (time.time() - begun)

    def ask(part: Part) -> None:
        if left() < 12:
            print(f"-- {part.name}: no time left", flush=True)
        else:
            print(run(part, min(part.seconds, left() - 4), results), flush=True)

    before = options.before.resolve() if options.before is not None and options.before.is_dir() else None
    compiling = subprocess.Popen(
        [PYTHON, "-m", "tinylora_kernels", "compile"], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=results.log, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    print(f"-- device code: {device_code()}", flush=True)
    ask(Part("info", 40, ["-m", "tinylora_kernels", "info"], NO_NODE))
    kernels, in_cpp, *rest = parts(options.device, before)
    if beside := compiling.poll() is None:
        ask(kernels)
    with contextlib.suppress(subprocess.TimeoutExpired):
        compiling.wait(max(0, min(60, left() - 60)))
    compiled = compiling.poll() == 0
    print("-- node in C++:", "compiled" if compiled else f"not there (exit {compiling.poll()})", flush=True)
    if compiling.poll() is None:
        os.killpg(compiling.pid, 9)  # or it would come into some part, and beside its figures
    if compiled:
        ask(in_cpp)
    for part in ([] if beside else [kernels]) + rest:
        ask(part if compiled else part._replace(environment=NO_NODE | part.environment))
    text = table(results.rows)
    (out / "table.txt").write_text(text + "\n")
    print(text, f"\n{time.time() - begun:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
