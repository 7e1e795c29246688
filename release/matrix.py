"""The wheels in fresh environments: every Python found here times several versions of torch, the same files in each.

    make matrix                                             prints the table, writes bench/results/matrix.csv
    python release/matrix.py --torch 2.13.0 --python 3.12   one environment
    python release/matrix.py --installer uv                 by uv instead of by pip
    python release/matrix.py --missing                      those that the last run did not try, with the same files
    python release/matrix.py --add                          keeps the rows of other environments in --out
    python release/matrix.py --index-url https://download.pytorch.org/whl/cpu    where that index can be reached

In each: import, forward and backward against the float64 reference in three dtypes, an adapter saved and loaded
(matrix_check.py). torch comes from the registry that pip is set up for. Where that has CUDA builds alone, they are
installed without NVIDIA's libraries, and import with empty stand-ins for them (standins.py): only their CPU side is
tried. One environment exists at a time; a download of torch is 0.2 to 0.9 GB and is kept in --cache.
"""
from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import standins

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results/matrix.csv"
CHECK = Path(__file__).with_name("matrix_check.py")
PYTHONS, TORCHES = ("3.10", "3.11", "3.12", "3.13", "3.14"), ("2.10.0", "2.11.0", "2.13.0", "newest")
COLUMNS = ("python", "torch", "installer", "cuda_libraries", "file", "result", "isa", "float32_error", "date")


class Unavailable(Exception):
    """Why an environment cannot be had, or what failed in it, in one line."""


def run(command: list, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    done = subprocess.run(list(map(str, command)), env=env, cwd=cwd, text=True, capture_output=True, timeout=1800)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).strip().splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"(ERROR|\w*Error)\b", line)] or lines
        raise Unavailable(errors[-1][:200] if errors else f"exit status {done.returncode}")
    return done.stdout


def find_python(version: str) -> str | None:
    """An interpreter of that version: on PATH, or made by pyenv or uv."""
    folders = (f".pyenv/versions/{version}.*", f".local/share/uv/python/*-{version}.*")
    made = [home / "bin/python" for folder in folders for home in Path.home().glob(folder)]
    for candidate in (shutil.which(f"python{version}"), *made):
        works = candidate and subprocess.run([candidate, "-c", "import venv, ensurepip"], capture_output=True)
        if works and works.returncode == 0:
            return str(candidate)
    return None


def download_torch(python_version: str, version: str, cache: Path, index: list[str]) -> Path:
    """The wheel of that torch for that Python, without anything it depends on; by the pip that runs this."""
    folder = Path(tempfile.mkdtemp(dir=cache))
    try:
        wanted = "torch" if version == "newest" else f"torch=={version}"
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", folder]
        run([*command, "--python-version", python_version, wanted, "--find-links", cache, *index])
        (wheel,) = folder.iterdir()
        return wheel.replace(cache / wheel.name)
    except Unavailable as reason:
        raise Unavailable(f"the registry has no such wheel ({reason})") from None
    finally:
        shutil.rmtree(folder)


class Environment:
    """A virtual environment with torch and the package's other dependencies."""

    def __init__(self, python: str, torch: Path, requirements: list[str], folder: Path, installer: str):
        self.folder, self.python = folder, folder / "bin/python"
        if installer == "uv":
            uv = shutil.which("uv")  # by its path: some installations below have another PATH
            run([uv, "venv", "-q", "--python", python, folder])
            self.install = [uv, "pip", "install", "-q", "--python", self.python]
        else:
            run([python, "-m", "venv", folder])
            self.install = [self.python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        run([*self.install, "--no-deps", torch])
        listing = "import importlib.metadata, json; print(json.dumps(importlib.metadata.requires('torch')))"
        needs = [need for need in json.loads(run([self.python, "-c", listing])) if "extra ==" not in need]
        run([*self.install, *(n for n in needs if not re.match(r"nvidia|cuda|triton", n)), *requirements])
        self.variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TINYLORA_NODE": "ready"}
        for name in ("PYTHONPATH", "TINYLORA_BACKEND", "TINYLORA_CPU_ISA"):
            self.variables.pop(name, None)
        self.cuda_libraries = self._complete_torch()

    def _complete_torch(self) -> str:
        """Make torch importable; what it took."""
        command = [self.python, "-c", "import torch; print(torch.version.cuda)"]
        try:
            return "none needed" if run(command, self.variables).strip() == "None" else "installed"
        except Unavailable:
            libraries = next(self.folder.glob("lib/python*/site-packages/torch/lib"))
            standins.make(libraries, self.folder / "standins")
            self.variables["LD_LIBRARY_PATH"] = str(self.folder / "standins")
            run(command, self.variables)
            return "stand-ins"

    def check(self, file: Path, backend: str = "cpu", **variables: str) -> dict:
        """Install this file over what is there, and ask what matrix_check.py asks."""
        command = [*self.install, "--no-deps", "--force-reinstall", "--no-cache-dir", file]
        run(command, self.variables | variables, cwd=self.folder)
        return json.loads(run([self.python, CHECK, backend], self.variables, cwd=self.folder).splitlines()[-1])


def requirements_of(wheel: Path) -> list[str]:
    """What the wheel asks for beside torch, extras aside."""
    with zipfile.ZipFile(wheel) as files:
        metadata = next(name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        needs = re.findall(r"^Requires-Dist: (.*)$", files.read(metadata).decode(), re.MULTILINE)
    return [need for need in needs if "extra ==" not in need and not need.startswith("torch")]


def measure(python_version: str, torch_version: str, installer: str, files: list[Path], sdist: Path | None,
            cache: Path, index: list[str]) -> Iterator[dict]:  # fmt: skip
    """One row for each file in one environment; a single row that says why, if there can be no environment."""
    row = {"date": datetime.date.today().isoformat(), "installer": installer}
    with tempfile.TemporaryDirectory(prefix="tinylora-matrix-") as folder:
        try:
            if not (python := find_python(python_version)):
                raise Unavailable("this Python is not installed here")
            if installer == "uv" and not shutil.which("uv"):
                raise Unavailable("uv is not on PATH")
            wheel = download_torch(python_version, torch_version, cache, index)
            row |= {"python": python_version, "torch": wheel.name.split("-")[1]}
            environment = Environment(python, wheel, requirements_of(files[0]), Path(folder) / "environment", installer)
        except (Unavailable, subprocess.TimeoutExpired) as reason:
            yield no_environment(python_version, row.get("torch", torch_version), installer, reason)
            return
        row["cuda_libraries"] = environment.cuda_libraries
        tried = [(file, label(file), "cpu", {}) for file in files]
        if sdist:
            bare = {"PATH": str(environment.folder / "bin"), "CXX": ""}
            compiled = {"TINYLORA_BUILD_CUDA": "0"}  # the CUDA kernels are compiled for the wheel; minutes less here
            tried += [(sdist, "sdist, no compiler", "reference", bare), (sdist, "sdist, g++", "cpu", compiled)]
        for file, name, backend, variables in tried:
            try:
                facts = environment.check(file, backend, **variables)
                found = {"python": facts["python"], "torch": facts["torch"], "isa": facts["isa"] or "reference"}
                yield row | found | {"file": name, "result": "ok", "float32_error": f"{facts['error']:.1e}"}
            except (Unavailable, subprocess.TimeoutExpired) as reason:
                yield row | {"file": name, "result": f"failed: {reason}"}


def no_environment(python: str, torch: str, installer: str, reason: object) -> dict:
    facts = {"python": python, "torch": torch, "installer": installer, "date": datetime.date.today().isoformat()}
    return facts | {"file": "all", "result": f"not tried: {reason}"}


def diagonals(pythons: list[str], torches: list[str]) -> list[tuple[str, str]]:
    """All pairs, in an order in which each Python and each torch soon had its turn."""
    rounds = range(max(len(pythons), len(torches)))
    pairs = [(python, torches[(i + shift) % len(torches)]) for shift in rounds for i, python in enumerate(pythons)]
    return list(dict.fromkeys(pairs))


def environment_of(row: dict) -> tuple[str, str, str]:
    """3.12.1, 2.13.0+cpu, pip -> 3.12, 2.13.0, pip: what was asked for, whatever was found; "newest" is its number."""
    return ".".join(row["python"].split(".")[:2]), row["torch"].partition("+")[0], row["installer"]


def untried(rows: list[dict]) -> list[tuple[str, str, str]]:
    """The environments that an earlier run left out."""
    return [environment_of(row) for row in rows if row["result"].startswith("not tried")]


def merge(rows: list[dict], kept: list[dict], environments: list[tuple[str, str, str]]) -> list[dict]:
    """What was tried now, and what is kept of other environments."""
    tried = {*environments, *map(environment_of, rows)}
    return rows + [row for row in kept if environment_of(row) not in tried]


def minor(version: str) -> list[int]:
    """3.12.1 -> [3, 12]; "newest" sorts last."""
    return [int(number) for number in re.findall(r"\d+", version)[:2]] or [99]


def label(wheel: Path) -> str:
    return "+" + wheel.name.split("-")[1].partition("+")[2]


def table(rows: list[dict]) -> str:
    """A line for each environment, a column for each file; reasons below."""
    files = list(dict.fromkeys(row["file"] for row in rows if row["file"] != "all"))
    columns = ("python", "torch", "installer")
    lines, notes = [[*columns, "CUDA libraries", *files]], []
    for key in dict.fromkeys(tuple(row[column] for column in columns) for row in rows):
        group = {row["file"]: row for row in rows if tuple(row[column] for column in columns) == key}
        cells = [group.get(name) or (group.get("all") if name.startswith("+") else None) for name in files]
        words = [cell["result"].partition(":")[0] if cell else "" for cell in cells]
        lines.append([*key, next(iter(group.values())).get("cuda_libraries", ""), *words])
        failed = [(name, row["result"]) for name, row in group.items() if row["result"] != "ok"]
        notes += [f"{key[0]}, torch {key[1]}, {key[2]}, {name}: {reason}" for name, reason in failed]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*text, *notes])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="folder of the wheels and the sdist")
    parser.add_argument("--python", nargs="+", default=PYTHONS, metavar="3.X")
    parser.add_argument("--torch", nargs="+", default=TORCHES, metavar="VERSION", help='versions, or "newest"')
    parser.add_argument("--installer", choices=("pip", "uv"), help="default: pip, and uv in the first environment")
    parser.add_argument("--cache", type=Path, default=ROOT / "build/torch", help="where downloads of torch are kept")
    parser.add_argument("--index-url", help="the registry that torch is taken from (default: pip's)")
    parser.add_argument("--missing", action="store_true", help="add to --out what it lists as not tried")
    parser.add_argument("--add", action="store_true", help="keep what --out has of other environments")
    parser.add_argument("--minutes", type=float, default=240, help="begin no further environment after that long")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    files = sorted(options.dist.glob(f"*_{platform.machine()}.whl"))
    sdists = sorted(options.dist.glob("*.tar.gz"))
    if not files or len(sdists) != 1:
        print(f"{options.dist}: expected wheels and one sdist, found {len(files)} and {len(sdists)}: make wheels")
        return 2
    options.cache.mkdir(parents=True, exist_ok=True)
    index = ["--index-url", options.index_url] if options.index_url else []
    pairs = diagonals(options.python, options.torch)
    environments = [(*pair, options.installer or "pip") for pair in pairs]
    if not options.installer:
        environments.insert(1, (*pairs[0], "uv"))
    kept: list[dict] = []
    if options.missing or options.add:
        with options.out.open(newline="") as stream:
            kept = list(csv.DictReader(stream))
    if options.missing:
        environments = untried(kept)
    rows, end = [], time.monotonic() + 60 * options.minutes
    compiled = {"pip", "uv"} if options.missing else set()  # the sdist, once by each installer: it compiles
    for python, torch, installer in environments:
        if time.monotonic() > end:
            reason = f"the {options.minutes} minutes of --minutes were over"
            rows.append(no_environment(python, torch, installer, reason))
            continue
        sdist = None if installer in compiled else sdists[0].resolve()
        compiled.add(installer)
        wheels = [file.resolve() for file in files]
        for row in measure(python, torch, installer, wheels, sdist, options.cache.resolve(), index):
            print("{python:<8} {torch:<14} {installer:<4} {file:<20} {result}".format(**row), flush=True)
            rows.append(row)
    rows = merge(rows, kept, environments)
    rows.sort(key=lambda row: (minor(row["python"]), minor(row["torch"]), row["installer"]))
    with options.out.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    print("\n" + table(rows))
    return any(row["result"].startswith("failed") for row in rows)


if __name__ == "__main__":
    sys.exit(main())
